"""Contractions: every matrix product, batched or not, of weights or of activations.

A triangular mask on a weight (an autoregressive net's) hides much of the first inputs and little of the last: positions of
outputs are classed by the mean square of what they read.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from varscale.theory.domain.axes import Axes, Axis, affordable, contract_axes, equal, grouped, join, outer
from varscale.theory.domain.tables import LOOSE, NEGLIGIBLE, ROUGH, Table, full_types, means_by_type
from varscale.theory.graph.convolutions import Conv
from varscale.theory.graph.expressions import Apply, Sum, roots, swapped
from varscale.theory.graph.layout import Value, align, axes_along, full, renumbered
from varscale.theory.graph.linear_nodes import Contract, Gather, Take, unmoved, weight_of
from varscale.theory.graph.nodes import Array, Leaf, Node, View, cross_by_kind, pullback, second_moments
from varscale.theory.graph.normal_form import affine
from varscale.theory.graph.store import BackwardNotes, Flows, once_per_node
from varscale.theory.propagation.cross_moments import cross, dependent, mean_of_product, mean_product
from varscale.theory.propagation.pullbacks import sum_out
from varscale.theory.propagation.token_gram import gained_by_sum
from varscale.theory.rules.attention import SHARED_DOUBT, alike_keys, note_values, tilted
from varscale.theory.rules.elementwise import mean
from varscale.theory.rules.random import as_weight, law
from varscale.theory.rules.registry import Context, rule
from varscale.theory.rules.softmax import Softmax

_WRITTEN_OUT = 8  # products with one weight that an array is made of: T steps have T² cross-moments


def _summed(node: Contract, means: np.ndarray) -> np.ndarray:
    """A class array of the frame, summed over the contracted axes."""
    return contract_axes(means, {k: node.frame[k].counts for k in node.summed})


@second_moments.register
def second_moments_of_contract(node: Contract) -> Table:
    x, y = node.args
    frame = node.frame
    mean = _summed(node, np.broadcast_to(x.mean(frame) * y.mean(frame), [a.classes for a in frame]))
    second = node.contract(x.second(frame) * y.second(frame))
    if (tied := _tied(node)) is not None:
        mean, second = mean + tied[0], second + tied[1]
    elif (weight := weight_of(node)) is not None:
        if any(x.deps & weight.deps for x in node.sources if x is not weight):
            node.graph.flag("quadrature", 1 / node.width)  # as good as fresh, to this order
    elif not any(isinstance(x, Softmax) for x in node.sources):
        if dependent(x.node, y.node):
            mean, second = _dependent(node, mean, second)
        second = second + gained_by_sum(node, second)
    table = Table(node.axes, np.array(mean), second + (tilt := tilted(node)))
    if np.any(tilt):
        gained = Table(node.axes, table.mean, np.broadcast_to(tilt, node.frame_types)).mean_square
        node.graph.flag("quadrature", SHARED_DOUBT + ROUGH * gained / table.divisor)
    for weights, values in (node.args, node.args[::-1]):
        if isinstance(weights.node, Softmax) and alike_keys(weights, values):
            if not node.graph.undrawn:
                raise NotImplementedError("keys that are alike")
            node.graph.flag("assumed", LOOSE)
    return table


def _dependent(node: Contract, mean: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wick's pairings for jointly Gaussian x and y: E[x y]² and the exchange term besides the independent one."""
    x, y = node.args
    frame = node.frame
    both = full_types(cross(x, y, frame) - mean_product(x, y, frame), frame)
    after = mean + _summed(node, both[equal(frame)])
    outer, inner = (means_by_type(own, node.axes) for own in (after, mean))
    paired = outer - inner + node.contract(both * swapped(both, frame))
    share = float(np.max(np.abs(paired)) / max(np.max(np.abs(second)), 1e-300))
    if share > 1e-3:  # exact for Gaussian factors; a product of two that share a root is not quite
        node.graph.flag("assumed", min(ROUGH * share, LOOSE))
    return after, second + paired


