"""The folders are floors, and arrows run down: who may include whom, and what stays outside.

Every checker returns the faults it finds, a line each. A small tree with each fault shows that it
can find one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.graphs import circle_of

from adamal_kernels.build_config import source_files

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"

# Folder of csrc -> the folders below it. What lies in csrc itself is in "".
NATIVE_FLOORS: dict[str, set[str]] = {
    "formula": set(),
    "cpu": {"formula"},
    "cuda": {"formula"},
    "plan": {"formula", "cpu", "cuda"},
    "fast_path": {"formula", "plan"},
    "": {"formula", "plan", "fast_path"},
}
WITHOUT_TORCH = ("formula", "cpu", "cuda")
WITHOUT_CUDA = ("formula", "cpu")
# File -> the only part of torch's headers that it may include.
TORCH_ALLOWED = {"cuda/bindings.cpp": "pybind11/"}

TORCH_HEADER = re.compile(r"(?:torch|ATen|c10|caffe2|pybind11)/")
CUDA_HEADER = re.compile(r"(?:cuda|cub|thrust|nv)\w*(?:\.h|/)")


def arrows_not_allowed(
    edges: Mapping[str, Iterable[str]], floors: Mapping[str, Collection[str]]
) -> list[str]:
    """Return the arrows between folders that ``floors`` does not list.

    Args:
        edges: From each file to others, by their paths; the first part of a path is the folder.
        floors: Folder -> those that it may point to, itself aside.
    """

    def folder_of(file: str) -> str:
        return file.rpartition("/")[0].partition("/")[0]

    wrong = []
    for file, targets in edges.items():
        folder = folder_of(file)
        if folder not in floors:
            wrong.append(f"{file}: the folder {folder!r} has no floor")
            continue
        allowed = {folder, *floors[folder]}
        wrong += [f"{file} -> {target}" for target in targets if folder_of(target) not in allowed]
    return wrong


class Include(NamedTuple):
    """An include of a file."""

    file: str
    """Its path from csrc."""
    header: str
    quoted: bool
    for_nvcc: bool
    """Whether only nvcc reads it."""


def native_includes(csrc: Path) -> list[Include]:
    """Return the includes of all files within ``csrc``."""
    found = []
    for path in source_files(csrc):
        file = path.relative_to(csrc).as_posix()
        conditions: list[str] = []
        for line in path.read_text().splitlines():
            word, _, rest = line.strip().removeprefix("#").strip().partition(" ")
            if not line.lstrip().startswith("#"):
                continue
            if word in ("if", "ifdef", "ifndef"):
                conditions.append(f"{word} {rest.strip()}")
            elif word in ("elif", "else"):
                conditions[-1] = word
            elif word == "endif":
                conditions.pop()
            elif word == "include" and (match := re.match(r'(["<])([^">]+)[">]', rest.strip())):
                for_nvcc = "ifdef __CUDACC__" in conditions
                found.append(Include(file, match[2], match[1] == '"', for_nvcc))
    return found


def native_edges(csrc: Path) -> dict[str, list[str]]:
    """Return which files within ``csrc`` each of them includes."""
    edges: dict[str, list[str]] = {
        path.relative_to(csrc).as_posix(): [] for path in source_files(csrc)
    }
    for include in native_includes(csrc):
        if include.quoted and (csrc / include.header).is_file():
            edges[include.file].append(include.header)
    return edges


def native_circle(csrc: Path) -> list[str]:
    """Return a circle of includes."""
    return circle_of(native_edges(csrc))


def native_arrows(csrc: Path) -> list[str]:
    """Return the includes that go up, or to a neighbour."""
    return arrows_not_allowed(native_edges(csrc), NATIVE_FLOORS)


def native_paths(csrc: Path) -> list[str]:
    """Return the quoted includes that are not written from ``csrc``: stems repeat in folders."""
    return [
        f"{include.file}: {include.header}"
        for include in native_includes(csrc)
        if include.quoted and not (csrc / include.header).is_file()
    ]


def foreign_headers(csrc: Path) -> list[str]:
    """Return the headers of torch and of CUDA where there must be none.

    The formula is compiled by nvcc too, and may ask it alone for CUDA's 16-bit types.
    """
    wrong = []
    for include in native_includes(csrc):
        folder = include.file.partition("/")[0]
        allowed = TORCH_ALLOWED.get(include.file, "\0")
        is_torchs = TORCH_HEADER.match(include.header) and not include.header.startswith(allowed)
        is_cudas = CUDA_HEADER.match(include.header) and not (include.for_nvcc or include.quoted)
        if (folder in WITHOUT_TORCH and is_torchs) or (folder in WITHOUT_CUDA and is_cudas):
            wrong.append(f"{include.file}: {include.header}")
    return wrong


Law = Callable[[Path], list[str]]

NATIVE_LAWS: tuple[Law, ...] = (native_circle, native_arrows, native_paths, foreign_headers)


@pytest.mark.parametrize("law", NATIVE_LAWS)
def test_the_native_sources_keep_the_law(law: Law) -> None:
    assert law(CSRC) == []


def test_every_floor_is_there() -> None:
    assert {path.name for path in CSRC.iterdir() if path.is_dir()} == NATIVE_FLOORS.keys() - {""}


RIGHT = {
    "formula/element.h": "#ifdef __CUDACC__\n#include <cuda_fp16.h>\n#endif\n",
    "cpu/step.h": '#include "formula/element.h"\n',
    "cpu/step.cpp": '#include "cpu/step.h"\n',
    "cuda/step.cu": '#include <cuda_runtime.h>\n\n#include "formula/element.h"\n',
    "cuda/bindings.cpp": "#include <pybind11/pybind11.h>\n",
    "plan/plan.h": '#include <ATen/core/Tensor.h>\n\n#include "cpu/step.h"\n',
    "bindings.cpp": '#include "plan/plan.h"\n',
}


def grown(folder: Path, files: Mapping[str, str]) -> Path:
    """Write a tree of files; return its folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize("law", NATIVE_LAWS)
