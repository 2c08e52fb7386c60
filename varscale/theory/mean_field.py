"""Mean-field theory of wide fully connected networks: fixed points, phases, depth scales, and where the edge of chaos lies.

In the limit of infinite width (Poole et al. 2016; Schoenholz et al. 2017; on the edge itself Hayou et al. 2019).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq

from varscale import gaussian

Activation = Callable[[jax.Array], jax.Array]
_FOLLOWED = 16  # steps of a map that are taken; then the second moment's fixed point is bracketed
_OVERFLOW, _SMALLEST = 1e12, 1e-12  # second moments beyond which a signal counts as exploded or vanished
_ZERO = 1e-24  # in place of a second moment of 0, where a slope is asked for
_NOISE = 1e-9  # relative accuracy of an expectation
_TERMS = 200  # of the Hermite series of the correlation map
_CRITICAL = 1e-3  # |χ − 1| below which the phase is called critical
_LOG_Q = (-16, 12)  # natural logarithms of the second moments among which the edge of chaos is looked for
_EDGE_NOISE = 1e-7  # relative accuracy of a difference of expectations there


@dataclasses.dataclass(frozen=True)
class MeanField:
    """The infinite-depth behaviour of x → W φ(x) + b with Var[w] = weight_variance/width and Var[b] = bias_variance.

    Attributes:
        q: fixed point of the second moment, q = σw² E[φ(√q z)²] + σb², to which 1 converges.
        chi: σw² E[φ'(√q z)²]: factor by which a small difference, and a gradient, grows in mean square per layer. Infinite
            where φ jumps: two inputs that straddle a jump are no longer close, however close they were.
        c: stable fixed point of the correlation of two inputs.
        slope: d ln q'/d ln q of the map at q > 0 (dq'/dq at q = 0): the factor by which a small relative deviation from q grows
            per layer. Above 1 the fixed point repels: a finite net leaves it, as slope^depth.
        depth_q: layers over which q converges by a factor e, −1/ln|slope|; infinite at slope 1.
        depth_c: likewise for the correlation.
        phase: "ordered" (χ < 1), "critical", or "chaotic" (χ > 1).
    """

    q: float
    chi: float
    c: float
    slope: float
    depth_q: float
    depth_c: float
    phase: Literal["ordered", "critical", "chaotic"]


def _depth(slope: float) -> float:
    """Layers over which a deviation shrinks, or grows, by a factor e."""
    slope = abs(slope)
    return 0.0 if slope < 1e-12 else math.inf if abs(slope - 1) < _NOISE else abs(1 / math.log(slope))


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One layer of an infinitely wide net, as maps of second moments and of correlations."""

    activation: Activation
    weight_variance: float
    bias_variance: float

    def second_moment(self, q: float) -> float:
        return self.weight_variance * gaussian.second_moment(self.activation, 0.0, q) + self.bias_variance

    def growth(self, q: float) -> float:
        """By how much a second moment grows, relatively; 0 where that cannot be told from none."""
        growth = self.second_moment(q) / q - 1
        return growth if abs(growth) > _NOISE else 0.0

    def slope(self, q: float) -> float:
        """dq'/dq = σw²/(2q) E[φ(√q z)² (z² − 1)], which asks for no derivative of φ."""
        nodes = gaussian.quadrature(self.activation, 0.0, q)
        return self.weight_variance / (2 * q) * float(nodes.weights @ (nodes.values**2 * (nodes.z**2 - 1)))

    def correlation(self, c: float, q: float) -> float:
        square = gaussian.second_moment(self.activation, 0.0, q)
        pair = _pair(self.activation, self._squares(q), square, c, q)
        return (self.weight_variance * pair + self.bias_variance) / q

    def correlation_slope(self, c: float, q: float) -> float:
        """dc'/dc = σw² E[φ'(u) φ'(v)] (Price's theorem)."""
        series = self._squares(q)[1:] * np.arange(1, _TERMS) / q
        slope, square = gaussian.derivative(self.activation), _slope_square(self.activation, q)
        return self.weight_variance * _pair(slope, series, square, c, q)

    def _squares(self, q: float) -> Float[np.ndarray, " terms"]:
        """Squared Hermite coefficients: Σ a_k² c^k = E[φ(u) φ(v)]."""
        return gaussian.hermite_coefficients(self.activation, _TERMS - 1, 0.0, q) ** 2

    def chi(self, q: float) -> float:
        return self.weight_variance and self.weight_variance * _slope_square(self.activation, q)


