"""AdamAL, Adam with a second moment that never decreases, as one multi-tensor kernel pass.

    >>> from adamal_kernels import AdamAL
    >>> import torch
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = AdamAL(model.parameters(), lr=1e-3)   # where torch.optim.Adam stood

``adamal info`` says what can run on this machine, and why the rest cannot.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from .backends import BackendName
    from .modes.in_backward import InBackwardHandle
    from .optimizer import Adam, AdamAL, AdamALW, AdamW
    from .projections import Box, L1Ball, L2Ball, NonNegative, Projection, Simplex
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

# torch is imported with the first of these names that is used, so that `adamal --help` needs none.
# Hidden from type checkers, which would let every other name pass.
if not TYPE_CHECKING:

    def __getattr__(name):
        modules = {name: name for name in ("optimizer", "projections", "watch", "backends")}
        modules["in_backward"] = "modes.in_backward"
        if name in modules:
            return import_module(f".{modules[name]}", __name__)
        if name in __all__:
            for module in modules.values():
                home = import_module(f".{module}", __name__)
                if name in home.__all__:
                    return globals().setdefault(name, getattr(home, name))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
