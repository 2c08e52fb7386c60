"""Pullbacks of the core kinds of nodes: second moments of the cotangents of their arguments.

Forks are two paths that carry one cotangent to one value, whose contributions are correlated.

Of y = l + exp(l) the gradient at l is G(1 + e^l), and E[(1 + e^l)²] is not 1 + E[e^2l]. Each path's own part is passed back by
the nodes on it; what is worked out here is the rest, Σ_{p≠q} E[s_p s_q] over pairs of paths with slopes s.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from varscale.theory.domain.axes import Axis, apply_axis, contract_axis, lift_types, shares
from varscale.theory.domain.tables import full_types
from varscale.theory.graph.derivatives import derivative
from varscale.theory.graph.expressions import Apply, Mean, Sum, roots
from varscale.theory.graph.nodes import Array, Constant, Leaf, Node, View, number, pullback
from varscale.theory.graph.normal_form import apply, mean_pullback
from varscale.theory.graph.store import BackwardNotes, once_per_node
from varscale.theory.propagation.scale_responses import cofactors


def sum_out(second: np.ndarray, frame: Sequence[Axis], view: View) -> np.ndarray:
    """A frame's cotangent moments, summed over the axes that the viewed node does not have, by the node's own types."""
    out = np.array(full_types(second, frame))
    for k in reversed(range(len(frame))):
        if k not in view.bind:
            out = contract_axis(out, k, frame[k].pairs)
    kept = [k for k in range(len(frame)) if k in view.bind]
    for place, k in enumerate(kept):
        own = view.node.axes[view.bind.index(k)]
        if own.labels != frame[k].labels:
            out = apply_axis(out, place, coarsen(frame[k], own))
    return out.transpose([kept.index(b) for b in view.bind]) if view.bind else out


def coarsen(fine: Axis, coarse: Axis) -> np.ndarray:
    """Averages of a type array over the pairs that a coarser classing pools, (coarse types, fine types)."""
    index = lift_types(fine, coarse)
    if index.ndim == 2:
        return (
            lift_types(coarse, fine)
            if lift_types(coarse, fine).ndim == 2
            else np.eye(fine.types)[lift_types(coarse, fine)]
        )
    out = np.zeros((coarse.types, fine.types))
    out[index, np.arange(fine.types)] = np.maximum(fine.pairs, 1e-12)
    return out / np.maximum(out.sum(axis=1, keepdims=True), 1e-300)


def mean_square(second: np.ndarray, axes: tuple[Axis, ...]) -> float:
    """The average over elements of a type array."""
    return float(shares(axes) @ second[tuple(slice(0, axis.classes) for axis in axes)].ravel())


def centred(second: np.ndarray, axes: Sequence[int], frame: Sequence[Axis]) -> np.ndarray:
    """A cotangent less its mean over some axes: E[(g − ḡ)(g' − ḡ')] = E[g g'] − E[ḡ ḡ'] for exchangeable positions."""
    mean = np.array(full_types(second, frame))
    for k in axes:
        mean = np.repeat(np.expand_dims(contract_axis(mean, k, frame[k].any_pair), k), frame[k].types, axis=k)
    return second - mean


@pullback.register(Sum)
def pullback_of_sum(node: Sum, cotangent: np.ndarray, notes: BackwardNotes) -> list[np.ndarray | None]:

    centred_by = node.centring
    out: list[np.ndarray | None] = []
    for i, (c, view) in enumerate(zip(node.params, node.args, strict=True)):
        if i in centred_by.values():
            out.append(None)
            continue
        passed = cotangent
        if i in centred_by:
            mean = node.args[centred_by[i]]
            passed = centred(cotangent, [k for k in view.bind if k not in mean.bind], node.axes)
        out.append(c * c * sum_out(passed, node.axes, view))
    return out


@pullback.register(Mean)
def pullback_of_mean(node: Mean, cotangent: np.ndarray, notes: BackwardNotes) -> list[np.ndarray | None]:
    return [mean_pullback(cotangent, node.params, node.args[0].node.axes)]


_MOST_PATHS = 64  # into one sum: those that go further down are left out


class Fork(NamedTuple):
    """A value that a cotangent reaches by two paths or more.

    Attributes:
        root: the value, in the frame of the node, or of what a mean averages.
        squares: Σ E[s_p s_q] over pairs of paths, by type.
        mean: the mean that all of them go through first, as the node's argument; None where they go through none.
        spread: axes of the frame along which one path of each pair takes the mean of the cotangent.
    """

    root: View
    squares: np.ndarray
    mean: View | None = None
    spread: tuple[int, ...] = ()

    def back(self, cotangent: np.ndarray, frame: Sequence[Axis]) -> np.ndarray:
        """What the pairs of paths add to the value's cotangent, from the node's."""
        if self.mean is not None:
            inner = self.mean.node.args[0].node.axes
            averaged = mean_pullback(sum_out(cotangent, frame, self.mean), self.mean.node.params, inner)
            return sum_out(averaged * self.squares, inner, self.root)
        passed = np.array(full_types(cotangent, frame))
        for k in self.spread:
            passed = np.repeat(
                np.expand_dims(contract_axis(passed, k, frame[k].any_pair), k), frame[k].types, axis=k
            )
        return sum_out(passed * self.squares, frame, self.root)


class _Term(NamedTuple):
    """A term of a sum: its weight, the array, and the sums in between."""

    factor: float
    view: View
    through: frozenset[Node] = frozenset()


class _Path(NamedTuple):
    """A way from a node down to a value.

    Attributes:
        term: number of the node's argument that it goes through.
        root: the value, in the node's frame.
        factor: product of the weights of the sums on the way.
        slope: derivative of the function on the way; None where it is 1.
        through: the nodes on the way below the argument, the value left out.
    """

    term: int
    root: View
    factor: float
    slope: View | None
    through: frozenset[Node]


@once_per_node
def forks(node: Node) -> list[Fork]:
    """The values that a cotangent of a sum or a function reaches by two paths."""
    if isinstance(node, Apply):
        whole = View(node, tuple(range(len(node.axes))))
        return (
            [Fork(*found) for found in _meetings(node.axes, [_Term(1.0, whole)])]
            if len(node.args) > 1
            else []
        )
    if not isinstance(node, Sum):
        return []
    terms = list(_terms_of_sum(node, frozenset()))
    out = [*(Fork(*found) for found in _meetings(node.axes, terms)), *_beside_reductions(node, terms)]
    means: dict[tuple[Any, ...], list[_Term]] = {}
    waiting = terms
    while waiting and len(waiting) <= _MOST_PATHS:
        for term in waiting:
            if isinstance(mean := term.view.node, Mean):
                means.setdefault((mean.params, mean.args[0].node.axes, term.view.bind), []).append(term)
        waiting = [inner for term in waiting if isinstance(term.view.node, Sum) for inner in _inside(term)]
    for (_, axes, _), group in means.items():  # a sum of means is the mean of a sum
        inner = [term._replace(view=term.view.node.args[0]) for term in group]
        out += [Fork(*found, group[0].view) for found in _meetings(axes, inner)] if len(group) > 1 else []
    return out


def _beside_reductions(node: Sum, terms: list[_Term]) -> Iterator[Fork]:
    """Values that are a term, or a function of which is, beside what reduces them: y − log Σ exp y.

    The reduction's derivatives are alike along the axes it reduces and add up to 1: a path through it carries the mean of the
    cotangent along these, whatever the derivatives are.
    """
    reductions = [term for term in terms if term.view.node.follows_shifts]
    for reduction in reductions:
        inner = reduction.view.node.args[0]
        kept = [k for k in range(len(inner.node.axes)) if k not in reduction.view.node.reduced]
        for direct in _starts([term for term in terms if term not in reductions]):
            for path in _starts(
                [reduction._replace(view=View(inner.node, tuple(range(len(inner.node.axes)))))]
            ):
                if path.root.node is not direct.root.node or path.through & direct.through:
                    continue
                # Where each axis of what is reduced lies in the sum's frame, read off the value that both end
                # in.
                place = dict(zip(path.root.bind, direct.root.bind, strict=True))
                stays = dict(zip(kept, reduction.view.bind, strict=True))
                spread = tuple(place[k] for k in reduction.view.node.reduced if k in place)
                apart = len(spread) == len(reduction.view.node.reduced) and not set(spread) & set(
                    reduction.view.bind
                )
                if apart and all(place.get(k, f) == f for k, f in stays.items()):
                    through = path._replace(
                        root=direct.root, slope=path.slope and path.slope.within(_frame(place, stays))
                    )
                    yield Fork(direct.root, _product_of_slopes(node.axes, direct, through), None, spread)


def _frame(*places: dict[int, int]) -> tuple[int, ...]:
    """Axis by axis, its place in the sum's frame."""
    whole = {k: f for found in places for k, f in found.items()}
    return tuple(whole[k] for k in sorted(whole))


