r"""E[f(z_i) g(z_j)] of two functions of normals, as a series in their correlation (Mehler 1866): Σ a_k b_k ρ^k."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from varscale.theory.domain.axes import Axis
from varscale.theory.domain.tables import by_type
from varscale.theory.integrals.hermite_series import (
    DEGREE,
    HERMITE,
    WEIGHTS,
    Z,
    on_one_thread,
    power_series,
    tail,
)

_CONVERGED = 1e-12  # what rounding leaves of a series that has converged


def on_grid(values: np.ndarray) -> np.ndarray:
    """Values at every point, where they are given for one alone."""
    return values if values.shape[-1] == len(Z) else np.broadcast_to(values, (*values.shape[:-1], len(Z)))


class Series(NamedTuple):
    """E[f(z_i) g(z_j)] of two functions of normals as a function of their correlation, by type.

    Exact for i and j the same and for opposites, Σ a_k b_k ρ^k elsewhere; what is beyond the degree (all of 1 − ρ behind deep
    ReLUs) falls off with k as it began to.
    """

    both: np.ndarray
    opposite: np.ndarray
    coefficients: np.ndarray

    def at(self, rho: np.ndarray) -> np.ndarray:
        out = power_series(self.coefficients, rho)
        for whole, sign in ((self.both, 1.0), (self.opposite, -1.0)):
            signed = self.coefficients * sign ** np.arange(DEGREE)
            rest = whole - signed.sum(-1)
            if np.any(np.abs(rest) > _CONVERGED * np.abs(self.both)):
                last = signed[..., DEGREE // 2 :].sum(-1)
                fall = np.log2(1 + np.maximum(last / np.where(rest == 0, 1e-300, rest), 0.0))
                out = out + rest * tail(sign * rho, fall)
            out = np.where(sign * rho >= 1 - 1e-9, whole, out)
        return out

    def curvature(self, rho: np.ndarray) -> np.ndarray:
        """The second derivative."""
        k = np.arange(2, self.coefficients.shape[-1])
        return power_series(self.coefficients[..., 2:] * k * (k - 1), rho)


def mehler(fi: np.ndarray, gj: np.ndarray, frame: Sequence[Axis]) -> Series:
    """For functions given on the grid by class, (classes or 1..., points)."""
    ai = on_one_thread(fi, HERMITE)
    bj = ai if gj is fi else on_one_thread(gj, HERMITE)
    both, opposite = (_read_pairs(_class_pairs(fi, g, WEIGHTS), fi, gj, frame) for g in (gj, gj[..., ::-1]))
    return Series(both, opposite, by_type(ai, frame, second=False) * by_type(bj, frame, second=True))


def _class_pairs(fi: np.ndarray, gj: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """E[f_c(z) g_c'(z)] for every class of f with every class of g, one matrix product."""
    return on_one_thread(fi.reshape(-1, fi.shape[-1]) * weights, gj.reshape(-1, gj.shape[-1]).T)


def _read_pairs(pairs: np.ndarray, fi: np.ndarray, gj: np.ndarray, frame: Sequence[Axis]) -> np.ndarray:
    """A (classes of f, classes of g) matrix read by type."""
    index = [
        by_type(np.arange(x[..., 0].size).reshape(x.shape[:-1]), frame, second=second)
        for x, second in ((fi, False), (gj, True))
    ]
    return pairs[index[0], index[1]]
