r"""Moments of softmax weights, by Laplace transforms.

For n keys with independent Gaussian logits, 1/S² = ∫ u e^{−uS} du turns every moment of the weights into one integral of
one-dimensional expectations:

    E[p_k²] = ∫ u E[e^{2l} e^{−u e^l}] φ(u)^{n−1} du,   E[p_k p_k'] = ∫ u E[e^l e^{−u e^l}]² φ(u)^{n−2} du,
    φ(u) = E[e^{−u e^l}]:

exact for any n and any logit variance (the usual e^{s²}/n fails beyond s = 2). What all keys share cancels.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from varscale.theory.quadrature import WEIGHTS, Z

_L = Z[::12]
_LW = WEIGHTS[::12] / WEIGHTS[::12].sum()


class WeightMoments(NamedTuple):
    """Moments of softmax weights of keys in classes d with n_d members: E[p], E[p²], E[p³], E[p p'] and E[(Σ p l)²]."""

    first: np.ndarray
    square: np.ndarray
    cube: np.ndarray
    pair: np.ndarray
    pull: float


_STEP = 0.4  # in ln u: the integrands are analytic and fall off on both sides, so that the trapezoidal rule is exact to 1e-12
_MOST_KEYS = 1e8


class _Laplace(NamedTuple):
    """Of one key, over a grid of u: ln φ(u), and over φ E[f e^{−u e^l}] for f = e^l, e^{2l}, e^{3l}, l e^l and (l e^l)²."""

    log_phi: np.ndarray
    first: np.ndarray
    second: np.ndarray
    third: np.ndarray
    pull: np.ndarray
    pull_square: np.ndarray


def _log_u(variance: float) -> tuple[int, int]:
    """The grid of ln u, in steps, that holds the mass for any number of keys."""
    s = math.sqrt(variance)
    low, high = -variance / 2 - math.log(_MOST_KEYS) - 14 - 5 * s, -variance / 2 + 14 + 5 * s
    return math.floor(low / _STEP), math.ceil(high / _STEP)


@functools.lru_cache(maxsize=1024)
def _laplace(variance: float, low: int, high: int) -> _Laplace:
    u = np.exp(np.arange(low, high) * _STEP)
    logits = math.sqrt(variance) * _L
    e = np.exp(logits)
    exponent = -u[:, None] * e
    decay = np.exp(exponent)
    log_phi = np.log1p(np.clip(np.expm1(exponent) @ _LW, -1 + 1e-15, 0))
    # One column a moment.
    columns = np.stack([e, e**2, e**3, e * logits, (e * logits) ** 2], axis=-1) * _LW[:, None]
    moments = decay @ columns / np.maximum(np.exp(log_phi), 1e-300)[:, None]
    return _Laplace(log_phi, *moments.T)


@functools.lru_cache(maxsize=4096)
def weight_moments(counts: tuple[float, ...], variances: tuple[float, ...]) -> WeightMoments:
    """Exact moments of softmax weights over independent Gaussian logits.

    Args:
        counts: keys in each class.
        variances: variance of their logits.
    """
    n = np.array(counts)
    ends = [_log_u(v) for v in variances]
    low, high = min(a for a, _ in ends), max(b for _, b in ends)
    keys = [_laplace(v, low, high) for v in variances]
    u = np.exp(np.arange(low, high) * _STEP)
    whole = np.exp(np.stack([k.log_phi for k in keys], -1) @ n) * _STEP
    one = lambda power, name: (whole * u**power) @ np.stack([getattr(k, name) for k in keys], -1)  # noqa: E731
    measure = (whole * u**2)[:, None]
    ratio, pulls = np.stack([k.first for k in keys], -1), np.stack([k.pull for k in keys], -1)
    cross = pulls.T @ (measure * pulls)
    pull = float(n @ one(2, "pull_square")) + float(n @ cross @ n) - float(n @ np.diag(cross))
    return WeightMoments(one(1, "first"), one(2, "second"), one(3, "third") / 2, ratio.T @ (measure * ratio), pull)
