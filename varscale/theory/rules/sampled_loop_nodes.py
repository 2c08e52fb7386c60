"""What a loop over time puts out: its moments, pooled from draws, and what flows back through it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import special

from varscale import _compat
from varscale.theory.domain.accuracy import LOOSE
from varscale.theory.domain.axes import Axis
from varscale.theory.domain.random_arrays import gaussian
from varscale.theory.domain.tables import Table, lift
from varscale.theory.graph.content import content, hashed
from varscale.theory.graph.layout import Atom, Value, materialize, merged
from varscale.theory.graph.nodes import (
    UNKNOWN,
    Leaf,
    Node,
    View,
    cross_by_kind,
    known_samples,
    pullback,
    second_moments,
)
from varscale.theory.graph.store import BackwardNotes, Fact, FlowInside
from varscale.theory.integrals.hermite_series import POINTS, WEIGHTS, Z
from varscale.theory.propagation.fluctuations import fluctuations
from varscale.theory.propagation.inherited_fluctuations import Spread, combine, propagated
from varscale.theory.propagation.sample_moments import by_level, cross_moments, pooled, steps, table_of_draws
from varscale.theory.propagation.sampler import evenly, in_order, picked
from varscale.theory.rules.registry import Complex, Context, Opaque, parts
from varscale.theory.rules.sampled_loop import (
    CannotDraw,
    Loop,
    Operand,
    at_own_size,
    enough,
    operand,
    relative_error,
    shrunk,
)

_MEMORY = 2**28  # bytes of the states that a backward pass keeps
# Set on the validation grid, not derived, both: of a gradient at sizes smaller than the whole; of one whose
# order in time is lost on its way from one loop to another.
_LOOP_DOUBT = 0.1


_LOOPS: Fact[Hashable, Loop] = Fact()
_NUDGED: Fact[Hashable, dict[int, Any]] = (
    Fact()
)  # by loop: the output that each operand is added to where it is made


class Looped(Node):
    """An output of a loop; `params` is (key of the loop, which part, the places in the output of this node's axes)."""

    how = "sampled"
    timed = True
    gradient_doubt = _LOOP_DOUBT

    @property
    def loop(self) -> Loop:
        return _LOOPS.of(self.graph)[self.params[0]]

    @functools.cached_property
    def _layout(self) -> tuple[list[np.ndarray], np.ndarray]:
        """The positions drawn along its axes, and the numbers drawn there, (replicates, positions...)."""
        numbers = self.loop.outputs[self.params[1]]
        return _positions(self.axes, self._own(numbers).shape[1:]), self._own(numbers)

    def _own(self, numbers: np.ndarray) -> np.ndarray:
        """Numbers of the output over this node's axes: along its other dimensions it is constant."""
        dims = self.params[2]
        index = [slice(None) if d in dims else 0 for d in range(numbers.ndim - 1)]
        return numbers[(slice(None), *index)]

    @functools.cached_property
    def fluctuation(self) -> Spread:
        """Of its mean square: what it hands on of its inputs', and what finitely many units and the weights' draw give it.

        Two samples of one draw share its weights and nothing else, so the covariance of their mean squares is due to them.
        """
        loop, which = self.loop, self.params[1]
        inputs = [v.node for x in loop.operands if x.random and not x.weight for v in x.value]
        loudest = max(inputs, key=lambda node: math.prod(a.size for a in node.axes), default=None)
        numbers = self._layout[1].astype(float) ** 2
        steps = 1 if self._is_stacked else 0
        each = numbers.mean(axis=tuple(k for k in range(1, numbers.ndim) if k != 1 + steps))
        shared = 0.0
        if each.ndim == 2 and each.shape[1] > 1:
            n = each.shape[1]
            pairs = (each.sum(axis=1) ** 2 - (each**2).sum(axis=1)) / (n * (n - 1))
            shared = float(pairs.mean() / max(each.mean() ** 2, 1e-300)) - 1
        own = {~self.id: math.sqrt(max(shared, 0.0) / loop.width_ratio)}
        inherited = combine([(loop.response[which], fluctuations(loudest))] if loudest is not None else [])
        return dataclasses.replace(inherited, sources={**inherited.sources, **own})

    @property
    def _is_stacked(self) -> bool:
        return 0 in self.params[2] and self.params[3]


@known_samples.register(Looped)
def known_samples_of_looped(node: Looped) -> np.ndarray:
    return node._layout[1]


@second_moments.register(Looped)
def second_moments_of_looped(node: Looped) -> Table:
    positions, numbers = node._layout
    table = table_of_draws(node, numbers, positions)
    if node.loop.is_region and node.loop.undefined:
        node.graph.flag("assumed", UNKNOWN)  # draws are none of what it is defined on (a factorization, say)
    if node.loop.drawing.doubt:
        node.graph.flag("assumed", node.loop.drawing.doubt)
    node.drawn = _drawn_quantiles(node)
    return table


def _drawn_quantiles(node: Looped) -> np.ndarray:
    """Its values on the normal grid, class by class."""
    positions, numbers = node._layout
    out = np.empty((*[a.classes for a in node.axes], POINTS))
    labels = [a.label_array[p] for a, p in zip(node.axes, positions, strict=True)]
    for cell in np.ndindex(*out.shape[:-1]):
        own = numbers
        for k, (label, c) in enumerate(zip(labels, cell, strict=True)):
            own = np.compress(label == c, own, axis=1 + k)
        line = np.sort(own, axis=None)
        drawn = np.interp(special.ndtr(Z) * len(line) - 0.5, np.arange(len(line)), line)
        # The grid ends where the draws do: what their tails lack is made up for by the rest.
        scale = math.sqrt(
            max(WEIGHTS @ drawn**2, 1e-300) / max(float(np.mean(line.astype(float) ** 2)), 1e-300)
        )
        out[cell] = drawn / scale
    return out


@pullback.register(Looped)
def pullback_of_looped(node: Looped, cotangent: np.ndarray, notes: BackwardNotes) -> list[np.ndarray | None]:
    loop, which, dims = node.loop, node.params[1], node.params[2]
    whole = loop.outputs[which].shape[1:]
    replicates = int(np.clip(_MEMORY / max(loop.memory, 1), 2, loop.replicates))
    seed = np.zeros((replicates, *whole), np.float32)
    index = (slice(None), *(slice(None) if d in dims else 0 for d in range(len(whole))))
    seed[index] = _arriving(node, np.broadcast_to(cotangent, node.frame_types), replicates, notes)
    notes.loops.append(node)
    out: list[np.ndarray | None] = []
    back = loop.back(which, seed)
    if loop.is_region:
        notes.doubts[node.id] = max(
            (_chance(back[i]) for i, x in enumerate(loop.operands) if _is_value(x)), default=0.0
        )
    nudged = _NUDGED.get(node.graph, node.params[0]) or {}
    for i, inner in nudged.items():
        passed = back[i]
        if passed is not None and inner is not node:
            notes.inside.append(FlowInside(inner, _second_inside(inner, passed), _chance(passed)))
    for x, passed in zip(loop.operands, back, strict=True):
        for part, value in enumerate(x.value):
            if passed is None or not x.random:
                out.append(None)
                continue
            # jax's cotangent of x + iy is ∂/∂x − i ∂/∂y
            real = (np.real(passed) if part == 0 else -np.imag(passed)).astype(np.float32)
            out.append(_carried_back(node, x, value, real, notes))
    return out


def _second_inside(inner: Looped, passed: np.ndarray) -> np.ndarray:
    """Second moments by type of the cotangents that flow into an output inside its region."""
    constant = tuple(d for d in range(1, passed.ndim) if d not in inner.params[2])  # 0 is the one step
    own = passed.sum(axis=constant)
    return pooled(own, inner.axes, _positions(inner.axes, own.shape[1:])).second


def _is_value(x: Operand) -> bool:
    """Whether it is something that other rows are made of, and no parameter."""
    return any(not isinstance(v.node, Leaf) or v.node.is_input for v in x.value) and x.random


def _chance(passed: np.ndarray | None) -> float:
    """How far the mean square of cotangents may be off by chance."""
    if passed is None:
        return 0.0
    return relative_error(np.mean(np.square(np.abs(passed), dtype=float).reshape(len(passed), -1), axis=1))


def _arriving(node: Looped, cotangent: np.ndarray, replicates: int, notes: BackwardNotes) -> np.ndarray:
    """Draws of its cotangents: those that loops which read it have sent back, in their order in time, and Gaussian ones."""
    positions, _ = node._layout
    sent = notes.sent.get(node.id, [])
    drawn, rest = np.zeros((replicates, *map(len, positions))), cotangent
    for numbers in sent:
        drawn = drawn + picked(numbers, node.axes, positions, replicates)
        rest = rest - pooled(numbers, node.axes, _positions(node.axes, numbers.shape[1:])).second
    readers = [x for x in notes.loops if x.deps & node.deps == node.deps and x.loop is not node.loop]
    if not node.loop.is_region:
        notes.doubts[node.id] = LOOSE if len(readers) > len(sent) else Looped.gradient_doubt
    return drawn + gaussian(rest, node.axes, positions, replicates, np.random.default_rng(content(node)))


def _carried_back(
    node: Looped, x: Operand, value: Value, passed: np.ndarray, notes: BackwardNotes
) -> np.ndarray:
    """Second moments of a node's cotangents by type, from cotangents of the operand that it is."""
    copies = tuple(1 + d for d, dim in enumerate(value.dims) if all(a.axis is None for a in dim))
    numbers = passed.sum(axis=copies)
    axes = [a.axis for dim in value.dims for a in dim if a.axis is not None]
    numbers = numbers.transpose([0, *(1 + axes.index(k) for k in range(len(axes)))])
    if isinstance(value.node, Looped):
        notes.sent.setdefault(value.node.id, []).append(numbers)
    return pooled(numbers, value.node.axes, node.loop.positions(value, stacked=x.stacked)).second


@cross_by_kind.register(Looped)
def cross_by_kind_of_looped(node: Looped, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """Against another output of the same loop, or what is read by it: both are drawn together."""
    place = dict(zip(a.bind, range(len(node.axes)), strict=True))
    other = b.node
    if any(outer not in place for outer in b.bind):
        return None
    positions, mine = node._layout
    own = tuple(place[outer] for outer in b.bind)
    if isinstance(other, Looped) and (
        other.params[0] == node.params[0] or _drawn_alike(node.loop, other.loop)
    ):
        theirs = other._layout[1]
        if other.axes != tuple(node.axes[k] for k in own):
            return None
    elif other.id > node.id:
        return None
    else:
        drawn = node.loop.drawing.values(View(other, own), node.axes, positions)
        theirs = np.broadcast_to(np.moveaxis(drawn, -1, 0), mine.shape)
    if theirs.shape != mine.shape:
        order = [0, *(1 + k for k in own)]
        theirs = np.broadcast_to(_spread_out(theirs, order, mine.ndim), mine.shape)
    return lift(cross_moments(mine, theirs, node.axes, positions), node.axes, a.bind, frame, pairs=True)


@propagated.register(Looped)
def propagated_of_looped(node: Looped) -> Spread:
    return node.fluctuation


def _spread_out(numbers: np.ndarray, order: Sequence[int], rank: int) -> np.ndarray:
    """Axes at their places among `rank`, with 1 elsewhere."""
    moved = numbers.transpose(np.argsort(order))
    shape = [1] * rank
    for k, n in zip(sorted(order), moved.shape, strict=True):
        shape[k] = n
    return moved.reshape(shape)


def _positions(axes: Sequence[Axis], lengths: Sequence[int]) -> list[np.ndarray]:
    return [evenly(a.size, n) for a, n in zip(axes, lengths, strict=True)]


def _drawn_alike(a: Loop, b: Loop) -> bool:
    """Whether two loops are regions on as many draws: what both read is the same numbers."""
    return a.is_region and b.is_region and a.replicates == b.replicates


def over_time(
    interpreter: Context,
    eqn: Any,
    xs: Sequence[Any],
    outline: Sequence[Any],
    bound: float = math.inf,
    added: Sequence[int] = (),
    *,
    whole_numbers: bool = False,
) -> list[Any]:
    """The outputs of a scan, drawn.

    Args:
        interpreter: the interpreter.
        eqn: the scan.
        xs: its operands' values.
        outline: what the last of some steps puts out, as values: their axes.
        bound: the relative error to which its outputs' mean squares should be known.
        added: for each operand which output it is added to, where it is zeros that are; else -1.
        whole_numbers: whether random whole numbers may come out of it, of which the moments are known and no more.

    Raises:
        CannotDraw: it cannot be run.
    """
    graph, p = interpreter.graph, eqn.params
    fixed, carry, streams = _compat.scan_operands(p, list(zip(xs, eqn.invars, strict=True)))
    nudges = [k >= 0 for k in added] or [False] * len(xs)
    operands = [
        operand(x, v.aval, stacked=False, nudge=n)
        for (x, v), n in zip((*fixed, *carry), nudges, strict=False)
    ]
    operands += [operand(x, v.aval, stacked=True) for x, v in streams]
    is_region = bound < math.inf
    if is_region and not whole_numbers and _applied_before(operands):
        raise CannotDraw("random weights that it reads were applied before it")
    sizes, replicates = at_own_size(p, operands) or shrunk(p, operands)
    loop = Loop(p, tuple(operands), sizes, replicates, replicates, is_region)
    operands_and_sizes = [x.identity for x in operands], sizes.smaller, replicates
    mark = ("loop", hashed(loop.program.written, operands_and_sizes, bound, added))
    loop = _LOOPS.once(graph, mark, lambda: enough(loop, bound))
    steps(graph).add(p["length"])
    views, place = [], 0
    for x in operands:
        for part in x.value:
            rank = len(part.node.axes)
            views.append(View(part.node, tuple(range(place, place + rank))))
            place += rank
    which = 0
    out: list[Any] = []
    for k, (shape, var) in enumerate(zip(outline, eqn.outvars, strict=True)):
        stacked = k >= len(carry)
        if isinstance(shape, Opaque):
            if stacked:
                raise CannotDraw("a random key comes out of it")
            out.append(shape)  # as random as any other
            which += 1
            continue
        if not jnp.issubdtype(var.aval.dtype, jnp.inexact):
            agreed = _agreed(loop.outputs[which], var.aval)
            if agreed is None and not whole_numbers:
                raise CannotDraw("random whole numbers come out of it")
            if agreed is not None:
                out.append(interpreter.known(agreed))
                which += 1
                continue
        made = []
        for part in parts(shape):
            made.append(
                _output(graph, loop, mark, views, which, part, length=p["length"] if stacked else None)
            )
            which += 1
        out.append(Complex(*made) if len(made) == 2 else made[0])
    _NUDGED.put(graph, mark, {i: out[k].node for i, k in enumerate(added) if k >= 0})
    return out


def _applied_before(operands: Sequence[Operand]) -> bool:
    """Whether a region reads weights, and what was made with them outside it: drawn apart, they would be unrelated."""
    parts = [part.node for x in operands for part in x.value]
    weights = [node for node in parts if isinstance(node, Leaf) and not (node.is_input or node.is_bits)]
    others = [node for node in parts if not isinstance(node, Leaf) and not in_order(node)]
    return any(w.deps & other.deps for w in weights for other in others)


def _agreed(numbers: np.ndarray, aval: Any) -> np.ndarray | None:
    """Whole numbers that are the same in all draws; None where they are not, or stand for more than were drawn."""
    if numbers.shape[1:] != aval.shape or np.any(numbers != numbers[:1]):
        return None
    return numbers[0].astype(aval.dtype)


def _output(
    graph: Any, loop: Loop, mark: Any, views: Sequence[View], which: int, shape: Value, *, length: int | None
) -> Value:
    """One output: the axes of the last step's, and before them that of time where it has a row a step."""
    for d in range(len(shape.dims)):
        shape = merged(materialize(shape, [d]), d)
    lead = [] if length is None else [length]
    numbers = loop.outputs[which]
    kinds: list[Axis | None] = [None if length == 1 else by_level(_squares_in_time(numbers)) for _ in lead]
    for dim in shape.dims:
        own = next((shape.node.axes[a.axis] for a in dim if a.axis is not None), None)
        kinds.append(own if own is None or loop.sizes.shape([own.size]) == (own.size,) else Axis(own.size))
    dims = tuple(d for d, axis in enumerate(kinds) if axis is not None)
    node = graph.make(
        Looped, [axis for axis in kinds if axis is not None], views, (mark, which, dims, length is not None)
    )
    place = {d: i for i, d in enumerate(dims)}
    atoms = [(Atom(axis.size, place[d]),) if axis is not None else () for d, axis in enumerate(kinds)]
    return Value(node, tuple(atoms))


def _squares_in_time(numbers: np.ndarray) -> np.ndarray:
    """Mean squares step by step, (steps, 1)."""
    return np.mean(numbers.astype(float) ** 2, axis=(0, *range(2, numbers.ndim)))[:, None]
