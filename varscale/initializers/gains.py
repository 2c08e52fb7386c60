"""Gains: by how much an activation shrinks what the law keeps, and the factor on the standard deviation that restores it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from varscale import gaussian

Criterion = Literal["second_moment", "variance", "derivative", "slope", "stable"]
CRITERIA: tuple[str, ...] = get_args(Criterion)
_STEEPEST = 1 + 1e-4  # relu's slope is exactly 1; the margin is for callables that compute in float32


def _slope(activation: gaussian.Elementwise) -> float:
    """φ'(0)²: the expectation under a Gaussian of no variance."""
    return gaussian.second_moment(gaussian.derivative(activation), variance=0.0)


def _variance(activation: gaussian.Elementwise) -> float:
    return gaussian.second_moment(activation) - gaussian.mean(activation) ** 2


def _stable(activation: gaussian.Elementwise) -> float:
    """E[φ(z)²], if deviations of E[x²] from 1 do not grow with depth.

    Raises:
        ValueError: they grow.
    """
    slope = gaussian.second_moment_slope(activation)
    if slope > _STEEPEST:
        raise ValueError(
            f"activation {gaussian.name_of(activation)} has no gain by criterion 'stable': the slope of ln E[φ(√q z)²] in ln q "
            f"is {slope:.4g} at q = 1, so a deviation from E[x²] = 1 grows as {slope:.4g}^depth, {slope**10:.3g} times in 10 "
            f"layers and {slope**50:.3g} times in 50. Normalize (LayerNorm, RMSNorm), use residual branches, or rescale layer "
            "by layer on data (LSUV); for up to about ten layers criterion 'second_moment' serves"
        )
    return gaussian.second_moment(activation)


_EXPECTATION: dict[str, Callable[[gaussian.Elementwise], float]] = {
    "second_moment": gaussian.second_moment,
    "variance": _variance,
    "derivative": gaussian.derivative_second_moment,
    "slope": _slope,
    "stable": _stable,
}


def gain(activation: gaussian.Elementwise, criterion: Criterion = "second_moment") -> float:
    """1/√E, where E is what the activation makes of a standard normal input.

    | criterion | E | what a layer with this gain keeps |
    |---|---|---|
    | "second_moment" | E[φ(z)²] | E[y²] forward (He et al. 2015, section 2.2, for any activation) |
    | "variance" | E[φ(z)²] − E[φ(z)]² | Var forward, for centred streams (Brock, De & Smith 2021, unnormalized ResNets) |
    | "derivative" | E[φ'(z)²] | gradients backward (Schoenholz et al. 2017, section 3: χ = 1) |
    | "slope" | φ'(0)² | small signals (Glorot & Bengio 2010, section 4.2.1) |
    | "stable" | E[φ(z)²] | E[y²] forward at any depth; an error where deviations from it grow with depth |

    gelu, silu and mish have a gain but no stable one: E[φ(√q z)²]/q rises with q, so that a signal slightly too large grows
    further at every layer, and one slightly too small shrinks. tanh, sin, selu, elu and (leaky) relu are stable.

    Args:
        activation: any elementwise callable; kinks are found.
        criterion: what is to be kept.

    Returns:
        The gain, so that Var[w] = gain²/n.

    Raises:
        TypeError: activation is not callable.
        ValueError: unknown criterion; activation is not elementwise (softmax, a normalization, cumsum); the expectation is 0 or
            not finite, so that no gain restores it; or criterion "stable" and deviations of E[x²] grow with depth.

    >>> import jax
    >>> round(gain(jax.nn.relu) ** 2, 9), round(gain(jax.nn.sigmoid, "slope"), 9)
    (2.0, 4.0)
    """
    if isinstance(activation, str):
        raise TypeError(f"activation must be a callable such as jax.nn.relu, not {activation!r}; pytorch_gain takes names")
    if criterion not in _EXPECTATION:
        raise ValueError(f"criterion must be one of {', '.join(map(repr, CRITERIA))}, not {criterion!r}")
    expectation = _EXPECTATION[criterion](activation)
    # Below this the variance of a constant is rounding.
    if not expectation > 1e-15:
        raise ValueError(
            f"activation {gaussian.name_of(activation)} has no gain by criterion {criterion!r}: "
            f"its expectation is {expectation:.3g}"
        )
    return 1 / math.sqrt(expectation)


def pytorch_gain(name: str, negative_slope: float = 0.01) -> float:
    """PyTorch's table of gains (`torch.nn.init.calculate_gain`), as the convention it is.

    Its entries are not the expectations that `gain` computes: with tanh at 5/3 a network is chaotic (χ = 1.21), and
    sigmoid's 1 keeps nothing.

    Args:
        name: "linear", "conv1d" to "conv3d", "conv_transpose1d" to "conv_transpose3d", "sigmoid", "tanh", "relu",
            "leaky_relu" or "selu".
        negative_slope: of "leaky_relu".

    Returns:
        The gain.

    Raises:
        ValueError: unknown name, or negative_slope not finite.

    >>> pytorch_gain("tanh")
    1.6666666666666667
    """
    linear = ("linear", *(f"conv{transposed}{rank}d" for transposed in ("", "_transpose") for rank in (1, 2, 3)))
    table = dict.fromkeys(linear, 1.0) | {"sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2), "selu": 0.75}
    if name == "leaky_relu":
        if not np.isfinite(negative_slope):
            raise ValueError(f"negative_slope must be finite, not {negative_slope!r}")
        return math.sqrt(2 / (1 + negative_slope**2))
    if name not in table:
        raise ValueError(f"name must be one of {', '.join(map(repr, (*table, 'leaky_relu')))}, not {name!r}")
    return table[name]
