r"""Moments of softmax weights, by Laplace transforms.

For n keys with independent Gaussian logits, 1/S² = ∫ u e^{−uS} du turns every moment of the weights into one integral of
one-dimensional expectations:

    E[p_k²] = ∫ u E[e^{2l} e^{−u e^l}] φ(u)^{n−1} du,   E[p_k p_k'] = ∫ u E[e^l e^{−u e^l}]² φ(u)^{n−2} du,
    φ(u) = E[e^{−u e^l}]:

exact for any n and any logit variance (the usual e^{s²}/n fails beyond s = 2). What all keys share cancels.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from varscale.theory.domain.axes import Axis
from varscale.theory.integrals.hermite_series import WEIGHTS, Z


class WeightMoments(NamedTuple):
    """Moments of softmax weights of keys in classes with n members: E[p], E[p²], E[p³], E[p p'], E[(Σ p l)²] and E[Σ p² l²]."""

    first: Float[np.ndarray, "*rows classes"]
    square: Float[np.ndarray, "*rows classes"]
    cube: Float[np.ndarray, "*rows classes"]
    pair: Float[np.ndarray, "*rows classes classes"]
    pull: Float[np.ndarray, "*rows"]
    own_pull: Float[np.ndarray, "*rows"]


# In ln u: the integrands are analytic and fall off on both sides: the trapezoidal rule is exact to 1e-9.
_STEP = 0.4
# e^{−u e^l} grows again beyond |Im l| = π/2: on the normal grid a step h costs exp(−π²/(s h)), 1e-9 at s h =
# 0.48, which is the whole grid's at s = 24; at s = 64 it costs 5e-4.
_RESOLVED = 24
_STRIDES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 36, 40)  # over the normal grid
_GONE = 6.5  # ln x beyond which e^{−x} is nothing
_LEAST = 1e-300
_SPACING = 0.1  # of logarithms of variances at which integrals are taken
_ROUND = 10  # steps of ln u to which a grid is rounded up, so that one serves many layers


@functools.lru_cache(maxsize=1024)
def _laplace(log_variance: float, first: int, last: int, stride: int, directions: float) -> np.ndarray:
    """Of a key, x = u e^l: ln(−ln φ(u)); of E[f e^{−x}]/φ logarithms for f = x, x², x³, (l x)² and the ratio of l x to x.

    Smooth in the logarithm of the variance, along which moments themselves grow like exponentials.
    """
    # The density of one coordinate of a point on the sphere of radius √d: a normal one where d is infinite.
    d = max(directions, 3.0)
    density = WEIGHTS if d == math.inf else np.maximum(1 - Z**2 / d, 0) ** ((d - 3) / 2)
    z, weights = Z[::stride], density[::stride] / density[::stride].sum()
    logits = math.exp(log_variance / 2) * z / math.sqrt(weights @ z**2)
    x = np.exp(np.minimum(logits + _STEP * np.arange(first, last)[:, None], _GONE))
    left = np.exp(-x)
    phi = left @ weights
    log_phi = np.where(phi > 0.5, np.log1p(np.maximum(np.expm1(-x) @ weights, -0.6)), np.log(phi))
    left = left * x
    *moments, pull = np.stack([left, left * x, left * x * x, left * x * logits**2, left * logits]) @ weights
    logarithms = np.log(np.maximum([-log_phi, *(moment / phi for moment in moments)], _LEAST))
    return np.stack([*logarithms, pull / np.maximum(moments[0], _LEAST)])


def _between(variances: np.ndarray, first: int, last: int, directions: float) -> np.ndarray:
    """By moment, key and u: ln φ(u) and, over φ, E[f e^{−x}] for f = x, x², x³, (l x)² and l x, x = u e^l.

    Read off between those of variances e^{k/10} by polynomials of degree five: exact to 1e-6 up to 4, to 1e-4 up to 100.
    """
    finest = max(_RESOLVED / math.sqrt(float(variances.max())), 1)
    stride = max(k for k in _STRIDES if k <= finest)
    places = np.log(variances) / _SPACING
    below = np.floor(places).astype(int)
    nodes = range(int(below.min()) - 2, int(below.max()) + 4)
    few = len(variances) <= len(nodes)
    taken = np.log(variances).tolist() if few else [k * _SPACING for k in nodes]
    found = np.stack([_laplace(x, first, last, stride, directions) for x in taken], axis=1)
    if not few:  # from three nodes on either side
        between, weights = (places - below)[:, None], np.zeros((len(variances), len(nodes)))
        for i in range(-2, 4):
            others = np.array([k for k in range(-2, 4) if k != i])
            weights[np.arange(len(places)), below + i - nodes[0]] = np.prod(
                (between - others) / (i - others), axis=1
            )
        found = weights @ found
    np.exp(found[:5], out=found[:5])
    found[0] *= -1
    found[5] *= found[1]
    return found