def _tied(node: Contract) -> tuple[np.ndarray, np.ndarray] | None:
    """What is added to means and second moments where rows of a table are read by rows looked up in it; else None.

    One output in V is a row with itself: E[y_v²] gains (Σ_d E[x_d w_{v,d}])² where x was row v, with probability 1/V.
    """
    for x, table in (node.args, node.args[::-1]):
        uses = _uses(x.node, table.node) if isinstance(table.node, Leaf) and table.node.odd else ()
        for rows in (view for view in uses if isinstance(view.node, Gather)):
            shift = mean_of_product(x.node.whole, rows, x.node.axes) * node.width
            own = math.prod(axis.size for k, axis in enumerate(node.axes) if k in table.bind)
            same = outer(a.agrees for a in node.axes).reshape(node.frame_types)
            return np.array(shift / own), shift**2 / own * same
    return None


@pullback.register
def pullback_of_contract(node: Contract, cotangent: np.ndarray, notes: BackwardNotes) -> Flows:
    """Under gradient independence a cotangent passes through the transposed product with fresh weights."""
    # What queries gain by overlaps of tokens comes with the cotangent that a softmax has sent back.
    place, gain = notes.gains.get(node.id, (None, 0.0))
    note_values(node, notes)
    out: Flows = []
    for i, (mine, theirs) in enumerate((node.args, node.args[::-1])):
        own = cotangent + gain if i == place else cotangent
        own = own.reshape(*own.shape, *[1] * len(node.params)) * theirs.second(node.frame)
        out.append(None if isinstance(mine.node, Array) else sum_out(own, node.frame, mine))
    return out


@cross_by_kind.register(Contract | Conv)
def cross_by_kind_of_products(node: Node, a: View, b: View, frame: Axes) -> np.ndarray | None:
    """The same weights on two inputs: as one product, with the inputs' cross-moment in place of their second moment."""
    weights = weight_of(node), weight_of(b.node)
    if None not in weights and weights[0] is not weights[1]:
        return np.zeros((1,) * len(frame))  # each is linear in a weight that is as good as fresh
    if isinstance(node, Conv):
        x, y = (v.node.argument if isinstance(v.node, Conv) else v.node for v in (a, b))
        if (b.node.params, b.node.args[1:], b.bind, y.axes) != (node.params, node.args[1:], a.bind, x.axes):
            return None
        second = node.carry(np.broadcast_to(cross(x.whole, y.whole, x.axes), x.frame_types))
        return a.over(second, frame, pairs=True)
    if not isinstance(b.node, Contract) or [p.size for p in node.params] != [p.size for p in b.node.params]:
        return None
    wide, extra = (*frame, *node.params), tuple(range(len(frame), len(frame) + len(node.params)))
    mine, theirs = ([v.within((*view.bind, *extra)) for v in view.node.args] for view in (a, b))
    for i, j in itertools.product((1, 0), repeat=2):
        if mine[i] == theirs[j]:
            table = full_types(cross(mine[1 - i], theirs[1 - j], wide) * mine[i].second(wide), wide)
            return contract_axes(table, {d: wide[d].pairs for d in extra})
    return None


@once_per_node
def _uses(node: Node, leaf: Node) -> list[View]:
    """Products with a weight, and rows of it, that a node is an elementwise function of."""
    if isinstance(node, Contract | Gather) and leaf in node.sources:
        return [node.whole]
    args = node.args[:1] if isinstance(node, Softmax) else node.args if node.entrywise else ()
    found = (use.within(v.bind) for v in args if v.node.deps & leaf.deps for use in _uses(v.node, leaf))
    return list(dict.fromkeys(found))


def _is_transposed(weight: Value, x: Value, contracted: Sequence[int]) -> bool:
    """Whether a weight meets what its transpose made: W f(Wᵀ x) has x in it, where fresh weights would forget it."""
    leaf, summed = weight.node, {a.axis for d in contracted for a in weight.dims[d]}
    uses = (v.node for v in _uses(x.node, leaf) if isinstance(v.node, Contract)) if leaf.is_drawn else ()
    return any(v.node is leaf and summed != {*v.axes_at(first.summed)} for first in uses for v in first.args)


