"""Installing: what is built, what is left out, what is said of it, and when it is an error.

Runs setup.py in a copy of the package whose extensions are one trivial C file each, against a
stand-in for torch and for nvcc, so that every case takes a second.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkout import NVCC, ROOT, Checkout

from adamal_kernels import __version__, build_info
from adamal_kernels.build_config import SOURCES, source_files

Recorder = Callable[..., None]

LIBRARIES = ("c10", "torch", "torch_cpu", "torch_python")
NO_TORCH = {"torch/__init__.py": "raise ModuleNotFoundError(\"No module named 'torch'\")"}


def stand_in_torch(cuda: str | None) -> dict[str, str]:
    """A torch, as far as setup.py looks at it."""
    return {
        "torch/__init__.py": f"__version__ = '9.8.7'\nclass version:\n    cuda = {cuda!r}\n",
    } | {f"torch/lib/lib{name}.so": "/* a linker script */" for name in LIBRARIES}


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_without_torch_the_python_part_is_installed(checkout: Checkout) -> None:
    pip = ("-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index")
    wheel = checkout.wheel(checkout.run(*pip, "--wheel-dir=dist", ".", torch=NO_TORCH))
    assert wheel.name == f"adamal_kernels-{__version__}-py3-none-any.whl"
    assert {"adamal_kernels/py.typed", "adamal_kernels/optimizer.py"} <= set(wheel.files)
    assert wheel.modules == []
    assert not any("tests" in file for file in wheel.files)
    assert "adamal build" in wheel.said
    for name in ("_C", "_cuda"):
        record = wheel.extensions[name]
        assert record["built"] is False
        assert "No module named 'torch'" in record["reason"]
        assert f"adamal_kernels.{name}: left out: {record['reason']}" in wheel.said


def test_a_cpu_torch_gets_the_cpu_extension(checkout: Checkout) -> None:
    checkout.install_nvcc()
    wheel = checkout.build(stand_in_torch(None))
    assert wheel.modules == ["_C"]
    assert "none-any" not in wheel.name
    assert wheel.extensions["_C"]["built"] is True
    assert wheel.extensions["_C"]["torch"] == "9.8.7"
    assert "not a CUDA build" in wheel.extensions["_cuda"]["reason"]


def test_a_cuda_torch_and_nvcc_get_both_extensions(checkout: Checkout) -> None:
    checkout.install_nvcc()
    wheel = checkout.build(stand_in_torch("12.8"))
    assert wheel.modules == ["_C", "_cuda"]
    record = wheel.extensions["_cuda"]
    assert (record["built"], record["cuda"], record["archs"]) == (True, "12.8", ["80", "90"])
    arguments = checkout.nvcc.with_name("arguments").read_text().split()
    assert {"-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false"} <= set(arguments)
    assert [argument for argument in arguments if "gencode" in argument] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    files = sum(len(sources) + 1 for sources in SOURCES.values())  # and the extension itself
    lines = re.findall(rf"^\d+ of {files}, [\d.]+ s: ", wheel.said, re.MULTILINE)
    assert len(lines) == files


@pytest.mark.parametrize("variable", ["ADAMAL_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"])
def test_the_architectures_can_be_chosen(checkout: Checkout, variable: str) -> None:
    checkout.install_nvcc()
    cuda_torch = stand_in_torch("12.8")
    assert checkout.build(cuda_torch).extensions["_cuda"]["archs"] == ["80", "90"]
    wheel = checkout.build(cuda_torch, **{variable: "9.0a+PTX"})
    assert wheel.extensions["_cuda"]["archs"] == ["90a"]
    assert "code=sm_90a" in checkout.nvcc.with_name("arguments").read_text()
    said = checkout.error(cuda_torch, ADAMAL_BUILD="cuda", **{variable: "8.0;7.5"})
    assert f"does not compile for 75 ({variable}='8.0;7.5')" in said


def test_every_gpu_from_turing_on_has_code_or_ptx(checkout: Checkout) -> None:
    checkout.install_nvcc()
    known = ("75", "80", "86", "90", "100", "110", "120")
    listed = "\\n".join(f"compute_{arch}" for arch in known)
    checkout.nvcc.write_text(NVCC.replace(r"compute_80\ncompute_90", listed))
    wheel = checkout.build(stand_in_torch("13.0"))
    assert sorted(wheel.extensions["_cuda"]["archs"], key=int) == ["75", "80", "90", "100", "120"]
    # 11.0 runs the PTX of 10.0, and not that of 12.0.
    codes = re.findall(r"code=(\w+)", checkout.nvcc.with_name("arguments").read_text())
    assert codes[-1] == "compute_100"


def test_the_architectures_of_the_gpus_that_are_here(checkout: Checkout) -> None:
    checkout.install_nvcc()
    cuda_torch = stand_in_torch("12.8")
    gpus = (
        "class cuda:\n    is_available = staticmethod(lambda: {})\n    device_count = lambda: 3\n"
    )
    gpus += "    get_device_capability = [(9, 0), (8, 0), (9, 0)].__getitem__\n"
    package = "torch/__init__.py"
    there, none = (
        {**cuda_torch, package: cuda_torch[package] + gpus.format(found)} for found in (True, False)
    )
    wheel = checkout.build(there, ADAMAL_CUDA_ARCHS="native")
    assert wheel.extensions["_cuda"]["archs"] == ["80", "90"]
    said = checkout.error(none, ADAMAL_BUILD="cuda", ADAMAL_CUDA_ARCHS="native")
    assert "torch finds none" in said
    assert 'ADAMAL_CUDA_ARCHS="9.0"' in said


def test_an_extension_that_fell_away_is_not_shipped(checkout: Checkout) -> None:
    checkout.install_nvcc()
    assert checkout.build(stand_in_torch("12.8")).modules == ["_C", "_cuda"]
    assert checkout.build(stand_in_torch(None)).modules == ["_C"]
    checkout.write_sources("#error planted")
    assert checkout.build(stand_in_torch("12.8")).modules == ["_cuda"]


def test_in_place(checkout: Checkout) -> None:
    build = ("setup.py", "-q", "build_ext", "--inplace")
    package = checkout.tree / "adamal_kernels"
    assert checkout.run(*build, torch=stand_in_torch(None)).returncode == 0
    assert [path.name.split(".")[0] for path in package.glob("*.so")] == ["_C"]
    assert not (package / "csrc").exists()
    assert checkout.run(*build, torch=NO_TORCH).returncode == 0
    assert list(package.glob("*.so")) == []


@pytest.mark.parametrize(
    ("asked", "with_torch", "environment", "parts"),
    [
        ("cpu", NO_TORCH, {}, ("_C", "No module named 'torch'", "--no-build-isolation")),
        ("cpu", stand_in_torch(None), {"CXX": "/nonexistent/g++"}, ("/nonexistent/g++", "CXX")),
        ("cuda", stand_in_torch(None), {}, ("_cuda", "not a CUDA build")),
        ("cuda", stand_in_torch("12.8"), {}, ("_cuda", "nvcc was not found", "CUDA_HOME")),
        ("cpu,cuda", stand_in_torch("12.8"), {}, ("_cuda", "nvcc was not found")),
    ],
)
def test_what_was_asked_for_by_name_is_built_or_an_error(
    checkout: Checkout,
    asked: str,
    with_torch: dict[str, str],
    environment: dict[str, str],
    parts: tuple[str, ...],
) -> None:
    said = checkout.error(with_torch, ADAMAL_BUILD=asked, **environment)
    for part in (f"ADAMAL_BUILD={asked}", *parts):
        assert part in said
    # The same machine, asked for nothing in particular: a message, and an installation.
    wheel = checkout.build(with_torch, **environment)
    assert "left out" in wheel.said
    assert "adamal_kernels/optimizer.py" in wheel.files


def test_a_failed_compilation(checkout: Checkout) -> None:
    checkout.write_sources("#error planted")
    said = checkout.error(stand_in_torch(None), ADAMAL_BUILD="cpu")
    assert "ADAMAL_BUILD=cpu asks for adamal_kernels._C" in said
    checkout.install_nvcc()
    wheel = checkout.build(stand_in_torch("12.8"))
    assert "bindings.cpp does not compile" in wheel.extensions["_C"]["reason"]
    assert wheel.modules == ["_cuda"]


@pytest.mark.parametrize("value", ["bogus", "cpu,bogus", "none,cpu", "cpu,"])
def test_an_unknown_value_of_adamal_build_is_an_error(checkout: Checkout, value: str) -> None:
    said = checkout.error(stand_in_torch(None), ADAMAL_BUILD=value)
    assert f"ADAMAL_BUILD={value!r}" in said
    assert "cpu, cuda, cpu,cuda or none" in said


def test_none_builds_nothing(checkout: Checkout) -> None:
    wheel = checkout.build(stand_in_torch(None), ADAMAL_BUILD="none")
    assert wheel.modules == []
    assert "unset ADAMAL_BUILD" in wheel.extensions["_C"]["reason"]


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Return a function that stands a record in for the package's own."""
    monkeypatch.setattr(build_info, "PACKAGE", tmp_path)
    (tmp_path / "csrc").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("_C", "_cuda"):
        monkeypatch.delitem(sys.modules, f"adamal_kernels.{name}", raising=False)

    def write(**record: Any) -> None:
        (tmp_path / build_info.RECORD).write_text(json.dumps({"extensions": {"_C": record}}))

    return write


