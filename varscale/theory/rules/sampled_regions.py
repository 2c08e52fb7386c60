"""Regions: equations that are run on joint draws of all that they read, since no rule covers them; loops over time, too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from varscale import _compat
from varscale.theory.domain.axes import Axis
from varscale.theory.domain.tables import independent
from varscale.theory.graph import layout
from varscale.theory.graph.expressions import hashed
from varscale.theory.graph.layout import Value, value
from varscale.theory.graph.nodes import Leaf, View
from varscale.theory.graph.store import PredictionError, source, told
from varscale.theory.propagation.sampler import by_level, in_order
from varscale.theory.rules.region_draws import (
    CannotDraw,
    Operand,
    RegionDraws,
    operand,
    sizes_to_run,
    with_enough_draws,
)
from varscale.theory.rules.region_outputs import DRAWS, NUDGED, RegionOutput
from varscale.theory.rules.registry import Complex, Context, Opaque, rule

_BOUND = (
    0.1  # relative error to which a region's mean squares should be known: 15 % with what its readers add
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
    try:
        return drawn_alone(interpreter, eqn, xs, whole_numbers=True)
    except PredictionError:
        raise
    except (
        Exception
    ) as trouble:  # whatever an equation may raise that is run on numbers it was not written for
        raise PredictionError(
            f"primitive {eqn.primitive.name!r} at {source(eqn)}: {reason}, and it cannot be drawn: "
            f"{trouble}; write it with jnp.where, or predict a smaller model"
        ) from None


def drawn_alone(
    interpreter: Context, eqn: Any, xs: Sequence[Any], *, whole_numbers: bool, time: int | None = None
) -> list[Any]:
    """The outputs of one equation, drawn.

    Args:
        interpreter: the walk.
        eqn: the equation.
        xs: its operands' values.
        whole_numbers: whether random whole numbers may come out of it, of which the moments are known and no more.
        time: the output from which on they have a row a step; None where none has.

    Raises:
        CannotDraw: it cannot be drawn, at any size.
    """
    given = {v: x for v, x in zip(eqn.invars, xs, strict=True) if not _compat.is_literal(v)}
    jaxpr = jax.make_jaxpr(lambda: 0)().jaxpr.replace(
        constvars=[], invars=list(given), outvars=eqn.outvars, eqns=[eqn]
    )
    operands = [operand(x, v.aval, nudge=False) for v, x in given.items()]
    return _outputs(interpreter, ClosedJaxpr(jaxpr, []), operands, (), whole_numbers=whole_numbers, time=time)


@rule("region")
def region_rule(interpreter: Context, eqn: Any, *xs: Any) -> list[Any]:
    """The equations of a scope, drawn; where that cannot be, it is said to the walk."""
    jaxpr, nudged, scope = eqn.params["jaxpr"], eqn.params["nudged"], eqn.params["scope"]
    avals = jaxpr.in_avals
    still = [layout.full(interpreter.graph, 0.0, aval.shape) for aval in avals[len(xs) :]]
    try:
        operands = [
            operand(x, aval, nudge=k >= len(xs))
            for k, (x, aval) in enumerate(zip((*xs, *still), avals, strict=True))
        ]
        if scope and _applied_before(operands):
            raise CannotDraw("random weights that it reads were applied before it")
        return _outputs(interpreter, jaxpr, operands, nudged, whole_numbers=not scope)
    except (
        Exception
    ) as error:  # whatever equations may raise that are run on numbers they were not written for
        interpreter.regions.refuse(scope, str(error) if isinstance(error, CannotDraw) else told(error))
    return [placeholder(interpreter, aval) for aval in jaxpr.out_avals]


def _outputs(
    interpreter: Context,
    jaxpr: ClosedJaxpr,
    operands: Sequence[Operand],
    nudged: Sequence[int],
    *,
    whole_numbers: bool,
    time: int | None = None,
) -> list[Any]:
    """The outputs of equations, drawn.

    Args:
        interpreter: the walk.
        jaxpr: the equations.
        operands: what they read; last come zeros that are added to outputs where they are made.
        nudged: which output each of these is added to.
        whole_numbers: whether random whole numbers may come out.
        time: the output from which on they have a row a step; None where none has.

    Raises:
        CannotDraw: they cannot be run.
    """
    graph = interpreter.graph
    sizes, replicates = sizes_to_run(jaxpr, operands)
    draws = RegionDraws(jaxpr, tuple(operands), sizes, replicates, replicates)
    read = [([(v.node, v.dims) for v in x.value], x.key, str(x.aval), x.nudge) for x in operands]
    identities = read, sizes.smaller, replicates
    mark = ("region", hashed(draws.program.written, identities, tuple(nudged)))
    draws = DRAWS.once(graph, mark, lambda: with_enough_draws(draws, _BOUND))
    views, place = [], 0
    for part in (part for x in operands for part in x.value):
        views.append(View(part.node, tuple(range(place, place + len(part.node.axes)))))
        place += len(part.node.axes)
    which, out = 0, list[Any]()
    for k, aval in enumerate(jaxpr.out_avals):
        timed = time is not None and k >= time
        made = _known_output(interpreter, draws.outputs[which], aval, timed=timed)
        if made is None and not (whole_numbers or jnp.issubdtype(aval.dtype, jnp.inexact)):
            raise CannotDraw("random whole numbers come out of it")
        if made is None:
            parts = range(which, which + 1 + (aval.dtype.kind == "c"))
            found = [_output(graph, draws, (mark, i), views, aval.shape, timed=timed) for i in parts]
            made = Complex(*found) if len(found) == 2 else found[0]
        out.append(made)
        which += 1 + isinstance(made, Complex)
    start = len(operands) - len(nudged)
    NUDGED.put(graph, mark, {start + i: out[k].node for i, k in enumerate(nudged)})
    return out


def _applied_before(operands: Sequence[Operand]) -> bool:
    """Whether a region reads weights, and what was made with them outside it: drawn apart, they would be unrelated."""
    parts = [part.node for x in operands for part in x.value]
    weights = [node for node in parts if isinstance(node, Leaf) and not (node.is_input or node.is_bits)]
    others = [node for node in parts if not isinstance(node, Leaf) and not in_order(node)]
    return any(w.deps & other.deps for w in weights for other in others)


def _known_output(interpreter: Context, numbers: np.ndarray, aval: Any, *, timed: bool) -> Any:
    """An output of which all is known: a key, as random as any other; whole numbers that are the same in all draws."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        if timed:
            raise CannotDraw("a random key comes out of it")
        return placeholder(interpreter, aval)
    if jnp.issubdtype(aval.dtype, jnp.inexact):
        return None
    if numbers[0].size != math.prod(aval.shape) or np.any(numbers != numbers[:1]):
        return None
    return interpreter.known(numbers[0].reshape(aval.shape).astype(aval.dtype))


