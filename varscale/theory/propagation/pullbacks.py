"""Pullbacks of the core kinds of nodes: second moments of the cotangents of their arguments.

A fork is two paths that carry one cotangent to one value. Of y = l + exp(l) the gradient at l is G(1 + e^l), and E[(1 + e^l)²]
is not 1 + E[e^2l]. Each path's own part is passed back by the nodes on it; what is worked out here is the rest,
Σ_{p≠q} E[s_p s_q] over pairs of paths with slopes s.

Tables do not tell near places from far ones. But cotangents of near places are correlated behind windows, and windows that
overlap, or copies, add them up. The error of that is bounded here; where it is large, the whole model is drawn.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from varscale.theory.domain.axes import Axes, apply_axis, average, contract_axes, rest
from varscale.theory.domain.axis_maps import AxisMap, adjoint, pair_counts
from varscale.theory.domain.tables import full_types, lift
from varscale.theory.graph.convolutions import Conv, WindowMax, WindowSum
from varscale.theory.graph.expressions import Apply, Mean, Sum, as_affine, is_mean_of, roots, swapped, trees
from varscale.theory.graph.linear_nodes import (
    Concat,
    Contract,
    Gather,
    Mapped,
    Merge,
    Take,
    constant_along,
    mapped_over,
)
from varscale.theory.graph.nodes import Array, Leaf, Node, View, number, pullback
from varscale.theory.graph.normal_form import derivative, mean_pullback
from varscale.theory.graph.store import BackwardNotes, Flows, once_per_node
from varscale.theory.propagation.cross_moments import cross
from varscale.theory.propagation.marginals import cofactors


@dataclasses.dataclass(frozen=True, eq=False)
class Cotangent:
    """What flows back into a node: its second moments by type, and a bound on their relative error."""

    second: np.ndarray
    doubt: float = 0.0
    # The last derivative it was multiplied by, if nothing random came between: a stream's next is correlated.
    mask: View | None = None
    few: float = math.inf  # the fewest numbers that it passed through
    # a = d ln(mean square)/d ln Q through later layers, Q the second moment of values at one place.
    scale: float = 0.0
    own: float = 0.0  # the same, through the last derivative it was multiplied by
    radial: float = 0.0  # e: its part along the node's values over that along any other direction, less one
    weights: float = 0.0  # d ln(mean square)/d ln of the square of one unit's weights, beside that
    unit: float = 0.0  # what a unit's square, relative, adds to ln(mean square), for its part in the next sum
    # How much more than any two places near ones have in common at most, relative to the mean square.
    near: float = 0.0
    lost: float = 0.0  # the part of `doubt` that comes of that, and of what units share


def sum_out(second: np.ndarray, frame: Axes, view: View) -> np.ndarray:
    """A frame's cotangent moments, summed over the axes that the viewed node does not have, by the node's own types."""
    kept = sorted(view.bind)
    out = contract_axes(full_types(second, frame), {k: frame[k].pairs for k in rest(frame, kept)})
    axes, places = [frame[b] for b in kept], [view.bind.index(b) for b in kept]
    return lift(out, axes, places, view.node.axes, pairs=True)


def mean_part(second: np.ndarray, axes: Sequence[int], frame: Axes) -> np.ndarray:
    """E[g ḡ'] = E[ḡ ḡ'] of the means ḡ of a cotangent over some axes, for exchangeable positions: E[(g − ḡ)²] is less by it."""
    return np.expand_dims(contract_axes(second, {k: frame[k].any_pair for k in axes}), tuple(axes))


@pullback.register
def pullback_of_sum(node: Sum, cotangent: np.ndarray, notes: BackwardNotes) -> Flows:
    out: Flows = []
    for i, (c, view) in enumerate(node.terms):
        passed = cotangent
        if i in node.centring:
            centred = [k for k in view.bind if k not in node.args[node.centring[i]].bind]
            passed = cotangent - mean_part(cotangent, centred, node.axes)
        taken = i in node.centring.values()
        out.append(None if taken else c * c * sum_out(passed, node.axes, view))
    return out


@pullback.register
def pullback_of_mean(node: Mean, cotangent: np.ndarray, notes: BackwardNotes) -> Flows:
    return [mean_pullback(cotangent, node.params, node.argument.axes)]


_MOST_PATHS = 64  # from one node: where there are more, they are not followed further down


class Fork(NamedTuple):
    """A value that a cotangent reaches by two paths or more."""

    root: View  # the value, in the frame of the node, or of what `over` reduces
    squares: np.ndarray  # E[s_p s_q] of two paths, by type
    over: View | None = None  # the mean that both of them go through first, as the node's argument
    maps: tuple[Mapping[int, AxisMap], ...] = ()  # of axes of the frame, by path
    # Axes of the frame over which one goes through a mean, and the other does not.
    beside: tuple[int, ...] = ()

    def back(self, part: Cotangent, frame: Axes) -> Cotangent:
        """What the pairs of paths add to the value's cotangent, from the node's."""
        second = part.second
        if self.over is not None:
            inner = self.over.node.argument.axes
            second = mean_pullback(sum_out(second, frame, self.over), self.over.node.reduced, inner)
            frame = inner
        second = full_types(mean_part(second, self.beside, frame) * self.squares, frame)
        inner, axes = list(frame), self.root.node.axes
        for own, place in zip(axes, self.root.bind, strict=True):
            if any(place in maps for maps in self.maps):
                both = [mapped_over(maps.get(place), frame[place], own) for maps in self.maps]
                second = apply_axis(second, place, adjoint(pair_counts(*both), frame[place], own))
                inner[place] = own
        second = sum_out(second, inner, self.root)
        second = second + swapped(second, axes)  # of either path first
        return Cotangent(second, part.doubt, few=part.few, near=part.near, lost=part.lost)


class _Path(NamedTuple):
    """A way from a node down to a value."""

    branch: int  # number of the node's argument, or root, that it goes through: `begins`
    view: View  # the value, in the node's frame, or in that of what `over` reduces
    factor: float = 1.0  # product of the weights of the sums on the way
    slope: View | None = None  # derivative of the function on the way; None where it is 1
    over: Any = None  # the reduction on the way, as the node's argument
    begins: Any = None
    maps: Mapping[int, AxisMap] = {}  # on the way, of axes of the node's frame

    @property
    def place(self) -> Hashable:
        """Equal for paths to one value, in one frame: a sum of means over the same axes is the mean of a sum."""
        over = self.over
        if over is not None and over.node.averages:
            over = over.node.params, over.node.argument.axes, over.bind
        return self.view, over


@once_per_node
def forks(node: Node) -> list[Fork]:
    """The values at which paths from a sum or a function meet first, each looked for from the latest node down."""
    begun = enumerate(_below(_Path(0, node.whole)) if isinstance(node, Apply | Sum) else ())
    waiting = [path._replace(branch=i, begins=path.view.node) for i, path in begun]
    found = list[Fork]()
    while len({path.branch for path in waiting}) > 1 and len(waiting) <= _MOST_PATHS:
        top = max((path.view.node for path in waiting), key=lambda below: below.id)
        here = [path for path in waiting if path.view.node is top]
        waiting = [path for path in waiting if path.view.node is not top]
        pairs = [(p, q) for p, q in itertools.combinations(here, 2) if p.branch != q.branch]
        for p, q in pairs:
            over = p.over or q.over
            axes = over.node.argument.axes if over else node.axes
            if p.place == q.place and _over_one_grid(p, q, axes):
                found.append(Fork(p.view, _both(p, q, axes), p.over, (p.maps, q.maps)))
            elif over and not (p.over and q.over):
                ends = (q, p) if p.over else (p, q)
                if not _is_centred(node, *ends) and (beside := _beside_its_mean(*ends, node.axes)):
                    found.append(beside)
        if not pairs or isinstance(top, Apply):
            waiting += [inner for path in here for inner in _below(path)]
    return found


def _beside_its_mean(p: _Path, q: _Path, frame: Axes) -> Fork | None:
    """The fork of a value reached directly (p) and through a mean of it, or what follows shifts as a mean does (q); else None.

    What a norm does to a sum that is centred as a whole is none: what it takes away goes with its scale. But a term that
    lacks an axis of that mean (a time that is added at all places) collects what is left of it along the axis.
    """
    beside = tuple(p.view.bind[k] for k in q.over.node.reduced)
    kept = tuple(place for place in p.view.bind if place not in beside)
    if kept != q.over.bind or q.view != q.view.node.whole:
        return None
    if q.slope:
        q = q._replace(slope=q.slope.within(p.view.bind))
    return Fork(p.view, _both(p, q, frame), beside=beside)


def _over_one_grid(p: _Path, q: _Path, frame: Axes) -> bool:
    """Whether the axes of the value that are not the frame's own are mapped on both paths."""
    pairs = zip(p.view.node.axes, p.view.bind, strict=True)
    return all(a.size == frame[at].size or (at in p.maps and at in q.maps) for a, at in pairs)


