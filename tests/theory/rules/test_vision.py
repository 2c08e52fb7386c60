"""What models of pictures and of graphs ask of the rules: windows, slices that meet, borders, masks, groups, maxima."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs
from varscale.theory.domain.axes import MOST_TYPES, Axis, affordable, average, labelled
from varscale.theory.domain.tables import Table, estimate, lift

PICTURE = jax.ShapeDtypeStruct((8, 16, 16), jnp.float32)


def test_classes_given_up_leave_exact_averages():
    """A table over coarser classes is that of the array itself over them, whether or not they are nested."""
    values = np.random.default_rng(0).normal(size=(6, 5, 3)) + np.arange(6.0)[:, None, None]
    fine = (labelled([0, 0, 1, 1, 2, 2]), labelled([0, 1, 1, 1, 0]), Axis(3))
    for other in (Axis(6), labelled([0, 0, 0, 1, 1, 1])):
        coarse = (other, Axis(5), Axis(3))
        own, expected = estimate(values, fine), estimate(values, coarse)
        kept = {"mean": (own.mean, False), "second": (own.second, True)}
        table = Table(coarse, **{name: lift(a, fine, range(3), coarse, pairs=p) for name, (a, p) in kept.items()})
        if other.labels is None:
            np.testing.assert_allclose(table.mean, expected.mean)
            np.testing.assert_allclose(table.second, expected.second)
        assert table.mean_square == pytest.approx(expected.mean_square)
        whole, truth = (average(x.second, coarse, free=range(3)) for x in (table, expected))
        assert whole == pytest.approx(truth)


def test_an_array_of_windows_is_affordable():
    axes = (Axis(2), *[labelled([0, 1, 1, 0])] * 12)
    assert math.prod(a.types for a in axes) > 1e9
    kept = affordable(axes)
    assert math.prod(a.types for a in kept) <= MOST_TYPES
    assert [a.size for a in kept] == [a.size for a in axes]
    assert affordable(axes[:4]) == axes[:4]


def shifted(p, x):
    y = x + p["position"]
    return {
        "sum": (jnp.roll(y, 3, 1) + y).mean(1),
        "whole": jnp.roll(y, 3, 1).mean(1),
        "twice": jnp.roll(y, 3, 1)[:, 2:9].mean(1),
    }


def joined(p, x):
    y = jnp.concatenate([jnp.broadcast_to(p["token"], (8, 1, 16)), x], 1)
    z = jnp.concatenate([y[:, :1] + p["position"][:, :1], y[:, 1:] + p["position"]], 1)
    return {"all": z.mean(1), "across": (z[:, :5] + z[:, 5:10]).mean(1)}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (shifted, {"sum": 4 * 2 / 16, "whole": 2 / 16, "twice": 2 / 7}),
        (joined, {"all": (17 * 2 + 2 * 1) / 17**2, "across": (1 + 9 + 4 + 8) / 25}),
    ],
)
def test_slices_of_one_axis_meet_where_they_overlap(model, expected):
    """Mean squares of averages of independent numbers; `all`: the first position is added to the token and to the second."""
    params = {"position": (1, 16, 16), "token": (1, 1, 16)}
    draw = lambda key: {k: jax.random.normal(jax.random.fold_in(key, i), s) for i, (k, s) in enumerate(params.items())}  # noqa: E731
    report = vs.predict(model, PICTURE, params=draw, backward=False)
    for row in report.rows:
        name = row.path.strip("[].'\"")
        assert row.second_moment == pytest.approx(expected[name], rel=1e-5), row.path
        assert row.how != "assumed"


def test_maxima_at_borders_are_of_fewer_numbers():
    def pooled(_, x):
        return nn.max_pool(x, (3, 3), (2, 2), "SAME")

    def square(n):  # of the largest of n normals
        z = np.linspace(-8, 8, 4001)
        share = 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
        return float(np.diff(share**n, prepend=0.0) @ z**2)

    report = vs.predict(pooled, jax.ShapeDtypeStruct((4, 8, 8, 32), jnp.float32), params={}, backward=False)
    expected = (9 * square(9) + 6 * square(6) + square(4)) / 16  # the last window of four, along each axis, has two places
    assert report.rows[-1].second_moment == pytest.approx(expected, rel=0.01)


def test_entries_of_a_segment_that_are_one_number_have_that_for_their_maximum():
    receivers = np.concatenate([np.arange(20), np.random.default_rng(0).integers(0, 20, 60)])

    def model(p, x):
        return jax.ops.segment_max((x @ p)[receivers], receivers, 20)

    shape = jax.ShapeDtypeStruct((20, 64), jnp.float32)
    report = vs.predict(model, shape, params=lambda key: jax.random.normal(key, (64, 64)) / 8, backward=False)
    assert report.rows[-1].second_moment == pytest.approx(1.0, rel=0.02)
    assert abs(report.rows[-1].mean) < 0.02


def attention(mask):
    def model(_, x):
        return nn.softmax(jnp.einsum("bqd,bkd->bqk", x, x) / 4 + mask) @ x

    return model


def test_a_mask_need_not_be_infinite():
    """Windows that meet mask with −100."""
    part = np.arange(16) < 10
    known = np.where(part[:, None] == part, 0.0, -1.0)
    rows = [vs.predict(attention((known * m)[None]), PICTURE, params={}, backward=False).rows[-1] for m in (100.0, 1e9)]
    assert rows[0].second_moment == pytest.approx(rows[1].second_moment, rel=1e-6)


def test_the_sign_bit_is_a_function_like_any_other():
    report = vs.predict(lambda _, x: jnp.copysign(jnp.abs(x) + 1.0, x), PICTURE, params={}, backward=False)
    assert report.rows[-1].second_moment == pytest.approx(2 + 2 * math.sqrt(2 / math.pi), rel=1e-3)
    assert report.rows[-1].mean == pytest.approx(0.0, abs=1e-6)


class Depthwise(nn.Module):
    """What a batch norm and a rectifier make of sums of 5 x 5 terms, less its mean, averaged over the picture."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(64, (1, 1))(x))
        y = nn.Conv(64, (5, 5), feature_group_count=64, use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=False)(y))
        return (y - y.mean((0, 1, 2), keepdims=True)).mean((1, 2))


