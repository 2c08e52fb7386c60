"""Elementwise primitives, one entry each, and reductions: what the former compute is in `integrals.primitives`.

A sum is its count times a mean. Extremes, of which no formula gives the moments, are drawn by themselves, at other sizes.
Complex numbers are pairs of real ones: moved, added and scaled part by part; all else is drawn.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import special

from varscale.theory.domain.axes import Axes, outer, rest
from varscale.theory.domain.tables import LEADING_ORDER, NEXT_ORDER, Table
from varscale.theory.graph.convolutions import WindowMax, dim_axes, hits
from varscale.theory.graph.expressions import IDENTITIES, Apply, Sum, roots
from varscale.theory.graph.layout import Dim, Value, axes_along, full, renumbered
from varscale.theory.graph.linear_nodes import weight_of
from varscale.theory.graph.nodes import (
    UNKNOWN,
    Array,
    Constant,
    Leaf,
    Node,
    View,
    cross_by_kind,
    pullback,
    second_moments,
)
from varscale.theory.graph.normal_form import affine, apply, mean_node
from varscale.theory.graph.store import BackwardNotes, Flows, once_per_node
from varscale.theory.integrals.hermite_series import WEIGHTS, Z, sphere_squares
from varscale.theory.integrals.primitives import FUNCTIONS
from varscale.theory.propagation.cross_moments import cross, mean_product
from varscale.theory.propagation.marginals import along, concentrated, marginal
from varscale.theory.propagation.pullbacks import selected
from varscale.theory.propagation.sampler import draw, pooled_estimate
from varscale.theory.rules.lookup import compared
from varscale.theory.rules.registry import RECOGNISERS, RULES, Complex, Context, map_parts, parts, rule

MASKED = -1e4  # a number below this is a mask
# What jax names otherwise, or has static parameters of its own.
_OWN = {"affine", "convert", "bitcast", "power", "largest", *IDENTITIES}


@rule(*(FUNCTIONS.keys() - _OWN), entrywise=True)
def elementwise(interpreter: Context, eqn: Any, *xs: Value) -> Value:
    name = eqn.primitive.name
    for recognised in RECOGNISERS.get(name, ()):
        if (unit := recognised(interpreter, *xs)) is not None:
            return unit
    if len(xs) == 2 and (known := compared(interpreter, name, eqn.outvars[0].aval.shape, *xs)) is not None:
        return known
    extra = {"integer_pow": eqn.params.get("y"), "max": interpreter.tie, "min": interpreter.tie}
    return interpreter.elementwise(name, *xs, extra=(extra[name],) if name in extra else ())


@rule("convert_element_type", "bitcast_convert_type", entrywise=True)
def convert(interpreter: Context, eqn: Any, x: Value) -> Value:
    """Widening (bool to int to float) and rounding to a narrower float keep the numbers: moments in exact arithmetic."""
    old, new = eqn.invars[0].aval.dtype, eqn.params["new_dtype"]
    same_bits = eqn.primitive.name == "bitcast_convert_type"
    if same_bits or (old.kind == new.kind == "u" and old != new):
        return interpreter.elementwise("bitcast" if same_bits else "convert", x, extra=(str(new),))
    # Numbers of a kind are numbers of those after it; the rest are floats.
    before, after = ({"b": 0, "i": 1, "u": 1, "c": 3}.get(of.kind, 2) for of in (old, new))
    if after >= before and not (old.kind == "u" and new.kind == "f"):
        return x
    return interpreter.elementwise("convert", x, extra=("f" if after == 2 else new.kind,))


@rule("copy", "copy_p", "name", "reduce_precision", "optimization_barrier", "device_put", entrywise=True)
@rule("sharding_constraint", "layout_constraint", "pvary", "pcast", "mesh_cast", "reshard", entrywise=True)
def identity(interpreter: Context, eqn: Any, *xs: Value) -> list[Value]:
    return list(xs)


@rule("stop_gradient", entrywise=True)
def stop_gradient(interpreter: Context, eqn: Any, x: Any) -> Any:
    """The same forward.

    What is made of weights alone is left as it is, since no row asks for the gradients of weights: a spectral norm is |Wᵀv|,
    whether it stops at v or not.
    """
    if isinstance(x, Value) and not isinstance(x.node, Leaf | Array) and x.node.deps & x.node.graph.inputs:
        return interpreter.elementwise("stop_gradient", x)
    return x


# Functions of numbers that do to a complex one what they do to its parts.
_ELEMENTWISE = {"neg", "sub", "add", "add_any", "stop_gradient"}
# What is no function of numbers and yet makes a part of the result of both of a complex number.
_MIXING = {"dot_general", "conv_general_dilated", "reduce_prod", "cumprod"}


@rule("complex operands")
def complex_operands(interpreter: Context, eqn: Any, *xs: Any) -> Any:
    """An equation on complex numbers that acts on their parts alike; any other is drawn."""
    name = eqn.primitive.name
    whole = [x if isinstance(x, Complex) else Complex(x, full(interpreter.graph, 0.0, x.shape)) for x in xs]
    is_real = [x.im.constant == 0 for x in whole]
    match name:
        case "convert_element_type":
            return whole[0] if eqn.params["new_dtype"].kind == "c" else whole[0].re
        case "abs":
            return interpreter.elementwise("hypot", whole[0].re, whole[0].im)
        case "mul" | "div" if is_real[1] or (name == "mul" and is_real[0]):
            x, y = whole if is_real[1] else whole[::-1]
            return map_parts(lambda part: interpreter.elementwise(name, part, y.re), x)
    if name not in _ELEMENTWISE and (name not in RULES or name in FUNCTIONS or name in _MIXING):
        raise NotImplementedError("it mixes the parts of complex numbers")
    re, im = (RULES[name](interpreter, eqn, *(parts(x)[k % len(parts(x))] for x in xs)) for k in (0, 1))
    return [*map(Complex, re, im)] if isinstance(re, list | tuple) else Complex(re, im)


@rule("complex")
def complex_(interpreter: Context, eqn: Any, re: Value, im: Value) -> Complex:
    return Complex(re, im)


@rule("real", "imag")
def real(interpreter: Context, eqn: Any, x: Complex) -> Value:
    return x.re if eqn.primitive.name == "real" else x.im


def axes_behind(x: Value, dims: Sequence[int]) -> tuple[list[int], tuple[Dim, ...]]:
    """The node's axes behind some dimensions, and the other dimensions without them."""
    axes = axes_along(x.dims[d] for d in dims)
    kept = [x.dims[d] for d in rest(x.dims, dims)]
    return axes, renumbered(kept, {k: i for i, k in enumerate(rest(x.node.axes, axes))})


