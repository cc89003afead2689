"""Builds the extensions that can be built here, and records what became of each.

``adamal_kernels/build_config.py`` says what they consist of and which variables choose.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

PACKAGE = "adamal_kernels"
ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
FILES_URL = None
"""Where the files of the repository can be read by everyone, as raw files; None: nowhere yet."""

# By its path: the package's own import needs torch, which may be absent.
spec = spec_from_file_location("build_config", ROOT / PACKAGE / "build_config.py")
config = module_from_spec(spec)
spec.loader.exec_module(config)


Result = TypeVar("Result")


def or_exit(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function; what it says cannot be built was asked for, so that the build ends."""
    try:
        return function(*arguments)
    except config.CannotBuildError as error:
        raise SystemExit(str(error)) from error


class BuildAndRecord(build_ext):
    """Builds the configured extensions, and leaves ``_build.json`` and the sources beside them."""

    def run(self) -> None:
        """Build, and record the outcome in the wheel, or in the source tree where in place."""
        super().run()
        installed = Path(self.get_ext_fullpath(f"{PACKAGE}._C")).parent
        installed.mkdir(parents=True, exist_ok=True)
        for name, record in RECORDS.items():
            if not record["built"]:  # An earlier build may have left one.
                file = Path(self.get_ext_filename(f"{PACKAGE}.{name}")).name
                for folder in (installed, Path(self.build_lib, PACKAGE)):
                    (folder / file).unlink(missing_ok=True)
        content = json.dumps({"extensions": RECORDS}, indent=2) + "\n"
        (installed / "_build.json").write_text(content)
        if not self.inplace:  # For `adamal build`.
            shutil.rmtree(installed / "csrc", ignore_errors=True)
            shutil.copytree(SOURCES, installed / "csrc")
        for name, record in RECORDS.items():
            outcome = "built"
            if not record["built"]:
                outcome = f"left out: {record['reason']}; then, after installing: adamal build"
            print(f"{PACKAGE}.{name}: {outcome}", file=sys.stderr)

    def build_extensions(self) -> None:
        """Compile what was configured; what fails is left out."""
        compile_extensions = partial(
            config.compile_extensions,
            report=lambda line: print(line, flush=True),
            log=sys.stdout,
        )
        failures = or_exit(
            compile_extensions,
            CONFIGURED,
            SOURCES,
            config.objects_folder(ROOT),
            lambda name: Path(self.get_ext_fullpath(f"{PACKAGE}.{name}")).resolve(),
        )
        for name, failure in failures.items():
            reason = f"{failure}; the build's output (pip -v) says why"
            RECORDS[name] = or_exit(config.left_out, name, config.CannotBuildError(reason))
        self.extensions = [
            extension
            for extension in self.extensions
            if extension.name.rpartition(".")[2] not in failures
        ]


class Build(build):
    """Runs build_ext even where there is nothing to build: it writes the record."""

    sub_commands: ClassVar = [
        (name, None if name == "build_ext" else condition) for name, condition in build.sub_commands
    ]

    def run(self) -> None:
        """Build without what an earlier build has left of modules that have moved since."""
        for module in Path(self.build_lib, PACKAGE).rglob("*.py"):
            module.unlink()
        super().run()


def index_page(files_url: str | None) -> str:
    """Return the README as a package index shows it, where no relative link leads anywhere.

    Args:
        files_url: where the repository's files are served; None: pictures are left out, and of
            links to files the text is kept.
    """
    text = (ROOT / "README.md").read_text("utf-8")
    if files_url is not None:
        return re.sub(r"\]\((?!https?:|#)", f"]({files_url}/", text)
    text = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^]]*)\]\((?!https?:|#)[^)]*\)", r"\1", text)


CONFIGURED, RECORDS = or_exit(config.configure, SOURCES)
setup(
    long_description=index_page(FILES_URL),
    long_description_content_type="text/markdown",
    ext_modules=[Extension(f"{PACKAGE}.{made.name}", []) for made in CONFIGURED],
    cmdclass={"build": Build, "build_ext": BuildAndRecord},
)
