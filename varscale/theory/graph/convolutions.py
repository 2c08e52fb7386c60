"""Convolutions and sums over windows: which taps of which positions meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from varscale.theory.domain.axes import Axis, apply_axis, grouped, pool
from varscale.theory.domain.axis_maps import AxisMap, adjoint, entry_map, pair_counts
from varscale.theory.domain.tables import LEADING_ORDER, estimated_products, full_types, over_frame
from varscale.theory.graph.nodes import Node

ONE = Axis(1)  # a dimension of size 1: only the type "same"
# Set on the validation grid, not derived: of a gradient through sums of n terms, n times this.
_FEW_TERMS = 1.5
Dims = tuple[int | None, ...]  # which axis each dimension is of; None: its size is 1


class Window(NamedTuple):
    """How one spatial axis is read."""

    size_out: int
    taps: int
    stride: int
    low: int
    input_dilation: int
    dilation: int
    weights: tuple[float, ...] | None = None  # of its taps; None: 1 each

    @property
    def line(self) -> np.ndarray:
        return np.ones(self.taps) if self.weights is None else np.array(self.weights)


@cache
def hits(window: Window, size_in: int) -> np.ndarray:
    """Input position of each (output position, tap), −1 where there is none."""
    n, taps, stride, low, input_dilation, dilation, _ = window
    at = np.arange(n)[:, None] * stride - low + np.arange(taps)[None] * dilation
    real = (at >= 0) & (at % input_dilation == 0) & (at // input_dilation < size_in)
    return np.where(real, at // input_dilation, -1)


@cache
def output_axis(window: Window, axis: Axis) -> Axis:
    """Output positions classed by their taps in each class of the input; of too many kinds, those with as many merge first."""
    at = hits(window, axis.size)
    seen = np.dot(np.append(axis.members, np.zeros((axis.classes, 1)), axis=1)[:, at], window.line).T
    taps = 2 * window.taps * axis.size * seen.sum(axis=1, keepdims=True)
    return ONE if window.size_out == 1 else grouped(np.concatenate([seen, taps], axis=1))


@cache
def window_map(window: Window, axis: Axis, out: Axis) -> AxisMap:
    """Sums over the window, as a map of the axis."""
    rows = np.repeat(np.arange(window.size_out), window.taps)
    return entry_map(rows, hits(window, axis.size).ravel(), out, axis, np.tile(window.line, window.size_out))


@cache
def tap_pairs(window: Window, axis: Axis, out: Axis) -> tuple[np.ndarray, np.ndarray]:
    """Mean numbers of pairs of the same tap and of two taps by type of output and of input pair, (types_out, types_in)."""
    at, outputs = hits(window, axis.size), np.arange(window.size_out)
    same = np.sum([pair_counts(entry_map(outputs, tap, out, axis)) for tap in at.T], axis=0)
    return same, pair_counts(window_map(window, axis, out)) - same


@cache
def tap_scatter(window: Window, axis: Axis, out: Axis) -> np.ndarray:
    """E[n²]/E[n]² by type of output pair, n the taps by which both read an input: where that is dilated, not all pairs do."""
    reads = (hits(window, axis.size) >= 0).T.astype(float)
    both = (reads[:, None] * reads).reshape(-1, window.size_out)
    shared, squares = (estimated_products(x, x, [out]).sum(axis=0)[: out.types] for x in (reads, both))
    return np.where(shared > 0, squares / np.maximum(shared, 1e-150) ** 2, 1.0)


def dim_axes(node: Node, dims: Dims) -> list[Axis]:
    """The axes of a node by dimension."""
    return [ONE if k is None else node.axes[k] for k in dims]


def by_dim(array: np.ndarray, dims: Dims) -> np.ndarray:
    """An array over axes as one over dimensions."""
    return over_frame(array, list(map(dims.index, range(array.ndim))), len(dims))


def by_axis(array: np.ndarray, dims: Dims) -> np.ndarray:
    """An array over dimensions as one over axes."""
    kept = array.reshape([n for n, k in zip(array.shape, dims, strict=True) if k is not None])
    return kept.transpose(np.argsort([k for k in dims if k is not None]))


class ConvParams(NamedTuple):
    """What a convolution is, beside its arguments: its feature groups, and how each spatial axis is read."""

    groups: int
    windows: tuple[Window, ...]
    x_dims: Dims  # batch, channel, space...
    w_dims: Dims  # out, in, taps...
    out_dims: Dims  # batch, channel, space...


class Conv(Node):
    """A convolution."""

    params: ConvParams
    width: float  # pyright: ignore[reportIncompatibleVariableOverride] set by prepare

    def prepare(self) -> None:
        (x, w), (groups, _, xd, *_) = self.sources, self.params
        self.reads = dim_axes(x, xd)[1].size // groups  # channels that an output is made of
        self.width = float(self.reads * taps_of(self))
        self.odd = (x.odd & w.unseen) | (w.odd & x.unseen)
        # A sum of few terms (a depthwise one: nine) is not Gaussian: its sign follows the channel it reads.
        self.gradient_doubt = _FEW_TERMS / self.width

    def channels(self) -> tuple[np.ndarray, np.ndarray]:
        """Channel pairs behind a pair of output channels, (types_out, types_in): by w's same input, and by two of them."""
        groups, _, xd, _, od = self.params
        c, o = dim_axes(self.argument, xd)[1], dim_axes(self, od)[1]
        # Within one group channels agree with w's input index: the counts of all channels, thinned by groups.
        agree, differ = c.pairs * c.agrees / groups, c.pairs * ~c.agrees
        differ /= max(differ.sum(), 1e-300)
        together = (o.size / groups - 1) / (o.size - 1) if o.size > 1 and groups > 1 else 1.0
        one = np.where(o.agrees[:, None], agree, together * agree + (1 - together) * self.reads * differ)
        return one, np.broadcast_to(self.reads * (self.reads - 1) * differ, one.shape)

    def carry(self, second: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """Second moments by type of the output, from those of the input; or of the input's cotangent, from the output's."""
        (x, w), (_, windows, xd, wd, od) = self.sources, self.params
        x_axes, o_axes = dim_axes(x, xd), dim_axes(self, od)
        meeting = [self.channels(), *map(tap_pairs, windows, x_axes[2:], o_axes[2:])]
        # Classes within w's own axes do not change how its taps meet the input.
        w_second = pool(by_dim(w.table.second, wd), [ONE, *dim_axes(w, wd)[1:]])
        given, result = by_dim(second, od if transposed else xd), np.zeros(())
        for apart in np.ndindex(*w_second.shape[1:]):
            weight = w_second[(slice(None), *apart)].reshape(1, -1, *[1] * (given.ndim - 2))
            if not np.any(weight):
                continue
            term = given * weight if transposed else given
            for k, (maps, kind) in enumerate(zip(meeting, apart, strict=True), 1):
                matrix = adjoint(maps[kind], o_axes[k], x_axes[k]) if transposed else maps[kind]
                term = apply_axis(term, k, matrix)
            result = result + (term if transposed else term * weight)
        axes = x_axes if transposed else o_axes
        return by_axis(full_types(result, axes), xd if transposed else od)


def taps_of(node: Conv | WindowSum) -> int:
    """How many positions a window reads."""
    return math.prod(window.taps for window in node.params.windows if window is not None)


class WindowSumParams(NamedTuple):
    """The windows by dimension (None: a dimension that is not summed), and which axis each is of x and of the output."""

    windows: tuple[Window | None, ...]
    x_dims: Dims
    out_dims: Dims


class WindowSum(Node):
    """Sums over windows."""

    params: WindowSumParams

    def prepare(self) -> None:
        self.odd, self.positive = self.argument.odd, self.argument.positive
        real = [w for w in self.params.windows if w is not None]
        self.near = max(self.near, *(1 - w.stride / ((w.taps - 1) * w.dilation + 1) for w in real))

    def maps(self, of: Callable[[AxisMap], np.ndarray]) -> list[np.ndarray | None]:
        """By dimension, a matrix that belongs to the map of the axis."""
        windows, xd, od = self.params
        read = zip(windows, dim_axes(self.argument, xd), dim_axes(self, od), strict=True)
        return [None if window is None else of(window_map(window, a, o)) for window, a, o in read]

    def carried(
        self, array: np.ndarray, maps: Sequence[np.ndarray | None], *, back: bool = False
    ) -> np.ndarray:
        """An array over the input's axes, mapped by dimension, over its own; or back."""
        inward, outward = (self.params.x_dims, self.params.out_dims)[:: -1 if back else 1]
        array = by_dim(array, inward)
        for d, matrix in enumerate(maps):
            array = array if matrix is None else apply_axis(array, d, matrix)
        return by_axis(array, outward)


class WindowMax(WindowSum):
    """Maxima over windows, smaller ones at borders counted in. A cotangent goes to one entry of its window; entries add up."""

    how = "sampled"
    law: np.ndarray  # maxima less their mean over their deviation, on the normal grid; known with its moments

    def prepare(self) -> None:
        super().prepare()
        self.odd = 0
        # Of many entries, which are alike, one is less of an extreme: LEADING_ORDER at four of them.
        self.gradient_doubt = LEADING_ORDER * math.log2(taps_of(self)) / 2

    def entries(self) -> list[np.ndarray]:
        """By dimension and class of windows, how many entries one has: fewer at a border; 1 where it is not pooled."""
        taps = self.maps(AxisMap.means)
        return [np.ones(1) if own is None else np.maximum(own.sum(axis=1), 1.0) for own in taps]
