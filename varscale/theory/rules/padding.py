"""Ids that fill up rows to one length: which are paddings, and how often ids repeat by the classes that tell them apart.

Whether a place is padding depends on its row and its position together. Rows of one length are a class, and so are positions
between two lengths: in each pair of a class of rows and a class of positions there are then only ids, or only paddings. Of
more lengths than a few, those nearest by ratio are taken as long as they are on (harmonic) average (`evened`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.cluster import hierarchy

from varscale.theory.domain.axes import Axis, grouped
from varscale.theory.domain.tables import per_pair
from varscale.theory.graph.nodes import Graph
from varscale.theory.graph.store import Fact

MOST_LENGTHS = 3  # that rows are told apart by, and so positions into one class more
_CHANCE = 4.0  # standard deviations by which rows have to end in one value more often than by chance
_ALIKE = 1.0  # positions of a row by which two arrays may differ that are filled up alike


class Padded(NamedTuple):
    """What is known of given arrays that are filled up.

    Attributes:
        shapes: of those arrays, (rows, positions).
        doubt: relative error of the mean length of rows, and of the mean of one over it, where lengths were made alike.
    """

    shapes: frozenset[tuple[int, ...]] = frozenset()
    doubt: float = 0.0


def filled_up(ids: Int[np.ndarray, "rows positions"]) -> Bool[np.ndarray, "rows positions"] | None:
    """Where rows are filled up, behind or in front, by one value; None where they are not.

    Where a share q of the other ids is of that value, rows end by chance in runs of it of mean length q/(1 − q) and variance
    q/(1 − q)².
    """
    if len(np.unique(ids)) < 3:  # a mask is no array of ids
        return None
    for step in (1, -1):
        turned = ids[:, ::step]
        runs = np.logical_and.accumulate((turned == turned[:, -1:])[:, ::-1], axis=1)[:, ::-1]
        values, last = np.unique(turned[:, -1], return_inverse=True)
        most = int(np.argmax(np.bincount(last.ravel(), weights=runs.sum(axis=1))))
        repeated = runs.sum(axis=1)
        runs &= (last.ravel() == most)[:, None]
        if 2 * runs.sum() < repeated[repeated > 1].sum():  # each row by its own: positions that stand still
            continue
        others = turned[~runs]
        if runs.sum(axis=1).max() < 2 or len(np.unique(others)) < 2:
            continue
        q = max(float(np.mean(others == values[most])), 1 / len(np.unique(ids)))
        mean, variance = q / (1 - q), q / (1 - q) ** 2
        if runs.sum() > len(ids) * mean + _CHANCE * math.sqrt(len(ids) * variance) + 1:
            return runs[:, ::step]
    return None


def evened(given: Sequence[Any]) -> tuple[list[Any], Padded]:
    """Given arrays with a few lengths of rows at most: each row as long as those most like it are on average.

    One that is too long loses what is in its middle, one that is too short gets there what the longest like it has; so do all
    arrays of these rows and positions, a mask for one. An array of lengths follows.

    Returns:
        The arrays, and what is known of them.
    """
    arrays = {i: _as_rows(x) for i, x in enumerate(given) if _is_given(x) and np.size(x) > 1}
    fields: list[np.ndarray] = []
    for i, rows in arrays.items():
        field = filled_up(rows) if rows.dtype.kind in "iu" and np.ndim(given[i]) > 1 else None
        if field is not None and not any(_near(field, other) for other in fields):
            fields.append(field)
    found = Padded(frozenset(field.shape for field in fields))
    sides = {field.shape[1] for field in fields}
    by_pair = any(
        np.ndim(x) > 2 and np.shape(x)[-2:] in {(n, n) for n in sides} for x in given
    )  # whose rows are no rows
    if by_pair or len({len(field) for field in fields}) != 1:
        return list(given), found
    lengths = np.stack([(~field).sum(axis=1) for field in fields], axis=1)
    kinds = _kinds(lengths)
    if kinds is None:
        return list(given), found
    alike = np.stack([_harmonic(lengths[kinds == k]) for k in range(kinds.max() + 1)])[kinds]
    out = list(given)
    goes_by = {i: _most_like(rows, fields) for i, rows in arrays.items()}
    for k, (field, before, after) in enumerate(zip(fields, lengths.T, alike.T, strict=True)):
        source, place = _filled_rows(before, after, kinds, field.shape[1])
        if field[:, 0].any():  # filled up in front: as the mirror image is behind
            source, place = source[:, ::-1], field.shape[1] - 1 - place[:, ::-1]
        for i, rows in arrays.items():
            if goes_by[i] == k:
                out[i] = rows[source, place].reshape(np.shape(given[i]))
            elif (
                rows.size == len(field)
                and rows.dtype.kind in "iu"
                and len(np.unique(rows.ravel() - before)) == 1
            ):
                out[i] = np.reshape(rows.ravel() - before + after, np.shape(given[i])).astype(rows.dtype)
    moved = [
        f(alike) / f(lengths) - 1
        for f in (lambda n: n.mean(axis=0), lambda n: (1 / np.maximum(n, 1)).mean(axis=0))
    ]
    return out, found._replace(doubt=float(np.max(np.abs(moved))))


def _near(field: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are filled up alike."""
    return field.shape == other.shape and bool(np.mean(field != other) * field.shape[-1] <= _ALIKE)


