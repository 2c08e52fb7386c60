"""Control flow: calls are entered, scans are walked step by step, branches taken where they are known."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from varscale import _compat
from varscale.theory.graph import layout
from varscale.theory.graph.expressions import roots
from varscale.theory.graph.layout import Value
from varscale.theory.graph.nodes import Leaf
from varscale.theory.propagation.pullbacks import meets_itself
from varscale.theory.rules.axis import slice_of_weights, take
from varscale.theory.rules.concatenation import concatenate
from varscale.theory.rules.random import random_bits
from varscale.theory.rules.region_draws import CannotDraw
from varscale.theory.rules.registry import (
    CALLS,
    STACKED,
    Complex,
    Context,
    Opaque,
    map_parts,
    rule,
    sub_jaxpr_of,
    used_variables,
)
from varscale.theory.rules.sampled_regions import drawn_alone, drawn_region, placeholder


@rule(*CALLS, "custom_lin", "run_state")
def call(interpreter: Context, eqn: Any, *xs: Any) -> list[Any]:
    """A function is what is inside it; the library's own sampler is random bits by another name."""
    if eqn.params.get("name") == "fast_random_bits":
        return [random_bits(interpreter, eqn, *([x for x in xs if isinstance(x, Opaque)][:1] or xs))]
    own = eqn.primitive.name.startswith("custom_vjp_call")  # its backward rule need not be its derivative
    return [
        interpreter.elementwise("own_gradient", y) if own and isinstance(y, Value) and y.node.axes else y
        for y in interpreter.run(*_compat.sub_jaxpr(sub_jaxpr_of(eqn)), xs)
    ]


_FEW_STEPS = 4  # of a loop over time that are taken one by one


@rule("scan")
def scan(interpreter: Context, eqn: Any, *xs: Any) -> list[Any]:
    """A scan over layers step by step; one over time, where the same weights act at every step, as a region.

    Outputs that are not read, and what only they depend on, are left out (None): of an init's scan over layers the layers
    themselves, so that its steps draw weights and do nothing else.
    """
    p, (jaxpr, literals) = eqn.params, _compat.sub_jaxpr(eqn.params["jaxpr"])
    kept = _needed(jaxpr, p, [v in interpreter.used for v in eqn.outvars])
    fixed, carry, streams = _compat.scan_operands(p, xs)
    layers = any(isinstance(x, Value) and _stacks_weights(x) for x in streams)
    if not layers and any(kept[: len(carry)]) and p["length"] > _FEW_STEPS:
        if any(isinstance(x, Value) and meets_itself(x.node) for x in streams):
            interpreter.ask("a loop over steps that share what they read", whole=True)
        if interpreter.regions.changed:  # the next walk draws it
            return [placeholder(interpreter, v.aval) for v in eqn.outvars]
        with contextlib.suppress(CannotDraw):
            return drawn_alone(interpreter, eqn, xs, time=len(carry))
    jaxpr = jaxpr.replace(outvars=list(itertools.compress(jaxpr.outvars, kept)))
    steps: list[list[Any]] = [[]] * p["length"]
    for step in reversed(range(p["length"])) if p["reverse"] else range(p["length"]):
        now = [index(interpreter, x, step) for x in streams]
        made = iter(interpreter.run(jaxpr, literals, [*fixed, *carry, *now], step if layers else None))
        steps[step] = [next(made) if keep else None for keep in kept]
        carry = steps[step][: len(carry)]
    rows = list(zip(*steps, strict=True))[len(carry) :]
    return [*carry, *(None if row[0] is None else stack(interpreter, row) for row in rows)]


def _stacks_weights(x: Value) -> bool:
    """Whether a stream is made of weights that differ from step to step."""
    along = {a.axis for a in x.dims[0]}
    weights = [(node, bind) for node, bind in roots(x.node) if isinstance(node, Leaf)]
    return any(along & set(bind) and not (node.is_input or node.is_bits) for node, bind in weights)


