r"""Axes with classes, and the algebra of index pairs on them.

Entries along one axis of a network's tensors are interchangeable, once positions that really differ (the border of an image,
early and late tokens under a causal mask, the halves of a concatenation) are told apart by a CLASS: such an array is separately
exchangeable (Aldous 1981; Hoover 1979). All that second moments then depend on is, for each axis, the TYPE of a pair (i, j):

    type c          i = j, in class c                       (the first C types)
    type (c, c')    i ≠ j, i in class c and j in class c'   (the next C² types)

so an axis of any size has C + C² types, two where C = 1: "the same" and "different". What moves, cuts or sums entries is a
linear map on the types of one axis, which counts of pairs give.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence, Sized
from functools import cache, cached_property, reduce
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

MOST_CLASSES = 6  # an axis keeps no more: classes closest in what they see are merged
MOST_TYPES = 1 << 18  # types of index pairs over all axes of an array, above which classes are given up


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis of positions in C `classes`, with C + C² `types` of index pairs (i, j), those i = j first; one for one position.

    `first` and `second` are the classes of i and j in each type, `pairs` how many ordered pairs it has: size² in all. `same`,
    `different` and `any_pair` are weights of the types that average over pairs i = j, i ≠ j and all: E[(mean x)²] is the last.
    """

    size: int  # 1 carries nothing, and arrays have no such axes
    labels: bytes | None = None  # class of each position, numbered in order of appearance; None: one class

    @cached_property
    def classes(self) -> int:
        return 1 if self.labels is None else max(self.labels) + 1

    @cached_property
    def types(self) -> int:
        return self.classes + self.classes**2 if self.size > 1 else 1

    @cached_property
    def label_array(self) -> Int[np.ndarray, " size"]:
        labels = bytes(self.size) if self.labels is None else self.labels
        return np.frombuffer(labels, np.uint8).astype(int)

    @cached_property
    def members(self) -> Float[np.ndarray, "classes size"]:
        return np.eye(self.classes)[self.label_array].T

    @cached_property
    def counts(self) -> Float[np.ndarray, " classes"]:
        return np.array([self.size]) * 1.0 if self.labels is None else np.bincount(self.label_array) * 1.0

    @cached_property
    def first(self) -> Int[np.ndarray, " types"]:
        return np.append(np.arange(self.classes), np.arange(self.classes**2) // self.classes)[: self.types]

    @cached_property
    def second(self) -> Int[np.ndarray, " types"]:
        return np.append(np.arange(self.classes), np.arange(self.classes**2) % self.classes)[: self.types]

    @cached_property
    def agrees(self) -> Bool[np.ndarray, " types"]:
        return np.arange(self.types) < self.classes

    @cached_property
    def pairs(self) -> Float[np.ndarray, " types"]:
        n = self.counts
        return np.concatenate([n, (np.outer(n, n) - np.diag(n)).ravel()])[: self.types]

    @cached_property
    def same(self) -> Float[np.ndarray, " types"]:
        return self.pairs * self.agrees / self.size

    @cached_property
    def different(self) -> Float[np.ndarray, " types"]:
        return self.pairs * ~self.agrees / (self.size * (self.size - 1))

    @cached_property
    def any_pair(self) -> Float[np.ndarray, " types"]:
        return self.pairs / self.size**2


Axes = Sequence[Axis]


def labelled(labels: Sequence[int] | np.ndarray) -> Axis:
    """The axis whose positions have these class labels (any integers); ValueError if they are more than a byte tells apart."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    if len(first) == 1:
        return Axis(len(labels))
    if len(first) > 256:
        raise ValueError(f"labels must name at most 256 classes of positions, not {len(first)}")
    rank = np.argsort(np.argsort(first))
    return Axis(len(labels), rank[inverse.ravel()].astype(np.uint8).tobytes())


@cache
def affordable(axes: Axes) -> Axes:
    """The axes of an array (of windows, many), the most finely classed without their classes until there are few types."""
    kept = list(axes)
    while math.prod(axis.types for axis in kept) > MOST_TYPES and any(axis.labels for axis in kept):
        k = max(range(len(kept)), key=lambda k: kept[k].types)
        kept[k] = Axis(kept[k].size)
    return tuple(kept)


@cache
def join(a: Axis, b: Axis) -> Axis:
    """The common refinement of two classings of the same positions; where it is too fine, its closest classes merged."""
    if a == b or b.labels is None:
        return a
    if a.labels is None:
        return b
    both = a.label_array * b.classes + b.label_array
    fine = len(np.unique(both)) <= 2 * MOST_CLASSES
    return labelled(both) if fine else grouped(np.concatenate([a.members, b.members]).T, 2 * MOST_CLASSES)


def grouped(signatures: Float[np.ndarray, "size features"], most: int = MOST_CLASSES) -> Axis:
    """Positions classed by what they see: one class a distinct signature, the nearest two merged until `most` remain."""
    near = np.round(signatures, 9)
    rows, inverse, counts = np.unique(near, axis=0, return_inverse=True, return_counts=True)
    labels, weight = inverse.ravel(), counts.astype(float)
    if len(rows) > 64:  # far more kinds than classes: cut by rank, finer where signatures are small
        rank = most * np.log1p(np.argsort(np.argsort(rows.sum(axis=1)))) / math.log1p(len(rows))
        return labelled(np.minimum(rank.astype(int), most - 1)[labels])
    while len(rows) > most:
        gap = np.abs(rows[:, None] - rows[None]).sum(axis=-1) * np.minimum(weight[:, None], weight[None])
        gap[np.tril_indices(len(rows))] = np.inf
        i, j = divmod(int(np.argmin(gap)), len(rows))
        rows[i] = (rows[i] * weight[i] + rows[j] * weight[j]) / (weight[i] + weight[j])
        weight[i] += weight[j]
        rows, weight = np.delete(rows, j, axis=0), np.delete(weight, j)
        labels = np.where(labels == j, i, labels - (labels > j))
    return labelled(labels)


def apply_axis(array: np.ndarray, axis: int, matrix: np.ndarray) -> np.ndarray:
    """Multiply `matrix` (new, old) onto one axis of `array`; an integer vector indexes instead."""
    if matrix.ndim == 1 and matrix.dtype.kind == "i":
        return np.take(array, matrix, axis=axis)
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    if not after:
        return array @ matrix.T
    flat = array.reshape(math.prod(before), array.shape[axis], math.prod(after))
    return (matrix @ flat).reshape(*before, len(matrix), *after)


def full_along(array: np.ndarray, k: int, axis: Axis) -> np.ndarray:
    """Broadcast to every type of the axis at place k."""
    return np.broadcast_to(array, replaced(array.shape, k, axis.types))


def contract_axis(array: np.ndarray, axis: int, weights: np.ndarray) -> np.ndarray:
    """Sum one axis away under `weights`; along it the array is constant where it is 1 long."""
    before, n, after = array.shape[:axis], array.shape[axis], array.shape[axis:][1:]
    weights = weights if n == len(weights) else weights.sum(keepdims=True)
    return (weights @ array.reshape(math.prod(before), n, math.prod(after))).reshape(before + after)


def contract_axes(array: np.ndarray, weights: Mapping[int, np.ndarray]) -> np.ndarray:
    """Sum several axes away, each under its own weights."""
    for k in sorted(weights, reverse=True):
        array = contract_axis(array, k, weights[k])
    return array


def over_classes(array: np.ndarray, axes: Axes, some: Iterable[int] | None = None) -> np.ndarray:
    """An array by class (1 long where constant, further axes last), averaged over the positions of some axes (None: all)."""
    some = range(len(axes)) if some is None else some
    return contract_axes(array, {k: axes[k].counts / axes[k].size for k in some})


def without_equal(sums: np.ndarray, classes: int) -> None:
    """Of sums over pairs by type (first axis), turn those over any two positions into those over two different, in place."""
    sums[classes + np.arange(classes) * (classes + 1)] -= sums[:classes]


def pool(second: np.ndarray, axes: Axes) -> np.ndarray:
    """A type array with the classes of every axis pooled: "the same" and "different" along each, shape (2,) * rank."""
    for k, axis in enumerate(axes):
        if axis.classes > 1:
            second = apply_axis(second, k, np.stack([axis.same, axis.different]))
    return second


def refine(second: np.ndarray, axes: Axes) -> np.ndarray:
    """An array by "the same" and "different" along each axis (1 long where that is one), read by type."""
    out = np.broadcast_to(second, [2] * len(axes))
    for k, axis in enumerate(axes):
        out = np.take(out, (~axis.agrees).astype(int), axis=k)
    return out


def equal(axes: Axes) -> tuple[slice, ...]:
    """Where i = j in a type array: what is there is an array by class."""
    return tuple(slice(axis.classes) for axis in axes)


Entry = TypeVar("Entry")


def replaced(axes: Sequence[Entry], k: int, *new: Entry) -> tuple[Entry, ...]:
    """The axes (or dimensions), with others in place of axis k."""
    return (*axes[:k], *new, *axes[k + 1 :])


def rest(axes: Sized, some: Collection[int | None]) -> list[int]:
    """Which axes (or dimensions) are not among some of them."""
    return [k for k in range(len(axes)) if k not in some]


def outer(weights: Iterable[np.ndarray]) -> np.ndarray:
    """The product of weights along several axes, w_ij... = u_i v_j ..."""
    return reduce(np.multiply.outer, weights, np.array(1.0))


@cache
def _averaging(axes: Axes, free: frozenset[int], apart: frozenset[int]) -> Float[np.ndarray, " types"]:
    """Weights of a type array, row-major, for `average`."""
    weights = (a.any_pair if k in free else a.different if k in apart else a.same for k, a in enumerate(axes))
    return outer(weights).ravel()


def average(second: np.ndarray, axes: Axes, free: Iterable[int] = (), apart: Iterable[int] = ()) -> float:
    """A type array (1 long where constant), averaged over pairs: free along some axes, apart or equal along the others."""
    weights = _averaging(tuple(axes), frozenset(free), frozenset(apart))
    return float(weights @ np.broadcast_to(second, [axis.types for axis in axes]).ravel())


def reduced(axis: Axis, positions: Int[np.ndarray, " kept"]) -> Axis:
    """The axis that these positions make, its classes numbered as the whole one's (each has one of them at least)."""
    labels = axis.label_array[positions].astype(np.uint8).tobytes()
    return Axis(len(positions), labels if axis.labels else None)


_LEVEL = 0.02  # positions whose second moments differ by less, relatively, are one class


def by_level(squares: Float[np.ndarray, "size arrays"]) -> Axis:
    """Positions classed by the second moments that some arrays have there, on a logarithmic scale down to a thousandth."""
    levels = np.log(np.maximum(squares, 1e-30) / np.maximum(squares.max(axis=0), 1e-30) + 1e-3)
    return grouped(np.round(levels / _LEVEL) * _LEVEL)


def axes_of(shape: Sequence[int]) -> Axes:
    """Axes of one class each, of the sizes of a shape that are not 1."""
    return tuple(Axis(int(n)) for n in shape if n != 1)
