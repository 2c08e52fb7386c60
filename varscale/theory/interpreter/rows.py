"""Rows as the walk meets them: what modules and `jax.named_scope` blocks put out, and every equation where that is asked for.

What a module puts out carries a mark (`faces.named`). A scope is read from the name stacks of its equations and puts out
what is used after it: the largest such array, the last of equals. Calls are entered, and so are loops over layers, whose rows
end in "@step"; loops over time are not.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from varscale import _compat
from varscale.programs.marks import FIELD, MODULE, WITHIN
from varscale.programs.pieces import PIECE, live
from varscale.programs.scopes import is_floating, opened, whole_path
from varscale.theory.rules.registry import sub_jaxpr_of

_LOOPS = {"scan", "while"}


class Made(NamedTuple):
    """Something that the walk made.

    Attributes:
        call: scope and, from the second time on, which call of it: "Dense_0#1".
        path: the row's path: the call, and which steps of the loops around it.
        kind: "module", "scope", or the primitive of an equation.
        stepped: whether that was in a loop over layers.
        value: what was made.
    """

    call: str
    path: str
    kind: str
    stepped: bool
    value: Any


@dataclasses.dataclass
class Rows:
    """What was made so far, in order.

    Attributes:
        scopes: whether `jax.named_scope` blocks have rows.
        equations: primitives whose equations have rows of their own; None for all.
        made: the rows.
        counts: how often each kind of row was met at each path, step by step.
        entered: how many jaxprs were entered.
    """

    scopes: bool
    equations: Collection[str] | None
    made: list[Made] = dataclasses.field(default_factory=list)
    counts: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    entered: int = 0

    def add(self, path: str, steps: Sequence[int], kind: str, value: Any, field: str = "") -> None:
        at = "".join(f"@{step}" for step in steps)
        count = self.counts[kind, path + field + at]
        self.counts[kind, path + field + at] += 1
        call = path + (f"#{count}" if count else "")
        self.made.append(Made(call, call + at + field, kind, bool(steps), value))


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the walk is.

    Attributes:
        rows: where rows are kept.
        path: the scopes that the calls around it were made in.
        loops: how many loops are around it.
        piece: the path at which the piece that it is in is called.
    """

    rows: Rows
    path: str = ""
    loops: int = 0
    piece: str = ""

    def within(self, eqn: Any) -> Place:
        """The place inside an equation."""
        path = opened(eqn, self.path, self.piece)[1]
        piece = path if eqn.params.get("name") == PIECE else self.piece
        return Place(self.rows, path, self.loops + (eqn.primitive.name in _LOOPS), piece)

    def note(self, eqn: Any, env: Mapping[Any, Any], steps: Sequence[int]) -> None:
        """A row for what a module puts out; where equations are asked for, one for each array that another computes."""
        mark = eqn.params.get("name") if eqn.primitive.name == "name" else None
        if mark is not None and mark.startswith((MODULE, WITHIN)):
            where, field, arrays = mark.split(FIELD)
            path = whole_path(where, self.piece)
            # The body of a scan returns (x, None): "path@step" where there is one array, else "path@step[0]".
            self.rows.add(
                path, steps, "module", env[eqn.outvars[0]], "" if steps and arrays == "1" else field
            )
            return
        if self.rows.equations is not None and eqn.primitive.name not in self.rows.equations:
            return
        path = "/".join(filter(None, [opened(eqn, self.path, self.piece)[1], eqn.primitive.name]))
        for j, var in enumerate(eqn.outvars):
            if is_floating(var):
                self.rows.add(
                    path, steps, eqn.primitive.name, env[var], f"[{j}]" if len(eqn.outvars) > 1 else ""
                )


def joined(
    made: Sequence[Made], captured: Mapping[str, Mapping[str, Any]], kind: str
) -> Iterator[tuple[str, str | None, Any]]:
    """Rows in execution order, as (path, kind where it is no module's, value).

    Args:
        made: what the walk made.
        captured: what flax captured, in execution order: call -> {row path: array}. It is believed where both have a row,
            but not where a loop over layers stacked it.
        kind: "module" or "scope": which of the two has rows.
    """
    modules = {m.call for m in made if m.kind == "module" and not m.stepped}
    stacked = {m.call for m in made if m.kind == "module" and m.stepped} - modules
    left = {call: dict(rows) for call, rows in captured.items() if call not in stacked}
    waiting = collections.deque(
        call for call in left if call not in modules
    )  # those that the walk did not meet
    order = {call: i for i, call in enumerate(left)}

    def upto(call: str) -> Iterator[tuple[str, str | None, Any]]:
        while waiting and order[waiting[0]] < order[call]:
            for path, value in left.pop(waiting.popleft()).items():
                yield path, None, value
        for path, value in left.pop(call, {}).items():
            yield path, None, value

    for m in made:
        if m.kind == "module" and captured.get(m.call) and m.call not in stacked:
            yield from upto(m.call)
        elif m.kind in (kind, "module") or m.kind not in ("module", "scope"):
            yield m.path, None if m.kind == "module" else m.kind, m.value
    for rows in left.values():
        for path, value in rows.items():
            yield path, None, value


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
    taps: dict[Any, _Tap] = {}
    _tapped(live(jaxpr.replace(outvars=ends), jaxpr.eqns), taps)
    for atom in ends:
        for tap in _tap(taps, atom).chain():
            tap.ends += 1
    found = {}
    for path, number in rows.items():
        tap = _tap(taps, jaxpr.outvars[number])
        root = list(tap.chain())[-1]
        found[path] = Through(tap.readers > 0, root.readers > tap.readers, tap.ends, root.ends)
    return found


def _tap(taps: dict[Any, _Tap], atom: Any) -> _Tap:
    return _Tap() if _compat.is_literal(atom) else taps.setdefault(atom, _Tap())


def _tapped(eqns: Sequence[Any], taps: dict[Any, _Tap]) -> None:
    """Follow arrays through marks and calls."""
    for eqn in eqns:
        ins, inner, name = [_tap(taps, v) for v in eqn.invars], sub_jaxpr_of(eqn), eqn.primitive.name
        called = None if inner is None else _compat.sub_jaxpr(inner)[0]
        if name == "name" and str(eqn.params["name"]).startswith((MODULE, WITHIN)):
            taps[eqn.outvars[0]] = _Tap(ins[0])
        elif called is not None and len(called.invars) == len(ins) and name not in ("scan", "while", "cond"):
            # A body may be called again: its variables are those of the call that is walked.
            own = dict(zip(called.invars, ins, strict=True))
            _tapped(called.eqns, own)
            taps.update(zip(eqn.outvars, [_tap(own, v) for v in called.outvars], strict=True))
        else:
            for tap in (tap for x in ins for tap in x.chain()):
                tap.readers += 1
