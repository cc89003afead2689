"""Whether a dict is as it was: no change may be overlooked, on the Python that runs the tests."""

from __future__ import annotations

import copy
import ctypes
import os
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from helpers.native_programs import CSRC, NATIVE


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.PyDLL:
    built = tmp_path_factory.mktemp("dict_version") / "dict_version.so"
    include = sysconfig.get_path("include")
    subprocess.run(
        [
            *os.environ.get("CXX", "c++").split(),
            *("-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"),
            *(f"-I{include}", f"-I{CSRC}", str(NATIVE / "dict_version.cpp"), "-o", str(built)),
        ],
        check=True,
    )
    return ctypes.PyDLL(str(built))


class Version:
    """A DictVersion."""

    def __init__(self, library: ctypes.PyDLL) -> None:
        self._library = library
        library.version_new.restype = ctypes.c_void_p
        self._address = ctypes.c_void_p(library.version_new())

    def __del__(self) -> None:
        self._library.version_delete(self._address)

    def watch(self, watched: dict[Any, Any]) -> None:
        self._library.version_watch(self._address, ctypes.py_object(watched))

    def note(self, watched: dict[Any, Any]) -> None:
        self._library.version_note(self._address, ctypes.py_object(watched))

    def forget(self) -> None:
        self._library.version_forget(self._address)

    def is_of(self, watched: dict[Any, Any]) -> bool:
        return bool(self._library.version_is_of(self._address, ctypes.py_object(watched)))


@pytest.fixture
def version(library: ctypes.PyDLL) -> Version:
    return Version(library)


def noted(version: Version, watched: dict[Any, Any]) -> dict[Any, Any]:
    version.watch(watched)
    version.note(watched)
    assert version.is_of(watched)
    return watched


CHANGES: dict[str, Callable[[dict[Any, Any]], object]] = {
    "set": lambda d: d.__setitem__("a", 2.5),
    "an equal object": lambda d: d.__setitem__("a", float("1.5")),
    "add": lambda d: d.__setitem__("c", 1),
    "delete": lambda d: d.__delitem__("a"),
    "pop": lambda d: d.pop("a"),
    "popitem": lambda d: d.popitem(),
    "clear": lambda d: d.clear(),
    "update": lambda d: d.update(a=2.5),
    "update by a dict": lambda d: d.update({"a": 2.5, "z": 0}),
    "setdefault": lambda d: d.setdefault("c", 1),
    "merge": lambda d: d.__ior__({"a": 2.5}),
    "again": lambda d: d.__setitem__("a", d.pop("a")),
    "filled anew": lambda d: (d.clear(), d.update({"a": 2.5, "b": None})),
}


@pytest.mark.parametrize("kind", [dict, lambda d: defaultdict(dict, d)], ids=["dict", "default"])
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(version: Version, change: str, kind: Any) -> None:
    watched = noted(version, kind({"a": 1.5, "b": None}))
    CHANGES[change](watched)
    assert not version.is_of(watched)
    version.note(watched)
    assert version.is_of(watched), "and not for ever"
    watched["a"] = object()
    assert not version.is_of(watched)


def test_reading_is_no_change(version: Version) -> None:
    watched = noted(version, {"a": 1.5})
    assert watched.get("a") == watched["a"]
    assert watched == dict(watched) == copy.deepcopy(watched)
    assert [*watched.items()]
    assert version.is_of(watched)


def test_another_dict_is_not_of_the_version(version: Version, library: ctypes.PyDLL) -> None:
    watched = noted(version, {"a": 1.5})
    assert not version.is_of(dict(watched))
    version.forget()
    assert not version.is_of(watched)
    other = noted(Version(library), watched)  # Watched by two, one of which is gone.
    CHANGES["set"](other)
    version.note(watched)
    CHANGES["add"](other)
    assert not version.is_of(watched)


def test_a_dict_in_the_place_of_one_that_died_is_another(version: Version) -> None:
    """As a copy, which Python 3.13 makes without a version of its own."""
    source = {"a": 1.5}
    places = []
    for value in range(100):
        source["a"] = value
        watched = source.copy()
        places.append(id(watched))
        assert not version.is_of(watched)
        noted(version, watched)
        del watched
    assert len(set(places)) < len(places), "no place was used twice: this shows nothing"


def test_without_a_watcher_no_dict_is_as_it_was(library: ctypes.PyDLL) -> None:
    """A process has eight, which others may have taken."""
    if sys.version_info < (3, 12):
        pytest.skip("this Python has no watchers")
    program = f"""
import ctypes
callback = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(lambda *_: 0)
while True:
    try:
        ctypes.pythonapi.PyDict_AddWatcher(callback)
    except RuntimeError:
        break
library = ctypes.PyDLL({library._name!r})
library.version_new.restype = ctypes.c_void_p
version = ctypes.c_void_p(library.version_new())
watched = ctypes.py_object({{"a": 1}})
library.version_watch(version, watched)
library.version_note(version, watched)
raise SystemExit(library.version_is_of(version, watched))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
