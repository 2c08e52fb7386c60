"""Cotangents: their second moments by type, passed from the output back through every node.

Gradient independence is the one assumption, that of mean-field theory (Schoenholz et al. 2017): a cotangent is independent of
the forward values it is multiplied with, except through the function it passes. That one's derivative is a function of the
same roots, and its moments are taken exactly.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import special

from varscale.theory.domain.axes import Axis, contract_axis, refine
from varscale.theory.domain.tables import ROUGH, by_type, full_types
from varscale.theory.graph.expressions import Apply, Sum, roots
from varscale.theory.graph.nodes import UNKNOWN, Array, Constant, Leaf, Node, View, pullback
from varscale.theory.graph.normal_form import affine, apply, derivative
from varscale.theory.graph.store import BackwardNotes, once_per_node
from varscale.theory.propagation.error_bounds import doubt_of
from varscale.theory.propagation.fluctuations import gradient_scale, norm_of_given, summed_scale
from varscale.theory.propagation.fourth_moments import mean_squared_correlation
from varscale.theory.propagation.marginals import along, cofactors, concentrated, largest_term, term_shares
from varscale.theory.propagation.pullbacks import forks, mean_square, pulled_back, sum_out
from varscale.theory.propagation.second_moments import product_second

_MASK_DOUBT = 0.03  # set, not derived: a stream's derivatives are a Markov chain only in the main


@dataclasses.dataclass(frozen=True, eq=False)
class Cotangent:
    """What flows back into a node.

    Attributes:
        second: second moments by type.
        doubt: bound on their relative error.
        mask: the derivative it was multiplied by last, where nothing random came between: a stream's next one is correlated.
        few: the fewest numbers that it passed through.
        scale: d ln(mean square)/d ln Q, Q the second moment of the node's values at the same place, through later layers.
        own: the same, through the last derivative it was multiplied by.
        radial: its part along the node's values over that along any other direction, less one.
        unit: what a unit's square, relative, adds to ln(mean square), for the unit's part in the sum that comes next.
        near: how much more than any two near places have in common at most, relative to the mean square.
        lost: the part of `doubt` that comes of that.
    """

    second: np.ndarray
    doubt: float = 0.0
    mask: View | None = None
    few: float = math.inf
    scale: float = 0.0
    own: float = 0.0
    radial: float = 0.0
    unit: float = 0.0
    near: float = 0.0
    lost: float = 0.0


class Cotangents:
    """Cotangents by node, those under one mask added up."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.parts: dict[int, dict[tuple[int, tuple[int, ...]] | None, Cotangent]] = {}

    def add(self, node: Node, part: Cotangent | None) -> None:
        if part is None or isinstance(node, Array | Constant):
            return
        self.nodes[node.id] = node
        parts = self.parts.setdefault(node.id, {})
        key = part.mask and (part.mask.node.id, part.mask.bind)
        part = dataclasses.replace(part, second=full_types(part.second, node.axes))
        parts[key] = _added_cotangents([parts[key], part], node.axes) if key in parts else part

    def pop(self) -> tuple[Node, list[Cotangent]]:
        """The latest node: all that flows into it has arrived, and what depends on its scale is shared out."""
        top = max(self.parts)
        node, parts = self.nodes[top], list(self.parts.pop(top).values())
        weights = np.array([abs(mean_square(p.second, node.axes)) for p in parts])
        weights = weights / max(float(weights.sum()), 1e-300)
        whole = sum(p.scale for p in parts) + float(weights @ [p.own for p in parts])
        return node, [
            dataclasses.replace(p, scale=whole * w, own=0.0) for p, w in zip(parts, weights, strict=True)
        ]


def _added_cotangents(parts: Sequence[Cotangent], axes: tuple[Axis, ...]) -> Cotangent:
    """Cotangents of one node, their doubts weighted by what they bring; of what is taken away (`forks`) the doubt stays."""
    if len(parts) == 1:
        return parts[0]
    weights = np.array([abs(mean_square(p.second, axes)) for p in parts])
    whole = max(float(weights.sum()), 1e-300)
    kept = abs(mean_square(np.sum([p.second for p in parts], axis=0), axes))
    doubt = float(weights @ [p.doubt for p in parts]) / max(kept, 1e-12 * whole)
    few = whole / max(float(weights @ [1 / p.few for p in parts]), 1e-300)
    second, scale = np.sum([p.second for p in parts], axis=0), sum(p.scale for p in parts)
    rest = zip(*((p.own, p.radial, p.unit, p.near, p.lost) for p in parts), strict=True)
    own, radial, unit, near, lost = (float(weights @ line) / whole for line in rest)
    return Cotangent(second, doubt, parts[0].mask, few, scale, own, radial, unit, near, lost)


