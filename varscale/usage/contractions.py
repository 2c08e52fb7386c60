"""Linear maps, convolutions, lookups and products of activations, as the walk over a jaxpr sees them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from varscale.usage import layouts
from varscale.usage.layouts import Axes
from varscale.usage.notes import Use
from varscale.usage.values import Flow, Score, Value, View, changed, times
from varscale.usage.walk import Walk


def _linear(walk: Walk, view: View, x: Flow, use: Use, shape: Sequence[int], axes: Axes) -> Flow:
    """Note a linear map of an activation by a kernel, and give its output."""
    use.batch = tuple(sorted(view.batch))
    use.steps, use.depth, use.before, use.raw = view.steps, x.depth, x.functions, x.raw
    use.normalised, use.layout, use.region = x.normalised, axes, view.region
    use.input_scale, use.before_scale, use.kernel_scale = x.scale, x.function_scale, view.scale
    use.normalised_kernel = view.normalised
    use.reads = frozenset(source.use for source in x.sources)
    use.stream, use.maps = x.stream, x.maps
    walk.close(x, read=True)
    sources = walk.note_all(use, view)
    # What is looked up is copied, not mixed: the residual stream begins there.
    maps = x.maps + (use.kind != "lookup")
    made = walk.input(
        shape, (x,), maps=maps, embedded=x.embedded or use.kind == "lookup", axes=axes, direct=True,
        sources=sources,
    )  # fmt: skip
    walk.anchored(sources, made)
    return made


def dot_general(walk: Walk, eqn: Any, values: list[Value]) -> Value:
    """A contraction: a linear map, a product of two activations, or of two parameters."""
    row = walk.numbered(eqn)
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
        if isinstance(other, Flow) and not contracted:  # an outer product, or entry by entry: nothing is summed
            made = walk.met("mul", value, other)
            return changed(made, axes=placed(1 - which, other.axes), reduced=False)
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
            operand=which,
        )
        if isinstance(other, Flow):
            _share(walk, other, [sides[1 - which][2][batch.index(k)] for k in batch])
            return _linear(walk, value, other, use, shape, placed(which, value.axes))
        if isinstance(other, View):
            use.kind, use.batch = "factor", tuple(sorted(value.batch))
            walk.note(use)
    if isinstance(left, Flow) and isinstance(right, Flow):
        terms = math.prod(eqn.invars[0].aval.shape[k] for k in left_in)
        return _product(walk, left, right, shape, places, placed, terms, row)
    x = left if left is not None else right
    if isinstance(x, View):
        return changed(x, axes=layouts.added(shape))
    assert isinstance(x, Flow)
    return changed(x, axes=placed(0 if x is left else 1, x.axes), reduced=False)


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


def _product(walk: Walk, left: Flow, right: Flow, shape: Any, places: Any, placed: Any, terms: int, row: str) -> Flow:
    """A product of two activations: scores of attention, or an average of values by its weights."""
    walk.close(left)
    walk.close(right)
    for which, weights, averaged in ((1, left, right), (0, right, left)):
        if weights.score is not None and weights.functions & {"softmax", "exp"}:  # blocks of keys are divided by their sum last
            for source in averaged.sources:
                walk.uses[source.use].roles.setdefault(source.part, set()).add("value")
            made = walk.input(shape, (left, right), linear=False, axes=placed(which, averaged.axes), sources=averaged.sources)
            return _contracted(walk, made, left, right)
    mixed = frozenset().union(*(x.sources for x in (left, right) if x.direct and not x.functions))
    scale = times(left.scale, right.scale)
    score = Score(left.sources, right.sources, frozenset(places[0]), frozenset(places[1]), terms, row, scale)
    made = walk.input(shape, (left, right), linear=False, sources=frozenset(), score=score, scale=scale, mixed=mixed)
    return _contracted(walk, made, left, right)


def _contracted(walk: Walk, made: Flow, *sides: Flow) -> Flow:
    """The product, once it is noted of which values."""
    walk.residuals.ways.contracted(made, [{x.anchor, *(walk.uses[s.use].anchor for s in x.sources)} for x in sides])
    return made


def convolution(walk: Walk, eqn: Any, values: list[Value]) -> Value:
    """A convolution, its fans counted over real input."""
    x, kernel = values
    shape = eqn.outvars[0].aval.shape
    if not (isinstance(kernel, View) and isinstance(x, Flow)):
        flows = [v for v in values if isinstance(v, Flow)]
        if not flows:
            return changed(next(v for v in values if isinstance(v, View)), axes=layouts.added(shape))
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
            placed = sum(n > 1 for k, n in enumerate(shape) if k not in numbers.offset_dims)
            return changed(operand, axes=tuple(axes), placed=operand.placed + placed)
        looked_up = [k for k in range(len(sizes)) if k not in features]
        use = Use(
            operand.parameter,
            "lookup",
            fan_out=float(math.prod(sizes[k] for k in features)),
            reduction=layouts.of(operand.axes, looked_up),
            output=layouts.of(operand.axes, features),
        )
        return _linear(walk, operand, changed(index, scale=1.0), use, shape, tuple(axes))
    flows = [v for v in values if isinstance(v, Flow)]
    if isinstance(operand, Flow) and operand.functions:
        return walk.input(shape, flows, functions=operand.functions)
    if isinstance(operand, Flow):
        return changed(operand, axes=layouts.added(shape))
    return walk.input(shape, flows)
