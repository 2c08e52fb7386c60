"""Moments of elementwise functions of jointly Gaussian (or Gaussian-copula) roots.

A root is a monotone function T of a standard normal: m + s·z where it is Gaussian, a quantile function where it is not (random
bits, known numbers, positive averages, sums of few things). A function of one root needs its Hermite coefficients a_k in z
once; then every type of index pair with latent correlation ρ costs one polynomial, E[f(x_i) g(x_j)] = Σ a_k b_k ρ^k
(`hermite_series`). That the normals behind roots which are not Gaussian are JOINTLY normal, with the correlations that give the
roots theirs, is an assumption: the Gaussian copula, as Nataf (1962) takes it. Nothing is assumed of Gaussian roots.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, reduce, singledispatch

import numpy as np
from scipy import special

from varscale.theory.domain.axes import equal
from varscale.theory.domain.tables import NEGLIGIBLE, NEXT_ORDER, Axes, Table, by_type, means_by_type
from varscale.theory.graph.expressions import Apply, Mean, Sum, connected, factors, roots, roots_of
from varscale.theory.graph.linear_nodes import Concat, Rearranged
from varscale.theory.graph.nodes import Array, Constant, Graph, Leaf, Node, View
from varscale.theory.graph.store import once_per_node
from varscale.theory.integrals.hermite_series import DEGREE, HERMITE, POINTS, Z, solved
from varscale.theory.integrals.primitives import function
from varscale.theory.propagation.cross_moments import cross_covariance

# A deviation below which values are one number: at a kink what noise makes of it depends on its sign.
_NUMBER = 1e-10


@dataclasses.dataclass(frozen=True, eq=False)
class Marginal:
    """A root as a function of a standard normal: means and standard deviations by class; the rest when it is asked for."""

    root: Node
    mean: np.ndarray
    deviation: np.ndarray

    @property
    def gaussian(self) -> bool:
        return quantiles(self.root) is None

    @cached_property
    def correlation(self) -> np.ndarray:
        """By type, of the normals behind it: those that give it its covariance (Nataf 1962); 1 where i = j."""
        root, table, axes = self.root, self.root.table, self.root.axes
        covariance, scale, values = table.covariance, self.deviation, quantiles(self.root)
        known = isinstance(root, Leaf | Array) or root.moves or root.drawn is not None
        summed = isinstance(root, Sum) and not root.is_variance
        if root.positive and not known and not summed and np.all(table.mean > 0):  # lognormal: in closed form
            scale, values = np.sqrt(np.log1p(np.square(scale / table.mean))), None
            covariance = np.log1p(np.maximum(covariance / table.outer, -1 + 1e-15))
        rho = np.array(_behind(covariance, means_by_type(scale, axes), (values, values), axes))
        rho[equal(axes)] = 1.0
        return rho

    @cached_property
    def values(self) -> np.ndarray:
        """On the normal grid, (classes..., points)."""
        line, varied = quantiles(self.root), np.where(self.deviation > _NUMBER, self.deviation, 0.0)
        return self.mean[..., None] + varied[..., None] * Z if line is None else line


@once_per_node
def marginal(root: Node) -> Marginal:
    """The marginal of a root, computed once."""
    table = root.table
    return Marginal(root, table.mean, np.sqrt(np.maximum(table.diagonal - table.mean**2, 0.0)))


@singledispatch
def quantiles_of_kind(root: Node, table: Table, deviation: np.ndarray) -> np.ndarray | None:
    """Values on the normal grid by the law that a kind of root has of its own; None where it has none."""
    return None


@once_per_node
def quantiles(root: Node) -> np.ndarray | None:
    """Values of a root that is not Gaussian on the normal grid, (classes..., points); None where it is."""
    if isinstance(root, Array):
        return followed(root, root)
    table, deviation = root.table, marginal(root).deviation
    line = root.transport if isinstance(root, Leaf) else root.drawn
    source = root.argument if root.moves and line is None else None  # other places, the same law
    moved = isinstance(source, Leaf | Array | Rearranged) and all(a.classes == 1 for a in source.axes)
    if moved and (inner := quantiles(source)) is not None:
        line = inner.reshape(-1, POINTS)[0]
    if line is not None or moved or isinstance(root, Leaf):
        return None if line is None else np.broadcast_to(line, (*table.mean.shape, POINTS))
    shape = quantiles_of_kind(root, table, deviation)
    if shape is not None:
        return np.maximum(shape, 0.0) if root.positive else shape
    if root.positive and np.all(table.mean > 0):
        spread = np.sqrt(np.log1p(np.square(deviation / table.mean)))[..., None]
        return table.mean[..., None] * np.exp(spread * Z - spread**2 / 2)
    return None


def followed(array: Array, leader: Array) -> np.ndarray:
    """Known numbers on the normal grid, in the order of others over the same axes. (classes..., points)."""
    out = np.empty((*[a.classes for a in leader.axes], POINTS))
    u = special.ndtr(Z)
    for cell in np.ndindex(*out.shape[:-1]):
        index = np.ix_(*[np.flatnonzero(a.label_array == c) for a, c in zip(leader.axes, cell, strict=True)])
        order = np.argsort(np.asarray(leader.values, float)[index].ravel(), kind="stable")
        chosen = np.asarray(array.values, float)[index].ravel()[order]
        out[cell] = chosen[np.minimum((u * len(chosen)).astype(int), len(chosen) - 1)]
    return out


def _behind(
    covariance: np.ndarray, scales: np.ndarray, lines: Sequence[np.ndarray | None], axes: Axes
) -> np.ndarray:
    """Correlations by type of two normals of which functions, `lines` (None: straight), have these covariances and scales."""
    rho = np.clip(covariance / np.maximum(scales, 1e-300), -1.0, 1.0)
    if all(line is None for line in lines):
        return rho
    a, b = (
        np.eye(DEGREE)[1]
        if line is None
        else by_type(line @ HERMITE, axes, second=bool(k)) * (np.arange(DEGREE) > 0)
        for k, line in enumerate(lines)
    )
    whole = np.sqrt(np.sum(a**2, -1) * np.sum(b**2, -1))
    return solved(a * b / np.maximum(whole, 1e-300)[..., None], rho)


Environment = dict[View, np.ndarray]  # values of the roots of a tree, over its frame


def grid(view: View, frame: Axes) -> np.ndarray:
    """A root's values over the frame's classes and the normal grid, (classes or 1..., points)."""
    return view.over(marginal(view.node).values, frame, pairs=False)


def evaluate(
    view: View, frame: Axes, env: Environment, function: Callable[..., Callable[..., np.ndarray]] = function
) -> np.ndarray:
    """A tree's values where `env` gives its roots'; roots not in `env` take their own grid. (classes or 1..., points or 1)."""
    waiting = [view]
    while waiting:
        node, bind = last = waiting[-1]
        args = [child.within(bind) for child in node.args] if isinstance(node, Apply) else []
        if last in env:
            waiting.pop()
        elif missing := [x for x in args if x not in env]:
            waiting += missing
        elif isinstance(node, Apply):
            with np.errstate(all="ignore"):
                env[last] = function(*node.params)(*(env[x] for x in args))
        else:
            constant = isinstance(node, Constant)
            env[last] = np.full((1,) * (len(frame) + 1), node.params) if constant else grid(last, frame)
    return env[view]


def in_class(values: np.ndarray, cell: Sequence[int]) -> np.ndarray:
    """Values at one class of each axis of a frame, from (classes or 1..., points)."""
    return values[tuple(c if n > 1 else 0 for c, n in zip(cell, values.shape, strict=False))]


def at_means(held: Iterable[View], frame: Axes) -> Environment:
    """Roots held at their means, by class."""
    return {root: root.mean(frame)[..., None] for root in held}


def along(view: View, frame: Axes, *live: View) -> np.ndarray:
    """A tree's values along the grids of some of its roots, the others held at their means. (classes or 1..., points or 1)."""
    held = (root for root in roots_of(view) if root not in live)
    return np.asarray(evaluate(view, frame, at_means(held, frame)), float)


