"""Regions: what no rule covers is drawn jointly with all that it reads, and goes on as any other array."""

import math

import drawn
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.extend.core import Primitive

import varscale as vs
from varscale.theory.graph.store import PredictionError
from varscale.theory.rules.region_sizes import every_equation, has_own_kernels
from varscale.theory.rules.registry import RULES

SAMPLES, WIDTH, DEPTH = 16, 32, 3
X = jax.ShapeDtypeStruct((SAMPLES, WIDTH), jnp.float32)


def kernels(key):
    return vs.normal(WIDTH**-0.5)(key, (DEPTH, WIDTH, WIDTH))


def region(kernel, x):
    """A branch that depends on random numbers."""
    return jax.lax.cond(jnp.mean(x) > 0, lambda x: jnp.tanh(x @ kernel), lambda x: 1.5 * jnp.tanh(x @ kernel), x)


def beside_its_input(kernels, x):
    return x + region(kernels[0], x)


def twice_with_tied_weights(kernels, x):
    return region(kernels[0], x) + region(kernels[0], -x)


def inside_a_scan(kernels, x):
    return jax.lax.scan(lambda x, kernel: (x + region(kernel, x), None), x, kernels)[0]


def rows_with_rows(kernels, x):
    """Of the entries of a product of an array with itself those where a row meets itself are larger."""
    h = x @ kernels[0]
    return h @ h.T


def branch_that_ends_in_fresh_weights(kernels, x):
    """Linear in weights of its own, whatever axes they are read over: unrelated to the stream that it is added to."""
    with jax.named_scope("branch"):
        y = region(kernels[0], x) @ kernels[1]
    return x.reshape(SAMPLES, 4, -1) + y.reshape(SAMPLES, 4, -1)


def decoder_with_tied_weights(kernels, x):
    """Weights that a region reads were applied before it: it is the scope around both that is drawn."""
    h = jnp.tanh(x @ kernels[0])
    with jax.named_scope("decoder"):
        return region(kernels[0].T, h)


@pytest.mark.parametrize(
    "model",
    [
        beside_its_input,
        twice_with_tied_weights,
        inside_a_scan,
        rows_with_rows,
        branch_that_ends_in_fresh_weights,
        decoder_with_tied_weights,
    ],
)
def test_region(model):
    row = vs.predict(model, X, params=kernels).output

    def one(key):
        k_weights, k_input = jax.random.split(key)
        return jnp.mean(model(kernels(k_weights), jax.random.normal(k_input, X.shape)) ** 2)

    measured, error = drawn.drawn(one, 400)
    assert row.how == "sampled"
    assert drawn.agrees(row.second_moment, row.error_bound, measured, error), (row, measured, error)


def test_region_is_known_to_its_bound():
    row = vs.predict(lambda kernels, x: region(kernels[0], x), X, params=kernels, backward=False).output
    assert row.error_bound < 0.2
    assert vs.predict(branch_that_ends_in_fresh_weights, X, params=kernels, backward=False).output.error_bound < 0.15


@pytest.mark.parametrize("nearest", [True, False])
def test_the_nearest_row_is_no_row_like_others(nearest):
    """A code book: the row nearest to x is near it; one that something else picks is any row."""

    def f(params, x, y):
        book = params["book"]
        by = x if nearest else y
        index = jnp.argmin(jnp.sum(by**2, -1, keepdims=True) - 2 * by @ book.T + jnp.sum(book**2, -1)[None], axis=-1)
        return book[index] - x

    def one(key):
        k_book, *k_inputs = jax.random.split(key, 3)
        book = {"book": jax.random.normal(k_book, (32, 8))}
        return jnp.mean(f(book, *(jax.random.normal(k, (64, 8)) for k in k_inputs)) ** 2)

    given = vs.inputs(jax.ShapeDtypeStruct((64, 8), jnp.float32), jax.ShapeDtypeStruct((64, 8), jnp.float32))
    row = vs.predict(f, given, params=lambda key: {"book": jax.random.normal(key, (32, 8))}, backward=False).output
    assert row.how == "sampled"
    assert row.error_bound < 0.15
    assert drawn.agrees(row.second_moment, row.error_bound, *drawn.drawn(one, 200))


def test_one_array_at_two_scales_is_drawn_at_both():
    """Both have the same random numbers, so that the products of two entries are (3/2)² times as large, exactly."""

    def products(kernels, x):
        y = (x @ kernels[0])[:, :2]
        return [jnp.cumprod(c * y, axis=1)[:, 1] for c in (2.0, 3.0)]

    small, large = vs.predict(products, X, params=kernels, backward=False).rows
    assert large.second_moment / small.second_moment == pytest.approx(1.5**4, rel=1e-4)


def test_known_numbers_that_are_tiled_are_read_as_they_are():
    """E[max(z₁, z₂, 0)²] = 3/4 + 1/(2π): as numbers drawn with the moments of the spikes they had a bound of 10,000 %."""

    def largest(kernels, x):
        spikes = jnp.tile(jnp.where(jnp.arange(4) == 0, 4.0, 0.0), 2)[None]
        with jax.named_scope("largest"):
            return jnp.sort((x @ kernels[0])[:, :8] * spikes, axis=-1)[:, -1]

    row = vs.predict(largest, X, params=kernels, backward=False).output
    assert (row.how, row.second_moment) == ("sampled", pytest.approx(12 + 8 / math.pi, rel=row.error_bound))
    assert row.error_bound < 0.15


