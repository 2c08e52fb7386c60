"""Attention: softmax weights of any logits, overlaps of tokens, and what queries' gradients owe to them.

Error rates: keys are fixed, so that nothing flakes; where a measurement is compared with, it is within four standard errors
(6 in 100000) besides the bound that is stated.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import stats

import varscale as vs
from varscale.theory.integrals.softmax import weight_moments

NETS, TOKENS, WIDTH = 100, 24, 64


@pytest.mark.parametrize("keys", [2, 64])
@pytest.mark.parametrize("variance", [1e-12, 1.0, 30.0, 400.0, 4096.0])
def test_weights_sum_to_one_for_any_logits(keys, variance):
    found = weight_moments(np.array([float(keys)]), np.array([variance]))
    assert keys * found.first[0] == pytest.approx(1, abs=2e-4)
    together = keys * found.square[0] + keys * (keys - 1) * found.pair[0, 0]
    assert together == pytest.approx(1, abs=5e-3)


def test_wide_logits_leave_one_key():
    """E[Σ p²] of two keys with logits of standard deviation 15, against 400000 draws."""
    logits = 15 * np.random.default_rng(0).standard_normal((400_000, 2))
    p = 1 / (1 + np.exp(logits[:, ::-1] - logits))
    drawn = np.sum(p**2, axis=1)
    found = 2 * weight_moments(np.array([2.0]), np.array([225.0])).square[0]
    assert abs(found - drawn.mean()) < 4 * drawn.std() / np.sqrt(len(drawn))


def test_keys_of_different_classes_share_what_they_sum_to():
    found = weight_moments(np.array([1.0, 5.0]), np.array([4.0, 0.25]))
    counts = np.array([1.0, 5.0])
    assert counts @ found.first == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("directions", [np.inf, 30.0])
def test_weights_of_many_variances_are_those_of_each_alone(directions):
    """Of many, integrals are read off between a few variances that serve all; of one they are worked out at its own."""
    variances = 4 * np.exp(-0.043 * np.arange(60))
    counts = np.linspace(1, 1000, len(variances))
    together = weight_moments(counts[:, None], variances[:, None], directions)
    for i in range(0, len(variances), 13):
        alone = weight_moments(counts[i : i + 1], variances[i : i + 1], directions)
        for found, expected in zip(together, alone, strict=True):
            np.testing.assert_allclose(found[i], expected, rtol=1e-5)


class Block(nn.Module):
    """Attention that is a branch of a stream, and a layer after it."""

    causal: bool = False

    @nn.compact
    def __call__(self, x):
        for k in range(3):
            h = nn.LayerNorm()(x)
            mask = nn.make_causal_mask(h[..., 0]) if self.causal else None
            x = x + nn.MultiHeadDotProductAttention(4, name=f"attention_{k}")(h, h, mask=mask)
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))))
        return x


INPUT = jax.ShapeDtypeStruct((2, TOKENS, WIDTH), jnp.float32)


@functools.cache
def drawn(causal):
    """Mean squares of the queries', keys' and values' cotangents in each of the nets, (nets,) by path."""
    model = Block(causal)

    def run(variables, x, nudges):
        seen = {}

        def record(f, args, kwargs, context):
            out = f(*args, **kwargs)
            path = "/".join(context.module.path)
            if path.split("/")[-1] in ("query", "key", "value"):
                out = out + nudges[path] if nudges else out
                seen[path] = out
            return out

        with nn.intercept_methods(record):
            return model.apply(variables, x), seen

    def one(key):
        k_x, k_w, k_y = jax.random.split(key, 3)
        x = jax.random.normal(k_x, INPUT.shape)
        variables = model.init(k_w, x)
        nudges = jax.tree.map(jnp.zeros_like, run(variables, x, None)[1])
        y, pull = jax.vjp(lambda n: run(variables, x, n)[0], nudges)
        (found,) = pull(jax.random.normal(k_y, y.shape))
        return {path: jnp.mean(g**2) for path, g in found.items()}

    with jax.numpy_rank_promotion("allow"):
        rows = jax.lax.map(jax.jit(one), jax.random.split(jax.random.key(0), NETS))
    return {path: np.asarray(g, float) for path, g in rows.items()}


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_queries_keys_and_values(causal):
    """Within the stated bound, and queries of the last layer within 25 %: without overlaps they are 30 % low and more."""
    with jax.numpy_rank_promotion("allow"):
        report = vs.predict(Block(causal), INPUT)
    for path, squares in drawn(causal).items():
        error = squares.std() / squares.mean() / np.sqrt(NETS - 1)
        assert abs(report[path].gradient / squares.mean() - 1) <= report[path].gradient_error_bound + 4 * error, path
    last = drawn(causal)["attention_2/query"]
    assert report["attention_2/query"].gradient == pytest.approx(last.mean(), rel=0.25)


