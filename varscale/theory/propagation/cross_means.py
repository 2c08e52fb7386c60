"""Cross-moments of averages: by projection, by pairing up what is averaged, or part by part."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from varscale.theory.domain.axes import Axis, apply_axis, contract_axis
from varscale.theory.domain.tables import full_along
from varscale.theory.graph.axis_nodes import Concat, Take
from varscale.theory.graph.expressions import Mean
from varscale.theory.graph.nodes import Constant, Node, View, cross_by_kind
from varscale.theory.graph.normal_form import mean_node
from varscale.theory.graph.reshapes import Merge, Split, split
from varscale.theory.propagation.cross_moments import cross
from varscale.theory.propagation.cross_slices import is_cut


def cross_mean(a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """E[mean(x) y] by type; None where nothing is known of how y and the averaged axes meet."""
    x, reduced = a.node.args[0].node, a.node.params
    # Axes of y that mean(x) does not run over: by exchangeability y may be averaged over them.
    spare = [k for k, place in enumerate(b.bind) if place not in a.bind]
    part = _part_of_averaged(a.node, b, [b.bind[k] for k in spare])
    if part is not None:
        return cross(a, part, frame)
    if isinstance(b.node, Mean):
        y, theirs = b.node.args[0].node, b.node.params
        if len(reduced) != len(theirs):
            (x, reduced), (y, theirs) = _cut_alike((x, reduced), (y, theirs))
        met = _matched([x.axes[k].size for k in reduced], [(k, y.axes[k].size) for k in theirs])
        if met is not None and len(met) == len(theirs):
            # Both averaged over axes of the same sizes: pair those up.
            wide = (*frame, *(x.axes[k] for k in reduced))
            extra = list(range(len(frame), len(wide)))
            mine, other = _wide_bind(a, x, reduced, extra), _wide_bind(b, y, met, extra)
            out = cross(View(x, mine), View(y, other), wide)
            for d in reversed(extra):
                out = contract_axis(full_along(out, d, wide[d]), d, wide[d].any_pair)
            return out
    partner = _matched([x.axes[k].size for k in reduced], [(b.bind[k], b.node.axes[k].size) for k in spare])
    if partner is not None:
        # y runs over what x is averaged over: pair index k' of x with index k of y, and average over k'.
        own, new = iter(a.bind), iter(partner)
        mine = tuple(next(new) if k in reduced else next(own) for k in range(len(x.axes)))
        table = cross(View(x, mine), b, frame)
        for d in partner:
            table = apply_axis(full_along(table, d, frame[d]), d, _over_first(frame[d]))
        return table
    if spare and all(b.node.axes[k].labels is None for k in spare):
        averaged = mean_node(b.node, spare)
        if isinstance(averaged, Constant):
            return None
        rest = tuple(place for k, place in enumerate(b.bind) if k not in spare)
        return cross(a, View(averaged, rest), frame)
    return _one_by_one(a, b, frame) if isinstance(b.node, Mean) else None


def _one_by_one(a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """Averages over axes that do not pair up: what the first is made of, its parts one by one, against the second."""
    if is_cut(b.node):
        return None
    x, reduced = a.node.args[0].node, a.node.params
    wide = (*frame, *(x.axes[k] for k in reduced))
    extra = range(len(frame), len(wide))
    view = View(x, _wide_bind(a, x, reduced, extra))
    out = cross_by_kind(x, view, b, wide) if isinstance(x, Concat | Take | Split | Merge) else None
    if out is None:
        return None
    for d in reversed(extra):
        out = contract_axis(full_along(out, d, wide[d]), d, wide[d].any_pair)
    return out


def _part_of_averaged(mean: Node, view: View, spare: Sequence[int]) -> View | None:
    """A slice of the axis that is averaged: any other positions would do as well, and so does the mean of all."""
    if not isinstance(view.node, Take):
        return None
    source, k = view.node.args[0].node, view.node.params[0]
    one_left = len(view.node.axes) < len(source.axes)
    bind: list[tuple[int, ...]] = [(place,) for place in view.bind]
    if one_left:
        bind.insert(k, ())
    while isinstance(source, Split):  # every n-th position is one index of a factor
        first, sizes = source.params
        if not first <= k < first + len(sizes):
            return None
        together = tuple(place for places in bind[first : first + len(sizes)] for place in places)
        bind[first : first + len(sizes)] = [together]
        source, k = source.args[0].node, first
    if mean.args[0].node.axes != source.axes or k not in mean.params or source.axes[k].labels is not None:
        return None
    if not set(bind[k]) <= set(spare):
        return None
    averaged = mean_node(source, [k])
    rest = tuple(place for places in (*bind[:k], *bind[k + 1 :]) for place in places)
    return None if isinstance(averaged, Constant) else View(averaged, rest)


def _matched(sizes: Sequence[int], places: list[tuple[int, int]]) -> list[int] | None:
    """Places of the given sizes, each taken once; None where one is missing."""
    out: list[int] = []
    for size in sizes:
        found = next((place for place, n in places if n == size and place not in out), None)
        if found is None:
            return None
        out.append(found)
    return out


@functools.cache
def _over_first(axis: Axis) -> np.ndarray:
    """E[mean over i of x_i · y_j] by the class of j, read at every type."""
    weights = np.zeros((axis.classes, axis.types))
    for c in range(axis.classes):
        weights[c, c] = 1.0
        for other in range(axis.classes):
            weights[c, axis.classes + other * axis.classes + c] = axis.counts[other] - (other == c)
    return (weights / axis.size)[axis.second]


Reduced = tuple[Node, tuple[int, ...]]


def _cut_alike(x: Reduced, y: Reduced) -> tuple[Reduced, Reduced]:
    """What is averaged over one axis and over its factors: the one axis is split."""
    sizes = [tuple(node.axes[k].size for k in axes) for node, axes in (x, y)]
    if math.prod(sizes[0]) == math.prod(sizes[1]):
        if len(sizes[0]) == 1:
            return _cut(x, sizes[1]), y
        if len(sizes[1]) == 1:
            return x, _cut(y, sizes[0])
    return x, y


def _cut(x: Reduced, sizes: tuple[int, ...]) -> Reduced:
    node, (k,) = x
    return split(node, k, sizes), tuple(range(k, k + len(sizes)))


def _wide_bind(view: View, source: Node, reduced: Sequence[int], extra: Sequence[int]) -> tuple[int, ...]:
    """What is averaged, over the frame of its average and places for the axes that are averaged."""
    own, new = iter(view.bind), dict(zip(reduced, extra, strict=True))
    return tuple(new[k] if k in new else next(own) for k in range(len(source.axes)))


@cross_by_kind.register(Mean)
def cross_by_kind_of_mean(node: Mean, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """E[mean(x) y]: where y does not run over the averaged axes, averaging x there changes nothing (projection)."""
    return cross_mean(a, b, frame)
