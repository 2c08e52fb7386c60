"""How every parameter is used: the fans its contractions give it, how often, and the variance that would keep the signal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from varscale.report import Weight
from varscale.theory.graph.convolutions import Conv, hits
from varscale.theory.graph.layout import Value
from varscale.theory.graph.linear_nodes import Contract
from varscale.theory.graph.lookups import Gather
from varscale.theory.graph.nodes import Leaf, Node
from varscale.theory.interpreter.interpreter import Interpreter
from varscale.theory.rules.sampled_loop_nodes import STEPS

# E[w⁴]/E[w²]² of the laws that are told by name: a normal one, one truncated at ±2 deviations, a uniform one.
_KURTOSIS = {"normal": 3.0, "truncated normal": 2.3655, "uniform": 1.8}


def _source(node: Node) -> Node:
    """The parameter that a node rearranges; rows looked up in one are no longer it."""
    while len(node.args) == 1 and not isinstance(node, Leaf | Gather):
        node = node.args[0].node
    return node


def _fans(node: Node, weight: int) -> tuple[float, float]:
    """Fan-in and fan-out of the argument `weight` of a linear node: terms in an output, outputs that an input reaches."""
    if isinstance(node, Conv):
        groups, _, xd, _, od = node.params
        x_axes = [1 if k is None else node.args[0].node.axes[k].size for k in xd]
        o_axes = [1 if k is None else node.axes[k].size for k in od]
        taps = _taps_on_input(node)
        fan_in = x_axes[1] / groups * taps
        outputs = 1.0
        for n_in, n_out in zip(x_axes[2:], o_axes[2:], strict=True):
            outputs *= n_out / n_in
        return fan_in, o_axes[1] / groups * taps * outputs
    assert isinstance(node, Contract)
    other = node.args[1 - weight]
    mine = node.args[weight]
    fan_out = 1.0
    for k, axis in enumerate(node.axes):
        if k in mine.bind and k not in other.bind:
            fan_out *= axis.size
    return float(node.width), fan_out


def _taps_on_input(node: Conv) -> float:
    """Taps on real input in the average output position."""
    share = 1.0
    for window, k in zip(node.params[1], node.params[2][2:], strict=True):
        at = hits(window, 1 if k is None else node.args[0].node.axes[k].size)
        share *= float((at >= 0).sum(axis=1).mean())
    return share


def weights(interpreter: Interpreter, parameters: Iterable[tuple[str, Any]]) -> dict[str, Weight]:
    """The law and the use of every parameter that is random, by path."""
    graph = interpreter.graph
    uses: dict[int, list[tuple[float, float]]] = {}
    for node in list(graph.nodes.values()):
        if isinstance(node, Contract | Conv):
            for i, view in enumerate(node.args):
                if isinstance(node, Conv) and i == 0:
                    continue
                uses.setdefault(_source(view.node).id, []).append(_fans(node, i))
        elif isinstance(node, Gather):
            size = 1.0
            for k, axis in enumerate(node.args[0].node.axes):
                size *= 1 if k in node.params[0] else axis.size
            uses.setdefault(_source(node.args[0].node).id, []).append((1.0, size))
    stacked: dict[int, list[int]] = {}
    for node in list(graph.nodes.values()):
        if isinstance(node, Leaf) and node.name[0] == "step":
            stacked.setdefault(node.name[1], []).append(node.id)
    out: dict[str, Weight] = {}
    for path, value in parameters:
        if not isinstance(value, Value) or not isinstance(value.node, Leaf):
            continue
        found = uses.get(value.node.id, []) + [
            u for s in stacked.get(value.node.id, []) for u in uses.get(s, [])
        ]
        table = value.node.table
        # A table that is looked up and read out by is a linear map where it is read out.
        fan_in, fan_out = max(found) if found else (None, None)
        variance = table.variance
        ratio = 1 / (fan_in * variance) if fan_in and variance > 0 else None
        steps_taken, steps_in_all = STEPS.get(graph, value.node.id) or (1, 1)
        times = steps_in_all * math.ceil(len(found) / steps_taken)
        kurtosis = value.node.kurtosis
        name = next((name for name, known in _KURTOSIS.items() if abs(kurtosis - known) < 0.02), "random")
        law = f"{name}(std={variance**0.5:.4g})"
        out[path] = Weight(path, value.shape, law, table.total_mean, variance, fan_in, fan_out, times, ratio)
    return out
