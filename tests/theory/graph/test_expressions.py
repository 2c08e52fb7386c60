"""Draws follow from what is drawn: not from node ids, nor from what else is in the graph."""

import jax
import jax.numpy as jnp
import numpy as np

import varscale as vs
from varscale.theory.domain.axes import Axis
from varscale.theory.graph.expressions import Sum, content, hashed
from varscale.theory.graph.nodes import Graph, Node, View, leaf
from varscale.theory.graph.normal_form import affine

WIDTH = 24


def weights(key):
    return {name: jax.random.normal(k, (WIDTH, WIDTH)) / 5 for name, k in zip("abc", jax.random.split(key, 3), strict=True)}


def sorted_products(w, x):
    with jax.named_scope("region"):
        return jnp.sort(jnp.tanh(x @ w["a"]), axis=-1) @ w["b"]


def beside_another_layer(w, x):
    with jax.named_scope("other"):
        other = jax.nn.gelu(x @ w["c"])
    return sorted_products(w, x), other


def test_a_layer_that_is_inserted_changes_no_draws_of_a_region():
    x = jax.ShapeDtypeStruct((6, WIDTH), jnp.float32)
    alone, beside = (vs.predict(f, x, params=weights)["region"] for f in (sorted_products, beside_another_layer))
    assert alone.how == "sampled"
    assert (alone.second_moment, alone.band) == (beside.second_moment, beside.band)


def test_another_variance_of_the_weights_rescales_the_draws():
    def scaled(std):
        def drawn(key):
            return {name: std * w for name, w in weights(key).items()}

        return vs.predict(sorted_products, jax.ShapeDtypeStruct((6, WIDTH), jnp.float32), params=drawn)["region"]

    small, large = scaled(1e-3), scaled(3e-3)  # where tanh is linear
    assert small.how == "sampled"
    np.testing.assert_allclose(large.second_moment / small.second_moment, 3.0**4, rtol=1e-4)  # with other draws a per cent off


def summed(graph: Graph, *names: str) -> Node:
    """A sum of leaves, made in this order."""
    leaves = {name: leaf(graph, name, (Axis(4),), 0.0, 1.0, odd=True) for name in names}
    order = sorted(leaves.values(), key=lambda node: node.id)
    return graph.make(Sum, (Axis(4),), [View(node, (0,)) for node in order], (1.0,) * len(order))


def test_content_is_that_of_equal_nodes_alone():
    first, second = Graph(), Graph()
    leaf(second, "unrelated", (Axis(3),), 0.0, 1.0, odd=True)
    assert content(summed(first, "a", "b")) == content(summed(second, "b", "a"))
    assert content(summed(first, "a", "b")) != content(summed(second, "a", "c"))
    assert content(affine(summed(first, "a", "b"), 2.0, 0.0)) == content(affine(summed(first, "a", "b"), 3.0, 0.0))
    assert content(affine(summed(first, "a", "b"), 2.0, 0.0)) != content(affine(summed(first, "a", "b"), -2.0, 0.0))
    assert hashed(jax.random.key(0)) != hashed(jax.random.key(1))
    assert hashed(jnp.ones(2)) != hashed(jnp.ones((2, 1)))
