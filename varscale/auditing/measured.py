"""Findings about the numbers of parameters, and about one run of the model; compiled once for all draws of one model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from varscale.auditing import signal
from varscale.auditing.findings import Finding
from varscale.auditing.leaves import check_finite, summary
from varscale.auditing.losses import Labels, check_loss, check_prior, checked_labels
from varscale.auditing.parameters import check_laws, checked, of_weight
from varscale.initialization.initialize import initialize
from varscale.measuring.probe import prober
from varscale.programs import faces
from varscale.programs.trees import open_tree
from varscale.report import FirstNonfinite, Report
from varscale.usage.table import uses


def drawn(model: Any, key: Any, x: Any, scheme: Any = None, method: str | None = None) -> Any:
    """The parameters that the model's own init draws, or a scheme; of an nnx factory the state.

    Raises:
        ValueError: the model has no init.
    """
    if faces.program(model, method=method).init is None:
        raise ValueError("key must be None for a model that holds its parameters, or is given them: there is nothing to draw")
    given = faces.as_inputs(x)
    inputs = faces.Inputs(*jax.tree.map(_filled, (given.args, dict(given.kwargs)), is_leaf=is_described))
    made = initialize(model, key, inputs, scheme="declared" if scheme is None else scheme, method=method)
    return nnx.split(made)[1] if isinstance(made, nnx.Module) else made


def measuring(
    model: Any,
    x: Any,
    params: Any,
    report: Report,
    *,
    fresh: bool = True,
    loss: Callable[[Any], Any] | None = None,
    labels: Any = None,
    method: str | None = None,
) -> Callable[[Any], list[Finding]]:
    """The function from parameters to the findings about their numbers and about one run; the run is compiled once.

    Described inputs of floating point are drawn from the standard normal law, as `predict` takes them; where whole numbers are
    described only, nobody knows their range, and the model is not run.

    Args:
        model: the model.
        x: its input.
        params: parameters of the structure that the function will be given.
        report: what is predicted.
        fresh: whether they were just drawn.
        loss: a function of the output that returns a scalar.
        labels: class of each output, or 0 and 1 in its shape.
        method: the method in place of `__call__`.

    Raises:
        ValueError: the labels do not fit the output.
    """
    known: Labels | None = None
    if labels is not None:
        known = checked_labels(labels, report)
        loss = known.loss if loss is None else loss
    inputs = _drawn_inputs(x)
    if inputs is None:
        return lambda params: _numbers(params, report, fresh)
    # An nnx model that holds its parameters is itself what is run.
    held = params if isinstance(params, nnx.Module) else model
    holds = isinstance(held, nnx.Module)
    run = prober(held, None if holds else params, inputs, loss=loss, method=method)
    program = faces.program(held, method=method)
    cost = None if loss is None else jax.jit(lambda variables: loss(program.apply(variables, inputs)[0]))

    def found(params: Any) -> Iterator[Finding]:
        variables = None if holds else params
        measured = run(variables)
        if (first := measured.first_nonfinite) is not None:
            yield _nonfinite(first)
            return
        if fresh:
            yield from signal.check_draw(measured, report)
        if cost is not None:
            value = float(cost(program.parameters if holds else params))
            yield from check_loss(value, known.classes if known else math.prod(report.output.shape[-1:]))
            if known is not None:
                yield from check_prior(value, known, uses(model, inputs, params=params, method=method).parameters)

    return lambda params: [*_numbers(params, report, fresh), *found(params)]


def _nonfinite(first: FirstNonfinite) -> Finding:
    """The finding about the first row with NaN or infinities."""
    share = first.row.nonfinite_share
    told = "it is the first row of a run with NaN or infinities" + ("" if share is None else f": {share:.2g} of its numbers")
    told += f", in {first.row.dtype}." if first.row.dtype else "."
    if first.before and first.before[-1].largest_magnitude is not None:
        before = first.before[-1]
        told += f" The row before it, {before.path!r}, has magnitudes up to {before.largest_magnitude:.3g}."
    mend = "look for a logarithm, a root or a quotient outside of its domain between the two rows"
    if first.weights:
        mend = f"its cause may be {first.weights[0].path!r}, which holds NaN or infinities itself: draw it anew"
    elif first.row.dtype == "float16":
        mend = "compute it in bfloat16 or float32, or scale what it reads: float16 ends at 65504"
    return Finding("VS121", "error", first.path, told, share, mend)


def is_described(x: Any) -> bool:
    """Whether it is an array or the description of one."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _is_abstract(x: Any) -> bool:
    return is_described(x) and (isinstance(x, jax.ShapeDtypeStruct) or not isinstance(x, jax.Array | np.ndarray | np.generic))


def _filled(x: Any) -> Any:
    """Zeros in place of a described array: what is drawn does not depend on the input's numbers."""
    return jnp.zeros(x.shape, x.dtype) if _is_abstract(x) else x


def _drawn_inputs(x: Any) -> faces.Inputs | None:
    """The inputs, those drawn that are described only; None where these are of whole numbers."""
    given = faces.as_inputs(x)
    leaves, tree = jax.tree_util.tree_flatten((given.args, dict(given.kwargs)), is_leaf=is_described)
    abstract = [i for i, leaf in enumerate(leaves) if _is_abstract(leaf)]
    if any(not jnp.issubdtype(leaves[i].dtype, jnp.floating) for i in abstract):
        return None
    for i, key in zip(abstract, jax.random.split(jax.random.key(0), len(abstract)), strict=True):
        leaves[i] = jax.random.normal(key, leaves[i].shape, leaves[i].dtype)
    return faces.Inputs(*tree.unflatten(leaves))


def _numbers(params: Any, report: Report, fresh: bool) -> list[Finding]:
    """Findings about the numbers of parameters."""
    opened = [leaf for leaf in open_tree(params, "params").leaves if leaf.is_weight and math.prod(leaf.shape)]
    leaves = [leaf for leaf in opened if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    summaries = [summary(leaf.path.removeprefix("params/"), leaf.value) for leaf in leaves]
    if not fresh:
        return list(check_finite(summaries))
    laws = {path: of_weight(weight, 0.0) for path, weight in report.weights.items() if weight.law is not None}
    return [*checked(summaries), *check_laws(summaries, laws)]
