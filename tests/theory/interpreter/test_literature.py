"""`predict` on flax nets against the figures that papers on signal propagation give."""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from varscale import gaussian
from varscale.theory import critical, predict

WIDE = 1 << 24  # as wide as the papers' limits: nothing is allocated


def normal(variance):
    return nn.initializers.variance_scaling(variance, "fan_in", "normal")


class MLP(nn.Module):
    activation: Callable
    depth: int
    width: int
    weight_variance: float
    bias_variance: float = 0.0
    batch_norm: bool = False

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            bias = nn.initializers.normal(math.sqrt(self.bias_variance))
            x = nn.Dense(self.width, kernel_init=normal(self.weight_variance), bias_init=bias)(x)
            if self.batch_norm:
                x = nn.BatchNorm(use_running_average=False, epsilon=1e-12)(x)
            x = self.activation(x)
        return x


class Residual(nn.Module):
    activation: Callable
    depth: int
    width: int
    weight_variance: float
    batch_norm: bool = False

    @nn.compact
    def __call__(self, x):
        for i in range(self.depth):
            h = nn.BatchNorm(use_running_average=False)(x) if self.batch_norm else x
            x = x + nn.Dense(self.width, kernel_init=normal(self.weight_variance))(self.activation(h))
            x = nn.Dropout(0.0, deterministic=True, name=f"stream_{i}")(x)
        return x


class Attention(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.depth):
            x = nn.MultiHeadDotProductAttention(4, name=f"attention_{i}")(x)
        return x