def _needed(jaxpr: Any, p: dict[str, Any], read: list[bool]) -> list[bool]:
    """Which outputs of a scan's body those that are read depend on, themselves included."""
    carry = _compat.scan_operands(p, jaxpr.invars)[1]
    used = used_variables(jaxpr.replace(outvars=list(itertools.compress(jaxpr.outvars, read))))
    more = [keep or (k < len(carry) and carry[k] in used) for k, keep in enumerate(read)]
    return read if more == read else _needed(jaxpr, p, more)


def index(interpreter: Context, x: Any, step: int) -> Any:
    """x[step] of a stacked value."""
    if isinstance(x, Opaque):
        return Opaque(x.key[step])
    if isinstance(x, Complex):
        return map_parts(lambda part: index(interpreter, part, step), x)
    if (steps := STACKED.get(interpreter.graph, (x.node.id, x.dims))) is not None:
        return steps[step]
    k = x.dims[0][0].axis if len(x.dims[0]) == 1 else None
    part = None if k is None else slice_of_weights(x.node, k, step)
    if k is not None and part is not None:
        kept = [j for j in range(len(x.node.axes)) if j != k]
        return Value(part, layout.renumbered(x.dims[1:], {j: i for i, j in enumerate(kept)}))
    one = take(x, 0, step, step + 1)
    return layout.transpose(one, range(1, len(one.dims)))


def stack(interpreter: Context, steps: Sequence[Any]) -> Any:
    """Values of all steps as one; indexing it gives them back."""
    one, n = steps[0], len(steps)
    if isinstance(one, Opaque):
        return Opaque(jnp.stack([s.key for s in steps]))
    if isinstance(one, Complex):
        return Complex(stack(interpreter, [s.re for s in steps]), stack(interpreter, [s.im for s in steps]))
    places = range(1, len(one.shape) + 1)
    if all(s == one for s in steps):
        return layout.broadcast_in_dim(one, (n, *one.shape), places)
    rows = [layout.broadcast_in_dim(s, (1, *s.shape), places) for s in steps]
    out = concatenate(interpreter.graph, rows, 0)
    STACKED.put(interpreter.graph, (out.node.id, out.dims), list(steps))
    return out


@rule("cond")
def cond(interpreter: Context, eqn: Any, which: Value, *xs: Any) -> list[Any]:
    """The branch taken, where it is known; else whichever is, on draws."""
    known, branches = interpreter.concrete(which), eqn.params["branches"]
    if known is None:
        return drawn_region(interpreter, eqn, (which, *xs), "a branch depends on random values")
    return interpreter.run(*_compat.sub_jaxpr(branches[int(np.clip(known, 0, len(branches) - 1))]), xs)


@rule("platform_index")
def platform_index(interpreter: Context, eqn: Any, *_: Any) -> Value:
    """Which of several implementations a platform takes: moments are those of any, so the default."""
    found = (i for i, p in enumerate(eqn.params["platforms"]) if p is None or "cpu" in p)
    return interpreter.known(np.int32(next(found, 0)))


@rule("while")
def while_(interpreter: Context, eqn: Any, *xs: Any) -> list[Any]:
    """Steps while the condition is known to hold."""
    p, start = eqn.params, eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
    tested, fixed, state = xs[: p["cond_nconsts"]], xs[p["cond_nconsts"] : start], list(xs[start:])
    test, body = _compat.sub_jaxpr(p["cond_jaxpr"]), _compat.sub_jaxpr(p["body_jaxpr"])
    for _ in range(10_000):
        goes_on = interpreter.concrete(interpreter.run(*test, [*tested, *state])[0])
        if goes_on is None:
            raise NotImplementedError("a loop whose end depends on random values; use a scan of known length")
        if not goes_on:
            return state
        state = interpreter.run(*body, [*fixed, *state])
    raise NotImplementedError("a loop of more than 10000 steps")
