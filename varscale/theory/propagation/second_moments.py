"""Second moments of the core kinds of nodes, elementwise trees among them: products of factors of a few roots.

Independent groups of roots multiply; a group of one root is a Mehler sum, a larger one a cubature.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from varscale.theory.domain.axes import Axis, apply_axis, contract_axis, sliced
from varscale.theory.domain.axis_maps import pair_map
from varscale.theory.domain.tables import NEGLIGIBLE, ROUGH, Table, by_type, lift, means_by_type
from varscale.theory.graph.expressions import (
    IDENTITIES,
    Apply,
    Mean,
    Sum,
    connected,
    factors,
    roots_of,
    swapped,
)
from varscale.theory.graph.linear_nodes import Take
from varscale.theory.graph.nodes import UNKNOWN, Array, Node, View, second_moments
from varscale.theory.graph.store import Fact
from varscale.theory.integrals.hermite_series import WEIGHTS, Series, Z, mehler, on_grid, sobol
from varscale.theory.propagation.cross_moments import cross, dependent, mean_product, pair, strategy
from varscale.theory.propagation.doubts import (
    mark_average,
    mark_depthwise,
    mark_sums,
    mark_undefined,
    mark_weights,
    refuse_two_places,
)
from varscale.theory.propagation.marginals import (
    Environment,
    concentrated,
    continued,
    evaluate,
    factored,
    followed,
    grid,
    integral_key,
    latent_cross,
    marginal,
    placed,
    scatter,
)
from varscale.theory.propagation.shared_tokens import gained_in_common

MOST_VARIABLES = 5  # roots of one cubature: points in twice as many dimensions are too few for more
_MOST_INTEGRALS = 8000  # of one function, some milliseconds each; with more its module is drawn


class _Group:
    """Factors of f (read at i) and of g (read at j) that share roots; those roots; known arrays that go with one of them."""

    def __init__(self, f: list[View], g: list[View], variables: list[View], followers: dict[View, _Follower]):
        self.f, self.g, self.variables, self.followers = f, g, variables, followers

    def known(self, fixed: Environment) -> Environment:
        """What is fixed, and the followers on the grid of what they follow."""
        return {**fixed, **{k: follower.grid for k, follower in self.followers.items()}}


class _Follower(NamedTuple):
    """Known numbers over the axes of other known numbers: one position tells both."""

    leader: View
    grid: np.ndarray


def _followers(variables: Sequence[View], frame: Sequence[Axis]) -> dict[View, _Follower]:
    """Known arrays over axes that an earlier one is over, too."""
    leaders: dict[tuple[int, ...], View] = {}
    out = {}
    for view in variables:
        if isinstance(view.node, Array):
            leader = leaders.setdefault(view.bind, view)
            if leader is not view and isinstance(leader.node, Array) and leader.node.axes == view.node.axes:
                out[view] = _Follower(leader, placed(followed(view.node, leader.node), view, frame))
    return out


def _groups(f: list[View], g: list[View], frame: Sequence[Axis]) -> tuple[list[_Group], Environment]:
    """Sort factors into independent groups; concentrated roots that depend on the others become their means."""
    mark_sums([*f, *g])
    mark_weights([*f, *g])
    variables = roots_of(*f, *g)
    rest = [v for v in variables if not concentrated(v.node)]
    fixed: Environment = {}
    for v in variables if len(variables) > 1 and rest else ():
        alone = not any(v.node.deps & r.node.deps for r in rest) and all(
            roots_of(x) == [v] for x in (*f, *g) if v in roots_of(x)
        )
        if v not in rest and not alone:
            # A norm's own scale: mean(x²)·s(v)² at v = mean(x²) is an identity, so the mean is the right
            # number, not E[s²].
            fixed[v] = v.mean(frame)[..., None]
    followers = _followers([v for v in variables if v not in fixed], frame)
    variables = [v for v in variables if v not in fixed and v not in followers]

    def own(x: View) -> list[View]:
        """The variables of a factor."""
        found = (followers[k].leader if k in followers else k for k in roots_of(x))
        return [k for k in dict.fromkeys(found) if k in variables]

    together = [set(own(x)) for x in (*f, *g)]
    sets = connected(
        variables, lambda a, b: any({a, b} <= read for read in together) or _correlated(a, b, frame)
    )
    groups: dict[int, _Group] = {}
    for side, xs in enumerate((f, g)):
        for x in xs:
            home = next((i for i, found in enumerate(sets) if {*own(x)} & {*found}), -1)
            if home not in groups:
                members = [k for k in variables if home >= 0 and k in sets[home]]
                with_them = {k: follower for k, follower in followers.items() if follower.leader in members}
                groups[home] = _Group([], [], members, with_them)
            (groups[home].g if side else groups[home].f).append(x)
    return list(groups.values()), fixed


def _correlated(a: View, b: View, frame: Sequence[Axis]) -> bool:
    """Whether two roots are correlated by more than is worth a cubature, anywhere in the frame."""
    if not dependent(a.node, b.node):
        return False
    sa, sb = marginal(a.node).deviation, marginal(b.node).deviation
    covariance = cross(a, b, frame) - mean_product(a, b, frame)
    return bool(np.max(np.abs(covariance)) > NEGLIGIBLE * sa.max() * sb.max() + 1e-300)


def _product(xs: list[View], frame: Sequence[Axis], env: Environment) -> np.ndarray:
    """The product of factors of one root at most, on its grid, (classes or 1..., points or 1)."""
    out = np.ones((1,) * (len(frame) + 1))
    for x in xs:
        out = out * evaluate(x, frame, env)
    return out


def product_moments(view: View, frame: Sequence[Axis]) -> tuple[np.ndarray, np.ndarray]:
    """E[f_i] by class and E[f_i f_j] by type, (classes or 1...) and (types or 1...)."""
    c, f = factors(view)
    refuse_two_places(roots_of(view))
    groups, fixed = _groups(f, f, frame)
    mean, second = np.full((1,) * len(frame), c), np.full((1,) * len(frame), c * c)
    for group in groups:
        if len(group.variables) > 1:
            own, pairs = _cubature(group, frame, fixed)
        elif group.variables and (known := _in_closed_form(group.f, group.variables[0], frame)) is not None:
            own, pairs = known
        else:
            own, pairs = _of_one_root(group, frame, fixed)
        mean, second = mean * own, second * pairs
    for scale in fixed:
        mark_average(f, scale, frame)
    return mean, second


def _of_one_root(group: _Group, frame: Sequence[Axis], fixed: Environment) -> tuple[np.ndarray, np.ndarray]:
    """Means by class, (classes or 1...), and second moments by type, (types or 1...), of a group with one root at most."""

    def integrated() -> tuple[np.ndarray, Series]:
        values = _product(group.f, frame, group.known(fixed))
        return values @ WEIGHTS if values.shape[-1] > 1 else values[..., 0], mehler(
            on_grid(values), on_grid(values), frame
        )

    if not group.variables:
        values = _product(group.f, frame, group.known(fixed))[..., 0]
        return values, by_type(values, frame, second=False) * by_type(values, frame, second=True)
    (root,) = group.variables
    alone = all(roots_of(x) == [root] for x in group.f)
    marks = [integral_key(x) for x in group.f] if alone else [None]
    if None in marks:
        mean, series = integrated()
    else:
        mean, series = INTEGRATED.once(root.node.graph, (tuple(marks), tuple(frame)), integrated)
    return mean, _at_correlations(series, root, frame)


def _in_closed_form(
    factors: Sequence[View], root: View, frame: Sequence[Axis]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Moments of a root itself, and of the square of a Gaussian one (Isserlis); None of anything else."""
    if list(factors) == [root]:
        return root.mean(frame), root.second(frame)
    (node, bind), *others = factors
    if (
        others
        or not isinstance(node, Apply)
        or node.params != ("integer_pow", (2,))
        or node.args[0].within(bind) != root
    ):
        return None
    if not marginal(root.node).gaussian:
        return None
    table = root.node.table
    square = table.diagonal
    pairs = means_by_type(square, table.axes) + 2 * table.covariance * (table.second + table.outer)
    lifted = [lift(x, table.axes, root.bind, frame, pairs=by) for x, by in ((square, False), (pairs, True))]
    return lifted[0], lifted[1]


