"""How likeness of near places passes linear maps, averages, windows, and what is cut or joined."""

from __future__ import annotations

import math

import numpy as np

from varscale.theory.domain.accuracy import LOOSE, ROUGH
from varscale.theory.domain.axes import pool
from varscale.theory.graph.axis_nodes import Concat, Take
from varscale.theory.graph.convolutions import Conv, WindowSum, hits
from varscale.theory.graph.expressions import Mean
from varscale.theory.graph.linear_nodes import Contract
from varscale.theory.graph.nodes import Constant, Leaf, Node
from varscale.theory.propagation.spatial_correlation import (
    Excess,
    Offsets,
    between,
    excess,
    excess_of,
    nothing,
    of_functions,
    of_view,
    over_frame,
    sum_of_both_indices,
    usual,
)
from varscale.theory.rules.pooling import WindowMax, window_sums, window_sums_against


@excess_of.register(Mean)
def excess_of_mean(node: Mean, offsets: Offsets) -> Excess:
    source = node.args[0].node
    left = [k for k in range(len(source.axes)) if k not in node.params]
    found = excess(source, tuple((left[k], d) for k, d in offsets))
    out = found.excess
    for k in reversed(node.params):
        out = sum_of_both_indices(out, k, source.axes[k].size) / source.axes[k].size ** 2
    return Excess(out, found.doubt * source.table.mean_square / max(node.table.mean_square, 1e-300))


@excess_of.register(Contract)
def excess_of_contract(node: Contract, offsets: Offsets) -> Excess:
    """Weights that do not run over the places multiply what the input has."""
    rank = len(node.frame)
    for x, w in (node.args, node.args[::-1]):
        fixed = not w.node.local and not any(k in w.bind for k, _ in offsets)
        if isinstance(w.node, Leaf) and not w.node.is_input and fixed:
            found = of_view(x, offsets, rank)
            weights = pool(w.node.table.second, w.node.axes)
            out = np.broadcast_to(found.excess * over_frame(weights, w, rank), (2,) * rank)
            for k in reversed(range(len(node.axes), rank)):
                out = sum_of_both_indices(out, k, node.frame[k].size)
            return Excess(out, found.doubt)
    return nothing(node, 1.0)


@excess_of.register(Conv)
def excess_of_conv(node: Conv, offsets: Offsets) -> Excess:
    """One tap at both places reads its input a stride as far apart, and other taps have other weights."""
    groups, windows, xd, _, od = node.params
    (x, _), (w, _) = node.args
    place = {o: (k, window) for k, o, window in zip(xd[2:], od[2:], windows, strict=True) if o is not None}
    if any(k is None or window.input_dilation > 1 for k, window in place.values()):
        return nothing(node, 1.0)
    inner = {
        xd[0] if o == od[0] else place[o][0]: d * (place[o][1].stride if o in place else 1)
        for o, d in offsets
        if o != od[1]
    }
    found = excess(x, tuple(sorted((k, d) for k, d in inner.items() if k is not None)))
    out = found.excess if xd[1] is None else found.excess.take([0], xd[1])
    taps = math.prod(
        float((hits(window, x.axes[k].size) >= 0).sum() / window.size_out) if k is not None else 1.0
        for k, window in zip(xd[2:], windows, strict=True)
    )
    channels = (1 if xd[1] is None else x.axes[xd[1]].size) / groups
    out = out * (w.table.mean_square * taps * channels)
    logical = out.transpose([k for k in xd if k is not None])[
        tuple(None if k is None else slice(None) for k in xd)
    ]
    whole = np.zeros([1 if o is None else 2 for o in od])
    whole[:, :1] = logical[tuple(slice(None) if o is not None else slice(0, 1) for o in od)]
    kept = whole.reshape([2 for o in od if o is not None]).transpose(
        np.argsort([o for o in od if o is not None])
    )
    leaning = w.table.total_mean**2 / max(w.table.mean_square, 1e-300)
    return Excess(kept, found.doubt + (LOOSE if leaning > 1 / node.width else 0.0))


@excess_of.register(WindowSum)
def excess_of_window_sum(node: WindowSum, offsets: Offsets) -> Excess:
    far, near = window_sums(node, {}), window_sums(node, dict(offsets))
    return Excess(near - far, 0.0)


@between.register(WindowSum)
def between_of_window_sum(x: WindowSum, y: Node, offsets: Offsets) -> Excess:
    """Sums over windows against places of what they are over, or of another function of it."""
    over = x.args[0].node
    if x is y or y.axes != over.axes or [a.size for a in x.axes] != [a.size for a in over.axes]:
        return of_functions(x, y, offsets)
    far, near = window_sums_against(x, y, {}), window_sums_against(x, y, dict(offsets))
    return Excess(near - far, 0.0)


@excess_of.register(WindowMax)
def excess_of_window_max(node: WindowMax, offsets: Offsets) -> Excess:
    """As much of the way from "different" to "the same" as the sums over the same windows have gone."""
    far, near = window_sums(node, {}), window_sums(node, dict(offsets))
    at = tuple(slice(0, 1) if any(k == o for o, _ in offsets) else slice(None) for k in range(far.ndim))
    span = far[at] - far
    share = np.clip((near - far) / np.where(np.abs(span) > 1e-9 * np.abs(far).max(), span, np.inf), -1.0, 1.0)
    own = usual(node)
    out = share * (own[at] - own)
    return Excess(out, ROUGH * float(np.abs(out).max()) / max(node.table.mean_square, 1e-300))


@excess_of.register(Take)
def excess_of_take(node: Take, offsets: Offsets) -> Excess:
    k = node.params[0]
    source = node.args[0].node
    dropped = len(node.axes) < len(source.axes)
    found = excess(source, tuple((o + (dropped and o >= k), d) for o, d in offsets))
    return Excess(found.excess.take(0, k) if dropped else found.excess, found.doubt)


@excess_of.register(Concat)
def excess_of_concat(node: Concat, offsets: Offsets) -> Excess:
    """Parts along an axis of their own; what places of different parts have in common is taken to be like anywhere."""
    along, sizes = node.params
    if any(k == along for k, _ in offsets):
        return nothing(node, 1.0)
    rank, n = len(node.axes), sum(sizes)
    out, doubt = np.zeros((2,) * rank), 0.0
    for view, size in zip(node.args, sizes, strict=True):
        if isinstance(view.node, Constant):
            continue
        found = of_view(view, offsets, rank)
        lines = np.broadcast_to(found.excess, (2,) * rank).copy()
        if along not in view.bind:
            lines[tuple(slice(1, None) if k == along else slice(None) for k in range(rank))] = lines.take(
                [0], along
            )
        shares = np.array([size / n, size * (size - 1) / max(n * (n - 1), 1)])
        out += lines * shares.reshape([2 if k == along else 1 for k in range(rank)])
        doubt = max(doubt, found.doubt)
    return Excess(out, doubt)
