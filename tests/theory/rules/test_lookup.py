"""Ids and lengths of which only the shape is given: one-hot rows, masks that are all true, and numbers nobody can know.

Given ids with paddings, whose keys are masked (rows of unlike lengths, filled up behind or in front), each by a z-test at an
error rate of 1e-6 beside the stated error bound, which has to be below 15 % or flagged, on 100 nets for the given ids. That it
has power: with paddings taken for tokens like others, outputs of attention would be twice as large as they are, and a mean over
a row's ids by a third.
"""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import varscale as vs
from varscale.theory.domain.axes import Axis, labelled
from varscale.theory.graph.nodes import Graph, View
from varscale.theory.interpreter.interpreter import Interpreter
from varscale.theory.propagation.sampler import Drawing
from varscale.theory.rules.lookup import PADDED, classed_axes, compared, padded_shapes, padding_mask, repeat_rates, unknown

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


ROWS, WORDS, WIDTH, HEADS, NETS = 24, 300, 64, 2, 100
FEW, MANY = (24, 24, 9, 5) * 2, (24, 21, 19, 16, 13, 10, 8, 5)


def sentences(lengths, size=ROWS, in_front=False):
    ids = np.random.default_rng(0).integers(1, WORDS, (len(lengths), size)).astype(np.int32)
    places = np.arange(size)[:: -1 if in_front else 1]
    return np.where(places < np.array(lengths)[:, None], ids, 0).astype(np.int32)


def weights(key):
    keys = iter(jax.random.split(key, 32))
    blocks = [
        {name: jax.random.normal(next(keys), (WIDTH, WIDTH)) / WIDTH**0.5 for name in ("q", "k", "v", "o", "in", "out")}
        for _ in range(2)
    ]
    table, places = (jax.random.normal(next(keys), (n, WIDTH)) for n in (WORDS, ROWS))
    return {"blocks": blocks, "table": table, "places": places, "near": jax.random.normal(next(keys), (9, HEADS))}


def _norm(x):
    return x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def _attention(p, x, mask, bias, source=None):
    heads = lambda z, w: (z @ w).reshape(*z.shape[:-1], HEADS, -1)  # noqa: E731
    source = x if source is None else source
    q, k, v = heads(x, p["q"]), heads(source, p["k"]), heads(source, p["v"])
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (WIDTH / HEADS) ** 0.5 + bias
    shares = jax.nn.softmax(jnp.where(mask, logits, -1e9))
    return jnp.einsum("bhqk,bkhd->bqhd", shares, v).reshape(x.shape) @ p["o"]


def stream(p, x, mask, bias=0.0, *, post=False):
    """What two blocks add to the tokens: their attentions, as the last of the outputs."""
    outs = []
    for block in p["blocks"]:
        outs.append(_attention(block, x if post else _norm(x), mask, bias))
        x = _norm(x + outs[-1]) if post else x + outs[-1]
        y = jax.nn.gelu((x if post else _norm(x)) @ block["in"]) @ block["out"]
        x = _norm(x + y) if post else x + y
    return x, outs


def _keys(real):
    return real[:, None, None, :]


def _causal(real):
    return _keys(real) & jnp.tril(jnp.ones((ROWS, ROWS), bool))[None, None]


def _mean(x, real):
    return jnp.where(real[..., None], x, 0.0).sum(1) / real.sum(1, keepdims=True).astype(x.dtype)


def encoder(p, ids):
    return stream(p, p["table"][ids], _keys(ids != 0))[1]


def placed(p, ids):
    return stream(p, p["table"][ids] + p["places"][None], _keys(ids != 0), post=True)[1]


def near(p, ids):
    """A bias for each distance, up to some."""
    apart = jnp.clip(jnp.arange(ROWS)[:, None] - jnp.arange(ROWS)[None], -4, 4) + 4
    return stream(p, p["table"][ids], _keys(ids != 0), p["near"][apart].transpose(2, 0, 1)[None])[1]


def causal(p, ids):
    return stream(p, p["table"][ids], _causal(ids != 0))[1]


def masked_mean(p, ids):
    x, _ = stream(p, p["table"][ids] + p["places"][None], _keys(ids != 0), post=True)
    return [_mean(p["table"][ids], ids != 0), _mean(x, ids != 0)]


def masked(p, ids, mask):
    return stream(p, p["table"][ids], _keys(mask > 0))[1]


def counted(p, ids, mask):
    """Places counted from the first word on, as for rows that are filled up in front."""
    places = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return stream(p, p["table"][ids] + p["places"][places], _causal(mask > 0))[1]


def of_lengths(p, ids, lengths):
    real = jnp.arange(ROWS)[None] < lengths[:, None]
    return [*stream(p, p["table"][ids], _keys(real))[1], _mean(p["table"][ids], real)]


def translated(p, ids, others):
    x, _ = stream(p, p["table"][ids], _keys(ids != 0))
    y, _ = stream(p, p["table"][others], _causal(others != 0))
    return [_attention(p["blocks"][0], _norm(y), _keys(ids != 0), 0.0, _norm(x))]


