"""Regions: equations run on joint draws of all that they read, since no rule covers them; loops over time, too.

Moments of a region's outputs are pooled from the draws, and cotangents flow back through them draw by draw.
"""

import dataclasses
import itertools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from varscale import _compat
from varscale.programs.pieces import is_key
from varscale.theory.domain.axes import Axes, Axis, by_level, over_classes
from varscale.theory.domain.tables import LOOSE, NEXT_ORDER, Positions, Table, gaussian
from varscale.theory.graph.expressions import content, hashed
from varscale.theory.graph.known_arrays import is_known_array
from varscale.theory.graph.layout import Value, axes_along, full, value
from varscale.theory.graph.nodes import UNKNOWN, Leaf, Node, View, cross_by_kind, pullback, second_moments
from varscale.theory.graph.store import BackwardNotes, Fact, FlowInside, Flows, PredictionError, source, told
from varscale.theory.integrals.hermite_series import POINTS, WEIGHTS, Z
from varscale.theory.propagation.fluctuations import fluctuations
from varscale.theory.propagation.fourth_moments import fresh
from varscale.theory.propagation.inherited_fluctuations import Spread, combine, propagated
from varscale.theory.propagation.sampler import (
    SCORES,
    Drawing,
    cross_moments_of_draws,
    evenly,
    in_order,
    picked,
    pooled,
    sampled_from,
    table_of_draws,
)
from varscale.theory.rules.region_draws import (
    CannotDraw,
    Operand,
    RegionDraws,
    operand,
    relative_error,
    sizes_to_run,
    with_enough_draws,
)
from varscale.theory.rules.region_sizes import work
from varscale.theory.rules.registry import Complex, Context, Opaque, rule

_BOUND = 0.1  # relative error to which mean squares should be known: 15 % with what readers add
_MEMORY = 2**28  # bytes of the states that a backward pass keeps
_MOST_IN_ORDER = 1 << 19  # numbers that a law is read off
_SMALLER_DOUBT = 0.1  # set on the validation grid: of a gradient at sizes smaller than the whole

DRAWS: Fact[Hashable, RegionDraws] = Fact()
# By region: the output that each operand is added to where it is made.
NUDGED: Fact[Hashable, dict[int, Any]] = Fact()


class RegionOutput(Node):
    """An output of a region; `params` is (its mark, which of its outputs, whether time is its first axis)."""

    how = "sampled"
    timed = True

    def prepare(self) -> None:
        self.odd = self.draws.odd[self.params[1]]

    @property
    def draws(self) -> RegionDraws:
        return DRAWS.of(self.graph)[_key(self.params[0], self.args)]

    @property
    def numbers(self) -> np.ndarray:
        """What was drawn, (replicates, positions along its axes)."""
        return self.draws.outputs[self.params[1]]

    @property
    def positions(self) -> list[np.ndarray]:
        """The positions along its axes that were drawn."""
        return list(map(evenly, (a.size for a in self.axes), self.numbers.shape[1:]))


@sampled_from.register
def sampled_from_region(node: RegionOutput, drawing: Drawing, positions: Positions) -> np.ndarray | None:
    return picked(node.numbers, node.axes, positions, drawing.replicates) if in_order(node) else None


@second_moments.register
def second_moments_of_region(node: RegionOutput) -> Table:
    table = table_of_draws(node.numbers, node.axes, node.positions)
    node.graph.flag("sampled", relative_error(node.numbers))
    # Draws may be none of what it is defined on (a factorization, say).
    if doubt := UNKNOWN if any(np.isnan(x).any() for x in node.draws.raw) else node.draws.drawing.doubt:
        node.graph.flag("assumed", doubt)
    node.drawn = np.empty((*table.mean.shape, POINTS))  # its values on the normal grid, class by class
    labels = [a.label_array[p] for a, p in zip(node.axes, node.positions, strict=True)]
    for cell in np.ndindex(table.mean.shape):
        places = np.ix_(*[np.flatnonzero(label == c) for label, c in zip(labels, cell, strict=True)])
        own = node.numbers[(slice(None), *places)]
        line = np.sort(own.ravel()[evenly(own.size, _MOST_IN_ORDER)])
        drawn = np.interp(special.ndtr(Z) * len(line) - 0.5, np.arange(len(line)), line)
        # The grid ends where the draws do: what their tails lack is made up for by the rest.
        square = max(np.mean(np.square(own, dtype=float)), 1e-300)
        node.drawn[cell] = drawn / math.sqrt(max(WEIGHTS @ drawn**2, 1e-300) / square)
    return table


