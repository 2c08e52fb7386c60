"""`mean_field` and `critical` against published figures, against an integration of their own, and on odd activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import varscale as vs
from varscale import gaussian

# Poole et al. 2016, "Exponential expressivity in deep neural networks through transient chaos", section 2, figures 1 and 2:
# tanh with σb = .3 at σw = 1.3 (ordered), 2.5 and 4 (chaotic).
POOLE = [(1.3, "ordered"), (2.5, "chaotic"), (4.0, "chaotic")]


def map_by_hand(q, c, weight, bias):
    """One layer of tanh on the second moment and the correlation, by the trapezoidal rule in two dimensions."""
    z = np.linspace(-8, 8, 161)
    w = np.exp(-(z**2) / 2)
    w = w / w.sum()
    u = np.sqrt(q) * z
    v = np.sqrt(q) * (c * z[:, None] + np.sqrt(1 - c * c) * z[None])
    new = weight * w @ np.tanh(u) ** 2 + bias
    return new, (weight * np.einsum("i,j,ij->", w, w, np.tanh(u)[:, None] * np.tanh(v)) + bias) / new


@pytest.mark.parametrize(("sigma", "phase"), POOLE)
def test_poole_fixed_points_are_where_the_iteration_goes(sigma, phase):
    found = vs.mean_field(jnp.tanh, sigma**2, 0.3**2)
    q, c = 1.0, 0.5
    for _ in range(250):
        q, c = map_by_hand(q, c, sigma**2, 0.3**2)
    assert found.phase == phase
    assert found.q == pytest.approx(q, rel=1e-6)
    assert found.c == pytest.approx(c, abs=1e-5)


@pytest.mark.parametrize("sigma", [1.3, 2.5])
def test_poole_depth_scales_are_the_rates_of_that_iteration(sigma):
    found = vs.mean_field(jnp.tanh, sigma**2, 0.3**2)
    off = 1e-3
    q, _ = map_by_hand(found.q + off, 0.5, sigma**2, 0.3**2)
    _, c = map_by_hand(found.q, found.c - off, sigma**2, 0.3**2)
    assert np.exp(-1 / found.depth_q) == pytest.approx((q - found.q) / off, abs=2e-3)
    assert np.exp(-1 / found.depth_c) == pytest.approx((found.c - c) / off, abs=2e-3)


def test_schoenholz_depth_of_correlations_diverges_at_the_edge_and_that_of_lengths_does_not():
    # Schoenholz et al. 2017, "Deep information propagation": at σb² = .05 the edge of chaos is at σw² = 1.76.
    edge = vs.critical(jnp.tanh, 0.05)
    assert edge.weight_variance == pytest.approx(1.76, abs=2e-3)
    at, below, above = (vs.mean_field(jnp.tanh, edge.weight_variance + d, 0.05) for d in (0.0, -0.1, 0.1))
    assert at.depth_c > 1e4 > 100 > max(below.depth_c, above.depth_c)
    assert at.depth_q < 3
    # Ordered: ξ_c = −1/ln χ, which is the depth over which gradients vanish too.
    assert below.depth_c == pytest.approx(-1 / np.log(below.chi))


@pytest.mark.parametrize(
    ("activation", "bias", "weight", "q"),
    [
        # Pennington et al. 2017, "Resurrecting the sigmoid": ReLU is critical at (σw, σb) = (√2, 0) alone, linear nets at
        # (1, 0); hard tanh and tanh from (1, 0) on.
        (nn.relu, 0.0, 2.0, 1.0),
        (lambda x: x, 0.0, 1.0, 1.0),
        (nn.hard_tanh, 0.0, 1.0, 0.0),
        (jnp.tanh, 0.0, 1.0, 0.0),
        # Xiao et al. 2018, "Dynamical isometry and a mean field theory of CNNs": 10,000 layers of tanh at σw² = 1.05,
        # σb² = 2.01e-5.
        (jnp.tanh, 2.01e-5, 1.05, None),
        # Hayou et al. 2019, "On the impact of the activation function on deep neural networks training": without biases at
        # σw = 1/|φ'(0)|.
        (nn.elu, 0.0, 1.0, 0.0),
        (nn.silu, 0.0, 4.0, 0.0),
        (nn.gelu, 0.0, 4.0, 0.0),
        # Roberts, Yaida & Hanin 2022, "The principles of deep learning theory", section 5.3.4: the half-stable points.
        (lambda x: nn.gelu(x, approximate=False), 0.17292239, 1.98305826, (3 + 17**0.5) / 2),
        (nn.silu, 0.55514317, 1.98800468, 14.32017),
        (jnp.sin, 0.0, 1.0, 0.0),
    ],
)
def test_published_critical_points(activation, bias, weight, q):
    found = vs.critical(activation, bias)
    assert found.weight_variance == pytest.approx(weight, rel=1e-5)
    if q is not None:
        assert found.q == pytest.approx(q, rel=1e-4, abs=1e-12)


def test_half_stable_points_keep_small_changes_of_the_second_moment():
    for activation, bias in ((lambda x: nn.gelu(x, approximate=False), 0.17292239), (nn.silu, 0.55514317)):
        point = vs.critical(activation, bias)
        assert point.q * gaussian.derivative_second_moment(activation, 0.0, point.q) * point.weight_variance == pytest.approx(
            point.q
        )
        step = 1e-3 * point.q
        after = [gaussian.second_moment(activation, 0.0, point.q + d) * point.weight_variance for d in (-step, step)]
        assert (after[1] - after[0]) / (2 * step) == pytest.approx(1, abs=1e-5)


def test_selu_has_the_fixed_point_it_was_made_for():
    # Klambauer et al. 2017, "Self-normalizing neural networks": (mean, variance) = (0, 1) is a fixed point, and attracting; the
    # Jacobian's spectral norm is .7877 = √(.7826² + .0888²), slopes of the new variance and the new mean in the variance.
    found = vs.mean_field(nn.selu, 1.0)
    assert found.q == pytest.approx(1.0, abs=1e-9)
    assert found.depth_q == pytest.approx(-1 / np.log(0.782648), rel=1e-3)
    assert found.slope == pytest.approx(0.782648, rel=1e-5)


@pytest.mark.parametrize(("activation", "slope"), [(jnp.tanh, 0.461), (nn.relu, 1.0), (nn.gelu, 1.144), (nn.silu, 1.173)])
def test_the_slope_at_the_exact_gain_says_whether_the_fixed_point_repels(activation, slope):
    found = vs.mean_field(activation, vs.gain(activation) ** 2)
    assert found.q == pytest.approx(1.0, abs=1e-6)
    assert found.slope == pytest.approx(slope, abs=6e-4)
    assert found.slope == pytest.approx(gaussian.second_moment_slope(activation, 0.0, found.q), abs=1e-6)


def test_the_slope_is_dq_dq_with_biases_and_at_zero():
    found, step = vs.mean_field(jnp.tanh, 1.69, 0.09), 1e-5
    after = [1.69 * gaussian.second_moment(jnp.tanh, 0.0, found.q + d) + 0.09 for d in (-step, step)]
    assert found.slope == pytest.approx((after[1] - after[0]) / (2 * step), rel=1e-5)
    assert vs.mean_field(jnp.tanh, 0.5).slope == pytest.approx(0.5)  # q = 0: σw² φ'(0)²


def test_gains_of_scaled_activations():
    # Brock, De & Smith 2021, "Characterizing signal propagation to close the performance gap in unnormalized ResNets": for ReLU
    # γ = √(2/(1 − 1/π)); the released code of NFNets has gelu 1.7015043, silu 1.7881293, tanh 1.5939117.
    def gamma(f):
        return 1 / np.sqrt(gaussian.second_moment(f) - gaussian.mean(f) ** 2)

    assert gamma(nn.relu) == pytest.approx(np.sqrt(2 / (1 - 1 / np.pi)), rel=1e-9)
    for f, published in ((nn.gelu, 1.7015043), (nn.silu, 1.7881293), (jnp.tanh, 1.5939117)):
        assert gamma(f) == pytest.approx(published, rel=2e-3)  # they were sampled


@pytest.mark.parametrize(
    ("activation", "weight", "bias"),
    [
        (jnp.square, 1.0, 0.0),  # 3q² runs off from 1, past an unstable fixed point at 1/3
        (jnp.square, 4.0, 0.05),  # 12q² + .05 has no fixed point at all
        (jnp.abs, 2.0, 0.0),
        (nn.relu, 2.0, 0.1),
        (nn.softplus, 2.0, 0.0),  # by less and less, but for ever
        (jnp.exp, 1.0, 0.0),
    ],
)
def test_second_moments_that_run_off_are_an_error(activation, weight, bias):
    with pytest.raises(ValueError, match="diverges"):
        vs.mean_field(activation, weight, bias)


def test_of_several_fixed_points_it_is_the_one_that_1_goes_to():
    assert vs.mean_field(jnp.square, 0.2).q == 0.0  # the other, 5/3, is unstable
    assert vs.mean_field(nn.gelu, 2.0).q == 0.0
    assert vs.mean_field(jnp.cos, 4.0).q == pytest.approx(2.034209, rel=1e-6)  # of q = 2(1 + e^{-2q})


@pytest.mark.parametrize("activation", [jnp.sin, jnp.tanh, nn.hard_tanh], ids=["sin", "tanh", "hard_tanh"])
def test_at_the_edge_without_biases_signals_die_slowly_but_they_die(activation):
    found = vs.mean_field(activation, 1.0)
    assert (found.q, found.phase) == (0.0, "critical")
    assert found.depth_q == np.inf


def test_a_jump_is_chaos():
    # sign: the correlation map is (2/π) arcsin c, whose slope at 1 is infinite and at 0 is 2/π.
    found = vs.mean_field(jnp.sign, 1.0)
    assert (found.q, found.chi, found.phase) == (pytest.approx(1.0), np.inf, "chaotic")
    assert found.c == pytest.approx(0.0, abs=1e-9)
    assert found.depth_c == pytest.approx(-1 / np.log(2 / np.pi), rel=1e-6)
    with pytest.raises(ValueError, match="no critical point"):
        vs.critical(jnp.sign)
    assert vs.mean_field(lambda x: jnp.round(x).astype(jnp.int32), 0.5, 0.3).chi == np.inf


def test_the_correlation_map_of_a_kinked_activation_is_at_rest_at_its_fixed_point():
    found = vs.mean_field(nn.hard_tanh, 1.5, 0.1)
    pair = gaussian.pair(nn.hard_tanh, nn.hard_tanh, found.c, 0.0, found.q)
    assert (1.5 * pair + 0.1) / found.q == pytest.approx(found.c, abs=1e-8)


def test_what_is_no_activation_is_named():
    with pytest.raises(ValueError, match="not finite at x"):
        vs.critical(jnp.sqrt, 0.1)
    with pytest.raises(ValueError, match="elementwise"):
        vs.critical(jnp.sum, 0.1)
    with pytest.raises(TypeError, match="jax functions"):
        vs.mean_field(lambda x: max(float(x), 0.0), 1.0)
    with pytest.raises(ValueError, match="weight_variance must be finite and not negative, not -1"):
        vs.mean_field(jnp.tanh, -1)
    with pytest.raises(ValueError, match="no critical point"):
        vs.critical(jnp.square)
    assert not vs.critical(jnp.square, 0.05).stable


def test_extreme_variances():
    small, large = vs.mean_field(jnp.tanh, 1e-8, 1e-8), vs.mean_field(jnp.tanh, 1e6, 1.0)
    assert small.q == pytest.approx(1e-8, rel=1e-6)
    assert large.q == pytest.approx(1e6, rel=2e-2)
    assert large.c < 1e-3
    nothing = vs.mean_field(jax.nn.relu, 0.0, 0.3)
    assert (nothing.q, nothing.chi, nothing.c) == (pytest.approx(0.3), 0.0, 1.0)