def term_shares(node: Sum | Concat) -> np.ndarray:
    """c² E[x²] of each term of a sum, n E[x²] of each of joined parts, over all; what is centred may round below 0."""
    weights = np.square(node.params) if isinstance(node, Sum) else np.array(node.params[1])
    squares = weights * [max(view.node.table.mean_square, 0.0) for view in node.args]
    return squares / max(squares.sum(), 1e-300)


def largest_term(node: Sum | Concat) -> View:
    """The term with the largest mean square: of an array less its mean, the array."""
    return node.args[int(np.argmax(term_shares(node)))]


def uncentred(view: View) -> View:
    """What a mean was taken away from, as often as one was."""
    while isinstance(view.node, Sum) and view.node.is_centred:
        view = largest_term(view.node).within(view.bind)
    return view


def independent_factors(node: Node) -> list[View]:
    """The factors of an elementwise tree over its own frame, those that read a common fluctuating root as one: x·Φ(x)."""
    parts = factors(node.whole)[1]
    reads = {factor: set(fluctuating(roots_of(factor))) for factor in parts}
    return [
        reduce(lambda a, b: node.graph.make(Apply, node.axes, [a, b], ("mul", ())).whole, group)
        for group in connected(parts, lambda f, g: reads[f] & reads[g])
    ]


