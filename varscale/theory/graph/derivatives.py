"""Derivatives of elementwise trees, as elementwise trees of the same roots: their moments are taken like any other's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from varscale.theory.graph.expressions import Apply
from varscale.theory.graph.nodes import Node, View, number
from varscale.theory.graph.normal_form import apply
from varscale.theory.graph.store import once_per_node

# Whose derivative is zero wherever they have one, or by decree; of a choice by what it is chosen by.
_FLAT = {
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
    "stop_gradient",
    "select_n",
}


def derivative(node: Node, target: View) -> View | None:
    """∂node/∂target over the node's frame, by the chain rule through its tree; None where it does not depend on it."""
    if node is target.node:
        return View(number(node.graph, 1.0), ()) if target == node.whole else None
    return _chain(node, target) if isinstance(node, Apply) else None


@once_per_node
def _chain(node: Apply, target: View) -> View | None:
    name, extra = node.params

    def build(op: str, *views: View, extra: tuple[Any, ...] = ()) -> View:
        return apply(node.graph, op, extra, node.axes, views).whole

    total: View | None = None
    for k, arg in enumerate(node.args):
        places = {b: i for i, b in enumerate(arg.bind)}
        inner = derivative(arg.node, View(target.node, tuple(places.get(b, -1) for b in target.bind)))
        outer = None if inner is None else _partial(name, extra, k, node.args, build)
        if inner is not None and outer is not None:
            term = build("mul", outer, inner.within(arg.bind))
            total = term if total is None else build("add", total, term)
    return total


def _partial(name: str, extra: tuple[Any, ...], k: int, args: Sequence[View], build: Any) -> View | None:
    """∂(primitive)/∂(argument k): in closed form where that keeps products apart, by a central difference otherwise."""
    graph = args[k].node.graph
    match name:
        case "add" | "own_gradient" | "sub" | "affine":
            c = extra[0] if name == "affine" else -1.0 if name == "sub" and k else 1.0
            return View(number(graph, c), ())
        case "mul":
            return args[1 - k]
        case "div" if k == 0:
            return build("div", View(number(graph, 1.0), ()), args[1])
        case "select_n" if k:
            picks = [View(number(graph, float(i == k)), ()) for i in range(1, len(args))]
            return build("select_n", args[0], *picks)
        case "integer_pow" | "power":
            y = extra[0]
            return build("mul", View(number(graph, float(y)), ()), build(name, args[0], extra=(y - 1,)))
        case "exp":
            return build("exp", args[0])
        case _ if name in _FLAT:
            return None
        case _:
            return build(f"∂{k}{name}", *args, extra=extra)
