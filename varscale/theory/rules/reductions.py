"""Reductions. A sum is its count times a mean; a mean of means is a mean, a mean of a sum the sum of means.

Extremes, of which no formula gives the moments, are drawn by themselves, at other sizes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import special

from varscale.theory.domain.axes import Axis, pool, refine
from varscale.theory.domain.tables import LEADING_ORDER, NEXT_ORDER, Table, estimate, gaussian, over_frame
from varscale.theory.graph import layout
from varscale.theory.graph.expressions import Apply, Mean, roots
from varscale.theory.graph.layout import Atom, Value
from varscale.theory.graph.linear_nodes import weight_of
from varscale.theory.graph.nodes import (
    UNKNOWN,
    Array,
    Constant,
    Node,
    View,
    cross_by_kind,
    pullback,
    second_moments,
)
from varscale.theory.graph.normal_form import affine, mean_node
from varscale.theory.graph.store import BackwardNotes, once_per_node
from varscale.theory.integrals.hermite_series import Z, read_off, sphere_squares
from varscale.theory.propagation.cross_moments import cross, mean_product
from varscale.theory.propagation.fluctuations import fluctuations
from varscale.theory.propagation.inherited_fluctuations import Spread, combine, inherited, propagated
from varscale.theory.propagation.marginals import concentrated, evaluate, marginal
from varscale.theory.propagation.shared_component import of_an_average
from varscale.theory.rules.registry import Context, rule


@propagated.register(Mean)
def propagated_of_mean(node: Mean) -> Spread:
    inner = node.args[0].node
    if isinstance(inner, Apply) and inner.params == ("integer_pow", (2,)):
        return combine([(2.0, fluctuations(inner.args[0].node))])
    return of_an_average(node, inherited(inner))


def axes_behind(x: Value, dims: Sequence[int]) -> tuple[list[int], Value]:
    """The node's axes behind some dimensions, and the layout without them."""
    axes = [a.axis for d in dims for a in x.dims[d] if a.axis is not None]
    left = [k for k in range(len(x.node.axes)) if k not in axes]
    place = {k: i for i, k in enumerate(left)}
    kept = [dim for d, dim in enumerate(x.dims) if d not in dims]
    return axes, Value(
        x.node,
        tuple(tuple(a if a.axis is None else Atom(a.size, place[a.axis]) for a in dim) for dim in kept),
    )


def without_axes(x: Value, node: Node) -> Value:
    """A layout over `node`; if it became a constant, no atom has an axis."""
    dims = x.dims if node.axes else tuple(tuple(Atom(a.size, None) for a in dim) for dim in x.dims)
    return Value(node, dims)


def mean(x: Value, dims: Sequence[int]) -> Value:
    """The mean over dimensions."""
    axes, left = axes_behind(x, dims)
    return without_axes(left, mean_node(x.node, axes))


@rule("reduce_sum")
def reduce_sum(interpreter: Context, eqn: Any, x: Value) -> Value:
    dims = [d % len(x.dims) for d in eqn.params["axes"]]
    count = math.prod(x.shape[d] for d in dims)
    out = mean(x, dims)
    return without_axes(out, affine(out.node, float(count), 0.0))


class OneOfMany(Node):
    """A symmetric function of exchangeable entries that one of them decides: a maximum, a log Σ exp.

    `params` begins with their axes.
    """

    follows_shifts = True

    @property
    def reduced(self) -> tuple[int, ...]:
        """The axes that are reduced."""
        return self.params[0]

    def sampled(
        self, reduce: Callable[[np.ndarray, tuple[int, ...]], np.ndarray], count: int | None = None
    ) -> Table:
        """Moments by sampling: the reduced axes at full size, the others at two positions."""
        axes, source = self.reduced, self.args[0].node
        count = count or math.prod(source.axes[k].size for k in axes)
        # The larger the set, the more the tail decides; and of what a few numbers decide there is no Gaussian
        # tail.
        self.graph.flag("sampled", NEXT_ORDER * math.log(count) + bounded(count, fewest_terms(source)))
        return sample_map([source], [set(axes)], self.axes, lambda x: reduce(x, tuple(k + 1 for k in axes)))


