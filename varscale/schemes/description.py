"""What a law says of the weights of a leaf: mean, standard deviation and distribution, piece by piece."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from varscale.initializers.combinators import Fused, Scaled
from varscale.initializers.fixed import CutNormal, Normal, SymmetricUniform, TruncatedNormal
from varscale.initializers.scaling import VarianceScaling
from varscale.initializers.structured import Constant, Orthogonal
from varscale.schemes.laws import Declared, Graded, Interleaved, OrthogonalOver


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A block of a leaf whose weights follow one law.

    Attributes:
        index: where the block lies in the leaf.
        uniformed: of a law that is a function of uniform numbers: from weights to these; None for any other.
        opened: the shape that the leaf is to be given before it is indexed; () for its own.
        mean: of each weight; an array that broadcasts to the block.
        std: of each weight, likewise; None where the law does not tell.
        distribution: "normal", "truncated_normal", "uniform", "rademacher", "constant", "orthogonal", "cut_normal";
            "" where it is none of these.
        cut: of "cut_normal", where it is cut, in standard deviations of the normal before the cut.
        in_axes: axes that an orthogonal map sums over.
        out_axes: axes of its output.
    """

    index: tuple[slice, ...]
    mean: np.ndarray
    std: np.ndarray | None
    distribution: str = ""
    cut: float = math.inf
    in_axes: tuple[int, ...] = ()
    out_axes: tuple[int, ...] = ()
    opened: tuple[int, ...] = ()
    uniformed: Callable[[np.ndarray], np.ndarray] | None = None

    def of(self, leaf: np.ndarray) -> np.ndarray:
        """The block of a leaf."""
        return (leaf.reshape(self.opened) if self.opened else leaf)[self.index]

    def times(self, factor: np.ndarray) -> Piece:
        """The same block times a number, or an array that broadcasts to the leaf."""
        part = factor[tuple(s if n != 1 else slice(None) for s, n in zip(self.index, factor.shape, strict=True))]
        std = None if self.std is None else self.std * np.abs(part)
        return dataclasses.replace(self, mean=self.mean * part, std=std)


def pieces(law: Any, shape: tuple[int, ...]) -> tuple[Piece, ...]:
    """The blocks of a leaf of this shape under a law; one without a standard deviation where nothing is known of it."""
    if isinstance(law, Fused):
        return tuple(_fused(law, shape))
    if isinstance(law, Scaled):
        return tuple(piece.times(np.full([1] * len(piece.index), law.factor)) for piece in pieces(law.init, shape))
    if isinstance(law, Graded):
        return tuple(piece.times(_fitted(law.spread(shape), piece, shape)) for piece in pieces(law.init, shape))
    if isinstance(law, Interleaved):
        opened = law.opened(shape)
        return tuple(dataclasses.replace(piece, opened=opened) for piece in pieces(law.inner, opened))
    whole = tuple(slice(0, n) for n in shape)
    return (_piece(law, shape, whole),)


def _fitted(factor: np.ndarray, piece: Piece, shape: tuple[int, ...]) -> np.ndarray:
    """A factor of the leaf's axes with those of the opened leaf."""
    return np.broadcast_to(factor, shape).reshape(piece.opened) if piece.opened else factor


def _fused(law: Fused, shape: tuple[int, ...]) -> Any:
    axis, start = law.axis % len(shape), 0
    for init, size in law._laws(shape):
        block = (*shape[:axis], size, *shape[axis + 1 :])
        for piece in pieces(Declared() if init is None else init, block):
            moved = slice(piece.index[axis].start + start, piece.index[axis].stop + start)
            yield dataclasses.replace(piece, index=(*piece.index[:axis], moved, *piece.index[axis + 1 :]))
        start += size


def _piece(law: Any, shape: tuple[int, ...], whole: tuple[slice, ...]) -> Piece:
    def random(std: float, distribution: str, **more: Any) -> Piece:
        return Piece(whole, np.zeros([1] * len(shape)), np.full([1] * len(shape), std), distribution, **more)

    if isinstance(law, Constant):
        value = np.asarray(law.value, np.float64 if not np.iscomplexobj(np.asarray(law.value)) else np.complex128)
        return Piece(
            whole, value.reshape([1] * (len(shape) - value.ndim) + list(value.shape)), np.zeros([1] * len(shape)), "constant"
        )
    if isinstance(law, Normal):
        return random(law.stddev, "normal")
    if isinstance(law, TruncatedNormal):
        return random(law.stddev, "truncated_normal") if law.upper == 2 else random(law.stddev, "cut_normal", cut=law.upper)
    if isinstance(law, CutNormal):
        return random(math.sqrt(law.variance()), "cut_normal", cut=law.cut / law.stddev)
    if isinstance(law, SymmetricUniform):
        return random(law.bound / math.sqrt(3), "uniform")
    if isinstance(law, VarianceScaling):
        return random(math.sqrt(law.variance(shape)), law.distribution)
    if isinstance(law, OrthogonalOver):
        std = law.scale / math.sqrt(max(law.sizes(shape)))
        return random(std, "orthogonal", in_axes=law.in_axes, out_axes=law.out_axes)
    if type(law) is Orthogonal:
        column = law.column_axis % len(shape)
        rows = tuple(axis for axis in range(len(shape)) if axis != column)
        std = law.scale / math.sqrt(max(shape[column], math.prod(shape) // shape[column]))
        return random(std, "orthogonal", in_axes=rows, out_axes=(column,))
    return Piece(whole, np.zeros([1] * len(shape)), None, uniformed=getattr(law, "uniformed", None))


def root_mean_square(law: Any, shape: tuple[int, ...]) -> float | None:
    """√E[w²] over the whole leaf; None where the law does not tell."""
    return _pooled(law, shape, centred=False)


def standard_deviation(law: Any, shape: tuple[int, ...]) -> float | None:
    """The standard deviation pooled over the whole leaf; None where the law does not tell."""
    return _pooled(law, shape, centred=True)


def _pooled(law: Any, shape: tuple[int, ...], *, centred: bool) -> float | None:
    total = 0.0
    for piece in pieces(law, shape):
        if piece.std is None:
            return None
        size = math.prod(s.stop - s.start for s in piece.index)
        square = np.square(piece.std) + (0.0 if centred else np.square(np.abs(piece.mean)))
        total += size * float(np.mean(square))
    return math.sqrt(total / max(1, math.prod(shape)))
