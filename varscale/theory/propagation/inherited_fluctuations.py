"""How fluctuations propagate through functions and sums: by the response of each to the scales of its roots."""

import dataclasses
import itertools
import math
from collections.abc import Hashable, Sequence
from functools import cached_property, partial, singledispatch

import numpy as np
from jaxtyping import Float

from varscale.theory.domain.axes import Axes, over_classes
from varscale.theory.domain.tables import NEGLIGIBLE
from varscale.theory.graph.expressions import Apply, Sum, factors, roots, roots_of
from varscale.theory.graph.linear_nodes import Concat
from varscale.theory.graph.nodes import Leaf, Node, View
from varscale.theory.graph.store import once_per_node
from varscale.theory.integrals.hermite_series import POINTS, WEIGHTS
from varscale.theory.integrals.lognormal import LOG_Q, WIDEST, Response, Scale, response, shared, weighted
from varscale.theory.propagation.fourth_moments import fresh, kurtosis_shift
from varscale.theory.propagation.marginals import (
    at_means,
    cofactors,
    evaluate,
    grid,
    independent_factors,
    largest_term,
    term_shares,
)

SCALE_STEP = 0.1  # relative step in q for the ratio and the curvature
# A fourth power's ratio; beyond it E[f²] is next to nothing at q, and the ratio is rounding or an overflow's.
_STEEPEST = 4.0


@once_per_node
def responses(node: Node) -> dict[Node, tuple[float, float]]:
    """For each root: the ratio d ln E[f²]/d ln q, and the curvature q² (E f²)″/E f², in its own second moment q.

    A norm's variance moves with the array it normalises, so that a normalised array has ratio 0: the two are varied together.
    """
    out: dict[Node, tuple[float, float]] = {}
    for group in cofactors(node).values():
        low, middle, high = _levels(node, group, (1 - SCALE_STEP, 1.0, 1 + SCALE_STEP))
        slope = math.log(high / low) / math.log((1 + SCALE_STEP) / (1 - SCALE_STEP))
        curvature = (high - 2 * middle + low) / SCALE_STEP**2 / middle
        found, first = np.clip([slope, curvature], -_STEEPEST, _STEEPEST), group[0].node
        out[first] = tuple((found + out.get(first, 0.0)).tolist())
    return out


def _levels(node: Node, group: list[View], ratios: tuple[float, ...]) -> Float[np.ndarray, " ratios"]:
    """E[f²], up to a factor, where the second moment of a group's first root is so many times its own."""
    read = [factor for factor in independent_factors(node) if set(roots_of(factor)) & set(group)]
    levels = [[1.0] * len(ratios), *(_varied_square(factor, node.axes, group, ratios) for factor in read)]
    return np.maximum(np.prod(np.array(levels), axis=0), 1e-300)


def _varied_square(factor: View, frame: Axes, group: list[View], ratios: tuple[float, ...]) -> list[float]:
    """E[f²] of a factor where the second moment of a group's first root is so many times its own.

    The others of the group, mean squares mostly, vary as `_power` says; what is not varied is held at its mean.
    """
    own = roots_of(factor)
    main = next(r for r in group if r in own)
    powers = {r: 0.5 if r == group[0] else _power(r.node, group[0].node) for r in own if r in group}
    table, at = main.node.table, at_means(own, frame)
    if spread := table.variance >= NEGLIGIBLE * table.total_mean**2:
        at[main] = np.tile(grid(main, frame), len(ratios))
    points = POINTS if spread else 1
    at |= {r: at[r] * np.repeat(np.power(ratios, power), points) for r, power in powers.items()}
    line = over_classes(np.square(evaluate(factor, frame, at), dtype=float), frame).reshape(len(ratios), -1)
    return (line @ WEIGHTS if spread else line[:, 0]).tolist()


def _power(scale: Node, main: Node) -> float:
    """The power of a root's mean square that a norm's scale goes by: 1; of a mean of |x| it is 1/2, behind another norm 0."""
    terms = scale.sources if scale.is_variance else [scale]
    inner = next((term.argument for term in terms if term.averages), None)  # of a variance, the squares
    return responses(inner)[main][0] / 2 if isinstance(inner, Apply) and main in responses(inner) else 1.0


