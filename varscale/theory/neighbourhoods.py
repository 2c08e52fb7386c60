"""Windows over places that are more alike the nearer they are: second moments of sums, and draws of what maxima are over."""

from __future__ import annotations

import functools
from collections.abc import Collection, Generator, Mapping, Sequence

import numpy as np

from varscale.theory.axes import Axis, labelled
from varscale.theory.draws import gaussian
from varscale.theory.graph import Node, View
from varscale.theory.nearby import Near, Offsets, answered, latent, usual
from varscale.theory.quadrature import marginal
from varscale.theory.rules.convolution import Window, hits

FAR = -1  # no distance in particular: anywhere else
_PAIRS = 2_000_000  # of taps, counted to know how far apart they are

Grid = Generator[tuple[Node, Offsets], Near, np.ndarray]


@functools.cache
def spans(window: Window, size: int, apart: int) -> dict[int, float]:
    """Mean number of pairs of taps by the distance of what they read, of two outputs so many places apart."""
    at = hits(window, size)
    first, second = at[: len(at) - apart], at[apart:]
    step = -(-len(first) * window.taps**2 // _PAIRS)
    first, second = first[::step, :, None], second[::step, None, :]
    real = (first >= 0) & (second >= 0)
    found, counts = np.unique(_rounded(np.abs(first - second)[real]), return_counts=True)
    return {int(d): float(c) / len(first) for d, c in zip(found, counts, strict=True)}


def _rounded(distances: np.ndarray) -> np.ndarray:
    """Distances that are told apart: powers of √2 beyond 4."""
    powers = np.rint(2 ** (np.rint(2 * np.log2(np.maximum(distances, 1))) / 2)).astype(int)
    return np.where(distances <= 4, distances, powers)


@functools.cache
def anywhere(window: Window, size: int) -> dict[int, float]:
    """The same of any two outputs, or one twice: a place read by both, and two places."""
    at = hits(window, size)
    reads = np.bincount(at[at >= 0], minlength=size).astype(float)
    met = float(np.sum(reads**2)) / len(at) ** 2
    return {0: met, FAR: (reads.sum() / len(at)) ** 2 - met}


def another(window: Window, size: int) -> dict[int, float]:
    """The same of two different outputs, any two."""
    n = window.size_out
    out = {d: n * c for d, c in anywhere(window, size).items()}
    for d, c in spans(window, size, 0).items():
        out[d] = out.get(d, 0.0) - c
    return {d: c / (n - 1) for d, c in out.items()}


def alike(weights: Mapping[int, float]) -> dict[int, float]:
    """The same where all distances are one."""
    return {0: weights.get(0, 0.0), FAR: sum(c for d, c in weights.items() if d != 0)}


def by_distance(node: Node, keys: Mapping[int, Sequence[int]]) -> Grid:
    """E[x_i x_j] at all combinations of distances along some axes, by "same" and "different" along the others."""
    before, rank = usual(node), len(node.axes)
    out = np.empty([len(keys[k]) if k in keys else 2 for k in range(rank)])
    for index in np.ndindex(*(len(keys[k]) if k in keys else 1 for k in range(rank))):
        distances = {k: keys[k][index[k]] for k in keys}
        offsets = tuple((k, d) for k, d in sorted(distances.items()) if d > 0)
        found = (yield node, offsets) if offsets else None
        table = before if found is None else before + found.excess
        at = tuple(slice(index[k], index[k] + 1) if k in keys else slice(None) for k in range(rank))
        out[at] = table[tuple(_one(distances[k]) if k in keys else slice(None) for k in range(rank))]
    return out


def _one(distance: int) -> slice:
    return slice(0, 1) if distance == 0 else slice(1, 2)


def read(node: Node, weights: Mapping[int, Sequence[Mapping[int, float]]]) -> Grid:
    """Sums over pairs of places along some axes, of each several: weights by distance."""
    keys = {k: sorted({d for line in lines for d in line}) for k, lines in weights.items()}
    out = yield from by_distance(node, keys)
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
    rho = answered(by_distance(node, {j: [FAR, *range(half)] for j, half in halves.items()}))
    table = node.table
    rho = np.clip((rho - table.total_mean**2) / max(table.variance, 1e-300), -1.0, 1.0)
    law = marginal(node)
    if not law.gaussian:
        rho = latent(law, rho)
    for j, axis in enumerate(node.axes):
        n = sizes[root.bind[j]]
        if j in halves:
            window, place = np.divmod(np.arange(n), halves[j])
            apart = np.where(window[:, None] == window, np.abs(place[:, None] - place), FAR) + 1  # places in the list above
            rho = rho.take(np.concatenate([np.ones(n, int), apart.ravel()]), axis=j)
            axes.append(labelled(np.arange(n)))
        else:
            axes.append(Axis(axis.size))
    return gaussian(rho, axes, [np.arange(sizes[b]) for b in root.bind], replicates, rng)
