r"""Axes with classes, and the algebra of index pairs on them.

The entries of a network's tensors are random, and those along one axis are interchangeable, once positions that really
differ (the border of an image, early and late tokens under a causal mask, the halves of a concatenation) are told apart
by a CLASS. Such an array is separately exchangeable (Aldous 1981; Hoover 1979): permuting positions of one class of an axis
leaves its law as it is. All that second moments can then depend on is, for each axis, the TYPE of an index pair (i, j):

    type c          i = j, in class c                       (the first C types)
    type (c, c')    i ≠ j, i in class c and j in class c'   (the next C² types)

so an axis of any size has C + C² types, two where C = 1: "the same" and "different". Structure operations are linear
maps on the types of one axis, and counts of pairs are all they need.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

MOST_CLASSES = 6  # an axis keeps no more: classes closest in what they see are merged
MOST_TYPES = 1 << 18  # types of index pairs over all axes of an array, above which classes are given up


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis of `size` positions.

    Attributes:
        size: number of positions, at least 2 (axes of size 1 carry nothing and are dropped).
        labels: the class of each position as bytes, numbered from 0 in order of appearance; None where there is one class.
    """

    size: int
    labels: bytes | None = None

    @functools.cached_property
    def classes(self) -> int:
        """How many classes there are, C."""
        return 1 if self.labels is None else max(self.labels) + 1

    @functools.cached_property
    def types(self) -> int:
        """How many types of index pairs there are, C + C²: those of pairs i = j come first."""
        return self.classes + self.classes**2

    @functools.cached_property
    def label_array(self) -> Int[np.ndarray, " size"]:
        """The class of each position."""
        return (
            np.zeros(self.size, int)
            if self.labels is None
            else np.frombuffer(self.labels, np.uint8).astype(int)
        )

    @functools.cached_property
    def counts(self) -> Float[np.ndarray, " classes"]:
        """Positions in each class."""
        return (
            np.array([float(self.size)])
            if self.labels is None
            else np.bincount(self.label_array).astype(float)
        )

    @functools.cached_property
    def first(self) -> Int[np.ndarray, " types"]:
        """Class of i in each type."""
        c = np.arange(self.classes)
        return np.concatenate([c, np.repeat(c, self.classes)])

    @functools.cached_property
    def second(self) -> Int[np.ndarray, " types"]:
        """Class of j in each type."""
        c = np.arange(self.classes)
        return np.concatenate([c, np.tile(c, self.classes)])

    @functools.cached_property
    def agrees(self) -> Bool[np.ndarray, " types"]:
        """Which types are of pairs i = j."""
        return np.arange(self.types) < self.classes

    @functools.cached_property
    def pairs(self) -> Float[np.ndarray, " types"]:
        """Ordered index pairs of each type; they sum to size²."""
        n = self.counts
        return np.concatenate([n, (np.outer(n, n) - np.diag(n)).ravel()])

    @functools.cached_property
    def same(self) -> Float[np.ndarray, " types"]:
        """Weights that average over the pairs i = j."""
        return np.concatenate([self.counts / self.size, np.zeros(self.classes**2)])

    @functools.cached_property
    def different(self) -> Float[np.ndarray, " types"]:
        """Weights that average over the pairs i ≠ j."""
        weights = self.pairs.copy()
        weights[: self.classes] = 0
        return weights / (self.size * (self.size - 1))

    @functools.cached_property
    def pooling(self) -> Float[np.ndarray, "2 types"]:
        """`same` and `different`."""
        return np.stack([self.same, self.different])

    @functools.cached_property
    def any_pair(self) -> Float[np.ndarray, " types"]:
        """Weights that average over all pairs: the second moment of a mean."""
        return self.pairs / self.size**2

    @functools.cached_property
    def swap(self) -> Int[np.ndarray, " types"]:
        """The type of (j, i) for each type of (i, j)."""
        c = self.classes
        return np.concatenate([np.arange(c), c + np.arange(c * c).reshape(c, c).T.ravel()])


