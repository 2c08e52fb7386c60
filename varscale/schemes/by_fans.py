"""Schemes that read nothing but the fans of use: LeCun, Glorot, He, orthogonal, and a fixed standard deviation."""

from __future__ import annotations

import math

from varscale.initializers.distributions import DistributionName
from varscale.initializers.distributions import distribution as checked_distribution
from varscale.initializers.fans import MODES, Fans, Mode
from varscale.initializers.initializer import checked_number
from varscale.schemes.laws import orthogonal_over
from varscale.schemes.scheme import Choice, Scheme, Subject, spread


def fan_in(gain: float = 1.0, *, mode: Mode = "fan_in", distribution: DistributionName = "truncated_normal") -> Scheme:
    """Variance gain²/n of every kernel, n a fan of its USE: the law of `vs.variance_scaling` where shapes do not tell.

    Heads, packed kernels, experts, stacked layers, groups and borders of convolutions count as the program uses them. A table
    that is looked up copies its rows, so its n is 1; one that is also the readout has the readout's n. Position tables, norm
    scales, biases and other vectors keep their declared laws.

    Args:
        gain: E[y²]/E[x²] of each layer is gain² for mode "fan_in"; finite and positive.
        mode: "fan_in", "fan_out", "fan_avg" or "fan_geo_avg".
        distribution: "truncated_normal", "normal", "uniform" or "rademacher".

    Raises:
        ValueError: gain is not positive, or mode or distribution unknown.

    Source: LeCun et al. 1998, "Efficient BackProp", section 4.6.

    >>> import jax, varscale as vs
    >>> from flax import linen as nn
    >>> plan = fan_in()(nn.Dense(8), jax.ShapeDtypeStruct((1, 4), "float32"))
    >>> plan["kernel"].law, plan["bias"].law
    (truncated_normal(stddev=0.5), constant(0.0))
    """
    words = f"fan_in(gain={gain:.6g}, mode={mode!r}, distribution={distribution!r})"
    return _by_fans(words, checked_number("gain", gain, above=0.0), mode, distribution)


def he(negative_slope: float = 0.0, *, mode: Mode = "fan_in", distribution: DistributionName = "truncated_normal") -> Scheme:
    """Variance 2/((1 + a²) · fan_in of use), for layers that read a ReLU of slope a below zero.

    Args:
        negative_slope: a.
        mode: as for `fan_in`.
        distribution: as for `fan_in`.

    Raises:
        ValueError: as for `fan_in`.

    Source: He et al. 2015, "Delving Deep into Rectifiers", section 2.2.
    """
    gain = math.sqrt(2 / (1 + checked_number("negative_slope", negative_slope) ** 2))
    return _by_fans(
        f"he(negative_slope={negative_slope:g}, mode={mode!r}, distribution={distribution!r})", gain, mode, distribution
    )


def glorot(gain: float = 1.0, *, distribution: DistributionName = "uniform") -> Scheme:
    """Variance gain² · 2/(fan_in + fan_out), the fans those of use.

    Args:
        gain: as for `fan_in`.
        distribution: as for `fan_in`.

    Raises:
        ValueError: as for `fan_in`.

    Source: Glorot & Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks", section 4.2.1.
    """
    words = f"glorot(gain={gain:g}, distribution={distribution!r})"
    return _by_fans(words, checked_number("gain", gain, above=0.0), "fan_avg", distribution)


def lecun(*, distribution: DistributionName = "truncated_normal") -> Scheme:
    """Variance 1/fan_in of use: `fan_in()` under the name of its author.

    Args:
        distribution: as for `fan_in`.

    Raises:
        ValueError: as for `fan_in`.

    Source: LeCun et al. 1998, "Efficient BackProp", section 4.6.
    """
    return _by_fans(f"lecun(distribution={distribution!r})", 1.0, "fan_in", distribution)


def _by_fans(words: str, gain: float, mode: Mode, distribution: DistributionName) -> Scheme:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, not {mode!r}")
    checked_distribution(distribution)

    def rule(subject: Subject) -> Choice:
        if not subject.is_matrix:
            return subject.kept()
        if subject.is_table:
            n, why = subject.fan_in, "a lookup copies rows: n = 1" if subject.fan_in == 1 else "tied: n is the readout's"
            return Choice(spread(distribution, gain / math.sqrt(n)), why)
        law = subject.by_part(lambda _, fan_out: spread(distribution, gain / math.sqrt(Fans(subject.fan_in, fan_out).of(mode))))
        return Choice(law, f"gain²/{mode} of use")

    return Scheme(words, rule)


def orthogonal(gain: float = 1.0) -> Scheme:
    """Orthogonal maps between the axes that the program sums over and those it puts out, times gain.

    Stacked layers and experts each have a map of their own; a convolution's taps are inputs. Tables and depthwise kernels keep
    their declared laws, as do vectors.

    Args:
        gain: the norm of each row or column, whichever are fewer; finite and positive.

    Raises:
        ValueError: gain is not positive.

    Source: Saxe, McClelland & Ganguli 2014, "Exact solutions to the nonlinear dynamics of learning", section 3.
    """
    gain = checked_number("gain", gain, above=0.0)

    def rule(subject: Subject) -> Choice:
        use = subject.uses.main
        if not subject.is_matrix or subject.role in ("embedding", "depthwise") or use is None or not use.output_axes:
            return subject.kept()
        one = orthogonal_over(gain, use.reduction_axes, use.output_axes)
        return Choice(subject.by_part(lambda *_: one, equal=False), "gain times orthonormal rows or columns")

    return Scheme(f"orthogonal(gain={gain:g})", rule)


def normal(stddev: float = 0.02, *, distribution: DistributionName = "normal") -> Scheme:
    """One standard deviation for every kernel, table and position table, whatever its size: BERT's .02.

    Args:
        stddev: finite and positive.
        distribution: as for `fan_in`.

    Raises:
        ValueError: stddev is not positive, or an unknown distribution.

    Source: Devlin et al. 2019, "BERT", as its code initializes it.
    """
    stddev = checked_number("stddev", stddev, above=0.0)
    checked_distribution(distribution)

    def rule(subject: Subject) -> Choice:
        if subject.is_matrix or subject.role == "position":
            return Choice(spread(distribution, stddev), "one standard deviation for all")
        return subject.kept()

    return Scheme(f"normal(stddev={stddev:g}, distribution={distribution!r})", rule)
