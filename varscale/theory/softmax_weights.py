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

from varscale.theory.hermite import WEIGHTS, Z


class WeightMoments(NamedTuple):
    """Moments of softmax weights of keys in classes with n members: E[p], E[p²], E[p³], E[p p'], E[(Σ p l)²] and E[Σ p² l²]."""

    first: Float[np.ndarray, "*rows classes"]
    square: Float[np.ndarray, "*rows classes"]
    cube: Float[np.ndarray, "*rows classes"]
    pair: Float[np.ndarray, "*rows classes classes"]
    pull: Float[np.ndarray, "*rows"]
    own_pull: Float[np.ndarray, "*rows"]


_STEP = 0.4  # in ln u: the integrands are analytic and fall off on both sides, so that the trapezoidal rule is exact to 1e-9
# e^{−u e^l} grows again beyond |Im l| = π/2: on the normal grid a step h costs exp(−π²/(s h)), 1e-9 at s h = 0.48, which is the
# whole grid's at s = 24; at s = 64 it costs 5e-4.
_RESOLVED = 24
_COARSEST = 40  # stride over the normal grid
_CELLS = 1e7  # numbers of one array
_GONE = 6.5  # ln x beyond which e^{−x} is nothing


def _grid(variance: float, keys: float) -> np.ndarray:
    """ln u where there is mass, for up to this many keys of up to this variance."""
    reach = 5 * math.sqrt(variance)  # of a logit; the sum's is as far above it as there are keys
    first, last = -reach - math.log(keys) - 18, reach + 14
    return np.arange(math.floor(first / _STEP), math.ceil(last / _STEP)) * _STEP


def _projected(directions: float) -> Float[np.ndarray, " points"]:
    """One coordinate of a point on the sphere of radius √d in d directions, on the normal grid: (1 − z²/d)^{(d − 3)/2}."""
    d = max(directions, 3.0)
    return WEIGHTS if d == math.inf else np.maximum(1 - Z**2 / d, 0) ** ((d - 3) / 2)


def _laplace(
    variances: Float[np.ndarray, " keys"], log_u: Float[np.ndarray, " u"], density: np.ndarray
) -> Float[np.ndarray, "moments keys u"]:
    """Of keys with these variances, x = u e^l: ln φ(u), and over φ E[f e^{−x}] for f = x, x², x³, l x and (l x)²."""
    deviations = np.sqrt(variances)
    stride = min(max(int(_RESOLVED / max(float(deviations.max()), 1e-3)), 1), _COARSEST)
    z, weights = Z[::stride], density[::stride] / density[::stride].sum()
    logits = (deviations[:, None] * z / math.sqrt(weights @ z**2))[:, None]
    x = np.exp(np.minimum(logits + log_u[:, None], _GONE))
    lost = np.expm1(-x)
    log_phi = np.log1p(np.clip(lost @ weights, -1 + 1e-15, 0))
    left = (1 + lost) * x
    moments = [left, left * x, left * x * x, left * logits, left * x * logits**2]
    return np.stack([log_phi, *(m @ weights / np.maximum(np.exp(log_phi), 1e-300) for m in moments)])


def weight_moments(
    counts: Float[np.ndarray, "*rows classes"], variances: Float[np.ndarray, "*rows classes"], directions: float = math.inf
) -> WeightMoments:
    """Exact moments of softmax weights over independent logits, Gaussian or projections of points on a sphere.

    Args:
        counts: keys in each class.
        variances: variance of their logits.
        directions: of the sphere that keys lie on, 3 at least; infinitely many where logits are Gaussian.
    """
    n, rows = counts.reshape(-1, counts.shape[-1]), np.arange(counts[..., 0].size)[:, None]
    distinct, place = np.unique(variances, return_inverse=True)
    place = place.reshape(n.shape)
    density = _projected(directions)
    log_u = _grid(float(distinct.max()), float(n.sum(-1).max()))
    some = max(int(_CELLS / (log_u.size * Z.size)), 1)  # at a time: of wide logits the grids are fine
    parts = [_laplace(distinct[k : k + some], log_u, density) for k in range(0, len(distinct), some)]
    log_phi, first, second, third, pull, pull_square = np.concatenate(parts, axis=1)
    members = np.zeros((len(n), len(distinct)))
    np.add.at(members, (rows, place), n)
    measure = np.exp(members @ log_phi) * _STEP  # the powers of u are in x: what is left of du is d ln u

    def one(f: np.ndarray) -> np.ndarray:
        return (measure @ f.T)[rows, place]

    def two(f: np.ndarray) -> np.ndarray:
        return (f[place] * measure[:, None]) @ np.swapaxes(f[place], -1, -2)

    others = n[:, :, None] * n[:, None, :] - np.eye(n.shape[-1]) * n[:, None]
    own_pull = np.sum(n * one(pull_square), -1)
    pulled = own_pull + np.sum(others * two(pull), (-1, -2))
    found = WeightMoments(one(first), one(second), one(third) / 2, two(first), pulled, own_pull)
    return WeightMoments(*(x.reshape((*counts.shape[:-1], *x.shape[1:])) for x in found))
