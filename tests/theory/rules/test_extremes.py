"""Extremes of numbers some of which a mask hides: moments by type do not say of how many a row's is."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import varscale as vs

X = jax.ShapeDtypeStruct((4, 12, 16), jnp.float32)


class Stabilized(nn.Module):
    """Decays of an mLSTM (arXiv 2405.04517, eq. 22): powers of masked numbers, less the largest of their row."""

    hidden: float
    added: bool = False

    @nn.compact
    def __call__(self, x):
        gates = self.param("gates", nn.initializers.normal(1.0), (1, 12))
        past = jnp.tril(jnp.ones((12, 12), bool))
        logs = gates + jnp.where(past, 0.0, self.hidden) if self.added else jnp.where(past, gates, self.hidden)
        largest = logs.max(-1, keepdims=True)
        shares = jnp.exp(logs - largest) / jnp.maximum(jnp.exp(logs - largest).sum(-1, keepdims=True), jnp.exp(-largest))
        return shares @ nn.Dense(16)(x)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(Stabilized(-jnp.inf), id="chosen"),
        pytest.param(Stabilized(-1e9), id="chosen, finite"),
        pytest.param(Stabilized(-1e30, added=True), id="added"),
    ],
)
def test_extremes_of_masked_numbers_are_drawn(model):
    report = vs.predict(model, X, draws=64)
    assert report.notes  # drawn
    assert all(row.holds and row.gradient_holds and row.error_bound < 0.3 for row in report.rows)


def test_the_largest_of_masked_logits_is_no_reason_to_draw_attention():
    """Its equations have rows of their own, without numbers; what attention puts out has the same as ever."""
    x = jax.ShapeDtypeStruct((4, 12, 12), jnp.float32)

    class Causal(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.MultiHeadDotProductAttention(2)(x, mask=nn.make_causal_mask(jnp.ones(x.shape[:2])))

    report, equations = vs.predict(Causal(), x), vs.predict(Causal(), x, detail=("reduce_max", "exp"))
    found = {row.path.split("/")[-1]: row for row in equations.rows}
    assert not equations.notes
    assert found["reduce_max"].second_moment == found["exp"].second_moment == math.inf
    assert equations.output.second_moment == report.output.second_moment
    assert report.output.error_bound < 0.15
