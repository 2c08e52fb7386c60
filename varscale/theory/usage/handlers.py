"""Contractions, lookups, rearrangements and loops, as the walk over a jaxpr sees them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from varscale import _compat
from varscale.theory.usage import layouts
from varscale.theory.usage.layouts import Atom, Axes
from varscale.theory.usage.values import Flow, Score, Source, Value, View
from varscale.theory.usage.walk import Handler, Use, Walk


def _linear(walk: Walk, view: View, x: Flow, use: Use, shape: Sequence[int], axes: Axes) -> Flow:
    """Note a linear map of an activation by a kernel, and give its output."""
    use.batch = tuple(sorted(view.batch))
    use.steps, use.depth, use.before, use.raw = view.steps, x.depth, x.functions, x.raw
    use.normalised = x.normalised
    walk.close(x, read=True)
    sources = walk.note_all(use, view)
    # What is looked up is copied, not mixed: the residual stream begins there.
    maps = x.maps + (use.kind != "lookup")
    return walk.input(
        shape, (x,), maps=maps, embedded=x.embedded or use.kind == "lookup", axes=axes, direct=True,
        sources=sources,
    )  # fmt: skip


def dot_general(walk: Walk, eqn: Any, values: list[Value]) -> Value:
    """A contraction: a linear map, a product of two activations, or of two parameters."""
    (left_in, right_in), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    shape = eqn.outvars[0].aval.shape
    left, right = values
    sides = ((left, left_in, left_batch, eqn.invars[0]), (right, right_in, right_batch, eqn.invars[1]))
    free = [
        [k for k in range(len(var.aval.shape)) if k not in contracted and k not in batch] for _, contracted, batch, var in sides
    ]
    first = len(left_batch)
    places = (range(first, first + len(free[0])), range(first + len(free[0]), len(shape)))

    def placed(which: int, axes: Axes) -> Axes:
        """The output's layout where the axes of one side are known."""
        made = list(layouts.added(shape))
        for k, at in zip(free[which], places[which], strict=True):
            made[at] = axes[k]
        return tuple(made)

    for which in (0, 1):
        value, contracted, batch, _ = sides[which]
        other = sides[1 - which][0]
        if not isinstance(value, View):
            continue
        fan_in = float(math.prod(layouts.size(value.axes[k]) for k in contracted))
        fan_out = float(math.prod(layouts.size([a for a in value.axes[k] if a.axis is not None]) for k in free[which]))
        one_hot = isinstance(other, Flow) and "eq" in other.functions and other.maps == 0
        use = Use(
            value.parameter,
            "lookup" if one_hot else "linear",
            fan_in=1.0 if one_hot else fan_in,
            fan_out=fan_out,
            reduction=layouts.of(value.axes, contracted),
            output=layouts.of(value.axes, free[which]),
            shared=layouts.of(value.axes, batch),
        )
        if isinstance(other, Flow):
            _share(walk, other, [sides[1 - which][2][batch.index(k)] for k in batch])
            return _linear(walk, value, other, use, shape, placed(which, value.axes))
        if isinstance(other, View):
            use.kind, use.batch = "factor", tuple(sorted(value.batch))
            walk.note(use)
    if isinstance(left, Flow) and isinstance(right, Flow):
        return _product(walk, left, right, shape, places, placed)
    x = left if left is not None else right
    if isinstance(x, View):
        return dataclasses.replace(x, axes=layouts.added(shape))
    assert isinstance(x, Flow)
    return dataclasses.replace(x, axes=placed(0 if x is left else 1, x.axes), reduced=False)


def _share(walk: Walk, x: Flow, dims: Sequence[int]) -> None:
    """Note that axes which a kernel added to its output are a batch to the next kernel: each entry is an expert."""
    for source in x.sources:
        use = walk.uses[source.use]
        for k in dims:
            for atom in x.axes[k]:
                if atom.axis in use.output:
                    use.output = tuple(axis for axis in use.output if axis != atom.axis)
                    use.shared = tuple(sorted({*use.shared, atom.axis}))
                    use.fan_out /= atom.size


