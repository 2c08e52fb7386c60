"""Products whose factors go together in ways that are flagged, not computed."""

import jax
import jax.numpy as jnp
import pytest

import varscale as vs


def test_a_weight_used_forward_and_in_its_own_tangent_is_in_doubt():
    # E[Δ tanh(w·x)²] of a net of two coordinates: |w|⁴ and tanh''(w·x)² go together, and predicting them apart is off by 64 %.
    def net(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    def laplacian(p, x):
        return jax.vmap(lambda z: jnp.trace(jax.hessian(lambda q: net(p, q))(z)))(x)

    laws = {"a": vs.Moments(0.0, 1.0, (2, 64)), "b": vs.Moments(0.0, 1 / 64, (64,))}
    x = jax.random.normal(jax.random.key(5), (64, 2))
    row = vs.predict(laplacian, x, params=laws, backward=False, draws=60).output
    assert row.holds
    assert row.error_bound > abs(row.second_moment / row.measured - 1)


@pytest.mark.parametrize("packed", [True, False])
def test_halves_of_a_packed_kernel_are_not_in_doubt(packed):
    def gated(p, x):
        a, b = jnp.split(x @ p["w"], 2, axis=-1) if packed else (x @ p["u"], x @ p["v"])
        return a * jax.nn.sigmoid(b)

    laws = {
        "w": vs.Moments(0.0, 1 / 32, (32, 64)),
        "u": vs.Moments(0.0, 1 / 32, (32, 32)),
        "v": vs.Moments(0.0, 1 / 32, (32, 32)),
    }
    row = vs.predict(gated, jax.ShapeDtypeStruct((16, 32), jnp.float32), params=laws, backward=False).output
    assert row.error_bound < 0.04
