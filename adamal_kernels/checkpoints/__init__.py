"""What checkpoints hold: ours, of any version, and those of other optimizers."""
