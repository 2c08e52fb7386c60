"""log Σ exp recognised: what normalises logits, in a log-softmax, a loss, an autoregressive model."""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from varscale.theory.domain.tables import Table
from varscale.theory.graph.expressions import Apply, Mean, roots, weighted_sum
from varscale.theory.graph.layout import Value
from varscale.theory.graph.nodes import Node, View, cross_by_kind, pullback, second_moments
from varscale.theory.graph.normal_form import affine, total
from varscale.theory.graph.store import BackwardNotes
from varscale.theory.rules.reductions import Extreme, OneOfMany, cross_by_kind_of_one_of_many
from varscale.theory.rules.registry import Context, recognise
from varscale.theory.rules.softmax import Softmax
from varscale.theory.rules.softmax_recognition import logits


class LogSumExp(OneOfMany):
    """log Σ exp along an axis, between the largest and that plus ln n, and sampled as the largest is; `params`: ((axis,),)."""

    how = "sampled"
    gradient_doubt = 0.15


cross_by_kind.register(LogSumExp, cross_by_kind_of_one_of_many)


@second_moments.register(LogSumExp)
def second_moments_of_log_sum_exp(node: LogSumExp) -> Table:
    return node.sampled(lambda x, axes: np.asarray(special.logsumexp(x, axis=axes)))


@pullback.register(LogSumExp)
def pullback_of_log_sum_exp(
    node: LogSumExp, cotangent: np.ndarray, notes: BackwardNotes
) -> list[np.ndarray | None]:
    """A logit gets its share of the cotangent."""
    source = node.args[0].node
    (key,) = node.reduced
    shares = node.graph.make(Softmax, source.axes, [View(source, tuple(range(len(source.axes))))], key)
    return [np.expand_dims(cotangent, key) * shares.table.second]


@recognise("log")
def log_sum_exp_of(interpreter: Context, x: Value) -> Value | None:
    """log x, if x is Σ exp of logits less their largest, as log Σ exp of the logits less their largest."""
    inner, scale = _positive_multiple(x.node)
    if not isinstance(inner, Mean) or tuple(inner.axes) != tuple(x.node.axes):
        return None
    powers, axes = inner.args[0].node, inner.params
    if not (isinstance(powers, Apply) and powers.params[0] == "exp"):
        return None
    if len(axes) > 1:
        raise NotImplementedError("a softmax over several axes")
    random, allowed = logits(powers.args[0], powers.axes)
    if random is None or allowed is not None or tuple(random.node.axes) != tuple(powers.axes):
        return None
    terms, offset = weighted_sum(powers.args[0])
    taken = [(c, v) for c, v in terms if all(isinstance(r.node, Extreme) for r in roots(v.node))]
    if any(b in axes for _, view in taken for b in view.bind):
        return None
    place = {k: i for i, k in enumerate(k for k in range(len(powers.axes)) if k not in axes)}
    graph = interpreter.graph
    unit = graph.make(LogSumExp, inner.axes, [random], (axes,))
    count = math.prod(powers.axes[k].size for k in axes)
    views = [
        View(unit, tuple(range(len(inner.axes)))),
        *(View(v.node, tuple(place[b] for b in v.bind)) for _, v in taken),
    ]
    node = total(graph, [1.0, *(c for c, _ in taken)], inner.axes, views)
    return Value(affine(node, 1.0, offset + math.log(scale / count)), x.dims)


def _positive_multiple(node: Node) -> tuple[Node, float]:
    """What a node is a positive number times; the absolute value of what is positive is itself."""
    scale = 1.0
    while isinstance(node, Apply) and node.args[0].bind == tuple(range(len(node.axes))):
        name, extra = node.params
        if name == "affine" and extra[0] > 0 and extra[1] == 0:
            scale *= extra[0]
        elif not (name == "abs" and node.args[0].node.positive):
            break
        node = node.args[0].node
    return node, scale