def labelled(labels: Sequence[int] | np.ndarray) -> Axis:
    """The axis whose positions have these class labels (any integers).

    Raises:
        ValueError: there are more classes than a byte tells apart.
    """
    labels = np.asarray(labels)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    if len(first) == 1:
        return Axis(len(labels))
    if len(first) > 256:
        raise ValueError(f"labels must name at most 256 classes of positions, not {len(first)}")
    rank = np.empty(len(first), int)
    rank[np.argsort(first)] = np.arange(len(first))
    return Axis(len(labels), rank[inverse.ravel()].astype(np.uint8).tobytes())


@functools.cache
def affordable(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """The axes of an array, of which the most finely classed lose their classes until there are few enough types in all.

    Windows of a picture, with rows and columns of windows and of what is in each, have so many axes that a few classes on
    every one of them would be millions of types.
    """
    kept = list(axes)
    while math.prod(axis.types for axis in kept) > MOST_TYPES and any(axis.labels for axis in kept):
        k = max(range(len(kept)), key=lambda k: kept[k].types)
        kept[k] = Axis(kept[k].size)
    return tuple(kept)


@functools.cache
def join(a: Axis, b: Axis) -> Axis:
    """The common refinement of two classings of the same positions; where it is too fine, its closest classes merged."""
    if a == b or b.labels is None:
        return a
    if a.labels is None:
        return b
    both = a.label_array * b.classes + b.label_array
    if len(np.unique(both)) <= 2 * MOST_CLASSES:
        return labelled(both)
    return grouped(
        np.concatenate([np.eye(x.classes)[x.label_array] for x in (a, b)], axis=1), 2 * MOST_CLASSES
    )


def grouped(signatures: Float[np.ndarray, "size features"], most: int = MOST_CLASSES) -> Axis:
    """Positions classed by what they see: one class a distinct signature, the nearest two merged until `most` remain."""
    rows, inverse, counts = np.unique(
        np.round(signatures, 9), axis=0, return_inverse=True, return_counts=True
    )
    rows, weight, members = list(rows), list(counts.astype(float)), [{i} for i in range(len(rows))]
    if len(rows) > 64:  # far more kinds than classes: cut by rank, finer where signatures are small
        order = np.argsort(np.stack(rows).sum(axis=1))
        position = np.empty(len(rows), int)
        position[order] = np.arange(len(rows))
        bins = np.minimum((most * np.log1p(position) / math.log1p(len(rows))).astype(int), most - 1)
        return labelled(bins[inverse.ravel()])
    while len(rows) > most:
        stack, w = np.stack(rows), np.array(weight)
        gap = np.abs(stack[:, None] - stack[None]).sum(axis=-1) * np.minimum(w[:, None], w[None])
        gap[np.tril_indices(len(rows))] = np.inf
        i, j = (int(n) for n in np.unravel_index(int(np.argmin(gap)), gap.shape))
        rows[i] = (rows[i] * weight[i] + rows[j] * weight[j]) / (weight[i] + weight[j])
        weight[i] += weight[j]
        members[i] |= members[j]
        del rows[j], weight[j], members[j]
    label = {k: c for c, group in enumerate(members) for k in group}
    return labelled([label[int(k)] for k in inverse.ravel()])


@functools.cache
def class_shares(fine: Axis, coarse: Axis) -> Float[np.ndarray, "fine coarse"]:
    """Share of each class of `fine` that lies in each class of `coarse` (0 and 1 where it refines it)."""
    table = np.zeros((fine.classes, coarse.classes))
    np.add.at(table, (fine.label_array, coarse.label_array), 1.0)
    return table / fine.counts[:, None]


def pair_map(classes: Float[np.ndarray, "new old"]) -> Float[np.ndarray, "newtypes oldtypes"]:
    """The map on types made by a map on classes that keeps positions apart."""
    new, old = classes.shape
    out = np.zeros((new + new * new, old + old * old))
    out[:new, :old] = classes
    out[new:, old:] = np.einsum("ac,bd->abcd", classes, classes).reshape(new * new, old * old)
    return out


def _pair_shares(new: Axis, old: Axis) -> Float[np.ndarray, "newtypes oldtypes"]:
    """Share of the pairs of each type of one classing that are of each type of another."""
    counts = class_shares(new, old) * new.counts[:, None]
    out = pair_map(class_shares(new, old))
    met = np.einsum("ac,bd->abcd", counts, counts)
    met -= np.einsum("ab,cd,ac->abcd", np.eye(new.classes), np.eye(old.classes), counts)
    pairs = met.reshape(new.classes**2, old.classes**2)
    total = pairs.sum(axis=1, keepdims=True)
    # A class of one position has no pair that differs.
    out[new.classes :, old.classes :] = np.where(
        total > 0, pairs / np.maximum(total, 1.0), out[new.classes :, old.classes :]
    )
    return out


@functools.cache
def lift_types(
    fine: Axis, coarse: Axis
) -> Int[np.ndarray, " finetypes"] | Float[np.ndarray, "finetypes coarsetypes"]:
    """How a table over `coarse` reads over `fine`: an index a type where `fine` refines `coarse`, else an averaging matrix."""
    shares = class_shares(fine, coarse)
    if not np.all((shares == 0) | (shares == 1)):
        return _pair_shares(fine, coarse)
    to = shares.argmax(axis=1)
    c = coarse.classes
    return np.concatenate([to, (c + to[:, None] * c + to[None]).ravel()])


def apply_axis(array: np.ndarray, axis: int, matrix: np.ndarray) -> np.ndarray:
    """Multiply `matrix` (new, old) onto one axis of `array`; an integer vector indexes instead."""
    if matrix.ndim == 1 and matrix.dtype.kind == "i":
        return np.take(array, matrix, axis=axis)
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    if not after:
        return array @ matrix.T
    flat = array.reshape(math.prod(before), array.shape[axis], math.prod(after))
    return (matrix @ flat).reshape(*before, len(matrix), *after)


def contract_axis(array: np.ndarray, axis: int, weights: np.ndarray) -> np.ndarray:
    """Sum one axis away under `weights`."""
    before, after = array.shape[:axis], array.shape[axis:][1:]
    return (weights @ array.reshape(math.prod(before), len(weights), math.prod(after))).reshape(
        before + after
    )


def pool(second: np.ndarray, axes: Sequence[Axis]) -> Float[np.ndarray, "..."]:
    """A type array with the classes of every axis pooled: "the same" and "different" along each, shape (2,) * rank."""
    for k, axis in enumerate(axes):
        if axis.classes > 1:
            second = apply_axis(second, k, axis.pooling)
    return second


def refine(second: np.ndarray, axes: Sequence[Axis]) -> Float[np.ndarray, "..."]:
    """An array by "the same" and "different" along each axis (1 long where that is one), read by type."""
    out = np.broadcast_to(second, [2] * len(axes))
    for k, axis in enumerate(axes):
        out = np.take(out, (~axis.agrees).astype(int), axis=k)
    return out


@functools.cache
def shares(axes: tuple[Axis, ...]) -> Float[np.ndarray, " cells"]:
    """The share of an array's elements in each combination of classes, row-major."""
    return functools.reduce(
        np.multiply.outer, [axis.counts / axis.size for axis in axes], np.array(1.0)
    ).ravel()


@functools.cache
def averaging(axes: tuple[Axis, ...], free: frozenset[int]) -> Float[np.ndarray, " types"]:
    """Weights of a type array, row-major, that average over pairs which run freely along some axes and agree along the rest."""
    weights = [axis.any_pair if k in free else axis.same for k, axis in enumerate(axes)]
    return functools.reduce(np.multiply.outer, weights, np.array(1.0)).ravel()


@functools.cache
def split_axis(axis: Axis, sizes: tuple[int, ...]) -> tuple[tuple[Axis, ...], Int[np.ndarray, " types"]]:
    """Row-major factors of an axis, and the type of the whole for each combination of the factors' types.

    Returns:
        The factor axes; an index array of shape (types of factor 1, types of factor 2, ...).
    """
    grid = axis.label_array.reshape(sizes)
    factors = tuple(
        _factor(np.moveaxis(grid, k, 0).reshape(n, -1), axis.classes) for k, n in enumerate(sizes)
    )
    classes = factor_classes(axis, factors)
    i = classes[np.ix_(*[f.first for f in factors])]
    j = classes[np.ix_(*[f.second for f in factors])]
    same = np.ones([f.types for f in factors], bool)
    for k, f in enumerate(factors):
        shape = [1] * len(factors)
        shape[k] = f.types
        same &= f.agrees.reshape(shape)
    return factors, np.where(same, i, axis.classes + i * axis.classes + j)


def _factor(rows: Int[np.ndarray, "size others"], classes: int) -> Axis:
    """Positions of a factor classed by the classes they meet, by how many of each where there are too many kinds."""
    kinds = np.unique(rows, axis=0, return_inverse=True)[1].ravel()
    if kinds.max() < 2 * MOST_CLASSES:
        return labelled(kinds)
    return grouped(np.stack([(rows == c).mean(axis=1) for c in range(classes)], axis=1))


def factor_classes(axis: Axis, factors: Sequence[Axis]) -> Int[np.ndarray, "..."]:
    """The class of the whole for each combination of the factors' classes: the one that most of its positions have."""
    cells = [f.label_array for f in factors]
    counts = np.zeros([*(f.classes for f in factors), axis.classes], int)
    grid = axis.label_array.reshape([f.size for f in factors])
    np.add.at(counts, (*np.ix_(*cells), grid), 1)
    return counts.argmax(axis=-1)


def merge_types(second: np.ndarray, k: int, factors: Sequence[Axis], whole: Axis) -> np.ndarray:
    """A type array over factors, averaged into the types of their product (which has one class, or the factors' own)."""
    if whole.classes > 1:
        built, types = split_axis(whole, tuple(f.size for f in factors))
        if all(_refines(f, b) for b, f in zip(built, factors, strict=True)):
            weights = functools.reduce(np.multiply.outer, [f.pairs for f in factors])
            types = types[np.ix_(*[lift_types(f, b) for b, f in zip(built, factors, strict=True)])]
            matrix = np.zeros((whole.types, types.size))
            np.add.at(matrix, (types.ravel(), np.arange(types.size)), weights.ravel())
            matrix /= np.maximum(matrix.sum(axis=1, keepdims=True), 1e-300)
            return _onto(second, k, len(factors), matrix)
    pairs = functools.reduce(np.multiply.outer, [f.pairs for f in factors])
    same = functools.reduce(np.multiply.outer, [f.pairs * f.agrees for f in factors])
    different = pairs - same
    matrix = np.stack([(w / w.sum()).ravel() for w in (same, different)])
    if whole.classes > 1:
        matrix = np.concatenate(
            [np.repeat(matrix[:1], whole.classes, 0), np.repeat(matrix[1:], whole.classes**2, 0)]
        )
    return _onto(second, k, len(factors), matrix)


def _refines(fine: Axis, coarse: Axis) -> bool:
    """Whether each class of one classing lies in one class of the other."""
    return bool(np.isin(class_shares(fine, coarse), (0.0, 1.0)).all())


def _onto(second: np.ndarray, k: int, count: int, matrix: np.ndarray) -> np.ndarray:
    shape = second.shape
    flat = second.reshape(*shape[:k], -1, *shape[k + count :])
    return np.moveaxis(np.tensordot(matrix, flat, axes=(1, k)), 0, k)


@functools.cache
def sliced(axis: Axis, start: int, stop: int, step: int) -> tuple[Axis | None, Float[np.ndarray, "new old"]]:
    """The axis left by a slice (None where one position is left), and which old classes its classes come from."""
    labels = axis.label_array[start:stop:step]
    if len(labels) == 1:
        return None, np.eye(axis.classes)[labels]
    new = labelled(labels)
    classes = np.zeros((new.classes, axis.classes))
    classes[new.label_array, labels] = 1
    return new, classes
