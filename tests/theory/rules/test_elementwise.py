"""Gradients that are not derivatives: stopped, or by a backward rule of their own. Spectra of given arrays are computed."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs


class Behind(nn.Module):
    """A function behind a layer."""

    f: Callable

    @nn.compact
    def __call__(self, x):
        return self.f(nn.Dense(64)(x))


def rows(f):
    """The layer's row and the output's; the output's gradient is 1."""
    report = vs.predict(Behind(f), jax.ShapeDtypeStruct((16, 64), jnp.float32))
    return report["Dense_0"], report.output


@pytest.mark.parametrize(
    ("f", "gradient", "forward"),
    [
        pytest.param(lambda h: h + jax.lax.stop_gradient(3 * jnp.tanh(h)), 1.0, lambda h: h + 3 * jnp.tanh(h), id="a term"),
        pytest.param(lambda h: h + jax.lax.stop_gradient(jnp.round(h) - h), 1.0, jnp.round, id="straight through"),
        pytest.param(lambda h: 0.9 * jax.lax.stop_gradient(h) + 0.1 * h, 0.01, lambda h: h, id="in part"),
        pytest.param(jax.lax.stop_gradient, None, lambda h: h, id="all"),
        pytest.param(
            lambda h: h - jax.lax.stop_gradient(h.max(-1)[:, None]), 1.0, lambda h: h - h.max(-1)[:, None], id="largest"
        ),
    ],
)
def test_nothing_comes_back_through_what_is_stopped(f, gradient, forward):
    layer, output = rows(f)
    assert layer.gradient == (gradient and pytest.approx(gradient, rel=1e-6))
    assert output.second_moment == pytest.approx(rows(forward)[1].second_moment, rel=1e-6)


def test_softmax_stops_no_gradient_that_there_is():
    """The maximum that softmax takes from its logits is stopped: it is still recognised."""
    by_hand = lambda h: jnp.exp(h) / jnp.exp(h).sum(-1, keepdims=True)  # noqa: E731
    assert rows(nn.softmax)[0].gradient == pytest.approx(rows(by_hand)[0].gradient)


def scaled_tanh(factor):
    """tanh with a backward rule of its own: its derivative times a factor."""

    @jax.custom_vjp
    def f(x):
        return jnp.tanh(x)

    f.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (factor * g * (1 - jnp.square(jnp.tanh(x))),))
    return f


def test_backward_rules_of_a_function_s_own_are_in_doubt():
    plain, same, other = (rows(f)[0] for f in (jnp.tanh, scaled_tanh(1.0), scaled_tanh(-3.0)))
    assert same.gradient == plain.gradient
    assert abs(9 * plain.gradient / other.gradient - 1) <= other.gradient_error_bound


X = jax.random.normal(jax.random.key(0), (16, 32))

SPECTRA = {
    "last axis": lambda x: jnp.fft.rfft(x),
    "first axis": lambda x: jnp.fft.rfft(x, axis=0),
    "before another axis": lambda x: jnp.fft.rfft(x[..., None], 32, axis=1),
    "padded": lambda x: jnp.fft.rfft(x[..., None], 64, axis=1),
    "windowed": lambda x: jnp.fft.rfft(x[..., None] * np.hanning(32).astype("f")[:, None], 32, axis=1),
    "transposed": lambda x: jnp.swapaxes(jnp.fft.fft(x), 0, 1),
    "sliced and joined": lambda x: jnp.concatenate([jnp.fft.fft(x)[:, :4], 1j * jnp.fft.fft(x)[:, 8:]], axis=1),
    "multiplied": lambda x: jnp.fft.fft(x) * jnp.conj(jnp.fft.fft(x)),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_spectrum_of_given_arrays(name):
    spectrum = SPECTRA[name]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):

        class Powers(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Dropout(0.0, deterministic=True, name="spectrum")(jnp.abs(spectrum(x)))

        row = vs.predict(Powers(), X)["spectrum"]
        assert row.second_moment == pytest.approx(float(jnp.mean(jnp.abs(spectrum(X)) ** 2)), rel=0.01)
        described = vs.predict(Powers(), jax.ShapeDtypeStruct(X.shape, X.dtype), backward=False)["spectrum"]
    assert described.second_moment > 0
