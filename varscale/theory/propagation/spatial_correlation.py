r"""Places near one another: how much more alike they are than any two of an axis, for the windows that pools read.

Moments by type know two places of a picture as "different", and average over all of them. That is all a contraction, an
average over the picture or a norm asks for; what a window adds up or compares are neighbours, and those of a photograph are
alike. For a distance along one or more axes the EXCESS of a node is

    E[x_i x_j | j at that distance from i] − E[x_i x_j | j anywhere else],

by whether they agree along each axis (along those of the distance: "the same", or "that far"). It is measured on known arrays,
and then follows from layer to layer by the rules of the second moments themselves, of which each is linear in them but one:
a function of a normal, which reads both correlations off its series. A convolution over fresh weights sees its input a stride
as far apart.

Distances are taken at places within the array, borders being few; drift of the mean over a picture counts as likeness.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from varscale.theory.domain.accuracy import LOOSE, ROUGH
from varscale.theory.domain.axes import Axis, pool
from varscale.theory.graph.expressions import Apply, Sum, roots, roots_of
from varscale.theory.graph.known_arrays import MEASURED
from varscale.theory.graph.nodes import Array, Leaf, Node, View
from varscale.theory.graph.store import once_per_node
from varscale.theory.integrals.hermite_series import HERMITE, POINTS
from varscale.theory.integrals.mehler import mehler
from varscale.theory.propagation.cross_moments import dependent
from varscale.theory.propagation.marginals import (
    Marginal,
    along,
    concentrated,
    correlation_behind,
    independent_factors,
    marginal,
    over_classes,
)

Offsets = tuple[tuple[int, int], ...]  # (axis, distance)


class Excess(NamedTuple):
    """Excess by "same" and "different" along each axis, (2,) * rank; `doubt` is of it, relative to the node's mean square."""

    excess: np.ndarray
    doubt: float


@once_per_node
def excess(node: Node, offsets: Offsets) -> Excess:
    """The excess of a node at some distances; none where it has no known numbers in it."""
    return excess_of(node, offsets) if node.local and offsets else nothing(node)


def nothing(node: Node, doubt: float = 0.0) -> Excess:
    """No excess."""
    return Excess(np.zeros((2,) * len(node.axes)), doubt)


@functools.singledispatch
def excess_of(node: Node, offsets: Offsets) -> Excess:
    """`excess` of a kind of node. Of other kinds nothing is known."""
    return nothing(node, ROUGH)


def of_view(view: View, offsets: Offsets, rank: int) -> Excess:
    """The excess of an argument, over a frame of `rank` axes (1 long where it has none)."""
    inner = tuple((j, distance) for k, distance in offsets for j, place in enumerate(view.bind) if place == k)
    found = excess(view.node, inner)
    return Excess(over_frame(found.excess, view, rank), found.doubt)


def over_frame(table: np.ndarray, view: View, rank: int) -> np.ndarray:
    """A table by "same" and "different" along a view's own axes, over its frame's."""
    order = sorted(range(len(view.bind)), key=lambda j: view.bind[j])
    return table.transpose(order).reshape([2 if place in view.bind else 1 for place in range(rank)])


def usual(node: Node) -> np.ndarray:
    """E[x_i x_j] by "same" and "different" along each axis."""
    return pool(node.table.second, node.axes)


def sum_of_both_indices(table: np.ndarray, k: int, size: float) -> np.ndarray:
    """The sum over both indices of axis k."""
    return size * table.take(0, k) + size * (size - 1) * table.take(1, k)


def measured(node: Node, numbers: np.ndarray) -> None:
    """Note that the moments of a leaf are those of known numbers, (sizes of its axes...)."""
    node.local = True
    MEASURED.put(node.graph, node.id, numbers)


@excess_of.register(Leaf | Array)
def excess_of_numbers(node: Leaf | Array, offsets: Offsets) -> Excess:
    """Averages over all pairs at that distance: free along some of the other axes, from which those that differ follow."""
    values = node.values if isinstance(node, Array) else MEASURED.of(node.graph)[node.id]
    values = np.asarray(values, float)
    axes, distances = node.axes, dict(offsets)
    out = np.zeros((2,) * len(axes))
    if any(d >= axes[k].size for k, d in offsets):
        return Excess(out, ROUGH)
    others = [k for k in range(len(axes)) if k not in distances]
    before = usual(node)
    for index in np.ndindex(*(2 if k in distances else 1 for k in range(len(axes)))):
        if not any(index):
            continue
        first, second = (
            values[tuple(_shifted_slice(distances.get(k, 0) * index[k], last) for k in range(len(axes)))]
            for last in (False, True)
        )
        found = np.empty([2 if k in others else 1 for k in range(len(axes))])
        for free in np.ndindex(*found.shape):
            run = tuple(k for k in others if free[k])
            pair = first.mean(run, keepdims=True) * second.mean(run, keepdims=True)
            found[free] = pair.mean()
        for k in others:
            same, anywhere, n = found.take([0], k), found.take([1], k), axes[k].size
            found = np.concatenate([same, (n * anywhere - same) / (n - 1)], axis=k)
        at = tuple(slice(None) if k in others else slice(i, i + 1) for k, i in enumerate(index))
        out[at] = found - before[at]
    return Excess(out, 0.0)


def _shifted_slice(distance: int, last: bool) -> slice:
    return slice(distance, None) if last else slice(0, -distance if distance else None)


