"""What a step works on: tensors in buckets, scalars and layouts; no groups and no backends."""
