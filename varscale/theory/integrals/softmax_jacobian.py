"""The Jacobian of a softmax, diag(p) − ppᵀ, on cotangents that keys and rows share: what is left of one, and where it goes."""

from __future__ import annotations

import numpy as np

from varscale.theory.domain.axes import Axis
from varscale.theory.integrals.softmax import WeightMoments


def where_weighed(weights: WeightMoments) -> tuple[np.ndarray, np.ndarray]:
    """E[p²]/E[p] and E[p³]/E[p²] of a key: its share where another row weighs it that has nothing, or all, in common."""
    first, square, cube = (np.maximum(x, 1e-300) for x in (weights.first, weights.square, weights.cube))
    return square / first, cube / square


def weighed_in_both(apart: np.ndarray, one: np.ndarray, correlation: np.ndarray) -> np.ndarray:
    """E[p_i² p_j]/E[p_i p_j] of lognormal weights, from that of independent rows and of one row: geometric in the correlation.

    With logits of variance s² that is e^{(3/2 + ρ) s²} E[p_i].
    """
    alike = np.clip(correlation, 0.0, 1.0)
    return apart ** (1 - alike) * one**alike


def apart(second: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """What is each key's own in second moments by type of the keys (last axis): by class, (..., classes).

    S_a − 2 β_a + c, with β_a what a key shares with the others on average and c what any two share: of keys that share
    u_a + u_b it leaves the independent part and the class's own.

    Args:
        second: second moments by type.
        counts: keys of each class there are.
    """
    c = counts.shape[-1]
    pairs = np.maximum(
        counts[..., :, None] - np.eye(c), 1e-9 * np.eye(c)
    )  # of a key of class b, the others of class a
    between = second[..., c:].reshape(*second.shape[:-1], c, c)
    between = (between + np.swapaxes(between, -1, -2)) / 2
    others = pairs.sum(-2)
    common = (pairs * between).sum(-2) / others
    every = counts * others
    whole = (every * common).sum(-1, keepdims=True) / np.maximum(every.sum(-1, keepdims=True), 1e-300)
    return second[..., :c] - 2 * common + whole


def in_common(second: np.ndarray, ahead: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """What cotangents of keys of two classes share, less what those of all keys do: each centred by its row's weights.

    Args:
        second: second moments by type of the keys (last axis).
        ahead: what weight the keys of a class have in the first row.
        behind: the same in the second row.
    """
    c = ahead.shape[-1]
    between = second[..., c:].reshape(*second.shape[:-1], c, c)
    between = between - np.einsum("...a,...ab->...b", ahead, between)[..., None, :]
    return between - np.einsum("...ab,...b->...a", between, behind)[..., :, None]


def balance(same: np.ndarray, lost: np.ndarray, mean: np.ndarray, axis: Axis) -> np.ndarray:
    """u_a m_b + m_a u_b, with u such that added to `lost` it makes the rows of a row's cotangents sum to zero."""
    others = axis.counts - np.eye(axis.classes)
    missing = -same - (others * lost).sum(-1)
    system = (
        np.eye(axis.classes) * (others * mean[..., None, :]).sum(-1)[..., None] + mean[..., :, None] * others
    )
    u = (np.linalg.pinv(system, rcond=1e-6) @ missing[..., None])[..., 0]
    return u[..., :, None] * mean[..., None, :] + mean[..., :, None] * u[..., None, :]
