"""Fluctuations that a node inherits from its arguments, and those of sampling finitely many units."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Sequence

import numpy as np

from varscale.theory.domain.axes import contract_axis
from varscale.theory.domain.tables import LOOSE, NEGLIGIBLE
from varscale.theory.graph.expressions import Apply, Sum, factors, roots
from varscale.theory.graph.known_arrays import Computed, scatter_of_given
from varscale.theory.graph.nodes import Array, Constant, Leaf, Node, View
from varscale.theory.graph.reshapes import Rearranged
from varscale.theory.graph.store import once_per_node
from varscale.theory.integrals.hermite_series import WEIGHTS
from varscale.theory.integrals.lognormal import WIDEST, Response, Scale, response
from varscale.theory.propagation.fourth_moments import kurtosis_shift, square_pairs
from varscale.theory.propagation.marginals import (
    concentrated,
    evaluate,
    independent_factors,
    largest_term,
    over_classes,
    term_shares,
)
from varscale.theory.propagation.scale_responses import response_curve, responses

_FORGOTTEN = 1e-5  # a ratio below which what fluctuates is not handed on: a norm's, but for its epsilon
_EXCESS_ROUNDING = 1e-12  # what rounding leaves of a relative variance that is zero


@dataclasses.dataclass(frozen=True)
class Spread:
    """Fluctuations of a mean square.

    Attributes:
        sources: coefficient of ln(mean square) on each independent unit-variance source, by source.
        shift: relative shift of its mean from the infinite-width value.
        bend: what of that is in doubt.
        skew: third cumulant of ln(mean square).
        places: coefficient of ln(squared scale at one place), over draws, samples and positions, on each source.
        shape: what a unit's own weights, where they are not Gaussian, add to that in the sum's fourth moment.
    """

    sources: dict[Hashable, float]
    shift: float = 0.0
    bend: float = 0.0
    skew: float = 0.0
    places: dict[Hashable, float] = dataclasses.field(default_factory=dict)
    shape: float = 0.0

    @functools.cached_property
    def variance(self) -> float:
        """Variance of ln(mean square) over draws."""
        return sum(c * c for c in self.sources.values())

    @functools.cached_property
    def point(self) -> float:
        """Relative variance, over draws, samples and positions, of the squared scale at one place."""
        return math.expm1(min(sum(c * c for c in self.places.values()), WIDEST))


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


def weighted(terms: Sequence[tuple[float, dict[Hashable, float]]]) -> dict[Hashable, float]:
    """A weighted sum of coefficients, source by source."""
    (weight, sources), *others = [(w, s) for w, s in terms if s and abs(w) > _FORGOTTEN] or [(1.0, {})]
    out = sources.copy() if weight == 1 else {key: weight * c for key, c in sources.items()}
    for weight, sources in others:
        for key, c in sources.items():
            out[key] = out.get(key, 0.0) + weight * c
    return out


def shared(a: dict[Hashable, float], b: dict[Hashable, float]) -> float:
    """Covariance of two logarithms."""
    return sum(c * b[key] for key, c in a.items() if key in b)


@once_per_node
def kernel(node: Node) -> Spread:
    """What a root's scale inherits: the fluctuations of the inputs it is linear in."""
    return propagated(node)


@functools.singledispatch
def propagated(node: Node) -> Spread:
    """`kernel` of a kind of node, worked out: of one that is linear in its one argument, what that argument's scale does."""
    return inherited(node.args[0].node) if node.args else NONE


@propagated.register(Leaf | Array | Constant)
def propagated_of_leaf(node: Leaf | Array | Constant) -> Spread:
    return NONE


@propagated.register(Sum)
def propagated_of_sum(node: Sum) -> Spread:
    """A centred array is its own scale; independent terms share the variance; a variance goes with the squares in it."""
    if node.positive:
        return combine([(1.0, kernel(node.args[int(np.argmax(node.params))].node))])
    if node.is_centred:
        return inherited(largest_term(node).node)
    return combine([(float(s), inherited(v.node)) for s, v in zip(term_shares(node), node.args, strict=True)])


@once_per_node
def inherited(node: Node) -> Spread:
    """Fluctuations handed on through an elementwise tree, without those of sampling its own units."""
    if not isinstance(node, Apply):
        return kernel(node)
    terms, places, growth, bent, skew = [], {}, 1.0, 0.0, 0.0
    for root, told in root_responses(node).items():
        spread = kernel(root)
        terms.append((told.slope, spread))
        own = weighted([(told.place, _of_one_sample(root) or spread.places)])
        for other, theirs in places.items():
            together = shared(own, theirs)  # E[F G] = E[F] E[G] exp(Cov[ln F, ln G]) of two factors
            if _within_one_factor(node, root, other):
                of_both = [_of_one_sample(r) or kernel(r).places for r in (root, other)]
                entered = any(isinstance(r, Leaf) for r in (root, other))
                bent += max(abs(together), abs(shared(*of_both)) if entered else 0.0)
            else:
                growth *= math.exp(float(np.clip(together, -1, 1)))
        places[root] = own
        growth *= told.growth
        bent += abs(told.slope) * spread.bend + told.doubt
        skew += np.cbrt(told.skew)
    shape, unsure = kurtosis_shift(node)
    found = dataclasses.replace(
        combine(terms),
        shift=growth - 1 + shape,
        bend=bent + unsure,
        places=weighted([(1.0, own) for own in places.values()]),
        skew=skew**3,
    )
    found.sources.update(_scalings(node))
    return found


