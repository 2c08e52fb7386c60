"""Cotangents: their second moments by type, passed from the output back through every node.

Gradient independence is the one assumption, that of mean-field theory (Schoenholz et al. 2017): a cotangent is independent of
the forward values it is multiplied with, except through the function it passes. That one's derivative is a function of the
same roots, and its moments are taken exactly.
"""

import functools
import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy import special

from varscale.theory.domain.axes import Axes, Axis, apply_axis, average, outer, over_classes, pool, refine
from varscale.theory.domain.tables import LEADING_ORDER, NEGLIGIBLE, ROUGH, full_types, means_by_type
from varscale.theory.graph.convolutions import Conv
from varscale.theory.graph.expressions import Apply, Sum, as_affine, roots, trees, weighted_sum
from varscale.theory.graph.linear_nodes import applied_weights
from varscale.theory.graph.nodes import UNKNOWN, Constant, Leaf, Node, View, pullback
from varscale.theory.graph.normal_form import affine, apply, derivative
from varscale.theory.graph.store import BackwardNotes, once_per_node
from varscale.theory.propagation.cross_moments import mean_of_product
from varscale.theory.propagation.doubts import doubt_of
from varscale.theory.propagation.fluctuations import gradient_scale, summed_scale
from varscale.theory.propagation.fourth_moments import mean_squared_correlation
from varscale.theory.propagation.inherited_fluctuations import kernel
from varscale.theory.propagation.marginals import along, cofactors, concentrated, term_shares, uncentred
from varscale.theory.propagation.pullbacks import Cotangent, forks, mean_part, pulled_back, selected, sum_out
from varscale.theory.propagation.sampler import in_order
from varscale.theory.propagation.second_moments import product_second
from varscale.theory.propagation.token_gram import normed_together, overlap_before, patch_overlap

_MASK_DOUBT = 0.03  # set, not derived: a stream's derivatives are a Markov chain only in the main


class Cotangents:
    """Cotangents by node, those under one mask added up."""

    def __init__(self) -> None:
        self.parts: dict[Node, dict[View | None, Cotangent]] = {}

    def add(self, node: Node, part: Cotangent) -> None:
        if not node.is_literal:
            parts = self.parts.setdefault(node, {})
            part = replace(part, second=full_types(part.second, node.axes))
            known = [parts[part.mask]] if part.mask in parts else []
            parts[part.mask] = _added_cotangents([*known, part], node.axes)

    def pop(self) -> tuple[Node, list[Cotangent]]:
        """The latest node: all that flows into it has arrived, and what depends on its scale is shared out."""
        node = max(self.parts, key=lambda node: node.id)
        parts = list(self.parts.pop(node).values())
        weights = np.array([abs(average(p.second, node.axes)) for p in parts])
        weights = weights / max(float(weights.sum()), 1e-300)
        whole = sum(p.scale for p in parts) + float(weights @ [p.own for p in parts])
        return node, [replace(p, scale=whole * w, own=0.0) for p, w in zip(parts, weights, strict=True)]


def _added_cotangents(parts: Sequence[Cotangent], axes: Axes) -> Cotangent:
    """Cotangents of one node, their doubts weighted by what they bring; of what is taken away (`forks`) the doubt stays."""
    if len(parts) == 1:
        return parts[0]
    second, scale = np.sum([p.second for p in parts], axis=0), sum(p.scale for p in parts)
    weights = np.array([abs(average(p.second, axes)) for p in parts])
    whole = max(float(weights.sum()), 1e-300)
    doubt = float(weights @ [p.doubt for p in parts]) / max(abs(average(second, axes)), 1e-12 * whole)
    few = whole / max(float(weights @ [1 / p.few for p in parts]), 1e-300)
    weighed = ("own", "radial", "weights", "unit", "near", "lost")
    rest = {name: float(weights @ [getattr(p, name) for p in parts]) / whole for name in weighed}
    return Cotangent(second, doubt, parts[0].mask, few, scale, **rest)