def ragged_dot(walk: Walk, eqn: Any, values: list[Value]) -> Value:
    """Rows times the kernel of the group that each is in: (rows, in) × (groups, in, out)."""
    x, kernel = values[0], values[1]
    shape = eqn.outvars[0].aval.shape
    if not (isinstance(x, Flow) and isinstance(kernel, View) and len(kernel.axes) == 3):
        return walk.input(shape, [v for v in values if isinstance(v, Flow)])
    groups, reduced, out = ((k,) for k in range(3))
    use = Use(
        kernel.parameter,
        "linear",
        fan_in=float(layouts.size(kernel.axes[1])),
        fan_out=float(layouts.size(kernel.axes[2])),
        reduction=layouts.of(kernel.axes, reduced),
        output=layouts.of(kernel.axes, out),
        shared=layouts.of(kernel.axes, groups),
    )
    return _linear(walk, kernel, x, use, shape, (*layouts.added(shape[:-1]), kernel.axes[2]))


def _product(walk: Walk, left: Flow, right: Flow, shape: Any, places: Any, placed: Any) -> Flow:
    """A product of two activations: scores of attention, or an average of values by its weights."""
    walk.close(left)
    walk.close(right)
    for which, weights, averaged in ((1, left, right), (0, right, left)):
        if weights.score is not None and "softmax" in weights.functions:
            for source in averaged.sources:
                walk.uses[source.use].roles.setdefault(source.part, set()).add("value")
            return walk.input(shape, (left, right), axes=placed(which, averaged.axes), sources=averaged.sources)
    score = Score(left.sources, right.sources, frozenset(places[0]), frozenset(places[1]))
    return walk.input(shape, (left, right), sources=frozenset(), score=score)


def convolution(walk: Walk, eqn: Any, values: list[Value]) -> Value:
    """A convolution, its fans counted over real input."""
    x, kernel = values
    shape = eqn.outvars[0].aval.shape
    if not (isinstance(kernel, View) and isinstance(x, Flow)):
        flows = [v for v in values if isinstance(v, Flow)]
        if not flows:
            return dataclasses.replace(next(v for v in values if isinstance(v, View)), axes=layouts.added(shape))
        return walk.input(shape, flows)
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    size = eqn.invars[0].aval.shape
    out_axis, in_axis, *spatial = numbers.rhs_spec
    fan_in = layouts.size(kernel.axes[in_axis])
    fan_out = shape[numbers.out_spec[1]] / groups
    taps = zip(
        spatial, numbers.lhs_spec[2:], numbers.out_spec[2:], eqn.params["window_strides"], eqn.params["padding"],
        eqn.params["lhs_dilation"], eqn.params["rhs_dilation"], strict=True,
    )  # fmt: skip
    for k, at, to, stride, (low, _), spread, dilation in taps:
        met = _meetings(layouts.size(kernel.axes[k]), size[at], shape[to], stride, low, spread, dilation)
        fan_in *= met / shape[to]
        fan_out *= met / size[at]
    use = Use(
        kernel.parameter,
        "depthwise" if groups > 1 and groups == size[numbers.lhs_spec[1]] else "convolution",
        fan_in=fan_in,
        fan_out=fan_out,
        reduction=layouts.of(kernel.axes, (in_axis, *spatial)),
        output=layouts.of(kernel.axes, (out_axis,)),
    )
    axes = list(layouts.added(shape))
    axes[numbers.out_spec[1]] = kernel.axes[out_axis]
    return _linear(walk, kernel, x, use, shape, tuple(axes))


def _meetings(taps: int, size: int, outputs: int, stride: int, low: int, spread: int, dilation: int) -> int:
    """Pairs of a tap and an output position at which the tap lies on real input, along one axis."""
    met = 0
    for tap in range(taps):
        # Position o·stride + tap·dilation − low of the input, whose entries lie `spread` apart.
        start = tap * dilation - low
        met += sum(
            (start + o * stride) % spread == 0 and 0 <= start + o * stride <= (size - 1) * spread for o in range(outputs)
        )
    return met


