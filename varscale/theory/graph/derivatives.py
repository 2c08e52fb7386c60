"""Derivatives of elementwise trees, as elementwise trees of the same roots: their moments are taken like any other's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from varscale.theory.graph.expressions import Apply
from varscale.theory.graph.nodes import Node, View, number
from varscale.theory.graph.normal_form import apply
from varscale.theory.graph.store import once_per_node

# Functions whose derivative is zero wherever they have one.
_STEPS = {
    "gt",
    "lt",
    "ge",
    "le",
    "eq",
    "ne",
    "sign",
    "floor",
    "ceil",
    "round",
    "is_finite",
    "convert",
    "bitcast",
    "and",
    "or",
    "xor",
    "not",
    "shift_left",
    "shift_right_logical",
    "shift_right_arithmetic",
}


def derivative(node: Node, target: View) -> View | None:
    """∂node/∂target over the node's frame, by the chain rule through its tree; None where it does not depend on it."""
    graph = node.graph
    if node is target.node:
        return View(number(graph, 1.0), ()) if target.bind == tuple(range(len(node.axes))) else None
    if not isinstance(node, Apply):
        return None
    return _chain(node, target)


@once_per_node
def _chain(node: Apply, target: View) -> View | None:
    graph, axes = node.graph, node.axes
    whole = tuple(range(len(axes)))
    name, extra = node.params

    def build(op: str, *views: View, extra: tuple[Any, ...] = ()) -> View:
        out = apply(graph, op, extra, axes, views)
        return View(out, whole if out.axes else ())

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
        case "stop_gradient":
            return None
        case "add" | "own_gradient":
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
        case "integer_pow" | "power":
            y = extra[0]
            return build("mul", View(number(graph, float(y)), ()), build(name, args[0], extra=(y - 1,)))
        case "exp":
            return build("exp", args[0])
        case _ if name in _STEPS:
            return None
        case _:
            return build(f"∂{k}{name}", *args, extra=extra)