class Gradient(NamedTuple):
    """The cotangents of a node, averaged over its elements."""

    square: float  # their second moment
    doubt: float  # a bound on its relative error
    lost: float  # the part of that which near places leave, or losses


def cotangents(
    outputs: Iterable[tuple[Node, np.ndarray]], watched: Sequence[Node], alone: Collection[Node] = ()
) -> dict[int, Gradient]:
    """The cotangents of watched nodes, by id of those that a cotangent reaches.

    Outputs come with the second moments, by type, of the cotangents they are given. Of `alone` all that reads what they are
    scaled copies of reads them.
    """
    backward = _Backward(watched)
    for node, second in outputs:
        backward.notes.given[node.id] = second = full_types(second, node.axes)
        backward.pending.add(node, Cotangent(second, few=math.prod(a.size for a in node.axes)))
    while backward.pending.parts:
        node, parts = backward.pending.pop()
        for part in parts:
            backward.pass_on(node, part)
    out: dict[int, Gradient] = {}
    rows = set(watched)
    for n in watched:
        # Sums take the array behind a scaled copy, so that what flows into the copy arrives there.
        scale, shift, (inner, bind) = as_affine(n.whole)
        asked_itself = inner is not n and inner in rows and n not in alone and (scale, shift) != (1, 0)
        if asked_itself or isinstance(inner, Apply | Constant) or len(bind) < len(n.axes):
            scale, inner = 1.0, n
        if found := backward.found(inner):
            whole = _added_cotangents(found, inner.axes)
            square = average(whole.second, inner.axes) / scale**2
            # Where n numbers flow back, typical gradients lie below the mean: E ln χ²ₙ/n = ψ(n/2) − ln(n/2).
            half = min(whole.few / 2, 1e18)
            below = math.expm1(math.log(half) - float(special.digamma(half)))
            out[n.id] = Gradient(square, whole.doubt + below, whole.lost)
    return out


