"""Elementwise nodes, sums, means and derivatives in a normal form: two ways of writing one array are one node."""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from varscale.theory.domain.axes import Axes, rest
from varscale.theory.domain.tables import NEXT_ORDER
from varscale.theory.graph.expressions import Apply, Mean, Sum, alike, as_affine, factors, inverse, roots_of
from varscale.theory.graph.linear_nodes import Split
from varscale.theory.graph.nodes import Array, Constant, Graph, Node, View, array, number
from varscale.theory.graph.store import once_per_node
from varscale.theory.integrals.primitives import BITWISE, COMPARISONS, function


def _unrounded(c: float) -> float:
    """A factor without what rounding left where it is a whole number: n times 1/n is 1."""
    return float(round(c)) if math.isfinite(c) and 0.5 < abs(c) < 2**40 and alike(c, round(c)) else c


def affine(node: Node, c: float, d: float) -> Node:
    """c·node + d."""
    return _scaled(node.whole, node.axes, c, d)


def broadcast(node: Node, axes: Axes) -> Node:
    """`node` with further axes along which it is constant; its own come first."""
    return node.graph.make(Apply, axes, [node.whole], ("affine", (1.0, 0.0)))


def _scaled(view: View, axes: Axes, c: float = 1.0, d: float = 0.0) -> Node:
    """c·view + d over a frame; a number is what it is."""
    node, c = view.node, _unrounded(c)
    if isinstance(node, Constant) or c == 0:
        return number(node.graph, c * node.params + d if c else d)
    if view != node.whole or node.axes != tuple(axes):
        view, c, d = View(affine(node, c, d), view.bind), 1.0, 0.0
    elif c == 1 and d == 0:
        return node
    elif node.primitive == "affine":
        inner, (scale, shift) = node.args[0], node.params[1]
        if inner == inner.node.whole and inner.node.axes == node.axes:
            return _scaled(inner, axes, c * scale, c * shift + d)
    return node.graph.make(Apply, axes, [view], ("affine", (float(c), float(d))))


def apply(graph: Graph, name: str, extra: tuple[Any, ...], axes: Axes, views: Sequence[View]) -> Node:
    """The node of an elementwise primitive over a frame, in normal form."""
    constants = [v.node.params if isinstance(v.node, Constant) else None for v in views]
    if None not in constants:
        with np.errstate(all="ignore"):
            return number(graph, float(function(name, extra)(*map(np.float64, constants))))
    (x, y), (c, d) = (views[0], views[-1]), (constants[0], constants[-1])
    match name:
        case "add" | "add_any" | "sub":
            mine, others = (set(roots_of(view)) for view in views)
            if constants == [None, None] and x != y and (mine <= others or others <= mine):
                return graph.make(Apply, axes, views, (name.removesuffix("_any"), extra))
            return total(graph, (1.0, -1.0 if name == "sub" else 1.0), axes, views)
        case "mul" if d is not None:
            return _scaled(x, axes, d)
        case "mul" if c is not None:
            return _scaled(y, axes, c)
        case "mul" | "square" if x == y:
            return apply(graph, "integer_pow", (2,), axes, [x])
        case "div" if d:
            return _scaled(x, axes, 1 / d)
        case "neg":
            return _scaled(x, axes, -1.0)
        case "pow" if d is not None:
            return apply(graph, "integer_pow" if d % 1 == 0 else "power", (d,), axes, [x])
        case "integer_pow" if extra[0] == 1:
            return _scaled(x, axes)
        case "select_n" if c is not None:
            return _scaled(views[1 + int(c)], axes)
        case "select_n" if len(views) == 3 and 0 in constants and constants[1:].count(None) == 1:
            # A branch of zeros makes the choice a factor, 1 or 0: independent factors multiply exactly.
            kept = constants.index(None, 1)
            branches = [number(graph, float(k == kept)).whole for k in (1, 2)]
            which = graph.make(Apply, x.node.axes, [x.node.whole, *branches], ("select_n", ()))
            return apply(graph, "mul", (), axes, [View(which, x.bind), views[kept]])
    return graph.make(Apply, axes, views, (name, extra))


def total(graph: Graph, weights: Sequence[float], axes: Axes, views: Sequence[View]) -> Node:
    """A weighted sum, equal terms collected."""
    terms: dict[View, float] = {}
    offset = 0.0
    for c, view in zip(weights, views, strict=True):
        scale, shift, view = as_affine(view)
        known, c, offset = terms.get(view, 0.0), c * scale, offset + c * shift
        terms[view] = 0.0 if alike(known, -c) else _unrounded(known + c)
    live = [(c, view) for view, c in terms.items() if c != 0]
    if (opened := _cancelled(live)) is not None:
        return affine(total(graph, [c for c, _ in opened], axes, [v for _, v in opened]), 1.0, offset)
    if not live:
        return number(graph, offset)
    if len(live) == 1:
        return _scaled(live[0][1], axes, live[0][0], offset)
    parts = [_by_known(view) for _, view in live] if len(live) == 2 and alike(live[0][0], -live[1][0]) else []
    match parts:
        case [(known, x), (same, y)] if known == same:
            # Known numbers that an array is multiplied by, its mean too, are a factor of the difference.
            inner = total(graph, [c for c, _ in live], axes, [x, y])
            over = inverse(known)
            for _, view in live:
                if view == view.node.whole and len(view.bind) == len(inner.axes) == len(axes):
                    graph.derive(view.node, inner, lambda g: g * over.second(axes), NEXT_ORDER)
            whole = apply(graph, "mul", (), axes, [known, View(inner, tuple(range(len(axes))))])
            return affine(whole, 1.0, offset)
    live.sort(key=lambda term: (term[1].node.id, term[1].bind))
    node = graph.make(Sum, axes, [v for _, v in live], tuple(c for c, _ in live))
    if _is_variance(node):
        node.is_variance = node.positive = True
    return affine(node, 1.0, offset)


