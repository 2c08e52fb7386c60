"""What the walk over a jaxpr notes: every use of a parameter, and every attention."""

from __future__ import annotations

import dataclasses

from varscale.usage.layouts import Axes
from varscale.usage.values import Part, Source


@dataclasses.dataclass
class Use:
    """One place where a parameter is used, as the walk fills it in.

    Attributes:
        parameter: the parameter's number.
        kind: "linear", "convolution", "depthwise", "lookup", "scale", "shift", "place", "token", "factor" or "other".
        fan_in: terms summed into an output.
        fan_out: outputs that an input reaches.
        reduction: axes of the parameter that are summed over.
        output: axes of the parameter that reach the output.
        batch: axes of the parameter that a loop over layers, or a lookup of one layer, takes apart.
        shared: axes of the parameter that its input or its reader has too: experts, heads with kernels of their own.
        steps: how often a loop over time repeats the use.
        depth: residual additions before it.
        before: functions applied to its input since the last linear map.
        raw: whether its input is the model's own.
        normalised: whether its input was normalised.
        after: functions first applied to its output.
        normalised_after: whether its output is normalised before anything else reads it.
        layout: which axes of the parameter the axes of its output hold.
        region: (axis, start, stop) of each axis of the parameter of which it uses only a slice; None where that is not known.
        place: the equations around it, by `id`, and its own.
        operand: which operand of that equation the parameter is, of a linear map.
        reads: numbers of the uses that its input depends on with no other linear map between.
        ends: which residual addition its output ends in, counted from 1.
        read: whether another parameter reads its output.
        reaches: whether its output is the model's, with no other linear map between.
        parts: the parts that its output is cut into: (start, stop, of) of its run.
        cut: axis of the parameter and stride of the run: entry j lies at j // stride % of in it.
        roles: what its parts are: an attention's "query", "key" and "value", a gated layer's "gate" and "up".
        anchor: the value that it makes or is a part of, by its anchor.
        branch: which of the residual branches it lies in.
        position: linear maps before it in its branch.
        stream: the residual stream that it reads, or that its output begins.
        begins: whether it was read before that stream's first addition, on the stream itself.
        maps: linear maps before it.
        input_scale: the constant that its input was multiplied by since the value before; None where it is not known.
        kernel_scale: likewise the parameter itself.
        output_scale: likewise its output, before anything else reads it.
        function_scale: likewise inside the first function of its output that a constant does not pass through.
        before_scale: likewise inside that of its input.
        normalised_kernel: whether the parameter was divided by something made of itself.
    """

    parameter: int
    kind: str
    fan_in: float = 1.0
    fan_out: float = 1.0
    reduction: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()
    steps: int = 1
    depth: int = 0
    before: frozenset[str] = frozenset()
    raw: bool = False
    normalised: bool = False
    after: frozenset[str] = frozenset()
    normalised_after: bool = False
    layout: Axes = ()
    region: tuple[tuple[int, int, int], ...] | None = ()
    place: tuple[int, ...] = ()
    operand: int = 1
    reads: frozenset[int] = frozenset()
    ends: int | None = None
    read: bool = False
    reaches: bool = False
    parts: set[Part] = dataclasses.field(default_factory=set)
    cut: tuple[int, int] | None = None
    roles: dict[Part | None, set[str]] = dataclasses.field(default_factory=dict)
    anchor: int = 0
    branch: int | None = None
    position: int = 0
    stream: int | None = None
    begins: bool = False
    maps: int = 0
    input_scale: float | None = 1.0
    kernel_scale: float | None = 1.0
    output_scale: float | None = 1.0
    function_scale: float | None = 1.0
    before_scale: float | None = 1.0
    normalised_kernel: bool = False


@dataclasses.dataclass(frozen=True)
class Attended:
    """A softmax over products of two activations.

    Attributes:
        query: what made the queries.
        terms: entries of a query, over which a score sums.
        scale: the constant between the sum and the softmax, those on queries and keys included; None where it is not known.
        row: the row of the products in a prediction.
        keys: over how many keys the softmax runs.
        after: the constant between the products and the softmax; None where it is not known.
    """

    query: frozenset[Source]
    terms: int
    scale: float | None
    row: str
    keys: int
    after: float | None
