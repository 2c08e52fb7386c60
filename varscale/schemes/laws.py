"""Laws of whole leaves that the initializers of single kernels do not have: per layer, over named axes, or the model's own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact, Key

from varscale.initializers.combinators import Fused
from varscale.initializers.initializer import Initializer, checked_number, settle
from varscale.initializers.sampling import OutSharding, placed
from varscale.initializers.structured import Orthogonal

Law = Callable[..., Any]


@dataclasses.dataclass(frozen=True, repr=False)
class Declared(Initializer):
    """The law that the model itself declares: a plan with it leaves the leaf alone. Made by `declared`.

    Attributes:
        words: the operations of the declared initializer, where the model's init was traced.
    """

    maker: ClassVar[str] = "declared"

    words: str = ""

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        raise ValueError("a declared law draws nothing by itself: give the plan to vs.initialize, which asks the model's init")


def declared(words: str = "") -> Declared:
    """The law that the model itself declares."""
    return Declared(words)


@dataclasses.dataclass(frozen=True, repr=False)
class Graded(Initializer):
    """An initializer times one factor an entry of an axis: layers stacked in one leaf. Made by `graded`."""

    maker: ClassVar[str] = "graded"

    init: Initializer
    factors: tuple[float, ...]
    axis: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.init, Initializer):
            raise TypeError(f"init must be an initializer of varscale, not {self.init!r}")
        if not self.factors:
            raise ValueError("factors must hold a number for each entry of the axis, not none")
        settle(self, factors=tuple(checked_number("factors", x) for x in self.factors))

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if not -len(shape) <= self.axis < len(shape) or shape[self.axis] != len(self.factors):
            raise ValueError(
                f"factors must be one for each entry of axis {self.axis} of shape {shape}, not {len(self.factors)}"
            )
        self.init._check_shape(shape)

    def spread(self, shape: Sequence[int]) -> np.ndarray:
        """The factors, with as many axes as the shape."""
        axes = [1] * len(shape)
        axes[self.axis] = len(self.factors)
        return np.asarray(self.factors).reshape(axes)

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        factors = self.spread(shape).astype(dtype)
        return placed(lambda key: self.init(key, shape, dtype) * factors, key, out_sharding)


def graded(init: Initializer, factors: Sequence[float], axis: int = 0) -> Graded:
    """The weights of init times a factor for each entry of an axis: the depth-dependent laws of layers stacked in one leaf.

    Args:
        init: an initializer of this package, for the whole leaf.
        factors: one finite number for each entry of the axis.
        axis: along which the layers are stacked.

    Raises:
        TypeError: init is no initializer of this package.
        ValueError: a factor is not finite; when called: the axis has another length.

    >>> import jax
    >>> from varscale.initializers import normal
    >>> layers = graded(normal(1.0), (1.0, 0.5))(jax.random.key(0), (2, 100, 100))
    >>> [round(float(layer.std()), 1) for layer in layers]
    [1.0, 0.5]
    """
    return Graded(init, tuple(factors), axis)


@dataclasses.dataclass(frozen=True, repr=False)
class Interleaved(Initializer):
    """Parts packed along an axis again and again, one group after the other. Made by `interleaved`."""

    maker: ClassVar[str] = "interleaved"

    init: tuple[Initializer, ...]
    groups: int
    axis: int

    def __post_init__(self) -> None:
        if len(self.init) < 2 or not all(isinstance(init, Initializer) for init in self.init):
            raise TypeError(f"init must be two or more initializers of varscale, not {self.init!r}")

    def opened(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape with its axis cut into groups and what one group holds."""
        return (*shape[: self.axis], self.groups, shape[self.axis] // self.groups, *shape[self.axis + 1 :])

    @property
    def inner(self) -> Fused:
        """The law of the opened array."""
        return Fused(self.init, len(self.init), self.axis + 1)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if not 0 <= self.axis < len(shape) or shape[self.axis] % (self.groups * len(self.init)):
            raise ValueError(f"{self.groups} groups of {len(self.init)} parts must fill axis {self.axis} of shape {shape}")

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        return placed(lambda key: self.inner(key, self.opened(shape), dtype).reshape(shape), key, out_sharding)


def interleaved(init: Sequence[Initializer], groups: int, axis: int) -> Interleaved:
    """Kernels packed head by head: query, key and value of the first head, of the second, and so on, as Megatron packs them.

    Args:
        init: one initializer a part, whose law does not depend on the shape.
        groups: how often the parts come again along the axis: the number of heads.
        axis: along which they are packed, ≥ 0.

    Raises:
        TypeError: there are fewer than two parts, or one is no initializer of this package.
        ValueError: when called: the parts do not fill the axis.

    >>> import jax
    >>> from varscale.initializers import ones, zeros
    >>> interleaved((ones, zeros), 2, 0)(jax.random.key(0), (4,)).tolist()
    [1.0, 0.0, 1.0, 0.0]
    """
    return Interleaved(tuple(init), groups, axis)


@dataclasses.dataclass(frozen=True, repr=False)
class OrthogonalOver(Initializer):
    """Orthogonal maps between named groups of axes, one for each entry of the others. Made by `orthogonal_over`."""

    maker: ClassVar[str] = "orthogonal_over"

    scale: float
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]

    def __post_init__(self) -> None:
        settle(self, scale=checked_number("scale", self.scale, above=0.0))
        axes = (*self.in_axes, *self.out_axes)
        if not self.in_axes or not self.out_axes or len(set(axes)) < len(axes) or min(axes) < 0:
            raise ValueError(f"in_axes and out_axes must be different axes ≥ 0, not {self.in_axes} and {self.out_axes}")

    def batch_axes(self, rank: int) -> tuple[int, ...]:
        """The axes over which independent maps are stacked."""
        return tuple(axis for axis in range(rank) if axis not in (*self.in_axes, *self.out_axes))

    def sizes(self, shape: Sequence[int]) -> tuple[int, int]:
        """Inputs and outputs of one map."""
        return math.prod(shape[a] for a in self.in_axes), math.prod(shape[a] for a in self.out_axes)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if max(*self.in_axes, *self.out_axes) >= len(shape):
            raise ValueError(f"axes {self.in_axes} and {self.out_axes} must lie in shape {shape}")

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        batch = self.batch_axes(len(shape))
        order = (*batch, *self.in_axes, *self.out_axes)
        one = Orthogonal(self.scale)

        def draw(key: Key[Array, ""]) -> Inexact[Array, "*shape"]:
            keys = jax.random.split(key, math.prod(shape[a] for a in batch))
            maps = jax.vmap(lambda k: one(k, self.sizes(shape), dtype))(keys)
            return jnp.transpose(maps.reshape([shape[a] for a in order]), np.argsort(order).tolist())

        return placed(draw, key, out_sharding)


def orthogonal_over(scale: float, in_axes: Sequence[int], out_axes: Sequence[int]) -> OrthogonalOver:
    """Orthogonal maps from some axes of a leaf to others, with `scale` times orthonormal rows or columns, whichever are fewer.

    The axes that are in neither stack independent maps: layers, experts, heads with kernels of their own.

    Args:
        scale: the norm of each row or column, finite and positive.
        in_axes: axes that a map sums over, ≥ 0.
        out_axes: axes of its output, ≥ 0.

    Raises:
        ValueError: the scale is not positive, or the axes are none, negative or repeated; when called: out of range.

    >>> import jax, numpy as np
    >>> w = orthogonal_over(1.0, (1,), (2,))(jax.random.key(0), (5, 8, 3))  # five maps from 8 to 3
    >>> bool(np.allclose(w[4].T @ w[4], np.eye(3), atol=1e-5))
    True
    """
    return OrthogonalOver(scale, tuple(in_axes), tuple(out_axes))
