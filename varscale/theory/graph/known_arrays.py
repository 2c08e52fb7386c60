"""Numbers that are given: arrays as inputs, and what is computed from them alone.

Moments by class know neither which places of an array are alike nor how one given array goes with another, entry by entry.
Where all that an equation reads is given, so is what it makes: it is computed, and its moments are those of its own numbers.
Equations that only move entries keep the structure that rules see (classes, blocks); numbers are worked out when asked for.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from scipy import special

from varscale.theory.domain.axes import Axes, over_classes, rest
from varscale.theory.domain.tables import NEGLIGIBLE, Table, estimate, estimated_products, over_frame
from varscale.theory.graph.layout import Value, axes_along
from varscale.theory.graph.linear_nodes import Permute, Rearranged, unmoved
from varscale.theory.graph.nodes import Array, Graph, Leaf, Node, View, number, second_moments
from varscale.theory.graph.store import Fact
from varscale.theory.integrals.hermite_series import Z

# The numbers of a node over its axes, or what works them out.
MEASURED: Fact[int, np.ndarray | Callable[[], np.ndarray]] = Fact()

_SMOOTH = 0.3  # by which share of the variance half a squared step to a neighbour is less
MOST_COMPUTED = 1 << 22  # entries up to which given numbers are computed with rather than described


class Computed(Leaf):
    """What is computed from given arrays; `params` is ("input", digest). It depends on all that they depend on."""

    kurtosis = 3.0

    @functools.cached_property
    def transport(self) -> np.ndarray:
        """Its numbers in order, on the normal grid."""
        values = np.sort(_values(self), axis=None)
        return values[np.minimum((special.ndtr(Z) * values.size).astype(int), values.size - 1)]


@second_moments.register
def second_moments_of_given(node: Array | Computed) -> Table:
    """Those of its own numbers, pooled by class and type."""
    return estimate(_values(node), node.axes)


def note_numbers(node: Node, values: np.ndarray) -> None:
    """Note that the moments of a leaf are those of known numbers, (sizes of its axes...).

    Its neighbours are near where they are more alike than any two along an axis between samples and features, or may be copies.
    """
    smooth = (
        np.square(np.diff(values, axis=k)).mean() / 2 < (1 - _SMOOTH) * values.var(axis=k, ddof=1).mean()
        for k in range(1, values.ndim - 1)
    )
    node.near = float(values.ndim < 3 or any(smooth))
    MEASURED.put(node.graph, node.id, values)


def scales_samples(views: Sequence[View], frame: Axes, curved: bool) -> bool:
    """Whether an input that differs from sample to sample is one factor of all features, and classes do not tell its numbers.

    Of such m, E[(Σ m x)² / (Σ m)²] is not E[(Σ m x)²] E[1 / (Σ m)²], and a curved f(m w) of weights has as few directions.
    """
    if any(0 in bind and node.deps and not node.deps & node.graph.inputs for node, bind in views):
        return False  # an axis of weights, and so not of samples
    read = [node for node, bind in views if 0 in bind and len(frame) - 1 not in bind]
    tables = (x.table for x in read if x.is_input or (not curved and is_known_array(x)))
    untold = any(
        t.mean_square - over_classes(np.square(t.mean), t.axes) > NEGLIGIBLE * t.mean_square for t in tables
    )
    return untold and any(node.deps & ~node.graph.inputs for node, _ in views)


def scatter_of_given(node: Node, axes: Collection[int], taps: int = 1) -> float:
    """1 − 1/(E[v] E[1/v]) of mean squares v over some axes, between places of the others: a gamma v's relative variance.

    Over all axes it is that of a mean over all samples. At several taps v is lognormal, of a smooth array as varied as at one.
    """
    held = rest(node.axes, axes)
    v = np.square(_values(node)).mean(axis=tuple(axes if held else range(1, len(node.axes))))
    if 0 in held and node.axes[0].classes > 1:  # of samples of one scale
        v = v / np.maximum(v.mean(axis=tuple(range(1, v.ndim)), keepdims=True), 1e-300)
    v = v[v > 0]
    varied = v.var() / v.mean() ** 2 / (1 if node.near == 1 else taps)
    varied = 1 - 1 / (v.mean() * (1 / v).mean()) if taps == 1 else varied / (1 + varied)
    return varied / (1 if held else len(v))


def numbers(node: Node) -> np.ndarray | None:
    """The entries of a node over its axes, where they are given or computed from what is; else None."""
    if node.is_literal:
        return node.values if isinstance(node, Array) else np.array(node.params)
    found = MEASURED.get(node.graph, node.id)
    if callable(found):
        found = MEASURED.put(node.graph, node.id, found())
    if found is None and isinstance(node, Rearranged) and (inner := numbers(node.argument)) is not None:
        sizes = [axis.size for axis in node.axes]
        found = inner.transpose(node.params) if isinstance(node, Permute) else inner.reshape(sizes)
    return found  # pyright: ignore[reportReturnType]


def is_known_array(node: Node) -> bool:
    """Whether its entries are known numbers."""
    node = unmoved(node)
    return node.is_literal or node.id in MEASURED.of(node.graph)


def all_known(values: Sequence[Any]) -> bool:
    """Whether what an equation reads is known numbers."""
    return bool(values) and all(isinstance(x, Value) and is_known_array(x.node) for x in values)


def entries(x: Value) -> np.ndarray | None:
    """The numbers of a value, in its shape."""
    if (found := numbers(x.node)) is None:
        return None
    atoms = [a for dim in x.dims for a in dim]
    found = found.transpose(axes_along(x.dims))
    found = found[tuple(None if a.axis is None else slice(None) for a in atoms)]
    return np.broadcast_to(found, [a.size for a in atoms]).reshape(x.shape)


def note_later(x: Value, found: Callable[[], np.ndarray]) -> None:
    """Note how to work out the numbers of a value, in its shape, when those of its node are asked for."""
    atoms = [a for dim in x.dims for a in dim]

    def over_axes() -> np.ndarray:
        values = found().reshape([a.size for a in atoms])
        values = values[tuple(0 if a.axis is None else slice(None) for a in atoms)]
        return values.transpose(np.argsort(axes_along(x.dims)))

    if not is_known_array(x.node):
        MEASURED.put(x.node.graph, x.node.id, over_axes)


def computed(graph: Graph, values: np.ndarray, axes: Axes, sources: Sequence[Node]) -> Node:
    """The node of numbers that were computed from given arrays; another one than theirs where they are equal."""
    values = np.ascontiguousarray(np.broadcast_to(values, [a.size for a in axes]), float)
    if (values == values.flat[0]).all():
        return number(graph, float(values.flat[0]))
    key = ("input", "computed", hashlib.sha1(values.tobytes()).hexdigest(), values.shape)
    made = graph.make(Computed, axes, (), key)
    note_numbers(made, values)
    made.positive = bool(values.min() >= 0)
    made.deps |= functools.reduce(lambda bits, node: bits | node.deps, sources, 0)
    return made


def known_cross(a: View, b: View, frame: Axes) -> np.ndarray | None:
    """E[a_i b_j] by type of two given arrays, over pairs of places; None of what is not given, or is too large."""
    sizes = [axis.size for axis in frame]
    most = max(MOST_COMPUTED, *(math.prod(axis.size for axis in view.node.axes) for view in (a, b)))
    if math.prod(sizes) > most or not (is_known_array(a.node) and is_known_array(b.node)):
        return None
    first, second = (np.broadcast_to(numbers_over(view, frame), sizes).astype(float) for view in (a, b))
    return estimated_products(first[None], second[None], frame)[0]


def numbers_over(view: View, frame: Axes) -> np.ndarray:
    """The entries of a known array over a frame, 1 long where it is constant."""
    return over_frame(_values(view.node), view.bind, len(frame))


def _values(node: Node) -> np.ndarray:
    found = numbers(node)
    assert found is not None
    return found
