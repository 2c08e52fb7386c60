r"""Depthwise convolutions: each channel reads itself alone, and the scale of what it makes follows what it reads.

Given its input, y = Σ w_t x_t over one channel's window is normal with the variance Q = Var[w] Σ x_t², which many channels
would average away and one does not. What is odd in the weights shows nothing of it, but a function g with a mean of its own
does: whatever else is made of that input, a stream around the convolution, has in common with g(y), to first order in Q,

    Cov(f, g(y)) = Cov(f, Q) · dE[g(√q z)]/dq at q = E[Q],     dE[g]/dq = E[g(√q z) (z² − 1)] / 2q  (Stein).

Single places have little of it, their mean over a picture all: a sum over windows is then an average of x² over it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from varscale.theory.domain.axes import Axis
from varscale.theory.domain.tables import by_type, lift
from varscale.theory.graph.convolutions import Conv, WindowSum, WindowSumParams
from varscale.theory.graph.expressions import roots_of
from varscale.theory.graph.nodes import Leaf, Node, View
from varscale.theory.graph.normal_form import affine, apply
from varscale.theory.integrals.hermite_series import HERMITE
from varscale.theory.propagation.cross_moments import cross, dependent, mean_product
from varscale.theory.propagation.marginals import along, concentrated


def scale(node: Node) -> Node | None:
    """Q of a depthwise convolution over fresh weights, over its own axes; None of anything else."""
    if not isinstance(node, Conv):
        return None
    groups, windows, xd, _, od = node.params
    (x, _), (w, _) = node.args
    same = xd[1] is not None and od[1] is not None and x.axes[xd[1]].size == node.axes[od[1]].size == groups
    if not same or not isinstance(w, Leaf) or w.is_input or not w.odd or dependent(x, w):
        return None
    whole = tuple(range(len(x.axes)))
    square = apply(node.graph, "square", (), x.axes, [View(x, whole)])
    sums = node.graph.make(
        WindowSum, node.axes, [View(square, whole)], WindowSumParams((None, None, *windows), xd, od)
    )
    return affine(sums, w.table.mean_square, 0.0)


def shared_scale(f: View, g: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """What E[f_i g_j] gains by the scale of a depthwise convolution that g is a function of, by type; None: nothing."""
    live = [r for r in roots_of(g) if not concentrated(r.node)]
    if len(live) != 1:
        return None
    (y,) = live
    q = scale(y.node)
    if q is None or not dependent(f.node, q) or f.node.deps & ~q.deps & y.node.deps:
        return None
    view = View(q, y.bind)
    covariance = cross(f, view, frame) - mean_product(f, view, frame)
    return covariance * by_type(_slope(g, y, frame), frame, second=True)


def _slope(g: View, y: View, frame: Sequence[Axis]) -> np.ndarray:
    """dE[g(y)]/dE[y²] by class."""
    values = along(g, frame, y)
    if values.shape[-1] != len(HERMITE):
        return np.zeros((1,) * len(frame))
    table = y.node.table
    variance = lift(table.diagonal, table.axes, y.bind, frame, pairs=False)
    return (values @ HERMITE)[..., 2] / (math.sqrt(2) * np.maximum(variance, 1e-300))
