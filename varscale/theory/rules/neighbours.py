"""Sums over neighbours, more than once: nodes that share neighbours are more alike than any two nodes of the graph.

Moments by class of position know only how alike two positions are on average. How much more alike those are that meet in one
sum follows, for linear layers, from the graph alone: with B the sums so far, rows of unit length, ρ_jk = Σ B_j B_k. Elementwise
functions weaken correlations (a power series with positive coefficients lies below its chord), so that this is a bound.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from varscale.theory.domain.axes import contract_axis
from varscale.theory.graph.expressions import Apply, Sum, roots
from varscale.theory.graph.known_arrays import is_given, numbers
from varscale.theory.graph.linear_nodes import Contract
from varscale.theory.graph.lookups import Gather
from varscale.theory.graph.nodes import Node
from varscale.theory.graph.store import Fact
from varscale.theory.rules.segment_sums import SEGMENTS, SegmentSum, per_position


def unseen(total: Any) -> float:
    """Relative part of the mean square of a sum by segment that comes from its neighbours being alike.

    Where layers add it to what the nodes were before (x + A x), what the two have in common is counted to the sum, too.
    """
    found = _neighbours(total)
    if found is None:
        return 0.0
    adjacency, source, axis = found
    size = adjacency.shape[0]
    before = _sums_so_far(source, size)
    norms = np.sqrt(np.asarray(before.multiply(before).sum(axis=1)).ravel())
    rows = sparse.diags(1 / np.maximum(norms, 1e-300)) @ before
    usual = (_square(rows.sum(axis=0)) - size) / max(size * (size - 1), 1)
    same = different = source.table.second
    for k in reversed(range(len(source.axes))):
        same = contract_axis(same, k, source.axes[k].same)
        different = contract_axis(different, k, source.axes[k].different if k == axis else source.axes[k].same)
    chord = max(float(same - different), 0.0) / max(1 - usual, 1e-9)

    def excess(weights: Any) -> float:
        """What pairs that meet add to the sum of squares, over what they would as any two."""
        own, met = weights.multiply(weights).sum(), weights @ rows
        return float(met.multiply(met).sum() - own - usual * (_square(weights.sum(axis=1)) - own))

    worst = 0.0
    degrees = np.asarray(adjacency.sum(axis=1)).ravel()
    shared = sparse.diags(1 / np.where(degrees > 0, degrees, 1.0)) @ adjacency
    for mean, added in _uses_of_sum(total, source):
        weights = shared if mean else adjacency
        own = weights.multiply(weights).sum()
        base = own * float(same) + (_square(weights.sum(axis=1)) - own) * float(different)
        whole = weights + sparse.identity(size) if added else weights
        worst = max(worst, abs(excess(whole)) * chord / max(float(base), 1e-300))
    return worst


def unseen_in_given(total: Any) -> float:
    """The same of what given numbers make alike: the summands of one segment (near distances) more than any two.

    A projection of given rows by fresh weights has their products for covariances, and functions of it no more than those. Of
    several rows that a summand is made of, those that matter most tell. What is one row is known to be, and left out.
    """
    ids, weights, _ = SEGMENTS.of(total.graph)[total.params]
    worst, seen = 0.0, set()
    pending = [(total.args[0].node, 0, np.arange(len(ids)))]
    while pending:
        node, k, rows = pending.pop()
        if (node.id, k) in seen:
            continue
        seen.add((node.id, k))
        if is_given(node) and node.axes and node.axes[k].size > rows.max():
            found = numbers(node)
            assert found is not None
            values = np.moveaxis(found.astype(float), k, 0).reshape(node.axes[k].size, -1)[rows]
            worst = max(worst, _excess_of_sums(values, rows, ids, weights))
        elif isinstance(node, Gather) and k == 0 and node.line is not None and len(node.line) > rows.max():
            pending.append((node.args[0].node, node.params[0][0], np.asarray(node.line)[rows]))
        elif isinstance(node, Apply | Sum | Contract):
            pending += [(v.node, v.bind.index(k), rows) for v in node.args if k in v.bind]
    return worst


def _excess_of_sums(values: np.ndarray, rows: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> float:
    """By how much more the sums by segment of given rows are, in mean square, than if pairs in one segment were any two."""
    ones = np.ones_like(values[:, :1])

    def pairs(x: np.ndarray, keys: np.ndarray) -> float:
        """Σ of x_e x_f over pairs e ≠ f of one key."""
        _, places = np.unique(keys, axis=0, return_inverse=True)
        sums = np.zeros((places.max() + 1, x.shape[1]))
        np.add.at(sums, places.ravel(), x)
        return float(np.square(sums).sum() - np.square(x).sum())

    def of_different(x: np.ndarray, keys: np.ndarray) -> float:
        return pairs(x, keys) - pairs(x, np.stack([keys, rows], axis=1))

    everywhere = np.zeros(len(rows), int)
    usual = of_different(values, everywhere) / max(of_different(ones, everywhere), 1.0)
    w = weights[:, None]
    met, count = of_different(w * values, ids), of_different(w * ones, ids)
    base = float(np.square(w * values).sum()) + pairs(w * values, np.stack([ids, rows], axis=1)) + count * usual
    return abs(met - count * usual) / max(base, 1e-300)


def _square(x: Any) -> float:
    return float(np.square(np.asarray(x)).sum())


def _uses_of_sum(total: Any, source: Node) -> list[tuple[bool, bool]]:
    """How a sum by segment is used: divided by something (a mean) or as it is, and whether it is added to its source."""
    found = [(False, False)]
    for node in list(total.graph.nodes.values()):
        if isinstance(node, Sum) and any(v.node is source for v in node.args):
            for view in node.args:
                if any(root.node is total for root in roots(view.node)):
                    found.append((isinstance(view.node, Apply), True))
    return found


def _neighbours(total: Any) -> tuple[Any, Node, int] | None:
    """The weight of each row in each sum, the rows, and their axis, where rows and sums are the same things."""
    ids, weights, size = SEGMENTS.of(total.graph)[total.params]
    for looked in per_position(total.args[0].node):
        known = looked.line if isinstance(looked, Gather) else None
        if known is None or len(known) != len(ids):
            continue
        source, axis = looked.args[0].node, looked.params[0][0]
        kept = (ids >= 0) & (ids < size)
        if source.axes[axis].size == size and np.all((known >= 0) & (known < size)):
            return sparse.csr_matrix((weights[kept], (ids[kept], known[kept])), shape=(size, size)), source, axis
    return None


def _sums_so_far(node: Node, size: int) -> Any:
    """What each row is made of, as a matrix over the rows that went in; those of the last sums, and of those before them."""
    known = _SUMS.of(node.graph)
    if node.id in known:
        return known[node.id]
    known[node.id] = sparse.identity(size, format="csr")
    seen, pending, last = {node.id}, [node], []
    while pending:
        node_ = pending.pop()
        found = _neighbours(node_) if isinstance(node_, SegmentSum) else None
        if found is not None and found[0].shape[0] == size:
            last.append((node_.id, found))
            continue
        before = {v.node.id: v.node for v in node_.args if v.node.id not in seen}
        seen.update(before)
        pending += before.values()
    if last:
        adjacency, source, _ = max(last, key=lambda x: x[0])[1]
        if source.id in seen:  # a residual way round it
            adjacency = adjacency + sparse.identity(size)
        known[node.id] = adjacency @ _sums_so_far(source, size)
    return known[node.id]


_SUMS: Fact[int, Any] = Fact()  # what each row of a node is made of, as a matrix
