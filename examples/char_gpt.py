"""A small character-level GPT, and the text it learns: Python's own standard library."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GPT", "Corpus", "load_corpus", "windows_at"]

VOCABULARY = 128  # ASCII, where DEL stands for every character that is not ASCII.
MAX_CHARACTERS = 8_000_000
HELD_OUT_EVERY = 10  # One file in ten is kept from training.
# Left out: packages that are not the library's, tests (many systems do not install them), and
# generated tables, which are no text to learn from.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Corpus:
    """Source text, one uint8 token a character, on the CPU."""

    train: Tensor
    held_out: Tensor
    files: int


def load_corpus(root: Path) -> Corpus:
    """Read the Python files below ``root``, ordered by relative path, up to a fixed size.

    Raises:
        FileNotFoundError: there are too few files to train on and to hold out.
    """
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    paths.sort(key=lambda path: path.relative_to(root).as_posix())

    train, held_out = bytearray(), bytearray()
    files = 0
    for path in paths:
        room = MAX_CHARACTERS - len(train) - len(held_out)
        if room == 0:
            break
        text = re.sub(r"[^\x00-\x7e]", "\x7f", path.read_text("utf-8", errors="replace"))
        part = held_out if files % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else train
        part += text[:room].encode("ascii")
        files += 1
    if not held_out:
        raise FileNotFoundError(
            f"{root} holds {files} Python source files, {HELD_OUT_EVERY} or more are needed: "
            "run a Python whose standard library is installed as source files"
        )
    return Corpus(
        torch.frombuffer(train, dtype=torch.uint8),
        torch.frombuffer(held_out, dtype=torch.uint8),
        files,
    )


def windows_at(tokens: Tensor, starts: Tensor, context: int) -> Tensor:
    """Cut one window of ``context + 1`` tokens at each start: (len(starts), context + 1)."""
    return tokens[starts[:, None] + torch.arange(context + 1)]


class Block(nn.Module):
    """A pre-norm transformer block: causal self-attention, then a two-layer perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)
        for layer in (self.qkv, self.mlp_in):
            nn.init.normal_(layer.weight, std=width**-0.5)
            nn.init.zeros_(layer.bias)
        # A block starts as the identity: a run this short then learns sooner what to attend to.
        for layer in (self.attention_out, self.mlp_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map activations (batch, context, width) to the same shape."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """A decoder-only transformer over characters; the embedding is also the output layer."""

    def __init__(self, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, windows: Tensor) -> Tensor:
        """Return the mean loss, in nats, of predicting each window's next characters.

        Args:
            windows: int64 tokens, (batch, context + 1): each one's target is its successor.
        """
        inputs, targets = windows[:, :-1], windows[:, 1:]
        x = self.norm(self.blocks(self.embedding(inputs) + self.position))
        logits = F.linear(x, self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
