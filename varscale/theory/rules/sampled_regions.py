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
from varscale.theory.graph.failures import PredictionError, source, told
from varscale.theory.graph.layout import value
from varscale.theory.graph.nodes import Leaf
from varscale.theory.rules.registry import Complex, Context, Opaque, map_parts, rule
from varscale.theory.rules.sampled_loop import CannotDraw
from varscale.theory.rules.sampled_loop_nodes import over_time

_BOUND = (
    0.1  # relative error to which the mean squares of a region should be known, 15 % and what its readers add
)


def drawn_region(interpreter: Context, eqn: Any, xs: Sequence[Any], reason: str) -> list[Any]:
    """The outputs of an equation that no rule covers: those of a region around it, of the innermost module that has one.

    Args:
        interpreter: the walk.
        eqn: the equation.
        xs: its operands' values.
        reason: why no rule covers it.

    Returns:
        Placeholders where a region was asked for, and all is walked again; else the outputs of the equation alone, drawn.

    Raises:
        PredictionError: it cannot be drawn, at any size.
    """
    if interpreter.ask(f"{eqn.primitive.name}: {reason}"):
        return [placeholder(interpreter, v.aval) for v in eqn.outvars]
    given = {v: x for v, x in zip(eqn.invars, xs, strict=True) if not _compat.is_literal(v)}
    jaxpr = jax.make_jaxpr(lambda: 0)().jaxpr.replace(
        constvars=[], invars=list(given), outvars=eqn.outvars, eqns=[eqn]
    )
    try:
        return _run_on_draws(
            interpreter, ClosedJaxpr(jaxpr, []), list(given.values()), (), whole_numbers=True
        )
    except PredictionError:
        raise
    except (
        Exception
    ) as trouble:  # whatever an equation may raise that is run on numbers it was not written for
        raise PredictionError(
            f"primitive {eqn.primitive.name!r} at {source(eqn)}: {reason}, and it cannot be drawn: "
            f"{trouble}; write it with jnp.where, or predict a smaller model"
        ) from None


@rule("region")
def region_rule(interpreter: Context, eqn: Any, *xs: Any) -> list[Any]:
    """The equations of a scope, drawn; where that cannot be, it is said to the walk."""
    jaxpr, nudged = eqn.params["jaxpr"], eqn.params["nudged"]
    still = [layout.full(interpreter.graph, 0.0, v.shape) for v in jaxpr.in_avals[len(xs) :]]
    try:
        return _run_on_draws(interpreter, jaxpr, [*xs, *still], nudged, whole_numbers=not eqn.params["scope"])
    except CannotDraw as trouble:
        interpreter.refuse(eqn.params["scope"], str(trouble))
    except (
        Exception
    ) as error:  # whatever equations may raise that are run on numbers they were not written for
        interpreter.refuse(eqn.params["scope"], told(error))
    return [placeholder(interpreter, aval) for aval in jaxpr.out_avals]


def _run_on_draws(
    interpreter: Context, jaxpr: ClosedJaxpr, xs: Sequence[Any], nudged: Sequence[int], *, whole_numbers: bool
) -> list[Any]:
    """The outputs of a jaxpr, drawn; the last operands are what is added to its outputs (`Loop.nudged`).

    Raises:
        CannotDraw: it cannot be drawn, at any size.
    """
    run = jaxpr_as_fun(jaxpr)

    def one_step(*operands: Any) -> Any:
        return jax.lax.scan(lambda carry, _: (carry, run(*operands)), (), None, length=1)[1]

    looped = jax.make_jaxpr(one_step)(*[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in jaxpr.in_avals]).jaxpr
    (loop,) = [e for e in looped.eqns if e.primitive.name == "scan"]
    by_variable = dict(zip(looped.invars, xs, strict=True))
    place = {v: i - len(xs) + len(nudged) for i, v in enumerate(looped.invars)}
    operands = [interpreter.known(v.val) if _compat.is_literal(v) else by_variable[v] for v in loop.invars]
    added = [-1 if _compat.is_literal(v) or place[v] < 0 else nudged[place[v]] for v in loop.invars]
    outline = [_outline(interpreter, a) for a in jaxpr.out_avals]
    found = over_time(interpreter, loop, operands, outline, _BOUND, added, whole_numbers=whole_numbers)
    return [map_parts(lambda part: layout.transpose(part, range(1, len(part.dims))), x) for x in found]


def _outline(interpreter: Context, aval: Any) -> Any:
    """A value over axes of one class each, of an array or of the parts of a complex one."""
    axes = tuple(Axis(n) for n in aval.shape if n != 1)
    node = interpreter.graph.make(Leaf, axes, (), ("outline", tuple(aval.shape)))
    own = value(node.settle(independent(0.0, 1.0, axes), odd=False, random=False), aval.shape)
    return Complex(own, own) if aval.dtype.kind == "c" else own


def placeholder(interpreter: Context, aval: Any) -> Any:
    """What stands for an output in a walk that is not the last."""
    if jax.numpy.issubdtype(aval.dtype, jax.dtypes.prng_key):
        key = jax.random.key(0)
        return Opaque(jax.random.split(key, aval.shape) if aval.shape else key)
    return (
        layout.full(interpreter.graph, 0.0, aval.shape)
        if aval.dtype.kind in "iub"
        else _outline(interpreter, aval)
    )
