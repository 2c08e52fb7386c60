"""`vs.audit`: what is wrong with the initialization of a model."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from varscale.auditing import maps, norms, settings, signal, streams
from varscale.auditing.findings import Audit, Finding, ordered, silenced
from varscale.auditing.leaves import check_finite, summary
from varscale.auditing.losses import check_loss, check_prior, checked_labels, cross_entropy
from varscale.auditing.parameters import check_laws, checked, of_weight
from varscale.initialization.laws import applied
from varscale.measuring.probe import probe
from varscale.programs import faces
from varscale.programs.trees import open_tree
from varscale.report import Report, Row
from varscale.schemes.plan import Plan
from varscale.theory import predict
from varscale.usage.table import uses

_EQUATIONS = ("rsqrt", "sqrt", "dot_general")  # whose rows tell of norms and softmaxes


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
        labels: class of each output: the cross-entropy at step 0 is compared with the entropy of their frequencies; the loss
            is that cross-entropy where none is given. Negative ones do not count.
        fresh: whether `params` were just drawn; False for trained ones, of which laws and scales are no finding.
        key: a key to draw the parameters with, by the model's own init.
        ignore: codes ("VS104"), or codes with a glob over paths ("VS101:blocks/*/head"), to leave out.
        scheme: the laws to audit in place of the model's own, as `vs.initialize` takes them: a `vs.Plan` or a scheme, what of
            which the program lacks is a finding, or a mapping from path patterns to initializers.
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
    scheme = applied(scheme, model, x, params=given, method=method)
    report, found = traced(model, x, given, fresh, scheme, method)
    if key is not None and params is None:
        params = drawn(model, key, x, method)
    if params is not None:
        found += measured(model, x, params, report, fresh=fresh, loss=loss, labels=labels, method=method)
    elif loss is not None or labels is not None:
        raise ValueError("loss and labels need params, or a key to draw them with: without numbers the loss has no value")
    sampled = sum(row.how == "sampled" for row in report.rows)
    notes = (f"{sampled} of {len(report.rows)} rows were drawn to be predicted.",) if sampled else ()
    kept, count = silenced(ordered(found), ignore)
    return Audit(kept, report, notes, count)


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
    report = dataclasses.replace(whole, rows=tuple(row for row in whole.rows if not _is_equation(row)))
    program_uses = uses(model, x, params=given, method=method)
    parameters = program_uses.parameters
    linear = maps.maps(parameters, report.weights)
    found: list[Finding] = []
    if fresh:
        mend = maps.signal_mend(linear, parameters, program_uses.additions)
        found += signal.check_signal(report, mend)
        found += signal.check_gradient(report, mend)
        found += maps.check_gains(linear, moves=bool(found))
        found += signal.check_stream(report, program_uses.additions, mend)
        found += signal.check_rank(report, maps.readouts(parameters))
        found += maps.check_fans(linear)
        found += maps.check_units(linear, report)
        found += norms.check_epsilon(whole.rows, program_uses.epsilons)
        found += norms.check_softmax(whole.rows, program_uses.attentions)
        found += norms.check_logits(parameters, report)
        found += maps.check_biases(parameters, report.weights)
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
    found += maps.check_inputs(parameters, _arrays(x))
    return report, found


def measured(
    model: Any,
    x: Any,
    params: Any,
    report: Report,
    *,
    fresh: bool = True,
    loss: Any = None,
    labels: Any = None,
    method: str | None = None,
) -> list[Finding]:
    """The findings about the numbers of parameters and about one run of the model, beside what is predicted."""
    if labels is not None:
        labels = checked_labels(labels, report)
        loss = cross_entropy(labels) if loss is None else loss
    ran = _run(model, params, x, report, fresh=fresh, loss=loss, labels=labels, method=method)
    return [*_numbers(params, report, fresh), *ran]


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


def drawn(model: Any, key: Any, x: Any, method: str | None) -> Any:
    """The parameters that the model's own init draws."""
    program = faces.program(model, method=method)
    if program.init is None:
        raise ValueError("key must be None for a model that holds its parameters, or is given them: there is nothing to draw")
    given = faces.as_inputs(x)
    filled = jax.tree.map(_filled, (given.args, dict(given.kwargs)), is_leaf=_is_described)
    return jax.jit(lambda key: program.init(key, faces.Inputs(*filled)))(key)  # pyright: ignore[reportOptionalCall]


def _is_described(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


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


def _run(
    model: Any, params: Any, x: Any, report: Report, *, fresh: bool, loss: Any, labels: Any, method: str | None
) -> Iterator[Finding]:
    """Findings about one run of the model: NaN, rows that the laws do not give, the loss.

    Described inputs of floating point are drawn from the standard normal law, as `predict` takes them; where whole numbers are
    described only, nobody knows their range, and the model is not run.
    """
    given = faces.as_inputs(x)
    flat = jax.tree_util.tree_leaves((given.args, dict(given.kwargs)), is_leaf=_is_described)
    described = [v for v in flat if _is_described(v) and not isinstance(v, jax.Array | np.ndarray)]
    if any(not jnp.issubdtype(v.dtype, jnp.floating) for v in described):
        return
    keys = iter(jax.random.split(jax.random.key(0), len(described) + 1))

    def numbers(v: Any) -> Any:
        return jax.random.normal(next(keys), v.shape, v.dtype) if any(v is d for d in described) else v

    args, kwargs = jax.tree.map(numbers, (given.args, dict(given.kwargs)), is_leaf=_is_described)
    inputs = faces.Inputs(args, kwargs)
    of_nnx = isinstance(model, nnx.Module) or isinstance(params, nnx.Module)
    whom = params if isinstance(params, nnx.Module) else model
    measured = probe(whom, None if of_nnx else params, inputs, loss=loss, method=method)
    first = measured.first_nonfinite
    if first is not None:
        told = "it is the first row of a run with NaN or infinities; print audit.report.first_nonfinite for what comes before."
        yield Finding("VS121", "error", first.row.path, told)
        return
    if fresh:
        yield from signal.check_draw(measured, report)
    if loss is not None:
        value = _loss(whom, None if of_nnx else params, inputs, loss, method)
        yield from check_loss(value, report)
        if labels is not None:
            yield from check_prior(value, labels, report, uses(model, inputs, params=params, method=method).parameters)


def _loss(model: Any, params: Any, x: faces.Inputs, loss: Any, method: str | None) -> float:
    """The loss at step 0."""
    program = faces.program(model, method=method)
    variables = program.parameters if params is None else params
    return float(jax.jit(lambda v: loss(program.apply(v, x)[0]))(variables))


def _arrays(x: Any) -> list[tuple[str, Any]]:
    """The inputs that are given as numbers."""
    given = faces.as_inputs(x)
    flat = jax.tree_util.tree_flatten_with_path((given.args, dict(given.kwargs)), is_leaf=_is_described)[0]
    arrays = [value for _, value in flat if isinstance(value, jax.Array | np.ndarray) and not _is_key(value)]
    return [("the input" if len(arrays) == 1 else f"input {i}", value) for i, value in enumerate(arrays)]
