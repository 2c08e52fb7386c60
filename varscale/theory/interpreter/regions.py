"""Regions in a walk: the equations of a scope that no rule covers, put together as one equation that is drawn.

A rule that finds a value outside what it covers asks for a region (`Walk.ask`); the walk ends with placeholders, and the next
one takes all equations of that module for one. A scope is added once, so this ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from varscale import _compat
from varscale.programs.marks import FIELD, MODULE, WITHIN
from varscale.programs.pieces import PIECE
from varscale.programs.scopes import opened, whole_path
from varscale.theory.rules.registry import sub_jaxpr_of

_PARTS = "/.[#"  # what may follow the path of a module in that of a part of it
_ENTERED = {
    "jit",
    "pjit",
    "remat2",
    "checkpoint",
    "closed_call",
}  # calls whose modules have rows of their own


@dataclasses.dataclass
class Regions:
    """The scopes of a model that are drawn.

    Attributes:
        scopes: those asked for so far, by path, with the reason.
        drawn: those that were when the walk began.
        refused: those that cannot be drawn.
        walks: how many walks there were.
        changed: whether one was asked for, or refused, since the walk began.
    """

    scopes: dict[str, str] = dataclasses.field(default_factory=dict)
    drawn: tuple[str, ...] = ()
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    walks: int = 0
    changed: bool = False

    def ask(self, scope: str, reason: str) -> bool:
        """Add a scope; False where it cannot be drawn, or is."""
        if scope in self.refused or scope in self.drawn:
            return False
        self.scopes.setdefault(scope, reason)
        self.changed = True
        return True

    def refuse(self, scope: str, reason: str) -> None:
        """Take a scope away for good; where what comes out of it is in the way, the scope around it takes its place."""
        asked = self.scopes.pop(scope, reason)
        self.refused[scope] = reason
        if scope and reason.startswith("random"):
            self.ask(
                scope[: max(scope.rfind(c) for c in _PARTS)] if any(c in scope for c in _PARTS) else "", asked
            )
        self.changed = True

    @property
    def note(self) -> tuple[str, ...]:
        """One sentence on what is drawn, and how often the model was walked for that; none where nothing is."""
        drawn = ", ".join(repr(scope) if scope else "the whole model" for scope in self.drawn)
        return (f"Drawn as regions: {drawn} ({self.walks} walks of the model).",) if drawn else ()

    def waits(self, path: str) -> bool:
        """Whether a path is of a scope that was asked for in this walk, so that nothing in it needs to be worked out."""
        return self.changed and any(scope not in self.drawn and within(path, scope) for scope in self.scopes)

    def again(self) -> bool:
        """Begin the next walk, if there has to be one."""
        changed, self.changed, self.drawn = self.changed, False, tuple(self.scopes)
        self.walks += 1
        return changed


_MOST_LAYERS = 64  # steps of a loop over layers that are written out


def _has_marks(jaxpr: Any) -> bool:
    """Whether modules are called in it."""
    return any(
        (eqn.primitive.name == "name" and eqn.params["name"].startswith((MODULE, WITHIN)))
        or (sub_jaxpr_of(eqn) is not None and _has_marks(_compat.sub_jaxpr(sub_jaxpr_of(eqn))[0]))
        for eqn in jaxpr.eqns
    )


class _RegionPrimitive:
    name = "region"
    multiple_results = True


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """Equations of a jaxpr as one equation.

    `params`: the scope (`scope`), the jaxpr (`jaxpr`; after the operands it takes numbers that are added to its outputs where
    they are made, zeros: what flows back into them is the gradient there), which output each is added to (`nudged`), and the
    rows of modules inside it (`rows`: path, steps, field, variable).
    """

    invars: list[Any]
    outvars: list[Any]
    params: dict[str, Any]
    source_info: Any
    primitive = _RegionPrimitive()


def blocks(
    eqns: Sequence[Any],
    outputs: Sequence[Any],
    place: Any,
    scopes: Collection[str],
    kept: Sequence[Any],
    is_parameter: Callable[[Any], bool],
) -> Iterator[tuple[int, int, Any]]:
    """The equations, those of a scope as one: (the first one's place, the place after the last, equation).

    Args:
        eqns: the equations of a jaxpr.
        outputs: its outputs.
        place: where the walk is.
        scopes: the paths of the scopes.
        kept: variables that have rows.
        is_parameter: whether a variable holds a parameter, once it is reached.
    """
    paths = [opened(eqn, place.path, place.piece)[1] for eqn in eqns] if scopes else []
    spans = sorted(span for scope in scopes if (span := _span(paths, scope)) is not None)
    at = 0
    for start, stop, scope in _separate(spans):
        yield from ((i, i + 1, eqns[i]) for i in range(at, start))
        own = eqns[start:stop]
        before = _keys(own)
        yield from ((start, start, eqn) for eqn in before)
        own = [eqn for eqn in own if eqn not in before]
        read = {v for eqn in (*eqns[:start], *eqns[stop:]) for v in eqn.invars if not _compat.is_literal(v)}
        read |= {v for v in (*outputs, *kept) if not _compat.is_literal(v)}
        yield start, stop, as_one(own, read, place.piece, scope, is_parameter)
        at = stop
    yield from ((i, i + 1, eqns[i]) for i in range(at, len(eqns)))


def _span(paths: Sequence[str], scope: str) -> tuple[int, int, str] | None:
    """From the first to the last equation of a scope; what is between reads of it or is read by it, or may as well be."""
    own = [i for i, path in enumerate(paths) if within(path, scope)]
    return (own[0], own[-1] + 1, scope) if own else None


def within(path: str, scope: str) -> bool:
    """Whether a path is a scope's, or that of a part of it."""
    return not scope or path == scope or (path.startswith(scope) and path[len(scope)] in _PARTS)


def _separate(spans: Sequence[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Spans that overlap as one."""
    out: list[tuple[int, int, str]] = []
    for start, stop, scope in spans:
        if out and start < out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]), out[-1][2])
        else:
            out.append((start, stop, scope))
    return out


def _keys(eqns: Sequence[Any]) -> list[Any]:
    """The equations that make random keys of keys and numbers from outside: keys are known, and drawn from anew by the walk."""
    inside, found = {v for eqn in eqns for v in eqn.outvars}, []
    for eqn in eqns:
        if all(map(_is_random_key, eqn.outvars)) and not any(
            v in inside for v in eqn.invars if not _compat.is_literal(v)
        ):
            found.append(eqn)
            inside -= set(eqn.outvars)
    return found


def _is_random_key(var: Any) -> bool:
    return jnp.issubdtype(getattr(var.aval, "dtype", jnp.int32), jax.dtypes.prng_key)


def as_one(
    eqns: Sequence[Any], read: set[Any], piece: str, scope: str, is_parameter: Callable[[Any], bool]
) -> Region:
    """Equations as one.

    Args:
        eqns: the equations.
        read: variables that are read outside.
        piece: the path at which the piece that they are part of is called.
        scope: the path of the scope that they are of.
        is_parameter: whether a variable holds a parameter.
    """
    made = {v for eqn in eqns for v in eqn.outvars}
    invars = list(
        dict.fromkeys(v for e in eqns for v in e.invars if not _compat.is_literal(v) and v not in made)
    )
    outvars = [v for eqn in eqns for v in eqn.outvars if v in read]
    structs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in invars]
    found: list[_Evaluated] = []

    def nudged(operands: Sequence[Any], given: Sequence[Any] | None) -> list[Any]:
        found.append(_Evaluated(None if given is None else iter(given)))
        found[-1].parameters = [x for v, x in zip(invars, operands, strict=True) if is_parameter(v)]
        return found[-1].outputs(eqns, dict(zip(invars, operands, strict=True)), outvars, piece)

    jax.eval_shape(lambda operands: nudged(operands, None), structs)
    jaxpr = jax.make_jaxpr(nudged)(structs, found[-1].wanted)
    last = found[-1]
    variables = [*outvars, *map(_Marked, jaxpr.out_avals[len(outvars) :])]
    rows = [(*row, variables[i]) for row, i in zip(last.rows, last.marked, strict=True)]
    return Region(
        invars,
        variables,
        {"scope": scope, "jaxpr": jaxpr, "nudged": last.nudged, "rows": rows},
        eqns[0].source_info,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Marked:
    """What a module inside a region puts out, and nothing outside reads."""

    aval: Any


class _Evaluated:
    """One evaluation of a region's equations.

    Attributes:
        wanted: the arrays that are added to what modules put out, in order.
        rows: path, steps and field of what modules inside put out.
        parameters: the operands that are parameters.
        steps: which steps of loops over layers it is in.
        nudged: for each of the arrays, which output it is added to.
        marked: for each of the rows, which output it is.
    """

    def __init__(self, given: Iterator[Any] | None):
        self.given = given
        self.wanted: list[jax.ShapeDtypeStruct] = []
        self.parameters: list[Any] = []
        self.rows: list[tuple[str, tuple[int, ...], str]] = []
        self.steps: list[int] = []
        self.nudged: list[int] = []
        self.marked: list[int] = []
        self._made: list[Any] = []
        self._marked: list[Any] = []

    def outputs(
        self, eqns: Sequence[Any], env: dict[Any, Any], outvars: Sequence[Any], piece: str
    ) -> list[Any]:
        self._run(eqns, env, set(outvars), piece)
        out = [env[v] for v in outvars]
        for x in self._marked:
            if not any(x is y for y in out):
                out.append(x)
        where = {id(x): i for i, x in reversed(list(enumerate(out)))}
        self.nudged = [where[id(x)] for x in self._made]
        self.marked = [where[id(x)] for x in self._marked]
        return out

    def _run(self, eqns: Sequence[Any], env: dict[Any, Any], outvars: set[Any], piece: str) -> None:
        for eqn in eqns:
            ins = [v.val if _compat.is_literal(v) else env[v] for v in eqn.invars]
            name, inner = eqn.primitive.name, sub_jaxpr_of(eqn)
            if name in _ENTERED and inner is not None:
                jaxpr, consts = _compat.sub_jaxpr(inner)
                own = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *ins), strict=True))
                inner_piece = opened(eqn, "", piece)[1] if eqn.params.get("name") == PIECE else piece
                self._run(jaxpr.eqns, own, set(), inner_piece)
                outs = [v.val if _compat.is_literal(v) else own[v] for v in jaxpr.outvars]
            elif name == "scan" and self._is_over_layers(eqn, ins):
                outs = self._layers(eqn.params, ins, piece)
            else:
                outs = self._evaluated(eqn, ins, piece)
            env.update(
                (v, self._nudged(x) if v in outvars else x) for v, x in zip(eqn.outvars, outs, strict=True)
            )

    def _is_over_layers(self, eqn: Any, ins: Sequence[Any]) -> bool:
        """Whether a scan takes a parameter a step, and modules are called in it."""
        _, _, streams = _compat.scan_operands(eqn.params, list(ins))
        parameters = any(x is y for x in streams for y in self.parameters)
        return (
            parameters
            and eqn.params["length"] <= _MOST_LAYERS
            and _has_marks(_compat.sub_jaxpr(eqn.params["jaxpr"])[0])
        )

    def _layers(self, params: dict[str, Any], ins: Sequence[Any], piece: str) -> list[Any]:
        """A scan over layers, step by step, whose modules have rows of their own."""
        jaxpr, consts = _compat.sub_jaxpr(params["jaxpr"])
        fixed, carry, streams = _compat.scan_operands(params, list(ins))
        order = range(params["length"])[:: -1 if params["reverse"] else 1]
        stacked: dict[int, list[Any]] = {}
        for step in order:
            given = [*consts, *fixed, *carry, *(x[step] for x in streams)]
            own = dict(zip((*jaxpr.constvars, *jaxpr.invars), given, strict=True))
            self.steps.append(step)
            self._run(jaxpr.eqns, own, set(), piece)
            self.steps.pop()
            outs = [v.val if _compat.is_literal(v) else own[v] for v in jaxpr.outvars]
            carry, stacked[step] = outs[: len(carry)], outs[len(carry) :]
        return [
            *carry,
            *(jnp.stack(rows) for rows in zip(*(stacked[k] for k in sorted(stacked)), strict=True)),
        ]

    def _evaluated(self, eqn: Any, ins: Sequence[Any], piece: str) -> Sequence[Any]:
        if sub_jaxpr_of(eqn) is not None:
            return _compat.evaluated(eqn, ins)
        mark = eqn.params.get("name") if eqn.primitive.name == "name" else None
        if mark is not None and mark.startswith((MODULE, WITHIN)):
            where, field, arrays = mark.split(FIELD)
            self._marked.append(self._nudged(ins[0]))
            self.rows.append(
                (whole_path(where, piece), tuple(self.steps), "" if self.steps and arrays == "1" else field)
            )
            return self._marked[-1:]
        found = eqn.primitive.bind(*ins, **eqn.params)
        return list(found) if eqn.primitive.multiple_results else [found]

    def _nudged(self, x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating) or any(x is y for y in self._made):
            return x
        self.wanted.append(jax.ShapeDtypeStruct(x.shape, x.dtype))
        x = x + (jnp.zeros_like(x) if self.given is None else next(self.given))
        self._made.append(x)
        return x
