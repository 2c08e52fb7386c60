"""Gradients of values that a cotangent reaches by two paths, held against drawn networks, and windows over copied places."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs
from varscale.theory.domain.axes import Axis
from varscale.theory.graph.layout import merge
from varscale.theory.graph.nodes import Graph, leaf
from varscale.theory.graph.normal_form import broadcast
from varscale.theory.propagation.pullbacks import copies, repeats

INPUT = jax.ShapeDtypeStruct((32, 64), jnp.float32)
WEIGHTS = {name: vs.Moments(0.0, 1 / 64, (64, 64)) for name in ("m", "h")}


def kl(m, h):
    return -0.5 * jnp.sum(1 + h - m**2 - jnp.exp(h), -1)


def highway(m, h):
    gate = jax.nn.sigmoid(h)
    return gate * jax.nn.relu(m) + (1 - gate) * jax.nn.relu(m[:, ::-1])


FUNCTIONS = {
    "through a function, subtracted": lambda m, h: (m + h) - jnp.exp(h),
    "through a function, added": lambda m, h: m + h + jax.nn.relu(h),
    "through means": kl,
    "a gate": highway,
    "through a sum inside a function": lambda m, h: h + jax.nn.relu(m + h),
    "through two sums": lambda m, h: jnp.tanh((m + h) + (h + m[:, ::-1])),
    "two functions": lambda m, h: jnp.tanh(h) * m + jax.nn.relu(h) * m[:, ::-1],
}
BESIDE_REDUCTIONS = {
    "mean": lambda m, h: h + 3 * h.mean(-1, keepdims=True),
    "log sum exp": lambda m, h: jax.nn.log_softmax(h[:, :4]),
    "largest": lambda m, h: h[:, :4] - h[:, :4].max(-1, keepdims=True),
}


def predicted(function):
    """The row of h."""

    def net(p, x):
        with jax.named_scope("m"):
            m = x @ p["m"]
        with jax.named_scope("h"):
            h = x @ p["h"]
        return function(m, h)

    return vs.predict(net, INPUT, params=WEIGHTS, draws=60)["h"]


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_gradients_of_paths_that_meet_are_correlated(function):
    # Fixed draws: a sound row misses its bound and four standard errors once in 16000 times; each of these was off by a third
    # at least where paths were taken for independent.
    row = predicted(function)
    assert row.gradient_holds
    assert row.gradient == pytest.approx(row.measured_gradient, rel=0.15)


@pytest.mark.parametrize("function", BESIDE_REDUCTIONS.values(), ids=BESIDE_REDUCTIONS)
def test_gradients_beside_reductions_are_in_doubt(function):
    assert predicted(function).gradient_holds


# Windows over places that are copies, or averages, of the same numbers: drawn, within their bounds of what is exact.
def blurred_after(enlarge):
    def pools(x):
        return nn.avg_pool(enlarge(x), (3, 3), (1, 1))

    return pools


PROGRAMS = {
    "blur, then down": lambda x: nn.avg_pool(nn.avg_pool(x, (3, 3), (1, 1)), (2, 2), (2, 2)),
    "up, then blur": blurred_after(lambda x: jax.image.resize(x, (x.shape[0], 16, 16, x.shape[3]), "nearest")),
    "smoothly up, then blur": blurred_after(lambda x: jax.image.resize(x, (x.shape[0], 16, 16, x.shape[3]), "bilinear")),
}


@pytest.mark.parametrize("name", PROGRAMS)
@jax.numpy_dtype_promotion("standard")  # flax divides by an integer
def test_gradients_of_windows_over_copies_are_those_of_the_jacobian(name):
    """g_x = Jᵀ g with g of mean square 1: its mean square is |J|² over the places of x."""

    def net(p, x):
        with jax.named_scope("h"):
            h = x * p
        return PROGRAMS[name](h)

    row = vs.predict(net, jax.ShapeDtypeStruct((2, 8, 8, 4), "float32"), params=jnp.ones((1, 1, 1, 4)) * 1.5)["h"]
    jacobian = jax.jacobian(lambda x: PROGRAMS[name](x[None, ..., None]))(jnp.zeros((8, 8)))
    exact = float(np.sum(np.square(jacobian)) / 64)
    assert abs(row.gradient / exact - 1) < row.gradient_error_bound < 0.25


@jax.numpy_dtype_promotion("standard")
def test_pixels_shuffled_out_of_repeated_kernels_are_equal():
    """ICNR: each block of four is one number, so that its mean is that number."""

    def repeated(key, shape, dtype=jnp.float32):
        return jnp.repeat(nn.initializers.lecun_normal()(key, (*shape[:-1], shape[-1] // 4), dtype), 4, -1)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Conv(128, (1, 1), kernel_init=repeated)(x)
            b, n, m, c = h.shape
            h = h.reshape(b, n, m, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(b, 2 * n, 2 * m, c // 4)
            return nn.avg_pool(h, (2, 2), (2, 2))

    row = vs.predict(Net(), jax.ShapeDtypeStruct((2, 4, 4, 32), "float32"), backward=False).output
    assert abs(row.second_moment - 1) < row.error_bound < 0.25


def test_values_less_their_mean_beside_another_term():
    """A dueling head: of v + a − mean(a) the gradient at a is (1 − 1/n) of the output's, and that at v n times as large."""

    class Dueling(nn.Module):
        @nn.compact
        def __call__(self, x):
            a = nn.Dense(6)(x)
            return jnp.broadcast_to(nn.Dense(1)(x), a.shape) + a - a.mean(-1, keepdims=True)

    report = vs.predict(Dueling(), INPUT)
    assert report["Dense_0"].gradient == pytest.approx(1 - 1 / 6, rel=1e-6)
    assert report["Dense_1"].gradient == pytest.approx(6, rel=1e-6)


