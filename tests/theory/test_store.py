"""What is asked, and in which order, changes no number."""

import inspect
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs
from varscale.theory.graph.store import Fact, once_per_node
from varscale.theory.interpreter import predict
from varscale.theory.interpreter.interpreter import Interpreter
from varscale.theory.propagation.cotangents import cotangents
from varscale.theory.propagation.doubts import provenance
from varscale.theory.propagation.fluctuations import fluctuations
from varscale.theory.rules.linear import dot_general


class Block(nn.Module):
    """Attention and a feed-forward stream: cotangents that meet, shared tokens, norms."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(50, 32, name="embed")(ids)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x))
        return nn.Dense(4, name="out")(nn.gelu(nn.Dense(48, name="up")(nn.LayerNorm()(x))))


class Gated(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.tanh(nn.Dense(16, name="a")(x)) * nn.sigmoid(nn.Dense(16, name="b")(x)))


IDS = np.random.default_rng(0).integers(0, 50, (2, 12)).astype(np.int32)
X = jax.ShapeDtypeStruct((4, 8), jnp.float32)


def numbers(report):
    return {
        row.path: (row.second_moment, row.typical, row.gradient, row.error_bound, row.gradient_error_bound)
        for row in report.rows
    }


@pytest.fixture(scope="module")
def alone():
    return numbers(vs.predict(Block(), IDS)), numbers(vs.predict(Gated(), X))


def test_two_predictions_in_turn_are_what_each_is_alone(alone):
    assert numbers(vs.predict(Gated(), X)) == alone[1]
    assert numbers(vs.predict(Block(), IDS)) == alone[0]
    assert numbers(vs.predict(Gated(), X)) == alone[1]


def test_moments_are_the_same_without_gradients(alone):
    forward = numbers(vs.predict(Block(), IDS, backward=False))
    assert {path: row[0] for path, row in forward.items()} == {path: row[0] for path, row in alone[0].items()}


class _Graph:
    def __init__(self):
        self.store, self.nested = {}, 0


class _Node:
    id = 3

    def __init__(self, graph):
        self.graph = graph


def test_a_fact_belongs_to_one_graph():
    one, other, sizes = _Graph(), _Graph(), Fact()
    sizes.put(one, "a", 1)
    assert (sizes.get(one, "a"), sizes.get(other, "a")) == (1, None)
    assert sizes.once(other, "a", lambda: 2) == 2
    assert sizes.get(one, "a") == 1


def test_two_kinds_of_facts_with_one_key_are_apart():
    graph, first, second = _Graph(), Fact(), Fact()
    first.put(graph, 0, "x")
    assert second.get(graph, 0) is None


def test_once_per_node_works_once_for_each_argument():
    seen = []

    @once_per_node
    def work(node, k):
        """Say what was asked."""
        seen.append(k)
        return k + node.id

    node = _Node(_Graph())
    assert [work(node, 1), work(node, 1), work(node, 2)] == [4, 4, 5]
    assert seen == [1, 2]
    assert work.__doc__ == "Say what was asked."


def product(interpreter, x, w):
    eqn = types.SimpleNamespace(params={"dimension_numbers": (((1,), (0,)), ((), ()))})
    return dot_general(interpreter, eqn, x, w)


def test_gradients_asked_twice_and_in_any_order_of_rows_are_the_same():
    def asked(order, times):
        interpreter = Interpreter()
        x = interpreter.leaf(("input", 0), (4, 16), 0.0, 1.0, odd=False)
        w, v = (interpreter.leaf(("weight", i), (16, 16), 0.0, 1 / 16, odd=True) for i in range(2))
        first = product(interpreter, x, w)
        bent = interpreter.elementwise("tanh", first)
        stream = interpreter.elementwise("add", bent, interpreter.elementwise("mul", bent, first))
        out = product(interpreter, stream, v)
        watched = [first.node, bent.node, stream.node]
        found = {}
        for _ in range(times):
            for some in order:
                rows = [watched[i] for i in some]
                found.update(cotangents([(out.node, np.ones(out.node.frame_types))], rows))
        return [found[node.id] for node in watched]

    expected = asked([[0, 1, 2]], 1)
    assert asked([[0, 1, 2]], 3) == expected
    assert asked([[2, 1, 0]], 1) == expected
    assert asked([[2], [1], [0]], 1) == expected


def test_functions_of_nearly_one_scale_asked_in_any_order():
    """tanh of roots whose scales differ by 1e-8 and by 1e-6, and what it makes of their fluctuations."""

    def asked(order):
        interpreter = Interpreter()
        leaves = [interpreter.leaf(("input", i), (8, 64), 0.0, 1 + by, odd=True) for i, by in enumerate((0.0, 1e-8, 1e-6))]
        nodes = [interpreter.elementwise("tanh", x).node for x in leaves]
        found = {i: (nodes[i].table.mean_square, fluctuations(nodes[i]).variance, provenance(nodes[i])) for i in order}
        return [found[i] for i in range(3)]

    first = asked((0, 1, 2))
    assert first == asked((2, 1, 0)) == asked((1, 2, 0))
    squares = [square for square, *_ in first]
    assert squares[0] < squares[1] < squares[2]


def test_rows_asked_before_the_gradients_are_what_they_are_after(alone, monkeypatch):
    asked = predict.gradients_of

    def late(interpreter, found, taps):
        for made in reversed(found):
            _ = made.value.node.table, fluctuations(made.value.node)
        return asked(interpreter, found, taps)

    monkeypatch.setattr(predict, "gradients_of", late)
    assert numbers(vs.predict(Block(), IDS)) == alone[0]


class _Link:
    """A chain of nodes, as `once_per_node` sees them."""

    def __init__(self, graph, id_, below=None):
        self.graph, self.id, self.below = graph, id_, below


@once_per_node
def _height(link):
    return 0 if link.below is None else 1 + _height(link.below)


def test_chains_need_no_stack_of_pythons():
    """Ten times as many links as Python allows calls."""
    graph = _Graph()
    top, count = None, 10 * sys.getrecursionlimit()
    for k in range(count):
        top = _Link(graph, k, top)
    assert _height(top) == count - 1


def test_hundreds_of_layers_asked_from_the_top_down():
    """Streams of sums of functions of sums: the last moments first, within a third of Python's usual stack."""
    interpreter = Interpreter()
    x = interpreter.leaf("x", (4, 8), 0.0, 1.0, odd=True)
    for k in range(500):
        w = interpreter.leaf(("w", k), (8, 8), 0.0, 1e-4, odd=True)
        branch = product(interpreter, interpreter.elementwise("tanh", x), w)
        x = interpreter.elementwise("add", x, branch)
    limit, frames = sys.getrecursionlimit(), len(inspect.stack())
    sys.setrecursionlimit(frames + 333)
    try:
        found = x.node.table.mean_square
        bound = provenance(x.node)[1]
    finally:
        sys.setrecursionlimit(limit)
    assert 1.1 < found < 1.3
    assert np.isfinite(bound)