def test_places_of_a_depthwise_convolution_share_more_given_its_weights():
    """The mean square of a mean over a picture: independent places would have 25 % less. Error rate: 4 standard errors."""
    x = jax.ShapeDtypeStruct((8, 12, 12, 3), jnp.float32)
    model = Depthwise()

    def drawn(key):
        own, data = jax.random.split(key)
        numbers = jax.random.normal(data, x.shape)
        variables = model.init(own, numbers)
        return jnp.mean(model.apply(variables, numbers, mutable=["batch_stats"])[0] ** 2)

    squares = np.asarray(jax.jit(lambda keys: jax.lax.map(drawn, keys))(jax.random.split(jax.random.key(0), 80)), float)
    error = squares.std() / math.sqrt(len(squares) - 1) / squares.mean()
    assert error < 0.025, "the test has lost its power"
    predicted = vs.predict(model, x, backward=False).rows[-1].second_moment
    assert abs(predicted / squares.mean() - 1) <= 4 * error + 0.05, (predicted, squares.mean(), error)


def test_a_depthwise_sum_reads_one_channel():
    """The scale of one output varies with the numbers of its own channel alone, not with the mean over all."""
    from varscale.theory.propagation import fluctuations

    own = []
    for groups in (1, 8, 64):
        model = nn.Sequential([nn.Conv(64, (1, 1)), nn.relu, nn.Conv(64, (3, 3), feature_group_count=groups), nn.gelu])
        seen = []
        original = fluctuations.of_a_group
        fluctuations.of_a_group = lambda *a, f=original, s=seen: s.append(f(*a)) or s[-1]
        try:
            vs.predict(model, jax.ShapeDtypeStruct((4, 16, 16, 64), jnp.float32), backward=False)
        finally:
            fluctuations.of_a_group = original
        own.append(max(seen))
    assert own[2] > 4 * own[1] > own[0] == 0


@pytest.mark.parametrize("init", ["lecun_normal", "normal", "uniform"])
def test_laws_of_weights_in_double_precision(init):
    """Bits of 64 are drawn with the law of bits of 32."""
    kernel = getattr(jax.nn.initializers, init)()
    found = []
    for x64, dtype in ((False, jnp.float32), (True, jnp.float64)):
        with jax.enable_x64(x64):
            model = nn.Dense(64, kernel_init=kernel, dtype=dtype, param_dtype=dtype)
            found.append(vs.predict(model, jax.ShapeDtypeStruct((8, 32), dtype), backward=False).rows[-1])
    assert found[1].second_moment == pytest.approx(found[0].second_moment, rel=1e-5)
    assert found[0].second_moment > 0


@pytest.mark.parametrize(("init", "expected"), [(nn.initializers.normal(1.0), 1.0), (nn.initializers.zeros, 16 / 17)])
def test_a_norm_over_a_class_token_and_patches_makes_each_one(init, expected):
    """Of 17 tokens; a token of zeros stays one. Joined arrays have their axes in another order than their norm's."""

    class Tokens(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(64)(x)
            token = self.param("token", init, (1, 1, 64))
            return nn.LayerNorm()(jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1))

    output = vs.predict(Tokens(), jax.ShapeDtypeStruct((4, 16, 32), jnp.float32), backward=False).output
    assert output.second_moment == pytest.approx(expected, rel=1e-4)


def test_borders_keep_classes_of_their_own_where_there_are_too_many():
    """Behind several convolutions each place differs a little from the next, and the outermost from all: it has fewer taps."""
    from varscale.theory.graph.convolutions import Window, output_axis

    for size in (8, 12):
        labels = output_axis(Window(size, 3, 1, 1, 1, 1), labelled(np.arange(size))).label_array
        for edge in (0, size - 1):
            assert set(np.flatnonzero(labels == labels[edge])) <= {0, size - 1}
