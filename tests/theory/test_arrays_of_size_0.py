"""Intermediate arrays without entries: padding makes them, and so do slices, lookups and splits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import varscale as vs


class Padded(nn.Module):
    mode: str

    @nn.compact
    def __call__(self, x):
        return nn.Conv(8, (3, 3), padding="VALID")(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode=self.mode))


@pytest.mark.parametrize("mode", ["edge", "reflect", "symmetric", "wrap"])
def test_padding_by_copies_of_the_border(mode):
    row = vs.predict(Padded(mode), jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)).output
    assert row.second_moment == pytest.approx(1.0, rel=1e-6)
    assert row.gradient == pytest.approx(1.0, rel=1e-6)
    assert row.error_bound < 0.15


def test_padding_by_the_mean():
    # Along one axis the outermost of 10 places, the mean of 8 numbers, are each read by 1 of the 8 windows of 3.
    row = vs.predict(Padded("mean"), jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)).output
    assert row.second_moment == pytest.approx(((22 + 2 / 8) / 24) ** 2, rel=row.error_bound)


class Emptied(nn.Module):
    how: str

    @nn.compact
    def __call__(self, x):
        nothing = x[:, :0]
        match self.how:
            case "joined":
                x = jnp.concatenate([nothing, x, nn.relu(2 * nothing)], axis=1)
            case "summed":
                x = x + nothing.sum(1, keepdims=True)
            case "contracted":
                x = x + jnp.einsum("bkj,bkj->bj", nothing, nothing)[:, None]
            case "replaced":
                x = x.at[:, :0].set(1.0)
            case "looked up":
                x = jnp.concatenate([x[:, jnp.zeros((0,), int)], x], axis=1)
            case "layer":
                x = jnp.concatenate([nn.Dense(4)(nothing), x], axis=1)
            case "split":
                x = jnp.split(x, [0], axis=1)[1]
        return nn.Dense(8)(x)


@pytest.mark.parametrize("how", ["joined", "summed", "contracted", "replaced", "looked up", "layer", "split"])
def test_array_of_size_0_changes_nothing(how):
    row = vs.predict(Emptied(how), jax.ShapeDtypeStruct((2, 8, 4), jnp.float32)).output
    assert row.second_moment == pytest.approx(1.0, rel=1e-6)
    assert row.error_bound < 0.15
