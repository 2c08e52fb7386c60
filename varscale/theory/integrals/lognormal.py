r"""What a function makes of a random scale.

The second moment Q of a root differs from draw to draw, from sample to sample and from place to place. It is taken for
lognormal, of relative variance P at one place; of ln Q a part of variance V and third cumulant κ is common to all places. Of
F(Q) = E[f(√Q z)²], then,

    mean              E[F(Q)]
    at one place      1 + P → E[F(Q)²]/E[F(Q)]²
    in common         slope s and bend c: the means of F̃′ and F̃″, where F̃(t) = ln E[F] with the common part held at t
                      V → s²V,   κ → s³κ + 3 s²c V²

and no order of an expansion in P has to be enough. In the mean what is not common to all places is a gamma variable, as mean
squares of few Gaussian numbers are; what it is beyond its two moments is in doubt by what a lognormal one makes of it.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.special import roots_genlaguerre

from varscale.theory.domain.tables import NEGLIGIBLE

_LOG_STEP = 0.25
LOG_Q = _LOG_STEP * np.arange(-12, 13)  # of Q, where F is known; beyond, it is a power of Q
_NEAR = np.flatnonzero(np.abs(LOG_Q) <= 1.01)
_ROUGH = 0.1  # third differences of ln F there, in steps of a quarter: a step has .03, exp .06, noise more
_STEEP = 1.0  # a step of ln F from one scale to the next, the fourth power of Q
_NODES, _SHARES = np.polynomial.hermite_e.hermegauss(7)
_SHARES = _SHARES / _SHARES.sum()
WIDEST = 4.0  # variance of a logarithm beyond which no law of it is known
_FORGOTTEN = 1e-5  # a ratio below which fluctuations are not propagated: a norm's, but for its epsilon
_NARROW = 1 / 150  # relative variance below which a gamma law and a lognormal one are the same
Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Scale:
    """A random scale."""

    growth: float  # its mean over the one of infinitely many units; positive
    place: float  # its relative variance at one place
    common: float  # variance of what is common to all places, of the logarithm
    skew: float  # third cumulant of that


@dataclasses.dataclass(frozen=True)
class Response:
    """What a function makes of a scale."""

    growth: float  # of its mean square, over that of infinitely many units
    place: float  # ratio of logarithms at one place, by their variances
    slope: float  # ratio of the common part of logarithms
    skew: float  # third cumulant of the common part
    doubt: float = 0.0  # of the growth, relative


def response(scale: Scale, slope: float, curvature: float, curve: Callable[[], np.ndarray]) -> Response:
    """What a function F makes of a scale: of slope d ln F/d ln Q at that of infinitely many units, and curvature Q² F″/F.

    `curve` gives ln F at LOG_Q; it is asked only where a power of Q is not enough.
    """
    bend = curvature - slope * (slope - 1)
    common = min(scale.common, WIDEST)
    if abs(bend) * (scale.place + abs(scale.growth - 1)) < NEGLIGIBLE:
        growth = scale.growth**slope * math.exp(curvature * min(math.log1p(scale.place), WIDEST) / 2)
        return Response(growth, slope, slope, slope**3 * scale.skew + 3 * slope**2 * bend * common**2)
    line = curve()
    steps = line[_NEAR]
    if np.max(np.abs(np.diff(steps, 3))) < _ROUGH and np.max(np.abs(np.diff(steps))) < _STEEP:
        return _of_a_curve(scale, common, line)
    # A function with poles, or decided by rare values, is not resolved: its curvature is noise.
    slope, level = np.polyfit(LOG_Q[_NEAR], steps, 1)
    apart = steps - slope * LOG_Q[_NEAR] - level
    slope = float(np.clip(slope, -_STEEP / _LOG_STEP, _STEEP / _LOG_STEP))
    found = response(scale, slope, slope * (slope - 1), curve)
    return dataclasses.replace(found, growth=scale.growth**slope, doubt=float(np.sqrt(np.mean(apart**2))))


def _of_a_curve(scale: Scale, common: float, line: np.ndarray) -> Response:
    spline = CubicSpline(LOG_Q, line)

    def log_f(t: np.ndarray) -> list[np.ndarray]:
        """ln F and its first two derivatives in ln Q: a spline through what is known of it, straight beyond."""
        inside = np.clip(t, LOG_Q[0], LOG_Q[-1])
        level, slope, bend = (spline(inside, order) for order in range(3))
        return [level + slope * (t - inside), slope, np.where(t == inside, bend, 0.0)]

    whole, centre = max(min(math.log1p(scale.place), WIDEST), common), math.log(scale.growth)
    values = np.exp(log_f(centre - whole / 2 + math.sqrt(whole) * _NODES)[0])
    growth = lognormal = float(_SHARES @ values)
    # The common part, and what is different at every place about it.
    t, own = centre - common / 2 + math.sqrt(common) * _NODES[:, None], whole - common
    if (place := math.expm1(own)) >= _NARROW:
        nodes, weights = roots_genlaguerre(len(_NODES), 1 / place - 1)
        growth = float(_SHARES @ np.exp(log_f(t + np.log(nodes * place))[0]) @ weights / weights.sum())
    level, slope, bend = log_f(t - own / 2 + math.sqrt(own) * _NODES[None, :])
    weights = _SHARES * np.exp(level - level.max())
    weights = weights / weights.sum(axis=1, keepdims=True)
    first = np.sum(weights * slope, axis=1)
    second = np.sum(weights * (bend + slope**2), axis=1) - first**2
    s, c = float(_SHARES @ first), float(_SHARES @ second)
    place = math.sqrt(max(math.log(float(_SHARES @ values**2) / lognormal**2), 0.0) / max(whole, 1e-12))
    skew = s**3 * scale.skew + 3 * s**2 * c * common**2
    return Response(growth, math.copysign(place, s), s, skew, abs(growth - lognormal) / growth)


def weighted(terms: Sequence[tuple[float, dict[Key, float]]]) -> dict[Key, float]:
    """A weighted sum of coefficients, source by source."""
    (weight, sources), *others = [(w, s) for w, s in terms if s and abs(w) > _FORGOTTEN] or [(1.0, {})]
    out = sources.copy() if weight == 1 else {key: weight * c for key, c in sources.items()}
    for weight, sources in others:
        for key, c in sources.items():
            out[key] = out.get(key, 0.0) + weight * c
    return out


def shared(a: dict[Key, float], b: dict[Key, float]) -> float:
    """Covariance of two logarithms."""
    return sum(c * b[key] for key, c in a.items() if key in b)
