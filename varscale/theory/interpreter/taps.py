"""Which of the gradient at an array flows through a module's output that is this array.

A module may return an array that its caller reads elsewhere too: an activation kept in a dictionary beside what the next
layer reads, an input that a dropout without randomness hands on. All of them are one array, and one node, and the cotangent
at the node is that of all. A measured gradient is that of one output: of what reads it, and of the model's outputs that are it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from varscale import _compat
from varscale.programs.marks import MODULE, WITHIN
from varscale.theory.rules.registry import live, sub_jaxpr_of


class Through(NamedTuple):
    """What of the cotangent at an array flows through one output that is this array.

    Attributes:
        reads: whether an equation that the model's outputs depend on reads it.
        beside: whether the array is read past it, too.
        ends: how many of the model's own outputs are it.
        all_ends: how many are the array.
    """

    reads: bool
    beside: bool
    ends: int
    all_ends: int

    def of(self, whole: float, doubt: float, unknown: float) -> tuple[float, float]:
        """Its gradient and doubt, where those at the array are `whole` and `doubt`; cotangents of outputs are independent."""
        inner = max(whole - self.all_ends, 0.0)
        gradient = self.ends + (inner if self.reads else 0.0)
        if self.reads and gradient:
            return gradient, doubt * whole / gradient + (unknown if self.beside else 0.0)
        return gradient, doubt if gradient == whole else 0.0


@dataclasses.dataclass(eq=False)
class _Tap:
    """A name of an array: the variable that an equation makes, or what a mark calls it afterwards."""

    parent: _Tap | None = None
    readers: int = 0
    ends: int = 0

    def chain(self) -> Iterable[_Tap]:
        tap: _Tap | None = self
        while tap is not None:
            yield tap
            tap = tap.parent


def through(jaxpr: Any, rows: Mapping[str, int], own: Sequence[str]) -> dict[str, Through]:
    """What flows through each row.

    Args:
        jaxpr: the forward pass, marked.
        rows: path of a row to its number among the outputs of the jaxpr.
        own: the rows of the model's own outputs.
    """
    ends = [jaxpr.outvars[rows[path]] for path in own]
    walk = _Walk()
    walk.run(jaxpr, live(jaxpr.replace(outvars=ends), jaxpr.eqns))
    for atom in ends:
        for tap in walk.tap(atom).chain():
            tap.ends += 1
    found = {}
    for path, number in rows.items():
        tap = walk.tap(jaxpr.outvars[number])
        root = list(tap.chain())[-1]
        found[path] = Through(tap.readers > 0, root.readers > tap.readers, tap.ends, root.ends)
    return found


class _Walk:
    """A walk that follows arrays through marks and calls."""

    def __init__(self) -> None:
        self._taps: dict[Any, _Tap] = {}

    def tap(self, atom: Any) -> _Tap:
        return _Tap() if _compat.is_literal(atom) else self._taps.setdefault(atom, _Tap())

    def run(self, jaxpr: Any, eqns: Sequence[Any]) -> None:
        for eqn in eqns:
            ins = [self.tap(v) for v in eqn.invars]
            inner = sub_jaxpr_of(eqn)
            called = None if inner is None else _compat.sub_jaxpr(inner)[0]
            if eqn.primitive.name == "name" and str(eqn.params["name"]).startswith((MODULE, WITHIN)):
                self._taps[eqn.outvars[0]] = _Tap(ins[0])
            elif (
                called is not None
                and len(called.invars) == len(ins)
                and eqn.primitive.name not in _CALLED_AGAIN
            ):
                # A body may be called again: its variables are those of the call that is walked.
                outer, self._taps = self._taps, dict(zip(called.invars, ins, strict=True))
                self.run(called, called.eqns)
                made = [self.tap(v) for v in called.outvars]
                self._taps = outer
                self._taps.update(zip(eqn.outvars, made, strict=True))
            else:
                for tap in (tap for x in ins for tap in x.chain()):
                    tap.readers += 1


_CALLED_AGAIN = ("scan", "while", "cond")
