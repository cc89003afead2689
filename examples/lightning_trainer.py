"""Train a small network with Lightning and AdamAL.

    python examples/lightning_trainer.py

What differs from any other module is the optimizer that ``configure_optimizers`` returns. Needs
lightning (``pip install "adamal-kernels[trainers]"``).
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adamal_kernels import AdamAL


class Squares(lightning.LightningModule):
    """Learns to square its inputs."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = AdamAL, steps: int = 200) -> None:
        """Make the network; ``steps`` is the length of the schedule."""
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
        self.optimizer = optimizer
        self.steps = steps
        self.loss: Tensor | None = None

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Return the loss of a batch."""
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.network(inputs), targets)
        self.loss = loss.detach()
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimizer and a schedule that advances with every step."""
        optimizer = self.optimizer(self.parameters(), lr=3e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-2, total_steps=self.steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the data, four batches an epoch."""
        # Every batch of 64 spans the interval.
        inputs = torch.linspace(-1, 1, 256, dtype=self.dtype).view(64, 4).t().reshape(-1, 1)
        return DataLoader(TensorDataset(inputs, inputs.square()), batch_size=64)


def make_trainer(folder: Path, steps: int = 200, **options: Any) -> lightning.Trainer:
    """Return a Trainer for ``steps`` steps on the CPU that writes into ``folder``."""
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def main() -> int:
    """Train and print the loss."""
    module = Squares()
    with TemporaryDirectory() as folder:
        make_trainer(Path(folder)).fit(module)
    print(f"step {module.trainer.global_step}: loss {float(module.loss):.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
