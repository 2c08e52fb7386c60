"""Weights and biases at the edge of chaos of the activations that a model has (Poole et al. 2016; Schoenholz et al. 2017)."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from varscale.initializers.distributions import DistributionName
from varscale.initializers.distributions import distribution as checked_distribution
from varscale.initializers.fixed import normal
from varscale.initializers.initializer import checked_number
from varscale.schemes.scheme import Choice, Scheme, Subject, spread
from varscale.theory.mean_field import Critical
from varscale.theory.mean_field import critical as edge
from varscale.usage.values import NAMED_FUNCTIONS

Activation = Callable[[Any], Any]
_FUNCTIONS: dict[str, Activation] = {
    **{name: getattr(jax.nn, name) for name in sorted(NAMED_FUNCTIONS)},
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "erf": jax.lax.erf,
    "relu squared": lambda x: jnp.square(jax.nn.relu(x)),
    "": lambda x: x,
    "norm": lambda x: x,
}


def critical(
    bias_variance: float = 0.0,
    *,
    activation: Activation | None = None,
    distribution: DistributionName = "truncated_normal",
) -> Scheme:
    """Variances at which χ = σw² E[φ'(√q* z)²] = 1: neither order nor chaos, so that two inputs keep their correlation longest.

    A kernel that reads φ gets variance σw²/fan_in, with σw² = `vs.critical(φ, bias_variance).weight_variance` of the activation
    found before it; one that reads no activation (the identity, a norm) σw² = 1. A kernel that reads the model's input brings
    a second moment of 1 to the fixed point q* of the activation behind it, so give inputs of second moment 1. Biases of these
    kernels are normal with variance σb². It is a theory of plain nets: residual branches and norms set scales of their own.

    Args:
        bias_variance: σb²; not negative. 0 leaves biases as declared.
        activation: φ of every kernel, in place of those that are found by name.
        distribution: of the weights: "truncated_normal", "normal", "uniform" or "rademacher".

    Raises:
        ValueError: bias_variance is negative, or distribution unknown; when called with a model: an activation has no critical
            point at this bias variance, or one is found that has no name.

    Source: Schoenholz et al. 2017, "Deep Information Propagation", section 3.

    >>> import jax, varscale as vs
    >>> from flax import linen as nn
    >>> net = nn.Sequential([nn.Dense(100), nn.tanh, nn.Dense(100), nn.tanh, nn.Dense(10)])
    >>> plan = vs.schemes.critical(0.05)(net, jax.ShapeDtypeStruct((8, 100), "float32"))
    >>> round(100 * plan["layers_2/kernel"].std ** 2, 3), round(plan["layers_2/bias"].std ** 2, 3)
    (1.761, 0.05)
    """
    bias_variance = checked_number("bias_variance", bias_variance, at_least=0.0)
    checked_distribution(distribution)
    known: dict[str, Critical] = {}

    def point(name: str, path: str) -> Critical:
        """The critical point of an activation."""
        if name not in known:
            function = activation if activation is not None and name not in ("", "norm") else _FUNCTIONS.get(name)
            if function is None:
                raise ValueError(f"{path!r} reads {name!r}, whose derivative is not known: give activation=")
            try:
                known[name] = edge(function, 0.0 if name in ("", "norm") else bias_variance)
            except ValueError as error:
                raise ValueError(f"{path!r} reads {name!r}: {error}") from error
        return known[name]

    def rule(subject: Subject) -> Choice:
        use, path = subject.uses.main, subject.uses.path
        if use is not None and use.kind == "shift" and not use.before and bias_variance and subject.role == "vector":
            return Choice(normal(math.sqrt(bias_variance)), f"bias: σb² = {bias_variance:g}")
        if use is None or not subject.is_matrix or subject.is_table:
            return subject.kept()
        if use.reads_input and not use.before:
            start = point(use.after, path).q - bias_variance
            variance = start if start > 0 else 1.0
            return Choice(spread(distribution, math.sqrt(variance / use.fan_in)), f"E[y²] = {variance + bias_variance:.4g}")
        reads = collections.Counter(each.before for each in subject.uses.uses if each.reduction_axes)
        before = reads.most_common(1)[0][0]  # of a kernel with several uses, what most of them read
        found = point(before, path)
        why = f"χ = 1 of {before or 'the identity'}: σw² = {found.weight_variance:.5g}, q* = {found.q:.4g}"
        why += "" if found.stable else ", which repels"
        return Choice(spread(distribution, math.sqrt(found.weight_variance / use.fan_in)), why)

    return Scheme(f"critical(bias_variance={bias_variance:g})", rule)