def test_a_tree_without_a_fault_passes(law: Law, tmp_path: Path) -> None:
    assert law(grown(tmp_path, RIGHT)) == []


@pytest.mark.parametrize(
    ("law", "file", "text", "found"),
    [
        (native_circle, "formula/element.h", '#include "cpu/step.h"', "cpu/step.h"),
        (native_circle, "formula/element.h", '#include "formula/element.h"', "formula/element.h"),
        (native_arrows, "formula/element.h", '#include "cpu/step.h"', "-> cpu/step.h"),
        (native_arrows, "cpu/step.h", '#include "cuda/step.cu"', "-> cuda/step.cu"),
        (native_arrows, "cuda/step.cu", '  #  include "plan/plan.h"', "-> plan/plan.h"),
        (native_arrows, "bindings.cpp", '#include "cpu/step.h"', "-> cpu/step.h"),
        (native_arrows, "attic/old.h", "", "'attic' has no floor"),
        (native_paths, "cpu/step.cpp", '#include "step.h"', "cpu/step.cpp: step.h"),
        (native_paths, "cpu/step.cpp", '#include "gone.h"', "cpu/step.cpp: gone.h"),
        (foreign_headers, "formula/element.h", "#include <cuda_fp16.h>", "cuda_fp16.h"),
        (
            foreign_headers,
            "formula/element.h",
            "#ifdef __CUDACC__\n#else\n#include <cuda_fp16.h>\n#endif",
            "cuda_fp16.h",
        ),
        (foreign_headers, "cpu/step.h", "#include <cuda_runtime.h>", "cuda_runtime.h"),
        (foreign_headers, "cpu/step.h", "#include <cuda/std/array>", "cuda/std/array"),
        (foreign_headers, "formula/element.h", "#include <ATen/Parallel.h>", "ATen/Parallel.h"),
        (foreign_headers, "cpu/step.h", "#include <pybind11/stl.h>", "pybind11/stl.h"),
        (foreign_headers, "cuda/step.cu", '#include "c10/core/Stream.h"', "c10/core/Stream.h"),
        (foreign_headers, "cuda/bindings.cpp", "#include <torch/extension.h>", "torch/extension.h"),
    ],
)
def test_a_fault_in_a_tree_is_found(
    law: Law, file: str, text: str, found: str, tmp_path: Path
) -> None:
    csrc = grown(tmp_path, RIGHT | {file: f"{text}\n"})
    assert any(found in fault for fault in law(csrc))