def _by_known(view: View) -> tuple[View, View] | None:
    """Known numbers that an array is multiplied by, and the array; None where there are none."""
    node, bind = _powers_apart(view.node, ()).whole.within(view.bind)
    ways = itertools.permutations(x.within(bind) for x in node.args) if node.primitive == "mul" else ()
    return next(((x, y) for x, y in ways if all(isinstance(r.node, Array) for r in roots_of(x))), None)


def _cancelled(terms: Sequence[tuple[float, View]]) -> list[tuple[float, View]] | None:
    """A sum of sums of which parts cancel (what was taken from logits and given back), without those; None where none do."""
    parts = [
        [(c * d, child.within(v.bind)) for d, child in v.node.terms] if isinstance(v.node, Sum) else [(c, v)]
        for c, v in terms
    ]
    uses = defaultdict[View, list[tuple[int, float]]](list)
    for i, part in enumerate(parts):
        for c, view in part:
            uses[view].append((i, c))
    gone = {i for use in uses.values() if len(use) > 1 and sum(c for _, c in use) == 0 for i, _ in use}
    opened = [part if i in gone else [term] for i, (term, part) in enumerate(zip(terms, parts, strict=True))]
    return list(itertools.chain(*opened)) if gone else None


def _is_variance(node: Sum) -> bool:
    """Whether it is the mean of squares less the square of the mean of the same over the same axes."""
    if len(node.args) != 2 or not alike(node.params[0], -node.params[1]):
        return False
    plus, minus = (node.args[i] for i in np.argsort(node.params)[::-1])
    squares = plus.node.argument if isinstance(plus.node, Mean) else plus.node
    if not (squares.is_square and minus.node.is_square):
        return False
    scale, shift, mean = as_affine(minus.node.args[0].within(minus.bind))
    own = mean_node(_scaled(squares.args[0], squares.axes), plus.node.params)
    c, d, found = as_affine(View(own, plus.bind))
    return found == mean and alike(c, scale) and alike(d, shift)


def cut_inside(node: Node, k: int, axes: Axes, cut: Callable[[Node, int], Node]) -> Node | None:
    """The node over `axes` whose arguments take a cut of its axis k (into several, or of one position) in its place.

    A part of a row less its mean is still known to be less the row's own mean. None where the kind lets no cuts through.
    """
    if isinstance(node, Mean):
        inner = node.argument
        at = rest(inner.axes, node.params)[k]
        part = cut(inner, at)
        return mean_node(part, [j if j < at else j + len(part.axes) - len(inner.axes) for j in node.params])
    if not isinstance(node, Apply | Sum):
        return None
    more, views = len(axes) - len(node.axes), []
    for child, bind in node.args:
        places = (range(b, b + more + 1) if b == k else [b + more * (b > k)] for b in bind)
        part = cut(child, bind.index(k)) if k in bind else child
        views.append(View(part, tuple(itertools.chain(*places))[: len(part.axes)]))  # of a number none
    if isinstance(node, Sum):
        return total(node.graph, node.params, axes, views)
    name, extra = node.params
    if name == "mul" and any(isinstance(v.node, Constant) for v in views):
        return apply(node.graph, name, extra, axes, views)  # one layer's number of all layers'
    return node.graph.make(Apply, axes, views, node.params)


def mean_pullback(cotangent: np.ndarray, reduced: Sequence[int], axes: Axes) -> np.ndarray:
    """The same cotangent at every position, over their number."""
    for k in sorted(reduced):
        cotangent = np.repeat(np.expand_dims(cotangent, k), axes[k].types, axis=k) / axes[k].size ** 2
    return cotangent


def mean_node(node: Node, axes: Iterable[int]) -> Node:
    """The mean of a node over some of its axes, in normal form."""
    places = tuple(sorted(axes))
    if not places or isinstance(node, Constant):
        return node
    return _mean_node(node, places)


