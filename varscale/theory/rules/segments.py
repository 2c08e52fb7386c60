"""Sums by segment: each position of an axis adds to the output that a known index names (messages of a graph to its nodes).

With S_iκ = Σ w_e and Q_iκ = Σ w_e² over the positions e of class κ that add to output i,

    E[y_i²]   = Σ_κ Q_iκ M(κ) + Σ_κκ' (S_iκ S_iκ' − δ Q_iκ) M(κ, κ'),      E[y_i y_j] = Σ_κκ' S_iκ S_jκ' M(κ, κ'),

exact given the moments M of the summands; outputs that see alike are one class (the degrees of a graph).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from varscale.theory.domain.axes import MOST_CLASSES, Axis, apply_axis, contract_axis, grouped
from varscale.theory.domain.axis_maps import adjoint, entry_map, identity_map, pair_counts
from varscale.theory.domain.tables import Table, lift
from varscale.theory.graph.expressions import Apply, roots
from varscale.theory.graph.factors import factors
from varscale.theory.graph.layout import Atom, Value, full, materialize, merged
from varscale.theory.graph.linear_nodes import weight_of
from varscale.theory.graph.lookups import SUMMED_OVER, Gather
from varscale.theory.graph.nodes import Array, Node, View, cross_by_kind, number, pullback, second_moments
from varscale.theory.graph.normal_form import affine, apply
from varscale.theory.graph.reshapes import permute
from varscale.theory.graph.store import BackwardNotes
from varscale.theory.integrals.hermite_series import Z
from varscale.theory.integrals.primitives import function
from varscale.theory.propagation.cross_moments import cross
from varscale.theory.rules.neighbours import unseen, unseen_in_given
from varscale.theory.rules.reductions import bounded, is_identity, narrowest, outside, restored
from varscale.theory.rules.registry import Context, rule
from varscale.theory.rules.sampled_regions import drawn_region
from varscale.theory.rules.segment_sums import SEGMENTS, Segments, SegmentSum, per_position


@second_moments.register(SegmentSum)
def second_moments_of_segment_sum(node: SegmentSum) -> Table:
    table, inside = (view.node.table for view in node.args)
    means, pairs = node.maps
    second = apply_axis(table.second, 0, pairs)
    c = node.axes[0].classes
    second[:c] = apply_axis(inside.second, 0, pairs[:c])
    out = Table(node.axes, apply_axis(table.mean, 0, means), second)
    alike = max(unseen(node), unseen_in_given(node))
    if alike > 1e-3:
        node.graph.flag("quadrature", alike)
        node.gradient_doubt = alike  # the same sums, read from their outputs
    return out


@pullback.register(SegmentSum)
def pullback_of_segment_sum(node: SegmentSum, cotangent: np.ndarray, notes: BackwardNotes) -> list[np.ndarray | None]:
    axis, out = node.args[0].node.axes[0], node.axes[0]
    return [apply_axis(cotangent, 0, adjoint(node.maps[1], out, axis)), None]


@cross_by_kind.register(SegmentSum)
def cross_by_kind_of_segment_sum(node: SegmentSum, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
    """Sums of rows looked up against anything over the same rows: which row meets which is known."""
    weights_of = weight_of(node), weight_of(b.node)
    if None not in weights_of and weights_of[0] is not weights_of[1]:
        return np.zeros((1,) * len(frame))
    looked, bind = node.args[0].node, b.bind
    known = looked.line if isinstance(looked, Gather) else None
    if not isinstance(looked, Gather) or known is None or sorted(bind) != sorted(a.bind):
        return None
    (row,), source = looked.params[0], looked.args[0]
    rows, out = source.node.axes[row], node.axes[0]
    if rows.size != out.size:
        return None
    # Rows and outputs are the same things: read both over the outputs' frame.
    place = [a.bind[0] if k == row else a.bind[b] for k, b in enumerate(source.bind)]
    table = np.broadcast_to(cross(View(source.node, tuple(place)), b, frame), [x.types for x in frame])
    at, axis = a.bind[0], frame[a.bind[0]]
    segments, weights, _ = SEGMENTS.of(node.graph)[node.params]
    matrix = pair_counts(entry_map(segments, known, axis, axis, weights), identity_map(axis))
    return lift(apply_axis(table, at, matrix), frame, range(len(frame)), frame, pairs=True)


def substitute(node: Node, swap: dict[int, Node], done: dict[int, Node]) -> Node:
    """The same expression with some of its nodes replaced."""
    if node.id in swap:
        return swap[node.id]
    if node.id not in done:
        args = [View(substitute(v.node, swap, done), v.bind) for v in node.args]
        same = all(a.node is b.node for a, b in zip(args, node.args, strict=True))
        done[node.id] = node if same else node.graph.make(type(node), node.axes, args, node.params)
    return done[node.id]


def note_segments(node: Node, ids: np.ndarray) -> None:
    """Tell the lookups among the summands of a sum by segment of which segment each of their positions is.

    All positions of one segment get the same cotangent, which a lookup has to know to carry it back (`Gather.pullback`).
    """
    for looked in per_position(node):
        noted = SUMMED_OVER.once(node.graph, looked.id, dict)
        noted[ids.tobytes()] = ids


@functools.singledispatch
def pairs_within_segments(node: Node) -> Node | None:
    """A node whose pairs of positions are those of one segment; None of a kind that does not know."""
    return None


def as_seen_within(node: Node, ids: np.ndarray) -> Node:
    """The summands with each lookup along axis 0 agreeing as often as it does for two positions of one segment."""
    swap: dict[int, Node] = {}
    for looked in per_position(node):
        if (within := pairs_within_segments(looked)) is not None:
            swap[looked.id] = within
            continue
        known = looked.line if isinstance(looked, Gather) else None
        if not isinstance(looked, Gather) or known is None or len(known) != len(ids):
            continue
        order = np.lexsort((known, ids))
        pair = np.stack([ids[order], known[order]])
        together, segments = (np.unique(x, axis=-1, return_counts=True)[1].astype(float) for x in (pair, ids))
        rate = float(np.sum(together * (together - 1)) / max(np.sum(segments * (segments - 1)), 1.0))
        rows, index, _, count, classes, _ = looked.params
        rates = np.where(looked.indexed[0].agrees, 1.0, round(rate, 12))
        params = (rows, index, tuple(rates), count, classes, None)
        swap[looked.id] = node.graph.make(Gather, looked.axes, looked.args, params)
    return substitute(node, swap, {}) if swap else node


def known_factors(x: Value, size: int) -> tuple[Node, np.ndarray]:
    """The random part of a product over axis 0, and the known numbers that multiply it there."""
    c, parts = factors(View(x.node, tuple(range(len(x.node.axes)))))
    weights = np.full(size, c)
    left = []
    for part in parts:
        if part.bind == (0,) and all(isinstance(r.node, Array) for r in roots(part.node)):
            values = _known_line(part.node)
            if values is not None:
                weights = weights * values
                continue
        left.append(part)
    if len(left) == len(parts):
        return x.node, np.ones(size)
    whole = tuple(range(len(x.node.axes)))
    node: Node = number(x.node.graph, 1.0)
    for part in left:
        views = [View(node, whole if node.axes else ()), part]
        node = apply(x.node.graph, "mul", (), tuple(x.node.axes), views)
    return node, weights


def _known_line(node: Node) -> np.ndarray | None:
    """The numbers of a known one-dimensional expression."""
    if isinstance(node, Array):
        return np.asarray(node.values, float)
    if not isinstance(node, Apply):
        return None
    values = [v.node.params if not v.node.axes and not v.node.args else _known_line(v.node) for v in node.args]
    return None if any(v is None for v in values) else np.asarray(function(node.params[0], node.params[1])(*values), float)


# Set on the validation grid, not derived: of maxima over segments, whose entries are taken for Gaussian.
_MAXIMUM_DOUBT = 0.1


class SegmentMax(Node):
    """Maxima by segment over axis 0, 0 where a segment is empty; `params` is (key of (ids, size) in the store, sign).

    A second argument is the entries as those of one segment see them (`SegmentSum`): a part of variance r that they share moves
    with their maximum, max_d(√r z₀ + √(1−r) z_e) = √r z₀ + √(1−r) max_d z_e. What two maxima share is what two entries share.
    """

    how = "sampled"
    gradient_doubt = 1.0  # by which entry was the largest, nothing is known but that it was one


@second_moments.register(SegmentMax)
def second_moments_of_segment_max(node: SegmentMax) -> Table:
    ids, _, size = SEGMENTS.of(node.graph)[node.params[0]]
    sign = node.params[1]
    view = node.args[0]
    table = view.node.table
    within = node.args[1].node.table
    degrees = np.bincount(ids, minlength=size)[:size]
    out, share = node.axes[0], special.ndtr(Z)
    # The entries' law is that of the class with the least numbers: masked places are in another.
    cell = np.unravel_index(int(np.argmin(table.diagonal)), table.diagonal.shape)
    centre, variance = float(table.mean[cell]), float(max(table.diagonal[cell] - table.mean[cell] ** 2, 0.0))
    types = view.node.axes[0].classes
    met = (types + int(cell[0]) * (types + 1), *cell[1:])  # two entries of a segment, the same on the other axes
    share_of_all = float(np.clip((within.second[met] - centre**2) / max(variance, 1e-300), 0.0, 1.0))
    common, own_part = share_of_all * variance, (1 - share_of_all) * variance
    line = np.sort(sign * centre + np.sqrt(own_part) * Z)
    laws = {}
    for d in np.unique(degrees[degrees > 0]):
        weights = np.diff(np.concatenate([[0.0], share])) * d * share ** (d - 1)
        weights /= weights.sum()
        laws[int(d)] = (sign * float(weights @ line), float(weights @ line**2) + common)
    first, square = (np.array([laws.get(int(d), (0.0, 0.0))[k] for d in degrees]) for k in (0, 1))
    members = np.eye(out.classes)[out.label_array].T / out.counts[:, None]
    mean, second = members @ first, members @ square
    node.graph.flag("sampled", _MAXIMUM_DOUBT + bounded(int(max(degrees.max(), 1)), narrowest(view.node)))
    rest = node.axes[1:]
    correlation = np.clip(table.covariance / max(variance, 1e-300), -1.0, 1.0)
    own = correlation[cell[0]], correlation[types + int(cell[0]) * (types + 1)]
    spread = np.sqrt(np.maximum(second - mean**2, 0.0))
    same = out.agrees
    spreads, products = (v[out.first] * v[out.second] for v in (spread, mean))
    shape = (-1, *[1] * len(rest))
    both = np.where(same.reshape(shape), own[0][None], own[1][None]) * spreads.reshape(shape)
    diagonal = products.reshape(shape)
    means = np.broadcast_to(mean.reshape(-1, *[1] * len(rest)), [a.classes for a in node.axes])
    return Table(node.axes, np.array(means), np.array(np.broadcast_to(both + diagonal, node.frame_types)))


@pullback.register(SegmentMax)
def pullback_of_segment_max(node: SegmentMax, cotangent: np.ndarray, notes: BackwardNotes) -> list[np.ndarray | None]:
    """A cotangent goes to the entry that was the maximum."""
    axis, out = node.args[0].node.axes[0], node.axes[0]
    total = contract_axis(cotangent, 0, out.same) * out.size / axis.size
    same = axis.agrees.astype(float)
    return [np.multiply.outer(same, total), None]


class Segmented(NamedTuple):
    """Updates with the segmented axis first, its layout, and the segment of each position."""

    summands: Value
    segments: np.ndarray


def segmented(interpreter: Context, eqn: Any, x: Value, ids: Value, updates: Value) -> Segmented | None:
    """A scatter of whole rows to known places; None where it is anything else."""
    d = eqn.params["dimension_numbers"]
    known = interpreter.concrete(ids)
    rows = tuple(d.inserted_window_dims) == tuple(d.scatter_dims_to_operand_dims) == (0,)
    plain = rows and tuple(d.update_window_dims) == tuple(range(1, len(updates.dims))) and not d.operand_batching_dims
    if known is None or not plain or known.ndim != 2 or known.shape[1] != 1 or len(known) < 2 or x.shape[0] < 2:
        return None
    updates = merged(materialize(updates, [0]), 0)
    first = updates.dims[0][0].axis
    assert first is not None
    order = [first, *(k for k in range(len(updates.node.axes)) if k != first)]
    place = {k: i for i, k in enumerate(order)}
    dims = [tuple(a if a.axis is None else Atom(a.size, place[a.axis]) for a in dim) for dim in updates.dims]
    return Segmented(Value(permute(updates.node, order), tuple(dims)), known[:, 0].astype(int))


@rule("scatter-add")
def scatter_add(interpreter: Context, eqn: Any, x: Value, ids: Value, updates: Value) -> Any:
    """Sums by segment where the segments are known; otherwise sampled."""
    found = segmented(interpreter, eqn, x, ids, updates)
    if found is None:
        return drawn_region(interpreter, eqn, (x, ids, updates), "entries are added at places that are not known")[0]
    summands, segments = found
    node, weights = known_factors(summands, len(segments))
    if not node.axes or node.axes[0].size != len(segments):
        node, weights = summands.node, np.ones(len(segments))
    size = x.shape[0]
    kept = (segments >= 0) & (segments < size)
    moments = [np.bincount(segments[kept], weights[kept] ** k, size) for k in (1, 2)]
    out = grouped(np.stack(moments, axis=1), 2 * MOST_CLASSES)
    key = (hashlib.sha1(segments.tobytes() + weights.tobytes()).hexdigest(), size)
    SEGMENTS.put(interpreter.graph, key, Segments(segments, weights, size))
    note_segments(node, segments)
    identity = tuple(range(len(node.axes)))
    args = [View(node, identity), View(as_seen_within(node, segments), identity)]
    total = interpreter.graph.make(SegmentSum, (out, *node.axes[1:]), args, key)
    result = Value(total, ((Atom(size, 0),), *summands.dims[1:]))
    return result if x.constant == 0 else interpreter.elementwise("add", x, result)


@rule("scatter-max", "scatter-min")
def scatter_max(interpreter: Context, eqn: Any, x: Value, ids: Value, updates: Value) -> Any:
    """Maxima by segment where the segments are known; otherwise sampled."""
    name = "max" if eqn.primitive.name == "scatter-max" else "min"
    sign, start = 1.0 if name == "max" else -1.0, x.constant
    if start is None:
        return sampled(interpreter, eqn, x, ids, updates)
    # Empty segments are 0: so the maximum with c is that of what is above c, with 0, and c.
    shift = 0.0 if is_identity(start, name) else start
    above = Value(affine(updates.node, 1.0, -shift), updates.dims)
    out = _extremes(interpreter, eqn, x, ids, above, sign)
    if out is None:
        return sampled(interpreter, eqn, x, ids, updates)
    if is_identity(start, name) or (start == 0 and sign > 0 and updates.node.positive):
        return out
    out = interpreter.elementwise(name, out, full(interpreter.graph, 0.0, out.shape))
    return Value(affine(out.node, 1.0, start), out.dims)


def _extremes(interpreter: Context, eqn: Any, x: Value, ids: Value, updates: Value, sign: float) -> Value | None:
    """Extremes by segment, 0 where one is empty; None where the segments are not known."""
    inner, steps = outside(updates) if sign > 0 else (updates, [])
    if not all(shift == 0 if name == "affine" else low <= 0 for name, low, shift in steps):
        inner, steps = updates, []  # they would not leave the 0 of an empty segment as it is
    found = segmented(interpreter, eqn, x, ids, inner)
    if found is None:
        return None
    summands, segments = found
    node, size = summands.node, x.shape[0]
    out = grouped(np.bincount(segments, minlength=size)[:size, None].astype(float), 2 * MOST_CLASSES)
    key = (hashlib.sha1(segments.tobytes()).hexdigest(), size)
    SEGMENTS.put(interpreter.graph, key, Segments(segments, np.ones(len(segments)), size))
    views = [View(x, tuple(range(len(node.axes)))) for x in (node, as_seen_within(node, segments))]
    total = interpreter.graph.make(SegmentMax, (out, *node.axes[1:]), views, (key, sign))
    return restored(interpreter, Value(total, ((Atom(size, 0),), *summands.dims[1:])), steps)
