r"""Sparse linear maps of an axis, and the one theorem that counts what is behind a pair of their outputs.

A window, a slice, a sum by segment, a lookup is y_p = Σ_i A_pi x_i along one axis, with few entries A_pi that are not zero.
Of two such maps A and B the moment of a pair of outputs is

    E[y_p z_q] = Σ_ij A_pi B_qj E[x_i x'_j],

and E[x_i x'_j] depends on the TYPE of (i, j) alone: the class where i = j, the pair of classes elsewhere. So all that is
needed is the total weight of the input pairs of each type behind the output pairs of each type. Four sums give it; with
classes c, e of outputs and d, f of inputs,

    own[c, d]          = Σ_p Σ_i  A_pi B_pi                          one output, one input
    within[c, d, f]    = Σ_p (Σ_{i∈d} A_pi) (Σ_{j∈f} B_pj)            one output, any two inputs
    meet[c, e, d]      = Σ_i (Σ_{p∈c} A_pi) (Σ_{q∈e} B_qi)            any two outputs, one input
    total[c, d, e, f]  = (Σ_{p∈c} Σ_{i∈d} A_pi) (Σ_{q∈e} Σ_{j∈f} B_qj)  any two, any two

and two different ones are any two less one and the same (inclusion and exclusion). The adjoint map takes moments of
cotangents back with the same weights.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from varscale.theory.domain.axes import MOST_CLASSES, Axis, apply_axis, grouped, labelled


@dataclasses.dataclass(frozen=True, eq=False)
class AxisMap:
    """y_p = Σ w x_i over entries (p, i, w) along one axis.

    Attributes:
        rows: the output position p of each entry; a pair (p, i) may have several.
        columns: its input position i.
        weights: its weight.
        out: the axis of the outputs.
        inner: the axis of the inputs.
    """

    rows: Int[np.ndarray, " entries"]
    columns: Int[np.ndarray, " entries"]
    weights: Float[np.ndarray, " entries"]
    out: Axis
    inner: Axis

    @property
    def _by_output(self) -> Float[np.ndarray, "outputs classes"]:
        """Σ_{i∈d} A_pi."""
        table = np.zeros((self.out.size, self.inner.classes))
        np.add.at(table, (self.rows, self.inner.label_array[self.columns]), self.weights)
        return table

    @property
    def _by_input(self) -> Float[np.ndarray, "inputs classes"]:
        """Σ_{p∈c} A_pi."""
        table = np.zeros((self.inner.size, self.out.classes))
        np.add.at(table, (self.columns, self.out.label_array[self.rows]), self.weights)
        return table

    def means(self) -> Float[np.ndarray, "classes_out classes_in"]:
        """E[y_p] by class of output, as weights of the class means of the inputs."""
        return self.out.members @ self._by_output / self.out.counts[:, None]


def entry_map(
    rows: np.ndarray, columns: np.ndarray, out: Axis, inner: Axis, weights: np.ndarray | float = 1.0
) -> AxisMap:
    """The map of some entries; those whose row or column is no position (−1, or beyond the end) are left out.

    >>> shift = entry_map(np.arange(3), np.arange(1, 4), Axis(3), Axis(3))  # y_p = x_{p+1}, y_2 = 0
    >>> pair_counts(shift).round(3).tolist()  # a pair of outputs has two different inputs behind it, if any
    [[0.667, 0.0], [0.0, 0.333]]
    """
    kept = (rows >= 0) & (rows < out.size) & (columns >= 0) & (columns < inner.size)
    weights = np.broadcast_to(np.asarray(weights, float), np.shape(rows))
    return AxisMap(np.asarray(rows)[kept], np.asarray(columns)[kept], weights[kept], out, inner)


def slice_map(span: tuple[int, int | None, int], out: Axis, inner: Axis) -> AxisMap:
    """x[start:stop:step], over an axis with classes of its own."""
    columns = np.arange(inner.size)[slice(*span)]
    return entry_map(np.arange(len(columns)), columns, out, inner)


def identity_map(axis: Axis, inner: Axis | None = None) -> AxisMap:
    """y = x, over axes of which the inputs' may have other classes."""
    return entry_map(np.arange(axis.size), np.arange(axis.size), axis, inner or axis)


def pair_counts(a: AxisMap, b: AxisMap | None = None) -> Float[np.ndarray, "types_out types_in"]:
    """Mean weight of the input pairs (i, j) of each type behind the output pairs (p, q) of each type.

    Args:
        a: the map of the first of each pair.
        b: that of the second, over the same axes; None where it is the same map.

    Returns:
        C with E[y_p z_q] by type = C @ E[x_i x'_j] by type; 0 for types without pairs.
    """
    b = a if b is None else b
    out, inner = a.out, a.inner
    co, ci = out.classes, inner.classes
    (rows_a, columns_a), (rows_b, columns_b) = ((m._by_output, m._by_input) for m in (a, b))
    own = np.zeros((co, ci))
    np.add.at(own, (out.label_array[a.rows], inner.label_array[a.columns]), a.weights * _at_the_entries(b, a))
    within = np.einsum("cp,pd,pf->cdf", out.members, rows_a, rows_b)
    meet = np.einsum("ic,ie,di->ced", columns_a, columns_b, inner.members)
    total = np.einsum("cd,ef->cedf", out.members @ rows_a, out.members @ rows_b)
    same_out, same_in = np.eye(co), np.eye(ci)
    meet_apart = meet - np.einsum("ce,cd->ced", same_out, own)
    table = np.zeros((out.types, inner.types))
    table[:co, :ci] = own
    table[:co, ci:] = (within - np.einsum("cd,df->cdf", own, same_in)).reshape(co, -1)
    table[co:, :ci] = meet_apart.reshape(-1, ci)
    apart = (
        total - np.einsum("ce,cdf->cedf", same_out, within) - np.einsum("df,ced->cedf", same_in, meet_apart)
    )
    table[co:, ci:] = apart.reshape(co * co, ci * ci)
    return table / np.where(out.pairs > 0, out.pairs, 1.0)[:, None]


