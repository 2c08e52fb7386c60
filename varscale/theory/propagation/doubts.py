"""Doubts: bounds on the relative errors of second moments, and detectors that flag what the rules cannot see or leave out.

Most are derived where they are flagged, as what the next term of an expansion would add, or as the error of so many draws.
Those that are not are constants of which it is said, beside each: "Set on the validation grid, not derived". The grid is that
of `experiments/benchmarks/accuracy.py`; they were chosen so that no row of it lies outside its error bound.

Detectors look for functions outside their domain and squares without an integral; for factors of a product that are not as
they are taken (averages and terms of the others, one weight twice, depthwise convolutions).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from varscale.theory.domain.axes import over_classes
from varscale.theory.domain.tables import LOOSE, NEGLIGIBLE, ROUGH, Axes
from varscale.theory.graph.convolutions import Conv
from varscale.theory.graph.expressions import Apply, Sum, factors, roots, roots_of
from varscale.theory.graph.linear_nodes import Concat, weight_of
from varscale.theory.graph.nodes import UNKNOWN, Array, Node, View
from varscale.theory.graph.store import HOWS, once_per_node
from varscale.theory.integrals.hermite_series import WEIGHTS, on_grid
from varscale.theory.integrals.primitives import function
from varscale.theory.propagation.cross_moments import dependent, mean_of_product, unsure
from varscale.theory.propagation.fluctuations import fluctuations
from varscale.theory.propagation.inherited_fluctuations import responses
from varscale.theory.propagation.marginals import (
    at_means,
    cofactors,
    concentrated,
    evaluate,
    fluctuating,
    marginal,
    term_shares,
)

UNBOUNDED = 1e9  # a doubt that stands for an infinite one, and can be multiplied by nothing
_NEGLIGIBLE = 1e-6  # weight of places without a value: beyond 4.9 standard deviations there may be some
_NORM = 0.1  # how far from −1 the logarithmic derivative of a norm's squared scale may be: its epsilon
_RESOLVED_GRID, _LOST = 0.05, 0.3  # relative differences between a grid and each third of it

# Of functions that have no value somewhere: where that is.
OUTSIDE: dict[str, Callable[..., Any]] = {
    "log": lambda x: x <= 0,
    "log1p": lambda x: x <= -1,
    "sqrt": lambda x: x < 0,
    "rsqrt": lambda x: x <= 0,
    "div": lambda x, y: y == 0,
    "power": lambda x: x < 0,
    "asin": lambda x: np.abs(x) > 1,
    "acos": lambda x: np.abs(x) > 1,
    "atanh": lambda x: np.abs(x) >= 1,
    "erf_inv": lambda x: np.abs(x) >= 1,
    "acosh": lambda x: x < 1,
}


def mark_undefined(node: Apply) -> None:
    """Flag a node whose functions have no values where they are asked for, or no finite mean square."""
    both = _within_domain("mul", ())
    by_root: dict[View | None, list[View]] = {}  # factors by the one root of theirs that fluctuates
    for factor in factors(node.whole)[1]:
        own = roots_of(factor)
        live = fluctuating(own)
        if len(live) <= 1 and not any(isinstance(r.node, Array) or r.node.is_bits for r in own):
            by_root.setdefault(live[0] if live else None, []).append(factor)
    for root, own in by_root.items():
        if root and _is_difference(root.node) and any(factor.node.primitive in OUTSIDE for factor in own):
            if not node.graph.undrawn:
                raise NotImplementedError("a function with no values below 0 of a difference of averages")
            node.graph.flag("assumed", UNBOUNDED)
        env = at_means((r for r in roots_of(*own) if r != root), node.axes)
        read = (evaluate(factor, node.axes, env, _within_domain) for factor in own)
        values = functools.reduce(both, read, np.ones(1))
        outside = np.isnan(values)
        lost = np.max(on_grid(outside) @ WEIGHTS) > _NEGLIGIBLE
        if doubt := UNBOUNDED if lost else _unresolved(np.where(outside, 0.0, values), node.axes):
            node.graph.flag("assumed" if doubt == UNBOUNDED else "quadrature", doubt)


def _is_difference(node: Node) -> bool:
    """Whether it is a positive array less another of the same leaves, as mean squares under a mask less squared means are."""
    mixed = isinstance(node, Sum) and not node.positive and all(x.positive for x in node.sources)
    return mixed and len({x.deps for x in node.sources}) == 1


def _within_domain(name: str, extra: tuple[Any, ...]) -> Callable[..., np.ndarray]:
    """A function that is NaN outside its domain and of NaN; 0 · NaN is 0, and a choice has a value where what it takes has."""

    def at(*xs: np.ndarray) -> np.ndarray:
        out = np.asarray(function(name, extra)(*xs), float)
        if name == "mul":
            return np.where((xs[0] == 0) | (xs[1] == 0), 0.0, out) if np.isnan(out).any() else out
        undefined = [] if name == "select_n" else [found for x in xs if (found := np.isnan(x)).any()]
        if name in OUTSIDE:
            undefined.append(OUTSIDE[name](*xs))
        return np.where(functools.reduce(np.logical_or, undefined), np.nan, out) if undefined else out

    return at


def _unresolved(values: np.ndarray, axes: Axes) -> float:
    """Doubt of a mean square for which the thirds of the grid differ: the error of a jump is a third of that, a pole's all."""
    terms = over_classes(np.square(values), axes) * WEIGHTS
    thirds, whole = [3 * float(terms[i::3].sum()) for i in range(3)], float(terms.sum())
    apart = max(thirds) - min(thirds)
    if apart <= 2 * _RESOLVED_GRID * whole:
        return 0.0
    return UNBOUNDED if apart > 2 * _LOST * whole else apart / 2 / 3 / whole


