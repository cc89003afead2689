"""Graphs of what imports or includes what."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from graphlib import CycleError, TopologicalSorter


def circle_of(edges: Mapping[str, Collection[str]]) -> list[str]:
    """Return a circle of a graph, its first node again at the end; nothing if there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []
