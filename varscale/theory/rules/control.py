"""Control flow: calls are entered, scans are walked step by step, branches taken where they are known."""

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from varscale import _compat
from varscale.programs.pieces import parts_of_scan
from varscale.theory.graph import layout
from varscale.theory.graph.expressions import roots
from varscale.theory.graph.layout import Value
from varscale.theory.graph.nodes import Leaf
from varscale.theory.propagation.pullbacks import meets_itself
from varscale.theory.rules.axis import concatenate, slice_of_weights, take
from varscale.theory.rules.random import random_bits
from varscale.theory.rules.region_draws import CannotDraw
from varscale.theory.rules.registry import (
    CALLS,
    STACKED,
    Complex,
    Context,
    Opaque,
    Waits,
    map_parts,
    parts,
    rule,
    sub_jaxpr_of,
)
from varscale.theory.rules.sampled_regions import drawn_alone


@rule(*CALLS, "custom_lin", "run_state")
def call(interpreter: Context, eqn: Any, *xs: Any) -> list[Any]:
    """A call is its body; the library's own sampler is random bits by another name."""
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
    """A scan over layers step by step, over time (the same weights at every step) as a region; what is not read is None."""
    p, (jaxpr, literals) = eqn.params, _compat.sub_jaxpr(eqn.params["jaxpr"])
    kept, _ = parts_of_scan(eqn, [v in interpreter.used for v in eqn.outvars])
    fixed, carry, streams = _compat.scan_operands(p, xs)
    values = [x for x in streams if isinstance(x, Value)]
    layers = any(  # a stream is made of weights that differ from step to step
        isinstance(leaf, Leaf) and not (leaf.is_input or leaf.is_bits) and atom.axis in bind
        for x in values
        for leaf, bind in roots(x.node)
        for atom in x.dims[0]
    )
    if not layers and any(kept[: len(carry)]) and p["length"] > _FEW_STEPS:
        if any(meets_itself(x.node) for x in values):
            interpreter.ask("a loop over steps that share what they read", whole=True)
        if interpreter.regions.changed:  # the next walk draws it
            raise Waits
        with contextlib.suppress(CannotDraw):
            return drawn_alone(interpreter, eqn, xs, time=len(carry))
    jaxpr = jaxpr.replace(outvars=list(itertools.compress(jaxpr.outvars, kept)))
    steps: list[list[Any]] = [[]] * p["length"]
    for step in range(p["length"])[:: -1 if p["reverse"] else 1]:
        now = [index(interpreter, x, step) for x in streams]
        made = iter(interpreter.run(jaxpr, literals, [*fixed, *carry, *now], step if layers else None))
        steps[step] = [next(made) if keep else None for keep in kept]
        carry = steps[step][: len(carry)]
    rows = list(zip(*steps, strict=True))[len(carry) :]
    return [*carry, *(None if row[0] is None else stack(interpreter, row) for row in rows)]


def index(interpreter: Context, x: Any, step: int) -> Any:
    """x[step] of a stacked value."""
    if isinstance(x, Opaque):
        return Opaque(x.key[step])
    if isinstance(x, Complex):
        return map_parts(lambda part: index(interpreter, part, step), x)
    k = x.dims[0][0].axis if len(x.dims[0]) == 1 else None
    if k is not None and (part := slice_of_weights(x.node, k, step)) is not None:
        return Value(part, layout.renumbered(x.dims[1:], {j: j - (j > k) for j in range(len(x.node.axes))}))
    return layout.reshape(take(x, 0, step, step + 1), x.shape[1:])


def stack(interpreter: Context, steps: Sequence[Any]) -> Any:
    """Values of all steps as one."""
    if isinstance(one := steps[0], Opaque):
        return Opaque(jnp.stack([s.key for s in steps]))
    if isinstance(one, Complex):
        return Complex(*(stack(interpreter, part) for part in zip(*map(parts, steps), strict=True)))
    if all(s == one for s in steps):
        return layout.broadcast_in_dim(one, (len(steps), *one.shape), range(1, len(one.dims) + 1))
    out = concatenate(interpreter.graph, [layout.reshape(s, (1, *s.shape)) for s in steps], 0)
    STACKED.put(interpreter.graph, out.node.id, steps)
    return out


@rule("cond")
def cond(interpreter: Context, eqn: Any, which: Value, *xs: Any) -> list[Any]:
    """The branch taken, where it is known; else whichever is, on draws."""
    known, branches = interpreter.concrete(which), eqn.params["branches"]
    if known is None:
        raise NotImplementedError("a branch depends on random values")
    return interpreter.run(*_compat.sub_jaxpr(branches[int(np.clip(known, 0, len(branches) - 1))]), xs)


@rule("platform_index")
def platform_index(interpreter: Context, eqn: Any, *_: Any) -> Value:
    """Which of several implementations a platform takes: moments are those of any, so the default."""
    default = (k for k, name in enumerate(eqn.params["platforms"]) if name is None or "cpu" in name)
    return interpreter.known(np.int32(next(default, 0)))


@rule("while")
def while_(interpreter: Context, eqn: Any, *xs: Any) -> list[Any]:
    """Steps while the condition is known to hold."""
    p, start = eqn.params, eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
    tested, fixed, state = xs[: p["cond_nconsts"]], xs[p["cond_nconsts"] : start], list(xs[start:])
    test, body = _compat.sub_jaxpr(p["cond_jaxpr"]), _compat.sub_jaxpr(p["body_jaxpr"])
    for _ in range(10_000):
        if (goes_on := interpreter.concrete(interpreter.run(*test, [*tested, *state])[0])) is None:
            break
        if not goes_on:
            return state
        state = interpreter.run(*body, [*fixed, *state])
    raise NotImplementedError("a loop of 10000 steps, or whose end is random; use a scan of known length")
