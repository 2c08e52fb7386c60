"""`jax.lax.associative_scan` put together again: jax writes it out as log₂ T levels of slices, combinations and interleavings.

What it computes does not depend on how it is cut up, so it is taken for one equation: the running combination of its
elements along an axis.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from varscale import _compat
from varscale.programs.pieces import live

# What depends on shapes, and so cannot be evaluated at a few positions only.
_MOVES = (
    "slice",
    "reshape",
    "squeeze",
    "transpose",
    "concatenate",
    "pad",
    "dot_general",
    "gather",
    "iota",
    "rev",
    "dynamic_slice",
)


class _Primitive:
    name = "associative_scan"
    multiple_results = True


@dataclasses.dataclass(frozen=True, eq=False)
class PrefixScan:
    """An associative scan as an equation.

    `params`: which axes of the largest array each array's are (`places`), which of those it runs along (`axis`), and how two
    elements are combined (`combine`), given arrays of one rank.
    """

    invars: list[Any]
    outvars: list[Any]
    params: dict[str, Any]
    source_info: Any
    primitive = _Primitive()


def gathered(eqns: Sequence[Any]) -> list[Any]:
    """The equations with every associative scan among them as one."""
    out: list[Any] = []
    i = 0
    while i < len(eqns):
        found = _scan_at(eqns, i)
        if found is None:
            out.append(eqns[i])
            i += 1
        else:
            scan, i = found
            out.append(scan)
    return out


@dataclasses.dataclass(frozen=True)
class _Level:
    """Where a scan is cut in halves: its arrays, the axis of each, and how many equations cut them."""

    arrays: list[Any]
    axes: list[int]

    @property
    def length(self) -> int:
        return self.arrays[0].aval.shape[self.axes[0]]


def _halves(eqn: Any) -> tuple[int, int] | None:
    """Axis and offset of a slice that takes every other position along one axis and all along the rest."""
    if eqn.primitive.name != "slice" or eqn.params["strides"] is None:
        return None
    starts, strides = eqn.params["start_indices"], eqn.params["strides"]
    axes = [k for k, step in enumerate(strides) if step != 1]
    if len(axes) != 1 or strides[axes[0]] != 2 or any(s for k, s in enumerate(starts) if k != axes[0]):
        return None
    return axes[0], starts[axes[0]]


def _level(eqns: Sequence[Any], i: int) -> _Level | None:
    """The level that starts here: the slices from 0 of k arrays, then those from 1 of the same."""
    first = []
    while i + len(first) < len(eqns) and (half := _halves(eqns[i + len(first)])) is not None and half[1] == 0:
        first.append(eqns[i + len(first)])
    others = eqns[i + len(first) : i + 2 * len(first)]
    arrays, axes = [eqn.invars[0] for eqn in first], [half[0] for half in map(_halves, first) if half]
    if not first or [_halves(eqn) for eqn in others] != [(axis, 1) for axis in axes]:
        return None
    if any(_compat.is_literal(v) for v in arrays) or [eqn.invars[0] for eqn in others] != arrays:
        return None
    return _Level(arrays, axes) if len({v.aval.shape[k] for v, k in zip(arrays, axes, strict=True)}) == 1 else None


def _scan_at(eqns: Sequence[Any], i: int) -> tuple[PrefixScan, int] | None:
    """The scan whose first equation this is, and the place after its last."""
    level = _level(eqns, i) if _halves(eqns[i]) is not None else None
    if level is None:
        return None
    count, length = len(level.arrays), level.length
    start = i + 2 * count
    inner = next((j for j in range(start, len(eqns)) if _level(eqns, j) is not None), None)
    combined = None if inner is None else _level(eqns, inner)
    if inner is None or combined is None or combined.axes != level.axes or combined.length != length // 2:
        return None
    body = eqns[start:inner]
    halves = [eqn.outvars[0] for eqn in eqns[i:start]]
    made = {v for eqn in body for v in eqn.outvars}
    free = {v for eqn in body for v in eqn.invars if not _compat.is_literal(v)} - made - set(halves)
    places = _axes_in_largest(level, body)
    if free or not made.issuperset(combined.arrays) or places is None:
        return None
    ends: dict[int, int] = {}
    for j in range(inner, len(eqns)):
        which = _interleaves(eqns, j, level) if len(ends) < count else None
        if which is not None and which not in ends:
            ends[which] = j
    if not ends:
        return None
    combine = functools.partial(_combined, tuple(body), tuple(halves), tuple(combined.arrays))
    params = {"axis": places[0][level.axes[0]], "places": places, "combine": combine}
    outs = [eqns[ends[k]].outvars[0] if k in ends else Unread(v.aval) for k, v in enumerate(level.arrays)]
    return PrefixScan(level.arrays, outs, params, eqns[i].source_info), max(ends.values()) + 1


@dataclasses.dataclass(frozen=True, eq=False)
class Unread:
    """An output that nothing reads, and that a tracer may have left out: mostly the running product of the rates."""

    aval: Any


def _axes_in_largest(level: _Level, body: Sequence[Any]) -> list[tuple[int, ...]] | None:
    """Which axes of the largest array each array's axes are, where combining does nothing but arithmetic on them."""
    rank = max(v.aval.ndim for v in level.arrays)
    small = {v.aval.ndim for v in level.arrays} - {rank}
    widened = {tuple(map(int, e.params["broadcast_dimensions"])) for e in body if _widens(e)} - {()}
    if len(small) > 1 or len(widened) > 1 or not all(_widens(eqn) or is_elementwise(eqn) for eqn in body):
        return None
    places = {rank: tuple(range(rank)), **({n: next(iter(widened), ()) for n in small})}
    if any(len(place) != n for n, place in places.items()):
        return None
    out = [places[v.aval.ndim] for v in level.arrays]
    return out if len({place[axis] for place, axis in zip(out, level.axes, strict=True)}) == 1 else None


