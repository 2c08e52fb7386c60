"""Initializers made of initializers: fused blocks, a factor, a mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Inexact, Key

from varscale.initializers.initializer import Initializer, checked_number, settle
from varscale.initializers.sampling import OutSharding, placed

AnyInitializer = Callable[..., Any]


def _checked_initializer(init: Any) -> AnyInitializer:
    if not callable(init):
        raise TypeError(f"init must be an initializer (key, shape, dtype) -> weights, not {init!r}")
    return init


@dataclasses.dataclass(frozen=True, repr=False)
class Fused(Initializer):
    """Blocks along one axis, each drawn as a kernel of its own. Made by `fused`."""

    maker: ClassVar[str] = "fused"

    init: AnyInitializer | tuple[AnyInitializer | None, ...]
    blocks: int | tuple[int, ...]
    axis: int = -1

    def __post_init__(self) -> None:
        for init in self.init if isinstance(self.init, tuple) else (self.init,):
            if init is not None or not isinstance(self.init, tuple):
                _checked_initializer(init)
        several = isinstance(self.blocks, Sequence) and not isinstance(self.blocks, (str, bytes))
        for size in self.blocks if several else (self.blocks,):  # pyright: ignore[reportGeneralTypeIssues]
            if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
                raise TypeError(f"blocks must be a number of blocks or a sequence of their sizes, not {self.blocks!r}")
            if size < 1:
                raise ValueError(f"blocks must be ≥ 1, not {self.blocks!r}")
        if several and not self.blocks:
            raise ValueError("blocks must name at least one size, not none")
        if isinstance(self.axis, bool) or not isinstance(self.axis, (int, np.integer)):
            raise TypeError(f"axis must be an integer, not {self.axis!r}")
        settle(self, blocks=tuple(map(int, self.blocks)) if several else int(self.blocks))  # pyright: ignore[reportArgumentType]
        count = len(self.blocks) if isinstance(self.blocks, tuple) else self.blocks
        if isinstance(self.init, tuple) and len(self.init) != count:
            raise ValueError(f"init must have one initializer for each of the {count} blocks, not {len(self.init)}")

    @property
    def keeps(self) -> bool:
        """Whether some blocks have no law here: they keep the one that the model declares."""
        return isinstance(self.init, tuple) and None in self.init

    def kept(self, shape: Sequence[int]) -> Bool[np.ndarray, "*shape"]:
        """Where weights of this shape keep the law that the model declares."""
        parts = [np.full(self._block_shape(tuple(shape), size), init is None) for init, size in self._laws(tuple(shape))]
        return np.concatenate(parts, axis=self.axis)

    def _laws(self, shape: tuple[int, ...]) -> list[tuple[AnyInitializer | None, int]]:
        """The law of each block, and its size."""
        sizes = self._sizes(shape)
        return list(zip(self.init if isinstance(self.init, tuple) else (self.init,) * len(sizes), sizes, strict=True))

    def _sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(f"axis must lie in [{-len(shape)}, {len(shape)}) for shape {shape}, not {self.axis}")
        whole = shape[self.axis]
        if isinstance(self.blocks, int):
            if whole % self.blocks:
                raise ValueError(f"blocks must divide axis {self.axis} of shape {shape}, but {self.blocks} does not")
            return (whole // self.blocks,) * self.blocks
        if sum(self.blocks) != whole:
            raise ValueError(f"blocks must add up to axis {self.axis} of shape {shape}, but {self.blocks} do not")
        return self.blocks

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        for init, size in dict.fromkeys(self._laws(shape)):
            if isinstance(init, Initializer):
                init._check_shape(self._block_shape(shape, size))

    def _block_shape(self, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
        position = self.axis % len(shape)
        return (*shape[:position], size, *shape[position + 1 :])

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        laws = self._laws(shape)

        def draw(key: Key[Array, ""]) -> Inexact[Array, "*shape"]:
            keys = jax.random.split(key, len(laws))
            blocks = [
                jnp.zeros(block, dtype) if init is None else init(keys[i], block, dtype)
                for i, (init, block) in enumerate((init, self._block_shape(shape, size)) for init, size in laws)
            ]
            return jnp.concatenate(blocks, axis=self.axis)

        return placed(draw, key, out_sharding)


def fused(init: AnyInitializer | Sequence[AnyInitializer | None], blocks: int | Sequence[int], axis: int = -1) -> Fused:
    """Kernels packed into one array, each with the fans of ITS OWN block: query, key and value, or a cell's gates.

    Drawn as one kernel, a packed QKV of mode "fan_avg", or packed orthogonal gates, have the variance of a layer that does
    not exist.

    Args:
        init: draws one block; any (key, shape, dtype) -> weights; or one initializer a block. In a scheme of `vs.initialize` a
            block without one (None) keeps the law that the model declares; drawn alone it is zero.
        blocks: how many equal blocks, or their sizes (grouped-query attention has unequal ones).
        axis: along which they are packed.

    Raises:
        TypeError: init is not callable, or blocks or axis not made of integers.
        ValueError: a block below 1, or not one initializer a block; when called: blocks that do not fill the axis, or an
            axis out of range.

    >>> from varscale.initializers import orthogonal
    >>> import jax
    >>> gates = fused(orthogonal(), 4)(jax.random.key(0), (16, 64))
    >>> round(float((gates[:, :16] ** 2).sum()), 3)  # one gate: 16 orthonormal rows
    16.0
    """
    laws = init if callable(init) or not isinstance(init, Sequence) else tuple(init)
    return Fused(laws, blocks if isinstance(blocks, int) or not isinstance(blocks, Sequence) else tuple(blocks), axis)


@dataclasses.dataclass(frozen=True, repr=False)
class Scaled(Initializer):
    """An initializer times a number. Made by `scaled`."""

    maker: ClassVar[str] = "scaled"

    init: AnyInitializer
    factor: float

    def __post_init__(self) -> None:
        _checked_initializer(self.init)
        settle(self, factor=checked_number("factor", self.factor))

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if isinstance(self.init, Initializer):
            self.init._check_shape(shape)

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        return placed(lambda key: self.init(key, shape, dtype) * jnp.array(self.factor, dtype), key, out_sharding)


def scaled(init: AnyInitializer, factor: float) -> Scaled:
    """The weights of init times factor, so factor² times their variance: residual depth, GPT-2's 1/√(2L), DeepNorm's β.

    Args:
        init: any (key, shape, dtype) -> weights.
        factor: a finite number.

    Raises:
        TypeError: init is not callable, or factor no number.
        ValueError: factor is not finite.

    >>> from varscale.initializers import normal
    >>> scaled(normal(0.02), (2 * 12) ** -0.5)  # GPT-2's residual projections, 12 blocks
    scaled(normal(stddev=0.02), 0.2041241452319315)
    """
    return Scaled(init, factor)


@dataclasses.dataclass(frozen=True, repr=False)
class Masked(Initializer):
    """An initializer with entries set to zero. Made by `masked`."""

    maker: ClassVar[str] = "masked"

    init: AnyInitializer
    mask: tuple[Any, ...]

    def __post_init__(self) -> None:
        _checked_initializer(self.init)
        try:
            values = np.asarray(self.mask)
        except ValueError as error:
            raise ValueError(f"mask must be a rectangular array of booleans, not {self.mask!r}") from error
        if values.dtype != bool and not (np.issubdtype(values.dtype, np.number) and np.isin(values, (0, 1)).all()):
            raise TypeError(f"mask must be made of booleans (or 0 and 1), not {self.mask!r}")

        def frozen(rows: Any) -> Any:
            return tuple(map(frozen, rows)) if isinstance(rows, list) else rows

        settle(self, mask=frozen(values.astype(bool).tolist()))

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        try:
            np.broadcast_to(np.asarray(self.mask), shape)
        except ValueError as error:
            raise ValueError(f"mask of shape {np.shape(self.mask)} must broadcast to shape {shape}") from error
        if isinstance(self.init, Initializer):
            self.init._check_shape(shape)

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        kept = np.broadcast_to(np.asarray(self.mask), shape)
        return placed(lambda key: jnp.where(kept, self.init(key, shape, dtype), jnp.zeros((), dtype)), key, out_sharding)


def masked(init: AnyInitializer, mask: Bool[np.ndarray, "..."] | Sequence[Any]) -> Masked:
    """The weights of init where mask is true, zero elsewhere: MADE, locally connected or pruned layers.

    The law then counts the entries that are left; give init `fans` of use, or `scaled(masked(...), 1/√share)`.

    Args:
        init: any (key, shape, dtype) -> weights.
        mask: booleans that broadcast to the weights' shape; kept as nested tuples, so that initializers stay hashable.

    Raises:
        TypeError: init is not callable, or mask is not made of booleans.
        ValueError: mask is ragged; when called: it does not broadcast to the shape.

    >>> import jax
    >>> from varscale.initializers import ones
    >>> masked(ones, np.tri(2, 3))(jax.random.key(0), (2, 3))
    Array([[1., 0., 0.],
           [1., 1., 0.]], dtype=float32)
    """
    return Masked(init, mask)  # pyright: ignore[reportArgumentType]
