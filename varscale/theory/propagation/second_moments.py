"""Second moments of the core kinds of nodes, elementwise trees among them: products of factors of a few roots.

Independent groups of roots multiply; a group of one root is a Mehler sum, a larger one a cubature.
"""

import functools
import itertools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from varscale.theory.domain.axes import contract_axes, over_classes
from varscale.theory.domain.tables import NEGLIGIBLE, ROUGH, Axes, Table, by_type, means_by_type, table_over
from varscale.theory.graph.expressions import (
    IDENTITIES,
    Apply,
    Mean,
    Sum,
    connected,
    factors,
    roots,
    roots_of,
    swapped,
)
from varscale.theory.graph.nodes import UNKNOWN, Array, Node, View, cross_by_kind, second_moments
from varscale.theory.integrals.hermite_series import WEIGHTS, Z, mehler, on_grid, read_off, sobol
from varscale.theory.propagation.cross_moments import cross_covariance, dependent, pair
from varscale.theory.propagation.doubts import mark_average, mark_depthwise, mark_roots, mark_undefined
from varscale.theory.propagation.marginals import (
    Environment,
    at_means,
    evaluate,
    factored,
    fluctuating,
    followed,
    grid,
    in_class,
    latent_cross,
    marginal,
    scatter,
)
from varscale.theory.propagation.sampler import Drawing, cross_moments_of_draws, evenly, in_order
from varscale.theory.propagation.token_gram import gained_in_common

MOST_VARIABLES = 5  # roots of one cubature: points in twice as many dimensions are too few for more
_MOST_INTEGRALS = 8000  # of one function, some milliseconds each; with more its module is drawn
_REPLICATES, _POSITIONS = 192, 64  # draws that a product is measured on, and of how many positions of an axis
_Follower = tuple[View, np.ndarray]  # what known numbers go with, and they on the normal grid of that


class _Group(NamedTuple):
    """Factors of f (read at i) and of g (read at j) that share roots; those roots; known arrays that go with one of them."""

    f: list[View]
    g: list[View]
    variables: list[View]
    followers: dict[View, _Follower]


def _followers(variables: Sequence[View], frame: Axes) -> dict[View, _Follower]:
    """Known arrays over the axes of an earlier one, on the grid of that: both are functions of one position."""
    arrays = {view: view.node for view in variables if isinstance(view.node, Array)}
    leaders, out = dict[Hashable, View](), {}
    for view, node in arrays.items():
        leader = leaders.setdefault((view.bind, node.axes), view)
        if leader is not view:
            out[view] = (leader, view.over(followed(node, arrays[leader]), frame, pairs=False))
    return out


def _groups(f: list[View], g: list[View], frame: Axes) -> tuple[list[_Group], Environment]:
    """Sort factors into independent groups; concentrated roots that depend on the others become their means."""
    reads, variables = {x: roots_of(x) for x in (*f, *g)}, roots_of(*f, *g)
    mark_roots(variables)
    rest = fluctuating(variables)
    joined = {v for own in reads.values() if len(own) > 1 for v in own}
    # A norm's own scale: mean(x²)·s(v)² at v = mean(x²) is an identity: the mean is right, and not E[s²].
    joined |= {v for v in variables if any(v.node.deps & r.node.deps for r in rest)}
    held = (v for v in variables if v in joined and v not in rest)
    fixed = at_means(held if rest else (), frame)
    followers = _followers([v for v in variables if v not in fixed], frame)
    variables = [v for v in variables if v not in fixed and v not in followers]
    together = {
        x: {followers[v][0] if v in followers else v for v in own}.intersection(variables)
        for x, own in reads.items()
    }
    sets = connected(
        variables, lambda a, b: any({a, b} <= own for own in together.values()) or _correlated(a, b, frame)
    )
    out = []
    for mine in (*map(set, sets), set()):  # those without a root are a group, too
        sides = [[x for x in xs if together[x] <= mine and bool(together[x]) == bool(mine)] for xs in (f, g)]
        own = {v: follower for v, follower in followers.items() if follower[0] in mine}
        if any(sides):
            out.append(_Group(sides[0], sides[1], [v for v in variables if v in mine], own))
    return out, fixed


def _correlated(a: View, b: View, frame: Axes) -> bool:
    """Whether two roots are correlated by more than is worth a cubature, anywhere in the frame."""
    if not dependent(a.node, b.node):
        return False
    largest = marginal(a.node).deviation.max() * marginal(b.node).deviation.max()
    return bool(np.max(np.abs(cross_covariance(a, b, frame))) > NEGLIGIBLE * largest + 1e-300)


