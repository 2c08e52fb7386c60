r"""Windows that overlap: given their weights, two places of a convolution have not in common what they have on average.

Over fresh weights y_p and y_q have the correlation of their inputs. Given the weights it is off by

    r = Σ w_t w_s / Σ w²   over the pairs of taps (t at p, s at q, t ≠ s) that read one input,

of mean 0 and variance N/(m (m + κ − 1)) where N pairs meet and a sum has m terms of kurtosis κ, times the square of the part
of the inputs' mean square that is not common to all places, and times 1 + excess/2 for inputs of an excess kurtosis. A linear
function does not see it; to second order a function with E[f f'] = S(ρ) gains S″(ρ)/2 times that variance: little for each pair
of places, but the places near one another are what the mean over a picture is made of. Where a sum is over many channels as
well it is small.
"""

from __future__ import annotations

import functools

import numpy as np

from varscale.theory.domain.tables import lift
from varscale.theory.graph.expressions import Sum
from varscale.theory.graph.nodes import Node
from varscale.theory.graph.store import once_per_node


@once_per_node
def scatter(node: Node) -> np.ndarray | None:
    """Variance over weights of the correlation of two entries, by type of pair; None where there is none."""
    return scatter_of(node)


@functools.singledispatch
def scatter_of(root: Node) -> np.ndarray | None:
    """`scatter` of a kind of node, worked out."""
    return None


@scatter_of.register(Sum)
def scatter_of_sum(root: Sum) -> np.ndarray | None:
    """Independent terms share the correlation as they share the variance, of which a mean that is taken away is no part."""
    terms = zip(root.params, root.args, strict=True)
    whole = max(root.table.mean_square, 1e-300)
    found = [
        (c * c * view.node.table.mean_square / whole) ** 2
        * lift(own, view.node.axes, view.bind, root.axes, pairs=True)
        for c, view in terms
        if (own := scatter(view.node)) is not None
    ]
    return np.asarray(sum(found)) if found else None