def _interleaves(eqns: Sequence[Any], j: int, level: _Level) -> int | None:
    """Whether an equation adds two dilated arrays up to a level's running combination: of which of its arrays, by the first."""
    eqn = eqns[j]
    if eqn.primitive.name not in ("add", "or", "bitwise_or"):
        return None
    made = {v: e for e in eqns[max(j - 8, 0) : j] for v in e.outvars}
    halves = [made.get(v) for v in eqn.invars if not _compat.is_literal(v)]
    pads = [e for e in halves if e is not None and e.primitive.name == "pad"]
    if len(pads) != 2:
        return None
    made |= {v: e for e in eqns[:j] for v in e.outvars if e.primitive.name in ("concatenate", "slice")}
    for k, (array, axis) in enumerate(zip(level.arrays, level.axes, strict=True)):
        if eqn.outvars[0].aval.shape != array.aval.shape:
            continue
        for pad in pads:
            joined = made.get(pad.invars[0])
            first = made.get(joined.invars[0]) if joined is not None and joined.primitive.name == "concatenate" else None
            if first is not None and first.invars[0] is array and pad.params["padding_config"][axis][2] == 1:
                return k
    return None


def _widens(eqn: Any) -> bool:
    return eqn.primitive.name == "broadcast_in_dim"


def is_elementwise(eqn: Any) -> bool:
    """Whether an equation can be evaluated on arrays of any shape."""
    inner = sub_jaxpr_of(eqn)
    if inner is not None:
        return all(is_elementwise(e) for e in _compat.sub_jaxpr(inner)[0].eqns)
    ranks = {v.aval.ndim for v in (*eqn.invars, *eqn.outvars) if v.aval.ndim}
    name = eqn.primitive.name
    return len(ranks) <= 1 and name not in _MOVES and not name.startswith(("cum", "reduce", "scatter", "arg", "sort", "conv_"))