class _Backward:
    """One backward pass: what has still to be passed on, and what has arrived, within elementwise trees, too."""

    def __init__(self, watched: Sequence[Node]):
        self.asked: set[Node] = set()  # the watched nodes, and what was rebuilt from their roots
        waiting = list(watched)
        for node in waiting:  # grows
            self.asked.add(node)
            rebuilt = (other for other, *_ in node.graph.derived.get(node.id, ()))
            waiting += [other for other in rebuilt if other not in self.asked]
        self.first = min((node.id for node in self.asked), default=0)
        self.pending, self.done, self.notes = Cotangents(), Cotangents(), BackwardNotes()

    def pass_on(self, node: Node, part: Cotangent) -> None:
        """Pass what flows into a node to its arguments."""
        if node in self.asked or not isinstance(node, Apply):
            self.done.add(node, replace(part, mask=None))
        if node.id < self.first or isinstance(node, Leaf):
            return
        # What terms have in common in an unknown way, their cotangents have, too.
        unknown = node.doubt if isinstance(node, Sum) and node.flagged == "assumed" else 0.0
        part = replace(part, doubt=part.doubt + repeated(node) + unknown)
        for fork in forks(node):  # what reads a row passes it on
            reached = self.done if fork.root.node.primitive else self.pending
            reached.add(fork.root.node, fork.back(part, node.axes))
        if isinstance(node, Apply):
            self.through_function(node, part)
            return
        few = min(part.few, math.prod(a.size for a in node.axes))
        backs = pullback(node, part.second, self.notes)
        doubt = part.doubt + self.notes.doubts.get(node.id, node.gradient_doubt)
        for i, (view, back) in enumerate(zip(node.args, backs, strict=True)):
            if back is None:
                continue
            mask = _over_argument(part.mask, view, node) if isinstance(node, Sum) else selected(node)
            if mask and isinstance(node, Sum):  # written out, it depends on this term
                mask = View(_with_sum_written_out(mask.node, node), mask.bind)
            passed = replace(part, second=back, doubt=doubt, mask=mask, few=few)
            self.pending.add(view.node, summed_scale(node, i, pulled_back(node, i, passed)))
        while self.notes.inside:
            inner, second, doubt = self.notes.inside.pop()
            self.done.add(inner, Cotangent(second, part.doubt + doubt, few=few))

    def through_function(self, node: Apply, part: Cotangent) -> None:
        """Pass a cotangent through an elementwise tree to its roots, and to the watched nodes inside it."""
        scales = cofactors(node)
        for root in roots(node):
            slope = None if root.node.is_bits else derivative(node, root)
            if slope is None or any(root in group[1:] for group in scales.values()):
                continue  # a norm's own scale: its part is the projection below
            held, arrived = scales.get(root, [])[1:], part
            if held:
                scale = held[0]
                inverse, more = _inverse_scale(root, scale), 1 / (1 - min(_not_alone(root, scale), 0.9))
                # Of zeros a norm's epsilon is all there is.
                gain = np.where(scale.node.table.mean > 0, math.sqrt(inverse * more), 1.0)
                gain = means_by_type(scale.over(gain, node.axes, pairs=False), node.axes)
                arrived = replace(part, second=part.second * gain)
            passed = replace(part, second=_through(node, root, slope, arrived, held))
            passed = gradient_scale(node, root, slope, held, passed)
            back, doubt = passed.second, passed.doubt
            # Functions that say themselves what comes back, and not their derivatives.
            doubt += UNKNOWN * any(x.node.primitive == "own_gradient" for x in trees(node))
            doubt += _MASK_DOUBT * (part.mask is not None)
            doubt += 2 * max((doubt_of(r.node) for r in roots(slope.node) if r not in held), default=0.0)
            if held:
                along_itself = _projection(node, root, slope, scale, arrived, back)
                back = back - max(1 + part.radial, 0.0) * along_itself
                doubt += ROUGH * (inverse - 1) + LEADING_ORDER * (more - 1)
                doubt += doubt_of(root.node) + norm_in_doubt(root, scale)
                if root.node.near == 1 and len(root.bind) > len(scale.bind) + 1:
                    doubt += _inverse_scale(root, scale, power=1) / inverse - 1
            else:
                gain = gained_along(root, slope, part, node.axes)
                passed, doubt = replace(passed, lost=passed.lost + gain), doubt + gain
            fixed = all(concentrated(r.node) for r in roots(slope.node))
            mask = None if fixed else _over_argument(slope, root, node)
            self.pending.add(root.node, replace(passed, second=back, doubt=doubt, mask=mask))
        for view in trees(node)[1:]:
            if view.node in self.asked and (slope := derivative(node, view)) is not None:
                passed = replace(part, second=_through(node, view, slope, part, ()), mask=None)
                self.done.add(view.node, gradient_scale(node, view, slope, (), passed))

    def found(self, node: Node) -> list[Cotangent]:
        """The cotangents of a node: its own, and those of what was rebuilt from its roots, carried back."""
        return [*self.done.parts.get(node, {}).values()] + [
            replace(c, second=back(np.asarray(c.second)), doubt=c.doubt + doubt)
            for other, back, doubt in node.graph.derived.get(node.id, ())
            for c in self.found(other)
        ]


def gained_along(root: View, slope: View, part: Cotangent, axes: Axes) -> float:
    """What a cotangent that is one for all units (the last axis) gains behind their weights, as its slope goes with them.

    Of Σ h²/2 it is h itself: where h = W x has m units of n terms, E[|Wᵀh|²] is 1 + m/n times that of an independent one.
    """
    last = len(axes) - 1
    own, other = (average(part.second, axes, apart=k) for k in ((), {last}))
    if last < 1 or other <= NEGLIGIBLE * own:
        return 0.0
    along = mean_of_product(root, slope, axes) ** 2 / root.node.table.divisor / slope.node.table.divisor
    return other / own * along * (axes[last].size / root.node.width if root.node.width else 1.0)


