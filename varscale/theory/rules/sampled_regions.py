"""A region: equations that no rule covers, run on joint draws of all that they read, as a loop of one step is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from varscale import _compat
from varscale.theory.domain.axes import Axis
from varscale.theory.domain.tables import independent
from varscale.theory.graph import layout
from varscale.theory.graph.failures import PredictionError, source
from varscale.theory.graph.layout import value
from varscale.theory.graph.nodes import Leaf
from varscale.theory.rules.registry import Context, map_parts
from varscale.theory.rules.sampled_loop import CannotDraw
from varscale.theory.rules.sampled_loop_nodes import over_time

_BOUND = 0.1  # relative error to which the mean squares of a region should be known, 15 % and what its readers add


def drawn_region(interpreter: Context, eqn: Any, xs: Sequence[Any], reason: str) -> list[Any]:
    """The outputs of an equation, drawn.

    Args:
        interpreter: the walk.
        eqn: the equation.
        xs: its operands' values.
        reason: why no rule covers it.

    Raises:
        PredictionError: it cannot be drawn, at any size.
    """
    given = {v: x for v, x in zip(eqn.invars, xs, strict=True) if not _compat.is_literal(v)}
    jaxpr = jax.make_jaxpr(lambda: 0)().jaxpr.replace(constvars=[], invars=list(given), outvars=eqn.outvars, eqns=[eqn])
    run = jaxpr_as_fun(ClosedJaxpr(jaxpr, []))

    def one_step(*operands: Any) -> Any:
        return jax.lax.scan(lambda carry, _: (carry, run(*operands)), (), None, length=1)[1]

    looped = jax.make_jaxpr(one_step)(*[jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in given]).jaxpr
    (loop,) = [e for e in looped.eqns if e.primitive.name == "scan"]
    by_variable = dict(zip(looped.invars, given.values(), strict=True))
    try:
        outline = [_outline(interpreter, v.aval.shape) for v in eqn.outvars]
        found = over_time(interpreter, loop, [by_variable[v] for v in loop.invars], outline, 1, _BOUND)
    except CannotDraw:
        raise PredictionError(
            f"primitive {eqn.primitive.name!r} at {source(eqn)}: {reason}, and it cannot be drawn: it reads random whole "
            "numbers, or is too large at its smallest; write it with jnp.where, or predict a smaller model"
        ) from None
    return [map_parts(lambda part: layout.transpose(part, range(1, len(part.dims))), x) for x in found]


def _outline(interpreter: Context, shape: Sequence[int]) -> Any:
    """A value over axes of one class each."""
    axes = tuple(Axis(n) for n in shape if n != 1)
    node = interpreter.graph.make(Leaf, axes, (), ("outline", tuple(shape)))
    return value(node.settle(independent(0.0, 1.0, axes), odd=False, random=False), shape)
