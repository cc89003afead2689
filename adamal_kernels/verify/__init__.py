"""Checks that every backend steps alike: its cases, their oracle, and the ``verify`` command."""

from .parity import (
    Outcome,
    Values,
    Verification,
    add_arguments,
    devices,
    different_values,
    main,
    outside_tolerance,
    places,
    run_case,
    run_oracle,
    same_bits,
)

__all__ = [
    "Outcome",
    "Values",
    "Verification",
    "add_arguments",
    "devices",
    "different_values",
    "main",
    "outside_tolerance",
    "places",
    "run_case",
    "run_oracle",
    "same_bits",
]