@once_per_node
def repeated(node: Node) -> float:
    """Relative covariance of g and Wᵀg at a sum x + W x whose x holds W x' of an earlier step: g holds Wᵀg' of a later one.

    To first order that is what the terms have in common forward: 2 Σ |E[t_i t_j]| / E[x²] over pairs of one W.
    """
    earlier, common = list[tuple[float, View]](), 0.0
    for c, view in sorted(node.terms, key=lambda term: term[1].node.id) if isinstance(node, Sum) else ():
        own = [(c * d, x) for d, x in weighted_sum(view)[0] if applied_weights(x.node)]
        for (w, x), (v, y) in itertools.product(own, earlier):
            if applied_weights(x.node)[0].leaf is applied_weights(y.node)[0].leaf:
                common += abs(w * v * mean_of_product(x, y, node.axes))
        earlier += own
    return 2 * common / node.table.divisor


def _over_argument(view: View | None, argument: View, node: Node) -> View | None:
    """A view over the axes of a node as one over an argument's; None where that has not as many."""
    places = range(len(node.axes))
    if view is None or sorted(argument.bind) != list(places):
        return None
    return view.within([argument.bind.index(k) for k in places])


def _with_sum_written_out(node: Node, target: Sum) -> Node:
    """An elementwise tree with one of its roots, a sum, written out as a tree of its terms."""
    make = node.graph.make
    if node is target:
        terms = (View(affine(x.node, c, 0.0), x.bind) for c, x in target.terms)
        return functools.reduce(lambda a, b: make(Apply, node.axes, [a, b], ("add", ())).whole, terms).node
    if not isinstance(node, Apply) or all(root.node is not target for root in roots(node)):
        return node
    args = [View(_with_sum_written_out(child, target), bind) for child, bind in node.args]
    return make(Apply, node.axes, args, node.params)


def _through(node: Apply, target: View, slope: View, part: Cotangent, scales: Sequence[View]) -> np.ndarray:
    """A cotangent times the node's derivative; a norm's own scale is held at its mean (`_inverse_scale` does the rest).

    Along a stream one derivative follows another of nearly the same argument: E[m² m'²] in place of E[m²] E[m'²], each given
    the last (a Markov chain).
    """
    if scales and set(roots(slope.node)) <= set(scales):
        squares = means_by_type(along(slope, node.axes)[..., 0], node.axes)
    else:
        squares = slope.second(node.axes)
        if part.mask is not None and not isinstance(slope.node, Constant):
            alone = refine(product_second(slope, slope, tuple(Axis(a.size) for a in node.axes)), node.axes)
            given = _given_last(node, slope, part.mask)
            # Of a slope that is centred, places apart have next to nothing in common, and no ratio.
            alike = alone > NEGLIGIBLE * np.max(alone)
            ratio = np.divide(given, alone, out=np.ones_like(given), where=alike)
            squares = squares * ratio + np.where(alike, 0.0, given - alone)
    return sum_out(part.second * squares, node.axes, target)


def _given_last(node: Apply, x: View, last: View) -> np.ndarray:
    """E[x_i x_j l_i l_j] / E[l_i l_j] by type, classes pooled: what x is where the last derivative l lets something pass."""
    coarse = tuple(Axis(a.size) for a in node.axes)
    both = apply(node.graph, "mul", (), node.axes, [x, last]).whole
    joint, before = (product_second(view, view, coarse) for view in (both, last))
    return refine(joint / np.maximum(before, 1e-300), node.axes)


def _projection(
    node: Apply, root: View, slope: View, scale: View, part: Cotangent, back: np.ndarray
) -> np.ndarray:
    """What a norm takes out of the cotangent u along its own output y: y · mean(u y), whose mean square is E[mean(u y)²]."""
    whole = apply(node.graph, "mul", (), node.axes, [slope, root]).whole
    squares = whole.second(node.axes) if part.mask is None else _given_last(node, whole, part.mask)
    axes, square = root.node.axes, root.node.table.divisor
    normed = root.axes_beyond(scale)
    out = mean_part(sum_out(part.second * squares, node.axes, root), normed, axes) / square
    alike = outer(a.agrees | (k not in normed) for k, a in enumerate(axes))
    if normed == (len(axes) - 1,):
        return out * alike
    # Of two places that share part of y or u: (UY + YU)/n − Y mean, U and Y the moments of pairs of either.
    y = full_types(root.node.table.second / square, axes)
    both, held = (pool(full_types(x, axes), axes) for x in (back, y))
    # A matrix of a on its diagonal and b elsewhere has eigenvalues a − b and a + (n − 1) b.
    turns = {k: np.array([[1, -1], [1, axes[k].size - 1]]) for k in normed}
    held = held[tuple(slice(2 if k in turns else 1) for k in range(len(axes)))]
    for k, turn in turns.items():
        both, held = (apply_axis(x, k, turn) for x in (both, held))
    both = both * held / root.node.count(normed)
    for k, turn in turns.items():
        both = apply_axis(both, k, np.linalg.inv(turn))
    return np.where(alike, out, refine(2 * both, axes) - y * out)


