"""Cross-moments of an array rearranged: an axis read as its factors, factors read as one axis, cut alike on both sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from varscale.theory.domain.axes import Axis, join, merge_types, split_axis
from varscale.theory.domain.tables import lift
from varscale.theory.graph.nodes import View, cross_by_kind
from varscale.theory.graph.reshapes import Merge, Split, split
from varscale.theory.propagation.cross_moments import cross


@cross_by_kind.register(Merge)
def cross_by_kind_of_merge(node: Merge, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    return _taken_apart(a, b, frame)


@cross_by_kind.register(Split)
def cross_by_kind_of_split(node: Split, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """None where b cannot be read over the axis that was split."""
    own = _factor_places(a)
    if not set(own) & set(b.bind) or (isinstance(b.node, Split) and _factor_places(b) == own):
        return _put_together(a, b, frame)
    return None


def _factor_places(view: View) -> tuple[int, ...]:
    k, sizes = view.node.params
    return view.bind[k : k + len(sizes)]


def _put_together(x: View, y: View, frame: Sequence[Axis]) -> np.ndarray:
    """The factors of an axis, read as the axis that they are of: y's too, where it has them."""
    gone = _factor_places(x)
    place = {p: i for i, p in enumerate(p for p in range(len(frame)) if p not in gone)}
    last = len(place)

    def whole(view: View) -> View:
        rest = tuple(place[p] for p in view.bind if p not in gone)
        if len(rest) == len(view.bind):
            return View(view.node, rest)
        k = view.node.params[0]
        return View(view.node.args[0].node, (*rest[:k], last, *rest[k:]))

    views = whole(x), whole(y)
    (axis, *others) = [view.node.axes[view.bind.index(last)] for view in views if last in view.bind]
    axis = join(axis, *others) if others else axis
    wide = (*(frame[p] for p in place), axis)
    factors, types = split_axis(axis, tuple(frame[p].size for p in gone))
    table = np.take(np.broadcast_to(cross(*views, wide), [a.types for a in wide]), types, axis=last)
    return lift(table, (*wide[:-1], *factors), (*place, *gone), frame, pairs=True)


def _taken_apart(x: View, y: View, frame: Sequence[Axis]) -> np.ndarray:
    """An axis that was put together, read as its factors, into which y's is split."""
    k, count = x.node.params
    source, at, more = x.node.args[0].node, x.bind[k], count - 1
    sizes = tuple(axis.size for axis in source.axes[k : k + count])

    def widened(bind: Sequence[int], cut: int | None) -> tuple[int, ...]:
        """Places in the wider frame; the axis `cut`, if any, becomes the factors."""
        own: list[tuple[int, ...]] = [((p,) if p < at else (p + more,)) for p in bind]
        if cut is not None:
            own[cut] = tuple(range(at, at + count))
        return tuple(p for places in own for p in places)

    cut = y.bind.index(at) if at in y.bind else None
    views = (
        View(source, widened(x.bind, k)),
        View(y.node if cut is None else split(y.node, cut, sizes), widened(y.bind, cut)),
    )
    factors = list(split_axis(frame[at], sizes)[0])
    for node, bind in views:
        for axis, p in zip(node.axes, bind, strict=True):
            if at <= p < at + count:
                factors[p - at] = join(factors[p - at], axis)
    wide = (*frame[:at], *factors, *frame[at + 1 :])
    table = np.array(np.broadcast_to(cross(*views, wide), [a.types for a in wide]))
    return merge_types(table, at, factors, frame[at])
