"""The command line: ``adamal``, or ``python -m adamal_kernels``."""

from __future__ import annotations

import argparse
import shlex
import sys
from importlib import import_module
from pathlib import Path

from .version import __version__

# By name, which is its module's, too: a module that defines add_arguments(parser) and
# main(chosen, console). It is imported, and torch with it, only when the command is used.
_COMMANDS = {
    "info": "versions, devices, and each backend: usable, or the reason why not",
    "build": "compile the extensions for the torch at hand",
    "verify": "check every usable backend bit for bit, and against the float64 oracle",
    "bench": "time a step against torch.optim.Adam and other packages' Adams",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Args:
        arguments: those after the program's name. Default: ``sys.argv``'s.

    Returns:
        The command's exit status; 130 after Ctrl-C; 0, and help, where no command is named.

    Raises:
        SystemExit: with status 2, the arguments are wrong; with 0, after ``--help`` or
            ``--version``.
    """
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        return 130


def _run(arguments: list[str]) -> int:
    prog = "adamal" if Path(sys.argv[0]).name == "adamal" else f"python -m {__package__}"
    parser = argparse.ArgumentParser(
        prog=prog, description="AdamAL as one multi-tensor kernel pass."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        command.set_defaults(command=name, parser=command)
        if name in arguments:
            import_module(f".{name}", __package__).add_arguments(command)
    chosen = parser.parse_args(arguments)
    if "command" not in chosen:
        parser.print_help()
        return 0
    from rich.console import Console

    chosen.command_line = shlex.join([*prog.split(), *arguments])
    # `--json -` leaves standard output to the JSON.
    console = Console(stderr=str(getattr(chosen, "json", None)) == "-")
    return import_module(f".{chosen.command}", __package__).main(chosen, console)


if __name__ == "__main__":
    sys.exit(main())
