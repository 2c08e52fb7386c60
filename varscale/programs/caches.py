"""Tracing aside from caches, whose traces were made without marks or carry those of another call; and without collections."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Iterator
from typing import Any

from flax.core import freeze

from varscale import _compat

_FLAG = "varscale_call"


@contextlib.contextmanager
def fresh_traces() -> Iterator[None]:
    """While it lasts, this thread meets no trace that jax made before."""
    with _compat.trace_context(object()):
        yield


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Without collections of garbage: a trace makes so many objects that Python would look through all there are, for a tenth
    of the time that a whole model takes.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def trace_each(module: Any) -> None:
    """Have `nn.jit` trace every call of a submodule of this bound linen module, not one for all that are alike.

    What tells calls apart there is a hash, of the flags of the scope among others.
    """
    if _FLAG not in module.scope.flags:
        module.scope.flags = freeze({**module.scope.flags, _FLAG: _Unlike()})


class _Unlike:
    """A value with another hash each time."""

    def __init__(self) -> None:
        self._hashes = itertools.count()

    def __hash__(self) -> int:
        return next(self._hashes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unlike)
