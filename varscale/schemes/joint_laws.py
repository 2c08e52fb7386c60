"""Laws of several leaves that are drawn together: each names the key that they share.

Two leaves whose laws have the same `shared` are drawn from one key, so that each can compute what the other draws.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact, Key

from varscale.initializers.combinators import Fused
from varscale.initializers.initializer import Initializer, checked_number, settle
from varscale.initializers.sampling import OutSharding, placed


@dataclasses.dataclass(frozen=True, repr=False)
class Factor(Initializer):
    """One factor of a random matrix near a multiple of the identity. Made by `factor`."""

    maker: ClassVar[str] = "factor"

    shared: str
    side: Literal["left", "right"]
    noise: float
    identity: float
    heads: int
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    tag: int = 0

    def __post_init__(self) -> None:
        if self.side not in ("left", "right"):
            raise ValueError(f"side must be 'left' or 'right', not {self.side!r}")
        settle(self, noise=checked_number("noise", self.noise), identity=checked_number("identity", self.identity))

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        width, rank = (math.prod(shape[a] for a in axes) for axes in (self.in_axes, self.out_axes))
        if self.writes:
            width, rank = rank, width
        if rank % self.heads or rank // self.heads > width:
            raise ValueError(
                f"shape {shape} must have {self.heads} heads of at most the stream's width {width}, not {rank} in all"
            )

    @property
    def writes(self) -> bool:
        """Whether it is the factor that writes the stream, which is transposed."""
        return self.tag == 1 and self.side == "right"

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        batch = tuple(axis for axis in range(len(shape)) if axis not in (*self.in_axes, *self.out_axes))
        order = (*batch, *self.in_axes, *self.out_axes)
        inputs, outputs = (math.prod(shape[a] for a in axes) for axes in (self.in_axes, self.out_axes))

        def one(key: Key[Array, ""]) -> Float[Array, "inputs outputs"]:
            width, rank = (outputs, inputs) if self.writes else (inputs, outputs)
            keys = jax.random.split(jax.random.fold_in(key, self.tag), self.heads)
            made = jax.vmap(lambda k: self._half(k, width, rank // self.heads, dtype))(keys)  # heads, width, rank a head
            joined = jnp.moveaxis(made, 0, 1).reshape(width, rank)
            return joined.T if self.writes else joined

        def draw(key: Key[Array, ""]) -> Inexact[Array, "*shape"]:
            maps = jax.vmap(one)(jax.random.split(key, math.prod(shape[a] for a in batch)))
            return jnp.transpose(maps.reshape([shape[a] for a in order]), np.argsort(order).tolist())

        return placed(draw, key, out_sharding)

    def _half(self, key: Key[Array, ""], width: int, rank: int, dtype: np.dtype) -> Float[Array, "width rank"]:
        """The left factor U √S of the best product of this rank, or the right one V √S."""
        noise = self.noise / math.sqrt(width) * jax.random.normal(key, (width, width), dtype)
        u, s, vt = jnp.linalg.svd(noise + self.identity * jnp.eye(width, dtype=dtype))
        root = jnp.sqrt(s[:rank])[None]
        return (u[:, :rank] if self.side == "left" else vt[:rank].T) * root


@dataclasses.dataclass(frozen=True, repr=False)
class Together(Fused):
    """Blocks along one axis that share the key of the leaf. Made by `together`."""

    maker: ClassVar[str] = "together"

    shared: str = ""

    def cut(self, weights: np.ndarray) -> list[tuple[Any, np.ndarray]]:
        """The law of each block, and the block."""
        laws = self._laws(weights.shape)
        ends = np.cumsum([size for _, size in laws])[:-1]
        return [(init, block) for (init, _), block in zip(laws, np.split(weights, ends, self.axis), strict=True)]

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        laws = [(init, self._block_shape(shape, size)) for init, size in self._laws(shape) if init is not None]
        return placed(
            lambda key: jnp.concatenate([init(key, block, dtype) for init, block in laws], axis=self.axis), key, out_sharding
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Ring(Initializer):
    """log(−log |λ|) for eigenvalues uniform on a ring, or log √(1 − |λ|²) of the same ones. Made by `ring`."""

    maker: ClassVar[str] = "ring"

    shared: str
    low: float
    high: float
    of: Literal["decay", "normalizer"] = "decay"

    def __post_init__(self) -> None:
        settle(self, low=checked_number("low", self.low, at_least=0.0), high=checked_number("high", self.high, at_least=0.0))
        if not self.low < self.high <= 1:
            raise ValueError(f"low and high must be 0 ≤ low < high ≤ 1, not {self.low} and {self.high}")

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        def draw(key: Key[Array, ""]) -> Inexact[Array, "*shape"]:
            u = jax.random.uniform(key, shape, dtype)  # the same for ν and for what normalises
            square = self.low**2 + u * (self.high**2 - self.low**2)
            square = jnp.clip(square, jnp.finfo(dtype).tiny, 1 - jnp.finfo(dtype).eps)
            return jnp.log(-jnp.log(square) / 2) if self.of == "decay" else jnp.log1p(-square) / 2

        return placed(draw, key, out_sharding)

    def uniformed(self, weights: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """The uniform numbers behind weights."""
        square = np.exp(-2 * np.exp(weights)) if self.of == "decay" else -np.expm1(2 * weights)
        return (square - self.low**2) / (self.high**2 - self.low**2)


@dataclasses.dataclass(frozen=True, repr=False)
class LogUniform(Initializer):
    """log u or, through the inverse of softplus, what softplus makes u, for log u uniform. Made by `log_uniform`."""

    maker: ClassVar[str] = "log_uniform"

    low: float
    high: float
    through: Literal["log", "softplus"] = "log"
    floor: float = 0.0

    def __post_init__(self) -> None:
        settle(self, low=checked_number("low", self.low, above=0.0), high=checked_number("high", self.high, above=0.0))
        if self.low > self.high:
            raise ValueError(f"low must be at most high, not {self.low} and {self.high}")

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        def draw(key: Key[Array, ""]) -> Inexact[Array, "*shape"]:
            log = math.log(self.low) + math.log(self.high / self.low) * jax.random.uniform(key, shape, dtype)
            if self.through == "log":
                return log
            u = jnp.maximum(jnp.exp(log), jnp.array(self.floor, dtype))
            return u + jnp.log(-jnp.expm1(-u))

        return placed(draw, key, out_sharding)

    def uniformed(self, weights: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """The uniform numbers behind weights, as far as none was cut at the floor."""
        log = weights if self.through == "log" else np.log(np.logaddexp(0.0, weights))
        return (log - math.log(self.low)) / math.log(self.high / self.low)


@dataclasses.dataclass(frozen=True, repr=False)
class LogOfUniform(Initializer):
    """± log u for u uniform between two numbers, plus a constant. Made by `log_of_uniform`."""

    maker: ClassVar[str] = "log_of_uniform"

    low: float
    high: float
    sign: int = 1
    shared: str = ""
    offset: float = 0.0

    def __post_init__(self) -> None:
        settle(self, low=checked_number("low", self.low, at_least=0.0), high=checked_number("high", self.high, above=0.0))
        if self.low >= self.high or self.sign not in (1, -1):
            raise ValueError(f"low must be below high and sign 1 or −1, not {self.low}, {self.high} and {self.sign}")

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        def draw(key: Key[Array, ""]) -> Inexact[Array, "*shape"]:
            u = self.low + (self.high - self.low) * jax.random.uniform(key, shape, dtype)
            return self.sign * jnp.log(jnp.maximum(u, jnp.finfo(dtype).tiny)) + jnp.array(self.offset, dtype)

        return placed(draw, key, out_sharding)

    def uniformed(self, weights: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """The uniform numbers behind weights."""
        return (np.exp(self.sign * (weights - self.offset)) - self.low) / (self.high - self.low)
