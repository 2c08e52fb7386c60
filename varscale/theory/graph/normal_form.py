"""Elementwise nodes, sums and means in a normal form: two ways of writing one array are one node."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from varscale.theory.domain.axes import Axis
from varscale.theory.graph.expressions import IDENTITIES, Apply, Mean, Sum, alike, factors, roots, roots_of
from varscale.theory.graph.nodes import Array, Constant, Graph, Node, View, array, cut_inside, number, rebuild
from varscale.theory.graph.reshapes import Split
from varscale.theory.graph.store import once_per_node
from varscale.theory.integrals.primitives import function


@rebuild.register(Apply)
def rebuild_of_apply(node: Apply, axes: tuple[Axis, ...], args: Sequence[View]) -> Node:
    return node.graph.make(Apply, axes, args, node.params)


@rebuild.register(Sum)
def rebuild_of_sum(node: Sum, axes: tuple[Axis, ...], args: Sequence[View]) -> Node:
    return total(node.graph, node.params, axes, args)


@once_per_node
def forward(node: Node) -> Node:
    """An elementwise tree as it computes, whatever it does to gradients."""
    if not isinstance(node, Apply):
        return node
    args = [View(forward(child), bind) for child, bind in node.args]
    if node.params[0] in IDENTITIES:
        return _whole(args[0], node.axes)
    return node.graph.make(Apply, node.axes, args, node.params) if args != list(node.args) else node


def _unrounded(c: float) -> float:
    """A factor without what rounding left where it is a whole number: n times 1/n is 1."""
    return float(round(c)) if math.isfinite(c) and 0.5 < abs(c) < 2**40 and alike(c, round(c)) else c


def affine(node: Node, c: float, d: float) -> Node:
    """c·node + d."""
    c = _unrounded(c)
    if c == 1 and d == 0:
        return node
    if isinstance(node, Constant):
        return number(node.graph, c * node.params + d)
    if c == 0:
        return number(node.graph, d)
    identity = tuple(range(len(node.axes)))
    if isinstance(node, Apply) and node.params[0] == "affine" and node.args[0].node.axes == node.axes:
        c0, d0 = node.params[1]
        return (
            affine(node.args[0].node, c * c0, c * d0 + d)
            if node.args[0].bind == identity
            else _apply(node, c, d)
        )
    return _apply(node, c, d)


def _apply(node: Node, c: float, d: float) -> Node:
    return node.graph.make(
        Apply, node.axes, [View(node, tuple(range(len(node.axes))))], ("affine", (float(c), float(d)))
    )


def broadcast(node: Node, axes: tuple[Axis, ...]) -> Node:
    """`node` with further axes along which it is constant; its own come first."""
    if axes[: len(node.axes)] != node.axes:
        raise ValueError("a broadcast keeps the node's own axes first")
    return node.graph.make(Apply, axes, [View(node, tuple(range(len(node.axes))))], ("affine", (1.0, 0.0)))


def _whole(view: View, axes: Sequence[Axis]) -> Node:
    """The view as a node over the whole frame."""
    node, bind = view
    if bind == tuple(range(len(axes))) and tuple(node.axes) == tuple(axes):
        return node
    return node.graph.make(Apply, axes, [view], ("affine", (1.0, 0.0)))


def _scaled(view: View, axes: Sequence[Axis], c: float, d: float) -> Node:
    node, bind = view
    if isinstance(node, Constant):
        return number(node.graph, c * node.params + d)
    scaled = affine(node, c, d)
    return scaled if isinstance(scaled, Constant) else _whole(View(scaled, bind), axes)


def apply(
    graph: Graph, name: str, extra: tuple[Any, ...], axes: tuple[Axis, ...], views: Sequence[View]
) -> Node:
    """The node of an elementwise primitive over a frame, in normal form."""
    views = list(views)
    constants = [v.node.params if isinstance(v.node, Constant) else None for v in views]
    if all(c is not None for c in constants):
        with np.errstate(all="ignore"):
            result = function(name, extra)(*(np.float64(c) for c in constants if c is not None))
        return number(graph, float(result))
    if name in ("add", "add_any", "sub"):
        sign = -1.0 if name == "sub" else 1.0
        a, b = views
        if constants[1] is not None:
            return _scaled(a, axes, 1.0, sign * constants[1])
        if constants[0] is not None:
            return _scaled(b, axes, sign, constants[0])
        if a == b:
            return _scaled(a, axes, 1 + sign, 0.0)
        ra, rb = ({(r.node.id, r.within(v.bind).bind) for r in roots(v.node)} for v in views)
        if not (ra <= rb or rb <= ra):
            return total(graph, (1.0, sign), axes, views)
        name = "add" if name == "add_any" else name
    if name == "mul":
        if constants[1] is not None:
            return _scaled(views[0], axes, constants[1], 0.0)
        if constants[0] is not None:
            return _scaled(views[1], axes, constants[0], 0.0)
        if views[0] == views[1]:
            name, extra, views = "integer_pow", (2,), views[:1]
    if name == "div" and constants[1]:
        return _scaled(views[0], axes, 1 / constants[1], 0.0)
    if name == "neg":
        return _scaled(views[0], axes, -1.0, 0.0)
    if name == "square":
        name, extra = "integer_pow", (2,)
    if name == "pow" and constants[1] is not None:
        name, extra, views = "integer_pow" if constants[1] % 1 == 0 else "power", (constants[1],), views[:1]
    if name == "integer_pow" and extra[0] == 1:
        return _whole(views[0], axes)
    if name == "select_n" and constants[0] is not None:
        return (
            _whole(views[1 + int(constants[0])], axes)
            if constants[1 + int(constants[0])] is None
            else views[1 + int(constants[0])].node
        )
    if name == "select_n" and len(views) == 3 and constants[0] is None:
        # A branch of zeros makes the choice a factor, 1 or 0, and factors that are independent multiply
        # exactly.
        for kept, dropped in ((2, 1), (1, 2)):
            if constants[dropped] == 0 and constants[kept] is None:
                zero, one = View(number(graph, 0.0), ()), View(number(graph, 1.0), ())
                pick = [views[0], zero, one] if kept == 2 else [views[0], one, zero]
                identity = tuple(range(len(views[0].node.axes)))
                own = [View(v.node, identity if i == 0 else ()) for i, v in enumerate(pick)]
                which = graph.make(Apply, views[0].node.axes, own, ("select_n", ()))
                return apply(graph, "mul", (), axes, [View(which, views[0].bind), views[kept]])
    return graph.make(Apply, axes, views, (name, extra))


def total(graph: Graph, weights: Sequence[float], axes: tuple[Axis, ...], views: Sequence[View]) -> Node:
    """A weighted sum, equal terms collected."""
    terms: dict[tuple[int, tuple[int, ...]], tuple[float, View]] = {}
    offset = 0.0
    for c, view in zip(weights, views, strict=True):
        if isinstance(view.node, Constant):
            offset += c * view.node.params
            continue
        scale, shift, view = _bare(view)
        c, offset = c * scale, offset + c * shift
        key = (view.node.id, view.bind)
        known = terms[key][0] if key in terms else 0.0
        terms[key] = (0.0 if alike(known, -c) else _unrounded(known + c), view)
    live = [(c, v) for c, v in terms.values() if c != 0]
    if (opened := _cancelled(live)) is not None:
        return affine(total(graph, [c for c, _ in opened], axes, [v for _, v in opened]), 1.0, offset)
    if not live:
        return number(graph, offset)
    if len(live) == 1:
        return _scaled(live[0][1], axes, live[0][0], offset)
    live.sort(key=lambda term: (term[1].node.id, term[1].bind))
    node = graph.make(Sum, axes, [v for _, v in live], tuple(c for c, _ in live))
    if _is_variance(node):
        node.is_variance = node.positive = True
    return affine(node, 1.0, offset)


def _cancelled(terms: Sequence[tuple[float, View]]) -> list[tuple[float, View]] | None:
    """A sum of sums of which parts cancel (what was taken from logits and given back), without those; None where none do."""
    if len(terms) < 2 or not any(isinstance(v.node, Sum) for _, v in terms):
        return None
    parts = [
        [(c * d, child.within(v.bind)) for d, child in zip(v.node.params, v.node.args, strict=True)]
        if isinstance(v.node, Sum)
        else [(c, v)]
        for c, v in terms
    ]
    uses: dict[View, list[tuple[int, float]]] = {}
    for i, part in enumerate(parts):
        for c, view in part:
            uses.setdefault(view, []).append((i, c))
    gone = {
        i for found in uses.values() if len(found) > 1 and sum(c for _, c in found) == 0 for i, _ in found
    }
    if not gone:
        return None
    return [
        t
        for i, (term, part) in enumerate(zip(terms, parts, strict=True))
        for t in (part if i in gone else [term])
    ]


def _bare(view: View) -> tuple[float, float, View]:
    """What a view is c· + d of, in whatever order of axes: c, d, and that."""
    c, d = 1.0, 0.0
    while isinstance(view.node, Apply) and view.node.params[0] == "affine":
        scale, shift = view.node.params[1]
        c, d, view = c * scale, d + c * shift, view.node.args[0].within(view.bind)
    return c, d, view


def _is_variance(node: Sum) -> bool:
    """Whether it is the mean of squares less the square of the mean of the same over the same axes."""
    if len(node.args) != 2 or not alike(node.params[0], -node.params[1]):
        return False
    plus, minus = (node.args[i] for i in np.argsort(node.params)[::-1])
    if not isinstance(plus.node, Mean):
        return False
    squares, reduced = plus.node.args[0].node, plus.node.params
    if not all(isinstance(x, Apply) and x.params == ("integer_pow", (2,)) for x in (squares, minus.node)):
        return False
    (c, d, x), (scale, shift, mean) = _bare(squares.args[0]), _bare(minus.node.args[0].within(minus.bind))
    if not set(reduced) <= set(x.bind):
        return False
    kept = [k for k in range(len(squares.axes)) if k not in reduced]
    places = tuple(plus.bind[kept.index(b)] for b in x.bind if b not in reduced)
    inner, more, own = _bare(
        View(mean_node(x.node, [k for k, b in enumerate(x.bind) if b in reduced]), places)
    )
    return own == mean and alike(c * inner, scale) and alike(c * more + d, shift)


@cut_inside.register(Mean)
def cut_inside_of_mean(node: Mean, k: int, cut: Callable[[Node, int], Node]) -> Node:
    """The mean of what was cut: a part of a normalised row is still known to be normalised by the row's own mean."""
    inner = node.args[0].node
    at = [j for j in range(len(inner.axes)) if j not in node.params][k]
    part = cut(inner, at)
    return mean_node(part, [j if j < at else j + len(part.axes) - len(inner.axes) for j in node.params])


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
    return _mean_node(node, places)


