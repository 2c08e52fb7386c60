"""The domain: means and second moments of a random array by the types of its index pairs; estimated from data, sampled from."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from varscale.theory.domain.axes import Axes, apply_axis, equal, outer, over_classes, replaced, without_equal
from varscale.theory.domain.axis_maps import class_shares, lift_types, split_axis

Positions = Sequence[Int[np.ndarray, " kept"]]
NEGLIGIBLE = 1e-3  # relative size of an effect that is left out
# Relative errors of what is not derived, set on the validation grid (`experiments/benchmarks/accuracy.py`):
# what a next order adds, what is known to leading order, what is known roughly, what is known to a factor.
NEXT_ORDER, LEADING_ORDER, ROUGH, LOOSE = 0.05, 0.15, 0.3, 0.5


@dataclass(frozen=True)
class Moments:
    """Moments of an input, in place of an array.

    Attributes:
        mean: E[x].
        second_moment: E[x²], at least mean².
        shape: shape of the input.
        dtype: its dtype.
        sample_correlation: E[x x'] / E[x²] for one feature in two samples (first axis); by default independent,
            mean²/second_moment.
        position_correlation: likewise for one feature at two different positions (axes between the first and the last) of a
            sample. Two positions of two samples have the product of both correlations about the mean.
    """

    mean: float = 0.0
    second_moment: float = 1.0
    shape: tuple[int, ...] = ()
    dtype: Any = np.float32
    sample_correlation: float | None = None
    position_correlation: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        mean, second, square = self.mean, self.second_moment, self.mean**2
        if not (math.isfinite(mean) and math.isfinite(second)):
            raise ValueError(f"mean and second_moment must be finite, not {mean!r} and {second!r}")
        if second < square * (1 - 1e-12):
            raise ValueError(f"second_moment must be at least mean² = {square!r}, not {second!r}")
        if self.position_correlation is not None and self.shape and len(self.shape) < 3:
            raise ValueError(
                f"position_correlation={self.position_correlation!r} is about axes between the first "
                f"and the last: shape must have 3 or more, not {self.shape}"
            )
        for name, axes in self._shared().items():
            value, count = getattr(self, name), math.prod(axes)
            # Numbers that share one correlation can have none below −1/(count − 1) about their mean.
            least = max(-1.0, (square - (second - square) / max(count - 1, 1)) / max(second, 1e-300))
            if value is not None and not least - 1e-9 <= value <= 1 + 1e-9:
                raise ValueError(
                    f"{name} of {count} entries with mean {mean!r} and second_moment {second!r} must lie in "
                    f"[{least:.6g}, 1], not {value!r}: no random numbers have such moments"
                )

    def _shared(self) -> dict[str, tuple[int, ...]]:
        """The sizes of the axes that each correlation is about."""
        return {"sample_correlation": self.shape[:1], "position_correlation": self.shape[1:-1]}

    def second(self) -> np.ndarray:
        """E[x_i x_j] by which axes agree, 0 for "same" and 1 for "different": shape (2,) * (axes of more than one entry)."""
        square, correlation = float(self.mean) ** 2, np.ones(())
        variance = float(self.second_moment) - square
        for name, axes in (*self._shared().items(), ("features", self.shape[1:][-1:])):
            value = getattr(self, name, None)  # none where it is not given, and of features
            about_mean = 0.0 if value is None else value * self.second_moment - square
            apart = np.full((2,) * len(axes), about_mean / max(variance, 1e-300))
            apart[(0,) * len(axes)] = 1.0
            correlation = np.multiply.outer(correlation, apart)
        return (square + variance * correlation)[tuple(slice(None) if n != 1 else 0 for n in self.shape)]


@dataclass(frozen=True, eq=False)
class Table:
    """Moments of an array: `diagonal` is E[x_i²] by class, `outer` E[x_i] E[x_j] by type, `covariance` E[x_i x_j] less that."""

    axes: Axes
    mean: np.ndarray  # E[x_i] by class, (C₁, ..., C_k)
    second: np.ndarray  # E[x_i x_j] by type of index pair, (types₁, ..., types_k)

    @cached_property
    def total_mean(self) -> float:
        return float(over_classes(self.mean, self.axes))

    @cached_property
    def mean_square(self) -> float:
        return float(over_classes(self.diagonal, self.axes))

    @cached_property
    def divisor(self) -> float:
        """The mean square, for what is relative to it: never 0, nor is its square."""
        return max(self.mean_square, 1e-150)

    @cached_property
    def variance(self) -> float:
        return max(self.mean_square - self.total_mean * self.total_mean, 0.0)

    @cached_property
    def diagonal(self) -> np.ndarray:
        return self.second[equal(self.axes)]

    @cached_property
    def outer(self) -> np.ndarray:
        return means_by_type(self.mean, self.axes)

    @cached_property
    def covariance(self) -> np.ndarray:
        return self.second - self.outer


def means_by_type(mean: np.ndarray, axes: Axes, other: np.ndarray | None = None) -> np.ndarray:
    """E[x_i] E[y_j] by type (1 long where there is one class), y = x by default."""
    return by_type(mean, axes, second=False) * by_type(mean if other is None else other, axes, second=True)


def table_over(axes: Axes, mean: np.ndarray | float, second: np.ndarray | float) -> Table:
    """The table of means by class and second moments by type, 1 long (or one number) where they are constant."""
    full = np.broadcast_to(mean, [a.classes for a in axes]), np.broadcast_to(second, [a.types for a in axes])
    return Table(tuple(axes), *(np.array(x, float) for x in full))


def independent(mean: float, second_moment: float, axes: Axes) -> Table:
    """Independent entries with one mean and second moment."""
    table = table_over(axes, mean, mean * mean)
    table.second[equal(axes)] = second_moment
    return table


def lift(array: np.ndarray, axes: Axes, bind: Sequence[int], frame: Axes, *, pairs: bool) -> np.ndarray:
    """A class (with `pairs` a type) array over axes at the places `bind` of a frame, read over that: 1 long at other places."""
    if tuple(bind) == tuple(range(len(frame))) and tuple(axes) == tuple(frame):
        return array
    for k, (old, place) in enumerate(zip(axes, bind, strict=True)):
        new = frame[place]
        if old.labels != new.labels:
            array = apply_axis(array, k, lift_types(new, old) if pairs else class_shares(new, old))
    return over_frame(array, bind, len(frame))


def over_frame(array: np.ndarray, bind: Sequence[int], rank: int) -> np.ndarray:
    """Axis k of an array at place bind[k] of a frame, 1 long at its other places; further axes stay last."""
    shape = [1] * rank
    for place, n in zip(bind, array.shape, strict=False):
        shape[place] = n
    order = [*sorted(range(len(bind)), key=bind.__getitem__), *range(len(bind), array.ndim)]
    return array.transpose(order).reshape([*shape, *array.shape[len(bind) :]])


def regrouped(
    array: np.ndarray, axes: Axes, out: Axes, k: int, sizes: tuple[int, ...], *, pairs: bool
) -> np.ndarray:
    """A class (with `pairs` a type) array over `axes`, read over `out`: one has row-major factors of axis k of the other."""
    whole = min(axes, out, key=len)
    factors = split_axis(whole[k], sizes)
    finest, places = replaced(whole, k, *factors.axes), factors.types if pairs else factors.classes
    if whole is axes:
        return lift(np.take(array, places, axis=k), finest, range(len(out)), out, pairs=pairs)
    shape = [axis.types if pairs else axis.classes for axis in axes]
    fine = lift(np.broadcast_to(array, shape), axes, range(len(axes)), finest, pairs=pairs)
    matrix = np.zeros((whole[k].types if pairs else whole[k].classes, places.size))
    number = outer(axis.pairs if pairs else axis.counts for axis in factors.axes)
    matrix[places.ravel(), np.arange(places.size)] = number.ravel()
    matrix /= np.maximum(matrix.sum(axis=1, keepdims=True), 1e-300)
    return apply_axis(fine.reshape(*fine.shape[:k], -1, *fine.shape[k + len(sizes) :]), k, matrix)


def full_types(array: np.ndarray, frame: Axes) -> np.ndarray:
    """Broadcast to every type of the frame."""
    shape = tuple([axis.types for axis in frame])
    return array if array.shape == shape else np.broadcast_to(array, shape)


def estimate(values: np.ndarray, axes: Axes) -> Table:
    """Moments of one real array, or of several draws, (draws, ...), its entries pooled by class and by type."""
    x = np.asarray(values, float).reshape([-1, *(axis.size for axis in axes)])
    mean = x.mean(axis=0)
    for k, axis in enumerate(axes):
        mean = apply_axis(mean, k, axis.members / axis.counts[:, None])
    return Table(tuple(axes), mean, estimated_products(x, x, axes).mean(axis=0))


def estimated_products(x: np.ndarray, y: np.ndarray, axes: Axes) -> Float[np.ndarray, "draws ..."]:
    """E[x_i y_j] by type, pooled over the pairs of positions of each, draw by draw (along the first axis)."""

    def sums(x: np.ndarray, y: np.ndarray, k: int) -> np.ndarray:
        """From axis k on, over the positions of each class, and over all pairs of positions of each pair of classes."""
        if k == len(axes):
            return x * y
        axis, at = axes[k], x.ndim - len(axes) + k
        same = apply_axis(sums(x, y, k + 1), at, axis.members)
        mine, theirs = (apply_axis(z, at, axis.members) for z in (x, y))
        pairs = sums(np.expand_dims(mine, at + 1), np.expand_dims(theirs, at), k + 1)
        pairs = pairs.reshape(*same.shape[:at], -1, *same.shape[at + 1 :])
        return np.concatenate([same, pairs], axis=at)

    return per_pair(sums(x, y, 0), axes)


def per_pair(sums: np.ndarray, axes: Axes) -> np.ndarray:
    """Means by type (of the last axes) from sums over pairs of positions, those that differ counted with those that agree."""
    for k, axis in enumerate(axes, sums.ndim - len(axes)):
        s, c = np.moveaxis(sums, k, 0), axis.classes
        without_equal(s, c)
        s /= np.maximum(axis.pairs, 1.0).reshape(-1, *[1] * (sums.ndim - 1))
        alone = np.flatnonzero(axis.pairs == 0)  # a class of one position has no pair that differs
        s[alone] = s[(alone - c) // (c + 1)]
    return sums


def by_type(x: np.ndarray, axes: Axes, *, second: bool) -> np.ndarray:
    """A class array (classes..., rest) read at i (or, with `second`, at j) of each type."""
    for k, axis in enumerate(axes):
        if x.shape[k] > 1:
            x = np.take(x, axis.second if second else axis.first, axis=k)
    return x


def gaussian(
    covariance: np.ndarray, axes: Axes, positions: Positions, replicates: int, rng: np.random.Generator
) -> Float[np.ndarray, "replicates ..."]:
    """Zero-mean Gaussian arrays of a given covariance by type, at some positions of its axes: crossed random effects.

    For every set of axes one effect, drawn anew at each of their positions; along the others one correlated value a class.
    Moments by type may be those of no Gaussian array (averages over classes that were merged): the variances are kept.
    """
    labels = [axis.label_array[kept] for axis, kept in zip(axes, positions, strict=True)]
    rank, out = len(axes), np.zeros((replicates, *map(len, positions)))
    variance = full_types(covariance, axes)[equal(axes)]
    drawn = np.zeros(variance.shape)
    for own in itertools.product((True, False), repeat=rank):
        part, shape, places = covariance, list[int](), list[int]()
        for k, (axis, anew) in enumerate(zip(axes, own, strict=True)):
            same, different = np.split(part, [axis.classes], axis=k)
            alike = np.arange(axis.classes) * (axis.classes + 1)
            part = same - np.take(different, alike, axis=k) if anew else different
            shape += [axis.classes] * (1 if anew else 2)
            places += [k] if anew else [k, rank + k]
        if np.max(np.abs(part)) <= 1e-14:
            continue
        mine, others = ([k for k, anew in enumerate(own) if anew is which] for which in (True, False))
        square = np.einsum(part.reshape(shape), places, [*mine, *others, *(rank + k for k in others)])
        each, classes = square.shape[: len(mine)], [axes[k].classes for k in others]
        matrix = square.reshape(*each, math.prod(classes), -1)
        values, vectors = np.linalg.eigh((matrix + np.swapaxes(matrix, -1, -2)) / 2)
        factor = vectors * np.sqrt(np.maximum(values, 0.0))[..., None, :]
        factor = factor.reshape(*each, *classes, -1)
        drawn += (factor**2).sum(axis=-1).transpose(np.argsort([*mine, *others]))
        factor = factor[np.ix_(*[labels[k] for k in mine])]
        noise = rng.standard_normal((replicates, *factor.shape[: len(mine)], factor.shape[-1]))
        ahead, behind = [rank, *mine, rank + 1], [*mine, *others, rank + 1]
        effect = np.einsum(noise, ahead, factor, behind, [rank, *range(rank)])  # pyright: ignore
        at = (np.arange(len(x)) if anew else x for x, anew in zip(labels, own, strict=True))
        out += effect[np.ix_(np.arange(replicates), *at)]
    return out * np.sqrt(np.maximum(variance, 0.0) / np.maximum(drawn, 1e-300))[np.ix_(*labels)]
