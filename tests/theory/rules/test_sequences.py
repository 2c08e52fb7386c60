"""Complex numbers, Fourier transforms and recurrences, each against draws of the same program.

Error rates: a draw's mean square has a standard error of its own (each test's comment says how many draws); agreement is
asked for to within the report's error_bound and four of those errors, so a sound prediction fails 6 times in 100000.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from varscale.theory import predict


@pytest.fixture(autouse=True)
def as_users_write():
    """These programs are written as users write them, with jax's ordinary promotions."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


WIDTH = 32
INPUT = jax.ShapeDtypeStruct((8, WIDTH), jnp.float32)


def weights(key):
    return jax.random.normal(key, (2, WIDTH, WIDTH)) / np.sqrt(WIDTH)


def measured(programs, params, struct, draws):
    """Of every program its mean square over draws of parameters and inputs, and the relative standard error of that."""

    def one(key):
        k, k_x = jax.random.split(key)
        p, x = params(k), jax.random.normal(k_x, struct.shape, struct.dtype)
        return {name: jnp.mean(jnp.abs(f(p, x)) ** 2) for name, f in programs.items()}

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=25))(jax.random.split(jax.random.key(0), draws))
    return {name: (v.mean(), v.std() / np.sqrt(draws) / max(v.mean(), 1e-9)) for name, v in map_values(np.asarray, found)}


def map_values(f, table):
    return [(name, f(v)) for name, v in table.items()]


def agrees(f, found, params=weights, struct=INPUT, extra=2 / WIDTH):
    """Whether prediction and measurement agree; `extra` is what a finite width adds to a fourth moment."""
    row = predict(f, struct, params=params, backward=False).output
    mean, error = found
    assert abs(row.second_moment - mean) <= mean * (row.error_bound + 4 * error + extra), (row.second_moment, mean, error, row)


def z(w, x):
    return x @ (w[0] + 1j * w[1])


UNARY = {
    "exp": lambda y: jnp.exp(0.3 * y),
    "log": jnp.log,
    "log1p": lambda y: jnp.log1p(0.2 * y),
    "expm1": lambda y: jnp.expm1(0.2 * y),
    "sqrt": jnp.sqrt,
    "rsqrt": lambda y: jax.lax.rsqrt(2 + 0.2 * y),
    "integer_pow": lambda y: (0.5 + 0.2 * y) ** 3,
    "pow": lambda y: (2 + 0.2 * y) ** (0.5 + 0.3j),
    "sign": jnp.sign,
    "sin": lambda y: jnp.sin(0.3 * y),
    "cos": lambda y: jnp.cos(0.3 * y),
    "tan": lambda y: jnp.tan(0.2 * y),
    "sinh": lambda y: jnp.sinh(0.3 * y),
    "cosh": lambda y: jnp.cosh(0.3 * y),
    "tanh": lambda y: jnp.tanh(0.3 * y),
    "logistic": lambda y: jax.nn.sigmoid(0.3 * y),
    "square": jnp.square,
    "conj": lambda y: jnp.conj(y) * (1 + 2j),
    "div": lambda y: (1 + y) / (3 - 1j),
    "abs": jnp.abs,
    "reciprocal": lambda y: 1 / (2 + 0.2 * y),
}


PARTS = {
    f"{part.__name__} {name}": lambda w, x, f=f, part=part: part(f(z(w, x)))
    for name, f in UNARY.items()
    for part in (jnp.real, jnp.imag)
}


@pytest.fixture(scope="module")
def functions():
    return measured(PARTS, weights, INPUT, 200)


@pytest.mark.parametrize("name", PARTS)
def test_functions_of_one_complex_number(name, functions):
    """32 units add up to 6/32 to a sixth moment."""
    agrees(PARTS[name], functions[name], extra=6 / WIDTH)


def test_complex_outputs_are_measured_by_their_modulus():
    row = predict(z, INPUT, params=weights, backward=False).output
    assert row.second_moment == pytest.approx(2.0, rel=row.error_bound)
    assert row.mean == pytest.approx(np.sqrt(np.pi) / 2 * np.sqrt(2), rel=row.error_bound)
    assert row.error_bound < 0.3  # of its two parts, together