def weight_moments(
    counts: Float[np.ndarray, "*rows classes"],
    variances: Float[np.ndarray, "*rows classes"],
    directions: float = math.inf,
) -> WeightMoments:
    """Exact moments of softmax weights, `counts` keys a class: of Gaussian logits, or points on a sphere of ≥ 3 directions."""
    n = counts.reshape(-1, counts.shape[-1])
    distinct, place = np.unique(variances, return_inverse=True)
    place = place.reshape(n.shape)
    # Steps of ln u between which there is mass: of a logit, and of their sum as far above as there are keys.
    reach = 5 * math.sqrt(float(distinct.max()))
    first = _ROUND * math.floor((-reach - math.log(float(n.sum(-1).max())) - 18) / _STEP / _ROUND)
    last = _ROUND * math.ceil((reach + 14) / _STEP / _ROUND)
    log_phi, first, second, third, pull_square, pull = _between(distinct, first, last, directions)
    members = np.zeros((len(n), len(distinct)))
    np.add.at(members, (np.arange(len(n))[:, None], place), n)
    measure = np.exp(members @ log_phi) * _STEP  # the powers of u are in x: what is left of du is d ln u

    def one(f: np.ndarray) -> np.ndarray:
        return np.einsum("ru,rku->rk", measure, f[place])

    def two(f: np.ndarray) -> np.ndarray:
        return (f[place] * measure[:, None]) @ np.swapaxes(f[place], -1, -2)

    others = n[:, None] * (n[:, :, None] - np.eye(n.shape[-1]))
    own_pull = np.sum(n * one(pull_square), -1)
    pulled = own_pull + np.sum(others * two(pull), (-1, -2))
    found = WeightMoments(one(first), one(second), one(third) / 2, two(first), pulled, own_pull)
    return WeightMoments(*(x.reshape((*counts.shape[:-1], *x.shape[1:])) for x in found))


def apart(second: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """What is each key's own in second moments by type of the keys (last axis), by class: S_a − 2 β_a + c.

    β_a is what a key shares with the others on average, c what any two share: of u_a + u_b nothing is left.
    """
    c = counts.shape[-1]
    # How many others of class a a key of class b has.
    pairs = np.maximum(counts[..., :, None] - np.eye(c), 1e-9 * np.eye(c))
    between = second[..., c:].reshape(*second.shape[:-1], c, c)
    between = (between + np.swapaxes(between, -1, -2)) / 2
    others = pairs.sum(-2)
    common = (pairs * between).sum(-2) / others
    every = counts * others
    whole = (every * common).sum(-1, keepdims=True) / np.maximum(every.sum(-1, keepdims=True), 1e-300)
    return second[..., :c] - 2 * common + whole


def in_common(second: np.ndarray, ahead: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """What cotangents of keys of two classes share by type (last axis), each centred by its row's weights of each class."""
    c = ahead.shape[-1]
    between = second[..., c:].reshape(*second.shape[:-1], c, c)
    between = between - np.einsum("...a,...ab->...b", ahead, between)[..., None, :]
    return between - np.einsum("...ab,...b->...a", between, behind)[..., :, None]


def balance(same: np.ndarray, lost: np.ndarray, mean: np.ndarray, axis: Axis) -> np.ndarray:
    """u_a m_b + m_a u_b, with u such that added to `lost` it makes the rows of a row's cotangents sum to zero."""
    others = axis.counts - np.eye(axis.classes)
    missing = -same - (others * lost).sum(-1)
    diagonal = (others * mean[..., None, :]).sum(-1)[..., None] * np.eye(axis.classes)
    system = diagonal + mean[..., :, None] * others
    u = (np.linalg.pinv(system, rcond=1e-6) @ missing[..., None])[..., 0]
    return u[..., :, None] * mean[..., None, :] + mean[..., :, None] * u[..., None, :]
