"""Eager steps on CPUs: in pieces, in bounded memory, and unchanged ones without checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import adamal_kernels.step.stepper
from adamal_kernels import Adam, AdamAL, Box
from adamal_kernels.backends.eager import foreach_cpu
from adamal_kernels.verify import same_bits

PIECE = foreach_cpu._PER_THREAD * torch.get_num_threads()


def pair(
    sizes: list[int], dtype: torch.dtype, cls: type = AdamAL, **options: Any
) -> list[tuple[list[Tensor], Any]]:
    """Return parameters and optimizer of ``foreach`` and ``reference``, stepped three times."""
    made = []
    for backend in ("foreach", "reference"):
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(n, generator=generator).to(dtype).requires_grad_() for n in sizes]
        groups = [
            {"params": params[::2], "lr": 0.1},
            {"params": params[1::2], "lr": 0.2, "projection": Box(-0.5, 0.4)},
        ]
        optimizer = cls(groups, backend=backend, **options)
        for step in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
                p.grad[p.grad > 1 + step] = float("nan")
            optimizer.step()
        made.append((params, optimizer))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("cls", [AdamAL, Adam])
def test_sizes_about_a_piece(cls: type, dtype: torch.dtype) -> None:
    large = foreach_cpu._LARGE
    sizes = [large - 1, 1, large, PIECE - 1, PIECE, PIECE + 1, 0, *[large // 2 + 1] * 9]
    (params, ours), (expected, theirs) = pair(sizes, dtype, cls, amsgrad=cls is Adam)
    for p, q in zip(params, expected, strict=True):
        assert same_bits(p.detach(), q.detach())
        for key, value in theirs.state[q].items():
            assert same_bits(ours.state[p][key], value), key


class NewMemory(TorchDispatchMode):
    """Adds up the bytes of all storages that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            t.untyped_storage()._cdata
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in known:
                self.storages[t.untyped_storage()._cdata] = t.untyped_storage()
        return out

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@pytest.mark.parametrize("sizes", [[100 * PIECE], [PIECE // 100] * 5000], ids=["large", "small"])
def test_temporaries_are_a_few_pieces(sizes: list[int]) -> None:
    params = [torch.ones(n, requires_grad=True) for n in sizes]
    optimizer = AdamAL(params, backend="foreach", weight_decay=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with NewMemory() as new:
        optimizer.step()
    steps = 4 * len(params)
    assert 0 < new.nbytes <= 7 * 4 * PIECE + steps + 1000
    assert optimizer._stepper._workspaces
    kept = [w["scratch"].nbytes for w in optimizer._stepper._workspaces.values()]
    assert kept == [7 * 4 * PIECE]


def _moved(params: list[Tensor], optimizer: Any) -> None:
    params[0].data = params[0].detach().clone()


# What is done before step 3, and which steps are checked for it.
CHANGES: dict[str, tuple[Callable[..., Any], set[int]]] = {
    "nothing": (lambda params, o: None, set()),
    "a learning rate": (lambda params, o: o.param_groups[0].update(lr=0.3), set()),
    "a parameter's memory": (_moved, {3}),
    "a set": (lambda params, o: o.param_groups[0].update(projection=Box(-1, 1)), {3}),
    "a state goes": (lambda params, o: o.state.pop(params[0]), {3}),
    "a gradient goes and comes": (lambda params, o: setattr(params[0], "grad", None), {3, 4}),
    "a gradient is transposed": (
        lambda params, o: setattr(params[0], "grad", torch.ones(4, 3).t()),
        {3, 4},
    ),
}


@pytest.mark.parametrize("backend", ["foreach", "reference"])
@pytest.mark.parametrize("change", CHANGES)
def test_only_what_has_changed_is_checked_again(
    backend: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []
    real = adamal_kernels.step.stepper.check_entry

    def check_entry(param: Tensor, *args: Any) -> Any:
        checked.append(param)
        return real(param, *args)

    monkeypatch.setattr(adamal_kernels.step.stepper, "check_entry", check_entry)
    params = [torch.ones(3, 4, requires_grad=True) for _ in range(3)]
    optimizer = AdamAL(params, backend=backend)
    apply, checked_for_it = CHANGES[change]
    # What the others are proven by is checked anew each time.
    expected = range(5) if backend == "reference" else {0, *checked_for_it}
    for step in range(5):
        for p in params:
            p.grad = torch.ones_like(p)
        if step == 3:
            apply(params, optimizer)
        checked.clear()
        optimizer.step()
        assert bool(checked) == (step in expected), step
