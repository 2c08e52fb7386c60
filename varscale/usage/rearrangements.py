"""Reshapes, transposes, slices and joins, as the walk over a jaxpr sees them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from varscale.usage import layouts
from varscale.usage.layouts import Atom, Axes
from varscale.usage.notes import Use
from varscale.usage.values import Flow, Source, Value, View, changed
from varscale.usage.walk import Walk


def _with_axes(x: Value, axes: Axes | None, shape: Sequence[int], to: Mapping[int, Iterable[int]]) -> Value:
    """A value whose axes went to others; `to` tells of each of them which."""
    if isinstance(x, Flow) and x.score is not None:
        x = changed(x, score=x.score.moved(to))
    return None if x is None else changed(x, axes=layouts.added(shape) if axes is None else axes)


def _with_part(walk: Walk, x: Value, axes: Axes) -> Value:
    """A slice; of the output of one kernel, one of its parts."""
    if x is None:
        return None
    part = layouts.part(axes)
    made = changed(x, axes=axes)
    if isinstance(x, View):
        return changed(made, region=_region(x, axes))
    if isinstance(made, Flow) and part is not None and all(s.part is None for s in made.sources):
        for source in made.sources:
            walk.uses[source.use].parts.add(part)
            walk.uses[source.use].cut = layouts.cut(axes)
        return changed(made, sources=frozenset(Source(s.use, part) for s in made.sources))
    return made


def _region(x: View, axes: Axes) -> tuple[tuple[int, int, int], ...] | None:
    """Which entries of its parameter a slice of a view holds."""
    found = x.region
    for before, after in zip(x.axes, axes, strict=True):
        if before == after or found is None:
            continue
        whole = before[0] if len(before) == 1 and before[0].part is None and before[0].stride == 1 else None
        now = after[0] if len(after) == 1 else None
        if whole is None or whole.axis is None or now is None or now.part is None:
            return None
        start, stop, length = now.part
        if start % now.size or length % now.size:
            return None
        found = (*found, (whole.axis, start, stop))
    return found


def reshape(walk: Walk, eqn: Any, values: list[Value]) -> Value:
    """A row-major reshape, or axes of size 1 added or taken away."""
    x, before, shape = values[0], eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return None if x is None else _with_axes(x, layouts.reshaped(x.axes, shape), shape, layouts.followed(before, shape))


def transpose(walk: Walk, eqn: Any, values: list[Value]) -> Value:
    """A transposition."""
    x, permutation = values[0], eqn.params["permutation"]
    to = {k: (i,) for i, k in enumerate(permutation)}
    return None if x is None else _with_axes(x, layouts.transposed(x.axes, permutation), (), to)


def broadcast_in_dim(walk: Walk, eqn: Any, values: list[Value]) -> Value:
    """Axes added by repeating."""
    x, dimensions, shape = values[0], eqn.params["broadcast_dimensions"], eqn.outvars[0].aval.shape
    to = {k: (axis,) for k, axis in enumerate(dimensions)}
    if isinstance(x, Flow) and math.prod(shape) > math.prod(eqn.invars[0].aval.shape):
        x = changed(x, spread=True)
    return None if x is None else _with_axes(x, layouts.broadcast(x.axes, dimensions, shape), shape, to)


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
        return changed(x, axes=axes, batch=x.batch | set(taken))
    return changed(x, axes=axes)


def pad(walk: Walk, eqn: Any, values: list[Value]) -> Value:
    """Entries added around an array."""
    x, shape = values[0], eqn.outvars[0].aval.shape
    if x is None:
        return values[1]
    axes = tuple(a if layouts.size(a) == n else (Atom(None, n),) for a, n in zip(x.axes, shape, strict=True))
    return _with_axes(x, axes, shape, {k: (k,) for k in range(len(shape))})


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
        return changed(flows[0], axes=layouts.added(shape))
    for x in flows:
        walk.close(x)
    return walk.input(shape, flows)


def _side_by_side(walk: Walk, views: list[View], axis: int, shape: Sequence[int]) -> View:
    """Parameters joined along an axis: those of equal shape are used alike from here on."""
    first = views[0]
    sizes = [[layouts.size(atoms) for atoms in view.axes] for view in views]
    if all(size == sizes[0] for size in sizes):
        axes = (*first.axes[:axis], (Atom(None, len(views)), *first.axes[axis]), *first.axes[axis + 1 :])
        return changed(first, axes=axes, companions=tuple(view.parameter for view in views[1:]))
    for view in views[1:]:
        if view.parameter != first.parameter:
            walk.note(Use(view.parameter, "factor", batch=tuple(sorted(view.batch)), steps=view.steps))
    return changed(first, axes=layouts.added(shape))