def _most_like(rows: np.ndarray, fields: Sequence[np.ndarray]) -> int | None:
    """Which paddings an array of these rows and positions goes by: those that it is correlated with the most."""
    if rows.shape not in {field.shape for field in fields}:
        return None
    own = filled_up(rows) if rows.dtype.kind in "iu" else None
    marks = np.asarray(rows if own is None else own, float)
    marks = marks - marks.mean()
    alike = {
        k: abs(float(np.sum(marks * (f - f.mean())))) / f.std()
        for k, f in enumerate(fields)
        if f.shape == rows.shape
    }
    return max(alike, key=alike.__getitem__)


def _is_given(x: Any) -> bool:
    """Whether it is an array of numbers, not a description of one, and no random key."""
    return isinstance(x, np.ndarray | jax.Array) and not jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)


def _as_rows(x: Any) -> np.ndarray:
    return np.asarray(x).reshape(-1, np.shape(x)[-1])


def _kinds(lengths: Int[np.ndarray, "rows arrays"]) -> Int[np.ndarray, " rows"] | None:
    """Which rows are to be of one length; None where there are few enough lengths as it is."""
    distinct, which = np.unique(lengths, axis=0, return_inverse=True)
    if len(distinct) <= MOST_LENGTHS:
        return None
    tree = hierarchy.linkage(np.log(np.maximum(distinct, 0.1)), "ward")
    return hierarchy.fcluster(tree, MOST_LENGTHS, "maxclust")[which.ravel()] - 1


def _harmonic(lengths: Int[np.ndarray, "rows arrays"]) -> Int[np.ndarray, " arrays"]:
    """The length whose inverse is the mean of theirs: what attention and means leave of tokens goes by that."""
    return np.rint(1 / np.mean(1 / np.maximum(lengths, 1e-9), axis=0)).astype(int)


