"""The law of a layer's output energy, given its input: a quadratic form in the weights, whose eigenvalues decide its tails.

For a layer linear in its weights `w`, `y = J w`, the mean square over the outputs of fresh independent weights is `S = Σ
λᵢ χ²₁` with `λ` the eigenvalues of `J Jᵀ`, here normalized to `Σ λ = 1`. One example through a dense layer has `m` equal
eigenvalues: `S·m ~ χ²_m` for ANY input. A batch that shares the weights, or a convolution's positions, have unequal ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from varscale.testing.draws import map_keys
from varscale.testing.tails import log_chi_square, rate

_JACOBIAN_ENTRIES, _EIGENVALUES = 2**24, 2048


@dataclass(frozen=True, eq=False)
class QuadraticForm:
    """`S = Σ λᵢ zᵢ²` of independent standardized `z`: a `varscale.testing.tails.Law` of `√S`.

    Attributes:
        eigenvalues: positive, of sum 1.
        gaussian: whether the weights are normal. Of weights that are not, but whose moment-generating function is below
            the normal's (truncated normal, uniform, Rademacher), the upper tail is bounded by the Gaussian form's, and
            the lower by its variance.
    """

    eigenvalues: Float[np.ndarray, " n"]
    gaussian: bool
    name = "quadratic form"
    bound = math.inf

    @property
    def kurtosis(self) -> float:
        """`E[S²]`; an upper bound of it where the weights are not normal."""
        return 1 + 2 * float(self.eigenvalues @ self.eigenvalues)

    def log_mgf(self, theta: float) -> float:
        """`ln E[exp(θS)]` of normal weights."""
        arguments = 2 * theta * self.eigenvalues
        return -0.5 * float(np.log1p(-arguments).sum()) if arguments.max() < 1 else math.inf

    def log_tails(self, ratio: float, count: float) -> tuple[float, float]:
        """`ln P(mean ≤ r)` and `ln P(mean ≥ r)` of `count` independent copies: exact for equal eigenvalues, else bounds."""
        if self.gaussian and np.ptp(self.eigenvalues) < 1e-4 * self.eigenvalues[0]:
            return log_chi_square(ratio, count * len(self.eigenvalues))
        if ratio >= 1:
            return 0.0, -count * rate(self, ratio)
        if self.gaussian:
            return -count * rate(self, ratio), 0.0
        # Bennett: 1 − S is at most 1, and its variance at most the normal's.
        variance = self.kurtosis - 1
        deviation = (1 - ratio) / variance
        return -count * variance * ((1 + deviation) * math.log1p(deviation) - deviation), 0.0


def quadratic_form(
    init: Callable[[Key[Array, ""]], PyTree], apply: Callable[[PyTree], Array], key: Key[Array, ""], gaussian: bool
) -> QuadraticForm | None:
    """The output energy's law, or None where the output is not linear in one array of random weights, or the form is too
    large.

    Args:
        init: from a key to parameters; those that two keys give alike are constants.
        apply: from parameters to the output on the input in question.
        key: source of the two keys.
        gaussian: whether the weights are normal.
    """
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(jax.eval_shape(init, key))):
        return None
    draws, structure = jax.tree.flatten(map_keys(init, key, 2, entries=1))
    leaves, others = ([jnp.asarray(leaf[index]) for leaf in draws] for index in (0, 1))
    pairs = enumerate(zip(leaves, others, strict=True))
    random = [index for index, (one, other) in pairs if not np.array_equal(one, other)]
    if len(random) != 1:
        return None

    def output(weights: Array) -> Array:
        changed = [weights if index == random[0] else leaf for index, leaf in enumerate(leaves)]
        return apply(jax.tree.unflatten(structure, changed)).reshape(-1)

    weights = leaves[random[0]]
    outputs = jax.eval_shape(output, weights).size
    if outputs * weights.size > _JACOBIAN_ENTRIES or min(outputs, weights.size) > _EIGENVALUES:
        return None
    differentiate = jax.jacrev if outputs <= weights.size else jax.jacfwd
    value, jacobian = jax.jit(lambda weights: (output(weights), differentiate(output)(weights)))(weights)
    jacobian = np.asarray(jacobian, np.float64).reshape(outputs, -1)
    linear = jacobian @ np.asarray(weights, np.float64).reshape(-1)
    value = np.asarray(value, np.float64)
    rounding = 64 * max(float(jnp.finfo(weights.dtype).eps), 1e-7) * math.sqrt(weights.size)
    if np.max(np.abs(linear - value)) > rounding * max(np.max(np.abs(value)), 1e-300):
        return None
    gram = jacobian @ jacobian.T if outputs <= weights.size else jacobian.T @ jacobian
    eigenvalues = np.linalg.eigvalsh(gram)
    eigenvalues = eigenvalues[eigenvalues > 1e-9 * eigenvalues[-1]] if eigenvalues[-1] > 0 else np.ones(1)
    return QuadraticForm(eigenvalues / eigenvalues.sum(), gaussian)
