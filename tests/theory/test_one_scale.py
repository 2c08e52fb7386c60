"""One scale of all features of a sample, beside what it scales: masks, a single feature, x (w·x). All are drawn."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs

LENGTHS = np.array([10, 4, 7, 2])
MASK = (np.arange(10) < LENGTHS[:, None]).astype(np.float32)


@pytest.fixture(autouse=True)
def _promotion():
    """A scale is one of all features."""
    with jax.numpy_rank_promotion("allow"):
        yield


class MaskedMean(nn.Module):
    """The mean of the tokens that a mask leaves."""

    @nn.compact
    def __call__(self, x, mask):
        h = nn.relu(nn.Dense(32)(x)) * mask[..., None]
        return nn.Dense(4)(h.sum(1) / mask.sum(1, keepdims=True))


class OfOneFeature(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.relu(nn.Dense(64)(x)))


class Cross(nn.Module):
    """A cross network (Wang et al. 2017): x0 (w·x) + x."""

    @nn.compact
    def __call__(self, x):
        first = x
        for _ in range(3):
            x = first * nn.Dense(1)(x) + x
        return x


def described(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# The mean square over 20000 draws of weights, and of inputs that are described, and its standard error; the quantiles
# .5, 3, 97 and 99.5 % of 4000 draws.
CASES = [
    (MaskedMean(), vs.inputs(described(4, 10, 16), MASK), 0.2427, 0.0010, None),
    (OfOneFeature(), described(256, 1), 0.4982, 0.0038, (0.0022, 0.0120, 1.779, 2.716)),
    (Cross(), described(64, 32), 9.163, 0.046, (1.841, 2.675, 23.66, 42.19)),
]


@pytest.mark.parametrize(("model", "x", "mean", "error", "quantiles"), CASES, ids=["mask", "one feature", "cross"])
def test_one_scale_of_all_features(model, x, mean, error, quantiles):
    """Numbers that are drawn with a fixed key: their own error is in the bound; bands hold from 3 to 97 % at least."""
    row = vs.predict(model, x, backward=False).output
    assert row.how == "sampled"
    assert abs(row.second_moment - mean) < row.error_bound * mean + 4 * error
    if quantiles is not None:
        least, low, high, most = quantiles
        assert least / 8 < row.band[0] < low
        assert high < row.band[1] < 4 * most


class LearnedBias(nn.Module):
    """Attention whose logits have a bias by place that is learned, of this deviation at first."""

    deviation: float

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(32, name=name)(x) for name in "qkv")
        distance = jnp.clip(jnp.arange(12) - jnp.arange(12)[:, None], -4, 4) + 4
        bias = nn.Embed(9, 1, embedding_init=nn.initializers.normal(self.deviation))(distance)[..., 0]
        return nn.softmax(q @ k.swapaxes(1, 2) / 32**0.5 + bias) @ v


def test_a_learned_bias_by_place_that_matters_is_drawn():
    wide, narrow = (vs.predict(LearnedBias(s), described(4, 12, 32), backward=False).output for s in (1.0, 0.02))
    assert (wide.how, narrow.how) == ("sampled", "quadrature")
    assert wide.band[1] / wide.band[0] > 1.3 * narrow.band[1] / narrow.band[0]


def test_a_described_scale_of_samples_before_a_norm_is_drawn():
    def normalised(params, x, scale):
        h = (x @ params["w"]) * scale[:, None] + x @ params["v"]
        return h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)

    weights = {name: vs.Moments(0.0, 1 / 16, (16, 16)) for name in "vw"}
    report = vs.predict(normalised, vs.inputs(described(8, 16), described(8)), params=weights, backward=False)
    assert any("the whole model" in note for note in report.notes)


def test_a_loop_over_steps_that_share_what_they_read_is_drawn():
    """Σ of (x_t + x_{t−1}) v, twice as large as of as many independent ones; a loop over v alone is a region of its own."""

    def summed(params, x, *, shift):
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1] if shift else x[::-1]
        steps = ((x + before) @ params["w"]).swapaxes(0, 1)
        return jax.lax.scan(lambda carry, step: (jnp.tanh(0.9 * carry + 0.1 * step), None), jnp.zeros((4, 16)), steps)[0]

    weights = {"w": vs.Moments(0.0, 1 / 16, (16, 16))}
    for shift in (True, False):
        net = functools.partial(summed, shift=shift)
        report = vs.predict(net, described(4, 12, 16), params=weights, backward=False)
        assert any("the whole model" in note for note in report.notes) is shift