def test_complex_parameters_inputs_and_products():
    normal = lambda k: jax.random.normal(k, (WIDTH, WIDTH), jnp.complex64)  # noqa: E731
    for f, struct in (
        (lambda w, x: (x @ w).real, INPUT),
        (lambda w, x: x @ w, jax.ShapeDtypeStruct(INPUT.shape, jnp.complex64)),
    ):
        agrees(f, measured({"": f}, normal, struct, 100)[""], normal, struct)
    given = np.asarray(normal(jax.random.key(3)))
    row = predict(lambda w, x: x @ w, INPUT, params=given, backward=False).output
    assert row.second_moment == pytest.approx(WIDTH * np.mean(np.abs(given) ** 2), rel=row.error_bound)


TRANSFORMS = {
    "fft": lambda w, x: jnp.fft.fft(x @ w[0]).real,
    "fft of a mean": lambda w, x: jnp.fft.fft(1 + x @ w[0]).real,
    "ifft": lambda w, x: jnp.fft.ifft(1 + x @ w[0]).imag,
    "rfft": lambda w, x: jnp.fft.rfft(x @ w[0]).imag,
    "padded": lambda w, x: jnp.fft.rfft(x @ w[0], n=2 * WIDTH).real,
    "cut": lambda w, x: jnp.fft.rfft(x @ w[0], n=WIDTH // 2).real,
    "fft2": lambda w, x: jnp.fft.fft2(jax.nn.relu(x @ w[0])).real,
    "irfft": lambda w, x: jnp.fft.irfft(jnp.fft.rfft(jax.nn.relu(x @ w[0]))),
    "one frequency": lambda w, x: jnp.fft.rfft(x @ w[0], n=1).real,
    "spectral convolution": lambda w, x: jnp.fft.irfft(jnp.fft.rfft(x, axis=0) @ (w[0] + 1j * w[1]), axis=0),
}


@pytest.fixture(scope="module")
def transforms():
    return measured(TRANSFORMS, weights, INPUT, 200)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_fourier_transforms(name, transforms):
    agrees(TRANSFORMS[name], transforms[name])


def linear(a, b):
    return a[0] * b[0], b[0] * a[1] + b[1]


@pytest.mark.parametrize("length", [3, 4, 5, 16, 33])
@pytest.mark.parametrize("reverse", [False, True])
def test_scans_are_drawn(length, reverse):
    """Whatever the length: of running sums of independent numbers E[y²] = (T + 1)/2."""
    f = lambda w, x: jax.lax.associative_scan(jnp.add, x, axis=1, reverse=reverse)  # noqa: E731
    row = predict(f, jax.ShapeDtypeStruct((8, length, 32), jnp.float32), params={}, backward=False).output
    assert (row.how, row.second_moment) == ("sampled", pytest.approx((length + 1) / 2, rel=row.error_bound))


def test_what_only_looks_like_a_scan_is_left_alone():
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    for f in (lambda w, x: x[:, ::2] + x[:, 1::2], lambda w, x: jnp.stack([-x[:, 1::2], x[:, ::2]], -1).reshape(8, 16)):
        assert predict(f, x, params={}, backward=False).output.how != "sampled"


SERIES = jax.ShapeDtypeStruct((4, 24, WIDTH), jnp.float32)


def decays(key):
    return {"w": weights(key), "rate": jax.random.uniform(jax.random.fold_in(key, 1), (WIDTH,), minval=0.2, maxval=0.9)}


def scanned(a, b):
    return jax.lax.associative_scan(linear, (jnp.broadcast_to(a, b.shape), b), axis=1)[1]


RECURRENCES = {
    "decay": lambda p, x: scanned(p["rate"], x @ p["w"][0]),
    "normalised by its own decay": lambda p, x: scanned(p["rate"], jnp.sqrt(1 - p["rate"] ** 2) * (x @ p["w"][0])),
    "complex": lambda p, x: scanned(p["rate"] * jnp.exp(2j * p["rate"]), x @ (p["w"][0] + 1j * p["w"][1])).imag,
    "gated": lambda p, x: scanned(jax.nn.sigmoid(x @ p["w"][1]), x @ p["w"][0]),
    "last": lambda p, x: scanned(p["rate"], x @ p["w"][0])[:, -1],
    "maximum": lambda p, x: jax.lax.associative_scan(jnp.maximum, x @ p["w"][0], axis=1),
    "products": lambda p, x: jax.lax.associative_scan(jnp.multiply, 1 + 0.1 * (x @ p["w"][0]), axis=1),
}


@pytest.fixture(scope="module")
def recurrences():
    return measured(RECURRENCES, decays, SERIES, 100)


@pytest.mark.parametrize("name", RECURRENCES)
def test_recurrences(name, recurrences):
    """Where rates and the norms of inputs are taken for independent, the normalised decay is off by half."""
    agrees(RECURRENCES[name], recurrences[name], decays, SERIES, extra=0.02)


class Recurrent(nn.Module):
    """A linear recurrence between two dense layers, its rates a parameter."""

    @nn.compact
    def __call__(self, x):
        rate = jax.nn.sigmoid(self.param("rate", nn.initializers.normal(1.0), (WIDTH,)))
        x = nn.Dense(WIDTH, name="before")(x)
        return nn.Dense(WIDTH, name="after")(scanned(rate, x))


def test_gradients_pass_back_through_time():
    """50 draws: the gradient at a recurrence's input is Σ a^2k of what comes in, within the bound and 4 standard errors."""
    from experiments.benchmarks import accuracy

    rows, _, _ = accuracy.compare(accuracy.Case("", "recurrent", Recurrent(), SERIES.shape), 50)
    assert [row.path for row in rows if row.gradient_outside or row.outside] == []
    (before,) = (row for row in rows if row.path == "before")
    assert before.gradient_error_bound is not None
    assert before.gradient_error_bound < 0.25


class Unit(nn.Module):
    """A linear recurrence with rates up to 1 behind a layer norm (Orvieto et al. 2023): its input is scaled by √(1 − |λ|²)."""

    @nn.compact
    def __call__(self, x):
        n = x.shape[-1]
        nu = self.param("nu", lambda key: -0.5 * jnp.log(jax.random.uniform(key, (n,))))
        theta = self.param("theta", lambda key: 6.28 * jax.random.uniform(key, (n,)))
        gain = self.param("gain", lambda _: jnp.sqrt(1 - jnp.exp(-2 * nu)))
        init = nn.initializers.variance_scaling(0.5, "fan_in", "normal")
        weights = (self.param("re", init, (n, n)) + 1j * self.param("im", init, (n, n))) * gain[None]
        return scanned(jnp.exp(-nu + 1j * theta), nn.LayerNorm()(x) @ weights).real


class Gated(nn.Module):
    """A convolution and a recurrence whose rates follow it (De et al. 2024), twice, around a stream."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            n = x.shape[-1]
            h = nn.Conv(n, (4,), padding=[(3, 0)], feature_group_count=n)(nn.RMSNorm()(x))
            decay = self.param(f"decay_{_}", lambda key, n=n: jax.random.uniform(key, (n,), minval=0.02, maxval=0.2))
            log_rate = -8 * decay * jax.nn.sigmoid(nn.Dense(n)(h))
            gate = jax.nn.sigmoid(nn.Dense(n)(h))
            x = x + nn.gelu(scanned(jnp.exp(log_rate), jnp.sqrt(1 - jnp.exp(2 * log_rate)) * gate * h))
        return x


@pytest.mark.parametrize("model", [nn.Sequential([Unit(), Unit()]), Gated()], ids=["norms", "gates"])
def test_layers_are_drawn_together(model):
    """40 draws, four standard errors. A scale drawn apart from what it divides made the second norm's layer 34 for 1/2."""
    from experiments.benchmarks import accuracy

    with jax.numpy_dtype_promotion("standard"):
        rows, _, _ = accuracy.compare(accuracy.Case("", "recurrent", model, (4, 32, 32)), 40, backward=False)
    assert [row for row in rows if abs(row.mean) > row.error_bound + 4 * row.forward_error] == []
    assert max(row.error_bound for row in rows) < 0.15
    assert np.mean([row.coverage for row in rows]) > 0.9
