"""Control flow: calls are entered, scans are walked step by step, branches taken where they are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from varscale import _compat
from varscale.theory.graph import layout
from varscale.theory.graph.expressions import roots
from varscale.theory.graph.layout import Value
from varscale.theory.graph.nodes import Leaf
from varscale.theory.rules.axis import slice_of_weights, take
from varscale.theory.rules.concatenation import concatenate
from varscale.theory.rules.random import bits
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
from varscale.theory.rules.sampled_regions import drawn_alone, drawn_region


@rule(*CALLS, "custom_lin", "run_state")
def call(interpreter: Context, eqn: Any, *xs: Any) -> list[Any]:
    """A function is what is inside it; the library's own sampler is random bits by another name."""
    if eqn.params.get("name") == "fast_random_bits":
        aval = eqn.outvars[0].aval
        key = next((x for x in xs if isinstance(x, Opaque)), None)
        return [bits(interpreter, key or tuple(xs), aval.shape, aval.dtype.itemsize * 8)]
    jaxpr, consts = _compat.sub_jaxpr(sub_jaxpr_of(eqn))
    out = interpreter.run(jaxpr, consts, xs)
    if eqn.primitive.name.startswith("custom_vjp_call"):  # its backward rule need not be its derivative
        return [
            interpreter.elementwise("own_gradient", y) if isinstance(y, Value) and y.node.axes else y
            for y in out
        ]
    return out


_FEW_STEPS = 4  # of a loop over time that are taken one by one


@rule("scan")
def scan(interpreter: Context, eqn: Any, *xs: Any) -> list[Any]:
    """A scan over layers step by step; one over time, where the same weights act at every step, as a region.

    Outputs that are not read, and what only they depend on, are left out (None): of an init's scan over layers the layers
    themselves, so that its steps draw weights and do nothing else.
    """
    p = eqn.params
    kept = _needed(p, [v in interpreter.used for v in eqn.outvars])
    _, carry, streams = _compat.scan_operands(p, xs)
    layers = any(isinstance(x, Value) and _stacks_weights(x) for x in streams)
    if not layers and any(kept[: len(carry)]) and p["length"] > _FEW_STEPS:
        try:
            return drawn_alone(interpreter, eqn, xs, whole_numbers=False, time=len(carry))
        except CannotDraw:
            pass
    steps = _walked(interpreter, p, xs, named=layers, kept=kept)
    if p["reverse"]:
        steps.reverse()
    last = steps[0 if p["reverse"] else -1][: len(carry)]
    rows = ([step[k] for step in steps] for k in range(len(carry), len(eqn.outvars)))
    return [*last, *(None if row[0] is None else stack(interpreter, row) for row in rows)]


def _stacks_weights(x: Value) -> bool:
    """Whether a stream is made of weights that differ from step to step."""
    along = {a.axis for a in x.dims[0]}
    own = ((root.node, root.bind) for root in roots(x.node))
    return any(
        isinstance(node, Leaf) and not (node.is_input or node.is_bits) and along & set(bind)
        for node, bind in own
    )


def _needed(p: dict[str, Any], read: Sequence[bool]) -> list[bool]:
    """Which outputs of a scan's body those that are read depend on, themselves included."""
    jaxpr, _ = _compat.sub_jaxpr(p["jaxpr"])
    _, carry, _ = _compat.scan_operands(p, jaxpr.invars)
    kept = list(read)
    while True:
        part = jaxpr.replace(outvars=[v for v, keep in zip(jaxpr.outvars, kept, strict=True) if keep])
        used = used_variables(part)
        more = [keep or (k < len(carry) and carry[k] in used) for k, keep in enumerate(kept)]
        if more == kept:
            return kept
        kept = more


def _walked(
    interpreter: Context, p: dict[str, Any], xs: Sequence[Any], *, named: bool, kept: Sequence[bool]
) -> list[list[Any]]:
    """Outputs of the steps of a scan, those that are not kept None; stacked weights are one fresh weight a step."""
    length = p["length"]
    jaxpr, literals = _compat.sub_jaxpr(p["jaxpr"])
    jaxpr = jaxpr.replace(outvars=[v for v, keep in zip(jaxpr.outvars, kept, strict=True) if keep])
    fixed, carry, streams = _compat.scan_operands(p, xs)
    out: list[list[Any]] = []
    for step in reversed(range(length)) if p["reverse"] else range(length):
        now = [index(interpreter, x, step, length) for x in streams]
        made = iter(interpreter.run(jaxpr, literals, [*fixed, *carry, *now], step if named else None))
        out.append([next(made) if keep else None for keep in kept])
        carry = out[-1][: len(carry)]
    return out


