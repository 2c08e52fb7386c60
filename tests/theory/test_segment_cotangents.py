"""Gradients through rows that are looked up and added up by segment."""

import math

import drawn
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs

NODES, EDGES, WIDTH = 40, 160, 64
_RNG = np.random.default_rng(0)
FEW = _RNG.integers(0, 4, EDGES)
# Few senders, so that rows repeat within a segment; and any edges.
GRAPHS = [(FEW, (FEW * 10 + _RNG.integers(0, 10, EDGES)) % NODES), tuple(_RNG.integers(0, NODES, (2, EDGES)))]


class TwoGraphs(nn.Module):
    """Two rounds of messages, each along the edges of its own graph."""

    more: int

    @nn.compact
    def __call__(self, x):
        (s, r), (t, u) = GRAPHS
        t, u = (np.append(z, np.zeros(self.more, int)) for z in (t, u))
        h = nn.relu(jax.ops.segment_sum(nn.Dense(WIDTH)(x)[s], r, NODES))
        return jax.ops.segment_sum(nn.Dense(WIDTH)(h)[t], u, NODES)


def test_a_second_graph_of_as_many_edges_is_another_graph():
    shape, path = (NODES, 32), "Dense_0"
    rows = [vs.predict(TwoGraphs(more), jax.ShapeDtypeStruct(shape, jnp.float32))[path] for more in (0, 1)]
    # Both are drawn: each is off by its bound once in 10,000 times.
    assert rows[0].gradient == pytest.approx(rows[1].gradient, rel=math.hypot(*(r.gradient_error_bound for r in rows)))
    measured, error = drawn.gradients(TwoGraphs(0), shape, {path: (NODES, WIDTH)}, 100)
    assert drawn.agrees(rows[0].gradient, rows[0].gradient_error_bound, measured[0], error[0])