def test_an_extension_for_another_torch_is_named_as_such(recorded: Recorder) -> None:
    recorded(built=True, torch="1.2.3+cu99")
    reason = build_info.why_not_importable("_C")
    for part in ("built for torch 1.2.3+cu99", f"this is torch {torch.__version__}"):
        assert part in reason
    assert reason.endswith("run: adamal build")
    with pytest.raises(ImportError, match="this is torch"):
        build_info.load_extension("_C")


def test_an_extension_for_another_python_is_named_as_such(recorded: Recorder) -> None:
    recorded(built=True, torch=torch.__version__, python="2.7.18")
    assert "built for Python 2.7.18" in build_info.why_not_importable("_C")


def test_what_was_left_out_is_explained(recorded: Recorder) -> None:
    recorded(built=False, reason="no compiler was there")
    assert build_info.extension_record("_C").built is False
    reason = build_info.why_not_importable("_C")
    for part in ("_C was not built", "no compiler was there", "run: adamal build"):
        assert part in reason
    with pytest.raises(ImportError, match="no compiler was there"):
        build_info.load_extension("_C")


def test_an_extension_that_does_not_import_is_explained(recorded: Recorder) -> None:
    recorded(built=True, torch=torch.__version__)
    file = build_info.PACKAGE / build_info.extension_file("_C")
    file.write_text("no library")
    reason = build_info.why_not_importable("_C")
    for part in ("cannot be imported", str(file), "run: adamal build"):
        assert part in reason


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"extensions": {"_C": 1}}'])
def test_a_missing_or_broken_record_is_explained(recorded: Recorder, content: str | None) -> None:
    if content is not None:
        (build_info.PACKAGE / build_info.RECORD).write_text(content)
    record = build_info.extension_record("_C")
    assert record.built is False
    assert ("nothing was built" if content is None else "unreadable") in record.reason
    assert "run: adamal build" in build_info.why_not_importable("_C")