def _pair(f: Activation, series: np.ndarray, square: float, c: float, q: float) -> float:
    """E[f(u) f(v)] as Σ series_k c^k, which is E[f²] at c = 1; integrated where the series has not converged."""
    if square < math.inf and (square - series.sum()) * c ** len(series) >= _NOISE * square:
        return gaussian.pair(f, f, c, 0.0, q)
    return float(series @ c ** np.arange(len(series)))


def _slope_square(activation: Activation, q: float) -> float:
    """E[φ'(√q z)²], infinite where φ jumps."""
    jumps = gaussian.jumps(activation, 0.0, q)
    return math.inf if jumps else gaussian.derivative_second_moment(activation, 0.0, q)


def _fixed_point(layer: _Layer) -> float:
    """The second moment to which 1 converges: the map itself for some steps, then the first fixed point where it is heading."""
    variances = f"weight_variance={layer.weight_variance!r}, bias_variance={layer.bias_variance!r}"
    q, growth, steps = 1.0, layer.growth(1.0), _FOLLOWED
    while growth and q <= _OVERFLOW and steps:
        q, steps = q * (1 + growth), steps - 1
        if q == 0:
            return 0.0
        if q < _OVERFLOW:
            growth = _unless_it_overflows(layer.growth, q, math.inf)
    factor = 2.0 if growth > 0 else 0.5
    while growth and _SMALLEST < q < _OVERFLOW:
        after = _unless_it_overflows(layer.growth, factor * q, math.inf)
        if after * growth < 0:
            exact = np.float64(1e-13)
            q: Any = brentq(lambda x: layer.second_moment(x) / x - 1, q, factor * q, xtol=1e-300, rtol=exact)
            growth = 0.0
        else:
            q, growth = factor * q, after or growth
    if growth > 0:
        raise ValueError(f"the second moment diverges: no fixed point that 1 converges to at {variances}")
    if growth < 0:
        return 0.0
    if layer.slope(q) < -1:
        raise ValueError(
            f"the second moment does not settle: it swings around its fixed point {q:g} at {variances}"
        )
    return float(q)


def _checked(**variances: float) -> None:
    for name, value in variances.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and not negative, not {value!r}")


def mean_field(activation: Activation, weight_variance: float, bias_variance: float = 0.0) -> MeanField:
    """Fixed points, phase and depth scales of a wide network (Poole et al. 2016; Schoenholz et al. 2017).

    Args:
        activation: any elementwise callable on arrays.
        weight_variance: σw², the variance of a weight times the fan-in; not negative.
        bias_variance: σb², not negative.

    Returns:
        MeanField. Where there are several fixed points, at the one that a second moment of 1 converges to; where every
        second moment is one (ReLU at 2), at 1.

    Raises:
        ValueError: a variance is negative or not finite, or the second moment diverges.

    >>> import jax, varscale as vs
    >>> found = mean_field(jax.nn.gelu, vs.gain(jax.nn.gelu) ** 2)
    >>> round(found.q, 6), round(found.slope, 3)  # E[x²] = 1 is a fixed point, and it repels
    (1.0, 1.144)
    """
    _checked(weight_variance=weight_variance, bias_variance=bias_variance)
    layer = _Layer(activation, float(weight_variance), float(bias_variance))
    q = _fixed_point(layer)
    chi, slope = layer.chi(q or _ZERO), layer.slope(q or _ZERO)
    c, slope_c = _fixed_correlation(layer, q or _ZERO, chi)
    phase = "critical" if abs(chi - 1) < _CRITICAL else "ordered" if chi < 1 else "chaotic"
    return MeanField(q, chi, c, slope, _depth(slope), _depth(slope_c), phase)