def cotangents(
    outputs: Iterable[tuple[Node, np.ndarray]], watched: Sequence[Node]
) -> dict[int, tuple[float, float, float]]:
    """Second moments of the cotangents at watched nodes, averaged over their elements, each with a bound on its relative error.

    Args:
        outputs: nodes with the second moments, by type, of the cotangents they are given.
        watched: the nodes asked for.

    Returns:
        Node id to second moment, doubt, and the part of it that near places leave; without nodes that no cotangent reaches.
    """
    pending, done, inside = Cotangents(), Cotangents(), Cotangents()
    notes, within = BackwardNotes(), {}
    for node, second in outputs:
        pending.add(node, Cotangent(second, few=math.prod(a.size for a in node.axes)))
    asked = {n.id: n for n in watched}
    for node in list(asked.values()):
        _follow(node, asked)
    lowest = min(asked, default=0)
    while pending.parts:
        node, parts = pending.pop()
        for part in parts:
            if node.id in asked or not isinstance(node, Apply):
                done.add(node, dataclasses.replace(part, mask=None))
            if node.id < lowest or isinstance(node, Leaf):
                continue
            part = dataclasses.replace(
                part, doubt=part.doubt + max((fork.doubt for fork in forks(node)), default=0.0)
            )
            for fork in forks(node):
                if not fork.doubt:
                    back = Cotangent(fork.back(part.second, node.axes), part.doubt, few=part.few)
                    pending.add(fork.root.node, dataclasses.replace(back, near=part.near, lost=part.lost))
            if isinstance(node, Apply):
                _elementwise(node, part, asked, within, pending, inside)
                continue
            few = min(part.few, math.prod(a.size for a in node.axes))
            for i, (view, back) in enumerate(zip(node.args, pullback(node, part.second, notes), strict=True)):
                if back is not None:
                    mask = _mask_of_term(node, i, part.mask) if isinstance(node, Sum) else None
                    over = summed_scale(node, i, part.scale, part.radial, part.unit)
                    near = pulled_back(node, i, part.near, back)
                    doubt = part.doubt + notes.doubts.get(node.id, node.gradient_doubt) + near.doubt
                    rest = (few, over.passed, 0.0, over.radial, over.unit, near.excess)
                    found = Cotangent(over.growth * back, doubt, mask, *rest, part.lost + near.doubt)
                    pending.add(view.node, found)
            while notes.inside:
                inner, second, doubt = notes.inside.pop()
                done.add(inner, Cotangent(second, part.doubt + doubt, few=few))
    out: dict[int, tuple[float, float, float]] = {}
    rows = {n.id for n in watched}
    for n in watched:
        inner, scale = _copied(n)
        # Sums take the array behind a scaled copy, so that what flows into the copy arrives there.
        whole_of = n if inner.id in rows and inner is not n and (scale != 1 or n.params[1][1] != 0) else inner
        found = _found(whole_of, (done, inside))
        if found:
            whole = _added_cotangents(found, whole_of.axes)
            factor = scale**2 if whole_of is inner else 1.0
            square = mean_square(whole.second, whole_of.axes) / factor
            out[n.id] = (square, whole.doubt + _few_numbers(whole.few), whole.lost)
    return out


def _few_numbers(n: float) -> float:
    """How far the typical gradient lies below the mean one where n numbers flow back: E ln χ²ₙ/n = ψ(n/2) − ln(n/2)."""
    return 0.0 if n == math.inf else math.expm1(math.log(n / 2) - float(special.digamma(n / 2)))


def _copied(node: Node) -> tuple[Node, float]:
    """The array that a node is a scaled and shifted copy of, over as many axes, and the scale."""
    inner, scale = node, 1.0
    while (
        isinstance(inner, Apply)
        and inner.params[0] == "affine"
        and len(inner.args[0].node.axes) == len(node.axes)
    ):
        inner, scale = inner.args[0].node, scale * inner.params[1][0]
    return (node, 1.0) if isinstance(inner, Apply) else (inner, scale)


def _follow(node: Node, asked: dict[int, Node]) -> None:
    """Ask for what was rebuilt from the roots of a node, too."""
    for other, *_ in node.graph.derived.get(node.id, ()):
        if other.id not in asked:
            asked[other.id] = other
            _follow(other, asked)


