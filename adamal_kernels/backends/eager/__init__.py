"""The formula in eager PyTorch, for any device: nothing is compiled."""
