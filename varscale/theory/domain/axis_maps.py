r"""Sparse linear maps of an axis, and the one theorem that counts what is behind a pair of their outputs.

A window, a slice, a sum by segment, a lookup is y_p = Σ_i A_pi x_i along one axis, with few entries A_pi that are not zero.
For two of them E[y_p z_q] = Σ_ij A_pi B_qj E[x_i x'_j], which depends on the type of (i, j) alone. So all that is needed is the
total weight of the input pairs of each type behind the output pairs of each type. Four sums give it; with classes c, e of
outputs and d, f of inputs,

    own[c, d]          = Σ_p Σ_i  A_pi B_pi                          one output, one input
    within[c, d, f]    = Σ_p (Σ_{i∈d} A_pi) (Σ_{j∈f} B_pj)            one output, any two inputs
    meet[c, e, d]      = Σ_i (Σ_{p∈c} A_pi) (Σ_{q∈e} B_qi)            any two outputs, one input
    total[c, d, e, f]  = (Σ_{p∈c} Σ_{i∈d} A_pi) (Σ_{q∈e} Σ_{j∈f} B_qj)  any two, any two

and two different ones are any two less one and the same (inclusion and exclusion). The adjoint map takes moments of
cotangents back with the same weights.
"""

import dataclasses
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import linalg, sparse

from varscale.theory.domain.axes import MOST_CLASSES, Axes, Axis, grouped, labelled, outer, without_equal


@dataclasses.dataclass(frozen=True, eq=False)
class AxisMap:
    """y_p = Σ_i A_pi x_i along one axis."""

    matrix: sparse.csr_array  # (outputs, inputs)
    out: Axis
    inner: Axis

    def means(self) -> Float[np.ndarray, "classes_out classes_in"]:
        """E[y_p] by class of output, as weights of the class means of the inputs."""
        return self.out.members @ (self.matrix @ self.inner.members.T) / self.out.counts[:, None]

    def pair_means(self) -> Float[np.ndarray, "types_out types_in"]:
        """The map of types that keeps positions apart, whose classes go by `means`: for types without pairs, too."""
        means = self.means()
        return np.asarray(linalg.block_diag(means, np.kron(means, means)))[: self.out.types]


def entry_map(
    rows: np.ndarray, columns: np.ndarray, out: Axis, inner: Axis, weights: np.ndarray | float = 1.0
) -> AxisMap:
    """The map y_p = Σ w x_i over some entries (p, i, w), of which a pair (p, i) may have several.

    Entries whose row or column is no position (−1, or beyond the end) are left out.

    >>> shift = entry_map(np.arange(3), np.arange(1, 4), Axis(3), Axis(3))  # y_p = x_{p+1}, y_2 = 0
    >>> pair_counts(shift).round(3).tolist()  # a pair of outputs has two different inputs behind it, if any
    [[0.667, 0.0], [0.0, 0.333]]
    """
    kept = (rows >= 0) & (rows < out.size) & (columns >= 0) & (columns < inner.size)
    entries = np.broadcast_to(np.asarray(weights, float), np.shape(rows))[kept], (rows[kept], columns[kept])
    return AxisMap(sparse.csr_array(entries, shape=(out.size, inner.size)), out, inner)


def taken_map(columns: Int[np.ndarray, " taken"], inner: Axis) -> AxisMap:
    """The entries at these positions, over the axis that they make."""
    return entry_map(np.arange(len(columns)), columns, labelled(inner.label_array[columns]), inner)


@cache
def slice_map(span: tuple[int, int | None, int], inner: Axis) -> AxisMap:
    """x[start:stop:step]."""
    return taken_map(np.arange(inner.size)[slice(*span)], inner)


@cache
def identity_map(axis: Axis, inner: Axis | None = None, start: int = 0) -> AxisMap:
    """y = x, over axes of which the inputs' may have other classes; or be a part of the outputs', which begins at `start`."""
    columns = np.arange((inner or axis).size)
    return entry_map(start + columns, columns, axis, inner or axis)


