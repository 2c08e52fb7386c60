"""Ids that fill up rows to one length: which are paddings, and how often ids repeat by the classes that tell them apart.

Whether a place is padding depends on its row and its position together. Rows of one length are a class, and so are positions
between two lengths: in each pair of a class of rows and a class of positions there are then only ids, or only paddings. Of
more lengths than a few, those most alike are one class, and what that leaves out is in doubt (`has_more_lengths`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from varscale.theory.domain.axes import Axis, grouped
from varscale.theory.domain.tables import per_pair
from varscale.theory.graph.nodes import Graph
from varscale.theory.graph.store import Fact

MOST_LENGTHS = 3  # that rows are told apart by, and so positions into one class more
_CHANCE = 4.0  # standard deviations by which rows have to end in one value more often than by chance
_ALIKE = 1.0  # positions of a row by which two arrays may differ that are filled up alike


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


def filled_shapes(given: Sequence[Any]) -> frozenset[tuple[int, ...]]:
    """The shapes (rows, positions) of given arrays of ids that are filled up."""
    arrays = [x for x in given if _is_given(x) and np.ndim(x) > 1 and np.size(x) > 1 and x.dtype.kind in "iu"]
    return frozenset(rows.shape for rows in map(_as_rows, arrays) if filled_up(rows) is not None)


def _near(field: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are filled up alike."""
    return field.shape == other.shape and bool(np.mean(field != other) * field.shape[-1] <= _ALIKE)


def _is_given(x: Any) -> bool:
    """Whether it is an array of numbers, not a description of one, and no random key."""
    return isinstance(x, np.ndarray | jax.Array) and not jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)


def _as_rows(x: Any) -> np.ndarray:
    return np.asarray(x).reshape(-1, np.shape(x)[-1])


def classed_axes(graph: Graph, ids: Int[np.ndarray, "..."]) -> list[Axis]:
    """Axes of an array of ids, classed where given ids are filled up and these are, too; of others, by the same axes."""
    seen = _CLASSED.once(graph, None, list)
    field = filled_up(_as_rows(ids)) if ids.ndim and _as_rows(ids).shape in padded(graph) else None
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


def has_more_lengths(graph: Graph, ids: Int[np.ndarray, "..."]) -> bool:
    """Whether ids are filled up from more lengths than rows are told apart by."""
    rows = _as_rows(ids)
    field = filled_up(rows) if rows.shape in padded(graph) else None
    return field is not None and len(np.unique(field.sum(axis=1))) > MOST_LENGTHS + 1


def is_mask(graph: Graph, numbers: Float[np.ndarray, "..."]) -> bool:
    """Whether a given array is of two numbers, one of them perhaps for the paddings of another: it is known as it is."""
    return bool(numbers.ndim) and _as_rows(numbers).shape in padded(graph) and len(np.unique(numbers)) == 2


def padded(graph: Graph) -> frozenset[tuple[int, ...]]:
    """The shapes of the model's inputs that are filled up."""
    return PADDED.get(graph, None) or frozenset()


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


PADDED: Fact[None, frozenset[tuple[int, ...]]] = Fact()  # shapes of the model's inputs that are filled up
_CLASSED: Fact[None, list[tuple[np.ndarray, tuple[Axis, ...]]]] = (
    Fact()
)  # where ids are filled up, and axes with classes for it
