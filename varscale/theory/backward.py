"""Cotangents: their second moments by type, passed from the output back through every node.

Gradient independence is the one assumption: a cotangent is independent of the forward values it is multiplied with,
except through the function it passes (its derivative is a function of the same roots, and its moments are taken exactly).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from varscale.theory.axes import Axis, apply_axis, contract_axis, lift_types
from varscale.theory.elementwise import Apply, apply, roots
from varscale.theory.graph import Array, Constant, Leaf, Node, View, number
from varscale.theory.moments import full_types
from varscale.theory.spread import companions


def sum_out(second: np.ndarray, frame: Sequence[Axis], view: View) -> np.ndarray:
    """A frame's cotangent moments, summed over the axes that the viewed node does not have, by the node's own types."""
    out = np.array(full_types(second, frame))
    for k in reversed(range(len(frame))):
        if k not in view.bind:
            out = contract_axis(out, k, frame[k].pairs)
    kept = [k for k in range(len(frame)) if k in view.bind]
    for place, k in enumerate(kept):
        own = view.node.axes[view.bind.index(k)]
        if own.labels != frame[k].labels:
            out = apply_axis(out, place, coarsen(frame[k], own))
    return out.transpose([kept.index(b) for b in view.bind]) if view.bind else out


def coarsen(fine: Axis, coarse: Axis) -> np.ndarray:
    """Averages of a type array over the pairs that a coarser classing pools, (coarse types, fine types)."""
    index = lift_types(fine, coarse)
    if index.ndim == 2:
        return lift_types(coarse, fine) if lift_types(coarse, fine).ndim == 2 else np.eye(fine.types)[lift_types(coarse, fine)]
    out = np.zeros((coarse.types, fine.types))
    out[index, np.arange(fine.types)] = np.maximum(fine.pairs, 1e-12)
    return out / np.maximum(out.sum(axis=1, keepdims=True), 1e-300)


def derivative(node: Node, target: View) -> View | None:
    """∂node/∂target over the node's frame, by the chain rule through its tree; None where it does not depend on it."""
    graph = node.graph
    if node is target.node:
        return View(number(graph, 1.0), ()) if target.bind == tuple(range(len(node.axes))) else None
    if not isinstance(node, Apply):
        return None
    key = ("derivative", node.id, target.node.id, target.bind)
    if key not in graph.memo:
        graph.memo[key] = _chain(node, target)
    return graph.memo[key]


def _chain(node: Apply, target: View) -> View | None:
    graph, axes = node.graph, node.axes
    whole = tuple(range(len(axes)))
    name, extra = node.params

    def build(op: str, *views: View, extra: tuple[Any, ...] = ()) -> View:
        out = apply(graph, op, extra, axes, views)
        return View(out, () if isinstance(out, Constant) else whole)

    total: View | None = None
    for k, arg in enumerate(node.args):
        places = {b: i for i, b in enumerate(arg.bind)}
        if not all(b in places for b in target.bind):
            continue
        inner = derivative(arg.node, View(target.node, tuple(places[b] for b in target.bind)))
        if inner is None:
            continue
        inner = inner.within(arg.bind)
        outer = _partial(name, extra, k, node.args, build)
        if outer is None:
            continue
        term = build("mul", outer, inner)
        total = term if total is None else build("add", total, term)
    return total


def _partial(name: str, extra: tuple[Any, ...], k: int, args: Sequence[View], build: Any) -> View | None:
    """∂(primitive)/∂(argument k): in closed form where that keeps products apart, by a central difference otherwise."""
    graph = args[k].node.graph
    one = View(number(graph, 1.0), ())
    match name:
        case "add":
            return one
        case "sub":
            return one if k == 0 else View(number(graph, -1.0), ())
        case "affine":
            return View(number(graph, extra[0]), ())
        case "mul":
            return args[1 - k]
        case "div" if k == 0:
            return build("div", one, args[1])
        case "select_n":
            if k == 0:
                return None
            picks = [View(number(graph, float(i == k)), ()) for i in range(1, len(args))]
            return build("select_n", args[0], *picks)
        case "integer_pow":
            y = extra[0]
            return build("mul", View(number(graph, float(y)), ()), build("integer_pow", args[0], extra=(y - 1,)))
        case "exp":
            return build("exp", args[0])
        case "gt" | "lt" | "ge" | "le" | "eq" | "ne" | "sign" | "floor" | "ceil" | "round" | "is_finite" | "convert":
            return None
        case _:
            return build(f"∂{k}{name}", *args, extra=extra)


