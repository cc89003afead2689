"""Builds the extensions in place for one architecture, unless those that are there fit.

It needs nvcc and a CUDA build of torch, and no GPU: what it makes elsewhere, for the same torch,
Python and architecture, can be carried to the machine that has one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator

from adamal_kernels.build_config import source_folder, sources_digest
from adamal_kernels.build_info import PACKAGE, extension_record, why_not_importable

from .runner import ROOT

_EXTENSIONS = ("_C", "_cuda")


def main() -> int:
    """Build where that is needed, and return the exit status."""
    parser = argparse.ArgumentParser(prog="build", description=__doc__)
    parser.add_argument("--arch", required=True, help="a compute capability, such as 9.0")
    arch = parser.parse_args().arch
    reasons = list(why_unfit(arch))
    if not reasons:
        print(f"the extensions that are there fit: {[extension_record(n) for n in _EXTENSIONS]}")
        return 0
    print("\n".join(reasons), flush=True)
    # What make built there, for its own Python, is replaced here.
    (ROOT / ".venv" / ".built").unlink(missing_ok=True)
    environment = os.environ | {"ADAMAL_BUILD": "cuda", "ADAMAL_CUDA_ARCHS": arch}
    command = [sys.executable, "-m", "adamal_kernels", "build"]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def why_unfit(arch: str) -> Iterator[str]:
    """Yield why the extensions that are there cannot be used: none, where they can.

    They fit if they import, which asks for the series of torch and Python that was recorded, were
    made of the sources that are there, and hold code for ``arch``.
    """
    sources = sources_digest(source_folder(PACKAGE))
    for name in _EXTENSIONS:
        if reason := why_not_importable(name):
            yield reason
        elif extension_record(name).sources != sources:
            yield f"{name} was made of other sources"
    archs = extension_record("_cuda").archs
    if arch.replace(".", "") not in archs:
        yield f"_cuda holds code for {', '.join(archs) or 'nothing'}, this GPU is {arch}"


if __name__ == "__main__":
    sys.exit(main())