def _and_mask(lengths, dtype, **how):
    ids = sentences(lengths, **how)
    return ids, (ids != 0).astype(dtype)


CASES = {
    "few lengths": (encoder, (sentences(FEW),)),
    "many lengths": (encoder, (sentences(MANY),)),
    "one length": (encoder, (sentences((12,) * 8),)),
    "one row": (encoder, (sentences((9,)),)),
    "no paddings": (encoder, (sentences((24,) * 8),)),
    "in front": (encoder, (sentences(MANY, in_front=True),)),
    "known places, post-norm": (placed, (sentences(MANY),)),
    "a bias by distance": (near, (sentences(FEW),)),
    "causal": (causal, (sentences(MANY),)),
    "causal, in front": (causal, (sentences(FEW, in_front=True),)),
    "a mean over words": (masked_mean, (sentences(MANY),)),
    "a mask of whole numbers": (masked, _and_mask(MANY, np.int32)),
    "a mask of ones and zeros": (masked, _and_mask(MANY, np.float32)),
    "counted places": (counted, _and_mask(MANY, np.int32)),
    "counted places, in front": (counted, _and_mask(MANY, np.int32, in_front=True)),
    "lengths given": (of_lengths, (sentences(MANY), np.array(MANY, np.int32))),
    "two kinds of rows": (translated, (sentences(MANY), sentences((7, 24, 20, 9, 18, 12, 6, 24)))),
}


@functools.cache
def _drawn(program):
    """Mean squares of the outputs of drawn nets, compiled once for a program and shapes."""

    def squares(keys, given):
        one = lambda key: jnp.stack([jnp.mean(jnp.square(x)) for x in program(weights(key), *given)])  # noqa: E731
        return jax.lax.map(one, keys, batch_size=20)

    return jax.jit(squares)


@pytest.mark.parametrize("name", CASES)
def test_masked_paddings_are_no_tokens(name):
    """Rows of more lengths than are told apart may be flagged."""
    program, given = CASES[name]
    drawn = np.asarray(_drawn(program)(jax.random.split(jax.random.key(1), NETS), given))
    for k, found in enumerate(drawn.T):
        one = functools.partial(_output, program, k)
        row = vs.predict(one, vs.inputs(*given), params=weights, backward=False).output
        error = found.std(ddof=1) / NETS**0.5 / found.mean()
        assert row.error_bound < 0.15 or row.how == "assumed"
        assert abs(row.second_moment / found.mean() - 1) < row.error_bound + stats.norm.isf(5e-7) * error


def _output(program, k, p, *given):
    return program(p, *given)[k]


def test_gradients_of_ids_with_paddings_are_finite():
    one_layer = lambda p, ids: _attention(p["blocks"][0], p["table"][ids], _keys(ids != 0), 0.0)  # noqa: E731
    report = vs.predict(one_layer, vs.inputs(sentences(MANY)), params=weights, detail="equations")
    gradients = np.array([row.gradient for row in report.rows if row.gradient is not None])
    assert len(gradients) > 10
    assert np.isfinite(gradients).all()


@pytest.mark.parametrize(
    ("ids", "filled"),
    [
        pytest.param(sentences(FEW), sentences(FEW) == 0, id="behind"),
        pytest.param(sentences(FEW, in_front=True), sentences(FEW, in_front=True) == 0, id="in front"),
        pytest.param(sentences((24,) * 4), None, id="full"),
        pytest.param((sentences(FEW) != 0).astype(np.int32), None, id="a mask"),
        pytest.param(np.random.default_rng(0).integers(0, 4, (64, 24)), None, id="four letters"),
        pytest.param(np.maximum(np.cumsum(sentences(MANY) != 0, axis=1) - 1, 0), None, id="places that stand still"),
        pytest.param(np.tile(np.arange(24), (4, 1)), None, id="places"),
    ],
)
def test_what_is_filled_up(ids, filled):
    found = padding_mask(ids)
    if filled is None:
        assert found is None
    else:
        assert found is not None
        assert np.array_equal(found, filled)


def test_ids_without_paddings_have_no_classes():
    ids = sentences((24,) * 4)
    graph = Graph()
    PADDED.put(graph, None, padded_shapes([ids]))
    assert classed_axes(graph, ids) == [Axis(4), Axis(24)]


def test_repeat_rates_enumerate_by_class():
    ids = np.array([[1, 2, 0, 0], [2, 2, 1, 0], [1, 1, 0, 0]])
    axes = labelled([0, 1, 0]), labelled([0, 0, 1, 2])
    rates = repeat_rates(ids, axes)
    sums, counts = np.zeros_like(rates), np.zeros_like(rates)
    for i, j in itertools.product(np.ndindex(ids.shape), repeat=2):
        types = []
        for axis, a, b in zip(axes, i, j, strict=True):
            p, q = axis.label_array[a], axis.label_array[b]
            types.append(p if a == b else axis.classes + p * axis.classes + q)
        sums[tuple(types)] += ids[i] == ids[j]
        counts[tuple(types)] += 1
    np.testing.assert_allclose(rates[counts > 0], (sums / np.maximum(counts, 1))[counts > 0])
