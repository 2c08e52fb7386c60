"""Norms and gates over an axis that what they scale does not have."""

import drawn
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs

BATCH, LENGTH, WIDTH, HEADS = 2, 16, 32, 4


class HeadNorm(nn.Module):
    """Attention whose heads are normalised one by one before they are put together, on a stream or alone."""

    residual: bool
    causal: bool

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            packed = nn.Dense(3 * WIDTH)(nn.RMSNorm()(x)).reshape(*x.shape[:2], 3, HEADS, -1)
            q, k, v = (packed[:, :, i] for i in range(3))
            logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (WIDTH // HEADS) ** 0.5
            seen = np.tril(np.ones((LENGTH, LENGTH), bool)) | (not self.causal)
            mixed = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(jnp.where(seen, logits, -jnp.inf)), v)
            y = nn.Dense(WIDTH)(nn.RMSNorm()(mixed).reshape(x.shape))
            x = x + y if self.residual else y
        return x


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_norm_of_each_head_of_attention(residual, causal):
    model, shape = HeadNorm(residual, causal), (BATCH, LENGTH, WIDTH)
    row = vs.predict(model, jax.ShapeDtypeStruct(shape, jnp.float32)).output
    assert row.error_bound < 0.15
    assert drawn.agrees(row.second_moment, row.error_bound, 3.0 if residual else 1.0, 0.0)  # each layer puts out 1
    assert row.gradient is not None


class Routed(nn.Module):
    """Each token through the two experts of six that it is sent to, weighed by their gates."""

    @nn.compact
    def __call__(self, x):
        gates, chosen = jax.lax.top_k(nn.softmax(nn.Dense(6)(x)), 2)
        gates = jnp.sum(jax.nn.one_hot(chosen, 6) * gates[..., None], axis=-2)
        experts = jnp.stack([nn.Dense(WIDTH)(nn.gelu(nn.Dense(WIDTH)(x))) for _ in range(6)], axis=-1)
        return jnp.sum(experts * gates[..., None, :], axis=-1)


def test_mixture_of_two_experts_is_predicted():
    shape = (2, 8, WIDTH)
    row = vs.predict(Routed(), jax.ShapeDtypeStruct(shape, jnp.float32)).output
    measured, error = drawn.output(Routed(), shape, 64)
    assert drawn.agrees(row.second_moment, row.error_bound, measured, error), (row, measured, error)
