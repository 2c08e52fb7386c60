"""Places that differ or share what is near them: windows and biases of attention, borders behind a maximum, post-norm streams.

Each prediction is held against drawn networks (`drawn.agrees`: a sound one fails once in 30000).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import agrees, drawn, output

import varscale as vs

LENGTH, WIDTH, HEADS = 16, 32, 2
BEHIND = np.arange(LENGTH)[None, None, :, None] - np.arange(LENGTH)
CAUSAL = BEHIND >= 0
SLOPES = np.array([0.5, 0.1], np.float32)[None, :, None, None] * BEHIND
HIDDEN = np.finfo(np.float32).min
LOGITS = {
    "window": lambda s: jnp.where(CAUSAL & (BEHIND < 4), s, HIDDEN),
    "bias in the mask": lambda s: s + np.where(CAUSAL, -SLOPES, HIDDEN),
}


def weights(key):
    names = [f"{name}{layer}" for layer in range(2) for name in "qkvo"]
    return {n: jax.random.normal(k, (WIDTH, WIDTH)) / WIDTH**0.5 for n, k in zip(names, jax.random.split(key, 8), strict=True)}


def attention(logits, params, x, nudge=0.0):
    for layer in range(2):
        q, k = ((x @ params[f"{name}{layer}"]).reshape(2, LENGTH, HEADS, -1) for name in "qk")
        with jax.named_scope(f"values{layer}"):
            v = x @ params[f"v{layer}"] + (nudge if layer == 0 else 0.0)
        p = jax.nn.softmax(logits(jnp.einsum("bthd,bshd->bhts", q, k) / 4))
        x = jnp.einsum("bhts,bshd->bthd", p, v.reshape(q.shape)).reshape(x.shape) @ params[f"o{layer}"]
    return x


@pytest.mark.parametrize("kind", LOGITS)
def test_attention_by_distance_is_right_and_sharp_both_ways(kind):
    shape = (2, LENGTH, WIDTH)
    report = vs.predict(lambda p, x: attention(LOGITS[kind], p, x), jax.ShapeDtypeStruct(shape, jnp.float32), params=weights)

    def one(key):
        a, b, c = jax.random.split(key, 3)
        params, x = weights(a), jax.random.normal(b, shape)
        y, back = jax.vjp(lambda d: attention(LOGITS[kind], params, x, d), jnp.zeros(shape))
        return jnp.stack([jnp.mean(y**2), jnp.mean(back(jax.random.normal(c, shape))[0] ** 2)])

    (forward, backward), errors = drawn(one, 300)
    row = report["values0"]
    assert agrees(report.output.second_moment, report.output.error_bound, forward, errors[0])
    assert agrees(row.gradient, row.gradient_error_bound, backward, errors[1])
    assert report.output.error_bound < 0.15
    assert row.gradient_error_bound < 0.25


def test_one_layer_of_windows_and_a_causal_mask_need_no_draws():
    mask = {"causal": CAUSAL, "window": CAUSAL & (BEHIND < 4)}
    for kind, layers in (("causal", 3), ("window", 1)):
        model = _Stack(mask[kind], layers)
        report = vs.predict(model, jax.ShapeDtypeStruct((2, LENGTH, WIDTH), jnp.float32), backward=False)
        assert report.output.how == "quadrature"


class _Stack(nn.Module):
    mask: np.ndarray
    layers: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.layers):
            x = nn.MultiHeadDotProductAttention(HEADS)(x, mask=self.mask)
        return x


class Strided(nn.Module):
    """Maxima over windows, cut at the border or of smaller values there, and every other one of them."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (5, 5), (2, 2), padding=2)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        return nn.Conv(64, (1, 1), (2, 2), padding="VALID")(x)


def test_a_stride_behind_a_maximum_sees_more_of_the_border():
    shape = (8, 16, 16, 4)
    row = vs.predict(Strided(), jax.ShapeDtypeStruct(shape, jnp.float32), backward=False).output
    measured, error = output(Strided(), shape, 300)
    assert agrees(row.second_moment, row.error_bound, measured, error)
    assert row.error_bound < 0.06


def test_norms_of_a_stream_take_the_same_direction_out_of_gradients_once():
    depth, width, scale = 12, 64, 3.0

    def params(key):
        return [jax.random.normal(k, (width, width)) * 0.2 / width**0.5 for k in jax.random.split(key, depth)]

    def stream(p, x, nudge=0.0):
        for i, w in enumerate(p):
            with jax.named_scope(f"layer{i}"):
                x = scale * x + jax.nn.relu(x @ w)
                x = x - x.mean(-1, keepdims=True)
                x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
            x = x + nudge if i == 0 else x
        return x

    shape = (8, width)
    row = vs.predict(stream, jax.ShapeDtypeStruct(shape, jnp.float32), params=params)["layer0"]

    def one(key):
        a, b, c = jax.random.split(key, 3)
        p, x = params(a), jax.random.normal(b, shape)
        _, back = jax.vjp(lambda d: stream(p, x, d), jnp.zeros(shape))
        return jnp.mean(back(jax.random.normal(c, shape))[0] ** 2)

    measured, error = drawn(one, 200)
    assert agrees(row.gradient, row.gradient_error_bound, measured, error)
    assert row.gradient_error_bound < 0.1


@pytest.mark.parametrize("size", [4, 12, 40])
@pytest.mark.parametrize("kind", ["mask", "decay", "ramp"])
def test_known_scales_of_places_multiply_at_each_place(size, kind):
    """E[(m h W m)²] = mean m⁴ for a known m by place, where mean(m²)² would forget which place is which; to 1 %."""
    steps = np.arange(size) / size
    scale = {"mask": (steps < 0.5).astype("f"), "decay": np.exp(-2 * steps), "ramp": steps}[kind].astype("f")

    def model(params, x):
        return x @ params[0] * scale[None, :, None] @ params[1] * scale[None, :, None]

    def draw(key):
        return [jax.random.normal(k, (32, 32)) / 32**0.5 for k in jax.random.split(key)]

    x = jax.ShapeDtypeStruct((4, size, 32), jnp.float32)
    whole = vs.predict(model, x, params=draw, backward=False).rows[-1]
    assert whole.second_moment == pytest.approx(float(np.mean(scale**4)), rel=0.01)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_of_masked_places_leaves_zeros_zero(norm):
    """Of 12 places 7 are kept: E[y²] is 7/12 behind the norm, and half of that flows back into the layer before the mask."""
    mask = (np.arange(12) < 7).astype("f")[None, :, None]

    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = norm()(nn.Dense(64, name="first")(x) * mask)
            return norm()(nn.relu(nn.Dense(64, name="second")(x)) * mask)

    rows = {row.path: row for row in vs.predict(Masked(), jax.ShapeDtypeStruct((4, 12, 32), jnp.float32)).rows}
    assert rows[""].second_moment == pytest.approx(7 / 12, rel=0.01)
    # 40 nets measure .595 for RMSNorm and .88 for LayerNorm.
    assert rows["second"].gradient == pytest.approx(0.88 if norm is nn.LayerNorm else 0.595, rel=0.06)
