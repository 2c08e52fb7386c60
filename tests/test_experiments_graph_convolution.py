"""The graph net: its sparse product and that product's gradient, its depth as an argument, and the law's factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

import varscale as vs
from experiments import graph_convolution as experiment
from experiments.lab import graphs
from experiments.nets import graph_net

GRAPH = graphs.synthetic()


@pytest.mark.parametrize("row", [64, 2])  # rows that fit, and rows whose rest stands in the list
def test_sparse_product_and_gradient_are_the_dense_ones(monkeypatch, row):
    monkeypatch.setattr(graph_net, "ROW", row)
    dense = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float32)
    dense[np.random.default_rng(1).random((6, 9)) < 0.5] = 0
    matrix = graph_net.Sparse.of(sparse.csr_array(dense))
    x = jax.random.normal(jax.random.key(0), (3, 9, 4))

    def total(product):
        return lambda x: jnp.sum(jnp.sin(product(x)))

    ours = jax.vmap(jax.value_and_grad(total(lambda x: graph_net.product(matrix, x))))(x)
    theirs = jax.vmap(jax.value_and_grad(total(lambda x: jnp.asarray(dense) @ x)))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


def test_depth_is_an_argument_and_the_net_is_the_formula():
    nodes = graph_net.Nodes.of(GRAPH)
    params = jax.tree.map(
        lambda leaf: leaf[0], graph_net.draw(jax.random.split(jax.random.key(0), 1), vs.he_normal(), nodes, 3)
    )
    adjacency = GRAPH.normalized_adjacency().toarray()
    run = jax.jit(lambda depth: graph_net.Net(3, vs.zeros).apply({"params": params}, nodes, depth))
    for depth in (2, 4):
        x = np.maximum(adjacency @ GRAPH.features @ params["first"]["kernel"], 0)
        for layer in range(depth - 2):
            x = np.maximum(adjacency @ x @ params["hidden"]["kernel"][layer], 0)
        logits, moments = run(depth)
        np.testing.assert_allclose(logits, adjacency @ x @ params["last"]["kernel"], rtol=1e-3, atol=1e-5)
        assert int(np.isfinite(moments).sum()) == depth
    assert run._cache_size() == 1


def test_training_learns_the_stand_in():
    nodes = graph_net.Nodes.of(GRAPH)
    params = graph_net.draw(jax.random.split(jax.random.key(0), 2), vs.he_uniform(), nodes, 3)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam raises a float to an integer power
        loss, accuracy = graph_net.train(params, nodes, 2, 0.01, classes=3, epochs=60)
    assert loss.shape == accuracy.shape == (2, 60)
    assert float(loss[:, -1].max()) < 0.5 * float(loss[:, 0].min())


def test_relu_kernel_is_the_closed_form():
    """Arc-cosine kernel at correlations 1, 0 and .5: 1/2, 1/2π and maths.md's formula."""
    c = 0.5
    covariance = np.array([[1, 0, c], [0, 1, 0], [c, 0, 1]], np.float64)
    expected = (np.sqrt(1 - c**2) + (np.pi - np.arccos(c)) * c) / (2 * np.pi)
    kernel = experiment.relu_kernel(covariance)
    np.testing.assert_allclose([kernel[0, 0], kernel[0, 1], kernel[0, 2]], [0.5, 1 / (2 * np.pi), expected], rtol=1e-12)


def test_the_adjacency_leaves_sum_of_squares_of_unrelated_features():
    graph = graphs.Graph("identity", GRAPH.edges, np.eye(60, dtype=np.float32), GRAPH.labels, GRAPH.train, GRAPH.test)
    factors, unrelated = experiment.predicted_factors(graph)
    dense = graph.normalized_adjacency().toarray()
    np.testing.assert_allclose([factors[0], unrelated], (dense**2).sum() / 60, rtol=1e-5)
    assert factors[0] < factors[5] < 1.001  # alike features lose no more