def batch(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def preactivations(report):
    return [row for row in report.rows if row.path.startswith("Dense")]


def arc_cosine(c):
    return (math.sqrt(1 - c * c) + (math.pi - math.acos(c)) * c) / math.pi


def test_relu_correlations_approach_one_as_the_square_of_depth():
    # Hayou et al. 2019, "On the impact of the activation function on deep neural networks training": 1 − c ~ 9π²/(2 l²) on the
    # edge of chaos. It is 1/√(1 − c) that grows evenly, by √2/(3π) a layer.
    rows = preactivations(predict(MLP(nn.relu, 160, WIDE, 2.0), batch(8, WIDE), backward=False))
    c, inverse = 0.0, []
    for row in rows:
        assert 1 - row.sample_correlation == pytest.approx(1 - c, rel=0.05)
        c = arc_cosine(c)
        inverse.append(1 / math.sqrt(1 - row.sample_correlation))
    assert (inverse[159] - inverse[120]) / 39 == pytest.approx(math.sqrt(2) / (3 * math.pi), rel=0.05)


def test_tanh_correlations_approach_one_as_depth():
    # Hayou et al. 2019, proposition 3: 1 − c ~ β/l for a smooth activation on the edge, where second order in 1 − c gives
    # β = 2 E[φ'²] / (q E[φ''²]).
    edge = critical(jnp.tanh, 0.05)
    rows = preactivations(predict(MLP(jnp.tanh, 160, WIDE, edge.weight_variance, 0.05), batch(8, WIDE), backward=False))
    slope = gaussian.derivative(jnp.tanh)
    beta = 2 * gaussian.second_moment(slope, 0.0, edge.q) / (edge.q * gaussian.derivative_second_moment(slope, 0.0, edge.q))
    inverse = [1 / (1 - row.sample_correlation) for row in rows]
    assert (inverse[159] - inverse[80]) / 79 == pytest.approx(1 / beta, rel=0.05)  # the next order is ln l / l
    assert rows[-1].second_moment == pytest.approx(edge.q, rel=1e-3)


@pytest.mark.parametrize("sigma", [1.3, 2.5, 4.0])
def test_tanh_nets_reach_the_fixed_points_of_poole(sigma):
    # Poole et al. 2016, figures 1 and 2, σb = .3; Schoenholz et al. 2017: gradients grow by χ a layer.
    from varscale.theory import mean_field

    limit = mean_field(jnp.tanh, sigma**2, 0.09)
    rows = preactivations(predict(MLP(jnp.tanh, 24, WIDE, sigma**2, 0.09), batch(8, WIDE)))
    assert rows[-1].second_moment == pytest.approx(limit.q, rel=1e-5)
    if limit.phase == "chaotic":
        assert rows[-1].sample_correlation == pytest.approx(limit.c, abs=2e-3)
    assert rows[19].gradient / rows[20].gradient == pytest.approx(limit.chi, rel=1e-5)


@pytest.mark.parametrize(("size", "within"), [(32, 2e-3), (128, 2e-4), (4096, 1e-4)])
def test_batch_norm_makes_gradients_explode_as_the_paper_says(size, within):
    # Yang et al. 2019, "A mean field theory of batch normalization": gradients explode whatever the activation. A factor
    # (B − 2)/(B − 3) a layer for linear nets; for ReLU, with J the arc-cosine kernel, [(B − 1 + J'(c))/(1 − J(c)) − 1]/(B − 3)
    # at c = −1/(B − 1), to which samples decorrelate; π/(π − 1) at infinite batch.
    c = -1 / (size - 1)
    relu = ((size - 1 + 1 - math.acos(c) / math.pi) / (1 - arc_cosine(c)) - 1) / (size - 3)
    for activation, rate in ((nn.relu, relu), (lambda x: x, (size - 2) / (size - 3))):
        net = MLP(activation, 12, WIDE, 1.0, batch_norm=True)
        rows = [row for row in predict(net, batch(size, WIDE)).rows if row.path.startswith("BatchNorm")]
        assert rows[5].gradient / rows[6].gradient == pytest.approx(rate, rel=within)
        assert rows[6].sample_correlation == pytest.approx(c, rel=1e-2)
    assert relu == pytest.approx(math.pi / (math.pi - 1), rel=4 / size)


@pytest.mark.parametrize(("activation", "law"), [(nn.relu, 5), (lambda x: x, 2)])
@pytest.mark.parametrize(("depth", "width"), [(20, 400), (200, 1000)])
def test_one_draw_of_a_deep_net_is_lognormal(activation, law, depth, width):
    # Hanin & Nica 2020, "Products of many large random matrices and gradients in deep neural networks", main theorem: ln‖·‖² is
    # asymptotically N(−β/2, β). β is computed here: E[f⁴]/E[f²]² − 1 = 5 over n a layer for ReLU, 2 for linear nets.
    net = MLP(activation, depth, width, 2.0 if law == 5 else 1.0)
    row = preactivations(predict(net, batch(1, width), backward=False))[-1]
    deviation = math.log(row.band[1] / row.band[0]) / 2 / 2.5758
    assert deviation**2 == pytest.approx((law * depth + 2) / width, rel=0.05)  # 2/n: of the input
    assert math.log(row.typical / row.second_moment) == pytest.approx(-(law * depth + 2) / width / 2, rel=0.05)


@pytest.mark.parametrize("detail", ["modules", "no rows"])
def test_nets_of_hundreds_of_layers(detail):
    # Xiao et al. 2018 train 10,000 layers; what is asked of the last layer must not be found out from the top down.
    depth = 300

    def plain(params, x):
        for w in params:
            x = nn.relu(x @ w)
        return x

    if detail == "modules":
        report = predict(MLP(nn.relu, depth, 10**8, 2.0), batch(2, 10**8), backward=False)
    else:
        report = predict(plain, batch(2, 256), params=_variances(depth), backward=False)
    assert report.output.second_moment == pytest.approx(1.0, rel=1e-3)


def _variances(depth):
    return lambda key: [jax.random.normal(k, (256, 256)) * math.sqrt(2 / 256) for k in jax.random.split(key, depth)]


def test_residual_nets_grow_as_the_papers_say():
    # Yang & Schoenholz 2017, "Mean field residual networks: on the edge of chaos": with tanh the second moment grows
    # polynomially, evenly in the end (tanh² is nearly 1 there); with ReLU by 1 + σw²/2 a layer.
    relu = [row.second_moment for row in predict(Residual(nn.relu, 20, 4096, 1.0), batch(4, 4096)).rows if "stream" in row.path]
    assert np.diff(np.log(relu)) == pytest.approx(np.full(19, math.log(1.5)), abs=1e-4)
    report = predict(Residual(jnp.tanh, 60, 4096, 1.0), batch(4, 4096))
    tanh = np.diff([row.second_moment for row in report.rows if "stream" in row.path])
    assert np.all(np.diff(tanh) > 0)
    assert 0.8 < tanh[-1] < 1
    # De & Smith 2020, "Batch normalization biases residual blocks towards the identity function in deep networks": the
    # variance of the stream at block l grows as l, and so what block l adds to its gradient falls as 1/l.
    net = Residual(nn.relu, 20, 1024, 2.0, batch_norm=True)
    streams = [row for row in predict(net, batch(512, 1024)).rows if "stream" in row.path]
    assert [row.second_moment for row in streams] == pytest.approx([i + 2 for i in range(20)], rel=5e-3)
    growth = [a.gradient / b.gradient for a, b in itertools.pairwise(streams[4:])]
    # Block i + 5 reads a stream of variance i + 6 and gives π/(π − 1) of its own gradient back.
    assert growth == pytest.approx([1 + math.pi / (math.pi - 1) / (i + 6) for i in range(15)], rel=0.02)


def test_attention_without_skips_collapses_to_rank_one():
    # Dong et al. 2021, "Attention is not all you need: pure attention loses rank doubly exponentially with depth". Noci et al.
    # 2022, "Signal propagation in transformers": then queries and keys get no gradient. Computed here: values get 1/T of it.
    rows = predict(Attention(4), batch(2, 24, 128))
    left = [1 - rows[f"attention_{i}"].position_correlation for i in range(4)]
    assert left[0] > 0.4
    assert left[1] < 1e-3
    assert left[2] < 1e-6
    assert rows["attention_1"].gradient == pytest.approx(1 / 24, rel=1e-2)