def product_second(f_view: View, g_view: View, frame: Sequence[Axis]) -> np.ndarray:
    """E[f_i g_j] by type, (types or 1...)."""
    (c, f), (d, g) = factors(f_view), factors(g_view)
    groups, fixed = _groups(f, g, frame)
    out = np.full((1,) * len(frame), c * d)
    for group in groups:
        if len(group.variables) > 1:
            out = out * _pairwise(group, frame, fixed)
        else:
            fi, gj = (_product(side, frame, group.known(fixed)) for side in (group.f, group.g))
            if group.variables:
                series = mehler(on_grid(fi), on_grid(gj), frame)
                out = out * _at_correlations(series, group.variables[0], frame)
            else:
                out = out * by_type(fi[..., 0], frame, second=False) * by_type(gj[..., 0], frame, second=True)
    mark_depthwise(f_view, g_view)
    return out


def _correlation(root: View, frame: Sequence[Axis]) -> np.ndarray:
    """Latent correlations of a root by type of a frame."""
    return lift(marginal(root.node).correlation, root.node.axes, root.bind, frame, pairs=True)


def _at_correlations(series: Series, root: View, frame: Sequence[Axis]) -> np.ndarray:
    """E[f g] by type at a root's correlations, and at what they are given the weights."""
    rho, variance = _correlation(root, frame), scatter(root.node)
    if variance is None:
        return series.at(rho)
    variance = lift(variance, root.node.axes, root.bind, frame, pairs=True)
    return series.at(rho) + series.curvature(rho) * variance / 2


