"""Mean-field theory of wide fully connected networks: fixed points, phases, depth scales, and where the edge of chaos lies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax

from varscale import gaussian

Activation = Callable[[jax.Array], jax.Array]
_STEPS = 2000
_CRITICAL = 1e-3  # |χ − 1| below which the phase is called critical


@dataclasses.dataclass(frozen=True)
class MeanField:
    """The infinite-depth behaviour of x → W φ(x) + b with Var[w] = weight_variance/width and Var[b] = bias_variance.

    Attributes:
        q: fixed point of the second moment, q = σw² E[φ(√q z)²] + σb².
        chi: σw² E[φ'(√q z)²]: factor by which a small difference, and a gradient, grows in mean square per layer.
        c: stable fixed point of the correlation of two inputs.
        depth_q: layers over which q converges by a factor e, −1/ln|slope|; infinite at slope 1.
        depth_c: likewise for the correlation.
        phase: "ordered" (χ < 1), "critical", or "chaotic" (χ > 1).
    """

    q: float
    chi: float
    c: float
    depth_q: float
    depth_c: float
    phase: Literal["ordered", "critical", "chaotic"]


def _depth(slope: float) -> float:
    slope = abs(slope)
    if slope < 1e-12:
        return 0.0
    return math.inf if abs(slope - 1) < 1e-9 else abs(-1 / math.log(slope))


def _fixed_point(activation: Activation, weight_variance: float, bias_variance: float) -> float:
    def step(q: float) -> float:
        return weight_variance * gaussian.second_moment(activation, 0.0, q) + bias_variance

    q = 1.0
    for _ in range(_STEPS):
        new = step(q)
        if not math.isfinite(new) or new > 1e12:
            raise ValueError(
                f"the second moment diverges: no fixed point at weight_variance={weight_variance!r}, "
                f"bias_variance={bias_variance!r}"
            )
        if abs(new - q) <= 1e-13 * max(q, 1e-30):
            return new
        # Steffensen: quadratic convergence near the fixed point, where plain iteration is slow at criticality.
        after = step(new)
        bend = after - 2 * new + q
        jump = q - (new - q) ** 2 / bend if abs(bend) > 1e-300 else after
        q = jump if 0 < jump < 1e12 and abs(jump - after) < 10 * abs(after - new) + 1e-9 else after
        if q < 1e-14:
            return 0.0
    return q


def mean_field(activation: Activation, weight_variance: float, bias_variance: float = 0.0) -> MeanField:
    """Fixed points, phase and depth scales of a wide network (Poole et al. 2016; Schoenholz et al. 2017).

    Args:
        activation: any elementwise callable on arrays.
        weight_variance: σw², the variance of a weight times the fan-in; not negative.
        bias_variance: σb², not negative.

    Returns:
        MeanField. Where every second moment is a fixed point (ReLU at 2), the one at q = 1.

    Raises:
        ValueError: a variance is negative or not finite, or the second moment diverges.
    """
    for name, value in (("weight_variance", weight_variance), ("bias_variance", bias_variance)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and not negative, not {value!r}")
    q = _fixed_point(activation, weight_variance, bias_variance)
    at = max(q, 1e-12)
    chi = weight_variance * gaussian.derivative_second_moment(activation, 0.0, at)
    step = 1e-4 * at
    slope_q = (
        weight_variance
        * (gaussian.second_moment(activation, 0.0, at + step) - gaussian.second_moment(activation, 0.0, at - step))
        / (2 * step)
    )
    c, slope_c = _correlation(activation, weight_variance, bias_variance, at, chi)
    phase = "critical" if abs(chi - 1) < _CRITICAL else "ordered" if chi < 1 else "chaotic"
    return MeanField(q, chi, c, _depth(slope_q), _depth(slope_c), phase)


def _correlation(
    activation: Activation, weight_variance: float, bias_variance: float, q: float, chi: float
) -> tuple[float, float]:
    """The stable fixed point of the correlation map and the map's slope there."""
    a = gaussian.hermite_coefficients(activation, 60, 0.0, q)
    squares = [float(x) ** 2 for x in a]
    rest = max(gaussian.second_moment(activation, 0.0, q) - sum(squares), 0.0)
    top = len(squares)

    def step(c: float) -> float:
        series = sum(s * c**k for k, s in enumerate(squares)) + rest * abs(c) ** top
        return (weight_variance * series + bias_variance) / q

    if chi <= 1 + 1e-9:
        return 1.0, chi
    low, high = 0.0, 1.0 - 1e-6
    # The map is convex on [0, 1] and above the diagonal at 0: in the chaotic phase it crosses once below 1.
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if step(middle) > middle else (low, middle)
    slope = weight_variance / q * sum(k * s * low ** (k - 1) for k, s in enumerate(squares) if k)
    return low, slope


@dataclasses.dataclass(frozen=True)
class Critical:
    """A point on the edge of chaos.

    Attributes:
        weight_variance: σw² at which χ = 1.
        q: the fixed point of the second moment there.
    """

    weight_variance: float
    q: float


def critical(activation: Activation, bias_variance: float = 0.0) -> Critical:
    """The weight variance at which signals neither converge nor diverge, χ = 1, for a given bias variance.

    Args:
        activation: any elementwise callable on arrays.
        bias_variance: σb², not negative.

    Raises:
        ValueError: there is no such point: the activation is affine-bounded below χ = 1 or above it at every q.
    """
    if not (math.isfinite(bias_variance) and bias_variance >= 0):
        raise ValueError(f"bias_variance must be finite and not negative, not {bias_variance!r}")

    # At q the edge needs σw² = 1/E[φ'²]; what is left over is the bias variance that makes q a fixed point there.
    def bias_at(log_q: float) -> float:
        q = math.exp(log_q)
        return q - gaussian.second_moment(activation, 0.0, q) / gaussian.derivative_second_moment(activation, 0.0, q)

    grid = [-16.0 + k for k in range(24)]
    values = []
    for x in grid:
        try:
            values.append(bias_at(x) - bias_variance)
        except (ValueError, ZeroDivisionError, OverflowError):
            values.append(math.nan)
    scale = [1e-7 * math.exp(x) for x in grid]
    if bias_variance == 0 and all(abs(v) < s for v, s in zip(values, scale, strict=True) if math.isfinite(v)):
        # Homogeneous: every q is a fixed point at the edge, as for ReLU.
        return Critical(1 / gaussian.derivative_second_moment(activation, 0.0, 1.0), 1.0)
    for i in range(len(grid) - 1):
        a, b = values[i], values[i + 1]
        if math.isfinite(a) and math.isfinite(b) and abs(a) > scale[i] and a * b < 0:
            from scipy.optimize import brentq

            q = math.exp(float(brentq(lambda x: bias_at(x) - bias_variance, grid[i], grid[i + 1], xtol=1e-12)))  # pyright: ignore
            return Critical(1 / gaussian.derivative_second_moment(activation, 0.0, q), q)
    if bias_variance == 0 and abs(gaussian.mean(activation, 0.0, 1e-16)) < 1e-7:
        slope = gaussian.derivative_second_moment(activation, 0.0, 1e-12)
        if slope > 0:
            return Critical(1 / slope, 0.0)
    raise ValueError(
        f"no critical point: with bias_variance={bias_variance!r} this activation has no fixed point q at which χ = 1"
    )
