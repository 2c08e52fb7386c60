"""Convolutions and sums over windows: which taps of which positions meet."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from varscale.theory.domain.axes import Axis, apply_axis, grouped
from varscale.theory.domain.axis_maps import AxisMap, adjoint, entry_map, identity_map, pair_counts
from varscale.theory.domain.tables import estimated_products
from varscale.theory.graph.nodes import Node

ONE = Axis(1)  # a dimension of size 1: only the type "same"


# Set on the validation grid, not derived: of a gradient through sums of n terms, n times this.
_FEW_TERMS = 1.5


class Window(NamedTuple):
    """How one spatial axis is read."""

    size_out: int
    taps: int
    stride: int
    low: int
    input_dilation: int
    dilation: int


@functools.cache
def hits(window: Window, size_in: int) -> np.ndarray:
    """Input position of each (output position, tap), −1 where there is none."""
    n, taps, stride, low, input_dilation, dilation = window
    at = np.arange(n)[:, None] * stride - low + np.arange(taps)[None] * dilation
    real = (at >= 0) & (at % input_dilation == 0) & (at // input_dilation < size_in)
    return np.where(real, at // input_dilation, -1)


@functools.cache
def output_axis(window: Window, axis: Axis) -> Axis:
    """Output positions classed by their taps in each class of the input; of too many kinds, those with as many merge first."""
    at = hits(window, axis.size)
    seen = np.stack(
        [((at >= 0) & (axis.label_array[at] == c)).sum(axis=1) for c in range(axis.classes)], axis=1
    )
    taps = 2 * window.taps * axis.size * seen.sum(axis=1, keepdims=True)
    return ONE if window.size_out == 1 else grouped(np.concatenate([seen, taps], axis=1).astype(float))


def window_map(window: Window, axis: Axis, out: Axis) -> AxisMap:
    """Sums over the window, as a map of the axis."""
    rows = np.repeat(np.arange(window.size_out), window.taps)
    return entry_map(rows, hits(window, axis.size).ravel(), out, axis)


@functools.cache
def tap_means(window: Window, axis: Axis, out: Axis) -> np.ndarray:
    """Mean number of taps of each class of output in each class of input, (C_out, C_in)."""
    return window_map(window, axis, out).means()


@functools.cache
def tap_pairs(window: Window, axis: Axis, out: Axis) -> tuple[np.ndarray, np.ndarray]:
    """Mean number of tap pairs for each type of output pair and of input pair, (types_out, types_in).

    Returns:
        For pairs of the same tap; for pairs of two different taps.
    """
    at, outputs = hits(window, axis.size), np.arange(window.size_out)
    taps = (entry_map(outputs, at[:, t], out, axis) for t in range(window.taps))
    same = np.sum([pair_counts(tap) for tap in taps], axis=0)
    return same, pair_counts(window_map(window, axis, out)) - same


@functools.cache
def tap_scatter(window: Window, axis: Axis, out: Axis) -> np.ndarray:
    """E[n²]/E[n]² by type of output pair, n the taps by which both read an input: where that is dilated, not all pairs do."""
    reads = (hits(window, axis.size) >= 0).T.astype(float)
    both = (reads[:, None] * reads).reshape(-1, window.size_out)
    shared, squares = (estimated_products(x, x, [out]).sum(axis=0) for x in (reads, both))
    return np.where(shared > 0, squares / np.maximum(shared, 1e-150) ** 2, 1.0)


@functools.cache
def tap_reads(window: Window, axis: Axis) -> np.ndarray:
    """Mean number of taps for each type of pair (output, place) and of pair (what the tap reads, that place).

    Args:
        window: how it is read, as many outputs as inputs.
        axis: the places.
    """
    return pair_counts(window_map(window, axis, axis), identity_map(axis))


def squeeze_types(matrix: np.ndarray, out: Axis, axis: Axis) -> np.ndarray:
    """Only the type "same" where an axis has one position."""
    return matrix[: 1 if out.size == 1 else None, : 1 if axis.size == 1 else None]


class ConvParams(NamedTuple):
    """What a convolution is, beside its arguments.

    Attributes:
        groups: feature groups.
        windows: how each spatial axis is read.
        x_dims: which axis of x is (batch, channel, space...); None: size 1.
        w_dims: which axis of w is (out, in, taps...).
        out_dims: which axis of the output is (batch, channel, space...).
    """

    groups: int
    windows: tuple[Window, ...]
    x_dims: tuple[int | None, ...]
    w_dims: tuple[int | None, ...]
    out_dims: tuple[int | None, ...]


class Conv(Node):
    """A convolution."""

    params: ConvParams

    def prepare(self) -> None:
        x, w = (v.node for v in self.args)
        self.odd = (x.odd & w.unseen) | (w.odd & x.unseen)
        # A sum of few terms (a depthwise one has nine) is not Gaussian, and its sign follows the channel it
        # reads.
        self.gradient_doubt = _FEW_TERMS / self.width

    def _axes(self, node: Node, dims: Sequence[int | None]) -> list[Axis]:
        return [ONE if k is None else node.axes[k] for k in dims]

    @property
    def width(self) -> float:
        """Terms in a sum."""
        groups, windows, xd, *_ = self.params
        x_axes = self._axes(self.args[0].node, xd)
        return x_axes[1].size / groups * math.prod(w.taps for w in windows)

    def channels(self) -> dict[int, np.ndarray]:
        """Channel pairs behind a pair of output channels, (types_out, types_in): by w's same (0) and another (1) input."""
        groups, _, xd, _wd, od = self.params
        c = self._axes(self.args[0].node, xd)[1]
        o = self._axes(self, od)[1]
        own = c.size / groups
        # Within one group the channels agree with w's input index: the counts of all channels, thinned by the
        # groups.
        agree = np.concatenate([c.counts, np.zeros(c.types - c.classes)]) / groups
        differ = np.concatenate([np.zeros(c.classes), c.pairs[c.classes :]])
        differ *= own * (own - 1) / max(differ.sum(), 1e-300)
        apart_same, apart_other = (
            np.concatenate([np.zeros(c.classes), c.pairs[c.classes :]]) for _ in range(2)
        )
        apart_same *= own / max(apart_same.sum(), 1e-300)
        apart_other *= own * (own - 1) / max(apart_other.sum(), 1e-300)
        together = (o.size / groups - 1) / (o.size - 1) if o.size > 1 and groups > 1 else 1.0
        tables = []
        for inside, outside in ((agree, apart_same), (differ, apart_other)):
            rows = np.repeat((together * inside + (1 - together) * outside)[None], o.types, 0)
            rows[: o.classes] = inside
            if o.size == 1:
                rows = rows[:1]
            tables.append(rows[:, :1] if c.size == 1 else rows)
        return {0: tables[0], 1: tables[1]}

    def spaces(self) -> list[tuple[np.ndarray, np.ndarray]]:
        _groups, windows, xd, _wd, od = self.params
        xs, os = self._axes(self.args[0].node, xd)[2:], self._axes(self, od)[2:]
        out = []
        for window, a, o in zip(windows, xs, os, strict=True):
            same, other = tap_pairs(window, a, o)
            out.append((squeeze_types(same, o, a), squeeze_types(other, o, a)))
        return out

    def carry(self, x_second: np.ndarray, w_second: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """Second moments by type of the output, from those of input and weights (logical dims); or of the input's cotangent."""
        _groups, _windows, xd, wd, od = self.params
        channel, space = self.channels(), self.spaces()
        x_axes, o_axes = self._axes(self.args[0].node, xd), self._axes(self, od)
        w_axes = self._axes(self.args[1].node, wd)
        reads = [range(1) if w_axes[k].size == 1 else range(w_axes[k].types) for k in range(1, len(w_axes))]
        outs = x_axes if transposed else o_axes
        result = np.zeros([1 if axis.size == 1 else axis.types for axis in outs])
        for index in np.ndindex(*[len(r) for r in reads]):
            weight = w_second[(slice(None), *index)]
            if not np.any(weight):
                continue
            # Classes within w's own axes do not change how its taps meet the input.
            kinds = [int(t >= w_axes[k + 1].classes) for k, t in enumerate(index)]
            share = math.prod(
                w_axes[k + 1].pairs[t] / w_axes[k + 1].pairs[_block(w_axes[k + 1], kinds[k])].sum()
                if w_axes[k + 1].size > 1
                else 1.0
                for k, t in enumerate(index)
            )
            maps = [channel[kinds[0]], *(space[k][kinds[k + 1]] for k in range(len(space)))]
            term = x_second
            if transposed:
                shape = [1] * term.ndim
                shape[1] = -1
                term = term * weight.reshape(shape)
            for k, matrix in enumerate(maps):
                o, a = o_axes[k + 1], x_axes[k + 1]
                if transposed:
                    matrix = adjoint(matrix, o, a)
                term = apply_axis(term, k + 1, matrix)
            if not transposed:
                shape = [1] * term.ndim
                shape[1] = -1
                term = term * weight.reshape(shape)
            result = result + share * term
        return result

    def _own(self, array: np.ndarray, dims: Sequence[int | None]) -> np.ndarray:
        kept = array.reshape([n for n, k in zip(array.shape, dims, strict=True) if k is not None])
        return kept.transpose(np.argsort([k for k in dims if k is not None]))


def _block(axis: Axis, kind: int) -> slice:
    return slice(axis.classes, None) if kind else slice(0, axis.classes)


class WindowSumParams(NamedTuple):
    """The windows by dimension (None: a dimension that is not summed), and which axis each is of x and of the output."""

    windows: tuple[Window | None, ...]
    x_dims: tuple[int | None, ...]
    out_dims: tuple[int | None, ...]


class WindowSum(Node):
    """Sums over windows."""

    params: WindowSumParams

    def prepare(self) -> None:
        self.odd, self.positive = self.args[0].node.odd, self.args[0].node.positive
        overlaps = [
            1 - w.stride / ((w.taps - 1) * w.dilation + 1) for w in self.params.windows if w is not None
        ]
        self.near = max(self.near, *overlaps)

    def axes_in(self) -> list[Axis]:
        return [ONE if k is None else self.args[0].node.axes[k] for k in self.params.x_dims]

    def axes_out(self) -> list[Axis]:
        return [ONE if k is None else self.axes[k] for k in self.params.out_dims]

    def _carry(
        self,
        array: np.ndarray,
        maps: Sequence[np.ndarray | None],
        inward: Sequence[int | None],
        outward: Sequence[int | None],
    ) -> np.ndarray:
        out = array.transpose([k for k in inward if k is not None])
        out = out[tuple(None if k is None else slice(None) for k in inward)]
        for d, matrix in enumerate(maps):
            if matrix is not None:
                out = apply_axis(out, d, matrix)
        kept = out.reshape([n for n, k in zip(out.shape, outward, strict=True) if k is not None])
        return kept.transpose(np.argsort([k for k in outward if k is not None]))

    def pair_maps(self) -> list[np.ndarray | None]:
        maps: list[np.ndarray | None] = []
        for window, a, o in zip(self.params.windows, self.axes_in(), self.axes_out(), strict=True):
            if window is None:
                maps.append(None)
                continue
            same, other = tap_pairs(window, a, o)
            maps.append(squeeze_types(same + other, o, a))
        return maps
