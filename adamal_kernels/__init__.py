"""AdamAL, Adam with a second moment that never decreases, as one multi-tensor kernel pass.

    >>> from adamal_kernels import AdamAL
    >>> import torch
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = AdamAL(model.parameters(), lr=1e-3)   # where torch.optim.Adam stood

``python -m adamal_kernels info`` says what can run on this machine, and why the rest cannot.
"""

from .backends import BackendName
from .in_backward import InBackwardHandle
from .optimizer import Adam, AdamAL, AdamALW, AdamW
from .projections import Box, L1Ball, L2Ball, NonNegative, Projection, Simplex
from .version import __version__
from .watch import ParameterStatistics, Watch

__all__ = [
    "Adam",
    "AdamAL",
    "AdamALW",
    "AdamW",
    "BackendName",
    "Box",
    "InBackwardHandle",
    "L1Ball",
    "L2Ball",
    "NonNegative",
    "ParameterStatistics",
    "Projection",
    "Simplex",
    "Watch",
    "__version__",
]
