"""Train a small character-level GPT twice: with ``torch.optim.Adam`` and with ``AdamAL``.

The text is the source code of Python's own standard library, so nothing is downloaded. Both runs
start from the same weights and see the same batches in the same order; only the optimizer
differs. Prints a table of what was measured, and draws the losses and the time in the optimizer.

    python examples/train_gpt.py
    python examples/train_gpt.py --device cuda --steps 2000 --width 384 --layers 6 --heads 6

Needs torch, rich and matplotlib.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import re
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from char_gpt import GPT, Corpus, load_corpus, windows_at
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import adamal_kernels
from adamal_kernels import AdamAL

HELD_OUT_WINDOWS = 64  # Spread evenly over the held-out text.
HELD_OUT_POINTS = 25
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# The learning rate is the only option given: the defaults of both are the same.
OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter], float], torch.optim.Optimizer]] = {
    "torch.optim.Adam": lambda params, lr: torch.optim.Adam(params, lr=lr, fused=True),
    "AdamAL": lambda params, lr: AdamAL(params, lr=lr),
}
# Colour, line width and marker size; the first is drawn broad, to be seen below the second.
STYLES = {"torch.optim.Adam": ("#8fbce6", 4.5, 9), "AdamAL": ("#c2410c", 1.2, 3.5)}


@dataclass(frozen=True)
class Config:
    """The settings that both runs share."""

    steps: int
    batch_size: int
    context: int
    width: int
    layers: int
    heads: int
    lr: float
    seed: int
    device: str
    dtype: str


def learning_rate_factor(step: int, steps: int) -> float:
    """Rise linearly over the first twentieth of the run, then fall to a tenth along a cosine."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.55 + 0.45 * math.cos(math.pi * progress)


def smoothing_window(config: Config) -> int:
    """Return how many steps the training loss is averaged over."""
    return max(1, config.steps // 40)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes of every tensor in the optimizer's state."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Training:
    """One model in training with one optimizer."""

    def __init__(self, name: str, config: Config, corpus: Corpus) -> None:
        self.name = name
        self.config = config
        self.tokens = corpus.train
        self.device = torch.device(config.device)
        self.data_order = torch.Generator().manual_seed(config.seed)
        self.batches = hashlib.sha256()

        torch.manual_seed(config.seed)
        self.model = GPT(config.context, config.width, config.layers, config.heads)
        self.weights = hashlib.sha256()
        for parameter in self.model.parameters():
            self.weights.update(parameter.detach().numpy().tobytes())
        self.model.to(self.device, DTYPES[config.dtype])
        self.optimizer = OPTIMIZERS[name](self.model.parameters(), config.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, config.steps)
        )

        last_start = len(corpus.held_out) - config.context - 1
        starts = torch.linspace(0, last_start, HELD_OUT_WINDOWS, dtype=torch.float64).long()
        held_out = windows_at(corpus.held_out, starts, config.context)
        self.held_out = held_out.to(self.device, torch.int64)
        self.step_seconds: list[float] = []
        self.train_loss: list[float] = []
        self.held_out_loss: list[tuple[int, float]] = []

    def step(self) -> float:
        """Take one optimizer step on the next batch; return the loss before it.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        config = self.config
        starts = torch.randint(
            len(self.tokens) - config.context, (config.batch_size,), generator=self.data_order
        )
        batch = windows_at(self.tokens, starts, config.context)
        self.batches.update(batch.numpy().tobytes())
        loss = self.model(batch.to(self.device, torch.int64))
        self.optimizer.zero_grad()
        loss.backward()

        synchronize(self.device)
        before = time.perf_counter()
        self.optimizer.step()
        synchronize(self.device)
        self.step_seconds.append(time.perf_counter() - before)

        self.schedule.step()
        value = loss.item()
        self.train_loss.append(value)
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss of {self.name} is {value} in step {len(self.train_loss)}: lower --lr"
            )
        return value

    @torch.no_grad()
    def evaluate(self) -> None:
        """Measure the held-out loss."""
        self.held_out_loss.append((len(self.train_loss), self.model(self.held_out).item()))

    def summary(self) -> dict[str, Any]:
        """Return what was measured, after the last step; losses in nats per character."""
        optimizer = self.optimizer
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        # torch's kernel has no name to ask for: fused=True raises where it cannot run.
        backends = optimizer.backends_used if isinstance(optimizer, AdamAL) else ("torch fused",)
        return {
            "optimizer": self.name,
            "final_train_loss": statistics.fmean(self.train_loss[-smoothing_window(self.config) :]),
            "final_held_out_loss": self.held_out_loss[-1][1],
            "optimizer_seconds": self.step_seconds,
            "optimizer_ms_per_step": 1e3 * statistics.median(self.step_seconds),
            "state_bytes_per_parameter": state_bytes(optimizer) / parameters,
            "backend": ", ".join(backends),
            "parameters": parameters,
            "initial_weights_sha256": self.weights.hexdigest(),
            "batches_sha256": self.batches.hexdigest(),
            "train_loss": self.train_loss,
            "held_out_loss": self.held_out_loss,  # Pairs of (steps taken, loss).
        }


def train(config: Config, corpus: Corpus, console: Console) -> list[dict[str, Any]]:
    """Train with every optimizer, under a progress bar; return their summaries.

    The trainings take turns, a step each, so that whatever else the machine is doing weighs on
    the timings of all of them alike.
    """
    trainings = [Training(name, config, corpus) for name in OPTIMIZERS]
    with Progress(
        "{task.description:>16}",
        BarColumn(),
        MofNCompleteColumn(),
        "loss {task.fields[loss]:.3f}",
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    ) as progress:
        tasks = [
            progress.add_task(training.name, total=config.steps, loss=math.nan)
            for training in trainings
        ]
        for step in range(config.steps):
            for training, task in zip(trainings, tasks, strict=True):
                if step % max(1, config.steps // HELD_OUT_POINTS) == 0:
                    training.evaluate()
                progress.update(task, advance=1, loss=training.step())
        for training in trainings:
            training.evaluate()
    return [training.summary() for training in trainings]


def describe(config: Config) -> str:
    """Put the settings into one line."""
    return (
        f"width {config.width}, layers {config.layers}, heads {config.heads}, {config.dtype}; "
        f"{config.steps} steps of {config.batch_size} x {config.context} characters, "
        f"lr {config.lr:g}, seed {config.seed}"
    )


def device_name(device: torch.device) -> str:
    """Name the device for a reader: the GPU's model, or the CPU's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