def _terms_of_sum(node: Sum, through: frozenset[Node]) -> Iterator[_Term]:
    """The terms of a sum, but those that another takes the mean of away, and that one."""
    centred = {*node.centring, *node.centring.values()}
    for i, (c, view) in enumerate(zip(node.params, node.args, strict=True)):
        if i not in centred:
            yield _Term(c, view, through)


def _inside(term: _Term) -> Iterator[_Term]:
    """The terms of a sum that is a term itself."""
    assert isinstance(term.view.node, Sum)
    for factor, view, through in _terms_of_sum(term.view.node, term.through | {term.view.node}):
        yield _Term(term.factor * factor, view.within(term.view.bind), through)


def _meetings(axes: tuple[Axis, ...], terms: list[_Term]) -> list[tuple[View, np.ndarray]]:
    """Values at which paths through several terms of a sum meet, or paths through one function, with Σ E[s_p s_q]."""
    found: dict[tuple[int, tuple[int, ...]], list[_Path]] = {}
    for path in _paths(terms):
        found.setdefault((path.root.node.id, path.root.bind), []).append(path)
    out = []
    for paths in found.values():
        pairs = [(p, q) for i, p in enumerate(paths) for q in paths[:i] if _part_here(p, q, len(terms))]
        if pairs:
            out.append((paths[0].root, np.sum([_product_of_slopes(axes, p, q) for p, q in pairs], axis=0)))
    return out


