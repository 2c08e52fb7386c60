"""Linear maps that rearrange: E[y²] of independent inputs is the sum of the squares of their slopes, exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import special

from varscale.theory import predict
from varscale.theory.integrals.primitives import FUNCTIONS


def _turned_pairs(x):
    return jnp.stack((-x[..., 1::2], x[..., ::2]), axis=-1).reshape(x.shape)


def _turned_halves(x):
    half = x.shape[-1] // 2
    return jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)


def _rotary_in_part(x):
    """GPT-J: pairs of the first features are turned, the others are not."""
    first, rest = x[..., :8], x[..., 8:]
    return jnp.concatenate([first + _turned_pairs(first), rest], -1)


def _grouped_heads(x):
    """Mistral: heads are split into groups after their halves are turned."""
    x = x.reshape(2, 6, 4, 4)
    return (x + 2 * _turned_halves(x)).reshape(2, 6, 2, 2, 4)


def _merged_against_split(x):
    heads = x.reshape(2, 6, 4, 4)
    both = jnp.concatenate([heads[..., :2], 3 * heads[..., 2:]], -1)
    return both.reshape(2, 6, 16) + 2 * x


def _sliced_in_heads(x):
    heads = x.reshape(2, 6, 4, 4)
    return heads[:, :, :2] + 2 * heads[:, :, 1:3] + heads[:, :, :1]


def _slices_of_slices(x):
    inner = x[:, 1:5]
    return inner[:, 1:, 4:] + 2 * inner[:, :3, :12] + 3 * x[:, :1, 2:14]


class _Averaged(nn.Module):
    """The mean over some axes, in which every pair of entries counts."""

    f: object
    axes: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        return jnp.mean(self.f(x), axis=self.axes)


_MAPS = [_rotary_in_part, _grouped_heads, _merged_against_split, _sliced_in_heads, _slices_of_slices]


@pytest.mark.parametrize("f", _MAPS)
@pytest.mark.parametrize("axes", [(), (-1,), (1, -1)])
def test_rearranged_inputs_are_known_pair_by_pair(f, axes):
    shape = (2, 6, 16)
    model = _Averaged(f, axes)
    slopes = jax.jacobian(lambda x: model.apply({}, x))(jnp.zeros(shape))
    truth = np.mean(np.sum(np.square(np.asarray(slopes, float)), axis=(-3, -2, -1)))
    row = predict(model, jax.ShapeDtypeStruct(shape, jnp.float32)).rows[-1]
    # Averages of slices that begin at different places, or of an axis against its factors: which of them meet is
    # not known, and the row says so.
    unknown = (f is _slices_of_slices and axes == (1, -1)) or (f is _merged_against_split and axes)
    assert (row.how == "assumed") == bool(unknown)
    assert row.second_moment == pytest.approx(truth, rel=row.error_bound if unknown else 1e-5)


class _WeightNormalized(nn.Module):
    """A residual layer whose weights have been divided by their norm: either sign of them is as likely still."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32)(x)
        v = self.param("v", nn.initializers.normal(), (32, 32))
        return x + x @ (v / jnp.linalg.norm(v, axis=0, keepdims=True))


def test_a_normalized_weight_has_either_sign():
    row = predict(_WeightNormalized(), jax.ShapeDtypeStruct((8, 16), jnp.float32)).rows[-1]
    assert row.second_moment == pytest.approx(2.0, rel=0.02)
    assert row.how != "assumed"


class _Autoregressive(nn.Module):
    """Two layers in which a position sees those up to its own; weights scaled so that a mask keeps the mean square."""

    positions: int = 16
    features: int = 8

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        for i, n in enumerate((1, self.features)):
            mask = np.kron(np.triu(np.ones((self.positions,) * 2)), np.ones((n, self.features)))
            kernel = self.param(f"kernel{i}", lambda key, shape, m=mask: m * init(key, shape) / np.sqrt(m.mean()), mask.shape)
            x = x @ (mask * kernel)
        return x


def test_masks_on_weights_are_read_place_by_place():
    """Of one class each the mean square of the second layer would be 1; six classes of 16 positions leave 3 %."""
    model = _Autoregressive()
    row = predict(model, jax.ShapeDtypeStruct((4, model.positions), jnp.float32)).rows[-1]
    t = np.arange(1, model.positions + 1)
    share = (model.positions + 1) / (2 * model.positions)
    truth = np.mean(np.cumsum(t)) / (model.positions * share) ** 2
    assert truth < 0.75
    assert row.second_moment == pytest.approx(truth, rel=0.03)


class _LogSoftmax(nn.Module):
    scale: float
    by_hand: bool

    @nn.compact
    def __call__(self, x):
        x = self.scale * nn.Dense(64)(x).reshape(-1, 32, 2)
        return x - jax.scipy.special.logsumexp(x, axis=-1, keepdims=True) if self.by_hand else nn.log_softmax(x)


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("by_hand", [False, True])
def test_log_softmax_of_two_is_a_softplus(scale, by_hand):
    """log p = −softplus(b − a), b − a a normal of variance 2 scale²; logits are sampled to about 1 %."""
    row = predict(_LogSoftmax(scale, by_hand), jax.ShapeDtypeStruct((8, 32), jnp.float32)).rows[-1]
    z, w = special.roots_hermitenorm(80)
    truth = (w / w.sum()) @ np.logaddexp(0, np.sqrt(2) * scale * z) ** 2
    assert row.second_moment == pytest.approx(truth, rel=0.025)
    assert row.mean == pytest.approx(-(w / w.sum()) @ np.logaddexp(0, np.sqrt(2) * scale * z), rel=0.025)


def test_the_upper_half_of_64_random_bits_is_shifted_too():
    """Bits that were averaged over classes come as floats, which signed integers do not hold."""
    shifted = FUNCTIONS["shift_right_logical"](np.array([2.0**63, 2.0**40]), np.array(52.0))
    np.testing.assert_array_equal(shifted, [2**11, 0])