def gather(walk: Walk, eqn: Any, values: list[Value]) -> Value:
    """A lookup in a table, or a constant selection."""
    operand, index = values
    shape = eqn.outvars[0].aval.shape
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if isinstance(operand, View):
        removed = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
        kept = [k for k in range(len(sizes)) if k not in removed]
        axes = list(layouts.added(shape))
        for k, at in zip(kept, numbers.offset_dims, strict=True):
            if sizes[k] == layouts.size(operand.axes[k]):
                axes[at] = operand.axes[k]
        features = [k for k in kept if sizes[k] > 1]
        if not isinstance(index, Flow):
            return dataclasses.replace(operand, axes=tuple(axes))
        looked_up = [k for k in range(len(sizes)) if k not in features]
        use = Use(
            operand.parameter,
            "lookup",
            fan_out=float(math.prod(sizes[k] for k in features)),
            reduction=layouts.of(operand.axes, looked_up),
            output=layouts.of(operand.axes, features),
        )
        return _linear(walk, operand, index, use, shape, tuple(axes))
    flows = [v for v in values if isinstance(v, Flow)]
    if isinstance(operand, Flow) and operand.functions:
        return walk.input(shape, flows, functions=operand.functions)
    if isinstance(operand, Flow):
        return dataclasses.replace(operand, axes=layouts.added(shape))
    return walk.input(shape, flows)


def _with_axes(x: Value, axes: Axes | None, shape: Sequence[int]) -> Value:
    if x is None:
        return None
    made = layouts.added(shape) if axes is None else axes
    if isinstance(x, Flow) and x.score is not None and len(made) != len(x.axes):
        x = dataclasses.replace(x, score=None)  # whose axes moved
    return dataclasses.replace(x, axes=made)


def _with_part(walk: Walk, x: Value, axes: Axes) -> Value:
    """A slice; of the output of one kernel, one of its parts."""
    if x is None:
        return None
    part = layouts.part(axes)
    made = dataclasses.replace(x, axes=axes)
    if isinstance(made, Flow) and part is not None and all(s.part is None for s in made.sources):
        for source in made.sources:
            walk.uses[source.use].parts = max(walk.uses[source.use].parts, part[1])
        return dataclasses.replace(made, sources=frozenset(Source(s.use, part) for s in made.sources))
    return made


def reshape(walk: Walk, eqn: Any, values: list[Value]) -> Value:
    """A row-major reshape, or axes of size 1 added or taken away."""
    x, shape = values[0], eqn.outvars[0].aval.shape
    return None if x is None else _with_axes(x, layouts.reshaped(x.axes, shape), shape)


def transpose(walk: Walk, eqn: Any, values: list[Value]) -> Value:
    """A transposition."""
    x, permutation = values[0], eqn.params["permutation"]
    if isinstance(x, Flow) and x.score is not None:
        at = {k: i for i, k in enumerate(permutation)}
        moved = [frozenset(at[k] for k in axes) for axes in (x.score.left_axes, x.score.right_axes)]
        x = dataclasses.replace(x, score=Score(x.score.left, x.score.right, *moved))
    return None if x is None else _with_axes(x, layouts.transposed(x.axes, permutation), ())


def broadcast_in_dim(walk: Walk, eqn: Any, values: list[Value]) -> Value:
    """Axes added by repeating."""
    x, shape = values[0], eqn.outvars[0].aval.shape
    return None if x is None else _with_axes(x, layouts.broadcast(x.axes, eqn.params["broadcast_dimensions"], shape), shape)


def slice_(walk: Walk, eqn: Any, values: list[Value]) -> Value:
    """A slice by constants."""
    x = values[0]
    if x is None:
        return None
    strides = eqn.params["strides"] or [1] * len(x.axes)
    axes = x.axes
    for k, (start, stop, stride) in enumerate(
        zip(eqn.params["start_indices"], eqn.params["limit_indices"], strides, strict=True)
    ):
        if stride != 1:
            axes = (*axes[:k], (Atom(None, eqn.outvars[0].aval.shape[k]),), *axes[k + 1 :])
        else:
            axes = layouts.sliced(axes, k, start, stop)
    return _with_part(walk, x, axes)


