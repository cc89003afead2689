"""``python -m benchmarks.paper``: run experiments, write what they found, judge the claims."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from .catalogue import EXPERIMENTS
from .experiment import Experiment
from .record import RESULTS, new_record, write_record
from .summary import summary_table
from .summary import write as write_summary


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:16}{cls.title}" for name, cls in EXPERIMENTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description="Test the paper's claims. Without a name, all experiments run:\n\n" + listed,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", nargs="*", help="run only this one; several may be named")
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="instead of the experiments' own number"
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
    for name in options.experiment:
        if name not in EXPERIMENTS:
            parser.error(f"unknown experiment {name!r}; there are: {', '.join(EXPERIMENTS)}")
    if options.seeds is not None and options.seeds < 2:
        parser.error(f"--seeds {options.seeds}: a spread takes 2 seeds or more")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"--output {options.output}: is a file; name a folder")
    sizes = {} if options.seeds is None else {"seeds": options.seeds}
    names = dict.fromkeys(options.experiment or EXPERIMENTS)
    return [EXPERIMENTS[name](**sizes) for name in names]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = _parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    experiments = _chosen(parser, options)
    # More threads would add in another order, and each run would give other figures.
    torch.set_num_threads(1)
    command = shlex.join(["python", "-m", __package__ or "benchmarks.paper", *arguments])
    console = Console(highlight=False)
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
            record = new_record(experiment, results, seconds, command)
            path = write_record(record, options.output)
            for name, figure in experiment.draw(record).items():
                figure.savefig(path.with_name(f"{name}.png"))
            for table in experiment.tables(record):
                console.print(table)
            progress.stop_task(task)
    console.print(summary_table(write_summary(options.output)))
    console.print(f"Records, plots and summary.md: {os.path.relpath(options.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
