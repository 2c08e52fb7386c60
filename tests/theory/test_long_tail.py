"""Programs off the main stream, drawn as regions: outputs and gradients lie within their bounds, which are narrow."""

import drawn
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs

SAMPLES, WIDTH, EXPERTS = 8, 16, 4
X = jax.ShapeDtypeStruct((SAMPLES, WIDTH), jnp.float32)
SERIES = jax.ShapeDtypeStruct((SAMPLES, 6, WIDTH), jnp.float32)
GRAPH = np.random.default_rng(0).integers(0, SAMPLES, (2, 24))


@pytest.fixture(autouse=True)
def as_users_write():
    """These programs are written as users write them, with jax's ordinary promotions."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def kernels(key):
    return jax.random.normal(key, (3, WIDTH, WIDTH)) / WIDTH**0.5


def derivative(p, h):
    """A weight of the net is in its derivative, too (physics-informed nets)."""
    return jax.vmap(jax.grad(lambda row: jnp.sum(jnp.tanh(row @ p[0]) @ p[1])))(h)


def kernel_by_sample(p, h):
    """A convolution whose kernel is made of the sample (StyleGAN)."""
    kernel = (p[0] * (1 + h @ p[1])[:, :, None])[:, None]
    conv = lambda x, w: jax.lax.conv_general_dilated(x[None], w, (1,), "VALID", dimension_numbers=("NHC", "HIO", "NHC"))  # noqa: E731
    return jax.vmap(conv)(h[:, None], kernel)


def two_of_four(p, h):
    """A mixture of the two experts with the largest shares."""
    share, chosen = jax.lax.top_k(nn.softmax(2 * h @ p[0][:, :EXPERTS]), 2)
    gates = jnp.sum(nn.one_hot(chosen, EXPERTS) * share[..., None], -2)
    experts = jnp.stack([jnp.tanh((k + 1) * h @ p[1]) @ p[2] for k in range(EXPERTS)], -1)
    return jnp.sum(experts * gates[:, None], -1)


def maxima_of_neighbours(p, h):
    largest = jax.ops.segment_max((h @ p[0])[GRAPH[0]], GRAPH[1], SAMPLES)
    return h + jnp.where(jnp.isfinite(largest), largest, 0.0) @ p[1]


def mixed_by_frequency(p, h):
    return jnp.fft.ifft(jnp.fft.fft(h @ p[0]) * jnp.fft.fft(p[1][0])).real


PROGRAMS = [derivative, kernel_by_sample, two_of_four, maxima_of_neighbours, mixed_by_frequency]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_program_is_drawn(program):
    """300 draws; within the bound and four standard errors: a sound one fails 6 times in 100000, and keys are fixed."""

    def behind_a_layer(p, x, nudge=0.0):
        with jax.named_scope("first"):
            h = x @ p[2] + nudge
        return program(p, h)

    report = vs.predict(lambda p, x: behind_a_layer(p, x), X, params=kernels)

    def one(key):
        k_weights, k_input, k_cotangent = jax.random.split(key, 3)
        p, x = kernels(k_weights), jax.random.normal(k_input, X.shape)
        y, back = jax.vjp(lambda nudge: behind_a_layer(p, x, nudge), jnp.zeros(X.shape))
        return jnp.stack([jnp.mean(y**2), jnp.mean(back(jax.random.normal(k_cotangent, y.shape))[0] ** 2)])

    (forward, gradient), (error, its_error) = drawn.drawn(one, 300)
    row, first = report.output, report["first"]
    assert row.how == "sampled"
    assert drawn.agrees(row.second_moment, row.error_bound, forward, error)
    assert drawn.agrees(first.gradient, first.gradient_error_bound, gradient, its_error)
    assert max(row.error_bound, first.gradient_error_bound) < 0.5


class Last(nn.Module):
    """The state of a recurrence at each sequence's own end."""

    @nn.compact
    def __call__(self, x, lengths):
        return nn.RNN(nn.GRUCell(WIDTH), return_carry=True)(x, seq_lengths=lengths)[0]


def test_last_steps_of_sequences_are_those_at_their_lengths():
    lengths = np.array([6, 1, 1, 1, 1, 1, 1, 1])
    row = vs.predict(Last(), vs.inputs(SERIES, lengths), backward=False).output

    def one(key):
        k_weights, k_input = jax.random.split(key)
        x = jax.random.normal(k_input, SERIES.shape)
        return jnp.mean(Last().apply(Last().init(k_weights, x, lengths), x, lengths) ** 2)

    assert drawn.agrees(row.second_moment, row.error_bound, *drawn.drawn(one, 200))