@cross_by_kind.register(OneOfMany)
def cross_by_kind_of_one_of_many(
    node: OneOfMany, a: View, b: View, frame: Sequence[Axis]
) -> np.ndarray | None:
    """Σ E[∂f/∂x_k] Cov(x_k, y) = Cov(mean x, y) for Gaussians that are alike (Stein): the slopes add up to 1."""
    x = node.args[0].node
    if any(x.axes[k].labels is not None for k in node.reduced) or not (
        _is_gaussian(x) and _is_gaussian(b.node)
    ):
        return None
    mean = View(mean_node(x, node.reduced), a.bind)
    return mean_product(a, b, frame) + cross(mean, b, frame) - mean_product(mean, b, frame)


def _is_gaussian(node: Node) -> bool:
    """Whether a node may be taken for Gaussian: no function of others, and of no law of its own."""
    while isinstance(node, Apply) and node.params[0] == "affine":
        node = node.args[0].node
    return not isinstance(node, Apply | OneOfMany) and marginal(node).gaussian


class Extreme(OneOfMany):
    """Maximum (or minimum) over axes; `params` is (axes, sign, count). Sampled."""

    how = "sampled"
    gradient_doubt = LEADING_ORDER


cross_by_kind.register(Extreme, cross_by_kind_of_one_of_many)


@second_moments.register(Extreme)
def second_moments_of_extreme(node: Extreme) -> Table:
    _, sign, count = node.params
    return node.sampled(lambda x, axes: (sign * x).max(axis=axes) * sign, count)


@pullback.register(Extreme)
def pullback_of_extreme(
    node: Extreme, cotangent: np.ndarray, notes: BackwardNotes
) -> list[np.ndarray | None]:
    """Each cotangent goes to the one entry that was the extreme: one in `count`, and no two of a window share it."""
    axes, _, _ = node.params
    source = node.args[0].node.axes
    out = cotangent
    for k in sorted(axes):
        n = source[k].size
        types = np.zeros(source[k].types)
        types[: source[k].classes] = 1 / n
        out = np.moveaxis(np.multiply.outer(types, out), 0, k)
    return [out]


@once_per_node
def fewest_terms(node: Node) -> float:
    """The smallest fan-in of the products with weights on the way to a node."""
    own = math.inf if weight_of(node) is None or node.width is None else float(node.width)
    return min([own, *(fewest_terms(view.node) for view in node.args)])


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


IncreasingSteps = list[tuple[str, float, float]]


def before_increasing_steps(x: Value) -> tuple[Value, IncreasingSteps]:
    """max f(x) = f(max x) for increasing f: what is inside a chain of increasing steps, and the steps, innermost first."""
    steps: IncreasingSteps = []
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
        dims = tuple(
            tuple(a if a.axis is None else a._replace(axis=place[a.axis]) for a in dim) for dim in x.dims
        )
        x = Value(inner[0].node, dims)
    return x, steps[::-1]


def after_increasing_steps(
    interpreter: Context, x: Value, steps: IncreasingSteps, taken: tuple[Value, Value] | None = None
) -> Value:
    """The increasing steps, applied to extremes.

    `taken` is the argument of `before_increasing_steps` and its result: a cotangent of the one goes where the other's goes.
    """
    extremes = x.node
    for name, c, d in steps:
        if name == "affine":
            x = Value(affine(x.node, c, d), x.dims)
        else:
            x = interpreter.elementwise("max", x, layout.full(interpreter.graph, c, x.shape))
    if steps and taken is not None and x.node.axes == extremes.axes:
        source, inner = taken
        if extremes.args[0].node is inner.node:
            own, other = (
                [a.axis for dim in y.dims for a in dim if a.axis is not None] for y in (source, inner)
            )
            order = [other[own.index(k)] for k in range(len(own))]
            # A minimum above a floor is met at many places at once, which share what flows back.
            doubt = UNKNOWN if isinstance(extremes, Extreme) and extremes.params[1] < 0 else LEADING_ORDER
            interpreter.graph.derive(
                source.node, x.node, lambda g: _to_extremes(extremes, g).transpose(order), doubt
            )
    return x


def _to_extremes(node: Node, cotangent: np.ndarray) -> np.ndarray:
    """Second moments by type of the cotangents at the places that extremes are taken over."""
    (back,) = pullback(node, np.broadcast_to(cotangent, node.frame_types), BackwardNotes())
    assert back is not None
    return back


