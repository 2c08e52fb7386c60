"""Marks that name, in one traced program, what each module call returns, and forward and backward the cotangent of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from varscale.programs.caches import fresh_traces
from varscale.programs.calls import Call, Running, recording
from varscale.programs.marks import MODULE, map_arrays

_FORWARD, _BACKWARD = "varscale_value:", "varscale_cotangent:"


@dataclasses.dataclass(frozen=True)
class Mark:
    """One array that a module call returned.

    Attributes:
        path: path of the call's row.
        kind: class name of the module.
        root: class name of the model that the module is part of.
        field: which array of the output it is: "" for the output itself, "[0]", "['k']".
        arrays: number of marked arrays in the output.
    """

    path: str
    kind: str
    root: str
    field: str
    arrays: int


class Tape:
    """The marks of one trace.

    Attributes:
        marks: the marks by number, in the order of tracing; None of those in a call that failed.
        differentiated: numbers of the marks that reverse-mode differentiation went through.
    """

    def __init__(self, *, method: str = "__call__", backward: bool = True):
        """An empty tape.

        Args:
            method: the method of the model that is run in place of `__call__`.
            backward: whether cotangents are marked too. Then forward-mode differentiation of the marked calls fails.
        """
        self.method = method
        self.backward = backward
        self.marks: list[Mark | None] = []
        self.differentiated: set[int] = set()
        self._running = Running()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record on this tape what the current thread traces; jax's cached traces, which have no marks, are not used."""
        with recording(self.run), fresh_traces():
            yield

    def run(self, call: Call, function: Callable[[], Any]) -> Any:
        """The output of a module call, its arrays marked."""
        with self._running.entered(call) as own:
            if not own:
                return function()
            before = len(self.marks)
            try:
                with jax.named_scope(MODULE + call.row(self.method)):
                    output = function()
                    return map_arrays(functools.partial(self._mark, call), output) if call.has_row else output
            except Exception:  # the caller may try another way: what failed is in the trace, and made nothing
                self.marks[before:] = [None] * (len(self.marks) - before)
                raise

    def _mark(self, call: Call, x: jax.Array, field: str, arrays: int) -> jax.Array:
        self.marks.append(Mark(call.row(self.method), call.kind, call.root, field, arrays))
        return self.mark(x, len(self.marks) - 1)

    def mark(self, x: jax.Array, number: int) -> jax.Array:
        """The array, named forward, and its cotangent named backward."""
        if not self.backward:
            return checkpoint_name(x, f"{_FORWARD}{number}")

        # An outer differentiation meets the mark again in the forward rule: gradients of gradients are marked too.
        def forward(x: jax.Array) -> tuple[jax.Array, None]:
            self.differentiated.add(number)
            return named(x), None

        def backward(_: None, cotangent: jax.Array) -> tuple[jax.Array]:
            return (checkpoint_name(cotangent, f"{_BACKWARD}{number}"),)

        named = jax.custom_vjp(lambda x: checkpoint_name(x, f"{_FORWARD}{number}"))
        named.defvjp(forward, backward)
        return named(x)


def read(eqn: Any) -> tuple[Literal["value", "cotangent"], int] | None:
    """Whether an equation marks a value or a cotangent, and the number of the mark; None for other equations."""
    if eqn.primitive.name != "name":
        return None
    name = eqn.params["name"]
    if name.startswith(_FORWARD):
        return "value", int(name.removeprefix(_FORWARD))
    if name.startswith(_BACKWARD):
        return "cotangent", int(name.removeprefix(_BACKWARD))
    return None