class Gated(nn.Module):
    """Blocks x + relu((1 + g) y + b), y normalised over samples and places, g and b of the sample; then a pool."""

    pool: str

    @nn.compact
    def __call__(self, x, condition):
        x = nn.Dense(16)(x)
        for _ in range(2):
            g, b = (y[:, None] for y in jnp.split(nn.Dense(32)(condition), 2, -1))
            y = nn.BatchNorm(use_running_average=False, use_scale=False, use_bias=False)(nn.Dense(16)(x))
            x = x + nn.relu(y + jnp.broadcast_to(g, y.shape) * y + jnp.broadcast_to(b, y.shape))
        return nn.Dense(5)(getattr(x, self.pool)(1))


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_gates_of_what_is_centred(pool):
    """Places apart have nothing in common in the gate's slope y, so no ratio to it; a maximum passes on what is large."""
    given = vs.inputs(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 16, 8), (4, 8))))
    report = vs.predict(Gated(pool), given, draws=100)
    assert all(row.gradient_holds and row.gradient_error_bound < 0.5 for row in report)


def test_networks_on_smooth_pictures_are_drawn():
    """v = w'Σw of a channel has few terms that count, and E[1/v] is some times 1/E[v]; of noise it has many."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(nn.Conv(16, (3, 3), use_bias=False)(x))

    waves = np.cos(np.linspace(0, 3, 16))
    picture = (waves[:, None] * waves)[None, :, :, None] * np.random.default_rng(0).normal(size=(4, 1, 1, 3))
    row = vs.predict(Net(), picture.astype(np.float32))["Conv_0"]  # 100 draws: 20.4 ± .5
    assert row.how == "sampled"
    assert abs(row.gradient - 20.4) < row.gradient_error_bound * 20.4 + 4 * 0.5
    assert vs.predict(Net(), jax.ShapeDtypeStruct((4, 16, 16, 3), "float32"))["Conv_0"].gradient_error_bound < 0.25


def test_copies_are_counted():
    graph = Graph()
    x = leaf(graph, ("input", 0), [Axis(5), Axis(3)], 0.0, 1.0, odd=True)
    repeated = merge(broadcast(x, (*x.axes, Axis(4))), 1, 2)
    assert copies(repeated) == 4
    assert repeats(repeated)
    assert copies(merge(x, 0, 2)) == 1
    assert not repeats(merge(x, 0, 2))


class AddedAtAllPlaces(nn.Module):
    """A vector that is added at all places, in front of a norm over places and groups of four features."""

    @nn.compact
    def __call__(self, x, t):
        x = nn.Dense(16)(x) + nn.Dense(16, name="time")(t)[:, None, :]
        x = x.reshape(*x.shape[:2], 4, 4)
        return nn.Dense(8)(x - x.mean((1, 3), keepdims=True))


def test_what_is_added_at_all_places_is_centred_with_them():
    x = vs.inputs(jax.ShapeDtypeStruct((4, 64, 16), "float32"), jax.ShapeDtypeStruct((4, 8), "float32"))
    row = vs.predict(AddedAtAllPlaces(), x)["time"]
    # At each of 64 places the gradient's mean square is 8/4, and 1/4 of what they add up to is taken away.
    assert row.gradient == pytest.approx(64 * 2 * (1 - 1 / 4), rel=row.gradient_error_bound)
    assert row.gradient_error_bound < 0.15


class Conditioned(AddedAtAllPlaces):
    """The same in front of a norm."""

    groups: int

    @nn.compact
    def __call__(self, x, t):
        return nn.GroupNorm(self.groups)(nn.Dense(16)(x) + 2 * nn.Dense(16, name="time")(t)[:, None, :])


@pytest.mark.parametrize("groups", [1, 4])
def test_what_is_added_at_all_places_before_a_norm_over_places(groups):
    x = vs.inputs(jax.ShapeDtypeStruct((4, 64, 16), "float32"), jax.ShapeDtypeStruct((4, 64), "float32"))
    row = vs.predict(Conditioned(groups), x, draws=200)["time"]
    assert abs(row.gradient / row.measured_gradient - 1) < 0.1 + 4 * row.measured_gradient_error / row.measured_gradient


def _local_mean(x, **options):
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", **options)


WINDOWED = {
    "less its local mean": lambda x: x - _local_mean(x),
    "less its local mean, of what is inside": lambda x: x - _local_mean(x, count_include_pad=False),
    "twice, beside": lambda x: 2 * x - _local_mean(x),
}


@jax.numpy_dtype_promotion("standard")  # flax divides by an integer
@pytest.mark.parametrize("name", WINDOWED)
def test_gradients_beside_windows_are_in_doubt(name):
    """Of y = B x with white x and cotangents E[y²] and E[g²] are means over rows and columns of B²; 12 to 30 % off untold."""
    jacobian = np.asarray(jax.jacobian(WINDOWED[name])(jnp.zeros((1, 12, 12, 1))))
    exact = float((jacobian**2).sum() / 12**2)

    def model(p, x):
        with jax.named_scope("first"):
            x = jnp.einsum("bijc,cd->bijd", x, p)
        return WINDOWED[name](x)

    struct = jax.ShapeDtypeStruct((8, 12, 12, 16), jnp.float32)
    report = vs.predict(model, struct, params=lambda key: jax.random.normal(key, (16, 16)) / 4)
    assert report.output.second_moment == pytest.approx(exact, rel=report.output.error_bound)
    row = report["first"]
    assert abs(row.gradient - exact) <= row.gradient_error_bound * max(exact, row.gradient)
    assert row.gradient_error_bound < 1