def _both(p: _Path, q: _Path, frame: Axes) -> np.ndarray:
    """E[s_p s_q] of the slopes along two paths."""
    one = number(p.view.node.graph, 1.0).whole
    return p.factor * q.factor * cross(p.slope or one, q.slope or one, frame)


def _is_centred(node: Node, p: _Path, q: _Path) -> bool:
    """Whether a sum takes away the mean of one of its terms, or a function that of a root which has as many axes as it."""
    if isinstance(node, Sum):
        return node.centring.get(p.branch) == q.branch
    lacks = len(p.begins.axes) - len(p.view.bind) > len(q.begins.axes) - len(q.over.bind)
    return not lacks and is_mean_of(q.begins, p.begins)


def _below(path: _Path) -> Iterator[_Path]:
    """The paths through a sum, through one function, or through a reduction before it."""
    node, bind = path.view
    if isinstance(node, Sum) and path.over is None:
        for c, view in node.terms:
            yield path._replace(view=view.within(bind), factor=path.factor * c)
    elif isinstance(node, Apply) and path.slope is None and not path.maps:
        # A norm's groups have a rule of their own.
        grouped = {member for group in cofactors(node).values() if len(group) > 1 for member in group}
        for root in (*roots(node), *(x for x in trees(node) if x.node.primitive == "row")):
            known = root.node.is_bits or isinstance(root.node, Array) or root in grouped
            if not known and (slope := derivative(node, root)) is not None:
                yield path._replace(view=root.within(bind), slope=slope.within(bind))
    elif path.over is None and (inner := Mapped(path.factor, path.view, path.maps).before()):
        scale, _, view = as_affine(inner.view)
        yield path._replace(factor=inner.factor * scale, view=view, maps=inner.maps)
    elif path.over is None and not path.maps and node.follows_shifts and path.slope is None:
        scale, _, view = as_affine(node.argument.whole)
        yield path._replace(view=view, factor=path.factor * scale, over=path.view)


