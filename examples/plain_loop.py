"""Train a small network in a plain loop, with a warm-up, a schedule and averaged weights.

    python examples/plain_loop.py

AdamAL under ``torch.optim.lr_scheduler`` and ``torch.optim.swa_utils``, with a checkpoint that
``torch.load(weights_only=True)`` reads. Needs torch.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

from adamal_kernels import AdamAL


class Run:
    """A model that learns to square its inputs; from ``average_from`` on, weights are averaged."""

    def __init__(
        self,
        optimizer: type[torch.optim.Optimizer] = AdamAL,
        *,
        steps: int = 200,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Make model, optimizer and schedules for ``steps`` steps on the CPU."""
        torch.manual_seed(0)
        # Batch norm takes out a bias before it, whose gradient would be rounding errors alone.
        layers = nn.Linear(1, 32, bias=False), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 1)
        self.model = nn.Sequential(*layers).to(dtype)
        self.averaged = AveragedModel(self.model)
        self.optimizer = optimizer(self.model.parameters(), lr=3e-2)
        self.average_from = steps * 3 // 4
        warmup = steps // 10
        self.schedule = SequentialLR(
            self.optimizer,
            [
                LinearLR(self.optimizer, 0.1, total_iters=warmup),
                CosineAnnealingLR(self.optimizer, self.average_from - warmup),
            ],
            [warmup],
        )
        self.swa_schedule = SWALR(self.optimizer, swa_lr=1e-2, anneal_epochs=5)
        self.inputs = torch.linspace(-1, 1, 256, dtype=dtype).unsqueeze(1)
        self.taken = 0

    def step(self) -> float:
        """Take one step; return its loss."""
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(self.inputs), self.inputs.square())
        loss.backward()
        self.optimizer.step()
        self.taken += 1
        if self.taken > self.average_from:
            self.averaged.update_parameters(self.model)
            self.swa_schedule.step()
        else:
            self.schedule.step()
        return loss.item()

    def finish(self) -> float:
        """Let batch norm see the data with the averaged weights; return their loss."""
        update_bn([self.inputs], self.averaged)
        self.averaged.eval()
        with torch.no_grad():
            return nn.functional.mse_loss(self.averaged(self.inputs), self.inputs.square()).item()

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint."""
        parts = ("model", "averaged", "optimizer", "schedule", "swa_schedule")
        return {"taken": self.taken, **{name: getattr(self, name).state_dict() for name in parts}}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.taken = saved["taken"]
        for name, state in saved.items():
            if name != "taken":
                getattr(self, name).load_state_dict(state)


def main() -> int:
    """Train and print the losses."""
    run = Run()
    for step in range(1, 201):
        loss = run.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.6f}")
    print(f"averaged weights: loss {run.finish():.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