def class_counts(a: AxisMap, b: AxisMap) -> Float[np.ndarray, "classes_a classes_b types_in"]:
    """Mean weight of the input pairs of each type behind any two outputs, of maps of one axis to two, by class of each."""
    ins, columns = a.inner.members, [m._by_input / m.out.counts for m in (a, b)]
    meet = np.einsum("ic,ie,di->ced", *columns, ins)
    total = np.einsum("cd,ef->cedf", *(x.T @ ins.T for x in columns))
    apart = total - np.einsum("ced,df->cedf", meet, np.eye(a.inner.classes))
    return np.concatenate([meet, apart.reshape(*meet.shape[:2], -1)], axis=-1)


def _at_the_entries(b: AxisMap, a: AxisMap) -> Float[np.ndarray, " entries"]:
    """B_pi at the entries of a."""
    codes, place = np.unique(b.rows * b.inner.size + b.columns, return_inverse=True)
    if not len(codes):
        return np.zeros(len(a.rows))
    summed = np.bincount(place.ravel(), weights=b.weights, minlength=len(codes))
    asked = a.rows * a.inner.size + a.columns
    found = np.minimum(np.searchsorted(codes, asked), len(codes) - 1)
    return np.where(codes[found] == asked, summed[found], 0.0)


def adjoint(
    counts: Float[np.ndarray, "types_out types_in"], out: Axis, inner: Axis
) -> Float[np.ndarray, "types_in types_out"]:
    """The map of cotangents' second moments by type that belongs to one of values' (`pair_counts`).

    An input pair gets from each output pair what it gave: the total weight between two types is the same both ways.
    """
    return (counts * out.pairs[: counts.shape[0], None]).T / np.where(inner.pairs > 0, inner.pairs, 1.0)[
        : counts.shape[1], None
    ]


@functools.cache
def class_shares(fine: Axis, coarse: Axis) -> Float[np.ndarray, "fine coarse"]:
    """Share of each class of `fine` that lies in each class of `coarse` (0 and 1 where it refines it)."""
    return identity_map(fine, coarse).means()


def pair_map(classes: Float[np.ndarray, "new old"]) -> Float[np.ndarray, "newtypes oldtypes"]:
    """The map on types made by a map on classes that keeps positions apart."""
    new, old = classes.shape
    out = np.zeros((new + new * new, old + old * old))
    out[:new, :old] = classes
    out[new:, old:] = np.kron(classes, classes)
    return out


@functools.cache
def lift_types(
    fine: Axis, coarse: Axis
) -> Int[np.ndarray, " finetypes"] | Float[np.ndarray, "finetypes coarsetypes"]:
    """How a table over `coarse` reads over `fine`: an index a type where `fine` refines `coarse`, else an averaging matrix."""
    shares, c = class_shares(fine, coarse), coarse.classes
    if not np.isin(shares, (0, 1)).all():
        # A class of one position has no pair that differs.
        met = fine.pairs[:, None] > 0
        return np.where(met, pair_counts(identity_map(fine, coarse)), pair_map(shares))
    to = shares.argmax(axis=1)
    return np.concatenate([to, (c + to[:, None] * c + to[None]).ravel()])


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
    i, j = (classes[np.ix_(*x)] for x in ([f.first for f in factors], [f.second for f in factors]))
    same = functools.reduce(np.logical_and.outer, [f.agrees for f in factors])
    return factors, np.where(same, i, axis.classes + i * axis.classes + j)


def _factor(rows: Int[np.ndarray, "size others"], classes: int) -> Axis:
    """Positions of a factor classed by the classes they meet, by how many of each where there are too many kinds."""
    kinds = np.unique(rows, axis=0, return_inverse=True)[1].ravel()
    if kinds.max() < 2 * MOST_CLASSES:
        return labelled(kinds)
    return grouped(np.stack([(rows == c).mean(axis=1) for c in range(classes)], axis=1))


def factor_classes(axis: Axis, factors: Sequence[Axis]) -> Int[np.ndarray, "..."]:
    """The class of the whole for each combination of the factors' classes: the one that most of its positions have."""
    counts = np.zeros([*(f.classes for f in factors), axis.classes], int)
    grid = axis.label_array.reshape([f.size for f in factors])
    np.add.at(counts, (*np.ix_(*(f.label_array for f in factors)), grid), 1)
    return counts.argmax(axis=-1)


def merge_types(second: np.ndarray, k: int, factors: Sequence[Axis], whole: Axis) -> np.ndarray:
    """A type array over factors, averaged into the types of their product."""
    own, types = split_axis(whole, tuple(f.size for f in factors))
    for i, (axis, factor) in enumerate(zip(own, factors, strict=True)):
        if axis != factor:
            second = apply_axis(second, k + i, lift_types(axis, factor))
    matrix = np.zeros((whole.types, types.size))
    pairs = functools.reduce(np.multiply.outer, [axis.pairs for axis in own])
    np.add.at(matrix, (types.ravel(), np.arange(types.size)), pairs.ravel())
    matrix /= np.maximum(matrix.sum(axis=1, keepdims=True), 1e-300)
    shape = second.shape
    return apply_axis(second.reshape(*shape[:k], -1, *shape[k + len(factors) :]), k, matrix)