def _output(
    graph: Any,
    draws: RegionDraws,
    name: tuple[Any, int],
    views: Sequence[View],
    shape: Sequence[int],
    *,
    timed: bool,
) -> Value:
    """One real output over axes of one class each, but for time's, whose steps are classed by their mean squares."""
    axes = [Axis(n) for n in shape if n != 1]
    timed = timed and shape[0] > 1
    if timed:
        squares = draws.outputs[name[1]].astype(float) ** 2
        axes[0] = by_level(squares.mean(axis=(0, *range(2, squares.ndim)))[:, None])
    return value(graph.make(RegionOutput, axes, views, (*name, timed)), tuple(shape))


def placeholder(interpreter: Context, aval: Any) -> Any:
    """What stands for an output in a walk that is not the last: moments of independent standard normals."""
    shape = tuple(aval.shape)
    if jax.numpy.issubdtype(aval.dtype, jax.dtypes.prng_key):
        key = jax.random.key(0)
        return Opaque(jax.random.split(key, shape) if shape else key)
    if aval.dtype.kind in "iub":
        return layout.full(interpreter.graph, 0.0, shape)
    axes = tuple(Axis(n) for n in shape if n != 1)
    node = interpreter.graph.make(Leaf, axes, (), ("outline", shape))
    own = value(node.settle(independent(0.0, 1.0, axes), odd=False, random=False), shape)
    return Complex(own, own) if aval.dtype.kind == "c" else own
