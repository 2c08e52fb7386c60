"""Products of arrays that are uncorrelated and yet not independent: made of the same tokens, by the same weights, or tied.

Each a z-test at an error rate of 1e-6 beside the stated error bound, which has to be below 20 % but once, on 400 nets. Power:
taken for independent, linear attention would be off by a factor of 1 + T/d = 3 here, a weight and its transpose by one of 2.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import varscale as vs

WIDTH = 32


def normal(key, *shape):
    return jax.random.normal(key, shape) / shape[0] ** 0.5


def weights(key):
    *keys, last = jax.random.split(key, 5)
    return {name: normal(k, WIDTH, WIDTH) for name, k in zip("qkvw", keys, strict=True)} | {
        "qkv": normal(last, WIDTH, 3 * WIDTH)
    }


def _sigmoid_attention(p, x, y):
    return jax.nn.sigmoid((x @ p["q"]) @ jnp.swapaxes(x @ p["k"], -1, -2) / WIDTH**0.5) @ (x @ p["v"])


def _attention(p, queries, keys, values):
    logits = (queries @ p["q"]) @ jnp.swapaxes(keys @ p["k"], -1, -2) / WIDTH**0.5
    return jax.nn.softmax(logits) @ (values @ p["v"])


def _attention_packed(p, x, y):
    """Two heads, along an axis of the joined weights."""
    q, k, v = (x @ p["qkv"]).reshape(2, 64, 3, 2, WIDTH // 2).transpose(2, 0, 3, 1, 4)
    return jax.nn.softmax(2 * q @ jnp.swapaxes(k, -1, -2) / WIDTH**0.5) @ v


def _attention_split(p, x, y):
    q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)
    return jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2) / WIDTH**0.5) @ v


def _split_gates(p, x, y):
    _, gates, units = jnp.split(x @ p["qkv"], 3, axis=-1)
    return (jax.nn.silu(gates) * units).mean(1)


def _outer(p, x):
    return (x @ p["k"])[..., :, None] * (x @ p["v"])[..., None, :]


def _hopfield(p, x, y):
    return jax.nn.softmax(2 * x @ p["w"].T) @ p["w"]


def _there_and_back(p, x, y):
    for _ in range(2):
        x = jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"].T)
    return x @ p["v"]


PROGRAMS = {
    "linear attention": lambda p, x, y: jnp.swapaxes(x @ p["k"], -1, -2) @ (x @ p["v"]),
    "a sum of outer products": lambda p, x, y: _outer(p, x).sum(1),
    "a mean of gated units": lambda p, x, y: ((x @ p["k"]) * jax.nn.silu(x @ p["v"])).mean(1),
    "one weight twice": lambda p, x, y: (x @ p["w"]) @ jnp.swapaxes(y @ p["w"], -1, -2),
    "sigmoid attention": _sigmoid_attention,
    "attention": lambda p, x, y: _attention(p, x, x, x),
    "packed attention": _attention_packed,
    "attention of a split": _attention_split,
    "gates of a split": _split_gates,
    "attention to values of their own": lambda p, x, y: _attention(p, x, x, y),
    "learned attention": lambda p, x, y: jax.nn.softmax(10 * p["w"]) @ (x[:, :WIDTH] @ p["v"]),
    "a weight and its transpose": lambda p, x, y: (x @ p["w"]) @ p["w"].T,
    "a residual around them": lambda p, x, y: x + jnp.tanh(x @ p["w"]) @ p["w"].T,
    "a scaled weight and its transpose": lambda p, x, y: x + (x @ p["w"] / 2) @ (2 * p["w"]).T,
    "a rectified bias and the transpose": lambda p, x, y: jax.nn.relu(x @ p["w"] + 0.5) @ p["w"].T,
    "a Hopfield layer": _hopfield,
    "there and back twice": _there_and_back,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_products_that_are_not_independent(name):
    given = [jax.ShapeDtypeStruct((2, 64, WIDTH), jnp.float32)] * 2
    row = vs.predict(PROGRAMS[name], vs.inputs(*given), params=weights, backward=False).output

    def square(key):
        keys = jax.random.split(key, 3)
        x, y = (jax.random.normal(k, (2, 64, WIDTH)) for k in keys[:2])
        return jnp.mean(jnp.square(PROGRAMS[name](weights(keys[2]), x, y)))

    drawn = np.asarray(jax.jit(lambda keys: jax.lax.map(square, keys, batch_size=50))(jax.random.split(jax.random.key(2), 400)))
    error = drawn.std(ddof=1) / 20 / drawn.mean()
    assert row.error_bound < (0.6 if name == "there and back twice" else 0.2)  # sums beside their own terms are in doubt
    assert abs(row.second_moment / drawn.mean() - 1) < row.error_bound + stats.norm.isf(5e-7) * error


def test_a_residual_knows_what_a_transposed_weight_brings_back():
    """x + (x W) Wᵀ has the square of x·2 and that of the rest, 1 + 4: drawn, where a fresh weight would give 2."""
    given = vs.inputs(jax.ShapeDtypeStruct((8, 1024), jnp.float32))

    def params(key):
        return jax.random.normal(key, (1024, 1024)) / 32

    row = vs.predict(lambda w, x: x + (x @ w) @ w.T, given, params=params).output
    assert row.how == "sampled"
    assert row.error_bound < 0.15
    assert row.second_moment == pytest.approx(5.0, rel=row.error_bound)


def test_a_weight_applied_twice_the_same_way_is_as_good_as_fresh():
    given = vs.inputs(jax.ShapeDtypeStruct((8, 64), jnp.float32))
    row = vs.predict(lambda w, x: x + (x @ w) @ w, given, params=lambda key: normal(key, 64, 64)).output
    assert row.second_moment == pytest.approx(2.0, rel=1 / 64)


def test_gates_of_given_samples_of_many_scales_are_in_doubt():
    """E[(w x)² (w' x)²] is the mean of |x|⁴/n², which a few classes of samples do not hold; of one scale it is known."""
    rng = np.random.default_rng(0)
    scales = np.exp(0.7 * rng.standard_normal((64, 1)))

    def model(p, x):
        return (x @ p[0]) * (x @ p[1])

    def params(key):
        return [normal(k, 16, 8) for k in jax.random.split(key)]

    for numbers, least in ((rng.standard_normal((64, 16)) * scales, 0.5), (np.sign(rng.standard_normal((64, 16))), 0.0)):
        row = vs.predict(model, numbers.astype("f"), params=params, backward=False).output
        exact = np.mean(np.mean(numbers**2, axis=1) ** 2)
        assert abs(row.second_moment - exact) <= row.error_bound * max(exact, row.second_moment)
        assert least <= row.error_bound < least + 1
