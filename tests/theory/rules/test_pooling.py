"""Windows over places of which near ones are more alike than any two: pictures are drawn, overlapping windows are in doubt."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

import varscale as vs


def photographs(*shape, smooth=2.0):
    """Noise, smoothed: neighbours have a correlation of .94."""
    x = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=shape), (0, smooth, smooth, 0), mode="wrap")
    return jnp.asarray(x / x.std(), jnp.float32)


class Pooled(nn.Module):
    """Two pools, the first over windows of three, `stride` apart."""

    stride: int
    pool: Callable[..., jax.Array] = nn.avg_pool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(24)(nn.avg_pool(nn.relu(nn.Conv(24, (3, 3))(x)), (3, 3), (self.stride, self.stride)))
        return nn.Dense(32)(self.pool(x, (2, 2), (1, 1)))


@jax.numpy_dtype_promotion("standard")  # flax divides by an integer
def test_pools_of_pictures_are_drawn():
    """Fixed draws: a sound row misses its bound and four standard errors once in 16000 times; one for noise misses it here."""
    x, model = photographs(8, 8, 8, 3), Pooled(2, nn.max_pool)
    row = vs.predict(model, x, backward=False, draws=200).output
    noise = vs.predict(model, jax.ShapeDtypeStruct(x.shape, x.dtype), backward=False).output
    assert row.how == "sampled"
    assert row.error_bound < 0.25
    assert row.holds
    assert row.measured is not None
    assert abs(noise.second_moment / row.measured - 1) > row.error_bound


@jax.numpy_dtype_promotion("standard")
def test_windows_of_overlapping_windows_are_in_doubt():
    """Places of which the pool before read the same ones are alike; where windows lie side by side none did."""
    overlapping, apart = (
        vs.predict(Pooled(stride), jax.ShapeDtypeStruct((8, 12, 12, 3), jnp.float32), backward=False).output
        for stride in (1, 3)
    )
    assert apart.error_bound < 0.06 < 0.1 < overlapping.error_bound


@pytest.mark.parametrize(("taps", "stride", "right"), [(3, 2, 1.017e-4), (3, 1, 8.54e-5), (2, 2, 5.407e-5)])
def test_gradients_of_windows_that_share_their_largest_entry(taps, stride, right):
    """Behind a mean they are one number, which adds up at an entry; of 200 draws, each within .4 %."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.max_pool(nn.Conv(8, (1, 1), name="conv")(x), (taps, taps), (stride, stride)).mean((1, 2))

    row = vs.predict(Net(), jax.ShapeDtypeStruct((2, 17, 17, 4), jnp.float32))["conv"]
    assert row.gradient == pytest.approx(right, rel=0.02)


class Largest(nn.Module):
    """The largest of windows, of which those at borders have fewer entries."""

    taps: int
    stride: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(16)(
            nn.max_pool(nn.Dense(16, name="row")(x), (self.taps, self.taps), (self.stride, self.stride), "SAME")
        )


@pytest.mark.parametrize(("taps", "stride"), [(3, 2), (3, 1), (5, 2), (2, 2)])
@pytest.mark.parametrize("size", [7, 8])
def test_each_window_passes_its_gradient_to_one_entry(taps, stride, size):
    """As many numbers flow back as there are windows; they are independent."""
    row = vs.predict(Largest(taps, stride), jax.ShapeDtypeStruct((4, size, size, 16), jnp.float32))["row"]
    assert row.gradient == pytest.approx((-(-size // stride) / size) ** 2, rel=1e-6)


def blurred(x, taps):
    """A picture whose channels are each convolved with one known kernel."""
    kernel = jnp.broadcast_to(jnp.outer(taps, taps)[..., None, None] / taps.sum() ** 2, (len(taps), len(taps), 1, x.shape[-1]))
    form = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=form, feature_group_count=x.shape[-1])


@pytest.mark.parametrize("taps", [(1.0, 1.0), (1.0, 3.0, 3.0, 1.0)])
def test_blurs_of_blurs_are_drawn(taps):
    """Fixed draws: a sound row misses its bound and four standard errors once in 16000 times; unrelated places do here."""
    x = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32)
    model = nn.Sequential([lambda x: blurred(blurred(x, np.array(taps)), np.array(taps)), nn.Conv(16, (1, 1))])
    row = vs.predict(model, x, backward=False, draws=100)["layers_1"]
    assert row.how == "sampled"
    assert row.error_bound < 0.25
    assert row.holds


class Conditioned(nn.Module):
    """Times are embedded by known frequencies and added to a picture, which is pooled and attends to itself."""

    @nn.compact
    def __call__(self, x, t):
        embedded = nn.Dense(16, name="time")(jnp.sin(jnp.outer(t, jnp.arange(1.0, 9.0))))[:, None, None]
        x = Shrunk(name="down")(x, embedded)
        return Attending(name="attention")(x)


class Shrunk(nn.Module):
    @nn.compact
    def __call__(self, x, embedded):
        return nn.avg_pool(nn.relu(nn.Conv(16, (3, 3))(x) + embedded), (2, 2), (2, 2))


class Attending(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        queries, keys, values = jnp.split(nn.Dense(3 * x.shape[-1])(nn.LayerNorm()(x)), 3, -1)
        return x + jax.nn.softmax(queries @ keys.swapaxes(1, 2) / 4) @ values


@jax.numpy_dtype_promotion("standard")
def test_what_a_drawn_module_reads_is_drawn_where_it_was_made():
    """The pool's moments are asked for by the attention, which cannot be drawn without them."""
    x, t = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    report = vs.predict(Conditioned(), vs.inputs(x, t), backward=False)
    assert np.isfinite(report.output.second_moment)
    assert "'down'" in report.notes[0]


@jax.numpy_dtype_promotion("standard")
def test_what_a_local_mean_leaves_is_known():
    """E[(x − mean of n neighbours)²] = 1 − 1/n of independent numbers: n is 9 inside, 6 at an edge, 4 in a corner; to 1 %."""
    x = jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.float32)
    model = lambda _, x: x - nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)  # noqa: E731
    row = vs.predict(model, x, params={}, backward=False).output
    left = (14**2 * (1 - 1 / 9) + 4 * 14 * (1 - 1 / 6) + 4 * (1 - 1 / 4)) / 16**2
    assert row.second_moment == pytest.approx(left, rel=0.01)
    assert row.error_bound < 0.05


@jax.numpy_dtype_promotion("standard")
def test_windows_of_two_sizes_over_one_array_share_what_both_read():
    """Of means over 3 and 5 places of independent numbers, 1/3 + 1/5 + 2 · 3/15: the last was nearly 2/15 once."""
    x = jax.ShapeDtypeStruct((8, 64, 3), jnp.float32)
    model = lambda _, x: nn.avg_pool(x, (3,), (1,), "SAME") + nn.avg_pool(x, (5,), (1,), "SAME")  # noqa: E731
    row = vs.predict(model, x, params={}, backward=False).output
    jacobian = jax.jacobian(lambda x: model(None, x))(jnp.zeros((1, 64, 1)))
    assert row.second_moment == pytest.approx(float((jacobian**2).sum() / 64), rel=0.01)
    assert row.error_bound < 0.05
