"""``python -m benchmarks.paper``: run experiments, write what they found, judge the claims."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from .catalogue import EXPERIMENTS
from .cifar10 import Cifar10Error, find_cifar10
from .experiment import Experiment
from .images import ImageClassification
from .record import RESULTS, new_record, write_record
from .report import report


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:16}{cls.title}" for name, cls in EXPERIMENTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description="Test the paper's claims. Without a name, all experiments run:\n\n" + listed,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", nargs="*", help="run only this one; several may be named")
    parser.add_argument(
        "--report",
        action="store_true",
        help="run nothing: draw and judge the records in --output anew",
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="instead of the experiments' own number"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="CIFAR-10 in its binary form: images runs on it, with ResNet-18 and VGG-16, and not "
        "on scikit-learn's digits",
    )
    parser.add_argument("--device", help="where images trains, such as cuda:0. Default: cpu")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that train at once. Default: 2"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="for JSON, plots and summary.md. Default: %(default)s",
    )
    return parser


def _chosen(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Experiment]:
    """Return the experiments to run, or end the program with what is wrong."""
    names = list(dict.fromkeys(options.experiment or EXPERIMENTS))
    for name in names:
        if name not in EXPERIMENTS:
            parser.error(f"unknown experiment {name!r}; there are: {', '.join(EXPERIMENTS)}")
    if options.seeds is not None and options.seeds < 2:
        parser.error(f"--seeds {options.seeds}: a spread takes 2 seeds or more")
    if options.workers is not None and options.workers < 0:
        parser.error(f"--workers {options.workers}: give 0, for none beside this process, or more")
    if options.report and not options.output.is_dir():
        parser.error(f"--report: {options.output} is no folder; name one that holds records")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"--output {options.output}: is a file; name a folder")
    sizes = {
        key: value
        for key, value in (("seeds", options.seeds), ("workers", options.workers))
        if value is not None
    }
    experiments: dict[str, Experiment] = {name: EXPERIMENTS[name](**sizes) for name in names}
    for option in ("data", "device"):
        if getattr(options, option) is not None and ImageClassification.name not in experiments:
            parser.error(f"--{option} is for images, which is not among: {', '.join(names)}")
    if ImageClassification.name in experiments:
        experiments[ImageClassification.name] = _on_images(parser, options, sizes)
    return list(experiments.values())


def _on_images(
    parser: argparse.ArgumentParser, options: argparse.Namespace, sizes: dict[str, Any]
) -> Experiment:
    """Return the image experiment on the data and device that are asked for."""
    if options.device is not None:
        try:
            torch.empty(0, device=options.device)
        except (RuntimeError, AssertionError) as error:
            parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
        sizes = {**sizes, "device": options.device}
    if options.data is None:
        return ImageClassification(**sizes)
    try:
        return ImageClassification.on_cifar10(find_cifar10(options.data), **sizes)
    except Cifar10Error as error:
        parser.error(f"--data: {error}")


def _run(experiments: list[Experiment], folder: Path, command: str, console: Console) -> None:
    """Run every experiment and write its record, under a progress bar."""
    with Progress(
        TextColumn("{task.description:>16}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        tasks = [progress.add_task(e.name, total=e.units(), start=False) for e in experiments]
        for experiment, task in zip(experiments, tasks, strict=True):
            progress.start_task(task)
            began = time.perf_counter()
            results = experiment.run(lambda units, task=task: progress.advance(task, units))
            seconds = time.perf_counter() - began
            write_record(new_record(experiment, results, seconds, command), folder)
            progress.stop_task(task)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = _parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    experiments = _chosen(parser, options)
    console = Console(highlight=False)
    if not options.report:
        # More threads would add in another order, and each run would give other figures.
        torch.set_num_threads(1)
        command = shlex.join(["python", "-m", __package__ or "benchmarks.paper", *arguments])
        _run(experiments, options.output, command, console)
    report({experiment.name for experiment in experiments}, options.output, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
