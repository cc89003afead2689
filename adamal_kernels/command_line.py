"""What the commands share: options, tables that fit the terminal, and the JSON they write."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

__all__ = [
    "JsonOutput",
    "add_device",
    "add_json",
    "add_seconds",
    "check_file",
    "deadline",
    "print_table",
]


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write the result to FILE; - is standard output, and tables then go to "
        "standard error",
    )


def add_device(parser: argparse.ArgumentParser, help: str) -> None:
    """Add ``--device``, which becomes a ``torch.device`` that exists."""
    parser.add_argument("--device", type=_device, metavar="DEVICE", help=help)


def _device(text: str) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *(f"cuda:{index}" for index in range(count))]
    name = "cuda:0" if text == "cuda" else text
    if name not in known:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of the devices that torch finds here: {', '.join(known)}"
        )
    return torch.device(name)


def add_seconds(parser: argparse.ArgumentParser, help: str) -> None:
    """Add ``--seconds``, a positive number."""
    parser.add_argument("--seconds", type=_seconds, metavar="N", help=help)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return seconds


def deadline(seconds: float | None) -> float:
    """Return the value of ``time.monotonic()`` at which ``--seconds`` are used, from now on."""
    return math.inf if seconds is None else time.monotonic() + seconds


def check_file(parser: argparse.ArgumentParser, option: str, file: Path | None) -> None:
    """Refuse a file that cannot be written, before time is spent on what it should hold."""
    if file is None or str(file) == "-":
        return
    if not file.parent.is_dir():
        parser.error(f"{option} {file}: the folder {file.parent} does not exist")
    if file.is_dir():
        parser.error(f"{option} {file}: is a folder; name a file in it")
    if not os.access(file.parent if _is_replaced(file) else file, os.W_OK):
        parser.error(f"{option} {file}: cannot be written; name a file in a folder of yours")


def _is_replaced(file: Path) -> bool:
    """Whether it is an ordinary file; a pipe or /dev/null has to stay what it is."""
    return file.is_file() or not file.exists()


class JsonOutput:
    """Where ``--json`` writes: a file, after every update, or a stream, once at the end.

    The file is replaced as a whole, so that a killed run leaves what its last update wrote.

    Args:
        file: what ``--json`` named; ``-`` is standard output; None: nothing is written.
        content: returns what to write, as it is now.

    Raises:
        OSError: by :meth:`update` and :meth:`finish`, the file cannot be written.
    """

    def __init__(self, file: Path | None, content: Callable[[], Any]) -> None:
        self._file = file
        self._content = content
        self._is_stream = file is None or str(file) == "-" or not _is_replaced(file)

    def update(self) -> None:
        """Write what there is so far, unless it is a stream, which cannot be written anew."""
        if self._file is None or self._is_stream:
            return
        target = self._file.resolve()
        part = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            part.write_text(self._text())
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def finish(self) -> None:
        """Write all of it."""
        if str(self._file) == "-":
            sys.stdout.write(self._text())
        elif self._file is not None and self._is_stream:
            self._file.write_text(self._text())
        else:
            self.update()

    def _text(self) -> str:
        return json.dumps(self._content(), indent=1) + "\n"


def print_table(
    console: Console,
    title: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    wrapped: int,
    right: Sequence[int] = (),
    lines: bool = False,
) -> None:
    """Print a table of which nothing is cut off, whatever the console's width.

    Where the table is too wide, each row is printed as its first cell, and below it every other
    cell with its header.

    Args:
        console: where.
        title: what it shows.
        headers: a header a column; may be empty.
        rows: their cells, in rich's markup. Cells may have several lines; line ``i`` of one
            belongs to line ``i`` of the others.
        wrapped: the column whose text wraps.
        right: columns that are justified to the right.
        lines: whether lines stand between the rows.
    """
    table = Table(title=title, title_justify="left", show_lines=lines, show_header=any(headers))
    for column, header in enumerate(headers):
        table.add_column(
            header,
            justify="right" if column in right else "left",
            no_wrap=column != wrapped,
        )
    for row in rows:
        table.add_row(*row)
    columns = list(zip(headers, *rows, strict=True))
    # A column has a border and two blanks.
    needed = 1 + sum(3 + _width(column, i == wrapped) for i, column in enumerate(columns))
    if needed <= console.width:
        console.print(table)
        return
    console.print(title, style="italic")
    for first, *others in rows:
        console.print(first, highlight=False)
        for values in zip_longest(*(cell.split("\n") for cell in others), fillvalue=""):
            pairs = [
                Text.from_markup(f"[dim]{header}[/dim] {value}" if header else value)
                for header, value in zip(headers[1:], values, strict=True)
                if value
            ]
            for line in _flow(pairs, console.width - 2):
                console.print(Padding(line, (0, 0, 0, 2)))


def _width(cells: Sequence[str], wraps: bool) -> int:
    """Return the width that these cells need: of a line, or, where they wrap, of a word."""
    texts = [Text.from_markup(cell).plain for cell in cells]
    parts = [part for text in texts for part in (text.split() if wraps else text.splitlines())]
    return max(map(cell_len, parts), default=0)


def _flow(pieces: Sequence[Text], width: int) -> Iterator[Text]:
    """Fill lines with as many pieces as fit."""
    line = Text()
    for piece in pieces:
        if line and line.cell_len + 2 + piece.cell_len > width:
            yield line
            line = Text()
        line = line.append("  ").append(piece) if line else piece
    yield line