def mark_average(f: Sequence[View], scale: View, frame: Axes) -> None:
    """Flag a product with a root that is held at its mean v and varies, unless a norm divides by it: mean(x²)/v is 1.

    With S = s² ∝ v^p, first order in Var[v] adds S′ Cov[g², v] + S″ E[g²] Var[v]/2 to E[g² s(v)²], relatively
    (|p| + p²/2) Var[v]/E[v]² where g² varies as v does.
    """
    table = scale.node.table
    varied = table.variance / max(table.total_mean**2, 1e-300)
    if varied <= NEGLIGIBLE:
        return
    of_scale = [x for x in f if roots_of(x) == [scale]]
    mixed = any(scale in roots_of(x) for x in f if x not in of_scale)
    power = -1.0
    if of_scale and not mixed:
        env = {scale: table.total_mean * np.reshape([1 + NEGLIGIBLE, 1 - NEGLIGIBLE], (*[1] * len(frame), 2))}
        sizes = [np.abs(evaluate(x, frame, env)).reshape(-1, 2).max(axis=0) for x in of_scale]
        up, down = np.log(np.maximum(np.prod(sizes, axis=0) ** 2, 1e-300))
        power = float(up - down) / (2 * NEGLIGIBLE)
    of_squares = scale.node.averages and scale.node.argument.is_square
    if not ((of_squares or scale.node.is_variance) and abs(power + 1) < _NORM):
        scale.node.graph.flag("assumed", min((abs(power) + power**2 / 2) * varied, UNKNOWN))


def mark_roots(own: Sequence[View]) -> None:
    """Flag roots of a product that are not jointly Gaussian, or have one weight in them.

    Roots made of one array, one a sum that is not Gaussian: of (relu a + relu b)·a. Roots that one weight makes, or is: of
    u = Σ w x over n terms, E[w² u²] is (1 + 2/n) E[w²] E[u²]; so it is of two sums whose inputs are alike by chance: their
    correlation is 0 on average, its square 1/n.
    """
    inside = {
        x: set(roots_of(*(term.within(x.bind) for term in x.node.args)))
        for x in own
        if isinstance(x.node, Sum)
        and not x.node.is_variance
        and x.node.table.variance > NEGLIGIBLE * x.node.table.total_mean**2
        and not marginal(x.node).gaussian
    }
    for x, terms in inside.items():
        if any(terms & inside.get(y, {y}) for y in own if y != x):
            x.node.graph.flag("assumed", ROUGH)
    seen: dict[Node, View] = {}
    for view in (v for v in own if not v.node.moves):  # parts of what one packed kernel makes
        other = seen.setdefault(weight_of(view.node) or view.node, view)
        if other.node is not view.node:
            view.node.graph.flag("assumed", 2 / min(x.node.width or math.inf for x in (view, other)))


def mark_depthwise(f: View, g: View) -> None:
    """Flag E[f g] where one is a function of a depthwise convolution, and the other of what that reads.

    Given its input x the convolution is normal of variance Q = Var[w] Σ x² over one channel's window, which many channels
    would average away: an even function of it and x have Cov(f, Q) dE[g]/dQ in common, which a mean over places is made of.
    """
    for one, other in ((f, g), (g, f)):
        live = [root.node for root in fluctuating(roots_of(other))]
        if len(live) == 1 and isinstance(live[0], Conv):
            (x, _), (w, _) = live[0].args
            alone = live[0].reads == 1 and live[0].params.x_dims[1] is not None
            if alone and dependent(one.node, x) and not one.node.deps & w.deps:
                unsure(one.node.graph, "assumed", LOOSE)


