"""Attention: weights and values are projections of the same tokens, and so are not independent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from varscale.theory.axes import Axis, contract_axis
from varscale.theory.elementwise import Apply, Sum, roots
from varscale.theory.graph import Node
from varscale.theory.moments import lift
from varscale.theory.rules.units import Softmax


def tilted(node: Any) -> np.ndarray | float:
    """What Σ p v gains because weights and values see the same tokens: by type of the output of a contraction of p with v.

    Given a query, a key's logit and its value are two random directions of one token, jointly Gaussian over the tokens with
    E[correlation²] = 1/D, D the width both are projected from. Σ p v moves along the logits' direction by what Σ p l does, so
    the second moment gains (q_v − C_v) (E[(Σ p l)²]/s² − Σ p²) / D: O(1/D), against O(1/T) for the rest.
    """
    for p, v in (node.args, node.args[::-1]):
        if not isinstance(p.node, Softmax):
            continue
        keys = [p.bind[k] for k in p.node.params]
        width = _token_width(v.node)
        if not set(keys) <= set(v.bind) or width is None:
            return 0.0
        frame = node.frame
        values = np.broadcast_to(v.second(frame), [n if (k in v.bind) else 1 for k, n in enumerate(a.types for a in frame)])
        deviation = np.maximum(_deviation(values, keys, frame), 0.0)
        rows = p.node.rows()
        gain = lift(p.node.tilt, [p.node.axes[k] for k in rows], [p.bind[k] for k in rows], frame, pairs=True)
        gain = gain.squeeze(tuple(keys))
        # Of the correlation between a logit and a value only the first power is here.
        node.graph.flag("quadrature", 0.05)
        return np.broadcast_to(deviation * gain / width, node.frame_types)
    return 0.0


def _deviation(values: np.ndarray, keys: Sequence[int], frame: Sequence[Axis]) -> np.ndarray:
    """What a value varies by along the keys, those of one class compared with each other; several axes are one of one class."""
    if len(keys) == 1:
        axis = frame[keys[0]]
        c = axis.classes
        diagonal = [c + i * (c + 1) for i in range(c)]
        apart = np.take(values, range(c), axis=keys[0]) - np.take(values, diagonal, axis=keys[0])
        shares = (axis.counts / axis.size).reshape([c if k == keys[0] else 1 for k in range(len(frame))])
        return np.maximum(apart * shares, 0.0).sum(axis=keys[0])
    same, mean = values, values
    for k in sorted(keys, reverse=True):
        same, mean = contract_axis(same, k, frame[k].same), contract_axis(mean, k, frame[k].any_pair)
    n = math.prod(frame[k].size for k in keys)
    return (same - mean) * n / (n - 1)


def _token_width(node: Node) -> float | None:
    """The width a value was projected from."""
    while not hasattr(node, "width"):
        own = roots(node) if isinstance(node, Apply) else [node.args[0]] if len(node.args) == 1 else []
        if isinstance(node, Sum):
            own = [v for v in node.args if hasattr(v.node, "width")] or []
        if len(own) != 1 or own[0].node is node:
            return None
        node = own[0].node
    return float(node.width)  # pyright: ignore[reportAttributeAccessIssue]