def _part_here(p: _Path, q: _Path, terms: int) -> bool:
    """Whether two paths part at this node and do not meet above their end: if they do, that is where they are a fork."""
    return (p.term != q.term or terms == 1) and not p.through & q.through


def _paths(terms: list[_Term]) -> list[_Path]:
    """The paths through the terms of a sum, or through one function, as far down as those of two of them can meet."""
    starts, out = list(_starts(terms)), []
    lowest_of: dict[int, int] = {}  # by term, or by path where there is one term
    groups = [start.term if len(terms) > 1 else i for i, start in enumerate(starts)]
    for group, start in zip(groups, starts, strict=True):
        lowest_of[group] = min(_first_below(start.root.node), lowest_of.get(group, sys.maxsize))
    if len(lowest_of) < 2:
        return []
    two = sorted(lowest_of, key=lowest_of.__getitem__)[:2]
    for group, start in zip(groups, starts, strict=True):
        lowest = lowest_of[two[group == two[0]]]  # of the others
        waiting = [start]
        while waiting and len(out) < _MOST_PATHS:
            path = waiting.pop()
            out.append(path)
            inner = path.root.node
            if isinstance(inner, Sum) and inner.id > lowest:
                for factor, view, through in _inside(_Term(path.factor, path.root, path.through)):
                    if not isinstance(view.node, Apply | Array | Constant):
                        waiting.append(path._replace(root=view, factor=factor, through=through))
    return out


def _starts(terms: list[_Term]) -> Iterator[_Path]:
    """The paths through terms to the values that they are functions of."""
    for i, (factor, view, through) in enumerate(terms):
        if isinstance(view.node, Apply):
            yield from _through_function(_Path(i, view, factor, None, through))
        elif not isinstance(view.node, Array | Constant):
            yield _Path(i, view, factor, None, through)


def _first_below(node: Node) -> int:
    """The first node that a value is, or is a sum of."""
    return min(view.node.id for view in node.args) if isinstance(node, Sum) else node.id


def _through_function(path: _Path) -> Iterator[_Path]:
    """The paths through an elementwise tree to its roots; a norm's groups have a rule of their own."""
    view = path.root
    assert isinstance(view.node, Apply)
    grouped = {member for group in cofactors(view.node).values() if len(group) > 1 for member in group}
    for root in roots(view.node):
        if (
            root in grouped
            or (isinstance(root.node, Leaf) and root.node.is_bits)
            or isinstance(root.node, Array)
        ):
            continue
        slope = derivative(view.node, root)
        if slope is not None:
            yield path._replace(root=root.within(view.bind), slope=slope.within(view.bind))


def _product_of_slopes(axes: tuple[Axis, ...], p: _Path, q: _Path) -> np.ndarray:
    """E[s_p s_q] + E[s_q s_p] by type."""
    graph, factor = p.root.node.graph, p.factor * q.factor
    constant = View(number(graph, 1.0), ())
    one, other = (path.slope or constant for path in (p, q))
    if isinstance(one.node, Constant) and isinstance(other.node, Constant):
        return np.full([axis.types for axis in axes], 2 * factor * one.node.params * other.node.params)
    both = View(apply(graph, "add", (), axes, [one, other]), tuple(range(len(axes))))
    return factor * (both.second(axes) - one.second(axes) - other.second(axes))