def _found(node: Node, stores: Sequence[Cotangents]) -> list[Cotangent]:
    """The cotangents of a node: its own, and those of what was rebuilt from its roots, carried back."""
    own = [c for store in stores for c in store.parts.get(node.id, {}).values()]
    for other, back, doubt in node.graph.derived.get(node.id, ()):
        found = _found(other, stores)
        own += [
            dataclasses.replace(c, second=back(np.asarray(c.second)), doubt=c.doubt + doubt) for c in found
        ]
    return own


def _elementwise(
    node: Apply,
    part: Cotangent,
    asked: dict[int, Node],
    within: dict[int, list[View]],
    pending: Cotangents,
    inside: Cotangents,
) -> None:
    """Pass a cotangent through an elementwise tree to its roots, and to the watched nodes inside it."""
    scales = cofactors(node)
    for root in roots(node):
        if root.node.is_bits:
            continue
        group = scales.get(root)
        if group is None and any(root in g[1:] for g in scales.values()):
            continue  # a norm's own scale: its part is the projection below
        held = group[1:] if group else []
        back = _through(node, root, part, held)
        if back is None:
            continue
        slope = derivative(node, root)
        assert slope is not None
        over = gradient_scale(node, root, slope, held, (part.scale, part.radial, part.unit))
        back = back * over.growth
        doubt = part.doubt + over.doubt + _MASK_DOUBT * (part.mask is not None) + own_gradients(node)
        doubt += 2 * max((doubt_of(r.node) for r in roots(slope.node) if r not in held), default=0.0)
        if held:
            inverse = _inverse_scale(root, held[0])
            along_itself = max(1 + part.radial, 0.0) * _projection(node, root, held[0], part)
            back = (back - along_itself) * inverse
            doubt += ROUGH * (inverse - 1) + doubt_of(root.node) + norm_of_given(root, held[0])
            if root.node.near == 1 and len(root.bind) > len(held[0].bind) + 1:
                doubt += _inverse_scale(root, held[0], power=1) / inverse - 1
        scales_of = (over.passed, over.own, over.radial)
        pending.add(
            root.node,
            Cotangent(back, doubt, _mask(node, root), part.few, *scales_of, near=part.near, lost=part.lost),
        )
    for view in _within(node, asked, within):
        back = _through(node, view, part)
        if back is not None:
            inside.add(view.node, Cotangent(back, part.doubt, few=part.few, lost=part.lost))


@once_per_node
def own_gradients(node: Node) -> float:
    """The doubt of cotangents through functions in a tree that say themselves what comes back, and not their derivatives."""
    if not isinstance(node, Apply):
        return 0.0
    return UNKNOWN if node.params[0] == "own_gradient" else max(own_gradients(v.node) for v in node.args)


def _mask(node: Apply, root: View) -> View | None:
    """The derivative towards a root as a view over that root's own axes; None where it does not fluctuate, or has others."""
    slope = derivative(node, root)
    if slope is None or sorted(root.bind) != list(range(len(node.axes))):
        return None
    if all(concentrated(r.node) for r in roots(slope.node)):
        return None
    place = {b: k for k, b in enumerate(root.bind)}
    return View(slope.node, tuple(place[b] for b in slope.bind))


def _mask_of_term(node: Sum, i: int, mask: View | None) -> View | None:
    """A mask over a sum's axes as one over term i's, the sum in it written out: it depends on that term."""
    view = node.args[i]
    if mask is None or sorted(view.bind) != list(range(len(node.axes))):
        return None
    written = _with_sum_written_out(mask.node, node)
    place = {b: k for k, b in enumerate(view.bind)}
    return View(written, tuple(place[b] for b in mask.bind))


def _with_sum_written_out(node: Node, target: Sum) -> Node:
    """An elementwise tree with one of its roots, a sum, written out as a tree of its terms."""
    if node is target:
        whole = tuple(range(len(target.axes)))
        terms = [
            View(affine(x.node, c, 0.0), x.bind) for c, x in zip(target.params, target.args, strict=True)
        ]
        add = functools.partial(target.graph.make, Apply, target.axes, params=("add", ()))
        return functools.reduce(lambda a, b: View(add([a, b]), whole), terms).node
    if not isinstance(node, Apply) or all(root.node is not target for root in roots(node)):
        return node
    args = [View(_with_sum_written_out(child, target), bind) for child, bind in node.args]
    return node.graph.make(Apply, node.axes, args, node.params)


