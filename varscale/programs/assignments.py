"""Assignments to nnx variables inside a trace, in a time that does not grow with the trace."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from varscale import _compat


@contextlib.contextmanager
def quick_assignments(model: Any) -> Iterator[None]:
    """While it lasts, `variable[...] = x` puts a traced `x` of the variable's own shape and dtype in its place at once.

    So does flax, but it asks both where they are placed first. A tracer's answer is an error whose message looks for its origin
    among all equations so far: the counts of a deep model's random keys alone, and the averages that its norms keep, take a
    time that grows as the square of its depth.

    The variables themselves get a class of their own until the end, so that `model` must be a copy of one's own.

    Args:
        model: an nnx module or `nnx.Rngs`.
    """
    changed: list[tuple[Any, type]] = []
    try:
        for _, variable in nnx.iter_graph(model):
            if isinstance(variable, nnx.Variable) and _is_plain(variable):
                changed.append((variable, type(variable)))
                variable.__class__ = _quick(type(variable))
        yield
    finally:
        for variable, own in changed:
            variable.__class__ = own


@functools.lru_cache(maxsize=1024)
def _quick(own: type) -> type:
    """The class of variables that are assigned to at once. One is made of each class: jax keeps every class it registered."""

    def assign(variable: Any, index: Any, x: Any) -> None:
        if index is ... and _compat.is_tracer(x):
            old = variable.get_value()
            if isinstance(old, jax.Array) and jax.typeof(old) == jax.typeof(x):
                variable.set_value(x)
                return
        own.__setitem__(variable, index, x)  # pyright: ignore[reportAttributeAccessIssue]

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__slots__": (), "__setitem__": assign}
    return type(own)(own.__name__, (own,), names)


def _is_plain(variable: Any) -> bool:
    """Whether nothing but flax decides what it is to be set to."""
    kind = type(variable)
    overloaded = kind.set_value is not nnx.Variable.set_value or kind.get_value is not nnx.Variable.get_value
    return not overloaded and "on_set_value" not in variable.get_metadata()