def test_in_the_source_tree_an_installed_copy_is_pointed_at(
    recorded: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(built=True, torch=torch.__version__)
    tree = tmp_path / "tree" / "adamal_kernels"
    (tree.parent / "csrc").mkdir(parents=True)
    installed = tmp_path / "site-packages" / "adamal_kernels"
    installed.mkdir(parents=True)
    (tmp_path / build_info.RECORD).rename(installed / build_info.RECORD)
    monkeypatch.setattr(build_info, "PACKAGE", tree)
    monkeypatch.setattr(sys, "path", [str(tree.parent)])
    assert "installed" not in build_info.why_not_importable("_C")
    sys.path.append(str(installed.parent))
    reason = build_info.why_not_importable("_C")
    for part in ("source tree", f"a built copy is installed at {installed}", "`adamal`", "-e ."):
        assert part in reason
    assert reason.endswith("run: python -m adamal_kernels build")


def test_a_module_that_moved_since_a_build_is_not_in_the_wheel(checkout: Checkout) -> None:
    names = checkout.build(NO_TORCH).files
    (built,) = (checkout.tree / "build").glob("lib*/adamal_kernels")
    (built / "moved.py").touch()
    assert checkout.build(NO_TORCH).files == names


def test_the_wheel_has_the_sources_and_what_an_index_shows(checkout: Checkout) -> None:
    wheel = checkout.build(NO_TORCH)
    paths = {path.relative_to(ROOT).as_posix() for path in source_files(ROOT / "csrc")}
    sources = {f"adamal_kernels/{path}" for path in paths}
    assert {file for file in wheel.files if "csrc" in file} == sources
    metadata = wheel.metadata
    assert metadata["Author"]
    classifiers = metadata.get_all("Classifier")
    for minor in range(10, 15):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers
    page = metadata.get_payload()
    assert metadata["Description-Content-Type"].startswith("text/markdown")
    assert "# AdamAL kernels" in page
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", page) == []

    # Once the files have a public address, pictures and links lead there.
    setup = checkout.tree / "setup.py"
    setup.write_text(
        setup.read_text().replace("FILES_URL = None", 'FILES_URL = "https://h.example"')
    )
    page = checkout.build(NO_TORCH).metadata.get_payload()
    assert re.search(r"!\[[^]]*\]\(https://h\.example/benchmarks/results/[^)]*\.png\)", page)
    assert "](https://h.example/docs/method.md" in page


def test_the_sdist_has_all_that_is_tracked(tmp_path: Path) -> None:
    """Of the tree itself: an sdist is what distributions build and test from."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    tracked = set(done.stdout.strip("\0").split("\0"))
    tree = tmp_path / "tree"
    for name in tracked:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "setup.py", "-q", "sdist"]
    environment = os.environ | {"ADAMAL_BUILD": "none"}
    subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True)
    (path,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked - found == {".gitignore"}


# Stands in for Python: makes an environment of itself, whose pip fails.
PYTHON = """#!/bin/sh
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") for i in $(seq 100); do echo "planted line $i"; done; exit 1 ;;
esac
"""


def test_make_demo_installs_little_and_says_little(checkout: Checkout) -> None:
    for name in ("Makefile", "requirements-demo.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, checkout.tree)
    # A make inside `make test` would say which folder it enters.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    alone.pop("MFLAGS", None)
    make = {"cwd": checkout.tree, "env": alone, "capture_output": True, "text": True}
    planned = subprocess.run(["make", "-n", "demo"], check=True, **make).stdout
    assert "requirements-demo.txt" in planned
    assert "requirements-dev.txt" not in planned
    assert "examples/train_gpt.py" in planned
    planned = subprocess.run(["make", "-n", "test"], check=True, **make).stdout
    assert planned.index("requirements-demo.txt") < planned.index("requirements-dev.txt")

    python = checkout.tree.parent / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    done = subprocess.run(["make", "demo", f"PYTHON={python}"], **make)
    assert done.returncode != 0
    first, *tail = done.stdout.splitlines()
    assert first.startswith("Installing torch and matplotlib into .venv: ")
    assert tail == [f"planted line {i}" for i in range(81, 101)]
    assert "all it printed is in build/make.log" in done.stderr
    assert (checkout.tree / "build" / "make.log").read_text().startswith("planted line 1\n")
