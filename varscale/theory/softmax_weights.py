r"""Moments of softmax weights, by Laplace transforms.

For n keys with independent Gaussian logits, 1/S² = ∫ u e^{−uS} du turns every moment of the weights into one integral of
one-dimensional expectations:

    E[p_k²] = ∫ u E[e^{2l} e^{−u e^l}] φ(u)^{n−1} du,   E[p_k p_k'] = ∫ u E[e^l e^{−u e^l}]² φ(u)^{n−2} du,
    φ(u) = E[e^{−u e^l}]:

exact for any n and any logit variance (the usual e^{s²}/n fails beyond s = 2). What all keys share cancels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from varscale.theory.quadrature import WEIGHTS, Z


class WeightMoments(NamedTuple):
    """Moments of softmax weights of keys in classes d with n_d members: E[p], E[p²], E[p³], E[p p'] and E[(Σ p l)²]."""

    first: Float[np.ndarray, "*rows classes"]
    square: Float[np.ndarray, "*rows classes"]
    cube: Float[np.ndarray, "*rows classes"]
    pair: Float[np.ndarray, "*rows classes classes"]
    pull: Float[np.ndarray, "*rows"]


_STEP = 0.4  # in ln u: the integrands are analytic and fall off on both sides, so that the trapezoidal rule is exact to 1e-9
_FINEST, _COARSEST = 4, 40  # strides over the normal grid


def _grid(variances: np.ndarray, keys: float) -> np.ndarray:
    """ln u where there is mass, for up to this many keys."""
    low, high = float(np.min(variances)), float(np.max(variances))
    first = -high / 2 - math.log(keys) - 18 - 5 * math.sqrt(high)
    last = max(5 * math.sqrt(v) - v / 2 for v in (low, high, min(max(low, 25.0), high))) + 14
    return np.arange(math.floor(first / _STEP), math.ceil(last / _STEP)) * _STEP


def _laplace(variances: Float[np.ndarray, " keys"], u: Float[np.ndarray, " u"]) -> Float[np.ndarray, "moments keys u"]:
    """Of keys with these variances: ln φ(u), and over φ E[f e^{−u e^l}] for f = e^l, e^{2l}, e^{3l}, l e^l and (l e^l)²."""
    deviations = np.sqrt(variances)
    # e^{−u e^l} grows again beyond |Im l| = π/2: a step h costs exp(−π²/(s h)), 1e-9 at s h = 0.48.
    stride = min(max(int(24 / max(float(deviations.max()), 1e-3)), _FINEST), _COARSEST)
    weights = WEIGHTS[::stride] / WEIGHTS[::stride].sum()
    logits = deviations[:, None] * Z[::stride]
    e = np.exp(logits)
    lost = np.expm1(-u[:, None] * e[:, None])
    log_phi = np.log1p(np.clip(lost @ weights, -1 + 1e-15, 0))
    # One column a moment.
    columns = np.stack([e, e**2, e**3, e * logits, (e * logits) ** 2], axis=-1) * weights[:, None]
    moments = (1 + lost) @ columns / np.maximum(np.exp(log_phi), 1e-300)[..., None]
    return np.concatenate([log_phi[None], np.moveaxis(moments, -1, 0)])


def weight_moments(counts: Float[np.ndarray, "*rows classes"], variances: Float[np.ndarray, "*rows classes"]) -> WeightMoments:
    """Exact moments of softmax weights over independent Gaussian logits.

    Args:
        counts: keys in each class.
        variances: variance of their logits.
    """
    n, rows = counts.reshape(-1, counts.shape[-1]), np.arange(counts[..., 0].size)[:, None]
    distinct, place = np.unique(variances, return_inverse=True)
    place = place.reshape(n.shape)
    u = np.exp(_grid(distinct, float(n.sum(-1).max())))
    log_phi, first, second, third, pull, pull_square = _laplace(distinct, u)
    members = np.zeros((len(n), len(distinct)))
    np.add.at(members, (rows, place), n)
    measure = np.exp(members @ log_phi) * _STEP * u

    def one(power: int, f: np.ndarray) -> np.ndarray:
        return ((measure * u**power) @ f.T)[rows, place]

    def two(f: np.ndarray) -> np.ndarray:
        return ((f * (measure * u)[:, None]) @ f.T)[rows[..., None], place[:, :, None], place[:, None, :]]

    others = n[:, :, None] * n[:, None, :] - np.eye(n.shape[-1]) * n[:, None]
    pulled = np.sum(n * one(1, pull_square), -1) + np.sum(others * two(pull), (-1, -2))
    found = WeightMoments(one(0, first), one(1, second), one(2, third) / 2, two(first), pulled)
    return WeightMoments(*(x.reshape((*counts.shape[:-1], *x.shape[1:])) for x in found))
