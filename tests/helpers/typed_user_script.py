"""A user's script with every public name and option, as type checkers see it; it also runs.

``tests/tools/test_typing.py`` checks it with mypy and pyright. A comment ``type: ignore`` marks
what they must refuse: an unused one is an error.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

import adamal_kernels
from adamal_kernels import (
    Adam,
    AdamAL,
    AdamALW,
    AdamW,
    BackendName,
    Box,
    InBackwardHandle,
    L1Ball,
    L2Ball,
    NonNegative,
    ParameterStatistics,
    Projection,
    Simplex,
    Watch,
)

OPTIMIZERS: tuple[type[AdamAL | Adam], ...] = (AdamAL, AdamALW, Adam, AdamW)
BACKENDS: Sequence[BackendName] = ("auto", "cuda", "triton", "cpu", "foreach", "reference")
SETS: list[Projection | None] = [
    Box(-1, 1),
    Box(lo=-0.5, hi=0.5),
    NonNegative(),
    L2Ball(3.0),
    L2Ball(3.0, dim=-1),
    L2Ball(radius=3, dim=(0, 1)),
    L1Ball(1.0, dim=None),
    L1Ball(1.0, dim=1),
    Simplex(),
    Simplex(2.0, dim=-1),
    Simplex(total=1, dim=(-1,)),
    None,
]


def construct(model: nn.Linear) -> list[torch.optim.Optimizer]:
    """Pass parameters, names and options in every form they may have."""
    parameters = list(model.parameters())
    made: list[torch.optim.Optimizer] = [cls(model.parameters(), lr=1e-3) for cls in OPTIMIZERS]
    made += [
        AdamAL(model.parameters(), 1e-3, (0.9, 0.999), 1e-8, 0.0, False),
        AdamAL(parameters, betas=[0.9, 0.999], max_grad_norm=1),
        AdamAL(model.named_parameters(), lr=torch.tensor(1e-3), foreach=False, fused=False),
        Adam(parameters, betas=(torch.tensor(0.9), torch.tensor(0.999)), amsgrad=True),
        AdamW(parameters, fused=None, foreach=True, maximize=True, capturable=False),
        AdamALW(parameters, weight_decay=0.1, differentiable=False, bias_correction=False),
        AdamAL(parameters, decoupled_weight_decay=True, projection=Box(-1, 1), backend="cpu"),
    ]
    for projection in SETS:
        made.append(AdamAL([model.weight], projection=projection))
    groups: list[dict[str, Any]] = [
        {"params": [model.weight], "projection": L2Ball(3.0, dim=-1), "lr": 1e-2},
        {"params": model.bias, "backend": "reference"},
    ]
    made.append(AdamAL(groups, backend="foreach"))
    made[-1].add_param_group({"params": [nn.Parameter(torch.zeros(2))], "weight_decay": 0.1})
    return made


def named_backend(model: nn.Module, backend: BackendName) -> str | None:
    """Return why a backend cannot run here, or None."""
    try:
        AdamAL(model.parameters(), backend=backend)
    except RuntimeError as error:
        return str(error)
    return None


def train(model: nn.Module, optimizer: AdamAL) -> float:
    """Step under schedules, a closure, a watch and a scaler; save and load."""
    data = torch.ones(3, 4)

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = model(data).square().mean()
        loss.backward()
        return loss

    schedules = [
        CosineAnnealingLR(optimizer, T_max=10),
        LambdaLR(optimizer, lambda epoch: 0.9**epoch),
    ]
    loss: float = optimizer.step(closure).item()
    for schedule in schedules:
        schedule.step()
    OneCycleLR(optimizer, max_lr=1e-2, total_steps=5).step()

    watch: Watch
    with optimizer.watch() as watch:
        closure()
        optimizer.step()
    found: dict[Tensor, ParameterStatistics] = watch.read()
    for parameter, statistics in found.items():
        since: int | None = statistics.steps_since_growth
        loss += parameter.numel() * statistics.grown_fraction + (since or 0)
        loss += float(statistics.as_tensor()[0])
    assert not watch.is_on
    print(watch, watch.table().row_count)

    scaler = torch.amp.GradScaler("cpu")
    optimizer.zero_grad()
    scaler.scale(model(data).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()

    used: tuple[str, ...] = optimizer.backends_used
    clipped: float | None = optimizer.max_grad_norm
    optimizer.max_grad_norm = 1.0
    closure()
    optimizer.step()
    norm: Tensor | None = optimizer.last_grad_norm
    skipped: int = int(optimizer.skipped_steps)
    assert used
    assert clipped is None
    assert norm is not None
    assert skipped == 0

    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copied: AdamAL = copy.deepcopy(optimizer)
    copied.load_state_dict(torch.load(file, weights_only=True))
    state: Tensor = copied.state[next(iter(copied.state))]["exp_avg"]
    rate: float = copied.param_groups[0]["lr"]
    return loss + float(state.sum()) + rate


def step_in_backward(model: nn.Module) -> None:
    """Step in backward, of a whole model and of some parameters."""
    optimizer = AdamAL(model.parameters())
    handle: InBackwardHandle = optimizer.step_in_backward(model)
    model(torch.ones(3, 4)).mean().backward()
    handle.remove()
    with optimizer.step_in_backward(list(model.parameters())[:1]):
        model(torch.ones(3, 4)).mean().backward()
    with optimizer.step_in_backward():
        model(torch.ones(3, 4)).mean().backward()


def refused(model: nn.Module) -> int:
    """Make each mistake that a type checker can find; return how many raise here, too."""
    mistakes = (
        lambda: AdamAL(model.parameters(), backend="gpu"),  # type: ignore[arg-type]
        lambda: AdamALW(model.parameters(), backend="CPU"),  # type: ignore[arg-type]
        lambda: AdamAL(model.parameters(), projection=(-1, 1)),  # type: ignore[arg-type]
        lambda: AdamAL(model.parameters(), betas=0.9),  # type: ignore[arg-type]
        lambda: AdamAL(model.parameters(), lr="1e-3"),  # type: ignore[arg-type]
        lambda: AdamALW(model.parameters(), decoupled_weight_decay=True),  # type: ignore[call-arg]
        lambda: Box(-1),  # type: ignore[call-arg]
        lambda: L2Ball("3.0"),  # type: ignore[arg-type]
        lambda: L2Ball(3.0, dim="rows"),  # type: ignore[arg-type]
    )
    raised = 0
    for mistake in mistakes:
        try:
            mistake()
        except (TypeError, ValueError):
            raised += 1
    return raised - len(mistakes)


def main() -> None:
    """Run all of it."""
    model = nn.Linear(4, 2)
    assert len(construct(model)) > len(SETS)
    assert None in [named_backend(model, backend) for backend in BACKENDS]
    train(model, AdamAL(model.parameters(), lr=1e-2))
    step_in_backward(model)
    assert refused(model) == 0
    version: str = adamal_kernels.__version__
    print(version)


if __name__ == "__main__":
    main()