def test_overlaps_are_sums_of_independent_parts():
    """V by what any two overlaps have in common is Σ a² of the amplitudes a of all independent parts, written out."""
    from varscale.theory.propagation import token_gram as overlaps
    from varscale.theory.rules import attention

    found = {}

    def watched(x, *other):
        if not other:
            found[x] = overlaps.overlap(x), parts(x)
        return overlaps.overlap(x, *other)

    @functools.cache
    def parts(x):
        mixture = overlaps.mixture(x)
        out = {x: np.sqrt(max(mixture.variance, 0.0))}
        for weight, source in zip(mixture.weights, mixture.sources, strict=True):
            for part, amplitude in parts(source).items():
                out[part] = out.get(part, 0.0) + weight * amplitude
        return out

    with pytest.MonkeyPatch.context() as patch, jax.numpy_rank_promotion("allow"):
        patch.setattr(attention, "overlap", watched)
        vs.predict(Block(causal=True), INPUT, backward=False)
    assert max(len(of_all) for _, of_all in found.values()) > 20
    for x, (overlap, of_all) in found.items():
        assert overlap == pytest.approx(np.clip(sum(a * a for a in of_all.values()), 1 / x.count, 1), rel=1e-9)


def test_the_overlap_of_tokens_by_layer():
    """V of a stream's tokens is 1/D at the input and grows by what attention adds; it is known to leading order."""
    from varscale.theory.propagation import token_gram as overlaps
    from varscale.theory.rules import attention

    found = []
    original = overlaps.overlap

    def watched(x, *other):
        found.extend([] if other else [original(x)])
        return original(x, *other)

    with pytest.MonkeyPatch.context() as patch, jax.numpy_rank_promotion("allow"):
        patch.setattr(attention, "overlap", watched)
        vs.predict(Block(), INPUT, backward=False)
    first, *_, last = dict.fromkeys(found)
    assert first == pytest.approx(1 / WIDTH, rel=0.05)

    def measured(key):
        k_x, k_w = jax.random.split(key)
        x = jax.random.normal(k_x, INPUT.shape)
        _, state = Block().apply(Block().init(k_w, x), x, capture_intermediates=True, mutable=True)
        h = state["intermediates"]["LayerNorm_4"]["__call__"][0]
        h = h - h.mean(axis=1, keepdims=True)
        o = jnp.einsum("bid,bjd->bij", h, h) / WIDTH
        different = ~jnp.eye(TOKENS, dtype=bool)
        own = jnp.mean(jnp.einsum("bii->bi", o))
        return jnp.mean(o**2, where=different[None]) - jnp.mean(o, where=different[None]) ** 2, own**2

    with jax.numpy_rank_promotion("allow"):
        squares, own = jax.lax.map(jax.jit(measured), jax.random.split(jax.random.key(1), NETS))
    assert last == pytest.approx(float(squares.mean() / own.mean()), rel=0.25)


class Biased(nn.Module):
    """Attention with known logits that fall with distance."""

    slope: float

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((4, 16))(x) for _ in range(3))
        where = np.arange(x.shape[1])
        logits = jnp.einsum("bihd,bjhd->bhij", q, k) / 4 - self.slope * np.abs(where[:, None] - where)
        return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(logits), v)


def test_known_logits_are_drawn():
    """Logits that are known numbers are no Gaussian ones: those that vary much have the model drawn, the others a doubt."""
    with jax.numpy_rank_promotion("allow"):
        small, large = (vs.predict(Biased(slope), INPUT, backward=False).output for slope in (0.01, 0.5))
    assert (small.how, large.how) == ("assumed", "sampled")
    assert max(small.error_bound, large.error_bound) < 0.15


