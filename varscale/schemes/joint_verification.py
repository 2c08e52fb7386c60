"""Was a law of two leaves applied? The product of the factors that `mimetic` draws together, and what they have in common."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from varscale.initializers.distributions import distribution
from varscale.programs.patterns import canonical
from varscale.programs.trees import to_numpy
from varscale.schemes.joint_laws import Factor, Together
from varscale.testing.goodness import distribution_function
from varscale.testing.tails import log_mean_square, log_symmetric_sum
from varscale.testing.verdict import Finding, equality

if TYPE_CHECKING:
    from varscale.schemes.plan import Plan

_ROUNDING = 64  # epsilons of the weights by which what two decompositions share may differ


class Half(NamedTuple):
    """One factor: its path, its law, the maps (count, width, rank), and the epsilon of its weights."""

    path: str
    law: Factor
    maps: np.ndarray
    eps: float


def products(plan: Plan, values: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[Finding, ...]]]:
    """The paths of both factors, their law in words, and the findings about their product.

    Where the rank is the whole width, (product − βI)/α has independent normal entries of variance 1/width: second moment, mean
    and distribution are tested. Where it is less, the product is the best approximation of that rank: its largest singular
    value is at most β + α(2 + t) but for a chance of exp(−width t²/2) (Davidson & Szarek 2001, theorem 2.13), and the sum of
    squares of rank k at least k/width that of the whole, which is a noncentral χ² (Birgé 2001, lemma 8.1). In both cases the
    factors of a singular value decomposition have orthogonal columns of the same lengths.
    """
    found: dict[tuple[str, int], dict[str, Half]] = {}
    for leaf in plan.leaves:
        for shared, half in _halves(leaf.path, leaf.law, values):
            found.setdefault((shared, half.law.tag), {})[half.law.side] = half
    for pair in found.values():
        if len(pair) == 2:
            left, right = pair["left"], pair["right"]
            paths = left.path if left.path == right.path else f"{left.path} · {right.path}"
            words = f"{left.law.noise:g} Z + {left.law.identity:g} I"
            yield paths, words, tuple(_findings(left, right))


def _halves(path: str, law: Any, values: Mapping[str, Any]) -> Iterator[tuple[str, Half]]:
    """The factors that a leaf holds, each with the key that it shares."""
    if not isinstance(law, Factor | Together):
        return
    weights = to_numpy(values[canonical(path)], path)
    if isinstance(law, Factor):
        yield law.shared, _half(path, law, weights)
        return
    for one, block in law.cut(weights):
        if isinstance(one, Factor):
            yield law.shared, _half(path, one, block)


def _half(path: str, law: Factor, weights: np.ndarray) -> Half:
    batch = [axis for axis in range(weights.ndim) if axis not in (*law.in_axes, *law.out_axes)]
    inputs, outputs = (math.prod(weights.shape[a] for a in axes) for axes in (law.in_axes, law.out_axes))
    maps = weights.transpose([*batch, *law.in_axes, *law.out_axes]).reshape(-1, inputs, outputs).astype(np.float64)
    if law.writes:
        maps = maps.swapaxes(1, 2)
    count, width, rank = maps.shape
    heads = maps.reshape(count, width, law.heads, rank // law.heads).swapaxes(1, 2).reshape(count * law.heads, width, -1)
    return Half(path, law, heads, float(jnp.finfo(weights.dtype).eps))


def _findings(left: Half, right: Half) -> Iterator[Finding]:
    (count, width, rank), law, eps = left.maps.shape, left.law, max(left.eps, right.eps)
    grams = [np.einsum("nwr,nws->nrs", half.maps, half.maps) for half in (left, right)]
    values = np.diagonal(grams[0], axis1=1, axis2=2)
    apart = max(float(np.max(np.abs(gram - values[:, None] * np.eye(rank)))) for gram in grams)
    largest = float(np.max(values))
    says = f"off orthogonal columns of equal lengths by {apart:.3g}, of singular values up to {largest:.4g}"
    yield equality("factors", apart <= _ROUNDING * eps * max(largest, 1e-30), says)
    if not law.noise or eps > 1e-4:  # rounded to few bits, a product has no exact law
        return
    if rank == width:
        made = np.einsum("nwr,nvr->nwv", left.maps, right.maps) - law.identity * np.eye(width)
        yield from _normal((made / law.noise * math.sqrt(width)).reshape(-1))
    else:
        yield from _truncated(values, count, width, rank, law.noise, abs(law.identity))


def _normal(z: np.ndarray) -> Iterator[Finding]:
    """Findings about numbers that are to be independent standard normals."""
    normal, ratio = distribution("normal"), float(np.mean(z**2))
    says = f"the product without its identity has {math.sqrt(ratio):.5g} times the planned deviation"
    yield Finding("second moment", min(0.0, math.log(2) + min(log_mean_square(normal, ratio, z.size))), says)
    score = abs(float(z.sum())) / math.sqrt(float(z @ z))
    yield Finding("mean", float(log_symmetric_sum(score)), f"{score:.3g} standard errors")
    yield distribution_function(z, normal, 1e-4)


def _truncated(values: np.ndarray, count: int, width: int, rank: int, noise: float, identity: float) -> Sequence[Finding]:
    """Findings about the largest singular values of noisy identities."""
    top = float(values.max())
    beyond = max(0.0, (top - identity) / noise - 2)
    above = min(0.0, math.log(count) - width * beyond**2 / 2)
    entries, shift = count * width**2, count * width**2 * (identity / noise) ** 2
    whole = float(np.sum(values**2)) * width / rank * width / noise**2
    short = max(0.0, entries + shift - whole)
    below = -(short**2) / (4 * (entries + 2 * shift))
    says = f"largest singular value {top:.4g}, sum of squares {np.sum(values**2) / count:.4g} a map"
    return [Finding("largest singular value", above, says), Finding("sum of squares", below, says)]