def mean(x: Value, dims: Sequence[int]) -> Value:
    """The mean over dimensions."""
    axes, left = axes_behind(x, dims)
    node = mean_node(x.node, axes)
    return Value(node, left if node.axes else renumbered(left, {}))


@rule("reduce_sum")
def reduce_sum(interpreter: Context, eqn: Any, x: Value) -> Value:
    axes = eqn.params["axes"]
    out = mean(x, axes)
    return Value(affine(out.node, float(math.prod(x.shape[d] for d in axes)), 0.0), out.dims)


class OneOfMany(Node):
    """A symmetric function of exchangeable entries that one decides (a maximum), sampled; `params` begins with their axes."""

    how = "sampled"
    gradient_doubt = LEADING_ORDER
    follows_shifts = True

    @property
    def reduced(self) -> tuple[int, ...]:
        return self.params[0]

    def sampled(self, reduce: Callable[..., np.ndarray]) -> Table:
        """Moments by sampling: the reduced axes at full size, the others at two positions."""
        axes, source = self.reduced, self.argument
        count = source.count(axes)
        # The larger the set, the more the tail decides; of what few numbers decide there is no Gaussian tail.
        self.graph.flag("sampled", NEXT_ORDER * math.log(count) + tail_excess(count, fewest_terms(source)))
        sizes = [a.size if k in axes else min(a.size, 2) for k, a in enumerate(source.axes)]
        return pooled_estimate(reduce(draw(source, sizes), tuple(k + 1 for k in axes)), self.axes)


@cross_by_kind.register
def cross_by_kind_of_one_of_many(node: OneOfMany, a: View, b: View, frame: Axes) -> np.ndarray | None:
    """Σ E[∂f/∂x_k] Cov(x_k, y) = Cov(mean x, y) for Gaussians that are alike (Stein): the slopes add up to 1."""
    x = node.argument
    if any(x.axes[k].labels for k in node.reduced) or not (_is_gaussian(x) and _is_gaussian(b.node)):
        return None
    mean = View(mean_node(x, node.reduced), a.bind)
    return mean_product(a, b, frame) + cross(mean, b, frame) - mean_product(mean, b, frame)


def _is_gaussian(node: Node) -> bool:
    """Whether a node may be taken for Gaussian: no function of others, and of no law of its own."""
    while node.primitive == "affine":
        node = node.argument
    return not isinstance(node, Apply | OneOfMany) and marginal(node).gaussian


class Extreme(OneOfMany):
    """Maximum (or minimum) over axes; `params` is (axes, sign)."""


cross_by_kind.register(Extreme, cross_by_kind_of_one_of_many)


@once_per_node
def reads_masked(node: Node) -> bool:
    """Whether an extreme of numbers is in it, some of which a mask hides: of how many it is differs from row to row."""
    if isinstance(node, Extreme):
        return node.argument.table.mean_square >= MASKED**2
    return any(reads_masked(x) for x, _ in node.args)


@second_moments.register
def second_moments_of_extreme(node: Extreme) -> Table:
    sign = node.params[1]
    if reads_masked(node):
        if not node.graph.undrawn:
            raise NotImplementedError("an extreme of masked numbers")
        node.graph.flag("assumed", UNKNOWN)
    return node.sampled(lambda x, axes: (sign * x).max(axis=axes) * sign)


