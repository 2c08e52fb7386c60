"""Keys of one class that are alike: mask tokens, paddings, say, which are one row repeated."""

from __future__ import annotations

from typing import Any

import numpy as np

from varscale.theory.domain.axes import apply_axis, contract_axis, lift_types
from varscale.theory.graph.nodes import View


def of_alike_keys(weights: View, values: View, node: Any, square: float) -> float:
    """The doubt of taking keys of one class for independent where they are alike: mask tokens, say, which are one row repeated.

    With κ what the logits of two keys of a class have in common beyond any two, the weight of a class with the share f of keys
    varies by f² (1 − f)² κ to leading order, of which independent logits have nothing. The sum over the keys varies by that
    times the mean square by which the class's mean value differs from that of all.

    Args:
        weights: softmax weights, over the frame of the contraction.
        values: what they add up.
        node: the contraction.
        square: its mean square.
    """
    p: Any = weights.node
    rows, axis, c = [p.axes[k] for k in p.rows()], p.keys, p.keys.classes
    if c == 1:
        return 0.0
    seen = p.seen
    second = p.by_key(np.broadcast_to(p.args[0].second(p.axes), p.frame_types))
    logits = second[(*(slice(a.classes) for a in rows), slice(c, None))].reshape(*seen.shape, c)
    alike = np.where(seen > 1, np.maximum(_beyond_any_two(logits, seen), 0.0), 0.0)
    shares = seen / np.maximum(seen.sum(-1, keepdims=True), 1e-300)
    varied = shares**2 * (1 - shares) ** 2 * alike
    for a in reversed(rows):
        varied = np.tensordot(a.counts / a.size, varied, axes=(0, varied.ndim - 2))
    table, place = values.node.table.second, weights.bind[p.params]
    if place not in values.bind or node.frame[place] != axis:
        return 0.0
    for k in reversed(range(len(values.bind))):
        own = values.node.axes[k]
        table = (
            apply_axis(table, k, lift_types(axis, own))
            if values.bind[k] == place
            else contract_axis(table, k, own.same)
        )
    apart = np.maximum(_beyond_any_two(table[c:].reshape(c, c), axis.counts), 0.0)
    return min(float(varied @ apart) / max(square, 1e-300), 1.0)


def _beyond_any_two(between: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """What two different keys of a class have in common, less what each has with any other, by class (..., classes)."""
    between = (between + np.swapaxes(between, -1, -2)) / 2
    pairs = np.maximum(counts[..., :, None] - np.eye(counts.shape[-1]), 0.0)
    met = np.maximum(pairs.sum(-2), 1e-300)
    common = (pairs * between).sum(-2) / met
    whole = (counts * met * common).sum(-1, keepdims=True) / np.maximum(
        (counts * met).sum(-1, keepdims=True), 1e-300
    )
    return np.diagonal(between, axis1=-2, axis2=-1) - 2 * common + whole