class Diagonal(nn.Module):
    """A weight a unit, and what no rule covers."""

    @nn.compact
    def __call__(self, x):
        d = self.param("d", nn.initializers.normal(1.0), (x.shape[-1],))
        return jnp.fft.ifft(jnp.fft.fft(x * d[None, None], axis=1), axis=1).real


class Halves(nn.Module):
    """Functions of one region's output at several places, and of two that read one array."""

    @nn.compact
    def __call__(self, x):
        y = nn.relu(Diagonal()(x))
        return y.mean(axis=1), y + nn.relu(Diagonal()(x))


def test_functions_of_what_regions_drew_are_not_independent_where_their_squares_are_not():
    """Given d or x, of unit variance, relu(d x) has mean |d| or |x| over √(2π): 34 % and 8 % too low by covariances alone."""
    places = 64
    report = vs.predict(Halves(), jax.ShapeDtypeStruct((4, places, WIDTH), jnp.float32), backward=False)
    averaged, added = report["[0]"], report["[1]"]
    expected = (1 - 1 / places) / (2 * math.pi) + 0.5 / places
    assert averaged.second_moment == pytest.approx(expected, rel=averaged.error_bound)
    assert added.second_moment == pytest.approx(1 + 1 / math.pi, rel=0.05)


def test_an_equation_that_a_rule_does_not_cover_is_drawn(monkeypatch):
    def rule(interpreter, eqn, x):
        raise NotImplementedError("sines of arrays")

    monkeypatch.setitem(RULES, "sin", rule)
    row = vs.predict(lambda kernels, x: jnp.sin(x @ kernels[0]), X, params=kernels, backward=False).output
    assert (row.how, row.second_moment) == ("sampled", pytest.approx((1 - math.exp(-2)) / 2, rel=row.error_bound))


def test_what_even_draws_cannot_cover_is_an_error():
    """A primitive that cannot be run: the error says which, where, and what to do."""
    strange = Primitive("strange")
    strange.def_abstract_eval(lambda x: x)
    with pytest.raises(PredictionError, match=r"'strange' at test_sampled_regions\.py"):
        vs.predict(lambda kernels, x: strange.bind(x @ kernels[0]), X, params=kernels)


def test_a_walk_skips_what_it_has_asked_to_draw(monkeypatch):
    """Once an equation without a rule has asked for the whole model, no rule is entered: all is drawn."""
    entered = []
    inner = RULES["tanh"]
    monkeypatch.setitem(RULES, "tanh", lambda *args: entered.append(1) or inner(*args))
    report = vs.predict(lambda w, x: jnp.tanh(jnp.sort(x @ w[0], axis=-1)), X, params=kernels, backward=False)
    assert any("the whole model" in note for note in report.notes)
    assert not entered


class Scaled(nn.Module):
    """A scale of places that is known, or one of samples that is drawn, in front of a norm."""

    of_samples: bool = False

    @nn.compact
    def __call__(self, x):
        x = jnp.fft.ifft(jnp.fft.fft(x, axis=1), axis=1).real
        return x * (jnp.exp(x[:, :1, :1] / 2) if self.of_samples else jnp.exp(-jnp.arange(64) / 30)[None, :, None])


def test_gradients_at_places_that_differ_in_scale_before_a_norm():
    x = jax.ShapeDtypeStruct((4, 64, WIDTH), jnp.float32)
    nets = (nn.Sequential([nn.Dense(WIDTH), Scaled(own), nn.LayerNorm(), nn.Dense(4)]) for own in (False, True))
    known, unsure = (vs.predict(net, x, draws=60) for net in nets)
    for report in (known, unsure):
        assert report["layers_1"].gradient_holds
        assert report["layers_2"].second_moment == pytest.approx(1, rel=0.01)
    assert known["layers_1"].gradient_error_bound < 0.4
    assert unsure["layers_1"].gradient_error_bound > 0.5


def test_a_loop_that_is_written_out_is_drawn():
    def steps(kernels, x):
        h = jnp.zeros((SAMPLES, WIDTH))
        for _ in range(12):
            h = 0.9 * h + jnp.tanh(x + h @ kernels[0])
        return h

    assert "the whole model" in vs.predict(steps, X, params=kernels).notes[0]


def test_kernels_of_each_sample_are_differentiated_draw_by_draw():
    def convolved(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    def own(kernels, x):
        with jax.named_scope("convolution"):
            return jax.vmap(convolved)(x.reshape(-1, 2, 8, 2), (x @ kernels[0]).reshape(-1, 4, 2, 4))

    equations = jax.make_jaxpr(own)(kernels(jax.random.key(0)), jnp.ones(X.shape))
    assert any(map(has_own_kernels, every_equation(equations.jaxpr)))
    assert vs.predict(own, X, params=kernels).output.how == "sampled"