def index(interpreter: Context, x: Any, step: int, length: int) -> Any:
    """x[step] of a stacked value."""
    if isinstance(x, Opaque):
        return Opaque(x.key[step])
    if isinstance(x, Complex):
        return map_parts(lambda part: index(interpreter, part, step, length), x)
    steps = STACKED.get(interpreter.graph, (x.node.id, x.dims))
    if steps is not None:
        return steps[step]
    if len(x.dims[0]) == 1 and (k := x.dims[0][0].axis) is not None:
        part = slice_of_weights(x.node, k, step)
        if part is not None:
            dims = [
                tuple(a if a.axis is None or a.axis < k else a._replace(axis=a.axis - 1) for a in dim)
                for dim in x.dims[1:]
            ]
            return Value(part, tuple(dims))
    one = take(x, 0, step, step + 1, 1)
    return layout.transpose(one, range(1, len(one.dims)))


def stack(interpreter: Context, steps: list[Any]) -> Any:
    """Values of all steps as one; indexing it gives them back."""
    if isinstance(steps[0], Opaque):
        return Opaque(jnp.stack([s.key for s in steps]))
    if isinstance(steps[0], Complex):
        return Complex(stack(interpreter, [s.re for s in steps]), stack(interpreter, [s.im for s in steps]))
    rows = [layout.broadcast_in_dim(s, (1, *s.shape), tuple(range(1, len(s.shape) + 1))) for s in steps]
    if len(rows) == 1:
        return rows[0]
    if all(r.node is rows[0].node and r.dims == rows[0].dims for r in rows):
        return layout.broadcast_in_dim(
            steps[0], (len(steps), *steps[0].shape), tuple(range(1, len(steps[0].shape) + 1))
        )
    out = concatenate(interpreter.graph, rows, 0)
    STACKED.put(interpreter.graph, (out.node.id, out.dims), steps)
    return out


@rule("cond")
def cond(interpreter: Context, eqn: Any, which: Value, *xs: Any) -> list[Any]:
    """The branch taken, where it is known; else whichever is, on draws."""
    known = interpreter.concrete(which)
    if known is None:
        return drawn_region(interpreter, eqn, (which, *xs), "a branch depends on random values")
    branches = eqn.params["branches"]
    jaxpr, consts = _compat.sub_jaxpr(branches[int(np.clip(known, 0, len(branches) - 1))])
    return interpreter.run(jaxpr, consts, xs)


@rule("platform_index")
def platform_index(interpreter: Context, eqn: Any, *_: Any) -> Value:
    """Which of several implementations a platform takes: moments are those of any, so the default."""
    platforms = eqn.params["platforms"]
    return interpreter.known(
        np.int32(next((i for i, p in enumerate(platforms) if p is None or "cpu" in p), 0))
    )


@rule("while")
def while_(interpreter: Context, eqn: Any, *xs: Any) -> list[Any]:
    """Steps while the condition is known to hold."""
    p = eqn.params
    test_consts, body_consts = (
        xs[: p["cond_nconsts"]],
        xs[p["cond_nconsts"] : p["cond_nconsts"] + p["body_nconsts"]],
    )
    state = list(xs[p["cond_nconsts"] + p["body_nconsts"] :])
    test, test_literals = _compat.sub_jaxpr(p["cond_jaxpr"])
    body, body_literals = _compat.sub_jaxpr(p["body_jaxpr"])
    for _ in range(10_000):
        known = interpreter.concrete(interpreter.run(test, test_literals, [*test_consts, *state])[0])
        if known is None:
            raise NotImplementedError("a loop whose end depends on random values; use a scan of known length")
        if not bool(known):
            return state
        state = interpreter.run(body, body_literals, [*body_consts, *state])
    raise NotImplementedError("a loop of more than 10000 steps")
