"""Where the marks of a traced program stand, which of them are measured, and in which loops, branches and order."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from varscale import _compat
from varscale.programs import tape
from varscale.programs.patterns import Pattern, rows_caught
from varscale.programs.pieces import REMAT
from varscale.programs.tape import Mark

Place = tuple[
    int, ...
]  # equation numbers, each but the last followed by the number of the sub-jaxpr: the address of an equation

# Equations that are entered, and the parameters that hold their sub-jaxprs.
_INSIDE = {
    "jit": ("jaxpr",),
    "pjit": ("jaxpr",),
    "closed_call": ("call_jaxpr",),
    "core_call": ("call_jaxpr",),
    "custom_jvp_call": ("call_jaxpr",),
    "custom_vjp_call": ("call_jaxpr",),
    **dict.fromkeys(REMAT, ("jaxpr",)),
    "scan": ("jaxpr",),
    "while": ("body_jaxpr",),
    "cond": ("branches",),
    "shard_map": ("jaxpr",),
}


@dataclasses.dataclass(frozen=True)
class Site:
    """A mark that is measured.

    Attributes:
        number: number of the mark on the tape.
        mark: the mark.
        backward: whether it marks the cotangent.
        call: number of earlier values of the same row: 1 for "path#1".
        layers: lengths of the loops over layers around it, from the outermost in.
        averaged: whether it stands in a loop over something else, and is averaged over its steps.
        conditional: whether it may not run.
        shape: shape of the array.
        dtype: name of its dtype.
    """

    number: int
    mark: Mark
    backward: bool
    call: int
    layers: tuple[int, ...]
    averaged: bool
    conditional: bool
    shape: tuple[int, ...]
    dtype: str

    def row(self, steps: Sequence[int] = ()) -> str:
        """The path of its row at these steps of the loops over layers."""
        # The body of a scan returns (x, None): "path@3" where there is one array, else "path@3[0]".
        field = "" if self.layers and self.mark.arrays == 1 else self.mark.field
        again = f"#{self.call}" if self.call else ""
        return self.mark.path + again + "".join(f"@{step}" for step in steps) + field


@dataclasses.dataclass
class Plan:
    """The sites of a traced program.

    Attributes:
        sites: the sites by place, in execution order.
        rows: paths of the rows that are measured.
        entered: places of the equations that contain sites.
        layers: places of the scans over layers.
    """

    sites: dict[Place, Site] = dataclasses.field(default_factory=dict)
    rows: frozenset[str] = frozenset()
    entered: set[Place] = dataclasses.field(default_factory=set)
    layers: set[Place] = dataclasses.field(default_factory=set)


def sub_jaxprs(eqn: Any) -> list[Any]:
    """The sub-jaxprs of an equation that can be entered."""
    inside = [eqn.params[name] for name in _INSIDE.get(eqn.primitive.name, ()) if name in eqn.params]
    return [part for value in inside for part in (value if isinstance(value, tuple | list) else (value,))]


def plan(jaxpr: Any, marks: Sequence[Mark | None], weights: Sequence[bool], rows: Pattern | Sequence[Pattern]) -> Plan:
    """The sites of a traced program.

    Args:
        jaxpr: the program.
        marks: the marks of its tape; None of those in calls that failed.
        weights: of each of its inputs, whether it is a parameter: a scan over parameters is one over layers.
        rows: patterns of the rows that are measured.

    Raises:
        ValueError: a pattern matches no row.
    """
    survey = _Survey(marks)
    survey.walk(jaxpr, (), _Around(), [_WEIGHT if weight else _DATA for weight in weights])
    found = survey.plan
    left = {place: site for place, site in found.sites.items() if place not in survey.replaced}
    paths = {place: [site.row(steps) for steps in np.ndindex(*site.layers)] for place, site in left.items()}
    known = dict.fromkeys(row for place, site in left.items() if not site.backward for row in paths[place])
    found.rows = frozenset(rows_caught(rows, known, "rows") if known else ())
    found.sites = {place: site for place, site in left.items() if not found.rows.isdisjoint(paths[place])}
    found.entered = {place[: i + 1] for place in found.sites for i in range(0, len(place) - 1, 2)}
    return found


# What a value depends on: nothing, parameters alone, or data.
_CONSTANT, _WEIGHT, _DATA = range(3)


@dataclasses.dataclass(frozen=True)
class _Around:
    """What is around an equation."""

    layers: tuple[int, ...] = ()
    averaged: bool = False
    conditional: bool = False
    recomputed: bool = False


class _Survey:
    """A walk through a program in execution order."""

    def __init__(self, marks: Sequence[Mark | None]):
        self.marks = marks
        self.plan = Plan()
        self.replaced: set[Place] = set()
        self._values: dict[int, Site] = {}
        self._cotangents: dict[int, Place] = {}
        self._counts: collections.Counter[Any] = collections.Counter()
        self._marked: dict[int, bool] = {}

    def walk(self, jaxpr: Any, place: Place, around: _Around, kinds: Sequence[int]) -> list[int]:
        """Notes the sites of a jaxpr; returns what its outputs depend on."""
        env: dict[Any, int] = dict.fromkeys(jaxpr.constvars, _CONSTANT)
        env.update(zip(jaxpr.invars, kinds, strict=True))

        def kind(atom: Any) -> int:
            return _CONSTANT if _compat.is_literal(atom) else env[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            given = [kind(v) for v in eqn.invars]
            worst = max(given, default=_CONSTANT)
            out = [worst] * len(eqn.outvars)
            if (mark := tape.read(eqn)) is not None:
                self._note(eqn, *mark, (*place, i), around)
            elif self._has_marks(eqn):
                out = self._enter(eqn, (*place, i), around, given) or out
            env.update(zip(eqn.outvars, out, strict=True))
        return [kind(v) for v in jaxpr.outvars]

    def _enter(self, eqn: Any, place: Place, around: _Around, given: list[int]) -> list[int] | None:
        name = eqn.primitive.name
        parts = [_compat.sub_jaxpr(part)[0] for part in sub_jaxprs(eqn)]
        if name == "scan":
            constants, carry, streams = _compat.scan_operands(eqn.params, given)
            if _WEIGHT in streams and not around.averaged:
                self.plan.layers.add(place)
                around = dataclasses.replace(around, layers=(*around.layers, eqn.params["length"]))
            else:
                around = dataclasses.replace(around, averaged=True)
            given = [*constants, *[_DATA] * len(carry), *streams]
        elif name == "while":
            given = given[eqn.params["cond_nconsts"] :]
            around = dataclasses.replace(around, conditional=True)
        elif name == "cond":
            given = given[1:]
            around = dataclasses.replace(around, conditional=True)
        elif name in REMAT and eqn.params.get("differentiated"):
            around = dataclasses.replace(around, recomputed=True)
        before, most = self._counts.copy(), self._counts
        outs = []
        for k, part in enumerate(parts):
            self._counts = before.copy()  # branches: one of them runs
            outs.append(self.walk(part, (*place, k), around, given))
            most = most | self._counts
        self._counts = most
        return [max(kinds) for kinds in zip(*outs, strict=True)]

    def _note(self, eqn: Any, what: str, number: int, place: Place, around: _Around) -> None:
        aval = eqn.outvars[0].aval
        shape, dtype = tuple(aval.shape), str(aval.dtype)
        mark, value = self.marks[number], self._values.get(number)
        if mark is None:
            return
        inside = around.layers, around.averaged, around.conditional
        if what == "value":
            if value is not None and around.recomputed:
                return
            key = (mark.path, mark.field, len(around.layers))
            site = Site(number, mark, False, self._counts[key], *inside, shape, dtype)
            self._counts[key] += 1
            self._values[number] = self.plan.sites[place] = site
        elif value is not None:
            # Of a gradient inside a gradient both are marked: the outer one, which is computed last, is the loss's.
            if number in self._cotangents:
                self.replaced.add(self._cotangents[number])
            self._cotangents[number] = place
            layers = value.layers if len(value.layers) == len(around.layers) else around.layers
            self.plan.sites[place] = Site(
                number, mark, True, value.call, layers, value.averaged or around.averaged, around.conditional, shape, dtype
            )
            return

    def _has_marks(self, eqn: Any) -> bool:
        return any(self._marks_in(_compat.sub_jaxpr(part)[0]) for part in sub_jaxprs(eqn))

    def _marks_in(self, jaxpr: Any) -> bool:
        if id(jaxpr) not in self._marked:
            self._marked[id(jaxpr)] = any(tape.read(eqn) is not None or self._has_marks(eqn) for eqn in jaxpr.eqns)
        return self._marked[id(jaxpr)]