@functools.singledispatch
def selected(node: Node) -> View | None:
    """What decides which entries of its argument get a node's cotangent: a function m of theirs, one in E[m²]; None: all do."""
    return None


def _overlaps(node: Node, i: int) -> tuple[Sequence[int], float]:
    """Axes of argument i whose windows make near cotangents alike, and how many windows or copies meet in one entry."""
    if isinstance(node, WindowSum):  # of sums those of one window have its cotangent, of maxima one
        windows = [(k, w) for w, k in zip(*node.params[:2], strict=True) if w is not None and k is not None]
        summed = [] if isinstance(node, WindowMax) else [k for k, w in windows if w.taps > 1]
        return summed, math.prod(max(w.taps / w.stride, 1.0) for _, w in windows)
    if isinstance(node, Gather | Merge):
        return (), copies(node)
    if isinstance(node, Contract) and node.params and isinstance(matrix := node.args[1 - i].node, Array):
        # The products of any two of a cotangent's terms are in doubt, too.
        squares = np.square(matrix.values).sum() * matrix.axes[0].size
        met = max(float(np.square(matrix.values.sum()) / squares), 1.0)
        return node.args[i].axes_at(node.summed), met
    return (), 1.0


def pulled_back(node: Node, i: int, part: Cotangent) -> Cotangent:
    """The cotangent of argument i, with what near places have in common as the node leaves it, and the doubt for it."""
    (along, met), near = _overlaps(node, i), 0.0 if node.averages else part.near
    if along:  # how much less alike than the same two places along these axes are, relative to a mean square
        axes = node.args[i].node.axes
        own, other = average(part.second, axes), average(part.second, axes, apart=along)
        near = max(near, float(np.clip(1 - other / own, 0.0, 1.0)) if own > 0 else 0.0)
    lost = part.near * (met - 1)
    return dataclasses.replace(part, near=near, doubt=part.doubt + lost, lost=part.lost + lost)


def copies(node: Node) -> float:
    """How many places near one another hold one and the same entry: of what is looked up, or merged with repeats of itself."""
    source = node.argument
    if isinstance(node, Merge):
        k, sizes = node.params
        return math.prod(n for j, n in enumerate(sizes, k) if constant_along(source, j))
    drawn = isinstance(source, Leaf) and not source.is_input
    known = node.line if isinstance(node, Gather) and not drawn else None
    return 1.0 if known is None else len(known) / len(np.unique(known))


@once_per_node
def repeats(node: Node) -> bool:
    """Whether near places of an array may be copies of one another, or averages of the same numbers, by known weights."""
    matrix = isinstance(node, Contract) and node.params and any(isinstance(x, Array) for x in node.sources)
    if isinstance(node, Conv | WindowSum):
        known = isinstance(node, Conv) and not node.args[1].node.deps
        read = (w for w in node.params.windows if w is not None and (known or w.weights))
        matrix = any((w.taps - 1) * w.dilation >= w.stride for w in read)
    if matrix or (isinstance(node, Merge | Gather) and copies(node) > 1):
        return True
    return not isinstance(node, Mean) and any(map(repeats, node.sources))


@once_per_node
def meets_itself(node: Node) -> bool:
    """Whether near places of an array are made of the same entries: of an array and itself shifted along places, in one sum."""
    shifted = [_entries_of(x) for x in node.sources if _is_shifted(x)]
    others = [_entries_of(x) for x in node.sources if not _is_shifted(x)]
    met = isinstance(node, Apply | Sum) and any(a & b for a, b in itertools.product(shifted, others))
    return met or any(map(meets_itself, node.sources))


def _is_shifted(node: Node) -> bool:
    """Whether it is a part of what was joined along places, which are no last axis."""
    while isinstance(node, Take):
        node = node.argument
    return isinstance(node, Concat) and node.params[0] < len(node.axes) - 1


def _entries_of(node: Node) -> set[Node]:
    """The arrays of which a node's entries are entries, or functions of them."""
    read = node.sources if isinstance(node, Apply | Concat | Take) else ()
    return set[Node]().union(*map(_entries_of, read)) if read else {node}
