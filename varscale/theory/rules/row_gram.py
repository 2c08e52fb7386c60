"""Products of rows with rows: the diagonal, where a row meets itself, or what was made of the same row.

Of out_ij = Σ_a x_ia y_ja the entries i = j are one in n, and tables by type of (i, i') and of (j, j') have no type for them:
there the mean and the covariances of x_ia and y_jb count as averages over all i and j. Let M_s and c_s be E[out_ij] and those
where i = j (s = 0) or not (s = 1), and p_st the share of the pairs of entries of one type of which i and j are so, and i' and
j' as t says. Of the mean's square and of the exchange of factors, Σ_ab Cov(x_ia, y_j'b) Cov(x_i'b, y_ja), there then is

    Σ_st p_st (M_s M_t + Σ_ab c_s,ab c_t,ab)    rather than products of averages.

p_00 is 1/n where i = i' and j = j', 1/(n (n − 1)) where neither, else 0. Exact for jointly Gaussian x and y; classes of i and j
are not told apart in it. Rows along several axes are alike or not along each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from varscale.theory.domain.accuracy import NEGLIGIBLE
from varscale.theory.domain.axes import Axis, apply_axis, contract_axis, lift_types
from varscale.theory.domain.tables import full_types, means_by_type
from varscale.theory.graph.expressions import roots, swapped
from varscale.theory.graph.nodes import UNKNOWN, Node, View
from varscale.theory.graph.store import Fact
from varscale.theory.propagation.cross_moments import cross, mean_product

_OWN_SHARES: Fact[int, float] = Fact()  # by product: the share of a row with itself in its second moments


def own_products(node: Any, second: np.ndarray) -> np.ndarray:
    """What a contraction gains where free axes of its arguments may be one axis, read twice.

    Args:
        node: the contraction.
        second: its second moments by type without that.
    """
    diagonal, exchanged = _gains(node)
    gain = diagonal + exchanged
    most = max(float(np.max(np.abs(second + gain))), 1e-300)
    share = float(np.max(np.abs(gain))) / most
    if share > NEGLIGIBLE:
        # Rows of one length have no exchange on the diagonal; others are of any length to order 1/width.
        node.graph.flag("assumed", max(2 * float(np.max(np.abs(exchanged))) / most, share / node.width))
        _OWN_SHARES.put(node.graph, node.id, share)
    return second + gain


def of_own_keys(logits: Node) -> float:
    """The doubt of a softmax over logits some of which are larger than all others: those of a row with itself."""
    known = {
        r.node.id for r in roots(logits) if r.node.table.mean_square >= 0
    }  # their moments are worked out
    share = max((_OWN_SHARES.get(logits.graph, i) or 0.0 for i in known), default=0.0)
    return min(share / max(1 - share, 1e-9), UNKNOWN)


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


def _gains(node: Any) -> tuple[np.ndarray | float, np.ndarray | float]:
    """The gain by the mean's square, and that by the exchange of factors, by type of the output."""
    met = _free_axes_met(node)
    if not met:
        return 0.0, 0.0
    frame = node.frame
    left = [k for k in range(len(frame)) if k not in met.values()]
    place = {k: p for p, k in enumerate(left)}
    place |= {j: place[i] for i, j in met.items()}
    x, y = (View(v.node, tuple(place[b] for b in v.bind)) for v in node.args)
    axes = [frame[k] for k in left]
    both = full_types(cross(x, y, axes) - mean_product(x, y, axes), axes)
    for i in met:
        both = apply_axis(both, place[i], axes[place[i]].pooling)
    both = np.moveaxis(both, [place[i] for i in met], range(len(met)))
    rest = [axis for k, axis in zip(left, axes, strict=True) if k not in met]
    kept, summed = rest[: len(rest) - len(node.params)], rest[len(rest) - len(node.params) :]
    others = [k for k in range(len(node.axes)) if k not in met and k not in met.values()]
    gains: list[np.ndarray | float] = [0.0, 0.0]
    for s, t in itertools.product(np.ndindex(*[2] * len(met)), repeat=2):
        term = means_by_type(_added(both[s], kept, summed), kept, _added(both[t], kept, summed))
        exchanged = both[s] * swapped(both[t], rest)
        for axis in reversed(summed):
            exchanged = contract_axis(exchanged, exchanged.ndim - 1, axis.pairs)
        shares, usual = np.ones([1] * len(node.axes)), 1.0
        for (i, j), one, other in zip(met.items(), s, t, strict=True):
            p, chance = _shares(node.axes[i], node.axes[j], one, other)
            lines = [1] * len(node.axes)
            lines[i], lines[j] = (a.types for a in (node.axes[i], node.axes[j]))
            shares = shares * (p if i < j else p.T).reshape(lines)
            usual *= chance
        spare = [k for k in range(len(node.axes)) if k not in others]
        for n, found in enumerate((term, exchanged)):
            gains[n] = gains[n] + (shares - usual) * np.expand_dims(found, spare)
    return gains[0], gains[1]


def _added(both: np.ndarray, kept: Sequence[Axis], summed: Sequence[Axis]) -> np.ndarray:
    """The covariance of the two factors of one term, added up over all terms, by class."""
    mean = both[tuple(slice(0, a.classes) for a in (*kept, *summed))]
    for axis in reversed(summed):
        mean = contract_axis(mean, mean.ndim - 1, axis.counts)
    return mean


def _shares(first: Axis, second: Axis, s: int, t: int) -> tuple[np.ndarray, float]:
    """p_st by type along i and along j, and the product of p_s and p_t; 0 for alike and 1 for not."""
    n = first.size
    one, other = first.agrees[:, None], second.agrees
    alike = np.where(one & other, 1 / n, np.where(one | other, 0.0, 1 / (n * (n - 1))))
    usual = (1 / n, 1 - 1 / n)
    found = {0: alike, 1: 1 / n - alike, 2: 1 - 2 / n + alike}[s + t]
    return found, usual[s] * usual[t]


def _free_axes_met(node: Any) -> dict[int, int]:
    """Free axes of the one argument, and those of the other that may be the same: the next of the same size."""
    x, y = node.args
    kept = range(len(node.axes))
    rows, columns = ([k for k in kept if k in v.bind and k not in w.bind] for v, w in ((x, y), (y, x)))
    found: dict[int, int] = {}
    for i in rows:
        same = [j for j in columns if j not in found.values() and node.axes[j].size == node.axes[i].size]
        if same:
            found[i] = same[0]
    return found