@pytest.mark.parametrize("mean", [0.0, 1.0, 10.0])
def test_a_norm_of_what_has_a_mean(mean):
    """The scale of a norm fluctuates with what varies, not with what is the same everywhere: its gradient is 1/(1 + m²)."""

    class Shifted(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + self.param("mean", nn.initializers.constant(mean), (256,))
            return nn.RMSNorm()(nn.Dense(256, kernel_init=lambda key, shape, dtype: jnp.eye(256, dtype=dtype), name="in")(x))

    with jax.numpy_rank_promotion("allow"):
        row = vs.predict(Shifted(), jax.ShapeDtypeStruct((8, 256), jnp.float32))["in"]
    assert row.gradient == pytest.approx(1 / (1 + mean**2), rel=0.02)


class Patches(nn.Module):
    """A class token of zeros before the patches of a picture, places added, one layer of attention, read out at the token."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTH, (4, 4), strides=4, padding="VALID")(x).reshape(x.shape[0], -1, WIDTH)
        token = self.param("token", nn.initializers.zeros, (1, 1, WIDTH))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("places", nn.initializers.normal(0.02), (1, x.shape[1], WIDTH))
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(h, h)
        return nn.Dense(10)(nn.LayerNorm()(x)[:, 0])


def test_a_class_token_before_patches():
    """A token that is nothing but its place is the same in every sample; patches of 48 numbers differ in fewer directions."""
    struct = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)

    def one(key):
        k_x, k_w = jax.random.split(key)
        x = jax.random.normal(k_x, struct.shape)
        found = Patches().apply(Patches().init(k_w, x), x, capture_intermediates=True, mutable=True)[1]
        return jnp.mean(found["intermediates"]["attention"]["out"]["__call__"][0] ** 2)

    with jax.numpy_rank_promotion("allow"):
        row = vs.predict(Patches(), struct)["attention/out"]
        squares = np.asarray(jax.lax.map(jax.jit(one), jax.random.split(jax.random.key(2), 60)), float)
    error = squares.std() / squares.mean() / np.sqrt(59)
    assert abs(row.second_moment / squares.mean() - 1) <= row.error_bound + 4 * error
    assert row.error_bound < 0.2


@pytest.mark.parametrize("broadcast", [False, True])
def test_dropout_of_weights_leaves_what_outputs_gain_by_following_their_queries(broadcast):
    """Of E[y²] = A/(1 − rate) + B it is A, each key's own, that dropout multiplies; B is there without it too."""

    def second(rate):
        model = nn.MultiHeadDotProductAttention(4, dropout_rate=rate, broadcast_dropout=broadcast, deterministic=False)
        run = lambda params, x: model.apply(params, x, rngs={"dropout": jax.random.key(0)})  # noqa: E731
        x = jax.ShapeDtypeStruct((4, 64, 64), jnp.float32)
        init = lambda key: model.init({"params": key, "dropout": key}, jnp.zeros(x.shape))  # noqa: E731
        return vs.predict(run, x, params=init, backward=False).output.second_moment

    none, some, half = map(second, (0.0, 0.1, 0.5))
    assert half - none == pytest.approx(9 * (some - none), rel=0.02)


class Padded(nn.Module):
    """Attention over samples of unlike lengths, paddings that ask hidden from as well as paddings that are asked."""

    added: bool

    @nn.compact
    def __call__(self, x, there):
        sharp = nn.initializers.variance_scaling(4.0, "fan_in", "normal")
        x = nn.LayerNorm()(x)
        if not self.added:
            return nn.MultiHeadDotProductAttention(4, kernel_init=sharp)(x, mask=nn.make_attention_mask(there, there))
        q, k, v = (nn.DenseGeneral((4, 16), kernel_init=sharp)(x) for _ in range(3))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4
        logits = logits + jnp.where(nn.make_attention_mask(there, there) > 0, 0.0, -1e9)
        out = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(logits), v)
        return nn.DenseGeneral(WIDTH, (-2, -1), kernel_init=sharp)(out)