def cotangents(outputs: Iterable[tuple[Node, np.ndarray]], watched: Sequence[Node]) -> dict[int, float]:
    """Second moments of the cotangents at watched nodes, averaged over their elements.

    Args:
        outputs: nodes with the second moments, by type, of the cotangents they are given.
        watched: the nodes asked for.

    Returns:
        Node id to second moment; a watched node that no cotangent reaches is not in it.
    """
    pending: dict[int, np.ndarray] = {}
    nodes: dict[int, Node] = {}
    inside: dict[int, np.ndarray] = {}

    def add(store: dict[int, np.ndarray], node: Node, second: np.ndarray | None) -> None:
        if second is None or isinstance(node, Array | Constant):
            return
        nodes[node.id] = node
        second = np.broadcast_to(second, node.frame_types)
        store[node.id] = store[node.id] + second if node.id in store else second

    for node, second in outputs:
        add(pending, node, second)
    asked = {n.id: n for n in watched}
    lowest = min(asked, default=0)
    done: dict[int, np.ndarray] = {}
    while pending:
        top = max(pending)
        second = done[top] = pending.pop(top)
        node = nodes[top]
        if top < lowest or isinstance(node, Leaf):
            continue
        if not isinstance(node, Apply):
            for view, back in zip(node.args, node.pullback(second), strict=True):
                add(pending, view.node, back)
            continue
        scales = companions(node)
        for root in roots(node):
            group = scales.get((root.node.id, root.bind))
            if group is None and any(root in g[1:] for g in scales.values()):
                continue  # a norm's own scale: its part is the projection below
            back = _through(node, root, second)
            if back is not None and group is not None and len(group) > 1:
                back = back - _projection(node, root, group[1], second)
            add(pending, root.node, back)
        for view in _within(node, asked):
            add(inside, view.node, _through(node, view, second))
    out: dict[int, float] = {}
    for n in watched:
        found = [store[n.id] for store in (done, inside) if n.id in store]
        if found:
            out[n.id] = float(np.asarray(mean_square(sum(found), n.axes)))  # pyright: ignore[reportArgumentType]
        elif isinstance(n, Apply) and n.params[0] == "affine" and n.args[0].node.id in done:
            inner = n.args[0].node
            if len(inner.axes) == len(n.axes):
                out[n.id] = float(mean_square(done[inner.id], inner.axes)) / n.params[1][0] ** 2
    return out


def _through(node: Apply, target: View, second: np.ndarray) -> np.ndarray | None:
    slope = derivative(node, target)
    if slope is None:
        return None
    return sum_out(second * slope.second(node.axes), node.axes, target)


def _projection(node: Apply, root: View, scale: View, second: np.ndarray) -> np.ndarray:
    """What a norm takes out of the cotangent u along its own output y: y · mean(u y), whose mean square is E[mean(u y)²]."""
    slope = derivative(node, root)
    assert slope is not None
    along = apply(node.graph, "mul", (), node.axes, [slope, root])
    whole = View(along, () if isinstance(along, Constant) else tuple(range(len(node.axes))))
    out = sum_out(second * whole.second(node.axes), node.axes, root) / max(root.node.table.mean_square, 1e-300)
    for k, place in enumerate(root.bind):
        if place not in scale.bind:
            axis = root.node.axes[k]
            same = (np.arange(axis.types) < axis.classes).astype(float)
            out = np.moveaxis(np.multiply.outer(same, contract_axis(out, k, axis.any_pair)), 0, k)
    return out


def _within(node: Apply, asked: dict[int, Node]) -> list[View]:
    """The watched nodes inside an elementwise tree, as views over its frame."""
    key = ("within", node.id)
    memo = node.graph.memo
    if key not in memo:
        found: dict[tuple[int, tuple[int, ...]], View] = {}
        for child, bind in node.args:
            if isinstance(child, Apply):
                for view in [View(child, tuple(range(len(child.axes)))), *_within(child, asked)]:
                    if view.node.id in asked:
                        placed = view.within(bind)
                        found[placed.node.id, placed.bind] = placed
        memo[key] = list(found.values())
    return memo[key]


def mean_square(second: np.ndarray, axes: Sequence[Axis]) -> np.ndarray:
    """The average over elements of a type array."""
    for axis in axes:
        second = contract_axis(second, 0, axis.same)
    return second


def centred(second: np.ndarray, axes: Sequence[int], frame: Sequence[Axis]) -> np.ndarray:
    """A cotangent less its mean over some axes: E[(g − ḡ)(g' − ḡ')] = E[g g'] − E[ḡ ḡ'] for exchangeable positions."""
    mean = np.array(full_types(second, frame))
    for k in axes:
        mean = np.repeat(np.expand_dims(contract_axis(mean, k, frame[k].any_pair), k), frame[k].types, axis=k)
    return second - mean
