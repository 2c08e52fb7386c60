"""Assignments to nnx variables inside a trace, in a time that does not grow with the trace."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from varscale import _compat

_ONE_AT_A_TIME = threading.RLock()  # threads that restored each other's would leave one behind


@contextlib.contextmanager
def quick_assignments() -> Iterator[None]:
    """While it lasts, `variable[...] = x` puts a traced `x` of the variable's own shape and dtype in its place at once.

    So does flax, but it asks both where they are placed first. A tracer's answer is an error whose message looks for its origin
    among all equations so far: the counts of a deep model's random keys alone, and the averages that its norms keep, take a
    time that grows as the square of its depth.
    """
    with _ONE_AT_A_TIME:
        yield from _quick()


def _quick() -> Iterator[None]:
    own = nnx.Variable.__setitem__

    def assign(variable: Any, index: Any, x: Any) -> None:
        if index is ... and _compat.is_tracer(x) and _is_plain(variable):
            old = variable.get_value()
            if isinstance(old, jax.Array) and jax.typeof(old) == jax.typeof(x):
                variable.set_value(x)
                return
        own(variable, index, x)

    try:
        setattr(nnx.Variable, "__setitem__", assign)  # noqa: B010
        yield
    finally:
        setattr(nnx.Variable, "__setitem__", own)  # noqa: B010


def _is_plain(variable: Any) -> bool:
    """Whether nothing but flax decides what it is to be set to."""
    kind = type(variable)
    overloaded = kind.set_value is not nnx.Variable.set_value or kind.get_value is not nnx.Variable.get_value
    return not overloaded and "on_set_value" not in variable.get_metadata()
