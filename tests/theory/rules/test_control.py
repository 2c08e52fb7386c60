"""Scans over layers, and weights stacked in one array: as the same layers written out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import varscale as vs

WIDTH, DEPTH = 64, 12
X = jax.ShapeDtypeStruct((16, WIDTH), jnp.float32)


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(self.width, name="down")(nn.relu(nn.Dense(self.width, name="up")(x))), None


class Scanned(nn.Module):
    depth: int
    width: int = WIDTH

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
        return layers(self.width, name="layers")(x, None)[0]


@pytest.mark.parametrize("depth", [4, 5, DEPTH])
def test_linen_scan_over_layers_is_the_layers_written_out(depth):
    report = vs.predict(Scanned(depth), X)
    assert len(report.rows) == 3 * depth + 1
    assert len(report.weights) == 2
    assert report.output.second_moment == pytest.approx(1.5**depth, rel=1e-5)
    assert report.output.error_bound < 0.15
    assert report.output.gradient_error_bound < 0.15


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("stages", [1, 2])
def test_layers_of_nested_scans_stacked_along_any_axis(stages, axis):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = Block
            for length in (DEPTH // stages, stages)[:stages]:
                of = dict(variable_axes={"params": axis}, split_rngs={"params": True}, length=length)
                layers = nn.scan(layers, **of)
            return layers(WIDTH, name="layers")(x, None)[0]

    report = vs.predict(Net(), X)
    assert len(report.rows) == 3 * DEPTH + 1
    assert len(report.weights) == 2
    assert report.output.second_moment == pytest.approx(1.5**DEPTH, rel=1e-5)


def test_layers_of_one_scan_after_another():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Scanned(6)(nn.Dense(WIDTH)(Scanned(6)(x)))

    report = vs.predict(Net(), X)
    assert len(report.rows) == 3 * DEPTH + 2 + 1 + 1
    assert len(report.weights) == 5
    assert report.output.second_moment == pytest.approx(1.5**DEPTH, rel=1e-5)
    assert report.output.how != "sampled"


def test_scan_over_wide_layers_runs_nothing():
    report = vs.predict(Scanned(24, 2048), jax.ShapeDtypeStruct((16, 2048), jnp.float32), backward=False)
    assert report.output.second_moment == pytest.approx(1.5**24, rel=1e-4)
    assert report.output.how != "sampled"


def kernels(key):
    return vs.normal(1 / 16)(key, (DEPTH, WIDTH, WIDTH))


def layer(x, kernel):
    return x + jax.nn.relu(x) @ kernel


def unrolled(kernels, x):
    for i in range(DEPTH):
        x = layer(x, kernels[i])
    return x


def scanned(kernels, x):
    return jax.lax.scan(lambda x, kernel: (layer(x, kernel), None), x, kernels)[0]


def scaled(kernels, x):
    """Smaller layers, the deeper they are."""
    scales = 1 / jnp.arange(1.0, DEPTH + 1)
    return scanned(kernels * scales[:, None, None], x)


def scaled_inside(kernels, x):
    scales = 1 / jnp.arange(1.0, DEPTH + 1)
    return jax.lax.scan(lambda x, now: (layer(x, now[0] * now[1]), None), x, (kernels, scales))[0]


def grown(factors):
    """E[y²] of such a stream: E[w²] = 1/256, of 64 rectified terms."""
    out = 1.0
    for factor in factors:
        out *= 1 + factor**2 / 8
    return out


@pytest.mark.parametrize(
    ("model", "factors"),
    [
        (unrolled, [1] * DEPTH),
        (scanned, [1] * DEPTH),
        (scaled, [1 / k for k in range(1, DEPTH + 1)]),
        (scaled_inside, [1 / k for k in range(1, DEPTH + 1)]),
    ],
)
def test_layers_of_one_stacked_weight(model, factors):
    row = vs.predict(model, X, params=kernels).output
    assert row.second_moment == pytest.approx(grown(factors), rel=1e-4)
    assert row.error_bound < 0.05


def test_stacked_weight_used_as_a_whole_besides_is_in_doubt():
    # E[(x + x W₀ + x ΣW)²]: W₀ is in both.
    row = vs.predict(lambda w, x: x + x @ w[0] + jnp.einsum("bi,lij->bj", x, w), X, params=kernels).output
    exact = 1 + (4 + DEPTH - 1) * WIDTH / 256
    assert row.second_moment == pytest.approx(exact, rel=row.error_bound)


def test_a_loop_whose_end_is_known_is_walked():
    """Of no such loop does JAX take a gradient; the row of its output is predicted all the same."""

    def model(_, x):
        return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, 2 * s[1]), (0, x))[1]

    row = vs.predict(model, X, params={}).output
    assert row.second_moment == pytest.approx(64)
    assert row.how != "sampled"