@dataclasses.dataclass(frozen=True)
class Spread:
    """Fluctuations of a mean square."""

    sources: dict[Hashable, float]  # coefficient of ln(mean square) on each independent unit-variance source
    shift: float = 0.0  # relative shift of its mean from the infinite-width value
    bend: float = 0.0  # what of that is in doubt
    skew: float = 0.0  # third cumulant of ln(mean square)
    # Coefficient of ln(squared scale at one place), over draws, samples and positions, on each source.
    places: dict[Hashable, float] = dataclasses.field(default_factory=dict)
    shape: float = 0.0  # what a unit's own weights, not Gaussian, add to that in the sum's fourth moment

    @cached_property
    def variance(self) -> float:
        """Variance of ln(mean square) over draws."""
        return math.hypot(*self.sources.values()) ** 2

    @cached_property
    def point(self) -> float:
        """Relative variance, over draws, samples and positions, of the squared scale at one place."""
        return math.expm1(min(math.hypot(*self.places.values()) ** 2, WIDEST))


NONE = Spread({})


def combine(terms: Sequence[tuple[float, Spread]]) -> Spread:
    """A weighted sum of logarithms."""
    return Spread(
        weighted([(w, s.sources) for w, s in terms]),
        shift=sum(w * s.shift for w, s in terms),
        bend=sum(abs(w) * s.bend for w, s in terms),
        skew=sum(w * np.cbrt(s.skew) for w, s in terms) ** 3,  # terms fluctuate together, mostly
        places=weighted([(w, s.places) for w, s in terms]),
    )


@singledispatch
def propagated(node: Node) -> Spread:
    """What a root's scale inherits: of one that is linear in its one argument, what that argument's scale does."""
    return inherited(node.argument) if node.args else NONE


@propagated.register
def propagated_of_sum(node: Sum | Concat) -> Spread:
    """A centred array is its own scale, a variance goes with its squares; independent terms, and parts, share the variance."""
    if node.is_variance or node.is_centred:
        return inherited(largest_term(node).node)
    return combine([(float(s), inherited(v.node)) for s, v in zip(term_shares(node), node.args, strict=True)])


kernel = once_per_node(propagated)


@once_per_node
def inherited(node: Node) -> Spread:
    """Fluctuations propagated through an elementwise tree, without those of sampling its own units."""
    if not isinstance(node, Apply):
        return kernel(node)
    told = root_responses(node)
    own = {root: kernel(root).places for root in told}
    # An entry of a described input goes with its mean square over features, as what reads all of them does.
    for x in told:
        if x.is_input and x.axes and x.table.variance > 0:
            own[x] = {x.id: math.sqrt(math.log1p(fresh(x, (len(x.axes) - 1,))))}
    places = {root: weighted([(x.place, own[root])]) for root, x in told.items()}
    growth = math.prod(x.growth for x in told.values())
    bent = sum(abs(x.slope) * kernel(root).bend + x.doubt for root, x in told.items())
    mixed = [{r.node for r in roots(factor.node)} for factor in independent_factors(node)]
    for a, b in itertools.combinations(places, 2):
        together = shared(places[a], places[b])  # E[F G] = E[F] E[G] exp(Cov[ln F, ln G]) of two factors
        if any({a, b} <= one for one in mixed):  # a sum of squares, say, has no covariance in its mean
            entered = isinstance(a, Leaf) or isinstance(b, Leaf)
            bent += max(abs(together), abs(shared(own[a], own[b])) if entered else 0.0)
        else:
            growth *= math.exp(np.clip(together, -1, 1))
    shape, unsure = kurtosis_shift(node)
    scales = dict[Hashable, float]()
    # Random scales have a mean square that varies by that of n drawn numbers.
    for f in factors(node.whole)[1]:
        if len(alone := roots_of(f)) == 1 and alone[0].node.is_drawn:
            scales[~alone[0].node.id] = math.sqrt(fresh(f.node))
    return Spread(
        weighted([(x.slope, kernel(root).sources) for root, x in told.items()]) | scales,
        shift=growth - 1 + shape,
        bend=bent + unsure,
        skew=sum(np.cbrt(x.skew) for x in told.values()) ** 3,
        places=weighted([(1.0, line) for line in places.values()]),
    )


@once_per_node
def root_responses(node: Node) -> dict[Node, Response]:
    """What a tree makes of the random scale of each of its roots."""
    out: dict[Node, Response] = {}
    for root, (slope, curvature) in responses(node).items():
        spread = kernel(root)
        growth, place = max(1 + spread.shift, NEGLIGIBLE), max(spread.point + spread.shape, 0.0)
        scale = Scale(growth, place, spread.variance, spread.skew)
        out[root] = response(scale, slope, curvature, partial(_response_curve, node, root))
    return out


def _response_curve(node: Node, root: Node) -> Float[np.ndarray, " scales"]:
    """ln E[f²] at LOG_Q of a root's second moment, less that at its own."""
    groups = [group for group in cofactors(node).values() if group[0].node is root]
    levels = [_levels(node, group, (1.0, *np.exp(LOG_Q))) for group in groups]
    return np.sum([np.log(level[1:] / level[0]) for level in levels], axis=0)