def _inverse_scale(root: View, scale: View, power: int = 2) -> float:
    """E[1/v] E[v] of a norm's variance v, the mean of squares of its root over n positions, of relative variance r.

    r is that of jointly Gaussian positions (`mean_squared_correlation`). By its own part, 2/n, v is a gamma variable and brings
    1/(1 − 2/n), at most 10; by what positions share it is lognormal: 1 + r − 2/n. In the gradient 1/v stands alone; forward y
    is normalised by itself. With power=1 a type's pairs are equal or free, as near places of a picture are, or far ones.
    """
    table = root.node.table
    second, outer = (mean_squared_correlation(m, root, scale, power) for m in (table.second, table.outer))
    # The part of v that cannot fluctuate: Σ share² over the terms that a norm has just put out.
    node, fixed = uncentred(root.node.whole).node, 0.0
    for share, (term, _) in zip(term_shares(node), node.args, strict=True) if isinstance(node, Sum) else ():
        # A function of one normalised array, of as many axes.
        groups = (g for g in cofactors(term).values() if [len(s.bind) for s in g[1:]] == [len(scale.bind)])
        fixed += share**2 * (set(roots(term)) in map(set, groups))
    alive = float(over_classes(1.0 * (scale.node.table.mean > 0), scale.node.axes))
    varied = 2 * (second - outer) * (1 - fixed) / (alive or 1.0)
    own = min(2 / root.node.count(root.axes_beyond(scale)), varied, 0.9)
    return (1 + varied - own) / (1 - own)


def _not_alone(root: View, scale: View) -> float:
    """What of Var[v]/E[v]² is not of independent positions: given what they are made of, places overlap, which adds 2 V.

    Weights of κ < 3 take (κ − 3)/n from it. Of m units at a place a pair is of one with the chance 1/m. Of one place it is what
    the scale varies by there, by inputs and by units before it: of each a gamma variable, as if of 2/c² squares.
    """
    norm, node = normed_together(root, scale), uncentred(root.node.whole).node
    if not norm.tokens:
        sources = kernel(root.node).places.items() if norm.features else ()
        return 1 - math.prod(1 - math.expm1(c * c) for key, c in sources if isinstance(key, Node))
    units = norm._replace(features=(len(root.bind) - 1,))
    grouped = isinstance(node, Conv) and node.params.groups > 1  # one unit reads one group
    met = 2 * (patch_overlap(node) if grouped else overlap_before(units, units))
    met += sum((w.leaf.kurtosis - 3) / (node.width or math.inf) for w in applied_weights(node))
    return met / norm.count


def norm_in_doubt(root: View, scale: View) -> float:
    """The doubt of gradients behind a norm of a linear map of given numbers with places, by E[1/v] E[v] of its variance v.

    Of a norm at each place it is 1 + P for a lognormal v of relative variance P between places. Of a norm over places, v = w'Σw
    of a unit has as few terms that count as Σ, the covariance of what windows read: one or two for a smooth picture, where
    E[1/v] is not finite.
    """
    node = uncentred(root).node
    given = any(x.is_input and x.near == 1 for x in node.sources)
    if given and len(scale.bind) < 2:
        return UNKNOWN if len(root.bind) > len(scale.bind) + 1 else 0.0
    varied = given or (in_order(node) and 0 in scale.bind)
    return min(kernel(node).point, UNKNOWN) * varied
