"""A weight applied and then its transpose: tied autoencoders, Hopfield layers, energies' gradients.

By Stein's lemma, for Gaussian W with independent entries of variance σ² and h = W x, over n units,

    E[Σ_a f(h_a) W_aj | x] = σ² Σ_a E[f'(h_a) ∂h_a/∂W_aj] = n σ² E[f'] x_j.

What is left about this mean has, to leading order in 1/n, the moments of a product with fresh weights, which is what the rule
of products takes any to be. So the product is written as the sum of both, and all that reads it sees that it goes with x.

A weight applied twice the same way has no such term: ∂h_a/∂W_ja is x_j for one a out of n.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from varscale.theory.domain.axes import Axis, shares
from varscale.theory.graph.derivatives import derivative
from varscale.theory.graph.expressions import Apply, Sum, roots
from varscale.theory.graph.linear_nodes import Contract
from varscale.theory.graph.nodes import Graph, Leaf, Node, View
from varscale.theory.graph.normal_form import forward, total
from varscale.theory.rules.softmax import Softmax


def applied_back(
    graph: Graph, axes: Sequence[Axis], params: Sequence[Axis], views: Sequence[View]
) -> Node | None:
    """A contraction of these views over `params`, where one is the transpose of a weight that the other was made with.

    Args:
        graph: the graph.
        axes: the axes of the product.
        params: those that are summed.
        views: its two arguments, over both.

    Returns:
        The sum of the mean given what the weight was applied to, and of what is left; None elsewhere.
    """
    for weight, other in zip(views, views[::-1], strict=True):
        leaf = weight.node
        if not (isinstance(leaf, Leaf) and leaf.random and leaf.odd & other.node.deps and not leaf.is_input):
            continue
        width = math.prod(axis.size for axis in params)
        terms = [
            (slope * width * leaf.table.mean_square, before)
            for slope, used in _uses(other, leaf)
            if (before := _before(used, weight, len(axes), len(params))) is not None
        ]
        if not terms:
            continue
        product = graph.make(Contract, axes, views, tuple(params))
        whole = View(product, tuple(range(len(axes))))
        return total(graph, [1.0, *(c for c, _ in terms)], tuple(axes), [whole, *(x for _, x in terms)])
    return None


def _uses(view: View, leaf: Leaf) -> Iterator[tuple[float, View]]:
    """Products with a weight that a view is an elementwise function of, each with its mean derivative."""
    pending = [(1.0, view)]
    while pending:
        slope, (node, bind) = pending.pop()
        if not leaf.deps & node.deps:
            continue
        if isinstance(node, Contract):
            if any(v.node is leaf for v in node.args):
                yield slope, View(node, bind)
        elif isinstance(node, Sum):
            pending += [
                (c * slope, term.within(bind)) for c, term in zip(node.params, node.args, strict=True)
            ]
        elif isinstance(node, Softmax):  # ∂p/∂l = p (1 − p)
            pending.append(
                ((node.table.total_mean - node.table.mean_square) * slope, node.args[0].within(bind))
            )
        elif isinstance(node, Apply):
            for root in roots(node):
                found = derivative(forward(node), root) if leaf.deps & root.node.deps else None
                if found is not None:
                    mean = np.broadcast_to(found.mean(node.axes), [a.classes for a in node.axes])
                    pending.append((float(shares(node.axes) @ mean.ravel()) * slope, root.within(bind)))


def _before(used: View, weight: View, outer: int, summed: int) -> View | None:
    """What a weight was applied to, read where its transpose leaves it; None if this is not its transpose.

    Args:
        used: the first product, over the frame of the second.
        weight: the weight in the second, over that frame.
        outer: axes of the second product; those that it sums follow.
        summed: how many.
    """
    first, bind = used
    k = next(i for i, v in enumerate(first.args) if v.node is weight.node)
    applied, x = first.args[k], first.args[1 - k]
    place = dict(enumerate(bind))  # of the first product's axes
    for mine, theirs in zip(applied.bind, weight.bind, strict=True):
        if mine < len(first.axes):  # its units, which the second one sums
            if place[mine] != theirs or theirs < outer:
                return None
        elif theirs >= outer or theirs in bind:
            return None
        else:
            place[mine] = theirs
    if {b for b in weight.bind if b >= outer} != set(range(outer, outer + summed)):
        return None
    moved = [place.get(b, outer) for b in x.bind]
    return None if any(b >= outer for b in moved) else View(x.node, tuple(moved))
