"""``python -m adamal_kernels``: info, verify and bench."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from . import bench, build, info, verify
from .backends import BACKENDS
from .version import __version__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adamal_kernels", description="AdamAL as one multi-tensor kernel pass."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    of_info = commands.add_parser(
        "info", help="versions, devices, and each backend: usable, or the reason why not"
    )
    of_verify = commands.add_parser(
        "verify",
        help="check every usable backend against the float64 oracle, and bit for bit",
        description="Exit status: 0 if everything that can run here agrees, 1 on any mismatch or "
        "if a backend that was named cannot run here.",
    )
    of_verify.add_argument(
        "--backend",
        action="append",
        choices=sorted(BACKENDS),
        help="check only this one; may be given more than once",
    )
    of_bench = commands.add_parser(
        "bench",
        help="time a step against torch.optim.Adam and other packages' Adams",
        description="Everyone steps in turn, in one process. Nothing is timed of a backend whose "
        "parity is not right here. In a FILE, {device} and {date} are filled in. Exit status: 0; "
        "1 if a backend's parity is red, or one that was named cannot run here.",
    )
    bench.add_arguments(of_bench)
    build.add_arguments(
        commands.add_parser("build", help="compile the extensions for the torch at hand")
    )
    for command in (of_info, of_verify, of_bench):
        command.add_argument(
            "--json", type=Path, metavar="FILE", help="also write the result to FILE"
        )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = _parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = parser.parse_args(arguments)
    if chosen.command == "build":
        return build.main(chosen, Console())
    if chosen.command == "bench":
        bench.check_arguments(parser, chosen)
    if chosen.json is not None and chosen.command != "bench":
        try:
            chosen.json.touch()
        except OSError as error:
            parser.error(f"--json {chosen.json} cannot be written: {error.strerror}")
        if chosen.json.is_dir():
            parser.error(f"--json {chosen.json} is a folder; name a file in it")
    console = Console()
    if chosen.command == "info":
        found = info.collect()
        info.report(found, console)
        if chosen.json is not None:
            chosen.json.write_text(json.dumps(found, indent=2) + "\n")
        return 0
    if chosen.command == "bench":
        return bench.main(chosen, shlex.join(["python", "-m", __package__, *arguments]), console)
    with Progress(console=console, transient=True) as progress:
        outcomes = verify.verify(chosen.backend, progress=progress)
    agrees = verify.report(outcomes, console)
    if chosen.json is not None:
        verify.write_json(outcomes, chosen.json)
    if chosen.backend:
        checked = {outcome.backend for outcome in outcomes if outcome.left_out is None}
        for name in chosen.backend:
            if name not in checked:
                console.print(f"[red]{name} was asked for and cannot run here[/red]")
                agrees = False
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