@pullback.register
def pullback_of_region(node: RegionOutput, cotangent: np.ndarray, notes: BackwardNotes) -> Flows:
    draws = node.draws
    kept = 4 * work(draws.jaxpr.jaxpr, draws.sizes)[1]  # bytes a draw, roughly
    replicates = int(np.clip(_MEMORY / max(kept, 1), 2, draws.replicates))
    replicates -= replicates % min(draws.batch, replicates)  # each size of a batch is compiled
    arriving, doubt = _arriving(node, np.broadcast_to(cotangent, node.frame_types), replicates, notes)
    notes.regions.append(node)
    back = draws.back(node.params[1], arriving)
    pairs = zip(back, draws.operands, strict=True)
    errors = (relative_error(x) for x, o in pairs if x is not None and o.is_value)
    doubt = max(doubt, _SMALLER_DOUBT if draws.sizes.smaller else 0.0)
    notes.doubts[node.id] = max(errors, default=0.0) + doubt
    for i, inner in NUDGED.of(node.graph)[_key(node.params[0], node.args)].items():
        if (passed := back[i]) is not None and inner is not node:
            own = passed.reshape(len(passed), *inner.numbers.shape[1:])
            second = pooled(own, inner.axes, inner.positions).second
            notes.inside.append(FlowInside(inner, second, relative_error(passed)))
    out: Flows = []
    for x, passed in zip(draws.operands, back, strict=True):
        if passed is None or not x.random:
            out += [None] * len(x.value)
        else:  # jax's cotangent of x + iy is ∂/∂x − i ∂/∂y
            flows = zip(x.value, (np.real(passed), -np.imag(passed)), strict=False)
            out += [_carried_back(node, part, flow.astype(np.float32), notes) for part, flow in flows]
    return out


def _arriving(
    node: RegionOutput, cotangent: np.ndarray, replicates: int, notes: BackwardNotes
) -> tuple[np.ndarray, float]:
    """Draws of its cotangents: what regions sent back, in its order in time, and Gaussian ones; the doubt of an order lost."""
    positions, sent = node.positions, notes.sent.get(node.id, [])
    rest = cotangent - sum(second for _, second in sent)
    drawn = gaussian(rest, node.axes, positions, replicates, np.random.default_rng(content(node)))
    drawn = drawn + sum(picked(x, node.axes, positions, replicates) for x, _ in sent)
    readers = [x for x in notes.regions if x.deps & node.deps == node.deps and x.draws is not node.draws]
    return drawn, LOOSE if node.params[2] and len(readers) > len(sent) else 0.0


def _carried_back(node: RegionOutput, value: Value, passed: np.ndarray, notes: BackwardNotes) -> np.ndarray:
    """Second moments of a node's cotangents by type, from cotangents of the operand that it is."""
    copies = tuple(1 + d for d, dim in enumerate(value.dims) if not axes_along([dim]))
    numbers = passed.sum(axis=copies).transpose([0, *(1 + np.argsort(axes_along(value.dims)))])
    second = pooled(numbers, value.node.axes, list(map(node.draws.positions, value.node.axes))).second
    if isinstance(value.node, RegionOutput):
        notes.sent.setdefault(value.node.id, []).append((numbers, second))
    return second


@cross_by_kind.register
def cross_by_kind_of_region(node: RegionOutput, a: View, b: View, frame: Axes) -> np.ndarray | None:
    """Against another output, or what the region reads: both are drawn together, from the same numbers."""
    place, drawn = {outer: k for k, outer in enumerate(a.bind)}, b.node
    while drawn.moves:  # a slice of another output, or that in another order: a second direction's steps
        drawn = drawn.argument
    if not set(b.bind) <= set(a.bind) or not (isinstance(drawn, RegionOutput) or b.node.id <= node.id):
        return None
    own = b.within(place)
    theirs = node.draws.drawing.at(own, node.axes, node.positions)
    table = cross_moments_of_draws(node.numbers, theirs, node.axes, node.positions)
    return a.over(table, frame, pairs=True)


