"""Loops and branches, as the walk over a jaxpr sees them."""

from __future__ import annotations

import dataclasses
from typing import Any

from varscale import _compat
from varscale.usage import layouts
from varscale.usage.layouts import Atom
from varscale.usage.values import Flow, Value, View
from varscale.usage.walk import Walk

_DEEP = 1 << 40  # residual additions, more than any program has


def _joined(x: Value, y: Value) -> Value:
    """A value that is one of two."""
    if isinstance(x, Flow) and isinstance(y, Flow):
        return dataclasses.replace(
            x, ancestors=x.ancestors | y.ancestors, sources=x.sources | y.sources, depth=max(x.depth, y.depth),
            maps=max(x.maps, y.maps), embedded=x.embedded or y.embedded,
        )  # fmt: skip
    return x if isinstance(x, Flow) or y is None else y


def _stacked(x: Value, length: int) -> Value:
    """What every step puts out, along a first axis."""
    return None if x is None else dataclasses.replace(_shifted(x, 1), axes=((Atom(None, length),), *x.axes))


def _shifted(x: View | Flow, by: int) -> View | Flow:
    """The axes of scores, with one before them or without the first."""
    if not isinstance(x, Flow) or x.score is None:
        return x
    to = {axis: (axis + by,) for axis in x.score.left_axes | x.score.right_axes if axis + by >= 0}
    return dataclasses.replace(x, score=x.score.moved(to))


def _one_of(x: Value) -> Value:
    """One step's slice of what a loop takes apart."""
    if x is None:
        return None
    if isinstance(x, View):
        return dataclasses.replace(x, axes=x.axes[1:], batch=x.batch | set(layouts.of(x.axes, (0,))))
    return dataclasses.replace(_shifted(x, -1), axes=x.axes[1:])


def _repeated(x: Value, length: int) -> Value:
    return dataclasses.replace(x, steps=x.steps * length) if isinstance(x, View) else x


def _state(walk: Walk, before: Value, after: Value, var: Any) -> Value:
    """The state that a loop begins with; a constant that turns into an activation is one from the start."""
    return walk.input(var.aval.shape, maps=1) if before is None and isinstance(after, Flow) else before


def _deep(x: Value) -> Value:
    """A state that is deeper than all else, so that what a step adds to its depth is the step's own."""
    return dataclasses.replace(x, depth=_DEEP) if isinstance(x, Flow) else x


def _depth(x: Value) -> int:
    return x.depth if isinstance(x, Flow) else 0


def _next(walk: Walk, before: Value, after: Value, var: Any) -> Value:
    """The state that a later step begins with: what it was computed from in earlier steps is no ancestor within this one."""
    state = _joined(after, before)
    if not (isinstance(before, Flow) and isinstance(state, Flow)):
        return state
    return walk.input(
        var.aval.shape, axes=state.axes, sources=state.sources, maps=state.maps, embedded=state.embedded, depth=before.depth,
        stream=state.stream, functions=state.functions, function_scale=state.function_scale,
    )  # fmt: skip


def scan(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    """A loop over layers, whose parameters are taken apart, or over time, which uses the same ones at every step."""
    constants, carry, streams = _compat.scan_operands(eqn.params, values)
    with walk.places.inside(eqn):
        return _scanned(walk, eqn, constants, carry, streams)


def _scanned(walk: Walk, eqn: Any, constants: list[Value], carry: list[Value], streams: list[Value]) -> list[Value]:
    """The last state and what every step puts out, from the loop's fixed values, its first state and what it takes apart."""
    length = eqn.params["length"]
    jaxpr, consts = _compat.sub_jaxpr(eqn.params["jaxpr"])
    fixed = [_repeated(v, length) for v in constants]
    layers = list(map(_one_of, streams))
    walk.numbers.bind(jaxpr.invars, map(walk.numbers.of, _compat.scan_operands(eqn.params, eqn.invars)[0]))
    first = len(walk.residuals.notes)
    if None in carry:
        with walk.trial():  # which parts of the state depend on the inputs
            reached = walk.run(jaxpr, [None] * len(consts), [*fixed, *carry, *layers])
        carry = [_state(walk, x, y, v) for x, y, v in zip(carry, reached, jaxpr.outvars, strict=False)]
    with walk.trial():  # residual additions of one step
        reached = walk.run(jaxpr, [None] * len(consts), [*fixed, *map(_deep, carry), *layers])
    gains = [max(0, _depth(y) - _DEEP) for _, y in zip(carry, reached, strict=False)]
    now = carry
    outs: list[Value] = []
    for _ in range(2):
        outs = walk.run(jaxpr, [None] * len(consts), [*fixed, *now, *layers])
        now = [_next(walk, x, y, v) for x, y, v in zip(carry, outs, jaxpr.outvars, strict=False)]
    ends = list(outs[: len(carry)])
    for k, gained in enumerate(gains):
        if gained and isinstance(y := ends[k], Flow):
            ends[k] = dataclasses.replace(y, depth=y.depth + gained * (length - 1))
    walk.residuals.additions = max([walk.residuals.additions, *map(_depth, ends)])
    walk.residuals.repeated(first, (length, max(gains, default=0)))
    return [*ends, *(_stacked(y, length) for y in outs[len(carry) :])]


def while_(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    """A loop of unknown length."""
    tests, constants = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    jaxpr, consts = _compat.sub_jaxpr(eqn.params["body_jaxpr"])
    fixed, carry = values[tests : tests + constants], values[tests + constants :]
    with walk.trial():
        reached = walk.run(jaxpr, [None] * len(consts), [*fixed, *carry])
    carry = [_state(walk, x, y, v) for x, y, v in zip(carry, reached, jaxpr.outvars, strict=True)]
    for _ in range(2):
        outs = walk.run(jaxpr, [None] * len(consts), [*fixed, *carry])
        carry = [_joined(y, x) for x, y in zip(carry, outs, strict=True)]
    return carry


def cond(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    """One of several branches."""
    found: list[list[Value]] = []
    for branch in eqn.params["branches"]:
        jaxpr, consts = _compat.sub_jaxpr(branch)
        found.append(walk.run(jaxpr, [None] * len(consts), values[1:]))
    outs = found[0]
    for more in found[1:]:
        outs = [_joined(x, y) for x, y in zip(outs, more, strict=True)]
    return outs
