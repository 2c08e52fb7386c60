"""Windows over places that are more alike the nearer they are: second moments of sums, and draws of what maxima are over."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from varscale.theory.domain.axes import Axis, labelled, pool
from varscale.theory.domain.random_arrays import gaussian
from varscale.theory.domain.tables import full_types
from varscale.theory.graph.convolutions import Window, hits
from varscale.theory.graph.nodes import Node, View
from varscale.theory.propagation.cross_moments import cross
from varscale.theory.propagation.marginals import marginal
from varscale.theory.propagation.sampler import evenly
from varscale.theory.propagation.spatial_correlation import between, latent_by_distance, usual

FAR = -1  # no distance in particular: anywhere else
_ROWS = 64  # windows whose taps are counted, to know how far apart they are


class Reader(NamedTuple):
    """What meets at two places along an axis, as weights by distance; of two windows, or of a window and a single place."""

    window: Window
    size: int
    other: Window

    def apart(self, distance: int) -> dict[int, float]:
        """At places so far apart."""
        return _places_apart(self, distance)

    def elsewhere(self) -> dict[int, float]:
        """At any two places that differ."""
        n = self.window.size_out
        out = {d: n * c for d, c in _at_any_place(self).items()}
        for d, c in self.apart(0).items():
            out[d] = out.get(d, 0.0) - c
        return {d: c / (n - 1) for d, c in out.items()}


def of_windows(window: Window, size: int) -> Reader:
    """Of two windows over an axis of this size."""
    return Reader(window, size, window)


def of_places(window: Window, size: int) -> Reader:
    """Of a window and a place of the axis itself, which has as many as there are windows."""
    return Reader(window, size, Window(size, 1, 1, 0, 1, 1))


@functools.cache
def _places_apart(reader: Reader, distance: int) -> dict[int, float]:
    first, second = (hits(window, reader.size) for window in (reader.window, reader.other))
    n = len(first) - distance
    if n < 1:
        return reader.elsewhere()
    if distance == 0 and all(
        np.array_equal(np.sort(at, axis=1), [range(reader.size)] * len(at)) for at in (first, second)
    ):
        return _at_any_place(reader)  # each reads all there is, of which the mean over all pairs is known
    rows = evenly(n, _ROWS)
    pairs = ((first[rows], second[rows + distance]), (first[rows + distance], second[rows]))
    apart = [
        np.abs(one[:, :, None] - two[:, None, :])[(one >= 0)[:, :, None] & (two >= 0)[:, None, :]]
        for one, two in pairs
    ]
    met, counts = np.unique(_distance_level(np.concatenate(apart)), return_counts=True)
    return {int(d): float(n) / (2 * len(rows)) for d, n in zip(met, counts, strict=True)}


@functools.cache
def _at_any_place(reader: Reader) -> dict[int, float]:
    first, second = (hits(window, reader.size) for window in (reader.window, reader.other))
    one, two = (np.bincount(at[at >= 0], minlength=reader.size) / len(at) for at in (first, second))
    met = float(one @ two)
    return {0: met, FAR: float(one.sum() * two.sum()) - met}


def _distance_level(distances: np.ndarray) -> np.ndarray:
    """Distances that are told apart: powers of √2 beyond 4, the next lower one."""
    powers = np.floor(2 ** (np.floor(2 * np.log2(np.maximum(distances, 1)) + 1e-9) / 2) + 1e-9).astype(int)
    return np.where(distances <= 4, distances, powers)


def all_alike(weights: Mapping[int, float]) -> dict[int, float]:
    """The same where all distances are one."""
    return {0: weights.get(0, 0.0), FAR: sum(c for d, c in weights.items() if d != 0)}


def by_distance(x: Node, y: Node, keys: Mapping[int, Sequence[int]]) -> np.ndarray:
    """E[x_i y_j] at all combinations of distances along some axes, by "same" and "different" along the others."""
    rank = len(x.axes)
    whole = tuple(range(rank))
    before = (
        usual(x)
        if x is y
        else pool(full_types(cross(View(x, whole), View(y, whole), x.axes), x.axes), x.axes)
    )
    out = np.empty([len(keys[k]) if k in keys else 2 for k in range(rank)])
    for index in np.ndindex(*(len(keys[k]) if k in keys else 1 for k in range(rank))):
        distances = {k: keys[k][index[k]] for k in keys}
        offsets = tuple((k, d) for k, d in sorted(distances.items()) if d > 0)
        found = (between(x, y, offsets)) if offsets else None
        table = before if found is None else before + found.excess
        if found is not None and found.doubt > 0:
            x.graph.flag("quadrature", found.doubt)
        at = tuple(slice(index[k], index[k] + 1) if k in keys else slice(None) for k in range(rank))
        out[at] = table[tuple(_one(distances[k]) if k in keys else slice(None) for k in range(rank))]
    return out


def _one(distance: int) -> slice:
    return slice(0, 1) if distance == 0 else slice(1, 2)


def read(x: Node, y: Node, weights: Mapping[int, Sequence[Mapping[int, float]]]) -> np.ndarray:
    """Sums of E[x_i y_j] over pairs of places along some axes, of each several: weights by distance."""
    keys = {k: sorted({d for line in lines for d in line}) for k, lines in weights.items()}
    out = by_distance(x, y, keys)
    for k, lines in weights.items():
        matrix = np.array([[line.get(d, 0.0) for d in keys[k]] for line in lines])
        out = np.moveaxis(np.tensordot(matrix, out, axes=(1, k)), 0, k)
    return out


def latents(
    root: View, sizes: Sequence[int], windowed: Collection[int], replicates: int, rng: np.random.Generator
) -> np.ndarray:
    """Normals behind a root: along `windowed` axes of its frame, those of two windows far apart. (replicates, *sizes)"""
    node, axes = root.node, []
    halves = {j: sizes[place] // 2 for j, place in enumerate(root.bind) if place in windowed}
    rho = by_distance(node, node, {j: [FAR, *range(half)] for j, half in halves.items()})
    table = node.table
    rho = np.clip((rho - table.total_mean**2) / max(table.variance, 1e-300), -1.0, 1.0)
    law = marginal(node)
    if not law.gaussian:
        rho = latent_by_distance(law, rho)
    for j, axis in enumerate(node.axes):
        n = sizes[root.bind[j]]
        if j in halves:
            window, place = np.divmod(np.arange(n), halves[j])
            apart = (
                np.where(window[:, None] == window, np.abs(place[:, None] - place), FAR) + 1
            )  # places in the list above
            rho = rho.take(np.concatenate([np.ones(n, int), apart.ravel()]), axis=j)
            axes.append(labelled(np.arange(n)))
        else:
            axes.append(Axis(axis.size))
    return gaussian(rho, axes, [np.arange(sizes[b]) for b in root.bind], replicates, rng)
