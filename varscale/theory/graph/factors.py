"""The factors of the products in an elementwise tree, and groups of what belongs together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from varscale.theory.graph.expressions import IDENTITIES, Apply
from varscale.theory.graph.nodes import Constant, Node, View, number

T = TypeVar("T")


def factors(view: View) -> tuple[float, list[View]]:
    """A tree as a number times the factors of its products."""
    node, bind = view
    if isinstance(node, Constant):
        return node.params, []
    if isinstance(node, Apply):
        name, extra = node.params
        args = [child.within(bind) for child in node.args]
        if name == "mul":
            (c, f), (d, g) = (factors(a) for a in args)
            return c * d, f + g
        if name == "affine" and extra[1] == 0:
            c, f = factors(args[0])
            return c * extra[0], f
        if name in IDENTITIES:
            return factors(args[0])
        if name == "div":
            c, f = factors(args[0])
            one = View(_reciprocal(args[1].node), args[1].bind)
            return c, [*f, one]
    return 1.0, [view]


def _reciprocal(node: Node) -> Node:

    identity = tuple(range(len(node.axes)))
    return node.graph.make(
        Apply, node.axes, [View(number(node.graph, 1.0), ()), View(node, identity)], ("div", ())
    )


def connected(items: Iterable[T], joined: Callable[[T, T], object]) -> list[list[T]]:
    """Items in groups, so that no two of different groups are joined."""
    groups: list[list[T]] = []
    for item in items:
        mine = [group for group in groups if any(joined(item, other) for other in group)]
        groups = [g for g in groups if g not in mine] + [[*(x for g in mine for x in g), item]]
    return groups
