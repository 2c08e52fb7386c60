"""How an elementwise function answers to the scale of its roots: what it makes of their fluctuations, and of errors in them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float

from varscale.theory.domain.axes import Axis
from varscale.theory.domain.tables import NEGLIGIBLE
from varscale.theory.graph.expressions import Apply, Sum, roots, roots_of
from varscale.theory.graph.nodes import Array, Leaf, Node, View
from varscale.theory.graph.store import Fact, once_per_node
from varscale.theory.integrals.hermite_series import WEIGHTS
from varscale.theory.integrals.lognormal import LOG_SCALES
from varscale.theory.propagation.marginals import (
    Environment,
    concentrated,
    evaluate,
    independent_factors,
    integral_key,
    over_classes,
)

SCALE_STEP = 0.1  # relative step in q for the ratio and the curvature
# A fourth power's ratio; beyond it E[f²] is next to nothing at q, and the ratio is rounding or an overflow's.
_STEEPEST = 4.0


@once_per_node
def cofactors(node: Node) -> dict[View, list[View]]:
    """The roots of a tree that fluctuate, each with the concentrated ones that are its own scale (a norm's variance)."""
    own = [
        r
        for r in roots(node)
        if not isinstance(r.node, Array) and not (isinstance(r.node, Leaf) and not r.node.is_input)
    ]
    live = [r for r in own if not concentrated(r.node)] or own
    out = {r: [r] for r in live}
    for scale in own:
        if scale in live:
            continue
        partners = [r for r in live if r.node.deps & scale.node.deps]
        if partners:
            main = max(partners, key=lambda r: (r.node.deps & scale.node.deps).bit_count())
            out[main].append(scale)
        else:
            out[scale] = [scale]
    return out


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
        s, c = out.get(group[0].node, (0.0, 0.0))
        slope, curvature = (float(np.clip(x, -_STEEPEST, _STEEPEST)) for x in (slope, curvature))
        out[group[0].node] = s + slope, c + curvature
    return out


def response_curve(node: Node, root: Node) -> Float[np.ndarray, " scales"]:
    """ln E[f²] at LOG_SCALES of a root's second moment, less that at its own."""
    groups = [group for group in cofactors(node).values() if group[0].node is root]
    levels = [_levels(node, group, (1.0, *np.exp(LOG_SCALES))) for group in groups]
    return np.sum([np.log(level[1:] / level[0]) for level in levels], axis=0)


def _levels(node: Node, group: list[View], ratios: tuple[float, ...]) -> Float[np.ndarray, " ratios"]:
    """E[f²], up to a factor, where the second moment of a group's first root is so many times its own."""
    moments = np.ones(len(ratios))
    for factor in independent_factors(node):
        own = roots_of(factor)
        mine = [r for r in own if r in group]
        if mine:
            moments *= _varied_square(factor, node.axes, own, mine, group, ratios)
    return np.maximum(moments, 1e-300)


def _varied_square(
    factor: View,
    frame: Sequence[Axis],
    own: Sequence[View],
    mine: Sequence[View],
    group: Sequence[View],
    ratios: tuple[float, ...],
) -> list[float]:
    """E[f²] of a factor where the second moment of a group's first root is so many times its own.

    The others of the group, mean squares mostly, vary as `_power` says; what is not varied is held at its mean.
    """
    main = group[0] if group[0] in mine else mine[0]
    powers = [0.0 if r not in group else 0.5 if r == group[0] else _power(r.node, group[0].node) for r in own]
    if not isinstance(factor.node, Apply):
        return [ratio ** (2 * powers[0]) if main.node.table.mean_square > 0 else 0.0 for ratio in ratios]

    def varied() -> list[float]:
        table = main.node.table
        number = table.variance < NEGLIGIBLE * table.total_mean**2
        values = [
            evaluate(r, frame, {}) if r == main and not number else r.mean(frame)[..., None] for r in own
        ]
        out = []
        for ratio in ratios:
            scaled = [x * ratio**power for x, power in zip(values, powers, strict=True)]
            env: Environment = dict(zip(own, scaled, strict=True))
            squares = np.square(np.asarray(evaluate(factor, frame, env), float))
            line = over_classes(squares, frame)
            out.append(float(line @ WEIGHTS) if line.size > 1 else float(line[0]))
        return out

    mark = integral_key(factor)
    if mark is None:
        return varied()
    return _VARIED.once(main.node.graph, (mark, tuple(frame), own.index(main), tuple(powers), ratios), varied)


def _power(scale: Node, main: Node) -> float:
    """The power of a root's mean square that a norm's scale goes by: 1; of a mean of |x| it is 1/2, behind another norm 0."""
    inner = _averaged_by(scale)
    return responses(inner)[main][0] / 2 if isinstance(inner, Apply) and main in responses(inner) else 1.0


def _averaged_by(scale: Node) -> Node | None:
    """What a norm's scale is the mean of; of a variance, the squares."""
    terms = [view.node for view in scale.args] if isinstance(scale, Sum) and scale.is_variance else [scale]
    return next((term.args[0].node for term in terms if term.averages), None)


_VARIED: Fact[Hashable, list[float]] = Fact()  # mean squares at several scales of a root, by form