def _through(node: Apply, target: View, part: Cotangent, scales: Sequence[View] = ()) -> np.ndarray | None:
    """A cotangent times the node's derivative; a norm's own scale is held at its mean (`_inverse_scale` does the rest).

    Along a stream one derivative follows another of nearly the same argument: E[m² m'²] in place of E[m²] E[m'²], each given
    the last (a Markov chain).
    """
    slope = derivative(node, target)
    if slope is None:
        return None
    if scales and set(roots(slope.node)) <= set(scales):
        held = along(slope, node.axes)[..., 0]
        squares = by_type(held, node.axes, second=False) * by_type(held, node.axes, second=True)
    elif part.mask is not None and not isinstance(slope.node, Constant):
        coarse = tuple(Axis(a.size) for a in node.axes)
        alone = np.maximum(product_second(slope, slope, coarse), 1e-300)
        squares = slope.second(node.axes) * _given_last(node, slope, part.mask) / refine(alone, node.axes)
    else:
        squares = slope.second(node.axes)
    return sum_out(part.second * squares, node.axes, target)


def _given_last(node: Apply, x: View, last: View) -> np.ndarray:
    """E[x_i x_j l_i l_j] / E[l_i l_j] by type, classes pooled: what x is where the last derivative l lets something pass."""
    coarse = tuple(Axis(a.size) for a in node.axes)
    both = View(apply(node.graph, "mul", (), node.axes, [x, last]), tuple(range(len(node.axes))))
    joint, before = (product_second(view, view, coarse) for view in (both, last))
    return refine(joint / np.maximum(before, 1e-300), node.axes)


def _projection(node: Apply, root: View, scale: View, part: Cotangent) -> np.ndarray:
    """What a norm takes out of the cotangent u along its own output y: y · mean(u y), whose mean square is E[mean(u y)²]."""
    slope = derivative(node, root)
    assert slope is not None
    along = apply(node.graph, "mul", (), node.axes, [slope, root])
    whole = View(along, tuple(range(len(along.axes))))
    squares = whole.second(node.axes) if part.mask is None else _given_last(node, whole, part.mask)
    out = sum_out(part.second * squares, node.axes, root) / max(root.node.table.mean_square, 1e-300)
    for k, place in enumerate(root.bind):
        if place not in scale.bind:
            axis = root.node.axes[k]
            same = axis.agrees.astype(float)
            out = np.moveaxis(np.multiply.outer(same, contract_axis(out, k, axis.any_pair)), 0, k)
    return out


def _inverse_scale(root: View, scale: View, power: int = 2) -> float:
    """E[1/v] E[v] of a norm's variance v, the mean of squares of its root over n positions: 1/(1 − r), r = Var[v]/E[v]².

    r is that of jointly Gaussian positions (`mean_squared_correlation`), and v is taken for a gamma variable, as it is for
    independent ones (1/(1 − 2/n)). Its E[1/v] is infinite from r = 1 on: there the factor stops at 10, and is in doubt. In the
    forward pass it drops out, since y is normalised by itself; in the gradient 1/v stands alone. With power=1 the pairs of a
    type are equal or free, in that proportion: near places of a picture are more alike than others.
    """
    table = root.node.table
    ratio = 2 * (
        mean_squared_correlation(table.second, root, scale, power)
        - mean_squared_correlation(table.outer, root, scale, power)
    )
    return 1 / (1 - min(ratio * (1 - _normalised_before(root.node, scale)), 0.9))


def _normalised_before(node: Node, scale: View) -> float:
    """The part of a norm's variance that cannot fluctuate: Σ share² over the terms that a norm has just put out."""
    while isinstance(node, Sum) and node.is_centred:
        node = largest_term(node).node
    if not isinstance(node, Sum):
        return 0.0
    out = 0.0
    for share, view in zip(term_shares(node), node.args, strict=True):
        groups = (
            [g for g in cofactors(view.node).values() if len(g) == 2] if isinstance(view.node, Apply) else []
        )
        if (
            len(groups) == 1
            and len(groups[0][1].bind) == len(scale.bind)
            and set(roots(view.node)) == set(groups[0])
        ):
            out += float(share) ** 2
    return out


def _within(node: Apply, asked: dict[int, Node], known: dict[int, list[View]]) -> list[View]:
    """The watched nodes inside an elementwise tree, as views over its frame; `known` holds those of trees below."""
    if node.id not in known:
        found = [
            view.within(bind)
            for child, bind in node.args
            if isinstance(child, Apply)
            for view in [View(child, tuple(range(len(child.axes)))), *_within(child, asked, known)]
            if view.node.id in asked
        ]
        known[node.id] = list(dict.fromkeys(found))
    return known[node.id]