@once_per_node
def _mean_node(node: Node, axes: tuple[int, ...]) -> Node:
    graph = node.graph
    left = tuple(a for k, a in enumerate(node.axes) if k not in axes)

    def inside(view: View) -> View:
        mean = mean_node(view.node, view.axes_at(axes))
        places = tuple(b - sum(j < b for j in axes) for b in view.bind if b not in axes)
        return View(mean, places[: len(mean.axes)])  # of a number none

    node = _powers_apart(node, axes)
    match node, node.params:
        case Array(), _:
            return array(graph, node.values.mean(axis=axes), left)
        case Sum(), weights:
            back = functools.partial(mean_pullback, reduced=axes, axes=node.axes)
            return graph.derive(node, total(graph, weights, left, [inside(v) for v in node.args]), back)
        case Apply(), ("affine", extra):
            return _scaled(inside(node.args[0]), left, *extra)
        case Apply(), ("mul" | "div" as name, extra):
            varied = [bool(set(axes) & set(view.bind)) for view in node.args]
            if not varied[1] or (name == "mul" and not varied[0]):  # what is constant along them comes out
                return apply(graph, name, extra, left, [inside(view) for view in node.args])
            if (product := _factors_apart(node, axes)) is not None:
                return mean_node(product, axes)
        case Mean(), reduced:
            places = rest(node.argument.axes, reduced)
            return mean_node(node.argument, [*reduced, *(places[k] for k in axes)])
        case Split(), (k, sizes) if {*range(k, k + len(sizes))} <= {*axes}:  # all factors are the axis
            whole = [j if j < k else j - len(sizes) + 1 for j in axes if j not in range(k, k + len(sizes))]
            return mean_node(node.argument, [k, *whole])
    return graph.make(Mean, left, [node.whole], axes)


def _factors_apart(node: Apply, axes: Sequence[int]) -> Node | None:
    """x (x y) as x² y, where y is constant along the axes; None where no factor is."""
    number, parts = factors(node.whole)
    constant = [view for view in parts if not any(b in axes for b in view.bind)]
    varied = dict.fromkeys(view for view in parts if view not in constant)
    # X σ(x) of a normalised x would be no function of x any more, whose gradient is asked for.
    if not constant or not varied or set(roots_of(*varied)) & set(roots_of(*constant)):
        return None

    def built(name: str, extra: tuple[int, ...], *views: View) -> View:
        return apply(node.graph, name, extra, node.axes, views).whole

    powers = (built("integer_pow", (parts.count(x),), x) for x in varied)
    product = functools.reduce(functools.partial(built, "mul", ()), (*powers, *constant))
    return affine(product.node, number, 0.0)


def _powers_apart(node: Node, axes: Sequence[int]) -> Node:
    """(x y)ⁿ as xⁿ yⁿ, where one factor is constant along the axes: the scale of a norm comes out of the next norm's mean."""
    if node.primitive != "integer_pow":
        return node
    (inner, bind), (name, extra) = node.args[0], node.params
    parts = [view.within(bind) for view in inner.args] if inner.primitive in ("mul", "div") else []
    if all(any(b in axes for b in view.bind) for view in parts):
        return node
    powers = [View(apply(node.graph, name, extra, x.axes, [x.whole]), bind) for x, bind in parts]
    return apply(node.graph, inner.params[0], (), node.axes, powers)


# Whose derivative is zero wherever they have one, or by decree; of a choice by what it is chosen by.
_STEPS = "sign floor ceil round is_finite convert bitcast stop_gradient select_n"
_FLAT = {*_STEPS.split(), *COMPARISONS, *BITWISE}


@once_per_node
def derivative(node: Node, target: View) -> View | None:
    """∂node/∂target over the node's frame, by the chain rule through its tree; None where it does not depend on it."""
    if node is target.node:
        return number(node.graph, 1.0).whole if target == node.whole else None
    if not isinstance(node, Apply):
        return None
    name, extra = node.params

    def build(op: str, *views: View, extra: tuple[Any, ...] = ()) -> View:
        return apply(node.graph, op, extra, node.axes, views).whole

    total: View | None = None
    for k, arg in enumerate(node.args):
        places = {b: i for i, b in enumerate(arg.bind)}
        inner = derivative(arg.node, View(target.node, tuple(places.get(b, -1) for b in target.bind)))
        if inner is None:
            continue
        match name:  # ∂(primitive)/∂(argument k)
            case "add" | "own_gradient" | "row" | "sub" | "affine":
                c = extra[0] if name == "affine" else -1.0 if name == "sub" and k else 1.0
                outer = number(node.graph, c).whole
            case "mul":
                outer = node.args[1 - k]
            case "div" if k == 0:
                outer = inverse(node.args[1])
            case "select_n" if k:
                picks = (number(node.graph, float(i == k)).whole for i in range(1, len(node.args)))
                outer = build("select_n", node.args[0], *picks)
            case "integer_pow" | "power":
                power = build(name, arg, extra=(extra[0] - 1,))
                outer = build("mul", number(node.graph, float(extra[0])).whole, power)
            case "exp":
                outer = build("exp", arg)
            case _ if name in _FLAT:
                continue
            case _:  # where products need not be kept apart, by a central difference
                outer = build(f"∂{k}{name}", *node.args, extra=extra)
        term = build("mul", outer, inner.within(arg.bind))
        total = term if total is None else build("add", total, term)
    return total
