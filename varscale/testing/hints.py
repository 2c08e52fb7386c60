"""From a wrong ratio to the mistake behind it: the factors by which people miss a variance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from varscale.initializers.distributions import TRUNCATED_STD
from varscale.initializers.fans import MODES, Mode, compute_fans

_MOST = 3  # hints shown
_TRUNCATED_VARIANCE = TRUNCATED_STD**2
_ONE_SIDED = math.sqrt(3) / 2  # mean over root mean square of uniform weights in [0, b)


@dataclass(frozen=True)
class KernelUse:
    """A claim of variance `scale/fan` as it was made.

    Attributes:
        shape: of the kernel.
        scale: the variance times the fan.
        mode: the fan.
        in_axis: axis or axes of the inputs.
        out_axis: axis or axes of the outputs.
        batch_axis: axis or axes that count for neither.
    """

    shape: tuple[int, ...]
    scale: float
    mode: Mode
    in_axis: int | Sequence[int]
    out_axis: int | Sequence[int]
    batch_axis: int | Sequence[int]

    @property
    def fan(self) -> float:
        """The number by which the claim divides."""
        return compute_fans(self.shape, self.in_axis, self.out_axis, self.batch_axis).of(self.mode)

    def axes(self, roles: int | Sequence[int]) -> set[int]:
        """Positions of the axes with a role."""
        return {axis % len(self.shape) for axis in ((roles,) if isinstance(roles, int) else roles)}

    @property
    def field(self) -> list[int]:
        """Sizes above 1 of the axes without a role: a receptive field, or what was taken for one."""
        named = self.axes(self.in_axis) | self.axes(self.out_axis) | self.axes(self.batch_axis)
        return [size for axis, size in enumerate(self.shape) if axis not in named and size > 1]


def variance_hints(interval: tuple[float, float], use: KernelUse | None) -> tuple[str, ...]:
    """Usual mistakes that multiply the variance by a number within an interval, each as a sentence that begins with it.

    Args:
        interval: the ratios of measured to claimed variance that the measurement leaves open.
        use: the claim, where it is one of scale over fan.
    """
    factors = [*(_of_the_fan(use) if use is not None else ()), *_of_the_law()]
    low, high = interval
    return tuple(dict.fromkeys(says for factor, says in factors if low <= factor <= high and abs(factor - 1) > 1e-9))[:_MOST]


def output_hints(interval: tuple[float, float], shape: Sequence[int]) -> tuple[str, ...]:
    """Usual mistakes that multiply a layer's E[y²] by a number within an interval, given the shape of its input."""

    def factors() -> Iterator[tuple[float, str]]:
        for axis, size in enumerate(shape):
            if size > 1:
                says = (
                    f"1/{size}: axis {axis} of x has {size}: a batch axis of the kernel is counted into its fan (einsum_fans)"
                )
                yield 1 / size, says
        for stride in (2, 3, 4):
            says = f"1/{stride**2} = 1/({stride}·{stride}): strides of a transposed convolution (conv_fans)"
            yield 1 / stride**2, says
        for window in (3, 5, 7):
            yield window**2, f"{window**2} = {window}·{window}: the receptive field is missing from the fan"
        yield from _of_the_law()

    low, high = interval
    return tuple(says for factor, says in factors() if low <= factor <= high)[:_MOST]


def mean_hints(mean: float, ratio: float, low_precision: str | None) -> tuple[str, ...]:
    """Why weights may have a mean.

    Args:
        mean: measured, in standard deviations of the claim.
        ratio: of the measured to the claimed second moment.
        low_precision: the name of the dtype of the weights where it has 16 bits or fewer.
    """
    if ratio > 0 and abs(abs(mean) / math.sqrt(ratio) - _ONE_SIDED) < 0.01:
        return ("uniform on one side of 0: draw in [−b, b)",)
    if low_precision is not None and abs(mean) < 0.1:
        return (f"sampled in {low_precision}, whose few values have a mean: draw in float32 and round once",)
    return ()


def _of_the_fan(use: KernelUse) -> Iterator[tuple[float, str]]:
    field = use.field
    if len(field) > 1:
        whole = "·".join(map(str, field))
        yield math.prod(field), f"{math.prod(field)} = {whole}: the receptive field is missing from the fan"
        yield 1 / math.prod(field), f"1/{math.prod(field)} = 1/({whole}): the receptive field is counted twice"
    for size in field:
        yield size, f"{size}: an axis of {size} is missing from the fan"
        yield 1 / size, f"1/{size}: an axis of {size} is counted twice; if it is no receptive field, name its role in the claim"
    for axis in sorted(use.axes(use.batch_axis)):
        size = use.shape[axis]
        if size > 1:
            yield 1 / size, f"1/{size}: the batch axis {axis} of {size} is counted into the fan"
    fans = compute_fans(use.shape, use.in_axis, use.out_axis, use.batch_axis)
    for mode in MODES:
        if fans.of(mode):  # pyright: ignore[reportArgumentType]
            says = f"divided by {mode} ({fans.of(mode):g}), not by {use.mode} ({use.fan:g})"  # pyright: ignore[reportArgumentType]
            yield use.fan / fans.of(mode), says  # pyright: ignore[reportArgumentType]
    variance = use.scale / use.fan
    if variance <= 0:
        return
    gain = math.sqrt(use.scale)
    if use.scale not in (1.0, 2.0):
        yield use.scale, f"{use.scale:.4g}: the scale is multiplied in twice, or a gain of {use.scale:.4g} is squared once more"
        yield 1 / use.scale, f"1/{use.scale:.4g}: the scale is missing"
    yield 1 / gain, f"1/√{use.scale:.4g}: the gain {gain:.4g} multiplies the variance; it multiplies the standard deviation"
    yield gain, f"√{use.scale:.4g}: the variance has the gain once too often"
    yield variance, f"{variance:.3g}: the variance is used as standard deviation; take its square root"
    yield variance**-0.5, f"{variance**-0.5:.4g}: the square root is taken twice"
    yield 1 / variance, f"{1 / variance:.4g}: the weights have variance 1: they are not scaled at all"
    yield variance**-2, f"{variance**-2:.4g}: the fraction is upside down, fan/scale in place of scale/fan"


def _of_the_law() -> Iterator[tuple[float, str]]:
    yield 2.0, "2: twice the claim, as He's 2/fan where LeCun's 1/fan is claimed"
    yield 0.5, "1/2: half the claim, as LeCun's 1/fan where He's 2/fan is claimed"
    yield (
        _TRUNCATED_VARIANCE,
        f"{_TRUNCATED_VARIANCE:.3f}: the truncation's constant: a normal cut at ±2σ has std {TRUNCATED_STD:.4f}σ; divide by it",
    )
    yield (
        1 / _TRUNCATED_VARIANCE,
        f"{1 / _TRUNCATED_VARIANCE:.3f}: divided by the truncation's constant {TRUNCATED_STD:.4f}, though nothing is truncated",
    )
    yield 1 / 3, "1/3: uniform in ±σ has variance σ²/3; the bound must be √3·σ"
    yield 3.0, "3: a uniform law's bound √3·σ is used as the standard deviation"
    yield 4.0, "4: the standard deviation is doubled"
    yield 0.25, "1/4: the standard deviation is halved"