def without_factor(x: Value) -> tuple[float, Value]:
    """The constant factor of a value, and the rest: scaled copies of one weight are one weight."""
    node = x.node
    if node.primitive == "affine" and node.params[1][1] == 0 and node.args[0].bind == node.whole.bind:
        return node.params[1][0], Value(node.argument, x.dims)
    return 1.0, x


def _operand(interpreter: Context, x: Value) -> Value:
    """An operand of a product, one that is known, or a weight under a mask, with classes where the energy of its rows differs.

    A zero-mean function of random bits is the weight that it is (an initializer that multiplies its own draws).
    """
    found = law(x.node) if isinstance(x.node, Apply) else None
    if found is not None and found.mean == 0:
        x = as_weight(interpreter, x)
    own, axes = roots(x.node), list(x.node.axes)
    if any(view.node.is_input or not isinstance(view.node, Array | Leaf) for view in own):
        return x
    for known, bind in own:
        for k, place in enumerate(bind if isinstance(known, Array) and len(bind) > 1 else ()):
            axes[place] = join(axes[place], by_energy(known, k))
    return Value(_classed_over(x.node, affordable(tuple(axes))), x.dims)


@once_per_node
def by_energy(node: Array, k: int) -> Axis:
    """Axis k of known numbers, its positions classed by the sum of squares and the square of the sum along the others."""
    rows = np.moveaxis(np.asarray(node.values, float), k, 0).reshape(node.axes[k].size, -1)
    signatures = np.stack([np.mean(rows**2, axis=1), np.mean(rows, axis=1) ** 2], axis=1)
    signatures /= max(signatures[:, 0].mean(), 1e-300)
    return node.axes[k] if np.ptp(signatures, axis=0).max() < NEGLIGIBLE else grouped(signatures)


def _classed_over(node: Node, axes: Axes) -> Node:
    """The same elementwise tree over axes with finer classes."""
    if not isinstance(node, Array | Apply):
        return node
    args = [View(_classed_over(x, [axes[b] for b in bind]), bind) for x, bind in node.args]
    return node.graph.make(type(node), axes, args, node.params)


def _over_one_frame(x: Value, y: Value, batch: Any, contracted: Any) -> tuple[Value, Value]:
    """Batch dimensions, x's free ones, y's, contracted ones: two arrays over these, of size 1 where they are the other's."""
    (bx, by), (cx, cy) = batch, contracted
    fx, fy = (sorted({*range(len(v.dims))} - {*own}) for v, own in ((x, (*bx, *cx)), (y, (*by, *cy))))
    xs = (*(x.dims[d] for d in (*bx, *fx)), *[()] * len(fy), *(x.dims[d] for d in cx))
    ys = (*(y.dims[d] for d in by), *[()] * len(fx), *(y.dims[d] for d in (*fy, *cy)))
    return Value(x.node, xs), Value(y.node, ys)


def _mixes_heads(weight: Value, x: Value, contracted: Sequence[int]) -> bool:
    """Whether weights mix softmax weights, or products of queries and keys, along an axis that both factors have."""
    along = set(axes_along(x.dims[d] for d in contracted))
    if not (weight.node.is_drawn and weight.node.odd and along):
        return False
    if shares := [r for r in roots(x.node) if isinstance(r.node, Softmax)]:
        return all(along <= set(r.bind) - {r.bind[r.node.params]} for r in shares)
    made = without_factor(x)[1].node
    return isinstance(made, Contract) and not weight_of(made) and all(along <= {*v.bind} for v in made.args)


@once_per_node
def _is_of_shares(node: Node) -> bool:
    """Whether it is a part or a weighted sum of softmax weights."""
    taken = isinstance(node, Take | Sum) or node.primitive == "affine"
    return taken and any(x.shares or _is_of_shares(x) for x in node.sources)


