"""Spectra of given arrays are computed, wherever their axes are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs

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