def _product(xs: list[View], frame: Axes, env: Environment) -> np.ndarray:
    """The product of factors of one root at most, on its grid, (classes or 1..., points or 1)."""
    values = (evaluate(x, frame, env) for x in xs)
    return functools.reduce(np.multiply, values, np.ones((1,) * (len(frame) + 1)))


def product_second(f_view: View, g_view: View, frame: Axes) -> np.ndarray:
    """E[f_i g_j] by type, (types or 1...)."""
    (c, f), (d, g) = factors(f_view), factors(g_view)
    _, second = _multiplied(*_groups(f, g, frame), frame)
    mark_depthwise(f_view, g_view)
    return c * d * second


def _multiplied(groups: Sequence[_Group], fixed: Environment, frame: Axes) -> tuple[np.ndarray, np.ndarray]:
    """E[Πf] by class and E[Πf Πg] by type of independent groups."""
    mean, second = np.ones((1,) * len(frame)), np.ones((1,) * len(frame))
    for group in groups:
        own, pairs = _of_group(group, frame, fixed)
        mean, second = mean * own, second * pairs
    return mean, second


def _of_group(group: _Group, frame: Axes, fixed: Environment) -> tuple[np.ndarray, np.ndarray]:
    """The same of one group: in closed form, as a series where f and g have one root each, else by a cubature."""
    env = fixed | {view: values for view, (_, values) in group.followers.items()}
    if not group.variables:
        fi, gj = (_product(xs, frame, env)[..., 0] for xs in (group.f, group.g))
        return fi, means_by_type(fi, frame, gj)
    first = last = group.variables[0]
    if len(group.variables) > 1:
        read = [[v for v in roots_of(*xs) if v not in fixed] for xs in (group.f, group.g)]
        if group.followers or any(len(side) != 1 for side in (group.f, group.g, *read)):
            return _cubature(group, frame, fixed)
        (first,), (last,) = read
    same = group.f == group.g
    if same and (moments := _in_closed_form(group.f, first, frame)) is not None:
        return moments
    fi = on_grid(_product(group.f, frame, env))
    series = mehler(fi, fi if same else on_grid(_product(group.g, frame, env)), frame)
    rho = latent_cross(first, last, frame)
    second = series.at(rho)
    if first == last and (variance := scatter(first.node)) is not None:  # of ρ, given the weights
        second = second + series.curvature(rho) * first.over(variance, frame, pairs=True) / 2
    return fi @ WEIGHTS, second


def _in_closed_form(xs: Sequence[View], root: View, frame: Axes) -> tuple[np.ndarray, np.ndarray] | None:
    """Moments of a root itself, and of the square of a Gaussian one (Isserlis); None of anything else."""
    if xs == [root]:
        return root.mean(frame), root.second(frame)
    (node, bind), table = xs[0], root.node.table
    square = len(xs) == 1 and node.is_square
    if not square or node.args[0].within(bind) != root or not marginal(root.node).gaussian:
        return None
    pairs = means_by_type(table.diagonal, table.axes) + 2 * table.covariance * (table.second + table.outer)
    return root.over(table.diagonal, frame, pairs=False), root.over(pairs, frame, pairs=True)


def _root_values(node: Node, latents: np.ndarray, line: np.ndarray) -> np.ndarray:
    """A root's values at normal scores; between the numbers of a known array there are none."""
    if isinstance(node, Array):
        return line[np.clip(np.round((latents - Z[0]) / (Z[1] - Z[0])).astype(int), 0, len(Z) - 1)]
    return read_off(line, latents)


def _cubature(group: _Group, frame: Axes, fixed: Environment) -> tuple[np.ndarray, np.ndarray]:
    """Means of Πf by class and second moments of Πf·Πg by type, over the joint normal of all their roots."""
    views = group.variables
    graph, k = views[0].node.graph, len(views)
    if k > MOST_VARIABLES:
        graph.flag("assumed", ROUGH)
    types, classes = [a.types for a in frame], [a.classes for a in frame]
    rho = np.empty((*types, k, k))
    for (i, a), (j, b) in itertools.product(enumerate(views), repeat=2):
        rho[..., i, j] = latent_cross(a, b, frame)
    grids = {view: (i, grid(view, frame)) for i, view in enumerate(views)}
    grids |= {view: (views.index(leader), line) for view, (leader, line) in group.followers.items()}
    keys = np.round(rho, 4).reshape(-1, k * k)
    if len(keys) > _MOST_INTEGRALS and (n := len(np.unique(keys, axis=0))) > _MOST_INTEGRALS:
        raise NotImplementedError(f"a function of {k} arrays with {n} different correlations")
    z = sobol(2 * k)

    def product(xs: list[View], cell: tuple[Any, ...], latents: np.ndarray) -> np.ndarray:
        lines = {v: in_class(value, cell) for v, value in fixed.items()}
        for view, (i, line) in grids.items():
            lines[view] = _root_values(view.node, latents[:, i], in_class(line, cell))
        env: Environment = {v: line.reshape(*[1] * len(frame), -1) for v, line in lines.items()}
        return _product(xs, frame, env).ravel()

    inner, firsts, mean = {}, {}, np.empty(classes)
    for cell in np.ndindex(*classes):
        inner[cell] = factored(rho[cell], graph)  # the types (c = c) come first on every axis
        firsts[cell] = product(group.f, cell, z[:, :k] @ inner[cell].T)
        mean[cell] = np.mean(firsts[cell])
    if not group.g:
        return mean, by_type(mean, frame, second=False)
    second, done = np.empty(types), dict[Hashable, float]()
    for index in np.ndindex(*types):
        ci = tuple(axis.first[t] for axis, t in zip(frame, index, strict=True))
        cj = tuple(axis.second[t] for axis, t in zip(frame, index, strict=True))
        key = (ci, cj, tuple(np.round(rho[index].ravel(), 4)))
        if key not in done:
            known = np.linalg.lstsq(inner[ci], rho[index], rcond=1e-9)[0].T
            latents = z @ factored(rho[cj], graph, known).T
            done[key] = float(np.mean(firsts[ci] * product(group.g, cj, latents)))
        second[index] = done[key]
    return mean, second