@pytest.mark.parametrize("lengths", [(24, 18, 12, 6), (12, 12, 12, 12)], ids=["unlike", "alike"])
@pytest.mark.parametrize("added", [False, True], ids=["chosen", "added"])
def test_who_may_see_no_key_sees_all_alike(added, lengths):
    """Logits that are all masked are equal: sharp weights of paddings would add a third to the mean square."""
    there = jnp.arange(TOKENS)[None] < jnp.asarray(lengths)[:, None]
    struct, model = jax.ShapeDtypeStruct((4, TOKENS, WIDTH), jnp.float32), Padded(added)

    def one(key):
        k_w, k_x = jax.random.split(key)
        x = jax.random.normal(k_x, struct.shape)
        return jnp.mean(model.apply(model.init(k_w, x, there), x, there) ** 2)

    with jax.numpy_rank_promotion("allow"):
        row = vs.predict(model, vs.inputs(struct, there), backward=False).output
        squares = np.asarray(jax.lax.map(jax.jit(one), jax.random.split(jax.random.key(0), 60)), float)
    error = squares.std() / squares.mean() / np.sqrt(59)
    assert error < 0.02, "the test has lost its power"
    assert abs(row.second_moment / squares.mean() - 1) <= 0.06 + 4 * error


NOT_GAUSSIAN = {
    "relu": lambda z: 3 * jax.nn.relu(z),
    "distances": lambda z: -2 * jnp.square(z),
    "gumbel": lambda z: 2 * (z - jnp.log(-jnp.log(jax.random.uniform(jax.random.key(2), z.shape, minval=1e-6)))),
}


@pytest.mark.parametrize("kind", NOT_GAUSSIAN)
def test_softmax_of_logits_that_are_not_gaussian_is_drawn(kind):
    """20000 rows of 16 with a fixed key, within four standard errors and the bound; Gaussian logits are off by 17 to 61 %."""
    struct = jax.ShapeDtypeStruct((20_000, 16), jnp.float32)
    softmax = lambda z: jax.nn.softmax(NOT_GAUSSIAN[kind](z), axis=-1)  # noqa: E731
    row = vs.predict(lambda _, z: softmax(z), struct, params={}, backward=False).output
    squares = np.asarray(jnp.mean(jnp.square(softmax(jax.random.normal(jax.random.key(0), struct.shape))), axis=1))
    error = squares.std() / squares.mean() / len(squares) ** 0.5
    assert row.how == "sampled"
    assert abs(row.second_moment / squares.mean() - 1) <= row.error_bound + 4 * error
    assert row.error_bound <= 0.15


def test_capped_logits_are_as_good_as_gaussian():
    capped = lambda _, z: jax.nn.softmax(50 * jnp.tanh(z / 50), axis=-1)  # noqa: E731
    struct = jax.ShapeDtypeStruct((64, 16), jnp.float32)
    assert vs.predict(capped, struct, params={}, backward=False).output.how == "quadrature"


@pytest.mark.parametrize("mixed", ["logits", "weights"])
def test_talking_heads_are_drawn(mixed):
    """Heads mixed before or after the softmax; z-test at 1e-6 beside the error bound."""
    heads, width = 4, 64

    def weights(key):
        keys = jax.random.split(key, 5)
        maps = {n: jax.random.normal(k, (width, heads, width // heads)) / width**0.5 for n, k in zip("qkv", keys, strict=False)}
        before, after = (jax.random.normal(k, (heads, heads)) / heads**0.5 for k in keys[3:])
        return maps | {"before": before, "after": after}

    def program(p, x):
        q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[n]) for n in "qkv")
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (width // heads) ** 0.5
        if mixed == "logits":
            logits = jnp.einsum("hg,bgqk->bhqk", p["before"], logits)
        shares = jax.nn.softmax(logits)
        if mixed == "weights":
            shares = jnp.einsum("hg,bgqk->bhqk", p["after"], shares)
        return jnp.einsum("bhqk,bkhd->bqhd", shares, v)

    x = np.random.default_rng(1).normal(size=(2, 32, width)).astype(np.float32)
    row = vs.predict(program, x, params=weights, backward=False).output
    drawn = jax.lax.map(lambda key: jnp.mean(program(weights(key), x) ** 2), jax.random.split(jax.random.key(0), 300))
    assert (row.how, row.error_bound < 0.15) == ("sampled", True)
    margin = row.error_bound * drawn.mean() + stats.norm.isf(5e-7) * drawn.std() / len(drawn) ** 0.5
    assert abs(row.second_moment - drawn.mean()) < margin, (row.second_moment, drawn.mean(), margin)