def sub_jaxpr_of(eqn: Any) -> Any:
    """The jaxpr of a call; None for anything else."""
    return next((p for p in eqn.params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")), None)


def _combined(
    body: Sequence[Any], halves: Sequence[Any], outs: Sequence[Any], first: Sequence[jax.Array], second: Sequence[jax.Array]
) -> list[jax.Array]:
    """Two elements combined, of whatever shape."""
    env = dict(zip(halves, (*first, *second), strict=True))
    _run_scan(body, env)
    return [env[v] for v in outs]


def _run_scan(eqns: Sequence[Any], env: dict[Any, Any]) -> None:
    for eqn in eqns:
        ins = [v.val if _compat.is_literal(v) else env[v] for v in eqn.invars]
        inner = sub_jaxpr_of(eqn)
        if _widens(eqn):
            made = ins[:1]  # arrays of one rank already
        elif inner is None:
            made = eqn.primitive.bind(*ins, **eqn.params)
            made = made if eqn.primitive.multiple_results else [made]
        else:
            jaxpr, consts = _compat.sub_jaxpr(inner)
            own = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *ins), strict=True))
            _run_scan(jaxpr.eqns, own)
            made = [v.val if _compat.is_literal(v) else own[v] for v in jaxpr.outvars]
        env.update(zip(eqn.outvars, made, strict=True))


@dataclasses.dataclass(frozen=True)
class Combination:
    """How two elements are combined; equal where the same equations do it, so that repeated layers are compiled once.

    Attributes:
        combine: the function.
        written: its equations, for elements as they are.
        axis: along which it runs.
        complex_: which of the elements are complex.
    """

    combine: Callable[..., list[jax.Array]] = dataclasses.field(compare=False)
    written: str
    axis: int
    complex_: tuple[bool, ...]


def combination(combine: Callable[..., list[jax.Array]], rank: int, axis: int, complex_: tuple[bool, ...]) -> Combination:
    """How elements of this rank are combined along an axis."""
    elements = [jax.ShapeDtypeStruct((1,) * rank, jnp.complex64 if c else jnp.float32) for c in complex_]
    return Combination(combine, str(jax.make_jaxpr(combine)(elements, elements)), axis, complex_)


@functools.partial(jax.jit, static_argnums=0)
def run_parts(how: Combination, flat: list[jax.Array]) -> list[jax.Array]:
    """The parts of the running combinations of elements, of the parts of these."""
    rest, elements = list(flat), []
    for is_complex in how.complex_:
        elements.append(rest.pop(0) + 1j * rest.pop(0) if is_complex else rest.pop(0))
    outs = running(how.combine, elements, how.axis)
    return [part for x in outs for part in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_back(how: Combination, which: int, flat: list[jax.Array], seed: jax.Array) -> list[jax.Array]:
    """Cotangents of the parts of the elements, given that of one part of the outputs."""
    return jax.vjp(lambda xs: run_parts(how, xs)[which], flat)[1](seed)[0]


def running(combine: Callable[..., list[jax.Array]], elements: Sequence[jax.Array], axis: int) -> list[jax.Array]:
    """The running combination of elements along an axis, one position after another."""
    rows = [jnp.moveaxis(x, axis, 0) for x in elements]

    def step(so_far: list[jax.Array], now: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        out = combine(so_far, now)
        return out, out

    first = [x[0] for x in rows]
    _, rest = lax.scan(step, first, [x[1:] for x in rows])
    return [jnp.moveaxis(jnp.concatenate([x[None], y]), 0, axis) for x, y in zip(first, rest, strict=True)]


@functools.lru_cache(maxsize=256)
def live_equations(jaxpr: Any) -> list[Any]:
    """The equations that the outputs depend on (an init's forward pass is not one), associative scans put together again."""
    return live(jaxpr, gathered(jaxpr.eqns))


@functools.lru_cache(maxsize=256)
def used_variables(jaxpr: Any) -> frozenset[Any]:
    """The variables that live equations read, and the outputs."""
    read = (v for eqn in live_equations(jaxpr) for v in eqn.invars)
    return frozenset(v for v in (*read, *jaxpr.outvars) if not _compat.is_literal(v))