@excess_of.register(Sum)
def excess_of_sum(node: Sum, offsets: Offsets) -> Excess:
    rank, centring = len(node.axes), node.centring
    out, doubt, whole = np.zeros((2,) * rank), 0.0, max(node.table.mean_square, 1e-300)
    for i, (c, view) in enumerate(zip(node.params, node.args, strict=True)):
        if i in centring.values():
            continue
        found = of_view(view, offsets, rank)
        own = found.excess
        if i in centring:
            mean = node.args[centring[i]]
            own = _centred(own, [k for k in view.bind if k not in mean.bind], node.axes, dict(offsets))
        out = out + c * c * own
        doubt += c * c * found.doubt * view.node.table.mean_square / whole
    for (c, x), (d, y) in itertools.combinations(zip(node.params, node.args, strict=True), 2):
        if x.bind == y.bind:
            first, second = sorted(
                (x.node, y.node), key=lambda n: -n.id
            )  # the later one is made from the other, if any is
            inner = tuple((x.bind.index(k), distance) for k, distance in offsets if k in x.bind)
            found = between(first, second, inner)
            out = out + 2 * c * d * over_frame(found.excess, x, rank)
            doubt += (
                2
                * abs(c * d)
                * found.doubt
                * (first.table.mean_square * second.table.mean_square) ** 0.5
                / whole
            )
    return Excess(out, doubt)


@functools.singledispatch
def between(x: Node, y: Node, offsets: Offsets) -> Excess:
    """The excess of E[x_i y_j] of two arrays over the same axes: two functions of one root, or a kind's own law."""
    return of_functions(x, y, offsets)


def of_functions(x: Node, y: Node, offsets: Offsets) -> Excess:
    """Of two functions of one root; what others have in common is taken for as much as anywhere, and is in doubt."""
    if x is y:
        return excess(x, offsets)
    rank, whole = len(x.axes), tuple(range(len(x.axes)))
    live = [{r for r in roots(node) if r.node.local and not concentrated(r.node)} for node in (x, y)]
    if not (live[0] and live[1] and dependent(x, y)):
        return nothing(x)
    if len(live[0]) > 1 or live[0] != live[1]:
        return nothing(x, ROUGH)
    (root,) = live[0]
    found = of_view(root, offsets, rank)
    before, after = _at_both(View(x, whole), View(y, whole), root, found.excess, x.axes)
    return Excess(np.broadcast_to(after - before, (2,) * rank), found.doubt)


def _centred(
    excess: np.ndarray, taken: Sequence[int], axes: Sequence[Axis], distances: dict[int, int]
) -> np.ndarray:
    """Less the mean over some axes; over those of the distance it has no part of the excess, which has mean zero there."""
    mean = excess
    for k in taken:
        if k in distances:
            return excess
        if excess.shape[k] > 1:
            mean = np.expand_dims(sum_of_both_indices(mean, k, axes[k].size), k) / axes[k].size ** 2
    return excess - mean if taken else excess


@excess_of.register(Apply)
def excess_of_apply(node: Apply, offsets: Offsets) -> Excess:
    rank, (name, extra) = len(node.axes), node.params
    if name == "affine":
        found = of_view(node.args[0], offsets, rank)
        share = extra[0] ** 2 * node.args[0].node.table.mean_square / max(node.table.mean_square, 1e-300)
        return Excess(np.broadcast_to(extra[0] ** 2 * found.excess, (2,) * rank), share * found.doubt)
    before = after = np.ones((2,) * rank)
    doubt = 0.0
    for factor in independent_factors(node):
        live = [r for r in roots_of(factor) if r.node.local and not concentrated(r.node)]
        if not live:
            continue
        known = changed = over_frame(usual(factor.node), factor, rank)
        if len(live) > 1:
            doubt = max(doubt, ROUGH)
        else:
            found = of_view(live[0], offsets, rank)
            known, changed = _at_both(factor, factor, live[0], found.excess, node.axes)
            doubt = max(doubt, found.doubt)
        before, after = before * known, after * changed
    # Factors that read a norm's scale were taken at its mean, which the moments of the whole need not be.
    gain = (after - before) * (node.table.mean_square / max(float(before.flat[0]), 1e-300))
    if any(k in root.bind and concentrated(root.node) for root in roots(node) for k, _ in offsets):
        # Norms place by place: near places are more alike for their scales being alike, which are taken for
        # one number here.
        doubt = max(doubt, LOOSE * float(np.max(np.abs(gain))) / max(node.table.mean_square, 1e-300))
    return Excess(gain, doubt)


def _at_both(
    f: View, g: View, root: View, excess: np.ndarray, frame: Sequence[Axis]
) -> tuple[np.ndarray, np.ndarray]:
    """E[f(x_i) g(x_j)] at the usual correlations of their one root, and at those that an excess gives it."""
    first, second = _line(f, root, frame), _line(g, root, frame)
    law, table = marginal(root.node), root.node.table
    covariance = pool(table.covariance, table.axes)
    variance = float(covariance.flat[0])
    if min(len(first), len(second)) < POINTS or variance <= 0:
        same = np.full((1,) * len(frame), first.mean() * second.mean())
        return same, same
    covariance = over_frame(covariance, root, len(frame))
    pairs = np.clip([covariance / variance, (covariance + excess) / variance], -1.0, 1.0)
    before, after = mehler(first, second, ()).at(pairs if law.gaussian else latent_by_distance(law, pairs))
    return before, after


def _line(f: View, root: View, frame: Sequence[Axis]) -> np.ndarray:
    """A function on the normal grid of one of its roots, the others held, averaged over classes; 1 long if constant."""
    return over_classes(along(f, frame, root), frame)


def latent_by_distance(law: Marginal, pairs: np.ndarray) -> np.ndarray:
    """Correlations of the normals behind a root, from its own."""
    line = over_classes(law.values, law.root.axes) @ HERMITE
    return correlation_behind(line, line, pairs)
