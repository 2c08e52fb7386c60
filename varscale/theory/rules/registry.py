"""The families of rules, one a file, and how they are loaded."""

from __future__ import annotations

import importlib

FAMILIES = (
    "elementwise",
    "axis",
    "concatenation",
    "reductions",
    "linear",
    "convolution",
    "pooling",
    "spatial_correlation",
    "lookup",
    "segments",
    "random",
    "complex",
    "associative_scan",
    "control",
)
_loaded: list[str] = []


def load() -> None:
    """Register every family, once."""
    while len(_loaded) < len(FAMILIES):
        importlib.import_module(f"varscale.theory.rules.{FAMILIES[len(_loaded)]}")
        _loaded.append(FAMILIES[len(_loaded)])
