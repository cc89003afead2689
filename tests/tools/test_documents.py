"""The code in README.md, CONTRIBUTING.md and docs/ is what a reader can paste.

Python blocks are run, page by page. Of commands, in blocks and in the text, the program, its
subcommand and every option must exist. What is not to be run is fenced as ``text``.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
BY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

# What a reader has before the first block: a model and its data.
READERS_OWN = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 4)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())

    def forward(self, batch):
        return self.layers(self.embedding(batch))


model = Model()
mixture = torch.nn.Parameter(torch.ones(2, 3))
loader = [torch.arange(10), torch.arange(10)]
"""

# A program at the head of a command in the text, possibly after variables of the environment.
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:make|pip|python3?|adamal) \S")


class Block(NamedTuple):
    """A fenced block: its language, its first line's number from 0, and its lines."""

    language: str
    start: int
    lines: list[str]


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    found: list[Block] = []
    inside = False
    for number, line in enumerate(text.splitlines()):
        if line.lstrip().startswith("```"):
            inside = not inside
            if inside:
                found.append(Block(line.strip().removeprefix("```"), number + 1, []))
        elif inside:
            found[-1].lines.append(line)
    assert not inside, "a block is not closed"
    return found


def commands(text: str) -> list[str]:
    """Return the commands of a page: lines of sh blocks, and code within the text."""
    found, prose = [], text.splitlines()
    for language, start, lines in blocks(text):
        if language == "sh":
            joined = "\n".join(lines).replace("\\\n", " ")
            found += [command for line in joined.splitlines() if (command := line.strip())]
        prose[start - 1 : start + len(lines) + 1] = [""] * (len(lines) + 2)
    inline = re.findall(r"`([^`]+)`", "\n".join(prose))
    return found + [code for code in inline if COMMAND.match(code)]


def python_of(text: str) -> str:
    """Return a page's Python as one script, each line at its line of the page."""
    lines = [""] * len(text.splitlines())
    for language, start, content in blocks(text):
        if language == "python":
            lines[start : start + len(content)] = content
    lines[0] = f"exec({READERS_OWN!r})"
    return "\n".join(lines) + "\n"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@functools.cache
def help_of(*command: str) -> str:
    done = run(*command, "--help")
    assert done.returncode == 0, f"{shlex.join(command)} --help: {done.stderr}"
    return done.stdout


def check_options(help_text: str, words: list[str]) -> None:
    for word in words:
        if word.startswith("-"):
            option = re.escape(word.partition("=")[0])
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", help_text), f"no option {word}"


def check_program(command: list[str], words: list[str]) -> None:
    """Check a Python program's subcommand, if it has any, and its options."""
    if words and not words[0].startswith("-"):
        listed = re.search(rf"(^ +|[{{,]){re.escape(words[0])}\b", help_of(*command), re.MULTILINE)
        assert listed, f"{shlex.join(command)} does not list {words[0]!r}"
        if help_of(*command, words[0]) != help_of(*command):  # A parser of its own.
            command = [*command, words[0]]
    check_options(help_of(*command), words)


# The programs whose arguments a variable of the Makefile holds.
PASSED_ON = {"PAPER_ARGS": ("benchmarks.paper",), "BENCH_ARGS": ("adamal_kernels", "bench")}


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, is_variable, value = word.partition("=")
        if not is_variable:
            target = re.search(rf"^{re.escape(name)}:.*##", makefile, re.MULTILINE)
            assert target, f"no target {name}"
            continue
        assert re.search(rf"\b{name}\b", makefile), f"no variable {name}"
        if name in PASSED_ON:
            check_program([sys.executable, "-m", *PASSED_ON[name]], shlex.split(value))


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    check_options(help_of(sys.executable, "-m", "pip", "install"), words)
    project = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
        for name in extra.split(","):
            assert re.search(rf"^{name} = \[", project, re.MULTILINE), f"no extra {name}"