def _filled_rows(
    before: np.ndarray, after: np.ndarray, kinds: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """For rows of other lengths, filled up behind: the row and the place that each entry comes from."""
    source, place = np.indices((len(before), size))
    for b, (old, new) in enumerate(zip(before, after, strict=True)):
        alike = np.flatnonzero(kinds == kinds[b])
        middle = min(old, new) // 2
        if new < old:
            place[b, middle:new] += old - new
            source[b, new:] = alike[np.argmin(before[alike])]
        elif new > old:
            source[b, middle : middle + new - old] = alike[np.argmax(before[alike])]
            place[b, middle + new - old : new] -= new - old
    return source, place


def classed_axes(graph: Graph, ids: Int[np.ndarray, "..."]) -> list[Axis]:
    """Axes of an array of ids, classed where given ids are filled up and these are, too; of others, by the same axes."""
    seen = _CLASSED.once(graph, None, list)
    field = filled_up(_as_rows(ids)) if ids.ndim and _as_rows(ids).shape in padded(graph).shapes else None
    if field is None:
        known = [
            {axis for _, axes in seen for axis in axes if axis.size == n and axis.labels is not None}
            for n in ids.shape
        ]
        return [axes.pop() if len(axes) == 1 else Axis(n) for axes, n in zip(known, ids.shape, strict=True)]
    marks = field.reshape(ids.shape)
    for other, axes in seen:
        if _near(other, marks):
            return list(axes)
    views = [np.moveaxis(marks, k, 0).reshape(n, -1).astype(float) for k, n in enumerate(ids.shape)]
    axes = [grouped(view, MOST_LENGTHS + 1) for view in views]
    seen.append((marks, tuple(axes)))
    return axes


def unresolved(
    graph: Graph, ids: Int[np.ndarray, "..."], axes: Sequence[Axis], rates: Float[np.ndarray, "..."]
) -> float:
    """Relative error of E[(mean of a row's rows of a table that are no paddings)²], by rates of its classes: 0 where exact.

    Of n ids of which n_v are of one value it is Σ n_v²/n²; by classes, of which a share m of N positions is no padding,
    1/n + Σ_pq (m_p N_p m_q N_q − δ m_p N_p) r_pq/n², for rows of each class.
    """
    rows = _as_rows(ids)
    field = filled_up(rows) if len(axes) <= 2 and rows.shape in padded(graph).shapes else None
    if field is None:
        return 0.0
    before, along = axes[0] if len(axes) == 2 else None, axes[-1]
    known = np.maximum((~field).sum(axis=1), 1)
    true, by_class = np.zeros(len(rows)), np.zeros(len(rows))
    members = np.eye(along.classes)[along.label_array]
    within = rates[:, along.classes :] if before else rates[None, along.classes :]
    for b, (row, pads) in enumerate(zip(rows, field, strict=True)):
        true[b] = np.sum(np.unique(row[~pads], return_counts=True)[1].astype(float) ** 2) / known[b] ** 2
    labels = before.label_array if before else np.zeros(len(rows), int)
    for c in range(labels.max() + 1):
        alike = labels == c
        number = (~field[alike]).mean(axis=0) @ members
        pairs = (np.outer(number, number) - np.diag(number)).ravel()
        by_class[alike] = 1 / known[alike] + pairs @ within[c] / known[alike] ** 2
    return abs(float(by_class.mean() / max(true.mean(), 1e-300)) - 1)


def is_mask(graph: Graph, numbers: Float[np.ndarray, "..."]) -> bool:
    """Whether a given array is of two numbers, one of them perhaps for the paddings of another: it is known as it is."""
    return (
        bool(numbers.ndim)
        and _as_rows(numbers).shape in padded(graph).shapes
        and len(np.unique(numbers)) == 2
    )


def padded(graph: Graph) -> Padded:
    """What is known of the model's inputs that are filled up."""
    return PADDED.get(graph, None) or Padded()


def repeat_rates(ids: Int[np.ndarray, "..."], axes: Sequence[Axis]) -> Float[np.ndarray, "..."]:
    """P(ids_i = ids_j) by type of pair, of ids that are not negative: counts of equal pairs, axis by axis.

    Pairs that agree on some axes and are of one value are Σ n_c n_c', with n_c of that value there in class c of the others.
    """
    cells, labels = [axis.classes for axis in axes], [axis.label_array for axis in axes]
    out = np.zeros([axis.types for axis in axes])
    span = int(ids.max()) + 1
    for agree in itertools.product((True, False), repeat=ids.ndim):
        fixed = [k for k in range(ids.ndim) if agree[k]]
        free = [k for k in range(ids.ndim) if not agree[k]]
        inside = math.prod(cells[k] for k in free)
        values = _numbered(fixed, [np.arange(n) for n in ids.shape], ids.shape) * span + ids
        keys, counts = np.unique(values * inside + _numbered(free, labels, cells), return_counts=True)
        value, cell = np.divmod(keys, inside)
        group = np.cumsum(np.diff(value, prepend=-1) > 0) - 1
        table, outside = np.zeros((group[-1] + 1, inside)), np.zeros(group[-1] + 1, int)
        table[group, cell] = counts
        outside[group] = _numbered(
            range(len(fixed)), [labels[k] for k in fixed], [cells[k] for k in fixed]
        ).ravel()[value // span]
        rows = [table[outside == c] for c in range(math.prod(cells[k] for k in fixed))]
        pairs = np.stack([n.T @ n for n in rows]).reshape([cells[k] for k in (*fixed, *free, *free)])
        # From (classes that agree, classes of i, classes of j) to classes, or pairs of them, of each axis in
        # turn.
        ahead, behind = [*fixed, *free].index, free.index
        order = [
            p for k in range(ids.ndim) for p in ([ahead(k)] if agree[k] else [ahead(k), ids.ndim + behind(k)])
        ]
        block = tuple(slice(0, c) if same else slice(c, None) for c, same in zip(cells, agree, strict=True))
        out[block] = pairs.transpose(order).reshape(
            [c if same else c * c for c, same in zip(cells, agree, strict=True)]
        )
    return per_pair(out, axes)


def _numbered(dims: Sequence[int], numbers: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    """For every place of an array, what it has along some dimensions as one number, row-major."""
    out = np.zeros([len(x) for x in numbers], int)
    for k in dims:
        out = out * sizes[k] + numbers[k].reshape([-1 if d == k else 1 for d in range(len(numbers))])
    return out


PADDED: Fact[None, Padded] = Fact()  # of the model's inputs
_CLASSED: Fact[None, list[tuple[np.ndarray, tuple[Axis, ...]]]] = (
    Fact()
)  # where ids are filled up, and axes with classes for it