def result_table(runs: Sequence[dict[str, Any]], config: Config) -> Table:
    """Lay the measurements out with one column for each optimizer."""
    table = Table(title="Same weights, same batches, two optimizers")
    table.add_column("")
    for run in runs:
        table.add_column(run["optimizer"], justify="right")
    last = smoothing_window(config)
    rows = {
        f"Training loss, final {last}-step mean (nats/char)": "{final_train_loss:.4f}",
        "Held-out loss (nats/char)": "{final_held_out_loss:.4f}",
        "Optimizer, median (ms/step)": "{optimizer_ms_per_step:.3f}",
        "Optimizer state (bytes/parameter)": "{state_bytes_per_parameter:.3f}",
        "Backend": "{backend}",
    }
    for label, cell in rows.items():
        table.add_row(label, *(cell.format_map(run) for run in runs))
    return table


def draw(runs: Sequence[dict[str, Any]], config: Config, path: Path) -> None:
    """Draw what was learned and what it took into a PNG: losses left, optimizer time right."""
    window = smoothing_window(config)
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    panels = figure.subplot_mosaic(
        [["loss", "time"], ["gap", "time"]], height_ratios=[3.2, 1], width_ratios=[1.5, 1]
    )
    loss, gap, time_spent = panels["loss"], panels["gap"], panels["time"]
    gap.sharex(loss)
    for run in runs:
        name = run["optimizer"]
        color, width, size = STYLES[name]
        smooth = torch.tensor(run["train_loss"]).unfold(0, window, 1).mean(-1)
        centers = torch.arange(len(smooth)) + (window + 1) / 2
        steps, held_out = zip(*run["held_out_loss"], strict=True)
        loss.plot(centers, smooth, color=color, lw=width, label=f"{name}, train")
        loss.plot(steps, held_out, "o", color=color, ms=size, label=f"{name}, held out")
        seconds = list(accumulate(run["optimizer_seconds"], initial=0.0))
        label = f"{name} ({run['backend']}): {seconds[-1]:.3g} s"
        time_spent.plot(seconds, color=color, lw=3, label=label)
    adam, adamal = runs
    pairs = zip(adam["held_out_loss"], adamal["held_out_loss"], strict=True)
    gap.axhline(0, color=STYLES[adam["optimizer"]][0], lw=2)
    gap.plot(steps, [b - a for (_, a), (_, b) in pairs], "o-", color=color, lw=1.2, ms=size)

    loss.set_ylabel("loss (nats per character)")
    title = f"Training: running mean of {window} steps. Held out: {HELD_OUT_WINDOWS} fixed windows."
    loss.set_title(title, fontsize="medium")
    gap.set(xlabel="optimizer step", ylabel="difference (nats)")
    title = f"Held-out loss: {adamal['optimizer']} minus {adam['optimizer']}"
    gap.set_title(title, fontsize="medium")
    time_spent.set(xlabel="optimizer step", ylabel="seconds inside optimizer.step(), so far")
    ratio = adam["optimizer_ms_per_step"] / adamal["optimizer_ms_per_step"]
    title = f"{adamal['optimizer']}'s median step is {ratio:.2f} times as fast"
    time_spent.set_title(title, fontsize="medium")
    for axes in (loss, time_spent):
        axes.legend(frameon=False)
    for axes in panels.values():
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, config.steps)
    time_spent.set_ylim(bottom=0)
    title = f"Character-level GPT on {device_name(torch.device(config.device))}"
    figure.suptitle(f"{title}\n{describe(config)}", fontsize="large")
    figure.savefig(path, dpi=150)


