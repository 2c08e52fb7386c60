"""Drawn entries where they are moved, joined and multiplied: those of NumPy, at whatever positions are asked for."""

import numpy as np
import pytest

from varscale.theory.domain.axes import Axis
from varscale.theory.graph.layout import merge, permute, split
from varscale.theory.graph.linear_nodes import Concat, Contract, Take
from varscale.theory.graph.nodes import Array, Graph, View, array
from varscale.theory.propagation import sampler

NUMBERS, OTHERS = (np.random.default_rng(k).normal(size=(4, n, 5)).astype("float32") for k, n in ((0, 6), (1, 3)))
MOVES = {
    "split": (lambda x: split(x, 1, (2, 3)), NUMBERS.reshape(4, 2, 3, 5)),
    "merged": (lambda x: merge(x, 1, 2), NUMBERS.reshape(4, 30)),
    "in another order": (lambda x: permute(x, (2, 0, 1)), NUMBERS.transpose(2, 0, 1)),
    "sliced": (lambda x: take(x, (1, 1, 6, 2), [4, 3, 5]), NUMBERS[:, 1:6:2]),
    "one position": (lambda x: take(x, (1, 4, 5, 1), [4, 5]), NUMBERS[:, 4]),
    "joined": (lambda x: joined(x, array(x.graph, OTHERS)), np.concatenate([NUMBERS, OTHERS], 1)),
    "multiplied": (lambda x: product(x, array(x.graph, OTHERS)), np.einsum("bif,bjf->bij", NUMBERS, OTHERS)),
}


def take(x, span, sizes):
    return x.graph.make(Take, [Axis(n) for n in sizes], [x.whole], span)


def joined(x, y):
    return x.graph.make(Concat, [Axis(n) for n in (4, 9, 5)], [x.whole, y.whole], (1, (6, 3)))


def product(x, y):
    axes = [Axis(n) for n in (4, 6, 3)]
    return x.graph.make(Contract, axes, [View(x, (0, 1, 3)), View(y, (0, 2, 3))], (Axis(5),))


@pytest.mark.parametrize("name", MOVES)
def test_drawn_entries_are_those_of_what_they_are_made_of(name, monkeypatch):
    monkeypatch.setattr(sampler, "in_order", lambda node: True)
    make, expected = MOVES[name]
    source = array(Graph(), np.concatenate([NUMBERS, NUMBERS]))
    node = make(take(source, (0, 4, 8, 1), NUMBERS.shape))  # known numbers themselves are moved as such
    assert not isinstance(node, Array)
    drawing = sampler.Drawing(2, lambda axis: np.arange(axis.size))
    for step in (1, 2, 3):
        positions = [np.arange(axis.size)[::step] for axis in node.axes]
        found = drawing.at(node.whole, node.axes, positions)
        np.testing.assert_allclose(found, [expected[np.ix_(*positions)]] * 2, rtol=1e-5, atol=1e-6)


def test_a_sum_over_an_axis_that_one_factor_lacks():
    """Axes of length 1 are constant: Σ over the others' places, and lengths of 1 that both have are kept."""
    x, y = (np.random.default_rng(k).normal(size=n) for k, n in ((0, (1, 3, 1, 2)), (1, (1, 1, 4, 1))))
    found = sampler.summed(x, y, 2)
    np.testing.assert_allclose(found, (x * y).sum(axis=2).transpose(2, 0, 1))
