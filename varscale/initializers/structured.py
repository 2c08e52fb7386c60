"""Weights with structure: constants, orthogonal maps, identities through dense and convolution kernels, sparse columns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact, Key, Shaped, UInt32

from varscale.initializers.fans import checked_shape
from varscale.initializers.initializer import Initializer, checked_number, settle
from varscale.initializers.sampling import OutSharding, drawn, placed

Nested = bool | int | float | complex | tuple[Any, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class Constant(Initializer):
    """The same value everywhere, or an array of values broadcast to the shape. Made by `constant`."""

    maker: ClassVar[str] = "constant"

    value: Nested
    dtype: np.dtype | None = None

    def __post_init__(self) -> None:
        if isinstance(self.value, (str, bytes)) or not np.issubdtype(np.asarray(self.value).dtype, np.number):
            raise TypeError(f"value must be a number or an array of numbers, not {self.value!r}")

        def frozen(values: Any) -> Nested:
            return tuple(map(frozen, values)) if isinstance(values, list) else values

        settle(
            self,
            value=frozen(np.asarray(self.value).tolist()),
            dtype=None if self.dtype is None else jnp.dtype(self.dtype),
        )

    def __call__(
        self,
        key: Key[Array, ""] | UInt32[Array, "..."] | None,
        shape: Sequence[int],
        dtype: DTypeLike | None = None,
        out_sharding: OutSharding = None,
    ) -> Shaped[Array, "*shape"]:
        """The value, in any dtype, integers included; the key is ignored. See `Initializer.__call__`."""
        sizes = checked_shape(shape)
        resolved = jnp.dtype(dtype if dtype is not None else self.dtype if self.dtype is not None else jnp.result_type(float))
        if np.iscomplexobj(np.asarray(self.value)) and not jnp.issubdtype(resolved, jnp.complexfloating):
            raise TypeError(f"dtype must be complex for the complex value {self.value!r}, not {resolved.name}")
        try:
            np.broadcast_to(np.asarray(self.value), sizes)
        except ValueError as error:
            raise ValueError(f"value of shape {np.shape(self.value)} must broadcast to shape {sizes}") from error
        return placed(lambda _: jnp.full(sizes, np.asarray(self.value), resolved), jnp.zeros((), jnp.uint32), out_sharding)


def constant(value: Nested | np.ndarray, dtype: DTypeLike | None = None) -> Constant:
    """The value everywhere, as `jax.nn.initializers.constant`.

    Args:
        value: a number, or an array that broadcasts to the weights' shape.
        dtype: the default dtype of the weights; any, integers included.

    Raises:
        TypeError: value is not made of numbers.

    >>> constant(-7.0)(None, (3,))
    Array([-7., -7., -7.], dtype=float32)
    """
    return Constant(value, dtype)  # pyright: ignore[reportArgumentType]


zeros, ones = constant(0.0), constant(1.0)


@dataclasses.dataclass(frozen=True, repr=False)
class Orthogonal(Initializer):
    """Haar-distributed orthonormal rows or columns, whichever are fewer, times scale. Made by `orthogonal`."""

    maker: ClassVar[str] = "orthogonal"

    scale: float = 1.0
    column_axis: int = -1
    dtype: np.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.column_axis, bool) or not isinstance(self.column_axis, (int, np.integer)):
            raise TypeError(f"column_axis must be an integer, not {self.column_axis!r}")
        settle(self, scale=checked_number("scale", self.scale, above=0.0), column_axis=int(self.column_axis))

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) < 2:
            raise ValueError(f"shape must have at least two axes for {self.maker}, but is {shape}")
        if not -len(shape) <= self.column_axis < len(shape):
            raise ValueError(f"column_axis must lie in [{-len(shape)}, {len(shape)}) for shape {shape}, not {self.column_axis}")

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        columns = shape[self.column_axis]
        rows = math.prod(shape) // columns
        rest = [size for axis, size in enumerate(shape) if axis != self.column_axis % len(shape)]

        def draw(key: Key[Array, ""]) -> Inexact[Array, "*shape"]:
            matrix = drawn(_haar, key, (rows, columns), dtype)
            return jnp.moveaxis(matrix.reshape(*rest, columns), -1, self.column_axis)

        return jnp.array(self.scale, dtype) * placed(draw, key, out_sharding)


def _haar(key: Key[Array, ""], shape: tuple[int, int], dtype: np.dtype) -> Inexact[Array, "rows columns"]:
    rows, columns = shape
    return jax.random.orthogonal(key, rows, (), dtype, columns)


def orthogonal(scale: float = 1.0, column_axis: int = -1, dtype: DTypeLike | None = None) -> Orthogonal:
    """Orthogonal weights: with the other axes flattened to rows, W Wᵀ or WᵀW is scale² times the identity.

    Uniform (Haar) among such matrices; each entry has second moment scale²/max(rows, columns). Bits as
    `jax.nn.initializers.orthogonal`, and in bfloat16 and below, where that fails.

    Args:
        scale: the norm of each row or column, finite and positive.
        column_axis: which axis is the columns.
        dtype: the default dtype of the weights.

    Raises:
        TypeError: scale is no number, column_axis no integer, or dtype not floating or complex.
        ValueError: scale not finite and positive; when called: fewer than two axes, column_axis out of range.

    Source: Saxe, McClelland & Ganguli 2014, "Exact solutions to the nonlinear dynamics of learning", section 3.

    >>> import jax
    >>> w = orthogonal()(jax.random.key(0), (2, 8))
    >>> bool(abs(w @ w.T - jax.numpy.eye(2)).max() < 1e-6)
    True
    """
    return Orthogonal(scale, column_axis, dtype)  # pyright: ignore[reportArgumentType]


def _centre(spatial: Sequence[int]) -> tuple[int, ...]:
    """The tap that meets the pixel itself under SAME padding: XLA pads an even window more on the high side."""
    return tuple((size - 1) // 2 for size in spatial)


@dataclasses.dataclass(frozen=True, repr=False)
class DeltaOrthogonal(Orthogonal):
    """An orthogonal matrix at the central tap, zeros elsewhere. Made by `delta_orthogonal`."""

    maker: ClassVar[str] = "delta_orthogonal"

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if not 3 <= len(shape) <= 5:
            raise ValueError(f"shape must be (*spatial, in, out) with one to three spatial axes, but is {shape}")
        if shape[-1] < shape[-2]:
            raise ValueError(f"shape must have at least as many outputs as inputs to be orthogonal, but is {shape}")
        super()._check_shape(shape[-2:])

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        def draw(key: Key[Array, ""]) -> Inexact[Array, "*shape"]:
            matrix = Orthogonal._draw(self, key, shape[-2:], dtype, None)
            return jnp.zeros(shape, dtype).at[_centre(shape[:-2])].set(matrix)

        return placed(draw, key, out_sharding)


def delta_orthogonal(scale: float = 1.0, column_axis: int = -1, dtype: DTypeLike | None = None) -> DeltaOrthogonal:
    """Convolution kernels that are orthogonal at their central tap and zero elsewhere: they keep every norm.

    For shapes (*spatial, in, out) with one to three spatial axes and in ≤ out. Bits as `jax.nn.initializers.delta_orthogonal`.

    Args:
        scale: the norm of each row of the central matrix, finite and positive.
        column_axis: of the (in, out) matrix.
        dtype: the default dtype of the weights.

    Raises:
        TypeError: scale is no number, column_axis no integer, or dtype not floating or complex.
        ValueError: scale not finite and positive; when called: a shape of another form.

    Source: Xiao et al. 2018, "Dynamical Isometry and a Mean Field Theory of CNNs", section 3.

    >>> import jax
    >>> kernel = delta_orthogonal()(jax.random.key(0), (3, 3, 4, 4))
    >>> round(float((kernel[1, 1] ** 2).sum()), 3), round(float((kernel**2).sum()), 3)
    (4.0, 4.0)
    """
    return DeltaOrthogonal(scale, column_axis, dtype)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True, repr=False)
class Identity(Initializer):
    """The identity matrix times scale. Made by `identity`."""

    maker: ClassVar[str] = "identity"

    scale: float = 1.0
    dtype: np.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, scale=checked_number("scale", self.scale))

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2:
            raise ValueError(f"shape must be (in, out) for identity, but is {shape}; dirac is the identity of convolutions")

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        return placed(lambda _: jnp.array(self.scale, dtype) * jnp.eye(*shape, dtype=dtype), key, out_sharding)


def identity(scale: float = 1.0, dtype: DTypeLike | None = None) -> Identity:
    """The identity, for kernels (in, out), rectangular ones included: the first min(in, out) units pass through.

    Args:
        scale: the diagonal's value, finite.
        dtype: the default dtype of the weights.

    Raises:
        TypeError: scale is no number, or dtype not floating or complex.
        ValueError: scale not finite; when called: a shape that is not two-dimensional.

    Source: Le, Jaitly & Hinton 2015, "A Simple Way to Initialize Recurrent Networks of Rectified Linear Units".

    >>> import jax
    >>> identity()(jax.random.key(0), (2, 3))
    Array([[1., 0., 0.],
           [0., 1., 0.]], dtype=float32)
    """
    return Identity(scale, dtype)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True, repr=False)
class Dirac(Initializer):
    """The identity of convolutions, group by group. Made by `dirac`."""

    maker: ClassVar[str] = "dirac"

    groups: int = 1
    dtype: np.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.groups, bool) or not isinstance(self.groups, (int, np.integer)):
            raise TypeError(f"groups must be an integer, not {self.groups!r}")
        if self.groups < 1:
            raise ValueError(f"groups must be ≥ 1, not {self.groups}")
        settle(self, groups=int(self.groups))

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if not 3 <= len(shape) <= 5:
            raise ValueError(f"shape must be (*spatial, in / groups, out) with one to three spatial axes, but is {shape}")
        if shape[-1] % self.groups:
            raise ValueError(f"groups must divide the {shape[-1]} output features of shape {shape}, but is {self.groups}")

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        inputs, outputs = shape[-2:]

        def draw(_: Key[Array, ""]) -> Inexact[Array, "*shape"]:
            block = jnp.eye(inputs, outputs // self.groups, dtype=dtype)
            return jnp.zeros(shape, dtype).at[_centre(shape[:-2])].set(jnp.tile(block, (1, self.groups)))

        return placed(draw, key, out_sharding)


def dirac(groups: int = 1, dtype: DTypeLike | None = None) -> Dirac:
    """Convolution kernels that pass each input channel through to an output channel of its own group, as far as there are.

    For shapes (*spatial, in / groups, out) with one to three spatial axes, under SAME padding and stride 1.

    Args:
        groups: the convolution's `feature_group_count`.
        dtype: the default dtype of the weights.

    Raises:
        TypeError: groups is no integer, or dtype not floating or complex.
        ValueError: groups below 1; when called: groups that do not divide the outputs, a shape of another form.

    Source: Zagoruyko & Komodakis 2017, "DiracNets", section 3.

    >>> import jax
    >>> dirac()(jax.random.key(0), (3, 1, 1)).ravel()  # the central tap of three
    Array([0., 1., 0.], dtype=float32)
    """
    return Dirac(groups, dtype)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True, repr=False)
class Sparse(Initializer):
    """Normal weights of which each output unit sees only a share. Made by `sparse`."""

    maker: ClassVar[str] = "sparse"

    sparsity: float
    stddev: float = 1e-2
    dtype: np.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(
            self,
            sparsity=checked_number("sparsity", self.sparsity, at_least=0.0, below=1.0),
            stddev=checked_number("stddev", self.stddev, above=0.0),
        )

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) < 2:
            raise ValueError(f"shape must be (*inputs, out) with at least two axes for sparse, but is {shape}")

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        inputs = math.prod(shape[:-1])
        dropped = math.ceil(self.sparsity * inputs)

        def draw(key: Key[Array, ""]) -> Inexact[Array, "*shape"]:
            key_values, key_where = jax.random.split(key)
            values = drawn(jax.random.normal, key_values, (inputs, shape[-1]), dtype)
            # The ranks of independent numbers are a uniform permutation, one a column.
            ranks = jnp.argsort(
                jnp.argsort(drawn(jax.random.bits, key_where, values.shape, np.dtype(np.uint32)), axis=0), axis=0
            )
            kept = jnp.where(ranks < dropped, jnp.zeros_like(values), values)
            return (kept * jnp.array(self.stddev, dtype)).reshape(shape)

        return placed(draw, key, out_sharding)


def sparse(sparsity: float, stddev: float = 1e-2, dtype: DTypeLike | None = None) -> Sparse:
    """Each output unit has ⌈sparsity · inputs⌉ zero weights, at random places of its own, the others N(0, stddev²).

    The law counts the terms that are there: E[y²] = (inputs − ⌈sparsity · inputs⌉) · stddev² · E[x²].

    Args:
        sparsity: share of zeros, in [0, 1).
        stddev: of the others, finite and positive.
        dtype: the default dtype of the weights.

    Raises:
        TypeError: an argument is no number, or dtype not floating or complex.
        ValueError: sparsity or stddev out of range; when called: a shape with fewer than two axes.

    Source: Martens 2010, "Deep learning via Hessian-free optimization", section 5.

    >>> import jax
    >>> kernel = sparse(0.9, stddev=0.1)(jax.random.key(0), (100, 50))
    >>> int((kernel[:, 0] != 0).sum())
    10
    """
    return Sparse(sparsity, stddev, dtype)  # pyright: ignore[reportArgumentType]