# Set on the validation grid, not derived, both: what is left where every rule is exact (the cell of a kink,
# second order in 1/width, a norm's epsilon).
_BASE = 0.02
# Of the variance v of ln(mean square), as v (1 + v): what is not lognormal in it, beside what two laws of a
# layer's scale differ by (`integrals.lognormal`). Set on nets of width 64, too.
_SCATTER = 0.1
_NO_BOUND = 1e3  # a relative error above which there is no bound at all


def provenance(node: Node) -> tuple[str, float]:
    """The worst way in which a step that matters was taken, and a bound on the relative error of the second moment."""
    how, doubt = _steps(node)
    spread = fluctuations(node)
    if doubt > _NO_BOUND:
        doubt = math.inf
    variance = spread.variance * (how != "exact")
    return how, float(_BASE + doubt + spread.bend + _SCATTER * variance * (1 + variance))


def doubt_of(node: Node) -> float:
    """The relative error of the second moment that the steps leading to it may have added."""
    return _steps(node)[1]


@once_per_node
def _steps(node: Node) -> tuple[str, float]:
    how, doubt = max(type(node).how, node.flagged or "exact", key=HOWS.index), node.doubt
    if isinstance(node, Apply):
        # A normalised function of a root forgets an error of its scale; an expansive one magnifies it.
        slopes = responses(node)
        inner = [(_steps(root), abs(slope)) for root, (slope, _) in slopes.items()]
        # Of something drawn it is the law that is in doubt, not the scale.
        doubt += max((root.doubt for root in slopes if root.drawn is not None), default=0.0)
        doubt += sum(_not_forgotten(*group) for group in cofactors(node).values())
        passed = [h for (h, d), slope in inner if h not in ("sampled", "assumed") or d * slope > 1e-3]
        # Roots that vary together are one here; the errors of others need not cancel.
        return max([how, *passed], key=HOWS.index), doubt + sum(d * slope for (_, d), slope in inner)
    hows, doubts = zip(*map(_steps, node.sources), strict=True) if node.args else ((), ())
    how = max([how, *hows], key=HOWS.index)
    if isinstance(node, Sum | Concat) and any(doubts):
        doubts = [w * d for w, d in zip(_error_weights(node), doubts, strict=True)]
        return how, min(doubt + sum(doubts), UNKNOWN)
    return how, doubt + sum(doubts)


def _not_forgotten(main: View, *scales: View) -> float:
    """What a norm does not forget of the doubt about what it divides, x: it forgets that about the scale of the whole row.

    A mean of squares v of the row itself is off as x is. But x less its mean and v may be worked out in two ways, by
    covariances of parts that are in doubt: then E[x²]/E[v] is not 1. Of a part of the row, or of another array, x is off
    and v is not.
    """
    out = 0.0
    terms = main.node.args if isinstance(main.node, Sum) else ()
    # What a mean was taken away from: a term that has more axes than all others.
    whole = {t.node for t in terms if all(t is u or len(u.bind) < len(t.bind) for u in terms)}
    for scale, _ in scales:
        means = scale.sources if scale.is_variance else [scale]
        inner = next((mean.argument for mean in means if mean.averages), scale)
        read = {root.node for root in roots(inner)}
        opened = {x for node in read if isinstance(node, Sum) for x in node.sources}
        if main.node not in read and not whole & (read | opened):
            out += doubt_of(main.node) + doubt_of(scale) / 2
        elif inner.is_square and (scale.is_variance or inner.argument is main.node):
            out += abs(main.node.table.mean_square / max(scale.table.total_mean, 1e-300) - 1)
    return min(out, UNKNOWN)


def _error_weights(node: Sum | Concat) -> Any:
    """What the relative error of a term's second moment makes of the sum's: more than itself, where terms cancel.

    Of joined arrays each counts by its share of the square. A scale that is off by a factor enters with the term's product
    with the sum; a variance that is off alone, with the term's own share. A number has no variance, and of an array less its
    own mean the two are off together.
    """
    if isinstance(node, Concat):
        return term_shares(node)
    taken, weights = set(node.centring.values()), list[float]()
    for i, (c, view) in enumerate(node.terms):
        scaled = abs(c * mean_of_product(view, node.whole, node.axes))
        own = 0.0 if concentrated(view.node) else c * c * view.node.table.mean_square
        weights.append(0.0 if i in taken else max(own, scaled) / node.table.divisor)
    return weights
