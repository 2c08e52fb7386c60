"""Pictures whose near places are alike: what windows read of them, from the input to the layer after the next pool."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

import varscale as vs
from varscale.theory.domain.axes import Axis
from varscale.theory.graph.convolutions import Window, hits
from varscale.theory.graph.nodes import Graph, array
from varscale.theory.propagation.spatial_correlation import excess
from varscale.theory.propagation.spatial_windows import FAR, of_places, of_windows


def photographs(*shape, smooth=2.0):
    """Noise, smoothed: neighbours have a correlation of .94."""
    x = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=shape), (0, smooth, smooth, 0), mode="wrap")
    return jnp.asarray(x / x.std(), jnp.float32)


def test_the_excess_of_known_numbers_is_theirs():
    x = np.asarray(photographs(4, 12, 10, 3), float)
    node = array(Graph(), x, [Axis(n) for n in x.shape])
    found = excess(node, ((1, 2), (2, 1))).excess
    one, two = x[:, :-2, :-1], x[:, 2:, 1:]
    usual = node.table.second
    assert found[0, 1, 1, 0] == pytest.approx(np.mean(one * two) - usual[0, 1, 1, 0])
    assert found[0, 1, 0, 0] == pytest.approx(np.mean(x[:, :-2] * x[:, 2:]) - usual[0, 1, 0, 0])
    others = (one.sum(-1) * two.sum(-1) - (one * two).sum(-1)).mean() / 6
    assert found[0, 1, 1, 1] == pytest.approx(others - usual[0, 1, 1, 1])
    assert not found[:, 0, 0].any()


@pytest.mark.parametrize("window", [Window(5, 2, 2, 0, 1, 1), Window(4, 3, 2, 0, 1, 1), Window(10, 3, 1, 1, 1, 1)])
def test_all_pairs_of_taps_are_counted_once(window):
    """Over all pairs of outputs, or of outputs and places, as many as there are."""
    at = hits(window, 10)
    taps, n = (at >= 0).sum(), len(at)
    for reader, others in ((of_windows(window, 10), taps), (of_places(window, 10), 10)):
        if others == 10 and n != 10:
            continue
        everything = n * sum(reader.apart(0).values()) + n * (n - 1) * sum(reader.elsewhere().values())
        assert everything == pytest.approx(taps * others)
    inside = of_windows(window, 10).apart(0)
    real = [row[row >= 0] for row in at]
    for distance in (0, 1, 2):
        assert inside.get(distance, 0.0) * n == sum((abs(r[:, None] - r) == distance).sum() for r in real)
    assert FAR not in inside


class Pooled(nn.Module):
    pool: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(24, (3, 3))(x))
        if self.pool == "max":
            x = nn.max_pool(x, (2, 2), (2, 2))
        elif self.pool == "overlapping":
            x = nn.avg_pool(nn.Dense(24)(nn.avg_pool(x, (3, 3), (2, 2))), (2, 2), (1, 1))
        elif self.pool == "joined":
            x = nn.avg_pool(jnp.concatenate([x, nn.relu(nn.Conv(16, (3, 3))(x))], -1), (4, 4), (4, 4))
        else:
            x = x + nn.Dense(24)(nn.avg_pool(x, (3, 3), padding="SAME") - x)
            x = nn.Conv(24, (1, 1))(nn.avg_pool(x, (2, 2), (2, 2)))
        return nn.Dense(32)(x)


@jax.numpy_dtype_promotion("standard")  # flax divides by an integer
@pytest.mark.parametrize("pool", ["max", "overlapping", "joined", "mixed"])
def test_pools_of_pictures(pool):
    """The mean square after pools of a smooth picture, and what it would be were any two places equally alike.

    A z-test at an error rate of 1e-6 each, beside the stated error bound; with 500 nets the standard error is below 2 %. It
    has power: with the places shuffled, which leaves all moments but the likeness of neighbours, the prediction fails it.
    """
    x, model = photographs(16, 12, 12, 3), Pooled(pool)
    row = vs.predict(model, x, backward=False).output
    places = np.random.default_rng(1).permutation(144)
    shuffled = vs.predict(model, x.reshape(16, 144, 3)[:, places].reshape(x.shape), backward=False).output

    def square(key):
        variables = model.init(key, x)
        return jnp.mean(jnp.square(model.apply(variables, x, mutable=["batch_stats"])[0]))

    drawn = np.asarray(jax.jit(lambda keys: jax.lax.map(square, keys))(jax.random.split(jax.random.key(0), 500)), float)
    error = drawn.std(ddof=1) / 500**0.5 / drawn.mean()
    allowed = row.error_bound + stats.norm.isf(5e-7) * error
    assert error < 0.02
    assert row.error_bound < 0.15
    assert abs(row.second_moment / drawn.mean() - 1) < allowed < abs(shuffled.second_moment / drawn.mean() - 1)
