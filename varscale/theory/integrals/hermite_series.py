r"""Integration against the standard normal: the grid, Hermite coefficients, and series in a correlation.

With orthonormal Hermite polynomials h_k and f = Σ a_k h_k, g = Σ b_k h_k, standard normals z, z' of correlation ρ have
E[f(z) g(z')] = Σ a_k b_k ρ^k (Mehler 1866). Where g is linear one term is left (Bussgang 1952), and the derivative in ρ is
that of f' and g' (Price 1958).
"""

from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.polynomial.hermite_e import hermevander
from scipy import special

from varscale.theory.domain.axes import Axes
from varscale.theory.domain.tables import by_type, means_by_type

# The trapezoidal rule on a Gaussian converges like exp(-2π²/h²): exact to rounding for smooth functions, to
# h²/12 at a corner. A jump inside a cell costs up to h φ/2 of its height, .004 at most (where it
# matters, `doubts.mark_undefined` says so). An even number of points keeps 0, where corners lie, in the
# middle of a cell.
POINTS = 852
Z = np.linspace(-8.5, 8.5, POINTS)
WEIGHTS = np.exp(-(Z**2) / 2)
WEIGHTS /= WEIGHTS.sum()
DEGREE = 40
# Values on the grid -> orthonormal Hermite coefficients.
HERMITE = hermevander(Z, DEGREE - 1) / np.sqrt(special.factorial(np.arange(DEGREE))) * WEIGHTS[:, None]
_RHO = np.sin(np.linspace(-np.pi / 2, np.pi / 2, 129))  # closer together where series turn steeply
_RHO_POWERS = _RHO[:, None] ** np.arange(DEGREE)


def power_series(coefficients: np.ndarray, rho: np.ndarray) -> np.ndarray:
    """Σ c_k ρ^k, coefficients along the last axis (shapes otherwise broadcast), by Horner's rule."""
    terms = np.ascontiguousarray(np.moveaxis(coefficients, -1, 0))
    out = np.zeros(np.broadcast_shapes(coefficients.shape[:-1], np.shape(rho)))
    for term in terms[::-1]:
        out *= rho
        out += term
    return out


_THREADED = 200_000  # numbers in a matrix from which on a product with it is worth the start of threads