def concentrated(root: Node) -> bool:
    """Whether a root is to be taken for a number: the scale of a norm, an average of positive terms, or little varied."""
    if isinstance(root, Array | Leaf) or root.shares:
        return False
    mean, variance = root.table.total_mean, root.table.variance
    scale = isinstance(root, Mean) or root.is_variance
    return mean != 0 and ((root.positive and scale) or variance < NEGLIGIBLE * mean**2)


def fluctuating(views: Iterable[View]) -> list[View]:
    """Those that are not to be taken for numbers."""
    return [view for view in views if not concentrated(view.node)]


@once_per_node
def cofactors(node: Node) -> dict[View, list[View]]:
    """The roots of a tree that fluctuate, each with the concentrated ones that are its own scale (a norm's variance)."""
    own = [r for r in roots(node) if r.node.is_input or not isinstance(r.node, Array | Leaf)]
    live = fluctuating(own) or own
    out = {r: [r] for r in live}
    for scale in (r for r in own if r not in live):
        partners = (r for r in live if r.node.deps & scale.node.deps)
        main = max(partners, key=lambda r: (r.node.deps & scale.node.deps).bit_count(), default=scale)
        out.setdefault(main, []).append(scale)
    return out


def latent_cross(a: View, b: View, frame: Axes) -> np.ndarray:
    """Correlations of the normals behind two roots, from their cross-moments, by type of the frame, (types or 1...)."""
    if a == b:
        return a.over(marginal(a.node).correlation, frame, pairs=True)
    straight = [isinstance(x.node, Apply) or marginal(x.node).gaussian for x in (a, b)]
    lines = [None if known else grid(x, frame) for x, known in zip((a, b), straight, strict=True)]
    return _behind(cross_covariance(a, b, frame), deviations(a, b, frame), lines, frame)


def deviations(a: View, b: View, frame: Axes) -> np.ndarray:
    """Products of the standard deviations of a_i and b_j by type."""
    of_a, of_b = (view.over(marginal(view.node).deviation, frame, pairs=False) for view in (a, b))
    return means_by_type(of_a, frame, of_b)


def factored(rho: np.ndarray, graph: Graph, known: np.ndarray | None = None) -> np.ndarray:
    """L with unit rows and L Lᵀ = ρ, or the nearest there is; what that changes is in doubt. Its first columns may be known."""
    shared = np.empty((len(rho), 0)) if known is None else known
    values, vectors = np.linalg.eigh(rho - shared @ shared.T)
    if values[0] < -NEXT_ORDER:
        graph.flag("assumed", float(-values[0]))
    rows = np.concatenate([shared, vectors * np.sqrt(np.clip(values, 0, None))], axis=1)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)


@singledispatch
def scatter_of(node: Node) -> np.ndarray | None:
    """Variance over weights of the correlation of two entries, by type of pair; None where there is none.

    Given its weights, a convolution's y_p and y_q have the correlation of their inputs and Σ w_t w_s / Σ w² over the N pairs of
    taps (t at p, s at q, t ≠ s) that read one input, of mean 0 and variance N/(m (m + κ − 1)) for m terms of kurtosis κ, times
    (the share of the inputs' mean square that is not common to all places)², times 1 + excess/2 for inputs of an excess
    kurtosis. A function with E[f f'] = S(ρ) gains S″(ρ)/2 times that variance.
    """
    return None


@scatter_of.register
def scatter_of_sum(root: Sum) -> np.ndarray | None:
    """Independent terms share the correlation as they share the variance, of which a mean that is taken away is no part."""
    found = of_terms(root, scatter)
    return np.asarray(sum(found)) if found else None


def of_terms(root: Sum, of: Callable[[Node], np.ndarray | None]) -> list[np.ndarray]:
    """By type, what the variance of each term's correlation, which is `of` it, adds to that of the sum's."""
    return [
        (c * c * view.node.table.mean_square / root.table.divisor) ** 2
        * view.over(own, root.axes, pairs=True)
        for c, view in root.terms
        if (own := of(view.node)) is not None
    ]


scatter = once_per_node(scatter_of)
