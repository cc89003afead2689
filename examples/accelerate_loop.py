"""Train a small network with accelerate and AdamAL.

    python examples/accelerate_loop.py

``accelerator.prepare`` wraps AdamAL as it does any optimizer; ``save_state`` and ``load_state``
take it along. Needs accelerate (``pip install "adamal-kernels[trainers]"``).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adamal_kernels import AdamAL


class Run:
    """A model that learns to square its inputs, prepared by accelerate."""

    def __init__(
        self,
        optimizer: type[torch.optim.Optimizer] = AdamAL,
        *,
        steps: int = 200,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Make model, optimizer, schedule and data for ``steps`` steps on the CPU."""
        torch.manual_seed(0)
        # Every batch of 64 spans the interval.
        inputs = torch.linspace(-1, 1, 256, dtype=dtype).view(64, 4).t().reshape(-1, 1)
        model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)).to(dtype)
        made = optimizer(model.parameters(), lr=3e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(made, steps // 2)
        loader = DataLoader(TensorDataset(inputs, inputs.square()), batch_size=64)
        # Two batches make a step.
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            model, made, loader, schedule
        )

    def epoch(self) -> float:
        """Take the two steps of an epoch; return the last loss."""
        for inputs, targets in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = nn.functional.mse_loss(self.model(inputs), targets)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
        return loss.item()

    def save(self, folder: Path) -> None:
        """Write model, optimizer, schedule and random states."""
        self.accelerator.save_state(str(folder))

    def load(self, folder: Path) -> None:
        """Go on from what :meth:`save` wrote."""
        self.accelerator.load_state(str(folder))


def main() -> int:
    """Train and print the loss."""
    run = Run()
    for epoch in range(100):
        loss = run.epoch()
        if epoch % 25 == 24:
            print(f"step {2 * (epoch + 1)}: loss {loss:.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
