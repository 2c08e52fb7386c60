"""Fans: how many terms each output and each gradient sums. A property of how a kernel is used, not of its shape."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

Axes = int | Sequence[int]
Mode = Literal["fan_in", "fan_out", "fan_avg", "fan_geo_avg"]
Padding = str | int | Sequence[int | tuple[int, int]]
MODES: tuple[str, ...] = get_args(Mode)


@dataclasses.dataclass(frozen=True)
class Fans:
    """The law's n, forward and backward: E[y²] = fan_in · Var[w] · E[x²] and E[g_x²] = fan_out · Var[w] · E[g_y²].

    Attributes:
        fan_in: terms summed into one output; fractional where borders or strides make it a mean.
        fan_out: terms summed into the gradient of one input.

    Raises:
        ValueError: a fan is negative, NaN or infinite.

    >>> Fans(fan_in=64, fan_out=256).of("fan_avg")
    160.0
    """

    fan_in: float
    fan_out: float

    def __post_init__(self) -> None:
        for name in ("fan_in", "fan_out"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
                raise TypeError(f"{name} must be a number, not {value!r}")
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and ≥ 0, not {value!r}")
            object.__setattr__(self, name, float(value))

    def of(self, mode: Mode) -> float:
        """The number by which `mode` divides: one of the fans, or their arithmetic or geometric mean.

        Raises:
            ValueError: unknown mode.
        """
        match mode:
            case "fan_in":
                return self.fan_in
            case "fan_out":
                return self.fan_out
            case "fan_avg":
                return (self.fan_in + self.fan_out) / 2
            case "fan_geo_avg":
                return (self.fan_in * self.fan_out) ** 0.5
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, not {mode!r}")


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a tuple of ints.

    Raises:
        TypeError: not a sequence of integers.
        ValueError: a size is negative.
    """
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError as error:
        raise TypeError(f"shape must be a sequence of integers, not {shape!r}") from error
    if any(size < 0 for size in sizes):
        raise ValueError(f"shape must have sizes ≥ 0, not {sizes}")
    return sizes


def normalized_axes(name: str, axes: Axes) -> int | tuple[int, ...]:
    """One integer, or a tuple of integers none of which is written twice.

    Raises:
        TypeError: anything else.
        ValueError: an axis is repeated.
    """
    if not isinstance(axes, (str, bytes)):
        try:
            if not isinstance(axes, Sequence):
                return operator.index(axes)
            several = tuple(operator.index(axis) for axis in axes)
        except TypeError:
            pass
        else:
            if len(set(several)) < len(several):
                raise ValueError(f"{name} must not repeat an axis, but is {axes!r}")
            return several
    raise TypeError(f"{name} must be an integer or a sequence of integers, not {axes!r}")