@once_per_node
def _mean_node(node: Node, axes: tuple[int, ...]) -> Node:
    graph = node.graph
    left = tuple(a for k, a in enumerate(node.axes) if k not in axes)
    new = {k: i for i, k in enumerate(k for k in range(len(node.axes)) if k not in axes)}
    if isinstance(node, Array):
        return array(graph, node.values.mean(axis=axes), left)

    def inside(view: View) -> View:
        averaged = mean_node(view.node, [j for j, b in enumerate(view.bind) if b in axes])
        return View(
            averaged,
            () if isinstance(averaged, Constant) else tuple(new[b] for b in view.bind if b not in axes),
        )

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
        if not any(b in axes for b in y.bind) or (
            node.params[0] == "mul" and not any(b in axes for b in x.bind)
        ):
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
    graph, whole = node.graph, tuple(range(len(node.axes)))
    number, parts = factors(View(node, whole))
    constant = [view for view in parts if not any(b in axes for b in view.bind)]
    if not constant or len(constant) == len(parts):
        return None
    varied = dict.fromkeys(view for view in parts if view not in constant)
    if set(roots_of(*varied)) & set(roots_of(*constant)):
        # X σ(x) of a normalised x: it would be no function of x any more, whose gradient is asked for.
        return None
    powers = [View(apply(graph, "integer_pow", (parts.count(x),), node.axes, [x]), whole) for x in varied]
    *_, product = itertools.accumulate(
        powers, lambda x, y: View(apply(graph, "mul", (), node.axes, [x, y]), whole)
    )
    *_, outer = itertools.accumulate(
        constant, lambda x, y: View(apply(graph, "mul", (), node.axes, [x, y]), whole)
    )
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
