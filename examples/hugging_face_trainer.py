"""Train a small GPT-2, made from a configuration, with Hugging Face's Trainer and AdamALW.

    python examples/hugging_face_trainer.py

What differs from any other script is one argument, ``optimizer_cls_and_kwargs``: parameter groups
without decay, the schedule, clipping and checkpoints stay the Trainer's. Needs transformers and
accelerate (``pip install "adamal-kernels[trainers]"``), and downloads nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from adamal_kernels import AdamALW

VOCABULARY, CONTEXT = 32, 16


class Counting(Dataset[dict[str, Tensor]]):
    """Sequences that count on from a random token, modulo the vocabulary's size."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sequence; the model shifts its labels itself."""
        tokens = (torch.arange(CONTEXT) * (1 + index % 3) + index) % VOCABULARY
        return {"input_ids": tokens, "labels": tokens}


def make_trainer(
    folder: Path,
    optimizer: type[torch.optim.Optimizer] = AdamALW,
    *,
    steps: int = 200,
    save_steps: int = 100,
    dtype: torch.dtype = torch.float32,
) -> Trainer:
    """Return a Trainer that is about to train, on the CPU, and to write into ``folder``."""
    torch.manual_seed(0)
    configuration = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        weight_decay=0.01,
        save_steps=save_steps,
        logging_steps=steps // 4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(
        GPT2LMHeadModel(configuration).to(dtype),
        arguments,
        train_dataset=Counting(),
        optimizer_cls_and_kwargs=(optimizer, {"lr": 3e-3}),
    )


def main() -> int:
    """Train and print what the Trainer logged."""
    with TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder))
        trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']}: loss {float(entry['loss']):.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
