"""Rules, one family a file."""

from __future__ import annotations

import importlib

FAMILIES = (
    "elementwise",
    "structure",
    "joining",
    "reductions",
    "linear",
    "convolution",
    "pooling",
    "nearness",
    "gather",
    "segments",
    "random",
    "complex_numbers",
    "running",
    "control",
)
_loaded: list[str] = []


def load() -> None:
    """Register every family, once."""
    while len(_loaded) < len(FAMILIES):
        importlib.import_module(f"varscale.theory.rules.{FAMILIES[len(_loaded)]}")
        _loaded.append(FAMILIES[len(_loaded)])