def split(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    """An axis cut into parts."""
    x, start, parts = values[0], 0, []
    for size in eqn.params["sizes"]:
        parts.append(
            None if x is None else _with_part(walk, x, layouts.sliced(x.axes, eqn.params["axis"], start, start + size))
        )
        start += size
    return parts


def dynamic_slice(walk: Walk, eqn: Any, values: list[Value]) -> Value:
    """A slice that begins at a computed place: one of the layers that are stacked in a parameter, as a rule."""
    x, sizes = values[0], eqn.params["slice_sizes"]
    if x is None:
        return walk.input(sizes, [v for v in values if isinstance(v, Flow)])
    axes = tuple(a if layouts.size(a) == n else ((Atom(None, n),) if n > 1 else ()) for a, n in zip(x.axes, sizes, strict=True))
    if isinstance(x, View):
        taken = layouts.of(x.axes, [k for k, n in enumerate(sizes) if n == 1 < layouts.size(x.axes[k])])
        return dataclasses.replace(x, axes=axes, batch=x.batch | set(taken))
    return dataclasses.replace(x, axes=axes)


def pad(walk: Walk, eqn: Any, values: list[Value]) -> Value:
    """Entries added around an array."""
    x, shape = values[0], eqn.outvars[0].aval.shape
    if x is None:
        return values[1]
    axes = tuple(a if layouts.size(a) == n else (Atom(None, n),) for a, n in zip(x.axes, shape, strict=True))
    return _with_axes(x, axes, shape)


def concatenate(walk: Walk, eqn: Any, values: list[Value]) -> Value:
    """Arrays joined along an axis: activations, a learned token and activations, or parameters."""
    shape = eqn.outvars[0].aval.shape
    flows = [v for v in values if isinstance(v, Flow)]
    views = [v for v in values if isinstance(v, View)]
    if not flows:
        return _side_by_side(walk, views, eqn.params["dimension"], shape)
    for view in views:
        output = layouts.of(view.axes, range(len(view.axes)))
        walk.note(Use(view.parameter, "token", output=output, batch=tuple(sorted(view.batch)), steps=view.steps))
    if len({x.anchor for x in flows}) == 1:
        return dataclasses.replace(flows[0], axes=layouts.added(shape))
    for x in flows:
        walk.close(x)
    return walk.input(shape, flows)


def _side_by_side(walk: Walk, views: list[View], axis: int, shape: Sequence[int]) -> View:
    """Parameters joined along an axis: those of equal shape are used alike from here on."""
    first = views[0]
    sizes = [[layouts.size(atoms) for atoms in view.axes] for view in views]
    if all(size == sizes[0] for size in sizes):
        axes = (*first.axes[:axis], (Atom(None, len(views)), *first.axes[axis]), *first.axes[axis + 1 :])
        return dataclasses.replace(first, axes=axes, companions=tuple(view.parameter for view in views[1:]))
    for view in views[1:]:
        if view.parameter != first.parameter:
            walk.note(Use(view.parameter, "factor", batch=tuple(sorted(view.batch)), steps=view.steps))
    return dataclasses.replace(first, axes=layouts.added(shape))


def _joined(x: Value, y: Value) -> Value:
    """A value that is one of two."""
    if isinstance(x, Flow) and isinstance(y, Flow):
        return dataclasses.replace(
            x, ancestors=x.ancestors | y.ancestors, sources=x.sources | y.sources, depth=max(x.depth, y.depth),
            maps=max(x.maps, y.maps), embedded=x.embedded or y.embedded,
        )  # fmt: skip
    return x if isinstance(x, Flow) or y is None else y


def _stacked(x: Value, length: int) -> Value:
    return None if x is None else dataclasses.replace(x, axes=((Atom(None, length),), *x.axes))


def _one_of(x: Value) -> Value:
    """One step's slice of what a loop takes apart."""
    if x is None:
        return None
    if isinstance(x, View):
        return dataclasses.replace(x, axes=x.axes[1:], batch=x.batch | set(layouts.of(x.axes, (0,))))
    return dataclasses.replace(x, axes=x.axes[1:])


def _repeated(x: Value, length: int) -> Value:
    return dataclasses.replace(x, steps=x.steps * length) if isinstance(x, View) else x


def _state(walk: Walk, before: Value, after: Value, var: Any) -> Value:
    """The state that a loop begins with; a constant that turns into an activation is one from the start."""
    return walk.input(var.aval.shape, maps=1) if before is None and isinstance(after, Flow) else before


def _next(walk: Walk, before: Value, after: Value, var: Any) -> Value:
    """The state that a later step begins with: what it was computed from in earlier steps is no ancestor within this one."""
    state = _joined(after, before)
    if not (isinstance(before, Flow) and isinstance(state, Flow)):
        return state
    return walk.input(
        var.aval.shape, axes=state.axes, sources=state.sources, maps=state.maps, embedded=state.embedded, depth=before.depth
    )


def scan(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    """A loop over layers, whose parameters are taken apart, or over time, which uses the same ones at every step."""
    constants, carry, streams = _compat.scan_operands(eqn.params, values)
    length = eqn.params["length"]
    jaxpr, consts = _compat.sub_jaxpr(eqn.params["jaxpr"])
    fixed = [_repeated(v, length) for v in constants]
    layers = list(map(_one_of, streams))
    with walk.trial():  # which parts of the state depend on the inputs
        reached = walk.run(jaxpr, [None] * len(consts), [*fixed, *carry, *layers])
    carry = [_state(walk, x, y, v) for x, y, v in zip(carry, reached, jaxpr.outvars, strict=False)]
    now = carry
    outs: list[Value] = []
    for _ in range(2):
        outs = walk.run(jaxpr, [None] * len(consts), [*fixed, *now, *layers])
        now = [_next(walk, x, y, v) for x, y, v in zip(carry, outs, jaxpr.outvars, strict=False)]
    pairs = [(x.depth, y.depth) for x, y in zip(carry, outs, strict=False) if isinstance(x, Flow) and isinstance(y, Flow)]
    gained = max((after - before for before, after in pairs), default=0)
    start = max((x.depth for x in carry if isinstance(x, Flow)), default=0)
    walk.additions = max(walk.additions, start + gained * length)
    ends = [
        dataclasses.replace(y, depth=start + gained * length) if isinstance(y, Flow) and gained else y
        for y in outs[: len(carry)]
    ]
    return [*ends, *(_stacked(y, length) for y in outs[len(carry) :])]


def while_(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    """A loop of unknown length."""
    tests, constants = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    jaxpr, consts = _compat.sub_jaxpr(eqn.params["body_jaxpr"])
    fixed, carry = values[tests : tests + constants], values[tests + constants :]
    with walk.trial():
        reached = walk.run(jaxpr, [None] * len(consts), [*fixed, *carry])
    carry = [_state(walk, x, y, v) for x, y, v in zip(carry, reached, jaxpr.outvars, strict=True)]
    for _ in range(2):
        outs = walk.run(jaxpr, [None] * len(consts), [*fixed, *carry])
        carry = [_joined(y, x) for x, y in zip(carry, outs, strict=True)]
    return carry


def cond(walk: Walk, eqn: Any, values: list[Value]) -> list[Value]:
    """One of several branches."""
    found: list[list[Value]] = []
    for branch in eqn.params["branches"]:
        jaxpr, consts = _compat.sub_jaxpr(branch)
        found.append(walk.run(jaxpr, [None] * len(consts), values[1:]))
    outs = found[0]
    for more in found[1:]:
        outs = [_joined(x, y) for x, y in zip(outs, more, strict=True)]
    return outs


HANDLERS: dict[str, Handler] = {
    "dot_general": dot_general,
    "ragged_dot_general": ragged_dot,
    "ragged_dot": ragged_dot,
    "conv_general_dilated": convolution,
    "gather": gather,
    "reshape": reshape,
    "squeeze": reshape,
    "expand_dims": reshape,
    "transpose": transpose,
    "broadcast_in_dim": broadcast_in_dim,
    "slice": slice_,
    "split": split,
    "dynamic_slice": dynamic_slice,
    "pad": pad,
    "concatenate": concatenate,
    "scan": scan,
    "while": while_,
    "cond": cond,
}
