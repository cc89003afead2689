"""Other ways to step than ``step()``: inside ``torch.compile``, and inside ``backward()``."""
