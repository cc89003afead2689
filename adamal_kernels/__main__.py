"""``python -m adamal_kernels``: info and verify."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from . import info, verify
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
    for command in (of_info, of_verify):
        command.add_argument(
            "--json", type=Path, metavar="FILE", help="also write the result to FILE"
        )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.json is not None and not chosen.json.parent.is_dir():
        parser.error(f"--json {chosen.json}: the folder {chosen.json.parent} does not exist")
    console = Console()
    if chosen.command == "info":
        found = info.collect()
        info.report(found, console)
        if chosen.json is not None:
            chosen.json.write_text(json.dumps(found, indent=2) + "\n")
        return 0
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
