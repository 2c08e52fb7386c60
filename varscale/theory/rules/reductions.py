"""Reductions. A sum is its count times a mean; a mean of means is a mean, a mean of a sum the sum of means."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import special

from varscale.theory.domain.axes import Axis, contract_axis
from varscale.theory.domain.tables import Table
from varscale.theory.graph import layout
from varscale.theory.graph.expressions import Apply, Sum, affine, apply, total
from varscale.theory.graph.layout import Atom, Value
from varscale.theory.graph.nodes import Array, Constant, Node, View, array
from varscale.theory.graph.reshapes import Split
from varscale.theory.integrals.hermite_series import Z, sphere_squares
from varscale.theory.interpreter.interpreter import Interpreter, rule
from varscale.theory.propagation.fluctuations import Spread, combine, full, handed_on, inherited
from varscale.theory.propagation.shared_component import of_an_average

# Set on the validation grid, not derived, both: of the second moment of a maximum, a factor of e in how many it is over; of the
# gradient through one, whose largest entry is not independent of what flows back.
_TAIL, TIES = 0.05, 0.15
_IMMENSE = 1e9  # as far from 0 as what stands for infinity is, at least


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
        from varscale.theory.propagation.cross_means import cross_mean

        return cross_mean(a, b, frame)


@handed_on.register
def _(node: Mean) -> Spread:
    inner = node.args[0].node
    if isinstance(inner, Apply) and inner.params == ("integer_pow", (2,)):
        return combine([(2.0, full(inner.args[0].node))])
    return of_an_average(node, inherited(inner))


def mean_pullback(cotangent: np.ndarray, reduced: Sequence[int], axes: Sequence[Axis]) -> np.ndarray:
    """The same cotangent at every position, over their number."""
    for k in sorted(reduced):
        cotangent = np.repeat(np.expand_dims(cotangent, k), axes[k].types, axis=k) / axes[k].size ** 2
    return cotangent


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
    if isinstance(node, Apply) and node.params[0] == "integer_pow":
        node = _powers_apart(node, axes)
    if isinstance(node, Apply) and node.params[0] in ("mul", "div"):
        x, y = node.args
        # A factor that is constant along the axes comes out.
        if not any(b in axes for b in y.bind) or (node.params[0] == "mul" and not any(b in axes for b in x.bind)):
            return apply(graph, node.params[0], node.params[1], left, [inside(x), inside(y)])
        if (product := _factors_apart(node, axes)) is not None:
            return mean_node(product, axes)
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


def _factors_apart(node: Apply, axes: Sequence[int]) -> Node | None:
    """x (x y) as x² y, where y is constant along the axes; None where no factor is."""
    from varscale.theory.propagation.expectations import factors

    graph, whole = node.graph, tuple(range(len(node.axes)))
    number, parts = factors(View(node, whole))
    constant = [view for view in parts if not any(b in axes for b in view.bind)]
    if not constant or len(constant) == len(parts):
        return None
    varied = dict.fromkeys(view for view in parts if view not in constant)
    powers = [View(apply(graph, "integer_pow", (parts.count(x),), node.axes, [x]), whole) for x in varied]
    *_, product = itertools.accumulate(powers, lambda x, y: View(apply(graph, "mul", (), node.axes, [x, y]), whole))
    *_, outer = itertools.accumulate(constant, lambda x, y: View(apply(graph, "mul", (), node.axes, [x, y]), whole))
    return affine(apply(graph, "mul", (), node.axes, [product, outer]), number, 0.0)


def _powers_apart(node: Apply, axes: Sequence[int]) -> Node:
    """(x y)ⁿ as xⁿ yⁿ, where one factor is constant along the axes: the scale of a norm comes out of the next norm's mean."""
    (inner, bind), graph = node.args[0], node.graph
    if not isinstance(inner, Apply) or inner.params[0] not in ("mul", "div"):
        return node
    parts = [view.within(bind) for view in inner.args]
    if all(any(b in axes for b in view.bind) for view in parts):
        return node
    whole = [View(x, tuple(range(len(x.axes)))) for x, _ in parts]
    name, extra = node.params
    powers = [apply(graph, name, extra, view.node.axes, [view]) for view in whole]
    views = [View(x, view.bind if x.axes else ()) for x, view in zip(powers, parts, strict=True)]
    return apply(graph, inner.params[0], (), node.axes, views)


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


class OneOfMany(Node):
    """What one of many that are alike decides, any of them as likely: an extreme, and what is as smooth as that."""

    @property
    def reduced(self) -> tuple[int, ...]:
        """The axes that the many are along."""
        raise NotImplementedError(type(self).__name__)

    def sampled(self, reduce: Callable[[np.ndarray, tuple[int, ...]], np.ndarray], count: int | None = None) -> Table:
        """Its moments: the reduced axes whole, the others two long."""
        from varscale.theory.rules.sampled_primitive import sample_map

        axes, source = self.reduced, self.args[0].node
        count = count or math.prod(source.axes[k].size for k in axes)
        # The larger the set, the more the tail decides; and of what a few numbers decide there is no Gaussian tail.
        self.graph.flag("sampled", _TAIL * math.log(count) + bounded(count, narrowest(source)))
        return sample_map([source], [set(axes)], self.axes, lambda x: reduce(x, tuple(k + 1 for k in axes)))

    def cross_with(self, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
        """Σ E[∂f/∂x_k] Cov(x_k, y) = Cov(mean x, y) for Gaussians that are alike (Stein): the slopes add up to 1."""
        from varscale.theory.propagation.cross_moments import cross, mean_product

        x = self.args[0].node
        if any(x.axes[k].labels is not None for k in self.reduced) or not (_is_gaussian(x) and _is_gaussian(b.node)):
            return None
        mean = View(mean_node(x, self.reduced), a.bind)
        return mean_product(a, b, frame) + cross(mean, b, frame) - mean_product(mean, b, frame)


def _is_gaussian(node: Node) -> bool:
    """Whether a node may be taken for Gaussian: no function of others, and of no law of its own."""
    from varscale.theory.propagation.expectations import marginal

    while isinstance(node, Apply) and node.params[0] == "affine":
        node = node.args[0].node
    return not isinstance(node, Apply | OneOfMany) and marginal(node).gaussian


class Extreme(OneOfMany):
    """Maximum (or minimum) over axes; `params` is (axes, sign, count). Sampled."""

    how = "sampled"
    gradient_doubt = TIES

    @property
    def reduced(self) -> tuple[int, ...]:
        return self.params[0]

    def compute(self) -> Table:
        _, sign, count = self.params
        return self.sampled(lambda x, axes: (sign * x).max(axis=axes) * sign, count)

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


def is_identity(start: float, name: str) -> bool:
    """Whether a maximum or minimum is nothing else for having started with this: the least number there is, or as good as."""
    return (start if name == "max" else -start) <= -_IMMENSE


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
    from varscale.theory.rules.sampled_primitive import sampled

    return sampled(interpreter, eqn, *xs)