def _meets_itself(x: Value, y: Value, contracted: Any, batch: Any) -> bool:
    """Whether free dimensions of two arrays may be one, read twice: each of its positions then meets itself.

    They are where entries at equal positions are correlated: queries and keys made by parts of one packed kernel are not.
    """
    weights = any(node.is_drawn and node.odd for node in map(unmoved, (x.node, y.node)))
    if weights or not dependent(x.node, y.node) or any(isinstance(v.node, Softmax) for v in (x, y)):
        return False
    here, there = ([*b, *c] for b, c in zip(batch, contracted, strict=True))
    known = len(here)
    for d, n in enumerate(x.shape):
        free = [e for e, m in enumerate(y.shape) if m == n > 1 and e not in there]
        if d not in here and free:
            here, there = [*here, d], [*there, free[0]]
    if len(here) == known:
        return False
    frame, (a, b), _ = align(_over_one_frame(x, y, (here, there), ((), ())))
    apart = mean_of_product(a, b, frame) - a.node.table.total_mean * b.node.table.total_mean
    return abs(apart) > NEGLIGIBLE * (a.node.table.variance * b.node.table.variance) ** 0.5


@rule("dot_general")
def dot_general(interpreter: Context, eqn: Any, x: Value, y: Value) -> Value:
    """Batch dimensions, then x's free ones, then y's; drawn where its terms are no products of independent numbers."""
    return product(interpreter, x, y, *eqn.params["dimension_numbers"])


def product(interpreter: Context, x: Value, y: Value, contracted: Any, batch: Any = ((), ())) -> Value:
    """The same, by the dimensions of x and of y that are summed over, and those that are batches."""
    (c, a), (d, b) = without_factor(x), without_factor(y)
    if _mixes_heads(x, y, contracted[1]) or _mixes_heads(y, x, contracted[0]):
        raise NotImplementedError("weights mix heads")
    if _is_transposed(a, b, contracted[0]) or _is_transposed(b, a, contracted[1]):
        raise NotImplementedError("a weight meets what its transpose made")
    if _meets_itself(a, b, contracted, batch):
        raise NotImplementedError("rows meet themselves in a product")
    if any(map(_is_of_shares, (a.node, b.node))):
        interpreter.ask("softmax weights that were added up or cut", whole=True)
    if b.node.is_drawn and len(_uses(a.node, b.node)) > _WRITTEN_OUT:
        interpreter.ask("a loop over time that is written out")
    x, y = _over_one_frame(a, b, batch, contracted)
    free, count = len(x.dims) - len(contracted[0]), len(batch[0])
    terms = math.prod(x.shape[free:])
    # An inner product of two functions of one root is the sum of one function: a norm's x · x/|x|.
    alone = math.prod((*x.shape[count:free], *y.shape[count:free])) == 1
    alone = alone and not {r.node for r in roots(x.node)}.isdisjoint(r.node for r in roots(y.node))
    if not alone:
        x, y = _operand(interpreter, x), _operand(interpreter, y)
    if 0.0 in (x.constant, y.constant):
        return full(interpreter.graph, 0.0, np.broadcast_shapes(x.shape, y.shape)[:free])
    frame, views, dims = align([x, y])
    summed = axes_along(dims[free:])
    if alone or not summed:
        out = mean(interpreter.elementwise("mul", x, y), range(free, len(x.dims)))
        return Value(affine(out.node, c * d * terms, 0.0), out.dims)
    kept = [k for k in range(len(frame)) if k not in summed]
    place = {k: i for i, k in enumerate([*kept, *summed])}
    views = [view.within(place) for view in views]
    params, axes = tuple(frame[k] for k in summed), [frame[k] for k in kept]
    node = interpreter.graph.make(Contract, axes, views, params)
    # Terms repeat where both operands are constant along a factor of a contracted dimension.
    scale = c * d * terms / math.prod(axis.size for axis in params)
    return Value(affine(node, scale, 0.0), renumbered(dims[:free], place))