@lru_cache(maxsize=1024)
def pair_counts(a: AxisMap, b: AxisMap | None = None) -> Float[np.ndarray, "types_out types_in"]:
    """C with E[y_p z_q] by type = C E[x_i x'_j] by type, y = a(x), z = b(x') (b = a by default); 0 for types without pairs."""
    out, inner, maps = a.out, a.inner, (a.matrix, (b or a).matrix)
    outs, ins = out.members, inner.members
    own = outs @ ((maps[0] * maps[1]) @ ins.T)
    within = np.einsum("cp,pd,pf->cdf", outs, *(m @ ins.T for m in maps))
    meet = np.einsum("ic,ie,di->ced", *(m.T @ outs.T for m in maps), ins)
    total = np.kron(*(outs @ (m @ ins.T) for m in maps))
    counts = np.block([[own, within.reshape(len(outs), -1)], [meet.reshape(-1, len(ins)), total]])
    without_equal(counts, out.classes)
    without_equal(counts.T, inner.classes)
    return counts[: out.types, : inner.types] / np.maximum(out.pairs, 1.0)[:, None]


def class_counts(a: AxisMap, b: AxisMap) -> Float[np.ndarray, "classes_a classes_b types_in"]:
    """Mean weight of the input pairs of each type behind any two outputs, of maps of one axis to two, by class of each."""
    ins, columns = a.inner.members, [m.matrix.T @ (m.out.members / m.out.counts[:, None]).T for m in (a, b)]
    meet = np.einsum("ic,ie,di->dce", *columns, ins)
    total = np.einsum("dc,fe->dfce", *(ins @ x for x in columns))
    counts = np.concatenate([meet, total.reshape(-1, *meet.shape[1:])])
    without_equal(counts, a.inner.classes)
    return np.moveaxis(counts, 0, -1)


def adjoint(counts: np.ndarray, out: Axis, inner: Axis) -> Float[np.ndarray, "types_in types_out"]:
    """The map of cotangents' second moments that belongs to one of values' (`pair_counts`): the total weights are the same."""
    return (counts * out.pairs[:, None]).T / np.maximum(inner.pairs, 1.0)[:, None]


def cotangent_counts(a: AxisMap) -> Float[np.ndarray, "types_in types_out"]:
    """The map of the second moments of cotangents that belongs to an axis map."""
    return adjoint(pair_counts(a), a.out, a.inner)


@cache
def class_shares(fine: Axis, coarse: Axis) -> Float[np.ndarray, "fine coarse"]:
    """Share of each class of `fine` that lies in each class of `coarse` (0 and 1 where it refines it)."""
    return identity_map(fine, coarse).means()


@cache
def lift_types(fine: Axis, coarse: Axis) -> np.ndarray:
    """How a table over `coarse` reads over `fine`: an index a type where `fine` refines `coarse`, else an averaging matrix."""
    identity, c = identity_map(fine, coarse), coarse.classes
    shares = identity.means()
    if not np.isin(shares, (0, 1)).all():
        met = fine.pairs[:, None] > 0  # a class of one position has no pair that differs
        return np.where(met, pair_counts(identity), identity.pair_means())
    to = shares.argmax(axis=1)
    return np.concatenate([to, (c + to[:, None] * c + to[None]).ravel()])


class Factors(NamedTuple):
    """An axis as row-major factors; by their classes (types), the class (type) of the whole that most such positions have."""

    axes: Axes
    classes: Int[np.ndarray, "*classes"]  # of the whole
    types: Int[np.ndarray, "*types"]
    strangers: float  # share of the positions that are of another class


@cache
def split_axis(axis: Axis, sizes: tuple[int, ...]) -> Factors:
    """An axis as row-major factors of these sizes, classed by what they meet."""
    grid = axis.label_array.reshape(sizes)
    factors = tuple(_factor(np.moveaxis(grid, k, 0).reshape(n, -1), axis) for k, n in enumerate(sizes))
    counts = np.zeros([*(f.classes for f in factors), axis.classes], int)
    mesh = np.ix_(*(f.label_array for f in factors))
    np.add.at(counts, (*mesh, grid), 1)
    classes = counts.argmax(axis=-1)
    i, j = (classes[np.ix_(*x)] for x in ([f.first for f in factors], [f.second for f in factors]))
    types = np.where(outer(f.agrees for f in factors) > 0, i, axis.classes + i * axis.classes + j)
    return Factors(factors, classes, types, float(np.mean(classes[mesh] != grid)))


def _factor(rows: Int[np.ndarray, "size others"], whole: Axis) -> Axis:
    """Positions of a factor classed by the classes they meet, by how many of each where there are too many kinds."""
    kinds = np.unique(rows, axis=0, return_inverse=True)[1].ravel()
    if kinds.max() < 2 * MOST_CLASSES:
        return labelled(kinds)
    return grouped(np.stack([(rows == c).mean(axis=1) for c in range(whole.classes)], axis=1))