@pullback.register
def pullback_of_extreme(node: Extreme, cotangent: np.ndarray, notes: BackwardNotes) -> Flows:
    """Each cotangent goes to the one entry that was the extreme, of as many as there are; no two share it."""
    for k in node.reduced:
        axis = node.argument.axes[k]
        cotangent = np.moveaxis(np.multiply.outer(axis.agrees / axis.size, cotangent), 0, k)
    return [cotangent]


@selected.register
def selected_by_extreme(node: Extreme | WindowMax) -> View | None:
    """√P(an entry is the largest, given it): P = Φ(z)^(n − 1) of n independent Gaussian ones, or f of such.

    Of windows, which have fewer entries at borders, P is Σ m n Φ(z)^(n − 1) up to a factor, m as many as have n.
    """
    x = node.argument
    if not isinstance(x, Apply | Sum) or concentrated(x):
        return None
    if isinstance(node, Extreme):
        sizes, sign = np.array([x.count(node.reduced)]), node.params[1]
    else:
        read = zip(node.params.windows, dim_axes(x, node.params.x_dims), strict=True)
        sizes, sign = outer((hits(w, a.size) >= 0).sum(axis=1) for w, a in read if w is not None), 1.0
    live, read = [r for r in roots(x) if not concentrated(r.node)], x.whole
    if len(live) == 1 and len(live[0].bind) == len(x.axes):
        slope = np.mean(along(x.whole, x.axes, *live) @ (WEIGHTS * Z))
        if slope**2 > x.table.variance / 2:
            read, sign = live[0], math.copysign(sign, sign * slope)
    (y, bind), scale = read, sign / math.sqrt(read.node.table.variance)
    z = affine(y, scale, -scale * y.table.total_mean)
    numbers = tuple(zip(*np.unique(sizes, return_counts=True), strict=True))
    return View(apply(x.graph, "largest", (numbers,), y.axes, [z.whole]), bind)


@once_per_node
def fewest_terms(node: Node) -> float:
    """The smallest fan-in of the products with weights on the way to a node."""
    own = math.inf if weight_of(node) is None or node.width is None else node.width
    return min([own, *(fewest_terms(view.node) for view in node.args)])


@functools.cache
def tail_excess(count: int, width: float) -> float:
    """By how much the largest square of `count` Gaussians exceeds that of as many coordinates on a sphere of this dimension."""
    if width == math.inf:
        return 0.0
    weights = np.diff(special.ndtr(Z) ** count, prepend=0.0)
    return float(max((weights @ Z**2) / (weights @ sphere_squares(width)) - 1, 0.0))


def of_increasing(x: Value, extreme: Callable[[Value], Value]) -> Value:
    """max f(x) = f(max x) for a chain f of increasing steps; a cotangent of f(x) goes where that of x does."""
    inner, steps = x, list[Apply]()
    while isinstance(step := inner.node, Apply):
        varied = [v for v in step.args if not isinstance(v.node, Constant)]
        name, extra = step.params
        increases = name == "max" or (name == "affine" and extra[0] > 0)
        if not increases or len(varied) != 1 or len(varied[0].bind) != len(step.axes):
            break
        steps.append(step)
        place = {b: k for k, b in enumerate(varied[0].bind)}
        inner = Value(varied[0].node, renumbered(inner.dims, place))
    extremes = extreme(inner)
    node = out = extremes.node
    for step in reversed(steps):
        views = [v if isinstance(v.node, Constant) else out.whole for v in step.args]
        name, extra = step.params
        out = apply(out.graph, name, extra, out.axes, views)
    if steps and out.axes == node.axes and any(view.node is inner.node for view in node.args):
        own, other = axes_along(x.dims), axes_along(inner.dims)

        def back(cotangent: np.ndarray) -> np.ndarray:
            (to_inner,) = pullback(node, np.broadcast_to(cotangent, node.frame_types), BackwardNotes())
            assert to_inner is not None
            return to_inner.transpose([other[own.index(k)] for k in range(len(own))])

        # A minimum above a floor is met at many places at once, which share what flows back.
        doubt = UNKNOWN if isinstance(node, Extreme) and node.params[1] < 0 else LEADING_ORDER
        out.graph.derive(x.node, out, back, doubt)
    return Value(out, extremes.dims)


@rule("reduce_max", "reduce_min")
def reduce_max(interpreter: Context, eqn: Any, x: Value) -> Value:
    sign = 1.0 if eqn.primitive.name == "reduce_max" else -1.0

    def extreme(inner: Value) -> Value:
        axes, left = axes_behind(inner, eqn.params["axes"])
        kept = [inner.node.axes[k] for k in rest(inner.node.axes, axes)]
        views, params = [inner.node.whole], (tuple(sorted(axes)), sign)
        return Value(interpreter.graph.make(Extreme, kept, views, params) if axes else inner.node, left)

    return of_increasing(x, extreme)
