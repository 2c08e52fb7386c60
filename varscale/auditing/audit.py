"""`vs.audit`: what is wrong with the initialization of a model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from varscale.auditing import maps, norms, settings, signal, streams
from varscale.auditing.findings import LEVELS, Audit, Finding, Level, ordered, silenced
from varscale.auditing.inputs import check_inputs
from varscale.auditing.measured import drawn, is_described, measuring
from varscale.initialization.laws import applied
from varscale.programs import faces
from varscale.report import Report, Row
from varscale.schemes.plan import Plan
from varscale.theory import predict
from varscale.usage.table import uses

_EQUATIONS = ("rsqrt", "sqrt", "dot_general", "conv_general_dilated")  # whose rows tell of norms and softmaxes
_LAYERS = _EQUATIONS[2:]  # and of a function without modules what its layers are


def audit(
    model: Any,
    x: Any,
    *,
    params: Any = None,
    fresh: bool = True,
    loss: Callable[[Any], Any] | None = None,
    labels: Any = None,
    key: Any = None,
    ignore: Sequence[str] = (),
    scheme: Any = None,
    method: str | None = None,
) -> Audit:
    """Say what is wrong with the initialization of a model, and the line that mends it.

    By default from the trace alone: nothing of the model's own size is drawn or run. With `params`, or with a `key` to draw
    them, the numbers of the parameters are audited too: equal and proportional leaves, constants, NaN, low-precision draws,
    and whether each has its declared law (a chance of at most 5e-7 to say wrongly of any that it has not); and the model is
    run on `x` once, to see whether every row is what such a draw gives (5e-7 for all rows):
    the chance of any false finding about draws in one audit is at most 1e-6.

    Args:
        model: a linen module, an nnx factory `lambda rngs: Net(..., rngs=rngs)`, an nnx instance, or a plain function
            f(params, *args) with `params`.
        x: one input, or `vs.inputs(...)`; arrays or `jax.ShapeDtypeStruct`s. The numbers of arrays are audited as inputs.
        params: parameters to audit.
        loss: a function of the model's output that returns a scalar, such as the cross-entropy against given labels: with
            `params` or `key` its value is compared with that of knowing nothing, and gradients are checked to be finite.
        labels: class of each output, or 0 and 1 in the output's own shape (of one logit without its axis too): the
            cross-entropy at step 0 is compared with the entropy of their frequencies; the loss is that cross-entropy where
            none is given. Negative ones do not count.
        fresh: whether `params` were just drawn; False for trained ones, of which laws and scales are no finding.
        key: a key to draw the parameters with, by the model's own init, or by the scheme.
        ignore: codes ("VS104"), or codes with a glob over paths ("VS101:blocks/*/head"), to leave out; the summary names
            entries that left out nothing.
        scheme: the laws to audit in place of the model's own, as `vs.initialize` takes them: a `vs.Plan` or a scheme, what of
            which the program lacks is a finding, or a mapping from path patterns to initializers.
        method: the method to audit in place of `__call__`.

    Raises:
        PredictionError: the model cannot be predicted; the message names the line.
        ValueError: the model does not trace on `x`, or an entry of `ignore` names no code that there is.

    >>> import jax, varscale as vs
    >>> from flax import linen as nn
    >>> net = nn.Sequential([layer for _ in range(12) for layer in (nn.Dense(256, kernel_init=vs.normal(0.01)), nn.relu)])
    >>> found = vs.audit(net, jax.ShapeDtypeStruct((32, 256), "float32"))
    >>> print(found.findings[0].code, found.findings[0].level, found.findings[0].path)
    VS101 error layers_4
    """
    given = params if _holds_no_laws(model) else None
    scheme = applied(scheme, model, x, params=given, method=method)
    report, found = traced(model, x, given, fresh, scheme, method)
    if key is not None and params is None:
        params = drawn(model, key, x, scheme, method)
    if params is not None:
        found += measuring(model, x, params, report, fresh=fresh, loss=loss, labels=labels, method=method)(params)
    elif loss is not None or labels is not None:
        raise ValueError("loss and labels need params, or a key to draw them with: without numbers the loss has no value")
    sampled = sum(row.how == "sampled" for row in report.rows)
    notes = (f"{sampled} of {len(report.rows)} rows were drawn to be predicted.",) if sampled else ()
    left = silenced(found, ignore)
    return Audit(ordered(left.kept), report, notes + left.notes, left.count)


def traced(model: Any, x: Any, given: Any, fresh: bool, scheme: Any, method: str | None) -> tuple[Report, list[Finding]]:
    """The predicted report, and the findings that need no numbers.

    Args:
        model: the model.
        x: its input.
        given: the parameters of a plain function.
        fresh: whether findings about laws and scales are wanted.
        scheme: laws in place of the model's own.
        method: the method in place of `__call__`.
    """
    whole = predict(model, x, params=given, scheme=scheme, detail=_EQUATIONS, method=method)
    modules = tuple(row for row in whole.rows if not _is_equation(row))
    layers = () if any(_is_module(row) for row in modules) else tuple(row for row in whole.rows if row.kind in _LAYERS)
    report = dataclasses.replace(whole, rows=layers + modules)
    program_uses = uses(model, x, params=given, method=method)
    parameters = program_uses.parameters
    linear = maps.maps(parameters, report.weights)
    found: list[Finding] = []
    if fresh:
        mend = maps.signal_mend(linear, parameters, program_uses.additions)
        scales = maps.output_scales(parameters)
        found += signal.check_signal(report, mend, scales)
        if not found:
            chained = not (program_uses.additions or program_uses.epsilons)
            found += signal.check_ends(report, linear, mend, scales, chained=chained)
        found += signal.check_gradient(report, mend)
        found += maps.check_gains(linear, moves=bool(found))
        found += signal.check_stream(report, program_uses.additions, mend)
        found += norms.check_drowned(whole.rows, program_uses)
        found += signal.check_rank(report, maps.readouts(parameters), maps.rank_mend(parameters, report.weights))
        found += maps.check_recurrence(linear)
        found += maps.check_fans(linear)
        found += maps.check_units(parameters, report)
        found += norms.check_epsilon(whole.rows, program_uses.epsilons)
        found += norms.check_softmax(whole.rows, program_uses.attentions)
        found += norms.check_logits(parameters, report)
        levels: list[Level] = [f.level for f in found if f.code in ("VS101", "VS102")]
        worst = min(levels, key=LEVELS.index, default=None)
        found += maps.check_biases(parameters, report.weights, report, worst)
    if not _holds_no_laws(model) and not isinstance(model, nnx.Module):
        plan = streams.outlined(model, x, method, scheme)
        found += streams.check_streams(plan)
        found += streams.check_constants(plan, {p.path: p for p in parameters})
        zero = {path for path, value in streams.constants(plan).items() if not value}
        found += streams.check_zeros(program_uses, zero, report)
    found += settings.check_settings(model, x, method)
    found += maps.check_uses(parameters)
    if isinstance(scheme, Plan):
        found += check_requirements(scheme)
    found += check_inputs(parameters, linear, report, _arrays(x))
    return report, found


def check_requirements(plan: Plan) -> Iterator[Finding]:
    """What a plan needs in the program, and the program has not."""
    for requirement in plan.requirements:
        if requirement.status == "missing":
            told = (
                f"the scheme {plan.scheme} needs a {requirement.name} of {requirement.expected:.5g} here, and the program has "
            )
            told += "none." if requirement.found is None else f"has {requirement.found:.5g}."
            yield Finding("VS125", "error", requirement.where, told, requirement.expected, requirement.mend)


def _holds_no_laws(model: Any) -> bool:
    """Whether a model cannot say what its parameters are drawn from: a plain function, which is given them."""
    return not isinstance(model, nnx.Module) and faces.program(model).init is None


def _is_equation(row: Row) -> bool:
    """Whether a row is that of an equation: it is named after its primitive."""
    return re.split("[#@]", row.path.rpartition("/")[2])[0] == row.kind


def _is_module(row: Row) -> bool:
    """Whether a row is that of a module, and not of the model's own output."""
    return bool(row.path) and not row.path.startswith("[")


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _arrays(x: Any) -> list[tuple[str, Any]]:
    """The inputs that are given as numbers."""
    given = faces.as_inputs(x)
    flat = jax.tree_util.tree_flatten_with_path((given.args, dict(given.kwargs)), is_leaf=is_described)[0]
    arrays = [value for _, value in flat if isinstance(value, jax.Array | np.ndarray) and not _is_key(value)]
    return [("the input" if len(arrays) == 1 else f"input {i}", value) for i, value in enumerate(arrays)]