def _of_one_sample(root: Node) -> dict[Hashable, float]:
    """The source of a described input's mean square over features, which an entry of its goes with as what reads all does."""
    if not (isinstance(root, Leaf) and root.is_input and root.axes and root.table.variance > 0):
        return {}
    return {root.id: math.sqrt(math.log1p(fresh(root, (len(root.axes) - 1,))))}


def _within_one_factor(node: Apply, a: Node, b: Node) -> bool:
    """Whether a tree mixes two roots otherwise than as a product: a sum of squares has no covariance in its mean."""
    return any({a, b} <= {r.node for r in roots(factor.node)} for factor in independent_factors(node))


@once_per_node
def root_responses(node: Apply) -> dict[Node, Response]:
    """What a tree makes of the random scale of each of its roots."""
    out: dict[Node, Response] = {}
    for root, (slope, curvature) in responses(node).items():
        spread = kernel(root)
        scale = Scale(max(1 + spread.shift, NEGLIGIBLE), spread.point, spread.variance, spread.skew)
        found = response(scale, slope, curvature, functools.partial(response_curve, node, root))
        shape = 1 + float(np.clip(curvature * spread.shape / 2, -LOOSE, LOOSE))
        out[root] = dataclasses.replace(found, growth=found.growth * shape)
    return out


def _scalings(node: Apply) -> dict[Hashable, float]:
    """Sources of a product's random scales: the mean square of n drawn numbers varies by (E[f⁴]/E[f²]² − 1)/n."""
    found = {}
    for factor in factors(View(node, tuple(range(len(node.axes)))))[1]:
        own = roots(factor.node)
        if (
            len(own) == 1
            and isinstance(own[0].node, Leaf)
            and not own[0].node.is_input
            and own[0].node.random
        ):
            squares = np.asarray(evaluate(factor, node.axes, {}), float) ** 2
            line = over_classes(squares, node.axes)
            units = math.prod(axis.size for axis in own[0].node.axes)
            if line.size > 1 and line @ WEIGHTS > 0:
                found[~own[0].node.id] = math.sqrt(
                    max(line**2 @ WEIGHTS / (line @ WEIGHTS) ** 2 - 1, 0.0) / units
                )
    return found


def origin(node: Node) -> int:
    """The root whose sampled units a node's are: a function of a root, or a centred copy, fluctuates with it."""
    while True:
        if isinstance(node, Apply):
            own = [r.node for r in roots(node) if not concentrated(r.node)]
            if len(own) != 1:
                return node.id
            node = own[0]
        elif isinstance(node, Sum) and node.is_centred:
            node = largest_term(node).node
        elif isinstance(node, Rearranged):
            node = node.args[0].node
        else:
            return node.id


def fresh(node: Node, axes: Sequence[int]) -> float:
    """Relative variance of the mean of x² over `axes`, the other axes held, from sampling alone."""
    return _fresh(node, tuple(axes))


@once_per_node
def _fresh(node: Node, over: tuple[int, ...]) -> float:
    axes = set(over)
    if isinstance(node, Computed):
        return scatter_of_given(node, axes)
    source = _rearranged(node, axes)
    if source is not None:
        return fresh(*source)
    pairs, squares = square_pairs(node)
    for k in reversed(range(len(node.axes))):
        axis = node.axes[k]
        if k not in axes:
            pairs = pairs.take(range(axis.classes), axis=k) if pairs.shape[k] > 1 else pairs
            continue
        pairs = contract_axis(pairs, k, axis.any_pair) if pairs.shape[k] > 1 else pairs.take(0, axis=k)
        squares = (
            contract_axis(squares, k, axis.counts / axis.size)
            if squares.shape[k] > 1
            else squares.take(0, axis=k)
        )
    # Places that are held are what they are: that some are larger than others is no chance.
    varied = np.where(squares > 0, pairs / np.maximum(squares, 1e-150) ** 2, 1.0)
    held = [axis for k, axis in enumerate(node.axes) if k not in axes]
    excess = float(over_classes(varied, held)) - 1.0
    return excess if excess > _EXCESS_ROUNDING else 0.0


def _rearranged(node: Node, axes: set[int]) -> tuple[Node, tuple[int, ...]] | None:
    """What a split, merged or permuted array was before, and which of its axes these are; None where some are parts of one."""
    if not isinstance(node, Rearranged):
        return None
    before = {j for k in axes for j in node.before(k)}
    if axes != {k for k in range(len(node.axes)) if before.issuperset(node.before(k))}:
        return None
    return node.args[0].node, tuple(sorted(before))