@propagated.register
def propagated_of_region(node: RegionOutput) -> Spread:
    """Of its mean square: what it inherits from its largest input, and what the draw of finitely many weights adds.

    Two samples of one draw share its weights, and what they read if that is given, so the covariance of their mean squares is
    due to them. At least it is what the draws vary by beyond what is inherited, where they are of the region's own sizes.
    """
    draws, which = node.draws, node.params[1]
    read = (v.node for x in draws.operands if x.random and not x.weight for v in x.value)
    inputs = [x for x in read if not is_known_array(x)]
    largest = max(inputs, key=lambda x: math.prod(a.size for a in x.axes), default=None)
    numbers, samples = np.square(node.numbers, dtype=float), 1 + node.params[2]
    each = numbers.mean(axis=tuple(k for k in range(1, numbers.ndim) if k != samples))
    each = each.reshape(len(numbers), -1)
    n, whole = each.shape[1], np.maximum(each.mean(axis=1), 1e-150)
    varied = shared = float(np.log(whole).var())
    if inputs:
        pairs = ((n * whole) ** 2 - (each**2).sum(axis=1)) / max(n * (n - 1), 1)
        shared = float(pairs.mean() / whole.mean() ** 2) - 1
    # Each unit that is left stands for several; what comes with the output's own units is left out.
    weights = [n for x in draws.operands if x.weight for n in x.aval.shape]
    shared /= max((draws.sizes.ratio([n]) for n in weights), default=1.0)
    inherited = combine([(draws.response[which], fluctuations(largest))] if largest is not None else [])
    if not draws.sizes.smaller:  # the draws themselves vary by no more than all of it
        # A gamma variable of relative variance r has a logarithm of variance r + r²/2 + ...
        shared = max(shared, math.sqrt(1 + 2 * max(varied - inherited.variance, 0.0)) - 1)
    own = math.sqrt(max(shared - fresh(node), 0.0))
    spread = dataclasses.replace(inherited, sources={**inherited.sources, ~node.id: own})
    if len(node.axes) > 1:  # places of one class differ in scale by more than sampling their units does
        logs = pooled(np.log(np.maximum(numbers.mean(axis=-1), 1e-150)), node.axes[:-1], node.positions[:-1])
        varied = float(over_classes(logs.diagonal - logs.mean**2, logs.axes))
        own = varied - math.log1p(inherited.point) - math.log1p(fresh(node, (len(node.axes) - 1,)))
        spread.places["drawn", node.id] = math.sqrt(max(own, 0.0))
    return spread


def drawn_region(interpreter: Context, eqn: Any, xs: Sequence[Any], reason: str) -> list[Any]:
    """The outputs of an equation that no rule covers, drawn: by itself, where no region around it can be.

    A rule says that it does not cover an equation by raising NotImplementedError with the reason.
    """
    interpreter.ask(f"{eqn.primitive.name}: {reason}")
    try:
        return drawn_alone(interpreter, eqn, xs)
    except PredictionError:
        raise
    except Exception as trouble:  # whatever is raised on numbers that an equation was not written for
        raise PredictionError(
            f"primitive {eqn.primitive.name!r} at {source(eqn)}: {reason}, and it cannot be drawn: "
            f"{trouble}; write it with jnp.where, or predict a smaller model"
        ) from None


def drawn_alone(interpreter: Context, eqn: Any, xs: Sequence[Any], *, time: int | None = None) -> list[Any]:
    """The outputs of one equation, drawn; of a loop those from `time` on have a row a step, none are random whole numbers."""
    given = {v: x for v, x in zip(eqn.invars, xs, strict=True) if not _compat.is_literal(v)}
    operands = [operand(x, v.aval) for v, x in given.items()]
    return _outputs(interpreter, _compat.one_equation(eqn, tuple(given)), operands, (), time is None, time)


@rule("region")
def region_rule(interpreter: Context, eqn: Any, *xs: Any) -> list[Any]:
    """The equations of a scope, drawn; where that cannot be, it is said to the walk."""
    jaxpr, scope = eqn.params["jaxpr"], eqn.params["scope"]
    still = [full(interpreter.graph, 0.0, aval.shape) for aval in jaxpr.in_avals[len(xs) :]]
    try:
        pairs = zip((*xs, *still), jaxpr.in_avals, strict=True)
        operands = [operand(x, aval, nudge=k >= len(xs)) for k, (x, aval) in enumerate(pairs)]
        nodes = [part.node for x in operands for part in x.value]
        weights = [x for x in nodes if isinstance(x, Leaf) and not (x.is_input or x.is_bits)]
        others = [x for x in nodes if not isinstance(x, Leaf) and not in_order(x)]
        if scope and any(w.deps & x.deps for w in weights for x in others):
            # Drawn apart, weights and what was made with them outside would be unrelated.
            raise CannotDraw("random weights that it reads were applied before it")
        out = _outputs(interpreter, jaxpr, operands, eqn.params["nudged"], not scope)
        names = jaxpr.jaxpr.outvars
        return [out[names.index(v)] for v in names]  # an array that two modules put out is one
    except Exception as error:  # whatever is raised on numbers that equations were not written for
        if not interpreter.ask_for(error):  # moments of what it reads could be worked out
            interpreter.regions.refuse(scope, str(error) if isinstance(error, CannotDraw) else told(error))
    return [placeholder(interpreter, aval) for aval in jaxpr.out_avals]