def whole_number(least: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from ``least`` up."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from {least} up")
        return int(text)

    return parse


def learning_rate(text: str) -> float:
    """Parse a learning rate."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: give a positive, finite number")
    return value


def compute_device(text: str) -> str:
    """Parse the name of a device that this example can use, and check that it is here."""
    found = torch.cuda.device_count()
    if text == "auto":
        return "cuda" if found else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", text, re.ASCII)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: give auto, cpu, cuda or cuda:<index>")
    if text != "cpu" and int(match[1] or 0) >= found:
        raise argparse.ArgumentTypeError(
            f"{text!r}: torch {torch.__version__} finds {found} GPUs here; use --device cpu, "
            "or a torch built for this machine's GPU"
        )
    return text


def file_name(suffix: str) -> Callable[[str], Path]:
    """Return a parser of names of files to write."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix != suffix or path.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r}: give a file name that ends in {suffix}")
        return path

    return parse


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line; a bad option ends the program, before any training."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    count = whole_number(1)
    add = parser.add_argument
    add("--steps", type=count, default=700, help="optimizer steps of each run")
    add("--batch-size", type=count, default=16, help="windows a step")
    add("--context", type=count, default=128, help="characters a window")
    add("--width", type=count, default=128, help="width of the model")
    add("--layers", type=count, default=2, help="transformer blocks")
    add("--heads", type=count, default=4, help="attention heads; must divide the width")
    add("--lr", type=learning_rate, default=3e-3, help="peak learning rate")
    add("--seed", type=whole_number(0), default=0, help="seed of the weights and the data order")
    add("--device", type=compute_device, default="auto", help="auto, cpu, cuda or cuda:<index>")
    add("--dtype", choices=DTYPES, default="float32", help="type of the parameters")
    add("--output", type=file_name(".png"), default="build/train_gpt.png", help="the picture")
    add("--json", type=file_name(".json"), help="also write every figure into this file")
    options = parser.parse_args(argv)
    if options.width % options.heads:
        parser.error(
            f"argument --heads: {options.heads} does not divide --width {options.width}: "
            "change one of them"
        )
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Train with each optimizer and report."""
    options = vars(parse_arguments(argv))
    output, json_file = options.pop("output"), options.pop("json")
    config = Config(**options)
    console = Console(highlight=False)
    try:
        for file in filter(None, (output, json_file)):  # Before the minutes of training.
            file.parent.mkdir(parents=True, exist_ok=True)
        corpus = load_corpus(Path(sysconfig.get_path("stdlib")))
        longest = len(corpus.held_out) - 1
        if config.context > longest:
            sys.exit(f"train_gpt: error: --context {config.context}: give {longest} or less")
        about = {
            "device": device_name(torch.device(config.device)),
            "versions": f"adamal_kernels {adamal_kernels.__version__}, torch {torch.__version__}, "
            f"Python {platform.python_version()}",
            "text": f"{corpus.files} files of Python's standard library, {len(corpus.train):,} "
            f"characters to train on, {len(corpus.held_out):,} held out",
            "settings": describe(config),
        }
        for label, value in about.items():
            console.print(f"{label:>8}: {value}", soft_wrap=True)
        runs = train(config, corpus, console)
        draw(runs, config, output)
        if json_file:
            report = about | {"config": asdict(config), "runs": runs}
            json_file.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    except (OSError, FloatingPointError) as error:
        sys.exit(f"train_gpt: error: {error}")
    console.print(result_table(runs, config))
    console.print(f"Losses and optimizer time: {output}", soft_wrap=True)


if __name__ == "__main__":
    main()
