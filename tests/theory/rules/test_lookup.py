"""Ids and lengths of which only the shape is given: one-hot rows, masks that are all true, and numbers nobody can know."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs
from varscale.theory.graph.nodes import View
from varscale.theory.interpreter.interpreter import Interpreter
from varscale.theory.propagation.sampler import Drawing
from varscale.theory.rules.lookup import compared, unknown

IDS = jax.ShapeDtypeStruct((8, 32), jnp.int32)
LENGTHS = jax.ShapeDtypeStruct((8,), jnp.int32)


@pytest.mark.parametrize("axis", [-1, 1])
def test_one_of_n_is_one_in_n(axis):
    """One-hot rows have E[x²] = 1/n, and a unit weight of variance σ² makes σ² of each."""

    def model(params, ids):
        rows = jnp.moveaxis(jax.nn.one_hot(ids, 20, axis=axis), axis, -1)
        return rows, rows @ params, rows.mean((0, 1)), rows.sum(-1)

    params = lambda key: jax.random.normal(key, (20, 64))  # noqa: E731
    rows, made, mean, whole = (r.second_moment for r in vs.predict(model, IDS, params=params, backward=False).rows)
    assert rows == pytest.approx(1 / 20)
    assert made == pytest.approx(1.0)
    assert mean == pytest.approx((1 / 20 + 255 / 400) / 256)
    assert whole == pytest.approx(1.0)


def test_a_dense_layer_of_one_hot_rows_is_as_sure_as_an_embedding():
    class Looked(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Dense(64)(jnp.tanh(nn.Dense(64, use_bias=False)(jax.nn.one_hot(ids, 20))))

    class Embedded(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Dense(64)(jnp.tanh(nn.Embed(20, 64, embedding_init=nn.initializers.lecun_normal())(ids)))

    one, other = (vs.predict(model, IDS, backward=False).output for model in (Looked(), Embedded()))
    assert one.second_moment == pytest.approx(other.second_moment, rel=0.03)
    assert one.typical == pytest.approx(other.typical, rel=0.03)
    assert one.error_bound < 0.05


def test_one_hot_rows_are_drawn_as_rows():
    """A loop over time runs on draws of its inputs: one entry of a row is 1, whatever part of it is asked for."""
    interpreter = Interpreter()
    ids = unknown(interpreter, "ids", (8, 16, 1))
    rows = compared(interpreter, "eq", (8, 16, 12), ids, interpreter.known(np.arange(12).reshape(1, 1, 12)))
    assert rows is not None
    axes = rows.node.axes
    whole = [np.arange(axis.size) for axis in axes]
    drawn = Drawing(5, lambda axis: np.arange(axis.size)).values(View(rows.node, (0, 1, 2)), axes, whole)
    features = rows.dims[2][0].axis
    assert set(np.unique(drawn)) == {0.0, 1.0}
    np.testing.assert_array_equal(drawn.sum(axis=features), 1)
    # 8 · 16 · 5 rows: a frequency of 1/12 has a standard error of .011; six of them.
    np.testing.assert_allclose(drawn.mean(axis=tuple(k for k in range(4) if k != features)), 1 / 12, atol=0.066)


class Encoder(nn.Module):
    """Attention under a mask, and a mean over what it leaves."""

    @nn.compact
    def __call__(self, ids, mask=None, added=None):
        x = nn.Embed(60, 32)(ids)
        q, k, v = (nn.DenseGeneral((4, 8))(x) for _ in range(3))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(8)
        if mask is not None:
            logits = jnp.where(mask[:, None, None], logits, -1e9)
        if added is not None:
            logits = logits + added[:, None, None] * -1e9
        out = nn.DenseGeneral(32, axis=(-2, -1))(jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(logits), v))
        return out if mask is None else jnp.where(mask[..., None], out, 0.0)


POSITIONS = jnp.arange(32)[None]


@pytest.mark.parametrize(
    "masked",
    [
        pytest.param(lambda ids, n: {"mask": ids != 0}, id="no padding"),
        pytest.param(lambda ids, n: {"mask": ids > 0}, id="positive"),
        pytest.param(lambda ids, n: {"mask": (ids >= 0) & (ids < 60)}, id="valid"),
        pytest.param(lambda ids, n: {"added": (1 - (ids != 0).astype(jnp.float32))}, id="added"),
        pytest.param(lambda ids, n: {"mask": jnp.pad(ids, ((0, 0), (1, 0)))[:, 1:] != 0}, id="shifted"),
        pytest.param(lambda ids, n: {"mask": n[:, None] > POSITIONS}, id="length"),
        pytest.param(lambda ids, n: {"mask": ~(n[:, None] <= POSITIONS)}, id="not beyond the length"),
        pytest.param(lambda ids, n: {"mask": n[:, None] - 1 >= POSITIONS}, id="last position"),
    ],
)
def test_masks_made_from_ids_and_lengths_are_all_true(masked):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids, lengths):
            return Encoder()(ids, **masked(ids, lengths))

    plain = vs.predict(Encoder(), IDS).output
    found = vs.predict(Model(), vs.inputs(IDS, LENGTHS)).output
    assert found.second_moment == pytest.approx(plain.second_moment, rel=1e-6)
    assert found.error_bound == pytest.approx(plain.error_bound, rel=1e-6)


def test_a_mask_that_is_not_known_as_one_is_in_doubt():
    """Logits of variance 10¹⁸ are no logits, and no reason to fail."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids, lengths):
            return Encoder()(ids, mask=jnp.sin(lengths[:, None] - POSITIONS) < 0)

    assert vs.predict(Model(), vs.inputs(IDS, LENGTHS)).output.error_bound > 1


def test_ids_taken_for_numbers_are_in_doubt():
    """Nobody has said how large they are."""
    model = nn.Sequential([lambda ids: ids.astype(jnp.float32) / 255, nn.Dense(16), nn.relu, nn.Dense(4)])
    row = vs.predict(model, IDS, backward=False).output
    assert row.how == "assumed"
    assert row.error_bound > 1