def check_command(command: str) -> None:
    """Check that a command names nothing that is not there."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if not words:
        return
    program, words = words[0], words[1:]
    if program == "make":
        check_make(words)
    elif program == "pip":
        check_pip(words)
    elif program in ("python", "python3"):
        if words[0] == "-m":
            assert importlib.util.find_spec(words[1].partition(".")[0]), f"no module {words[1]}"
            check_program([sys.executable, "-m", words[1]], words[2:])
        else:
            assert (ROOT / words[0]).exists(), f"no file {words[0]}"
            check_program([sys.executable, words[0]], words[1:])
    elif program == "adamal":
        assert re.search(r"^adamal = ", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        check_program([sys.executable, "-m", "adamal_kernels"], words)
    elif program == ".":
        assert words[0].startswith(".venv/"), f"{words[0]} is made by no target of the Makefile"
    else:
        pinned = (ROOT / "requirements-dev.txt").read_text()
        assert shutil.which(program) or f"\n{program}==" in pinned, f"no program {program}"


@BY_PAGE
def test_every_block_says_what_it_is(page: Path) -> None:
    unknown = {block.language for block in blocks(page.read_text())} - {"python", "sh", "text"}
    assert not unknown, "use python or sh, which are tested, or text"


@BY_PAGE
def test_python_runs_as_pasted(page: Path, tmp_path: Path) -> None:
    script = tmp_path / f"{page.name}.py"
    script.write_text(python_of(page.read_text()))
    done = run(sys.executable, "-W", "error::UserWarning:adamal_kernels", str(script))
    assert done.returncode == 0, done.stderr


@BY_PAGE
def test_commands_name_what_is_there(page: Path) -> None:
    wrong = []
    for command in commands(page.read_text()):
        try:
            check_command(command)
        except AssertionError as error:
            wrong.append(f"{command}: {error}")
    assert not wrong, "\n".join(wrong)


def missing_paths(text: str) -> list[str]:
    """Return the paths in a page's code that are not in the repository."""
    named = re.findall(r"`((?:adamal_kernels|csrc|tests|benchmarks|docs|examples)/[\w./-]+)`", text)
    return [path for path in named if not (ROOT / path).exists()]


@BY_PAGE
def test_paths_are_there(page: Path) -> None:
    assert missing_paths(page.read_text()) == []


def test_a_path_that_is_not_there_is_noticed() -> None:
    assert missing_paths("`csrc/formula/element.h`, `csrc/element.h`") == ["csrc/element.h"]


def test_the_tree_of_the_architecture_names_every_folder() -> None:
    tree = blocks((ROOT / "docs/architecture.md").read_text())[0]
    named = set(re.findall(r"^ *(\w+)/", "\n".join(tree.lines), re.MULTILINE))
    folders = {
        path.name
        for top in ("adamal_kernels", "csrc")
        for path in (ROOT / top).rglob("*")
        if path.is_dir() and any(path.glob("*.[phc]*")) and not path.name.startswith(("_", "."))
    }
    assert folders <= named


@pytest.mark.parametrize(
    "command",
    [
        "make tests",
        "make test PYTESTARGS=-x",
        'make paper PAPER_ARGS="--nothing"',
        "pip install --no-isolation .",
        "pip install .[peer]",
        "python -m adamal_kernels benchmark",
        "python -m adamal_kernels bench --jsonfile x",
        "python benchmarks/nothing.py",
        "python benchmarks/projected_step.py --turn 4",
        "no-such-program install",
    ],
)
def test_what_is_not_there_is_noticed(command: str) -> None:
    with pytest.raises(AssertionError):
        check_command(command)


def test_a_fault_in_a_page_is_noticed(tmp_path: Path) -> None:
    page = "# Page\n\n```text\nnot run\n```\n\n```python\nmodel.nothing\n```\n"
    script = tmp_path / "page.py"
    script.write_text(python_of(page))
    done = run(sys.executable, str(script))
    assert "line 8" in done.stderr
    assert "AttributeError" in done.stderr
