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
from jaxtyping import Float

from varscale.theory.quadrature import WEIGHTS, Z


class WeightMoments(NamedTuple):
    """Moments of softmax weights of keys in classes d with n_d members: E[p], E[p²], E[p³], E[p p'] and E[(Σ p l)²]."""

    first: np.ndarray
    square: np.ndarray
    cube: np.ndarray
    pair: np.ndarray
    pull: float


_STEP = 0.4  # in ln u: the integrands are analytic and fall off on both sides, so that the trapezoidal rule is exact to 1e-12
_MOST_KEYS = 1e8
_FINEST, _COARSEST = 4, 24  # strides over the normal grid


def _log_u(variance: float) -> tuple[int, int]:
    """The grid of ln u, in steps, that holds the mass for any number of keys."""
    s = math.sqrt(variance)
    low, high = -variance / 2 - math.log(_MOST_KEYS) - 14 - 5 * s, -variance / 2 + 14 + 5 * s
    return math.floor(low / _STEP), math.ceil(high / _STEP)


@functools.lru_cache(maxsize=1024)
def _laplace(variance: float, low: int, high: int) -> Float[np.ndarray, "moments u"]:
    """Of one key, over a grid of u: ln φ(u), and over φ E[f e^{−u e^l}] for f = e^l, e^{2l}, e^{3l}, l e^l and (l e^l)²."""
    u = np.exp(np.arange(low, high) * _STEP)
    deviation = math.sqrt(variance)
    # e^{−u e^l} grows again beyond |Im l| = π/2: a step h costs exp(−π²/(s h)), 1e-9 at s h = 0.48.
    stride = min(max(int(_COARSEST / max(deviation, 1e-3)), _FINEST), _COARSEST)
    weights = WEIGHTS[::stride] / WEIGHTS[::stride].sum()
    logits = deviation * Z[::stride]
    e = np.exp(logits)
    lost = np.expm1(-u[:, None] * e)
    log_phi = np.log1p(np.clip(lost @ weights, -1 + 1e-15, 0))
    # One column a moment.
    columns = np.stack([e, e**2, e**3, e * logits, (e * logits) ** 2], axis=-1) * weights[:, None]
    moments = (1 + lost) @ columns / np.maximum(np.exp(log_phi), 1e-300)[:, None]
    return np.stack([log_phi, *moments.T])


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
    log_phi, first, second, third, pull, pull_square = np.stack([_laplace(v, low, high) for v in variances], axis=-1)
    u = np.exp(np.arange(low, high) * _STEP)
    whole = np.exp(log_phi @ n) * _STEP
    by_first, by_second = whole * u, whole * u**2
    pair = first.T @ (by_second[:, None] * first)
    pulls = pull.T @ (by_second[:, None] * pull)
    pulled = float(n @ (by_second @ pull_square)) + float(n @ pulls @ n) - float(n @ np.diag(pulls))
    return WeightMoments(by_first @ first, by_second @ second, (by_second * u) @ third / 2, pair, pulled)