def _outputs(
    interpreter: Context, jaxpr: Any, operands: list[Operand], nudged: Any, ids: bool, time: int | None = None
) -> list[Any]:
    """The outputs of equations, drawn, as `drawn_alone` has them; `ids` says whether random whole numbers may be among them.

    Last of the operands come zeros that are added to outputs where they are made: `nudged` says to which.
    """
    graph = interpreter.graph
    sizes, replicates = sizes_to_run(jaxpr, operands)
    draws = RegionDraws(jaxpr, tuple(operands), sizes, replicates, replicates)
    read = [([(v.node, v.dims) for v in x.value], x.key, str(x.aval), x.nudge) for x in operands]
    mark = ("region", hashed(draws.program.written, (read, sizes.smaller, replicates), tuple(nudged)))
    places, nodes = itertools.count(), [part.node for x in operands for part in x.value]
    views = [View(node, tuple(itertools.islice(places, len(node.axes)))) for node in nodes]
    key = _key(mark, views)
    draws = DRAWS.once(graph, key, lambda: with_enough_draws(draws, _BOUND))

    def output(which: int, shape: Sequence[int], timed: bool) -> Value:
        """One real output, its places along each axis classed by their mean squares: of time's all, of others that differ."""
        squares, sizes = np.square(draws.outputs[which], dtype=float), (n for n in shape if n != 1)
        timed = timed and shape[0] > 1
        axes = [_by_place(squares, k, n, timed and k == 0) for k, n in enumerate(sizes)]
        return value(graph.make(RegionOutput, axes, views, (mark, which, timed)), shape)

    which, out = 0, list[Any]()
    for k, aval in enumerate(jaxpr.out_avals):
        timed, numbers = time is not None and k >= time, draws.outputs[which]
        real = jnp.issubdtype(aval.dtype, jnp.inexact)
        if is_key(aval) and not timed:
            out.append(placeholder(interpreter, aval))  # as random as any other
        elif not real and numbers[0].size == math.prod(aval.shape) and not np.any(numbers != numbers[:1]):
            out.append(interpreter.known(numbers[0].reshape(aval.shape).astype(aval.dtype)))
        elif aval.dtype.kind == "c":
            out.append(Complex(output(which, aval.shape, timed), output(which + 1, aval.shape, timed)))
        elif real or ids:
            out.append(output(which, aval.shape, timed))
        else:
            raise CannotDraw("random whole numbers come out of it")
        which += 1 + isinstance(out[-1], Complex)
    start = len(operands) - len(nudged)
    NUDGED.put(graph, key, {start + i: out[k].node for i, k in enumerate(nudged)})
    return out


def _by_place(squares: np.ndarray, k: int, size: int, time: bool) -> Axis:
    """Axis k of draws, (replicates, places..., units), by the levels q of their squares, where Var[ln q] is no chance."""
    levels = squares.mean(axis=tuple(1 + j for j in range(squares.ndim - 1) if j != k))
    logs = np.log(np.maximum(levels, 1e-150))
    chance = SCORES * (logs - logs.mean(axis=1, keepdims=True)).var(axis=0).mean() / (len(logs) - 1)
    beyond_chance = logs.mean(axis=0).var() > max(chance, NEXT_ORDER)
    differ = levels.shape[1] == size and k + 2 < squares.ndim and beyond_chance
    return by_level(levels.mean(axis=0)[:, None]) if time or differ else Axis(size)


def _key(mark: Hashable, views: Sequence[View]) -> Hashable:
    """One array at two scales is two operands: their content, and so the mark, is the same."""
    return mark, tuple(view.node.id for view in views)


def placeholder(interpreter: Context, aval: Any) -> Any:
    """What stands for an output in a walk that is not the last: moments of independent standard normals."""
    shape = aval.shape
    if is_key(aval):
        return Opaque(jax.random.split(jax.random.key(0), shape))
    if aval.dtype.kind in "iub":
        return full(interpreter.graph, 0.0, shape)
    own = interpreter.leaf(("outline", shape), shape, 0.0, 1.0, odd=False, random=False)
    return Complex(own, own) if aval.dtype.kind == "c" else own