def _fixed_correlation(layer: _Layer, q: float, chi: float) -> tuple[float, float]:
    """The stable fixed point of the correlation map and the map's slope there."""
    # The map is convex on [0, 1], not below the diagonal at 0, and 1 at 1, where its slope is χ.
    if chi <= 1 + _NOISE:
        return 1.0, chi
    # So Newton's steps from 0 rise to where it crosses the diagonal, and never pass.
    c = 0.0
    for _ in range(_FOLLOWED):
        slope = layer.correlation_slope(c, q)
        gap = layer.correlation(c, q) - c
        if gap <= _NOISE * (1 - c) or slope >= 1:
            break
        c = min(c + gap / (1 - slope), 1.0)
    return c, layer.correlation_slope(c, q)


@dataclasses.dataclass(frozen=True)
class Critical:
    """A point on the edge of chaos.

    Attributes:
        weight_variance: σw² at which χ = 1.
        q: the fixed point of the second moment there.
        stable: whether layers drive second moments near q towards it; where they do not (SiLU without biases), a signal that
            starts elsewhere ends elsewhere, off the edge.
    """

    weight_variance: float
    q: float
    stable: bool = True


def critical(activation: Activation, bias_variance: float = 0.0) -> Critical:
    """The weight variance at which signals neither converge nor diverge, χ = 1, for a given bias variance.

    Args:
        activation: any elementwise callable on arrays.
        bias_variance: σb², not negative.

    Returns:
        Critical. Of several such points a stable one, of those the one of the smallest q; of a line of them (ReLU), that at
        q = 1.

    Raises:
        ValueError: there is no such point: wherever χ = 1, layers change the second moment.
    """
    _checked(bias_variance=bias_variance)
    gaussian.second_moment(activation)  # says what is wrong with a callable that is no activation

    def needed(q: float) -> float:
        """The bias variance that makes q a fixed point at σw² = 1/E[φ'²]; with a slope of 0 or ∞ there is none."""
        square = _slope_square(activation, q)
        return q - gaussian.second_moment(activation, 0.0, q) / square if 0 < square < math.inf else math.nan

    def excess(log_q: float) -> float:
        return needed(math.exp(log_q)) - bias_variance

    if bias_variance == 0 and all(abs(needed(q)) < _EDGE_NOISE * q for q in (1.0, 1e-6, 1e6)):
        # Homogeneous: every q is a fixed point at the edge, as for ReLU.
        return Critical(1 / _slope_square(activation, 1.0), 1.0)

    def edge(q: float) -> Critical:
        weight_variance = 1 / _slope_square(activation, q or _ZERO)
        layer = _Layer(activation, weight_variance, bias_variance)
        stable = layer.slope(q) <= 1 + _EDGE_NOISE if q else layer.growth(_EDGE_NOISE) <= 0
        return Critical(weight_variance, q, stable)

    vanishing = _slope_square(activation, _ZERO) if bias_variance == 0 else 0.0
    steady = gaussian.second_moment(activation, 0.0, _ZERO) < 2 * vanishing * _ZERO
    edges = [edge(0.0)] if steady and _EDGE_NOISE < vanishing < math.inf else []
    found = [(x, _unless_it_overflows(excess, x, math.nan)) for x in range(*_LOG_Q)]
    # NaN compares as False; what is within the noise of 0 is no change of sign.
    told = [(x, y) for x, y in found if abs(y) > _EDGE_NOISE * (math.exp(x) + bias_variance)]
    for (low, one), (high, other) in itertools.pairwise(told):
        if one * other < 0 and high == low + 1:
            edges.append(edge(math.exp(float(brentq(excess, low, high, xtol=1e-12)))))  # pyright: ignore
    if not edges:
        raise ValueError(
            f"no critical point: with bias_variance={bias_variance!r} activation "
            f"{gaussian.name_of(activation)} has no fixed point q at which χ = 1"
        )
    return min(edges, key=lambda point: (not point.stable, point.q))


def _unless_it_overflows(f: Callable[[float], float], x: float, otherwise: float) -> float:
    """f(x), or another number where the activation overflows."""
    try:
        return f(x)
    except ValueError:
        return otherwise