def _positions(name: str, axes: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    several = (axes,) if isinstance(axes, int) else axes
    for axis in several:
        if not -rank <= axis < rank:
            raise ValueError(f"{name} must lie in [{-rank}, {rank}) for a kernel of {rank} axes, but is {axes!r}")
    positions = tuple(axis % rank for axis in several)
    if len(set(positions)) < len(positions):
        raise ValueError(f"{name} must not repeat an axis, but {axes!r} does on {rank} axes")
    return positions


def compute_fans(shape: Sequence[int], in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = ()) -> Fans:
    """Fans of a kernel from its shape and the roles of its axes.

    Axes with no role are the receptive field (a convolution's spatial axes) and count for both fans; batch axes for neither.
    On two axes or more, in_axis and out_axis may share an axis, as flax's embedding idiom does (`in_axis=-2, out_axis=0`).

    Args:
        shape: the kernel's shape.
        in_axis: the axis or axes contracted with the input.
        out_axis: the axis or axes of the output.
        batch_axis: the axis or axes over which independent kernels are stacked, where the whole stack is ONE array of
            this shape. Inside nnx.vmap, nn.scan and the like an initializer is asked for one layer's shape: there, none.

    Returns:
        The fans: exactly the numbers of `jax.nn.initializers` where that accepts the call; a size of 0 gives fans of 0.

    Raises:
        TypeError: shape or an axis is not made of integers.
        ValueError: an axis is out of range or repeated, a size is negative, a batch axis has another role too, or the kernel
            has too few axes for the default roles.

    >>> compute_fans((3, 3, 16, 32))
    Fans(fan_in=144.0, fan_out=288.0)
    """
    sizes = checked_shape(shape)
    rank = len(sizes)
    if rank < 2 and normalized_axes("in_axis", in_axis) == -2:
        raise ValueError(
            f"in_axis must be given for a kernel of {rank} axes (shape {sizes}): the default roles, -2 in and -1 out, need two"
        )
    ins = _positions("in_axis", normalized_axes("in_axis", in_axis), rank)
    outs = _positions("out_axis", normalized_axes("out_axis", out_axis), rank)
    batch = _positions("batch_axis", normalized_axes("batch_axis", batch_axis), rank)
    if set(batch) & {*ins, *outs}:
        raise ValueError(
            f"batch_axis must not share an axis with in_axis or out_axis, but {batch_axis!r} does on shape {sizes}. Give "
            "batch_axis for a parameter that is stored and drawn as one stack, (layers, in, out); inside nnx.vmap, nnx.scan, "
            "nn.vmap, nn.scan and jax.vmap each layer draws its own (in, out): leave batch_axis out there"
        )
    if rank == 1 and ins == outs:
        raise ValueError("in_axis and out_axis must differ on one axis: give out_axis=() for a vector that is summed over")

    def size(axes: tuple[int, ...]) -> int:
        return math.prod(sizes[axis] for axis in axes)

    if 0 in sizes:
        return Fans(0.0, 0.0)
    receptive_field = math.prod(sizes) / size(ins) / size(outs) / size(batch)
    return Fans(size(ins) * receptive_field, size(outs) * receptive_field)


def einsum_fans(spec: str, kernel_shape: Sequence[int], operand: int = 1) -> Fans:
    """Fans of a kernel used in an einsum.

    A letter of the kernel that the output lacks is summed over: fan_in. One that only kernel and output have: fan_out. One
    that the other operands and the output have is a batch axis and counts for neither.

    Args:
        spec: as `jnp.einsum` takes it, ellipsis and implicit output included.
        kernel_shape: the kernel's shape.
        operand: which operand is the kernel.

    Returns:
        The fans.

    Raises:
        TypeError: spec is not a string, or the shape is not made of integers.
        ValueError: the spec cannot be read, has no such operand, does not fit the shape, or takes a diagonal of the kernel.

    >>> einsum_fans("abc,cde->abde", (64, 8, 16))  # flax's attention projection
    Fans(fan_in=64.0, fan_out=128.0)
    """
    if not isinstance(spec, str):
        raise TypeError(f"spec must be a string such as 'bi,io->bo', not {spec!r}")
    sizes = checked_shape(kernel_shape)
    text = spec.replace(" ", "").replace("...", ".")
    inputs, arrow, output = text.partition("->")
    operands = inputs.split(",")
    letters = text.replace("->", "").replace(",", "").replace(".", "")
    if not all(letter.isalpha() for letter in letters) or any(part.count(".") > 1 for part in (*operands, output)):
        raise ValueError(f"spec must hold letters, commas, '...' and one '->', not {spec!r}")
    if not (isinstance(operand, int) and -len(operands) <= operand < len(operands)):
        raise ValueError(f"operand must lie in [{-len(operands)}, {len(operands)}) for spec {spec!r}, not {operand!r}")
    if not arrow:
        # The implicit output: the ellipsis, then every letter that appears once.
        output = "." * ("." in inputs) + "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    kernel = operands.pop(operand)
    others = set("".join(operands))
    if any(kernel.count(letter) > 1 for letter in kernel):
        raise ValueError(f"spec must not take a diagonal of the kernel, as {kernel!r} in {spec!r} does")
    if any(letter not in others and letter not in kernel for letter in output):
        raise ValueError(f"spec must have every output letter in an operand, but {spec!r} has not")
    named = len(kernel.replace(".", ""))
    if len(sizes) != named and not ("." in kernel and len(sizes) > named):
        raise ValueError(f"kernel_shape must have the {named} axes of {kernel!r} in spec {spec!r}, but is {sizes}")
    # The ellipsis stands for however many axes are left over.
    expanded = kernel.replace(".", "." * (len(sizes) - named))
    fan_in = math.prod(size for letter, size in zip(expanded, sizes, strict=True) if letter not in output)
    only_here = (letter in output and letter not in others for letter in expanded)
    fan_out = math.prod(size for size, mine in zip(sizes, only_here, strict=True) if mine)
    # What is summed out of the input elsewhere does not concern the kernel; what the kernel alone sums repeats one input.
    alone = math.prod(
        size for letter, size in zip(expanded, sizes, strict=True) if letter not in output and letter not in others
    )
    return Fans(fan_in, fan_out * alone)


def conv_fans(
    kernel_shape: Sequence[int],
    *,
    groups: int = 1,
    strides: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    padding: Padding = "VALID",
    input_size: int | Sequence[int] | None = None,
    transposed: bool = False,
    transpose_kernel: bool = False,
) -> Fans:
    """Fans of a convolution kernel, from how it is used.

    With `input_size` the taps that meet real input are counted, so that borders (coverage), strides and what the last
    stride leaves over all enter: fan_in is their mean over outputs, fan_out their mean over inputs. Without it, they are
    what holds far from every border.

    Args:
        kernel_shape: flax's layout (*spatial, in_features / groups, out_features).
        groups: `feature_group_count`.
        strides: of the window; for a transposed convolution, of the output.
        dilation: of the kernel.
        padding: "VALID", "SAME", "SAME_LOWER", "CIRCULAR", "REFLECT" or "CAUSAL"; a number for every side; or a number or
            (low, high) pair an axis.
        input_size: the input's spatial sizes, without batch and features.
        transposed: a `ConvTranspose`.
        transpose_kernel: flax's option of that name: the kernel is stored as (*spatial, out_features, in_features).

    Returns:
        The fans.

    Raises:
        TypeError: a size is not an integer.
        ValueError: sizes below 1, groups that do not divide the outputs, an unknown padding, or a window that does not fit.

    >>> conv_fans((3, 3, 16, 32), padding="SAME", input_size=32).fan_in / (9 * 16)
    0.9587673611111112
    """
    *spatial, in_features, out_features = checked_shape(kernel_shape)
    if not spatial:
        raise ValueError(f"kernel_shape must have a spatial axis besides its two feature axes, but is {tuple(kernel_shape)}")
    if transpose_kernel:
        in_features, out_features = out_features, in_features
    rank = len(spatial)
    stride, dilate = _an_axis("strides", strides, rank), _an_axis("dilation", dilation, rank)
    (group_count,) = _an_axis("groups", groups, 1)
    if out_features % group_count:
        raise ValueError(f"groups must divide the {out_features} output features, but is {groups!r}")
    outputs_per_group = out_features // group_count
    if 0 in (*spatial, in_features, out_features):
        return Fans(0.0, 0.0)
    pads = _pads_an_axis(padding, rank)
    if input_size is None:
        window, skipped = math.prod(spatial), math.prod(stride)
        taps_in, taps_out = (window / skipped, window) if transposed else (window, window / skipped)
    else:
        sizes = _an_axis("input_size", input_size, rank)
        count = _taps_of_transposed if transposed else _taps
        per_axis = [count(*axis) for axis in zip(sizes, spatial, stride, dilate, pads, strict=True)]
        total = math.prod(taps for taps, _ in per_axis)
        taps_in, taps_out = total / math.prod(outputs for _, outputs in per_axis), total / math.prod(sizes)
    return Fans(taps_in * in_features, taps_out * outputs_per_group)


def _an_axis(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if any(isinstance(size, bool) or not isinstance(size, (int, np.integer)) for size in values):
        raise TypeError(f"{name} must be made of integers, not {value!r}")
    if len(values) != rank or any(size < 1 for size in values):
        raise ValueError(f"{name} must be one integer ≥ 1, or one for each of {rank} axes, not {value!r}")
    return tuple(int(size) for size in values)


def _pads_an_axis(padding: Padding, rank: int) -> list[str | tuple[int, int]]:
    named = ("VALID", "SAME", "SAME_LOWER", "CIRCULAR", "REFLECT", "CAUSAL")
    if isinstance(padding, str):
        if padding in named:
            return [padding] * rank
    elif isinstance(padding, (int, np.integer)):
        return [(int(padding), int(padding))] * rank
    elif isinstance(padding, Sequence) and len(padding) == rank:
        pairs = [(pad, pad) if isinstance(pad, int) else tuple(pad) for pad in padding]
        if all(len(pair) == 2 and all(isinstance(side, int) for side in pair) for pair in pairs):
            return pairs  # pyright: ignore[reportReturnType]
    raise ValueError(f"padding must be one of {named}, a number, or a number or pair for each of {rank} axes, not {padding!r}")


def _real_taps(size: int, kernel: int, stride: int, dilation: int, low: int, outputs: int, spacing: int) -> int:
    """Taps that land on real input, over all outputs along one axis; inputs stand `spacing` apart with zeros between."""
    where = np.arange(outputs)[:, None] * stride - low + np.arange(kernel) * dilation
    return int(((where >= 0) & (where <= (size - 1) * spacing) & (where % spacing == 0)).sum())


def _taps(size: int, kernel: int, stride: int, dilation: int, pad: str | tuple[int, int]) -> tuple[int, int]:
    """Taps on real input and number of outputs, along one axis of a convolution."""
    window = (kernel - 1) * dilation + 1
    around = -(-size // stride)
    match pad:
        case "CIRCULAR" | "REFLECT":
            # What is wrapped or mirrored is real input too.
            return around * kernel, around
        case "SAME" | "SAME_LOWER":
            missing = max((around - 1) * stride + window - size, 0)
            low = missing // 2 if pad == "SAME" else -(-missing // 2)
            high = missing - low
        case "CAUSAL":
            low, high = window - 1, 0
        case "VALID":
            low, high = 0, 0
        case (low, high):
            pass
        case _:
            raise AssertionError(pad)
    outputs = (size + low + high - window) // stride + 1
    if outputs < 1:
        raise ValueError(f"input_size must hold the window: {size} with padding ({low}, {high}) is less than {window}")
    return _real_taps(size, kernel, stride, dilation, low, outputs, 1), outputs


def _taps_of_transposed(size: int, kernel: int, stride: int, dilation: int, pad: str | tuple[int, int]) -> tuple[int, int]:
    """The same for `jax.lax.conv_transpose`: a convolution of stride 1 over inputs spread `stride` apart."""
    window = (kernel - 1) * dilation + 1
    spread = (size - 1) * stride + 1
    match pad:
        case "CIRCULAR":
            # flax wraps what a VALID transposed convolution spills over, so every tap lands in one of the outputs.
            return size * kernel, size * stride
        case "SAME":
            both = window + stride - 2
            low = window - 1 if stride > window - 1 else -(-both // 2)
            high = both - low
        case "VALID":
            low, high = window - 1, window - 1 + max(stride - window, 0)
        case (low, high):
            pass
        case _:
            raise ValueError(
                f"padding must be 'SAME', 'VALID', 'CIRCULAR' or numbers for a transposed convolution, not {pad!r}"
            )
    outputs = spread + low + high - window + 1
    if outputs < 1:
        raise ValueError(f"input_size must hold the window: {spread} with padding ({low}, {high}) is less than {window}")
    return _real_taps(size, kernel, 1, dilation, low, outputs, stride), outputs