@cross_by_kind.register
def cross_by_kind_of_apply(node: Apply, a: View, b: View, frame: Axes) -> np.ndarray:
    return _or_measured(product_second(a, b, frame), a, b, frame)


def _or_measured(found: np.ndarray, a: View, b: View, frame: Axes) -> np.ndarray:
    """E[a_i b_j] by type as it was found, or as it is of what regions drew, where that differs by more than chance.

    Outputs that have no covariance may have squares that vary together: of D ⊙ x at two places, or of two that read one array.
    """
    if not (in_order(a.node) and in_order(b.node) and any(root.node.timed for root in roots_of(a, b))):
        return found
    drawing = Drawing(_REPLICATES, lambda axis: evenly(axis.size, _POSITIONS))
    positions = list(map(drawing.some, frame))
    x, y = (drawing.at(view, frame, positions) for view in (a, b))
    return cross_moments_of_draws(x, y, frame, positions, otherwise=found)


def refuse_two_places(views: Sequence[View]) -> None:
    """Refuse a function of x_i and x_j over all i and j: where i = j all units are at once, which no correlation says."""
    seen: dict[Node, View] = {}
    for view in views:
        if not isinstance(view.node, Array) and seen.setdefault(view.node, view) != view:
            raise NotImplementedError("a function of one array at two places of an axis")


@second_moments.register
def second_moments_of_sum(node: Sum) -> Table:
    refuse_two_places(node.args)
    terms = node.terms
    mean = sum(c * x.mean(node.axes) for c, x in terms)
    second = sum(c * c * x.second(node.axes) for c, x in terms)
    unsure = []
    for (d, y), (c, x) in itertools.combinations(terms, 2):
        found = pair(x, y, node.axes)
        product = c * d * found.moment
        second = second + product + swapped(product, node.axes)
        if found.flagged:
            both = (x.node.table.variance * y.node.table.variance) ** 0.5
            unsure.append((found.flagged, 2 * abs(c * d) * both * found.doubt))
    table = table_over(node.axes, mean, second)
    for how, error in unsure:
        node.graph.flag(how, min(error / table.divisor, UNKNOWN))
    return table


@second_moments.register
def second_moments_of_mean(node: Mean) -> Table:
    table = node.argument.table
    second = contract_axes(table.second, {k: table.axes[k].any_pair for k in node.params})
    return Table(node.axes, over_classes(table.mean, table.axes, node.params), second)


@second_moments.register
def second_moments_of_apply(node: Apply) -> Table:
    name, extra = node.params
    if name == "affine" or name in IDENTITIES:
        (c, d), x = extra or (1.0, 0.0), node.args[0]
        mean, second = x.mean(node.axes), c * c * x.second(node.axes)
        if d:
            both = by_type(mean, node.axes, second=False) + by_type(mean, node.axes, second=True)
            second = second + c * d * both + d * d
        mean = c * mean + d
    else:
        mark_undefined(node)
        refuse_two_places(roots(node))
        c, f = factors(node.whole)
        groups, fixed = _groups(f, f, node.axes)
        mean, second = _multiplied(groups, fixed, node.axes)
        mean, second = c * mean, _or_measured(c * c * second, node.whole, node.whole, node.axes)
        for scale in fixed:
            mark_average(f, scale, node.axes)
        if name in ("mul", "add", "sub"):
            second = second + gained_in_common(node)
    return table_over(node.axes, mean, second)
