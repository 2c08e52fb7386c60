"""Cotangents of rows that are looked up and then added up by segment: all positions of one segment have the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse


class Alike(NamedTuple):
    """What two cotangents share on average.

    Attributes:
        within: two of one row.
        between: two of different rows.
        doubted: the part of `within` that may be off by as much as it is itself.
    """

    within: np.ndarray
    between: np.ndarray
    doubted: np.ndarray


def by_segment(known: np.ndarray, segments: np.ndarray, alone: np.ndarray, differ: np.ndarray) -> Alike:
    """Shares of cotangents where all positions of one segment have the same.

    A sum by segment hands every position of it the same cotangent, and lookups that share a row seldom share a segment:
    of the pairs that differ, those of one segment are taken out, as far as they go.
    """
    total, rows, both, shared = map(_pairs, ((len(known),), _runs(known), _runs(known, segments), _runs(segments)))
    # Pairs of one segment are as much alike as a position and itself, as far as that goes; what a softmax by segment took
    # out (pairs are opposed) it took out within segments.
    inside = np.where(
        differ * alone > 0,
        np.sign(alone) * np.minimum(np.abs(alone), np.abs(differ) * total / max(shared, 1.0)),
        differ * total / max(shared, 1.0),
    )
    apart = (differ * total - inside * shared) / max(total - shared, 1.0)
    within = (both * inside + (rows - both) * apart) / max(rows, 1.0)
    between = ((shared - both) * inside + (total - rows - shared + both) * apart) / max(total - rows, 1.0)
    return Alike(within, between, _likeness(known, segments) * (rows - both) / max(rows, 1.0) * apart)


def _runs(*x: np.ndarray) -> np.ndarray:
    """How often each value, or each combination of several, is met."""
    return np.unique(np.stack(x), axis=-1, return_counts=True)[1]


def _pairs(counts: Sequence[int] | np.ndarray) -> float:
    """Ordered pairs of different members of groups of these sizes."""
    n = np.asarray(counts, float)
    return float(np.sum(n * (n - 1)))


def _likeness(known: np.ndarray, segments: np.ndarray) -> float:
    """How much more alike the sums of two segments that share a row are than those of any two: the mean cosine of their rows.

    Functions of the sums, their derivatives among them, are more alike by no more than that.
    """
    kept = segments >= 0
    shape = int(segments.max()) + 1, int(known.max()) + 1
    rows_of = sparse.csr_matrix((np.ones(int(kept.sum())), (segments[kept], known[kept])), shape)
    norms = np.sqrt(np.asarray(rows_of.multiply(rows_of).sum(axis=1)).ravel())
    count = np.count_nonzero(norms)
    unit = sparse.diags(1 / np.maximum(norms, 1e-300)) @ rows_of
    met, own = unit.T @ rows_of, rows_of.multiply(rows_of).sum()
    pairs = float(np.square(np.asarray(rows_of.sum(axis=0))).sum() - own)
    usual = float(np.square(np.asarray(unit.sum(axis=0))).sum() - count) / max(count * (count - 1), 1)
    return float(np.clip((met.multiply(met).sum() - own) / max(pairs, 1.0) - usual, 0.0, 1.0))
