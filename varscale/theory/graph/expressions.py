"""Elementwise nodes: chains of primitives on their ROOTS (everything that is not elementwise), built in a normal form.

A whole chain (GELU is eight equations) is one function of its roots, evaluated on their quadrature nodes by the
primitives themselves; no table of activations is needed, and no intermediate step is taken for Gaussian.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from varscale.theory.domain.axes import Axis
from varscale.theory.domain.tables import Table
from varscale.theory.graph.nodes import UNKNOWN, Constant, Graph, Node, View, number
from varscale.theory.integrals.primitives import POSITIVE, function

IDENTITIES = ("stop_gradient", "own_gradient")  # forward; backward, nothing comes through one, and what it likes the other


class Apply(Node):
    """One elementwise primitive; `params` is (name, static parameters)."""

    how = "quadrature"
    entrywise = True

    def prepare(self) -> None:
        name, extra = self.params
        nodes = [view.node for view in self.args]
        if name == "affine":
            self.odd = nodes[0].odd if extra[1] == 0 else 0
            self.positive = nodes[0].positive and extra[0] >= 0 and extra[1] >= 0
        elif name in IDENTITIES:
            self.odd, self.positive = nodes[0].odd, nodes[0].positive
        elif name == "mul":
            self.odd = (nodes[0].odd & nodes[1].unseen) | (nodes[1].odd & nodes[0].unseen)
            self.even |= nodes[0].odd & nodes[1].odd & self.graph.symmetric
            self.positive = nodes[0].positive and nodes[1].positive
        elif name == "div":
            self.odd = nodes[0].odd & nodes[1].unseen
            self.even |= nodes[0].odd & nodes[1].odd & self.graph.symmetric
            self.positive = nodes[0].positive and nodes[1].positive
        elif name == "integer_pow":
            self.even |= 0 if extra[0] % 2 else nodes[0].odd & self.graph.symmetric
            self.positive = extra[0] % 2 == 0 or nodes[0].positive
        elif name == "power":
            self.positive = True  # a root: of what is negative there is none
        elif name == "max":
            self.positive = any(n.positive for n in nodes)
        elif name in ("add", "min", "select_n"):
            self.positive = all(n.positive for n in nodes)
        else:
            self.even |= nodes[0].odd & self.graph.symmetric if name == "abs" else 0
            self.positive = name in POSITIVE

    def compute(self) -> Table:
        from varscale.theory.propagation.expectations import elementwise_table
        from varscale.theory.rules.shared_tokens import in_common

        table = elementwise_table(self)
        gain = in_common(self) if self.params[0] in ("mul", "add", "sub") else 0.0
        return Table(table.axes, table.mean, table.second + gain) if np.any(gain) else table

    def rebuilt(self, axes: tuple[Axis, ...], args: Sequence[View]) -> Node:
        return self.graph.make(Apply, axes, args, self.params)


class Sum(Node):
    """A weighted sum of arrays with different roots; `params` are the weights. A root itself."""

    entrywise = True
    is_variance: bool = False  # mean(x²) − mean(x)², which no rounding makes negative here

    def prepare(self) -> None:
        odd = -1
        for view in self.args:
            odd &= view.node.odd
        self.odd = odd
        self.positive = all(c >= 0 for c in self.params) and all(v.node.positive for v in self.args)

    def compute(self) -> Table:
        from varscale.theory.propagation.cross_moments import pair

        mean, unsure = np.zeros([a.classes for a in self.axes]), []
        second = np.zeros([a.types for a in self.axes])
        for c, x in zip(self.params, self.args, strict=True):
            mean = mean + c * x.mean(self.axes)
            second = second + c * c * x.second(self.axes)
        for i, (c, x) in enumerate(zip(self.params, self.args, strict=True)):
            for d, y in zip(self.params[:i], self.args[:i], strict=True):
                found = pair(x, y, self.axes)
                product = c * d * np.broadcast_to(found.moment, second.shape)
                second = second + product + swapped(product, self.axes)
                if found.flagged:
                    both = (x.node.table.variance * y.node.table.variance) ** 0.5
                    unsure.append((found.flagged, 2 * abs(c * d) * both * found.doubt))
        table = Table(self.axes, mean, second)
        for how, error in unsure:
            self.graph.flag(how, min(error / max(table.mean_square, 1e-300), UNKNOWN))
        return table

    def pullback(self, cotangent: np.ndarray) -> list[np.ndarray | None]:
        from varscale.theory.propagation.cotangents import centred, sum_out

        centred_by = self.centring
        out: list[np.ndarray | None] = []
        for i, (c, view) in enumerate(zip(self.params, self.args, strict=True)):
            if i in centred_by.values():
                out.append(None)
                continue
            passed = cotangent
            if i in centred_by:
                mean = self.args[centred_by[i]]
                passed = centred(cotangent, [k for k in view.bind if k not in mean.bind], self.axes)
            out.append(c * c * sum_out(passed, self.axes, view))
        return out

    def rebuilt(self, axes: tuple[Axis, ...], args: Sequence[View]) -> Node:
        return total(self.graph, self.params, axes, args)

    @property
    def is_centred(self) -> bool:
        return any(view.node.averages for view in self.args)

    @functools.cached_property
    def centring(self) -> dict[int, int]:
        """Terms that another term takes the mean of away: index of the term to index of its mean."""
        found = {}
        for j, (d, mean) in enumerate(zip(self.params, self.args, strict=True)):
            for i, (c, view) in enumerate(zip(self.params, self.args, strict=True)):
                if not mean.node.averages or not alike(d, -c):
                    continue
                # A mean less the mean over more axes is centred too.
                wider = view.node.averages and set(view.node.params) < set(mean.node.params)
                if mean.node.args[0].node is (view.node.args[0].node if wider else view.node):
                    found[i] = j
        return found


def swapped(second: np.ndarray, axes: Sequence[Axis]) -> np.ndarray:
    """E[y_i x_j] by type (1 long where it is constant), from E[x_i y_j]."""
    for k, axis in enumerate(axes):
        if axis.classes > 1 and second.shape[k] > 1:
            second = np.take(second, axis.swap, axis=k)
    return second


def sums_below(root: Node, done: Callable[[Node], bool]) -> list[Node]:
    """The sums that a sum is made of, those that they are made of, and so on as far as they are not done, the innermost first.

    A stream is a sum of a sum of a sum, as deep as its model, and Python's stack is not.
    """
    found: dict[int, Node] = {}
    waiting = [root] if isinstance(root, Sum) else []
    while waiting:
        inner = {view.node.id: view.node for view in waiting.pop().args if isinstance(view.node, Sum)}
        new = [node for i, node in inner.items() if i not in found and not done(node)]
        found |= {node.id: node for node in new}
        waiting += new
    return [found[i] for i in sorted(found)]


def roots(node: Node) -> tuple[View, ...]:
    """The roots of an elementwise tree, as views over its frame; a node that is not elementwise is its own root."""
    if isinstance(node, Constant):
        return ()
    if not isinstance(node, Apply):
        return (View(node, tuple(range(len(node.axes)))),)
    key = ("roots", node.id)
    if key not in node.graph.memo:
        found: dict[tuple[int, tuple[int, ...]], View] = {}
        for child, bind in node.args:
            for root in roots(child):
                view = root.within(bind)
                found[view.node.id, view.bind] = view
        node.graph.memo[key] = tuple(found[k] for k in sorted(found))
    return node.graph.memo[key]


def forward(node: Node) -> Node:
    """An elementwise tree as it computes, whatever it does to gradients."""
    if not isinstance(node, Apply):
        return node

    def rebuilt() -> Node:
        args = [View(forward(child), bind) for child, bind in node.args]
        if node.params[0] in IDENTITIES:
            return _whole(args[0], node.axes)
        return node.graph.make(Apply, node.axes, args, node.params) if args != list(node.args) else node

    return node.graph.once(("forward", node.id), rebuilt)


def form(node: Node) -> int:
    """A number that is equal for trees which are one function of their roots, these taken in the order of `roots`."""
    key = ("form", node.id)
    if key not in node.graph.memo:
        own = {(r.node.id, r.bind): i for i, r in enumerate(roots(node))}
        parts: list[Hashable] = []
        for child, bind in node.args if isinstance(node, Apply) else ():
            places = tuple(own[r.node.id, r.within(bind).bind] for r in roots(child))
            parts.append(child.params if isinstance(child, Constant) else (form(child), bind, places))
        known: dict[Hashable, int] = node.graph.once("forms", dict)
        content = (node.params if isinstance(node, Apply) else None, node.axes, tuple(parts))
        node.graph.memo[key] = known.setdefault(content, len(known))
    return node.graph.memo[key]


def _unrounded(c: float) -> float:
    """A factor without what rounding left where it is a whole number: n times 1/n is 1."""
    return float(round(c)) if math.isfinite(c) and 0.5 < abs(c) < 2**40 and alike(c, round(c)) else c


def alike(c: float, d: float) -> bool:
    """Whether two factors are one, but for rounding."""
    return math.isclose(c, d, rel_tol=1e-13)


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
        return affine(node.args[0].node, c * c0, c * d0 + d) if node.args[0].bind == identity else _apply(node, c, d)
    return _apply(node, c, d)


def _apply(node: Node, c: float, d: float) -> Node:
    return node.graph.make(Apply, node.axes, [View(node, tuple(range(len(node.axes))))], ("affine", (float(c), float(d))))


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


def apply(graph: Graph, name: str, extra: tuple[Any, ...], axes: tuple[Axis, ...], views: Sequence[View]) -> Node:
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
        # A branch of zeros makes the choice a factor, 1 or 0, and factors that are independent multiply exactly.
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
    if (opened := _opened(live)) is not None:
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


def _opened(terms: Sequence[tuple[float, View]]) -> list[tuple[float, View]] | None:
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
    gone = {i for found in uses.values() if len(found) > 1 and sum(c for _, c in found) == 0 for i, _ in found}
    if not gone:
        return None
    return [t for i, (term, part) in enumerate(zip(terms, parts, strict=True)) for t in (part if i in gone else [term])]


def _bare(view: View) -> tuple[float, float, View]:
    """What a view is c· + d of, in whatever order of axes: c, d, and that."""
    c, d = 1.0, 0.0
    while isinstance(view.node, Apply) and view.node.params[0] == "affine":
        scale, shift = view.node.params[1]
        c, d, view = c * scale, d + c * shift, view.node.args[0].within(view.bind)
    return c, d, view


def _is_variance(node: Sum) -> bool:
    """Whether it is the mean of squares less the square of the mean of the same over the same axes."""
    from varscale.theory.rules.reductions import Mean, mean_node

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
    inner, more, own = _bare(View(mean_node(x.node, [k for k, b in enumerate(x.bind) if b in reduced]), places))
    return own == mean and alike(c * inner, scale) and alike(c * more + d, shift)
