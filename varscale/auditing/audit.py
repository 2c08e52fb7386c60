"""`vs.audit`: what is wrong with the initialization of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from varscale.auditing import maps, norms, signal
from varscale.auditing.findings import Audit, Finding, ordered, silenced
from varscale.auditing.leaves import summary
from varscale.auditing.parameters import check_laws, checked, of_weight
from varscale.programs import faces
from varscale.programs.trees import open_tree
from varscale.report import Report
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
    declared = predict(model, x, params=None if _declares(model) else params, detail="equations", method=method)
    equations = declared.rows
    report = Report(tuple(row for row in equations if row.kind not in _primitives(equations)), declared.weights, declared.notes)
    parameters = uses(model, x, params=None if _declares(model) else params, method=method).parameters
    linear = maps.maps(parameters, report.weights)
    found: list[Finding] = []
    if fresh:
        found += signal.check_signal(report)
        found += signal.check_gradient(report)
        found += maps.check_gains(linear, report)
        found += maps.check_fans(linear)
        found += maps.check_saturation(linear, report)
        found += norms.check_epsilon(equations)
        found += norms.check_softmax(equations)
        found += norms.check_logits(parameters, report)
        found += maps.check_biases(parameters, report.weights)
    found += maps.check_uses(parameters)
    found += maps.check_inputs(parameters, _arrays(x))
    notes = [f"{sum(row.how == 'sampled' for row in report.rows)} rows were drawn to be predicted."] * any(
        row.how == "sampled" for row in report.rows
    )
    if key is not None and params is None:
        params = _drawn(model, key, x, method)
    if params is not None:
        found += _numbers(params, report, fresh)
    kept, count = silenced(ordered(found), ignore)
    return Audit(kept, report, tuple(notes), count)
