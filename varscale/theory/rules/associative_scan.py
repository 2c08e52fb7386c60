"""Recurrences along an axis (associative scans): drawn at every position of that axis and a few of each other, then pooled.

No formula covers all of them: elements that decay at random rates, rates that depend on the input, maxima, log-sums.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from varscale.theory.domain.axes import Axis
from varscale.theory.domain.random_arrays import gaussian
from varscale.theory.domain.tables import Table, lift
from varscale.theory.graph.derivatives import derivative
from varscale.theory.graph.expressions import roots
from varscale.theory.graph.layout import Value, align, broadcast_in_dim, materialize, merged
from varscale.theory.graph.nodes import Array, Leaf, Node, View, cross_by_kind, known_samples, pullback, second_moments
from varscale.theory.graph.store import BackwardNotes, Fact
from varscale.theory.propagation.inherited_fluctuations import NONE, Spread, handed_on, inherited
from varscale.theory.propagation.joint_sample import Ensemble, ensemble, steps
from varscale.theory.propagation.pullbacks import sum_out
from varscale.theory.propagation.sample_moments import by_level, cross_moments, pooled, table_of_draws
from varscale.theory.rules.prefix_scans import Combination, combination, run_back, run_parts
from varscale.theory.rules.registry import Complex, Context, parts, rule

# Set on the validation grid, not derived, both: of a gradient through a recurrence; of one whose rates follow its own input.
_RECURRENCE_DOUBT, _FOLLOWING_DOUBT = 0.1, 0.3


@dataclasses.dataclass(frozen=True, eq=False)
class Recurrence:
    """An associative scan over views.

    Attributes:
        views: real arrays over the frame, the parts of complex ones in succession.
        frame: its axes, those of the outputs but for the classes along `axis`.
        axis: which of them it runs along.
        how: how its elements are combined.
        ensemble: the draws that it is run on.
    """

    views: tuple[View, ...]
    frame: tuple[Axis, ...]
    axis: int
    how: Combination
    ensemble: Ensemble

    @functools.cached_property
    def positions(self) -> list[np.ndarray]:
        return [self.ensemble.positions(axis) for axis in self.frame]

    def draw(self, views: Sequence[View]) -> list[np.ndarray]:
        """Views over the frame, drawn together, (positions..., replicates)."""
        return [self.ensemble.values(view, self.frame).astype(np.float32) for view in views]

    @functools.cached_property
    def outputs(self) -> list[np.ndarray]:
        """Its outputs on draws of its elements, (positions..., replicates)."""
        # A maximum or a log-sum of nothing is infinite; what comes after never reads it.
        drawn = run_parts(self.how, self.draw(self.views))
        return [np.nan_to_num(np.asarray(x), nan=0.0, posinf=0.0, neginf=0.0) for x in drawn]

    def back(self, which: int, cotangent: np.ndarray, axes: Sequence[Axis], kept: Sequence[int]) -> list[np.ndarray]:
        """Cotangents of its roots, (positions..., replicates), for Gaussian ones of an output with these moments by type.

        The rates that a cotangent flowed back at are its own root's: what arrives at a root is multiplied draw by draw.

        Args:
            which: the part of the output.
            cotangent: its cotangent's second moments, by type.
            axes: the output's axes.
            kept: where they are in the frame; along the other axes of the frame only the first position is given any.
        """
        replicates = self.ensemble.replicates
        positions = [self.positions[k] for k in kept]
        drawn = np.moveaxis(gaussian(cotangent, axes, positions, replicates, np.random.default_rng(1)), 0, -1)
        seed = np.zeros([*map(len, self.positions), replicates], np.float32)
        seed[tuple(slice(None) if k in kept else 0 for k in range(len(self.frame)))] = drawn
        drawn = self.draw([*self.views, *(slope for _, _, slope in self._slopes)])
        elements, slopes = drawn[: len(self.views)], drawn[len(self.views) :]
        passed = [np.asarray(x, float) for x in run_back(self.how, which, elements, seed)]
        out = [np.zeros(seed.shape) for _ in self.roots]
        for (i, j, _), slope in zip(self._slopes, slopes, strict=True):
            out[j] += passed[i] * slope
        return out

    @functools.cached_property
    def roots(self) -> tuple[View, ...]:
        """The random arrays that its elements are functions of, over the frame."""
        found = (root.within(view.bind) for view in self.views for root in roots(view.node))
        return tuple(dict.fromkeys(view for view in found if _flows(view.node)))

    @functools.cached_property
    def _slopes(self) -> list[tuple[int, int, View]]:
        """Which element depends on which root, and the derivative, over the frame."""
        out = []
        for i, view in enumerate(self.views):
            for root in roots(view.node):
                slope = derivative(view.node, root) if _flows(root.node) else None
                if slope is not None:
                    out.append((i, self.roots.index(root.within(view.bind)), slope.within(view.bind)))
        return out

    def odd(self, which: int) -> int:
        """Bits of the leaves that an output changes sign with."""
        nodes = [v.node for v in self.views]
        found, whole = 0, functools.reduce(lambda bits, node: bits | node.odd, nodes, 0)
        groups: dict[tuple[bool, ...], int] = {}
        while whole:
            bit = whole & -whole
            whole ^= bit
            turned = tuple(bool(node.odd & bit) for node in nodes)
            if not any(node.deps & bit and not turn for node, turn in zip(nodes, turned, strict=True)):
                groups[turned] = groups.get(turned, 0) | bit
        flat = self.draw(self.views)
        for turned, bits in groups.items():
            other = run_parts(self.how, [-x if turn else x for x, turn in zip(flat, turned, strict=True)])[which]
            if np.allclose(other, -self.outputs[which], rtol=1e-4, atol=1e-6):
                found |= bits
        return found


def _flows(node: Node) -> bool:
    """Whether gradients flow into a root."""
    return not isinstance(node, Array) and not (isinstance(node, Leaf) and node.is_bits)


_RECURRENCES: Fact[Hashable, Recurrence] = Fact()


class Running(Node):
    """An output of an associative scan; `params` is (key of the recurrence, which part, which axes of its frame it has)."""

    how = "sampled"
    timed = True
    joint = True

    @property
    def recurrence(self) -> Recurrence:
        """What it is an output of."""
        return _RECURRENCES.of(self.graph)[self.params[0]]

    def prepare(self) -> None:
        self.odd = self.recurrence.odd(self.params[1])
        deps = [view.node.deps for view in self.args]
        shared = any(a & b for a, b in itertools.combinations(deps, 2))
        # Where rates follow the input, what flows back is a product of several things that grow together.
        self.gradient_doubt = _FOLLOWING_DOUBT if shared else _RECURRENCE_DOUBT

    @functools.cached_property
    def fluctuation(self) -> float:
        """Relative variance of the mean square over draws of the parameters that it reads: finitely many rates of decay.

        Two samples of one draw share its parameters and nothing else, so the covariance of their mean squares is due to them.
        """
        frame = range(len(self.recurrence.frame))
        drawn = {k for view in self.args if isinstance(view.node, Leaf) and not view.node.is_input for k in view.bind}
        samples = next((k for k in frame if k not in drawn and k != self.recurrence.axis), None)
        drawn -= {self.recurrence.axis}
        if not drawn or samples is None:
            return 0.0
        squares = self.recurrence.outputs[self.params[1]] ** 2
        each = squares.mean(axis=tuple(k for k in frame if k not in drawn and k != samples), keepdims=True)
        one, other = np.take(each, 0, axis=samples), np.take(each, 1, axis=samples)
        shared = float(np.mean(one * other) / max(np.mean(one) * np.mean(other), 1e-300)) - 1
        return max(shared, 0.0) / math.prod(self.recurrence.frame[k].size for k in drawn)

    def _own(self, numbers: np.ndarray) -> np.ndarray:
        """Of numbers over the recurrence's frame, those over this output's axes: along the others it is constant."""
        kept = self.params[2]
        return numbers[tuple(slice(None) if k in kept else 0 for k in range(numbers.ndim - 1))]

    @property
    def _positions(self) -> list[np.ndarray]:
        return [self.recurrence.positions[k] for k in self.params[2]]


@known_samples.register(Running)
def known_samples_of_running(node: Running) -> np.ndarray | None:
    numbers = np.moveaxis(node._own(node.recurrence.outputs[node.params[1]]), -1, 0)
    whole = all(a.classes == 1 or a.size == n for a, n in zip(node.axes, numbers.shape[1:], strict=True))
    return numbers if whole else None


@second_moments.register(Running)
def second_moments_of_running(node: Running) -> Table:
    numbers = node._own(node.recurrence.outputs[node.params[1]])
    table = table_of_draws(node, np.moveaxis(numbers, -1, 0), node._positions)
    return Table(table.axes, np.zeros_like(table.mean), table.second) if node.odd else table


def _second(node: Running, numbers: np.ndarray) -> np.ndarray:
    """Second moments by type of numbers drawn like its own."""
    return pooled(np.moveaxis(node._own(numbers), -1, 0), node.axes, node._positions).second


@pullback.register(Running)
def pullback_of_running(node: Running, cotangent: np.ndarray, notes: BackwardNotes) -> list[np.ndarray | None]:

    _, which, kept = node.params
    frame = list(node.recurrence.frame)
    passed = node.recurrence.back(which, np.broadcast_to(cotangent, node.frame_types), node.axes, kept)
    out: list[np.ndarray | None] = []
    for numbers, view in zip(passed, node.args, strict=True):
        second = _second(node, numbers)
        for place, k in enumerate(kept):
            frame[k] = node.axes[place]
        for k in set(range(len(frame))) - set(kept):  # all that flows back along it was put in at one position
            types = frame[k].agrees / frame[k].size
            second = np.moveaxis(np.multiply.outer(types, second), 0, k)
        out.append(sum_out(second, frame, view))
    return out


@cross_by_kind.register(Running)
def cross_by_kind_of_running(node: Running, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """Against another output of the same recurrence, or anything over its axes: both are drawn together."""
    place = dict(zip(a.bind, node.params[2], strict=True))
    if any(outer not in place for outer in b.bind):
        return None
    draws, own = node.recurrence.ensemble, tuple(place[outer] for outer in b.bind)
    frame_ = list(node.recurrence.frame)
    theirs = draws.values(View(b.node, own), frame_)
    numbers = [np.moveaxis(node._own(z), -1, 0) for z in (node.recurrence.outputs[node.params[1]], theirs)]
    return lift(cross_moments(numbers[0], numbers[1], node.axes, node._positions), node.axes, a.bind, frame, pairs=True)


@handed_on.register(Running)
def handed_on_of_running(node: Running) -> Spread:
    linear_in = next((view.node for view in node.args if view.node.odd & node.odd), None)
    spread = NONE if linear_in is None else inherited(linear_in)
    return dataclasses.replace(spread, sources={**spread.sources, ~node.id: math.sqrt(node.fluctuation)})


@rule("associative_scan")
def associative_scan(interpreter: Context, eqn: Any, *xs: Value | Complex) -> list[Value | Complex]:
    d, places, graph = eqn.params["axis"], eqn.params["places"], interpreter.graph
    rank = max(map(len, places))
    flat = []
    for x, place in zip(xs, places, strict=True):
        for part in parts(x):
            sizes = [part.shape[place.index(k)] if k in place else 1 for k in range(rank)]
            flat.append(merged(materialize(broadcast_in_dim(part, sizes, place), [d]), d))
    _, frame, views, layout = align(flat)
    axis = layout[d][0].axis
    assert axis is not None  # materialized
    mark = ("recurrence", tuple((v.node.id, v.bind) for v in views), id(eqn))
    steps(graph).add(frame[axis].size)
    how = combination(eqn.params["combine"], len(frame) + 1, axis, tuple(isinstance(x, Complex) for x in xs))
    recurrence = _RECURRENCES.once(
        graph, mark, lambda: Recurrence(tuple(views), tuple(frame), axis, how, ensemble(graph, frame))
    )
    axes = _classed_frame(recurrence)
    values: list[Value | Complex] = []
    which = 0
    for x, place in zip(xs, places, strict=True):
        made = []
        for _ in parts(x):
            dims = [layout[k] for k in place]
            kept = tuple(a.axis for dim in dims for a in dim if a.axis is not None)
            node = graph.make(Running, [axes[k] for k in sorted(kept)], recurrence.roots, (mark, which, tuple(sorted(kept))))
            order = {k: i for i, k in enumerate(sorted(kept))}
            made.append(
                Value(node, tuple(tuple(a if a.axis is None else a._replace(axis=order[a.axis]) for a in dim) for dim in dims))
            )
            which += 1
        values.append(Complex(*made) if len(made) == 2 else made[0])
    return values


def _classed_frame(recurrence: Recurrence) -> tuple[Axis, ...]:
    """The frame, the positions along the recurrence classed by their second moments."""
    k = recurrence.axis
    others = tuple(i for i in range(len(recurrence.frame) + 1) if i != k)
    squares = np.stack([np.mean(x**2, axis=others) for x in recurrence.outputs], axis=1)
    own = by_level(squares)
    return tuple(own if i == k else a for i, a in enumerate(recurrence.frame))
