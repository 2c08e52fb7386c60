"""Layers that transform the weights of another: their norms are inner products of what was made with one weight.

The mean square over 200 drawn nets has a relative standard error of 1 to 2 %; it must lie within the error bound and four
of those (error rate below 1e-4 a comparison); that a spectral norm's vector was turned by the weight itself, which the rules
must see, is a factor of 1.5 or more.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs

DRAWS, WIDTH, FEATURES = 200, 32, 64


class Normed(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = nn.Dense(FEATURES)
        if self.kind == "weight":
            return nn.relu(nn.WeightNorm(dense)(x))
        return nn.relu(nn.SpectralNorm(dense)(x, update_stats=self.kind == "updated"))


def _measured(model: nn.Module) -> np.ndarray:
    def one(key: jax.Array) -> jax.Array:
        own, data = jax.random.split(key)
        x = jax.random.normal(data, (16, WIDTH))
        return jnp.mean(model.apply(model.init(own, x), x) ** 2)

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), DRAWS)), float)


@pytest.mark.parametrize("kind", ["weight", "spectral"])
def test_normalised_weights_have_the_measured_scale(kind: str) -> None:
    report = vs.predict(Normed(kind), jax.ShapeDtypeStruct((16, WIDTH), jnp.float32))
    squares = _measured(Normed(kind))
    error = squares.std() / squares.mean() / np.sqrt(DRAWS)
    off = report.output.second_moment / squares.mean() - 1
    assert abs(off) < report.output.error_bound + 4 * error
    # A spectral norm is drawn: regions are known to 10 %, and what reads them adds up to 5 %.
    assert report.output.error_bound < (0.15 if report.output.how == "sampled" else 0.1)
    assert report.output.how == "sampled" or kind == "weight"


def test_a_spectral_norm_that_goes_on_is_flagged() -> None:
    """Its vector is one of the weight's own making, and so is nearer its largest singular value than any known here."""
    report = vs.predict(Normed("updated"), jax.ShapeDtypeStruct((16, WIDTH), jnp.float32))
    assert report.output.error_bound > 0.15


@pytest.mark.parametrize("stops", [False, True])
def test_an_inner_product_with_its_own_direction_is_a_norm(stops: bool) -> None:
    """(Wᵀv)·u for v = Wa/|Wa| and u = Wᵀv/|Wᵀv|, of which E[|Wᵀv|²] = 1 + rows/columns for entries of variance 1/columns."""
    rows, columns = 48, 64

    def direction(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.sum(x * x) + 1e-12)

    def sigma(params: dict[str, jax.Array]) -> jax.Array:
        w, a = params["w"], params["a"]
        v = direction(a @ w.T)
        u = direction(v @ w)
        v, u = (jax.lax.stop_gradient(x) if stops else x for x in (v, u))
        return ((v @ w) @ u.T)[0, 0]

    def drawn(key: jax.Array) -> dict[str, jax.Array]:
        own, other = jax.random.split(key)
        return {"w": jax.random.normal(own, (rows, columns)) / 8, "a": jax.random.normal(other, (1, columns))}

    row = vs.predict(sigma, vs.inputs(), params=drawn, backward=False).output
    values = np.asarray(jax.vmap(lambda key: sigma(drawn(key)))(jax.random.split(jax.random.key(0), 400)), float)
    assert abs(row.second_moment / np.mean(values**2) - 1) < row.error_bound + 4 * np.std(values**2) / np.mean(values**2) / 20
    assert abs(row.mean / values.mean() - 1) < row.error_bound + 4 * values.std() / values.mean() / 20
    assert row.error_bound < 0.1
