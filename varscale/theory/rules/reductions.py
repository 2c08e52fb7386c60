"""Reductions. A sum is its count times a mean; a mean of means is a mean, a mean of a sum the sum of means."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import special

from varscale.theory import layout
from varscale.theory.axes import Axis, apply_axis, contract_axis
from varscale.theory.elementwise import Apply, Sum, affine, apply, total
from varscale.theory.graph import Array, Constant, Node, View, array
from varscale.theory.hermite import Z, sphere_squares
from varscale.theory.interpreter import Interpreter, rule
from varscale.theory.layout import Atom, Value
from varscale.theory.moments import Table
from varscale.theory.rearranged import Split
from varscale.theory.rules.structure import Take
from varscale.theory.spread import Spread, combine, full, handed_on, inherited

# Set on the validation grid, not derived, both: of the second moment of a maximum, a factor of e in how many it is over; of the
# gradient through one, whose largest entry is not independent of what flows back.
_TAIL, TIES = 0.05, 0.15


class Mean(Node):
    """The mean over some axes; `params` is those axes. Gaussian, unless what it averages is positive (then lognormal)."""

    averages = True

    def prepare(self) -> None:
        self.odd, self.positive = self.args[0].node.odd, self.args[0].node.positive

    def compute(self) -> Table:
        table = self.args[0].node.table
        mean, second = table.mean, table.second
        for k in reversed(self.params):
            axis = table.axes[k]
            mean, second = contract_axis(mean, k, axis.counts / axis.size), contract_axis(second, k, axis.any_pair)
        return Table(self.axes, mean, second)

    def pullback(self, cotangent: np.ndarray) -> list[np.ndarray | None]:
        return [mean_pullback(cotangent, self.params, self.args[0].node.axes)]

    def inside(self, k: int, cut: Callable[[Node, int], Node]) -> Node:
        """The mean of what was cut: a part of a normalised row is still known to be normalised by the row's own mean."""
        inner = self.args[0].node
        at = [j for j in range(len(inner.axes)) if j not in self.params][k]
        part = cut(inner, at)
        return mean_node(part, [j if j < at else j + len(part.axes) - len(inner.axes) for j in self.params])

    def cross_with(self, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
        """E[mean(x) y]: where y does not run over the averaged axes, averaging x there changes nothing (projection)."""
        return _cross_mean(a, b, frame)


@handed_on.register
def _(node: Mean) -> Spread:
    inner = node.args[0].node
    if isinstance(inner, Apply) and inner.params == ("integer_pow", (2,)):
        return combine([(2.0, full(inner.args[0].node))])
    return inherited(inner)


def mean_pullback(cotangent: np.ndarray, reduced: Sequence[int], axes: Sequence[Axis]) -> np.ndarray:
    """The same cotangent at every position, over their number."""
    for k in sorted(reduced):
        cotangent = np.repeat(np.expand_dims(cotangent, k), axes[k].types, axis=k) / axes[k].size ** 2
    return cotangent


def _cross_mean(a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    from varscale.theory.cross import cross

    x, reduced = a.node.args[0].node, a.node.params
    # Axes of y that mean(x) does not run over: by exchangeability y may be averaged over them.
    spare = [k for k, place in enumerate(b.bind) if place not in a.bind]
    part = _part_of_averaged(a.node, b, [b.bind[k] for k in spare])
    if part is not None:
        return cross(a, part, frame)
    if isinstance(b.node, Mean):
        y, theirs = b.node.args[0].node, b.node.params
        if [x.axes[k].size for k in reduced] == [y.axes[k].size for k in theirs]:
            # Both averaged over axes of the same sizes: pair those up.
            wide = (*frame, *(x.axes[k] for k in reduced))
            extra = list(range(len(frame), len(wide)))
            mine, other = _wide_bind(a, x, extra), _wide_bind(b, y, extra)
            out = cross(View(x, mine), View(y, other), wide)
            for d in reversed(extra):
                out = contract_axis(
                    np.broadcast_to(out, [*out.shape[:d], wide[d].types, *out.shape[d + 1 :]]), d, wide[d].any_pair
                )
            return out
    partner = _matched([x.axes[k].size for k in reduced], [(b.bind[k], b.node.axes[k].size) for k in spare])
    if partner is not None:
        # y runs over what x is averaged over: pair index k' of x with index k of y, and average over k'.
        own, new = iter(a.bind), iter(partner)
        mine = tuple(next(new) if k in reduced else next(own) for k in range(len(x.axes)))
        table = cross(View(x, mine), b, frame)
        for d in partner:
            table = np.broadcast_to(table, [*table.shape[:d], frame[d].types, *table.shape[d + 1 :]])
            table = apply_axis(table, d, _over_first(frame[d]))
        return table
    if spare and all(b.node.axes[k].labels is None for k in spare):
        averaged = mean_node(b.node, spare)
        if isinstance(averaged, Constant):
            return None
        rest = tuple(place for k, place in enumerate(b.bind) if k not in spare)
        return cross(a, View(averaged, rest), frame)
    return None


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


def _wide_bind(view: View, source: Node, extra: Sequence[int]) -> tuple[int, ...]:
    reduced = view.node.params
    own, new = iter(view.bind), iter(extra)
    return tuple(next(new) if k in reduced else next(own) for k in range(len(source.axes)))


def mean_node(node: Node, axes: Sequence[int]) -> Node:
    """The mean of a node over some of its axes, in normal form."""
    places = tuple(sorted(axes))
    if not places or isinstance(node, Constant):
        return node
    return node.graph.once(("mean", node.id, places), lambda: _mean_node(node, places))


def _mean_node(node: Node, axes: tuple[int, ...]) -> Node:
    graph = node.graph
    left = tuple(a for k, a in enumerate(node.axes) if k not in axes)
    new = {k: i for i, k in enumerate(k for k in range(len(node.axes)) if k not in axes)}
    if isinstance(node, Array):
        return array(graph, node.values.mean(axis=axes), left)

    def inside(view: View) -> View:
        averaged = mean_node(view.node, [j for j, b in enumerate(view.bind) if b in axes])
        return View(averaged, () if isinstance(averaged, Constant) else tuple(new[b] for b in view.bind if b not in axes))

    def spread(cotangent: np.ndarray) -> np.ndarray:
        return mean_pullback(cotangent, axes, node.axes)

    if isinstance(node, Sum):
        return graph.derive(node, total(graph, node.params, left, [inside(v) for v in node.args]), spread)
    if isinstance(node, Apply) and node.params[0] == "affine":
        c, d = node.params[1]
        view = inside(node.args[0])
        if tuple(view.node.axes) == left and view.bind == tuple(range(len(left))):
            return affine(view.node, c, d)
        if isinstance(view.node, Constant):
            return affine(view.node, c, d)
        return graph.make(Apply, left, [view], ("affine", (c, d)))
    if isinstance(node, Apply) and node.params[0] in ("mul", "div"):
        x, y = node.args
        # A factor that is constant along the axes comes out.
        if not any(b in axes for b in y.bind) or (node.params[0] == "mul" and not any(b in axes for b in x.bind)):
            return apply(graph, node.params[0], node.params[1], left, [inside(x), inside(y)])
    if isinstance(node, Mean):
        places = [k for k in range(len(node.args[0].node.axes)) if k not in node.params]
        return mean_node(node.args[0].node, [*node.params, *(places[k] for k in axes)])
    if isinstance(node, Split):
        k, sizes = node.params
        factors = range(k, k + len(sizes))
        if set(factors) <= set(axes):  # all factors of an axis are the axis
            whole = [j if j < k else j - len(sizes) + 1 for j in axes if j not in factors]
            return mean_node(node.args[0].node, [k, *whole])
    return graph.make(Mean, left, [View(node, tuple(range(len(node.axes))))], axes)


def over(x: Value, dims: Sequence[int]) -> tuple[list[int], Value]:
    """The node's axes behind some dimensions, and the layout without them."""
    axes = [a.axis for d in dims for a in x.dims[d] if a.axis is not None]
    left = [k for k in range(len(x.node.axes)) if k not in axes]
    place = {k: i for i, k in enumerate(left)}
    kept = [dim for d, dim in enumerate(x.dims) if d not in dims]
    return axes, Value(x.node, tuple(tuple(a if a.axis is None else Atom(a.size, place[a.axis]) for a in dim) for dim in kept))


def without_axes(x: Value, node: Node) -> Value:
    """A layout over `node`; if it became a constant, no atom has an axis."""
    dims = x.dims if node.axes else tuple(tuple(Atom(a.size, None) for a in dim) for dim in x.dims)
    return Value(node, dims)


def mean(x: Value, dims: Sequence[int]) -> Value:
    """The mean over dimensions."""
    axes, left = over(x, dims)
    return without_axes(left, mean_node(x.node, axes))


@rule("reduce_sum")
def reduce_sum(interpreter: Interpreter, eqn: Any, x: Value) -> Value:
    dims = [d % len(x.dims) for d in eqn.params["axes"]]
    count = math.prod(x.shape[d] for d in dims)
    out = mean(x, dims)
    return without_axes(out, affine(out.node, float(count), 0.0))


class Extreme(Node):
    """Maximum (or minimum) over axes; `params` is (axes, sign, count). Sampled: the reduced axes whole, the others two long."""

    how = "sampled"
    gradient_doubt = TIES

    def compute(self) -> Table:
        from varscale.theory.rules.sampled import sample_map

        axes, sign, count = self.params
        # The larger the set, the more the tail decides; and of what a few numbers decide there is no Gaussian tail.
        self.graph.flag("sampled", _TAIL * math.log(count) + bounded(count, narrowest(self.args[0].node)))

        def reduce(x: np.ndarray) -> np.ndarray:
            return (sign * x).max(axis=tuple(k + 1 for k in axes)) * sign

        return sample_map([self.args[0].node], [set(axes)], self.axes, reduce)

    def pullback(self, cotangent: np.ndarray) -> list[np.ndarray | None]:
        """Each cotangent goes to the one entry that was the extreme: one in `count`, and no two of a window share it."""
        axes, _, _ = self.params
        source = self.args[0].node.axes
        out = cotangent
        for k in sorted(axes):
            n = source[k].size
            types = np.zeros(source[k].types)
            types[: source[k].classes] = 1 / n
            out = np.moveaxis(np.multiply.outer(types, out), 0, k)
        return [out]


def narrowest(node: Node) -> float:
    """The fewest numbers that a position was made from by weights, anywhere on the way."""
    from varscale.theory.rules.linear import weight_of

    width, seen, pending = math.inf, {node.id}, [node]
    while pending:
        node = pending.pop()
        if weight_of(node) is not None:
            width = min(width, math.inf if node.width is None else float(node.width))
        before = {v.node.id: v.node for v in node.args if v.node.id not in seen}
        seen.update(before)
        pending += before.values()
    return width


@functools.cache
def bounded(count: int, width: float) -> float:
    """By how much the largest square of `count` Gaussians exceeds that of one coordinate of points on a sphere.

    What a norm makes of points of few dimensions lies on such a sphere, and its features are bounded there.
    """
    if width == math.inf:
        return 0.0
    share = special.ndtr(Z)
    weights = np.diff(share**count, prepend=0.0)
    return float(max((weights @ Z**2) / (weights @ sphere_squares(width)) - 1, 0.0))


Steps = list[tuple[str, float, float]]


def outside(x: Value) -> tuple[Value, Steps]:
    """max f(x) = f(max x) for increasing f: what is inside a chain of increasing steps, and the steps, innermost first."""
    steps: Steps = []
    while isinstance(node := x.node, Apply):
        name, extra = node.params
        numbers = [v.node.params for v in node.args if isinstance(v.node, Constant)]
        inner = [v for v in node.args if not isinstance(v.node, Constant)]
        if len(inner) != 1 or len(inner[0].bind) != len(node.axes):
            break
        if name == "affine" and extra[0] > 0:
            steps.append((name, *extra))
        elif name == "max":
            steps.append((name, numbers[0], 0.0))
        else:
            break
        place = {b: k for k, b in enumerate(inner[0].bind)}
        dims = tuple(tuple(a if a.axis is None else a._replace(axis=place[a.axis]) for a in dim) for dim in x.dims)
        x = Value(inner[0].node, dims)
    return x, steps[::-1]


def restored(interpreter: Interpreter, x: Value, steps: Steps) -> Value:
    """The increasing steps, taken again."""
    for name, c, d in steps:
        if name == "affine":
            x = Value(affine(x.node, c, d), x.dims)
        else:
            x = interpreter.elementwise("max", x, layout.full(interpreter.graph, c, x.shape))
    return x


@rule("reduce_max", "reduce_min")
def reduce_max(interpreter: Interpreter, eqn: Any, x: Value) -> Value:
    dims = [d % len(x.dims) for d in eqn.params["axes"]]
    x, steps = outside(x)
    axes, left = over(x, dims)
    if not axes:
        return restored(interpreter, left, steps)
    count = math.prod(x.node.axes[k].size for k in axes)
    sign = 1.0 if eqn.primitive.name == "reduce_max" else -1.0
    kept = [a for k, a in enumerate(x.node.axes) if k not in axes]
    node = interpreter.graph.make(
        Extreme, kept, [View(x.node, tuple(range(len(x.node.axes))))], (tuple(sorted(axes)), sign, count)
    )
    return restored(interpreter, without_axes(left, node), steps)


@rule("reduce_and", "reduce_or", "reduce_prod", "argmax", "argmin")
def sampled_reduction(interpreter: Interpreter, eqn: Any, *xs: Value) -> Any:
    from varscale.theory.rules.sampled import sampled

    return sampled(interpreter, eqn, *xs)
