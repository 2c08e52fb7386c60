"""Attention: weights and values are projections of the same tokens, and so are not independent."""

from __future__ import annotations

from typing import Any

import numpy as np

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
        if not isinstance(p.node, Softmax) or len(p.node.params) != 1:
            continue
        key = p.bind[p.node.params[0]]
        width = _token_width(v.node)
        if key not in v.bind or width is None:
            return 0.0
        frame = node.frame
        values = np.broadcast_to(v.second(frame), [n if (k in v.bind) else 1 for k, n in enumerate(a.types for a in frame)])
        axis = frame[key]
        c = axis.classes
        diagonal = [c + i * (c + 1) for i in range(c)]
        deviation = np.maximum(np.take(values, range(c), axis=key) - np.take(values, diagonal, axis=key), 0.0)
        shares = (axis.counts / axis.size).reshape([c if k == key else 1 for k in range(len(frame))])
        deviation = (deviation * shares).sum(axis=key)
        rows = p.node.rows()
        gain = lift(p.node.tilt, [p.node.axes[k] for k in rows], [p.bind[k] for k in rows], frame, pairs=True).squeeze(key)
        # Of the correlation between a logit and a value only the first power is here.
        node.graph.flag("quadrature", 0.05)
        return np.broadcast_to(deviation * gain / width, node.frame_types)
    return 0.0


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
