"""Sums over the neighbours of a graph's nodes: sampled, and within their bounds."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs
from varscale.theory import predict

NODES, EDGES = 40, 160
_GRAPH = np.random.default_rng(0)
SENDERS, RECEIVERS = (_GRAPH.integers(0, NODES, EDGES).astype(np.int32) for _ in range(2))
DEGREES = np.bincount(RECEIVERS, minlength=NODES)


def test_sums_by_segment_go_by_the_degrees():
    x = jax.ShapeDtypeStruct((EDGES, 8), jnp.float32)
    total = lambda params, x: jax.ops.segment_sum(x, RECEIVERS, NODES)  # noqa: E731
    mean = lambda params, x: total(params, x) / np.maximum(DEGREES, 1).astype(np.float32)[:, None]  # noqa: E731
    weights = {"w": jnp.ones(1)}
    row = predict(total, x, params=weights).output
    assert (row.how, row.second_moment) == ("sampled", pytest.approx(np.mean(DEGREES), rel=row.error_bound))
    expected = np.mean(np.where(DEGREES > 0, 1 / np.maximum(DEGREES, 1), 0.0))
    row = predict(mean, x, params=weights).output
    assert row.second_moment == pytest.approx(expected, rel=row.error_bound)
    assert row.error_bound < 0.15


class Neighbourhoods(nn.Module):
    """What nodes were, and the sum or mean over their neighbours, three times: neighbours share their own neighbours."""

    added: bool
    mean: bool

    @nn.compact
    def __call__(self, x, senders, receivers):
        degree = jnp.maximum(jax.ops.segment_sum(jnp.ones(EDGES), receivers, NODES), 1.0)
        for i in range(3):
            total = jax.ops.segment_sum(x[senders], receivers, NODES)
            total = total / degree[:, None] if self.mean else total
            x = nn.Dense(32, name=f"layer_{i}")(total + x if self.added else total)
            x = nn.relu(x)
        return x


@pytest.mark.parametrize(("added", "mean"), [(True, False), (True, True), (False, False)])
def test_neighbours_that_are_alike_are_within_the_bound(added, mean):
    """48 networks; each layer's squares spread by about 10 %, so 4 standard errors are 6 %; below 1e-4 a row."""
    model, given = Neighbourhoods(added, mean), vs.inputs(jax.ShapeDtypeStruct((NODES, 32), jnp.float32), SENDERS, RECEIVERS)
    report = predict(model, given)

    def one(key):
        k_params, k_input = jax.random.split(key)
        x = jax.random.normal(k_input, (NODES, 32))
        variables = model.init(k_params, x, SENDERS, RECEIVERS)
        _, state = model.apply(variables, x, SENDERS, RECEIVERS, capture_intermediates=True)
        return {f"layer_{i}": jnp.mean(state["intermediates"][f"layer_{i}"]["__call__"][0] ** 2) for i in range(3)}

    squares = jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(3), 48))
    for path, drawn in squares.items():
        x = np.asarray(drawn, float)
        row = report[path]
        assert abs(row.second_moment / x.mean() - 1) <= row.error_bound + 4 * x.std() / x.mean() / math.sqrt(47), row
    assert report["layer_2"].error_bound < 0.15
