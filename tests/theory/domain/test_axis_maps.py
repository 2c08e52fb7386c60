"""The counting theorem against all pairs written out, for maps of every kind that rules make."""

import itertools

import numpy as np
import pytest

from varscale.theory.domain.axes import Axis, labelled
from varscale.theory.domain.axis_maps import adjoint, entry_map, identity_map, pair_counts, slice_map
from varscale.theory.graph.convolutions import Window, hits, output_axis, tap_pairs

INNER = labelled([0, 0, 1, 1, 1, 2, 2, 0, 0, 1, 1, 2])


def kind(axis, i, j):
    """The type of a pair of positions."""
    c, labels = axis.classes, axis.label_array
    return labels[i] if i == j else c + labels[i] * c + labels[j]


def enumerated(a, b):
    """Mean weight of input pairs by type behind output pairs by type, pair by pair."""
    table, number = np.zeros((a.out.types, a.inner.types)), np.zeros(a.out.types)
    first, second = a.matrix.toarray(), b.matrix.toarray()
    for p, q in itertools.product(range(a.out.size), repeat=2):
        row = kind(a.out, p, q)
        number[row] += 1
        for i, j in itertools.product(np.flatnonzero(first[p]), np.flatnonzero(second[q])):
            table[row, kind(a.inner, i, j)] += first[p, i] * second[q, j]
    return table / np.maximum(number, 1)[:, None]


def window_map(window, inner, out=None):
    out = output_axis(window, inner) if out is None else out
    at = hits(window, inner.size)
    rows = np.repeat(np.arange(window.size_out), window.taps)
    return entry_map(rows, at.ravel(), out, inner)


def random_map(seed, out, inner, entries=30):
    rng = np.random.default_rng(seed)
    return entry_map(
        rng.integers(-1, out.size, entries), rng.integers(0, inner.size, entries), out, inner, rng.normal(size=entries)
    )


MAPS = {
    "window": window_map(Window(12, 3, 1, 1, 1, 1), INNER),
    "strided window": window_map(Window(6, 3, 2, 0, 1, 1), INNER),
    "dilated window": window_map(Window(12, 5, 1, 4, 1, 2), INNER),
    "slice": slice_map((2, 9, 1), INNER),
    "reversed slice": slice_map((9, 2, -2), INNER),
    "segments": random_map(0, labelled([0, 0, 1, 1, 2]), INNER),
    "lookup": entry_map(np.arange(12), np.random.default_rng(1).integers(0, 7, 12), INNER, Axis(7)),
    "mean": entry_map(np.repeat(np.arange(12), 12), np.tile(np.arange(12), 12), INNER, INNER, 1 / 12),
    "nothing": entry_map(np.full(3, -1), np.zeros(3, int), Axis(4), INNER),
}


@pytest.mark.parametrize("name", MAPS)
def test_pairs_are_counted_as_one_by_one(name):
    a = MAPS[name]
    np.testing.assert_allclose(pair_counts(a), enumerated(a, a), atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_pairs_of_two_maps_are_counted_as_one_by_one(seed):
    out = labelled([0, 1, 1, 0, 2, 2])
    a, b = random_map(seed, out, INNER), random_map(seed + 10, out, INNER)
    np.testing.assert_allclose(pair_counts(a, b), enumerated(a, b), atol=1e-12)


def test_moments_and_cotangents_have_one_inner_product():
    """⟨A M Aᵀ, G⟩ = ⟨M, Aᵀ G A⟩, by type."""
    a, rng = MAPS["strided window"], np.random.default_rng(0)
    counts = pair_counts(a)
    second, cotangent = rng.normal(size=a.inner.types), rng.normal(size=a.out.types)
    forward = ((counts @ second) * cotangent * a.out.pairs).sum()
    assert forward == pytest.approx((second * (adjoint(counts, a.out, a.inner) @ cotangent) * a.inner.pairs).sum())


def test_means_are_those_of_classes():
    a, x = MAPS["segments"], np.array([1.0, -2.0, 3.0])
    y = a.matrix @ x[INNER.label_array]
    expected = [y[a.out.label_array == c].mean() for c in range(a.out.classes)]
    np.testing.assert_allclose(a.means() @ x, expected)


def test_the_identity_counts_nothing_twice():
    np.testing.assert_allclose(pair_counts(identity_map(INNER)), np.diag((INNER.pairs > 0).astype(float)))


@pytest.mark.parametrize("window", [Window(12, 3, 1, 1, 1, 1), Window(6, 3, 2, 0, 1, 1), Window(12, 5, 1, 4, 1, 2)])
def test_taps_are_the_map_tap_by_tap(window):
    out = output_axis(window, INNER)
    same, other = tap_pairs(window, INNER, out)
    at = hits(window, INNER.size)
    by_tap = sum(enumerated(*[entry_map(np.arange(window.size_out), at[:, t], out, INNER)] * 2) for t in range(window.taps))
    np.testing.assert_allclose(same, by_tap, atol=1e-12)
    np.testing.assert_allclose(same + other, enumerated(*[window_map(window, INNER)] * 2), atol=1e-12)


def test_reads_are_the_window_against_the_identity():
    read, own = window_map(Window(12, 3, 1, 1, 1, 1), INNER, INNER), identity_map(INNER)
    np.testing.assert_allclose(pair_counts(read, own), enumerated(read, own), atol=1e-12)


def test_one_output_position_has_one_type_of_pair():
    """A mean over an axis: of two positions of it a share 1/12 is one position, by class of both."""
    mean = entry_map(np.zeros(12, int), np.arange(12), Axis(1), INNER, 1 / 12)
    np.testing.assert_allclose(pair_counts(mean), INNER.any_pair[None])
