"""How far a computed product may be from the exact one."""

from __future__ import annotations

UNIT = 2.0**-53


def error_bound(roundings: int) -> float:
    """The textbook's gamma_n: the relative error of a product after ``roundings`` roundings."""
    return roundings * UNIT / (1 - roundings * UNIT)