@rule("reduce_max", "reduce_min")
def reduce_max(interpreter: Context, eqn: Any, x: Value) -> Value:
    dims = [d % len(x.dims) for d in eqn.params["axes"]]
    source, (x, steps) = x, before_increasing_steps(x)
    axes, left = axes_behind(x, dims)
    if not axes:
        return after_increasing_steps(interpreter, left, steps)
    count = math.prod(x.node.axes[k].size for k in axes)
    sign = 1.0 if eqn.primitive.name == "reduce_max" else -1.0
    kept = [a for k, a in enumerate(x.node.axes) if k not in axes]
    node = interpreter.graph.make(
        Extreme, kept, [View(x.node, tuple(range(len(x.node.axes))))], (tuple(sorted(axes)), sign, count)
    )
    return after_increasing_steps(interpreter, without_axes(left, node), steps, (source, x))


_MOST_DRAWN = 2_000_000  # elements drawn for one node


def draw(node: Node, sizes: Sequence[int], replicates: int, rng: np.random.Generator) -> np.ndarray:
    """Arrays with a node's law at other sizes: its roots are drawn, its tree is evaluated. (replicates, *sizes)

    The scale of a norm is a number here, as it is in quadrature: what it normalises is Gaussian given it, x = √v·z, so that
    x/√v is z whatever v is, and x/√(E v) with x drawn alone has the law of z. E[1/v] of v drawn apart would be left over.

    Args:
        node: the node.
        sizes: how many positions of each of its axes.
        replicates: how many arrays.
        rng: where random numbers come from.
    """
    env: dict[Any, np.ndarray] = {}
    every = roots(node)
    held = {
        r for r in every if concentrated(r.node) and any(r.node.deps & o.node.deps for o in every if o != r)
    }
    # Trees are evaluated over a frame with the replicates last, as quadrature points are.
    for root in every:
        own = [sizes[b] for b in root.bind]
        if root in held:
            drawn = np.full((replicates, *own), root.node.table.total_mean)
        elif isinstance(root.node, Array):
            numbers = np.asarray(root.node.values, float)[tuple(slice(0, n) for n in own)]
            drawn = np.repeat(numbers[None], replicates, 0)
        else:
            law = marginal(root.node)
            plain = [Axis(axis.size) for axis in root.node.axes]
            rho = pool(law.correlation, root.node.axes)
            normals = gaussian(rho, plain, [np.arange(n) for n in own], replicates, rng)
            line = np.asarray(law.values, float)
            for axis in root.node.axes:
                line = np.tensordot(axis.counts / axis.size, line, axes=(0, 0))
            drawn = read_off(line, normals)
        env[root] = over_frame(np.moveaxis(drawn, 0, -1), root.bind, len(sizes))
    out = evaluate(View(node, tuple(range(len(node.axes)))), node.axes, env)
    return np.moveaxis(np.broadcast_to(out, (*sizes, replicates)), -1, 0)


def sample_map(
    nodes: Sequence[Node],
    whole: Sequence[set[int]],
    axes: Sequence[Axis],
    f: Callable[..., np.ndarray],
    small: int = 2,
) -> Table:
    """Moments of f of some nodes, their axes in `whole` kept at full size and the others reduced to `small`."""
    sizes = [
        [a.size if k in keep else min(a.size, small) for k, a in enumerate(n.axes)]
        for n, keep in zip(nodes, whole, strict=True)
    ]
    replicates = int(np.clip(_MOST_DRAWN / max(sum(math.prod(s) for s in sizes), 1), 16, 20_000))
    rng = np.random.default_rng(0)
    out = f(*[draw(n, s, replicates, rng) for n, s in zip(nodes, sizes, strict=True)])
    return pooled_estimate(out, axes)


def pooled_estimate(samples: np.ndarray, axes: Sequence[Axis]) -> Table:
    """A table with one class an axis, from replicates (first axis) at reduced sizes."""
    reduced = [Axis(n) for n in samples.shape[1:]]
    keep = [k for k, a in enumerate(reduced) if a.size > 1]
    squeezed = samples.reshape(len(samples), *[reduced[k].size for k in keep])
    live = [reduced[k] for k in keep]
    # The replicates are one more axis, of which only "the same" is wanted.
    table = estimate(squeezed, [Axis(len(samples)), *live])
    second, mean = table.second[0], table.mean.reshape([1] * len(live))
    for k in range(len(axes)):
        if k not in keep:
            second = np.repeat(np.expand_dims(second, k), 2, axis=k)
            mean = np.expand_dims(mean, k)
    mean = np.broadcast_to(mean, [a.classes for a in axes])
    return Table(tuple(axes), np.array(mean), refine(second, axes))