def on_one_thread(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """x @ matrix; of a small matrix in blocks of rows for which BLAS starts no threads: they take longer than the product."""
    if matrix.size > _THREADED:
        return x @ matrix
    flat, rows = x.reshape(-1, x.shape[-1]), _THREADED // matrix.size
    blocks = [flat[start : start + rows] @ matrix for start in range(0, len(flat), rows)]
    return np.concatenate(blocks).reshape(*x.shape[:-1], matrix.shape[-1])


def read_off(line: Float[np.ndarray, " points"], z: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """A function given on the grid at other points, straight between its own: `np.interp`, which searches for them."""
    place = np.clip((z - Z[0]) * ((POINTS - 1) / (Z[-1] - Z[0])), 0, POINTS - 1)
    below = np.minimum(place.astype(np.int32), POINTS - 2)
    place -= below
    place *= np.diff(line)[below]
    place += line[below]
    return place


_FALLS = (0.5, 1.5, 2.5)  # of a jump, of a kink, of a jump in the second derivative
_TAIL_AT = np.concatenate([[0.0], np.geomspace(1e-7, 50, 500)])


@cache
def _tail_table(fall: float) -> np.ndarray:
    """fall ∫ x^{−fall − 1} e^{−yx} dx from 1 on, at x = t^{−1/fall}."""
    t = (np.arange(4000) + 0.5) / 4000
    return np.exp(-np.multiply.outer(_TAIL_AT, t ** (-1 / fall))).mean(axis=-1)


def tail(rho: np.ndarray, fall: np.ndarray) -> np.ndarray:
    """Σ c_k ρ^k / Σ c_k over k ≥ DEGREE of coefficients that fall like k^{−fall − 1}; 0 for ρ < 0."""
    y = -(DEGREE - 0.5) * np.log(np.clip(rho, 1e-300, 1.0))
    place = np.clip(fall, _FALLS[0], _FALLS[-1]) - _FALLS[0]
    parts = (np.interp(y, _TAIL_AT, _tail_table(f)) for f in _FALLS)
    mixed = sum(np.maximum(1 - np.abs(place - i), 0.0) * part for i, part in enumerate(parts))
    return np.where(rho > 0, mixed, 0.0)


def solved(coefficients: np.ndarray, target: np.ndarray) -> np.ndarray:
    """ρ with Σ c_k ρ^k = target, for series that rise with ρ: read off a table, then two Newton steps."""
    target = np.broadcast_to(target, np.broadcast_shapes(target.shape, coefficients.shape[:-1]))
    coefficients = np.broadcast_to(coefficients, (*target.shape, coefficients.shape[-1]))
    flat, goals = coefficients.reshape(-1, coefficients.shape[-1]), target.ravel()
    tables = np.maximum.accumulate(flat @ _RHO_POWERS.T, axis=-1)
    place = np.clip(np.sum(tables <= goals[:, None], axis=-1) - 1, 0, len(_RHO) - 2)
    low, high = tables[np.arange(len(place)), place], tables[np.arange(len(place)), place + 1]
    share = np.clip((goals - low) / np.maximum(high - low, 1e-300), 0.0, 1.0)
    rho = _RHO[place] + share * (_RHO[place + 1] - _RHO[place])
    slopes = flat[:, 1:] * np.arange(1, flat.shape[-1])
    for _ in range(2):
        slope = np.maximum(power_series(slopes, rho), 1e-3)
        rho = np.clip(rho - np.clip((power_series(flat, rho) - goals) / slope, -0.02, 0.02), -1.0, 1.0)
    return rho.reshape(target.shape)


@lru_cache
def sphere_squares(dimension: float) -> Float[np.ndarray, " points"]:
    """x² of one coordinate of a point on the sphere of radius √d, in the order of z²: x²/d is Beta(1/2, (d − 1)/2)."""
    if dimension <= 1 + 1e-6:
        return np.ones_like(Z)
    return dimension * special.betaincinv(0.5, (dimension - 1) / 2, np.abs(2 * special.ndtr(Z) - 1))


@cache
def sobol(dimension: int) -> Float[np.ndarray, "points dimension"]:
    """Quasi-random standard normals, antithetic and whitened: linear and quadratic functions are exact."""
    from scipy.stats import qmc

    z = special.ndtri(np.clip(qmc.Sobol(dimension, scramble=True, rng=0).random(4096), 1e-9, 1 - 1e-9))
    z = np.concatenate([z, -z])
    return z @ np.linalg.inv(np.linalg.cholesky(z.T @ z / len(z))).T


_CONVERGED = 1e-12  # what rounding leaves of a series that has converged


def on_grid(values: np.ndarray) -> np.ndarray:
    """Values at every point, where they are given for one alone."""
    return values if values.shape[-1] == len(Z) else np.broadcast_to(values, (*values.shape[:-1], len(Z)))


class Series(NamedTuple):
    """E[f(z_i) g(z_j)] by type, a function of the correlation: exact at ±1, Σ a_k b_k ρ^k elsewhere.

    What is beyond the degree (all of 1 − ρ behind deep ReLUs) falls off with k as it began to.
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


def mehler(fi: np.ndarray, gj: np.ndarray, frame: Axes) -> Series:
    """For functions given on the grid by class, (classes or 1..., points)."""
    ai = on_one_thread(fi, HERMITE)
    bj = ai if gj is fi else on_one_thread(gj, HERMITE)
    i, j = (
        by_type(np.arange(x[..., 0].size).reshape(x.shape[:-1]), frame, second=second)
        for x, second in ((fi, False), (gj, True))
    )
    # One matrix product for every class of f with every class of g.
    weighted = fi.reshape(-1, POINTS) * WEIGHTS
    both, opposite = (on_one_thread(weighted, g.reshape(-1, POINTS).T)[i, j] for g in (gj, gj[..., ::-1]))
    return Series(both, opposite, means_by_type(ai, frame, bj))
