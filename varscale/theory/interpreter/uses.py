"""The law of every parameter beside its use: how often it is applied, and the variance that would keep the signal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from varscale.report import Weight
from varscale.theory.graph.layout import Value
from varscale.theory.graph.nodes import Leaf
from varscale.usage.parameters import ParameterUses

# E[w⁴]/E[w²]² of the laws that are told by name: a normal one, one truncated at ±2 deviations, a uniform one.
_KURTOSIS = {"normal": 3.0, "truncated normal": 2.3655, "uniform": 1.8}
_MAPS = ("linear", "convolution", "depthwise", "lookup")


def weights(parameters: Iterable[tuple[str, Any]], uses: Mapping[str, ParameterUses]) -> dict[str, Weight]:
    """The law and the use of every parameter that is random, by path.

    Args:
        parameters: path and value of each.
        uses: what the forward pass does with those that it takes.
    """
    out: dict[str, Weight] = {}
    for path, value in parameters:
        if not isinstance(value, Value) or not isinstance(value.node, Leaf):
            continue
        found = [use for use in uses[path].uses if use.kind in _MAPS] if path in uses else []
        # A table that is looked up and read out by is a linear map where it is read out.
        main = max(found, key=lambda use: (use.fan_in, use.fan_out), default=None)
        fan_in, fan_out = (main.fan_in, main.fan_out) if main is not None else (None, None)
        variance = value.node.table.variance
        ratio = 1 / (fan_in * variance) if fan_in and variance > 0 else None
        times = sum(use.times * use.layers for use in found)
        kurtosis = value.node.kurtosis
        name = next((name for name, known in _KURTOSIS.items() if abs(kurtosis - known) < 0.02), "random")
        law = f"{name}(std={variance**0.5:.4g})"
        out[path] = Weight(
            path, value.shape, law, value.node.table.total_mean, variance, fan_in, fan_out, times, ratio
        )
    return out
