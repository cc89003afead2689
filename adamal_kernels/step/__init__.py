"""From param groups to backends: options, checked entries, and the step over them."""