def _pairwise(group: _Group, frame: Sequence[Axis], fixed: Environment) -> np.ndarray:
    """E[f_i g_j] by type of a group of several roots: one series where f and g have one root each, else a cubature."""
    fv, gv = ([v for v in roots_of(*side) if v not in fixed] for side in (group.f, group.g))
    if not group.followers and len(fv) == 1 and len(gv) == 1 and len(group.f) == 1 and len(group.g) == 1:
        fi, gj = (evaluate(x, frame, dict(fixed)) for x in (group.f[0], group.g[0]))
        return mehler(on_grid(fi), on_grid(gj), frame).at(latent_cross(fv[0], gv[0], frame))
    mean, second = _cubature(group, frame, fixed)
    return second if group.g else by_type(mean, frame, second=False)


def _nearest(latents: np.ndarray) -> np.ndarray:
    """The places on the normal grid."""
    return np.clip(np.round((latents - Z[0]) / (Z[1] - Z[0])).astype(int), 0, len(Z) - 1)


def _root_values(node: Node, latents: np.ndarray, line: np.ndarray) -> np.ndarray:
    """A root's values at normal scores; between the numbers of a known array there are none."""
    if marginal(node).gaussian:
        return line[0] + (latents - Z[0]) * ((line[-1] - line[0]) / (Z[-1] - Z[0]))
    return line[_nearest(latents)] if isinstance(node, Array) else np.interp(latents, Z, line)


