"""`vs.audit`: what is wrong with the initialization of a model."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from varscale.auditing import maps, norms, signal, streams
from varscale.auditing.findings import Audit, Finding, ordered, silenced
from varscale.auditing.leaves import check_finite, summary
from varscale.auditing.parameters import check_laws, checked, of_weight
from varscale.programs import faces
from varscale.programs.trees import open_tree
from varscale.report import Report, Row
from varscale.theory import predict
from varscale.usage.table import uses


def audit(
    model: Any,
    x: Any,
    *,
    params: Any = None,
    fresh: bool = True,
    key: Any = None,
    ignore: Sequence[str] = (),
    method: str | None = None,
) -> Audit:
    """Say what is wrong with the initialization of a model, and the line that mends it.

    By default from the trace alone: nothing of the model's own size is drawn or run. With `params`, or with a `key` to draw
    them, the numbers of the parameters are audited too: equal and proportional leaves, constants, NaN, low-precision draws,
    and whether each has its declared law (a chance of at most 1e-9 a leaf to say wrongly that it has not).

    Args:
        model: a linen module, an nnx factory `lambda rngs: Net(..., rngs=rngs)`, an nnx instance, or a plain function
            f(params, *args) with `params`.
        x: one input, or `vs.inputs(...)`; arrays or `jax.ShapeDtypeStruct`s. The numbers of arrays are audited as inputs.
        params: parameters to audit.
        fresh: whether `params` were just drawn; False for trained ones, of which laws and scales are no finding.
        key: a key to draw the parameters with, by the model's own init.
        ignore: codes ("VS104"), or codes with a glob over paths ("VS101:blocks/*/head"), to leave out.
        method: the method to audit in place of `__call__`.

    Raises:
        PredictionError: the model cannot be predicted; the message names the line.
        ValueError: the model does not trace on `x`, or an entry of `ignore` is no code.

    >>> import jax, varscale as vs
    >>> from flax import linen as nn
    >>> net = nn.Sequential([layer for _ in range(12) for layer in (nn.Dense(256, kernel_init=vs.normal(0.01)), nn.relu)])
    >>> found = vs.audit(net, jax.ShapeDtypeStruct((32, 256), "float32"))
    >>> print(found.findings[0].code, found.findings[0].level, found.findings[0].path)
    VS101 error layers_4
    """
    given = params if _holds_no_laws(model) else None
    whole = predict(model, x, params=given, detail="equations", method=method)
    report = dataclasses.replace(whole, rows=tuple(row for row in whole.rows if not _is_equation(row)))
    parameters = uses(model, x, params=given, method=method).parameters
    linear = maps.maps(parameters, report.weights)
    found: list[Finding] = []
    if fresh:
        found += signal.check_signal(report)
        found += signal.check_gradient(report)
        found += maps.check_gains(linear, moves=bool(found))
        found += maps.check_fans(linear)
        found += maps.check_saturation(linear, report)
        found += norms.check_epsilon(whole.rows)
        found += norms.check_softmax(whole.rows)
        found += norms.check_logits(parameters, report)
        found += maps.check_biases(parameters, report.weights)
    if not _holds_no_laws(model) and not isinstance(model, nnx.Module):
        plan = streams.outlined(model, x, method)
        found += streams.check_streams(plan)
        found += streams.check_constants(plan, {p.path: p for p in parameters}, report)
    found += maps.check_uses(parameters)
    found += maps.check_inputs(parameters, _arrays(x))
    if key is not None and params is None:
        params = _drawn(model, key, x, method)
    if params is not None:
        found += _numbers(params, report, fresh)
    sampled = sum(row.how == "sampled" for row in report.rows)
    notes = (f"{sampled} of {len(report.rows)} rows were drawn to be predicted.",) if sampled else ()
    kept, count = silenced(ordered(found), ignore)
    return Audit(kept, report, notes, count)


def _holds_no_laws(model: Any) -> bool:
    """Whether a model cannot say what its parameters are drawn from: a plain function, which is given them."""
    return not isinstance(model, nnx.Module) and faces.program(model).init is None


def _is_equation(row: Row) -> bool:
    """Whether a row is that of an equation: it is named after its primitive."""
    return re.split("[#@]", row.path.rpartition("/")[2])[0] == row.kind


def _drawn(model: Any, key: Any, x: Any, method: str | None) -> Any:
    """The parameters that the model's own init draws."""
    program = faces.program(model, method=method)
    if program.init is None:
        raise ValueError("key must be None for a model that holds its parameters, or is given them: there is nothing to draw")
    given = faces.as_inputs(x)
    filled = jax.tree.map(_filled, (given.args, dict(given.kwargs)), is_leaf=_is_described)
    return jax.jit(lambda key: program.init(key, faces.Inputs(*filled)))(key)  # pyright: ignore[reportOptionalCall]


def _is_described(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _filled(x: Any) -> Any:
    """Zeros in place of a described array: what is drawn does not depend on the input's numbers."""
    described = isinstance(x, jax.ShapeDtypeStruct) or (_is_described(x) and not isinstance(x, jax.Array | np.ndarray))
    return jnp.zeros(x.shape, x.dtype) if described else x


def _numbers(params: Any, report: Report, fresh: bool) -> list[Finding]:
    """Findings about the numbers of parameters."""
    opened = [leaf for leaf in open_tree(params, "params").leaves if leaf.is_weight and math.prod(leaf.shape)]
    leaves = [leaf for leaf in opened if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    summaries = [summary(leaf.path.removeprefix("params/"), leaf.value) for leaf in leaves]
    if not fresh:
        return list(check_finite(summaries))
    laws = {path: of_weight(weight, 0.0) for path, weight in report.weights.items() if weight.law is not None}
    return [*checked(summaries), *check_laws(summaries, laws)]


def _arrays(x: Any) -> list[tuple[str, Any]]:
    """The inputs that are given as numbers."""
    given = faces.as_inputs(x)
    flat = jax.tree_util.tree_flatten_with_path((given.args, dict(given.kwargs)), is_leaf=_is_described)[0]
    arrays = [value for _, value in flat if isinstance(value, jax.Array | np.ndarray)]
    return [("the input" if len(arrays) == 1 else f"input {i}", value) for i, value in enumerate(arrays)]
