"""Gradients of rows that are zero at initialization: queries of a decoder, branches that start at nothing."""

import drawn
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import varscale as vs

BATCH, QUERIES, PLACES, WIDTH = 2, 12, 16, 32


@pytest.fixture(autouse=True)
def _promotion():
    """A query is added to every sample."""
    with jax.numpy_rank_promotion("allow"):
        yield


class Decoder(nn.Module):
    """The first layer of a detection transformer: its targets are zeros, its queries learned."""

    @nn.compact
    def __call__(self, memory):
        queries = self.param("queries", nn.initializers.normal(1.0), (QUERIES, WIDTH))
        x = jnp.zeros((BATCH, QUERIES, WIDTH))
        x = nn.LayerNorm(name="norm")(x + nn.Dense(WIDTH, name="value")(x))
        x = x + nn.MultiHeadDotProductAttention(4)(x + queries, memory, memory)
        return nn.Dense(WIDTH)(x)


class Branches(nn.Module):
    """Residual branches whose last layers are zero."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = x + nn.Dense(WIDTH, kernel_init=nn.initializers.zeros, name=f"branch{i}")(nn.relu(nn.Dense(WIDTH)(x)))
        return nn.Dense(8)(nn.relu(nn.Dense(WIDTH)(x)))


@pytest.mark.parametrize(
    ("model", "shape", "rows"),
    [
        # A norm of zeros divides by the root of its epsilon, 1e-3.
        (Decoder(), (BATCH, PLACES, WIDTH), {"value": (BATCH, QUERIES, WIDTH), "norm": (BATCH, QUERIES, WIDTH)}),
        (Branches(), (16, WIDTH), {"branch0": (16, WIDTH), "branch1": (16, WIDTH)}),
    ],
)
def test_gradient_at_a_row_of_zeros(model, shape, rows):
    report = vs.predict(model, jax.ShapeDtypeStruct(shape, jnp.float32))
    measured, error = drawn.gradients(model, shape, rows, 48)
    for path, mean, deviation in zip(rows, measured, error, strict=True):
        row = report[path]
        assert row.second_moment == 0
        assert row.gradient_error_bound < 0.15
        assert drawn.agrees(row.gradient, row.gradient_error_bound, mean, deviation), (path, row.gradient, mean, deviation)