def _cubature(group: _Group, frame: Sequence[Axis], fixed: Environment) -> tuple[np.ndarray, np.ndarray]:
    """Means of Πf by class and second moments of Πf·Πg by type, over the joint normal of all their roots."""
    views = [v for v in roots_of(*group.f, *group.g) if v not in fixed and v not in group.followers]
    graph, k = views[0].node.graph, len(views)
    if k > MOST_VARIABLES:
        graph.flag("assumed", ROUGH)
    types, classes = [a.types for a in frame], [a.classes for a in frame]
    rho = np.empty((*types, k, k))
    for i, a in enumerate(views):
        rho[..., i, i] = _correlation(a, frame)
        for j, b in enumerate(views):
            if i != j:
                rho[..., i, j] = latent_cross(a, b, frame)
    grids = [np.broadcast_to(grid(v, frame), (*classes, len(Z))) for v in views]
    mean, second = np.empty(classes), np.empty(types)
    first_class, second_class = ([getattr(a, w) for a in frame] for w in ("first", "second"))
    keys = np.round(rho, 4).reshape(-1, k * k)
    if len(keys) > _MOST_INTEGRALS and (n := len(np.unique(keys, axis=0))) > _MOST_INTEGRALS:
        raise NotImplementedError(f"a function of {k} arrays with {n} different correlations")
    done: dict[tuple[object, ...], float] = {}
    z = sobol(2 * k)

    def tree(xs: list[View], cell: tuple[int, ...], latents: np.ndarray) -> np.ndarray:
        env: Environment = {
            view: _root_values(view.node, latents[:, n], grids[n][cell]).reshape((1,) * len(frame) + (-1,))
            for n, view in enumerate(views)
        }
        for key, (leader, values) in group.followers.items():
            line = np.broadcast_to(values, (*classes, len(Z)))[cell]
            env[key] = line[_nearest(latents[:, views.index(leader)])].reshape((1,) * len(frame) + (-1,))
        for key, value in fixed.items():
            at = tuple(c if value.shape[d] > 1 else 0 for d, c in enumerate(cell))
            env[key] = value[at].reshape((1,) * len(frame) + (-1,))
        out = np.ones(1)
        for x in xs:
            values = evaluate(x, frame, env)
            at = tuple(c if values.shape[d] > 1 else 0 for d, c in enumerate(cell))
            out = out * values[at]
        return out

    inner, firsts = {}, {}
    for cell in np.ndindex(*classes):
        inner[cell] = factored(rho[cell], graph)  # the types (c = c) come first on every axis
        firsts[cell] = tree(group.f, cell, z[:, :k] @ inner[cell].T)
        mean[cell] = np.mean(firsts[cell])
    if not group.g:
        return mean, second
    for index in np.ndindex(*types):
        ci = tuple(int(f[t]) for f, t in zip(first_class, index, strict=True))
        cj = tuple(int(s[t]) for s, t in zip(second_class, index, strict=True))
        key = (ci, cj, tuple(np.round(rho[index].ravel(), 4)))
        if key not in done:
            latents = z @ continued(inner[ci], rho[index], rho[cj], graph).T
            done[key] = float(np.mean(firsts[ci] * tree(group.g, cj, latents)))
        second[index] = done[key]
    return mean, second


INTEGRATED: Fact[Hashable, tuple[np.ndarray, Series]] = Fact()  # functions of one root, by form


@strategy("law of functions")
def law_of_functions(a: View, b: View, frame: tuple[Axis, ...]) -> np.ndarray | None:
    """By the joint law of the roots of elementwise functions."""
    return product_second(a, b, frame) if isinstance(a.node, Apply) or isinstance(b.node, Apply) else None


@second_moments.register(Sum)
def second_moments_of_sum(node: Sum) -> Table:
    refuse_two_places(node.args)
    mean, second, unsure = np.zeros([a.classes for a in node.axes]), np.zeros(node.frame_types), []
    for i, (c, x) in enumerate(zip(node.params, node.args, strict=True)):
        mean, second = mean + c * x.mean(node.axes), second + c * c * x.second(node.axes)
        for d, y in zip(node.params[:i], node.args[:i], strict=True):
            found = pair(x, y, node.axes)
            product = c * d * np.broadcast_to(found.moment, second.shape)
            second = second + product + swapped(product, node.axes)
            if found.flagged:
                both = (x.node.table.variance * y.node.table.variance) ** 0.5
                unsure.append((found.flagged, 2 * abs(c * d) * both * found.doubt))
    table = Table(node.axes, mean, second)
    for how, error in unsure:
        node.graph.flag(how, min(error / max(table.mean_square, 1e-300), UNKNOWN))
    return table


@second_moments.register(Mean)
def second_moments_of_mean(node: Mean) -> Table:
    table = node.args[0].node.table
    mean, second = table.mean, table.second
    for k in reversed(node.params):
        axis = table.axes[k]
        mean, second = (
            contract_axis(mean, k, axis.counts / axis.size),
            contract_axis(second, k, axis.any_pair),
        )
    return Table(node.axes, mean, second)


@second_moments.register(Take)
def second_moments_of_take(node: Take) -> Table:
    k, *span = node.params
    table = node.args[0].node.table
    new, classes = sliced(table.axes[k], *span)
    mean, second = (
        apply_axis(table.mean, k, classes),
        apply_axis(table.second, k, pair_map(classes)[: 1 if new is None else None]),
    )
    if new is None:
        mean, second = mean.squeeze(k), second.squeeze(k)
    return Table(node.axes, mean, second)


@second_moments.register(Apply)
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
        mean, second = product_moments(View(node, tuple(range(len(node.axes)))), node.axes)
        if name in ("mul", "add", "sub"):
            second = second + gained_in_common(node)
    mean = np.broadcast_to(mean, [a.classes for a in node.axes])
    return Table(node.axes, np.array(mean), np.array(np.broadcast_to(second, node.frame_types)))
