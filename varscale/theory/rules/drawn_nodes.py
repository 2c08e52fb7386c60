"""Nodes drawn by themselves, at other sizes: for moments of a function of one array that no formula gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from varscale.theory.domain.axes import Axis, pool, refine
from varscale.theory.domain.tables import Table, estimate, gaussian, over_frame
from varscale.theory.graph.expressions import roots
from varscale.theory.graph.nodes import Array, Node, View
from varscale.theory.integrals.hermite_series import read_off
from varscale.theory.propagation.marginals import concentrated, evaluate, marginal

_MOST_DRAWN = 2_000_000  # elements drawn for one node


def draw(node: Node, sizes: Sequence[int], replicates: int, rng: np.random.Generator) -> np.ndarray:
    """Arrays with a node's law at other sizes: its roots are drawn, its tree is evaluated. (replicates, *sizes)

    The scale of a norm is a number here, as it is in quadrature: what it normalises is Gaussian given it, x = √v·z, so that
    x/√v is z whatever v is, and x/√(E v) with x drawn alone has the law of z. E[1/v] of v drawn apart would be left over.

    Args:
        node: the node.
        sizes: how many positions of each of its axes.
        replicates: how many arrays.
        rng: where random numbers come from.
    """
    env: dict[Any, np.ndarray] = {}
    every = roots(node)
    held = {
        r for r in every if concentrated(r.node) and any(r.node.deps & o.node.deps for o in every if o != r)
    }
    # Trees are evaluated over a frame with the replicates last, as quadrature points are.
    for root in every:
        own = [sizes[b] for b in root.bind]
        if root in held:
            drawn = np.full((replicates, *own), root.node.table.total_mean)
        elif isinstance(root.node, Array):
            numbers = np.asarray(root.node.values, float)[tuple(slice(0, n) for n in own)]
            drawn = np.repeat(numbers[None], replicates, 0)
        else:
            law = marginal(root.node)
            plain = [Axis(axis.size) for axis in root.node.axes]
            rho = pool(law.correlation, root.node.axes)
            normals = gaussian(rho, plain, [np.arange(n) for n in own], replicates, rng)
            line = np.asarray(law.values, float)
            for axis in root.node.axes:
                line = np.tensordot(axis.counts / axis.size, line, axes=(0, 0))
            drawn = read_off(line, normals)
        env[root] = over_frame(np.moveaxis(drawn, 0, -1), root.bind, len(sizes))
    out = evaluate(View(node, tuple(range(len(node.axes)))), node.axes, env)
    return np.moveaxis(np.broadcast_to(out, (*sizes, replicates)), -1, 0)


def sample_map(
    nodes: Sequence[Node],
    whole: Sequence[set[int]],
    axes: Sequence[Axis],
    f: Callable[..., np.ndarray],
    small: int = 2,
) -> Table:
    """Moments of f of some nodes, their axes in `whole` kept at full size and the others reduced to `small`."""
    sizes = [
        [a.size if k in keep else min(a.size, small) for k, a in enumerate(n.axes)]
        for n, keep in zip(nodes, whole, strict=True)
    ]
    replicates = int(np.clip(_MOST_DRAWN / max(sum(math.prod(s) for s in sizes), 1), 16, 20_000))
    rng = np.random.default_rng(0)
    out = f(*[draw(n, s, replicates, rng) for n, s in zip(nodes, sizes, strict=True)])
    return pooled_estimate(out, axes)


def pooled_estimate(samples: np.ndarray, axes: Sequence[Axis]) -> Table:
    """A table with one class an axis, from replicates (first axis) at reduced sizes."""
    reduced = [Axis(n) for n in samples.shape[1:]]
    keep = [k for k, a in enumerate(reduced) if a.size > 1]
    squeezed = samples.reshape(len(samples), *[reduced[k].size for k in keep])
    live = [reduced[k] for k in keep]
    # The replicates are one more axis, of which only "the same" is wanted.
    table = estimate(squeezed, [Axis(len(samples)), *live])
    second, mean = table.second[0], table.mean.reshape([1] * len(live))
    for k in range(len(axes)):
        if k not in keep:
            second = np.repeat(np.expand_dims(second, k), 2, axis=k)
            mean = np.expand_dims(mean, k)
    mean = np.broadcast_to(mean, [a.classes for a in axes])
    return Table(tuple(axes), np.array(mean), refine(second, axes))
