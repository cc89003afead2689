"""``adamal build``: where it puts what it compiles, what it says, and what it leaves alone.

The sources are one trivial module an extension; torch, the compiler and the imports are real.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkout import MODULE, NVCC, Checkout

from adamal_kernels import __main__, build, build_config, build_info

OTHER_TORCH = "1.2.3"
SOURCES = {
    "_C": ["bindings.cpp", "plan/plan.cpp"],
    "_cuda": ["cuda/bindings.cpp", "cuda/step.cu"],
}


LOADS = build._loads


class Package:
    """A stand-in for the installed package's folder, and the command that builds into it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capsys = capsys
        for name in SOURCES:
            self.write(SOURCES[name][0], MODULE.format(name=name))
            self.write(SOURCES[name][1], "")

    def write(self, name: str, text: str) -> None:
        path = self.folder / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def build(self, *arguments: str, status: int = 0) -> str:
        """Run the command; return what it says."""
        assert __main__.main(["build", *arguments]) == status
        return self.capsys.readouterr().out

    def record(self, name: str = "_C") -> dict[str, Any]:
        return json.loads((self.folder / build_info.RECORD).read_text())["extensions"][name]

    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} - {"csrc"}


@pytest.fixture
def package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Package]:
    names = [f"adamal_kernels.{name}" for name in ("_C", "_cuda")]
    held = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.setattr(build_config, "SOURCES", SOURCES)
    monkeypatch.setattr(build, "_loads", lambda *arguments: True)  # It imports torch every time.
    monkeypatch.setattr(build_info, "PACKAGE", tmp_path / "adamal_kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    for variable in ("ADAMAL_BUILD", "ADAMAL_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    yield Package(tmp_path / "adamal_kernels", capsys)
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(held)


@pytest.fixture
def read_only(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the package's folder one that cannot be written, by root neither."""
    genuine = tempfile.TemporaryFile

    def refuse(*arguments: Any, dir: Path | None = None, **options: Any) -> Any:
        if dir == package.folder:
            raise PermissionError(13, "Permission denied", str(dir))
        return genuine(*arguments, dir=dir, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


def forget() -> None:
    sys.modules.pop("adamal_kernels._C", None)


def test_into_the_package_and_only_once(package: Package) -> None:
    assert "run: adamal build" in build_info.why_not_importable("_C")
    said = package.build()
    assert "1 of 3, " in said
    assert "3 of 3, " in said
    assert str(package.folder) in said
    assert package.files() == {build_info.extension_file("_C"), build_info.RECORD}
    record = build_info.extension_record("_C")
    assert (record.built, record.torch) == (True, torch.__version__)
    assert f"built for torch {torch.__version__}" in str(record)
    assert build_info.why_not_importable("_C") is None
    loaded = build_info.load_extension("_C")
    assert Path(loaded.__file__).parent == package.folder
    assert "not a CUDA build" in package.record("_cuda")["reason"]

    forget()
    assert "--force" in package.build()
    assert "3 of 3, " in package.build("--force")
    forget()
    package.write("plan/plan.h", "// changed")
    assert "3 of 3, " in package.build()


@pytest.mark.usefixtures("read_only")
def test_into_the_cache_of_this_torch_and_these_sources(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    package.build()
    assert package.files() == set()
    folder = build_info.cache_folder()
    assert Path(build_info.load_extension("_C").__file__).parent == folder
    assert build_info.extension_record("_C").folder == folder
    forget()
    with monkeypatch.context() as context:
        context.setattr(torch, "__version__", OTHER_TORCH)
        assert "was not built" in build_info.why_not_importable("_C")
    with monkeypatch.context() as context:
        context.setattr(build_info, "__version__", "9.9")
        assert "was not built" in build_info.why_not_importable("_C")
    assert build_info.why_not_importable("_C") is None
    forget()
    package.write("formula/element.h", "// another formula")
    assert "was not built" in build_info.why_not_importable("_C")


@pytest.mark.usefixtures("read_only")
def test_the_cache_stands_in_for_a_package_built_for_another_torch(package: Package) -> None:
    content = {"built": True, "torch": OTHER_TORCH}
    (package.folder / build_info.RECORD).write_text(json.dumps({"extensions": {"_C": content}}))
    assert f"built for torch {OTHER_TORCH}" in build_info.why_not_importable("_C")
    package.build()
    assert build_info.why_not_importable("_C") is None
    assert package.record() == content


def test_a_new_torch_replaces_what_was_built(package: Package) -> None:
    package.write("bindings.cpp", "#error planted")
    content = {"built": True, "torch": OTHER_TORCH, "sources": "others"}
    record = package.folder / build_info.RECORD
    record.write_text(json.dumps({"extensions": {"_C": content}}))
    said = package.build(status=1)
    assert "error: #error planted" in said
    assert "bindings.cpp does not compile" in said
    log = Path(said.split()[-1])
    assert "#error planted" in log.read_text()
    log.unlink()
    assert package.record() == content  # A failure leaves what was there.
    assert package.files() == {build_info.RECORD}
    package.write("bindings.cpp", MODULE.format(name="_C"))
    package.build()
    assert package.record()["torch"] == torch.__version__


def test_what_does_not_load_replaces_nothing(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_loads", LOADS)
    package.build()
    before = package.record()
    package.write("plan/plan.cpp", "int absent(); int used = absent();")
    said = package.build(status=1)
    assert "undefined symbol" in said
    assert "_C was not built: it does not load" in said
    Path(said.split()[-1]).unlink()
    assert package.record() == before
    assert build_info.why_not_importable("_C") is None


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("CXX", "/nonexistent/g++", "the C++ compiler '/nonexistent/g++' was not found; install"),
        ("ADAMAL_BUILD", "cuda", "asks for adamal_kernels._cuda, which cannot be built: torch"),
        ("ADAMAL_BUILD", "bogus", "set it to cpu, cuda, cpu,cuda or none"),
        ("MAX_JOBS", "0", "MAX_JOBS='0': give a whole number from 1 up"),
    ],
)
def test_what_stands_in_the_way_is_one_sentence(
    package: Package, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    said = package.build(status=1)
    assert words in said
    assert said.splitlines()[-1].startswith("Cannot build: ")
    assert package.files() == set()


def test_python_without_headers(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_config.sysconfig, "get_path", lambda name: "/nonexistent")
    assert "apt-get install python3-dev" in package.build(status=1)


@pytest.mark.usefixtures("read_only")
def test_nowhere_to_write(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    file = package.folder / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    said = package.build(status=1)
    assert "Cannot build: " in said
    assert "XDG_CACHE_HOME" in said


def test_interrupted(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_config, "compile_extensions", interrupt)
    assert "nothing has changed" in package.build(status=130)
    assert package.files() == set()


def test_cuda_for_the_gpus_here_or_for_all(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parents[1]))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    said = package.build()
    assert "_C and _cuda" in said
    assert "sm_90" in said
    assert package.record("_cuda")["archs"] == ["90"]
    assert "code=sm_80" not in nvcc.with_name("arguments").read_text()
    assert "ADAMAL_CUDA_ARCHS" not in os.environ
    forget()
    package.build("--all-archs")  # _C is not compiled again.
    assert package.record("_cuda")["archs"] == ["80", "90"]
    assert package.record("_C")["built"] is True
    assert "code=sm_80" in nvcc.with_name("arguments").read_text()

    # Where nvcc is gone, a new torch takes _C alone: _cuda works with any.
    forget()
    sys.modules.pop("adamal_kernels._cuda", None)
    nvcc.unlink()
    kept = package.record("_cuda")
    said = package.build("--force")
    assert "_cuda is left out: nvcc was not found" in said
    assert {k: v for k, v in package.record("_cuda").items() if k in kept} == kept
    assert build_info.why_not_importable("_cuda") is None


def test_pip_removes_what_was_built(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    information = package.folder.with_name("adamal_kernels-0.1.0.dist-info")
    information.mkdir()
    (information / "METADATA").write_text("Name: adamal-kernels\nVersion: 0.1.0\n")
    record = information / "RECORD"
    record.write_text("adamal_kernels/_build.json,,\nadamal_kernels-0.1.0.dist-info/RECORD,,\n")
    monkeypatch.syspath_prepend(package.folder.parent)
    package.build()
    added = f"adamal_kernels/{build_info.extension_file('_C')},,"
    assert record.read_text().splitlines()[2:] == [added]
    package.build("--force")
    assert record.read_text().splitlines()[2:] == [added]


def test_only_what_changed_is_compiled_again(tmp_path: Path) -> None:
    sources = tmp_path / "csrc"
    for folder in ("one", "two"):
        (sources / folder).mkdir(parents=True)
    (sources / "one" / "same.h").write_text("")
    (sources / "one" / "same.cpp").write_text('#include "one/same.h"\n')
    (sources / "two" / "same.cpp").write_text("")

    def compiled(flag: str) -> set[str]:
        said: list[str] = []
        made = build_config.Extension("x", ["c++", "-fPIC", flag], ["c++", "-shared"], [], {})
        failures = build_config.compile_extensions(
            [made],
            sources,
            tmp_path / "objects",
            lambda name: tmp_path / name,
            report=said.append,
            log=io.StringIO(),
        )
        assert failures == {}
        assert (tmp_path / "x").exists()
        return {line.rpartition(": ")[2] for line in said} - {"x"}

    with pytest.MonkeyPatch.context() as context:
        context.setitem(build_config.SOURCES, "x", ["one/same.cpp", "two/same.cpp"])
        assert compiled("-O0") == {"one/same.cpp", "two/same.cpp"}
        assert compiled("-O0") == set()
        (sources / "one" / "same.h").write_text("// changed")
        assert compiled("-O0") == {"one/same.cpp"}
        assert compiled("-O1") == {"one/same.cpp", "two/same.cpp"}
        (sources / "one" / "same.h").unlink()
        (sources / "one" / "same.cpp").write_text("")
        assert compiled("-O1") == {"one/same.cpp"}


def test_two_at_once_in_a_source_tree(tmp_path: Path) -> None:
    """They share the objects' folder and the package's: each file is whole at any time."""
    checkout = Checkout(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(checkout.tree)}
    builds = [
        subprocess.Popen(
            [sys.executable, "-m", "adamal_kernels", "build"],
            cwd=checkout.tree,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for said, status in [(one.communicate()[0], one.returncode) for one in builds]:
        assert status == 0, said
    program = (
        "from adamal_kernels import build_info; print(build_info.why_not_importable('_C'), "
        "build_info.load_extension('_C').__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=checkout.tree,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    file = checkout.tree / "adamal_kernels" / build_info.extension_file("_C")
    assert done.stdout.split() == ["None", str(file)]
    assert list((checkout.tree / "adamal_kernels").glob(".build-*")) == []


def test_what_was_built_of_other_sources_is_not_loaded(package: Package) -> None:
    """As after a pull, where the package is used from the source tree."""
    package.build()
    (package.folder / "csrc").rename(package.folder.parent / "csrc")
    assert build_info.why_not_importable("_C") is None
    forget()
    (package.folder.parent / "csrc" / "plan" / "plan.h").write_text("// pulled")
    build_info._sources_digest.cache_clear()
    reason = build_info.why_not_importable("_C")
    assert "was built of other sources than those in" in reason
    assert "run: python -m adamal_kernels build" in reason
    with pytest.raises(ImportError, match="other sources"):
        build_info.load_extension("_C")


@pytest.mark.parametrize(
    ("built_for", "here", "fits"),
    [
        ("2.13.0", "2.13.1+cpu", True),
        ("2.13.0+cu130", "2.13.0+cpu", True),
        ("2.12.1", "2.13.0", False),
        ("2.14.0.dev20260101+cu130", "2.14.0", False),
        ("2.14.0.dev20260101", "2.14.0.dev20260102", False),
        ("2.14.0.dev20260101+cu130", "2.14.0.dev20260101+cpu", True),
    ],
)
def test_torch_versions_that_an_extension_fits(
    built_for: str, here: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", here)
    record = build_info.ExtensionRecord("_C", built=True, torch=built_for)
    assert (build_info.why_unfit(record) is None) is fits


def test_no_flag_of_the_user_changes_the_arithmetic() -> None:
    command = ["c++", "-Ofast", *build_config.CXX_FLAGS.split(), "-dM", "-E", "-x", "c++"]
    macros = subprocess.run(
        [*command, os.devnull], capture_output=True, text=True, check=True
    ).stdout
    assert "__FAST_MATH__" not in macros
    assert "#define __FINITE_MATH_ONLY__ 0" in macros
