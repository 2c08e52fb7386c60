"""What every initializer is: a frozen, hashable dataclass whose call is a pure function of key, shape and dtype.

To add one: subclass, make it a frozen dataclass, check its fields in `__post_init__`, and write `_draw`, which is only ever
asked for float32, float64, complex64 or complex128 and for shapes without zeros. Then add it to the list in
`tests/test_initializers_contract.py`, which holds it to the same contract as all others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact, Key, UInt32

from varscale.arguments import real_number
from varscale.initializers.fans import checked_shape
from varscale.initializers.sampling import OutSharding, checked_key


def checked_number(
    name: str, value: Any, *, above: float = -math.inf, at_least: float = -math.inf, below: float = math.inf
) -> float:
    """A finite Python float within its limits.

    Raises:
        TypeError: not a real number, or a traced one.
        ValueError: outside the limits, NaN or infinite.
    """
    number = real_number(name, value)
    if not (math.isfinite(number) and number > above and number >= at_least and number < below):
        limits = [f"> {above:g}"] * math.isfinite(above) + [f"≥ {at_least:g}"] * math.isfinite(at_least)
        limits += [f"< {below:g}"] * math.isfinite(below)
        raise ValueError(f"{name} must be {' and '.join(['finite', *limits])}, not {value!r}")
    return number


def checked_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype, if weights can have it.

    Raises:
        TypeError: not a dtype, or not a floating or complex one.
    """
    try:
        resolved = jnp.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"dtype must be a floating or complex dtype, not {dtype!r}") from error
    if not jnp.issubdtype(resolved, jnp.inexact):
        raise TypeError(f"dtype must be a floating or complex dtype, not {resolved.name}")
    return resolved


def is_low_precision(dtype: np.dtype) -> bool:
    """Whether a real dtype is narrower than float32: bfloat16, float16, the float8s."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


@dataclasses.dataclass(frozen=True)
class Initializer:
    """A weight initializer: `kernel_init` or `bias_init` of any flax layer, linen and nnx.

    Two that are equal hash equal, so a module that holds one does not retrace. Under bfloat16, float16 and float8 the
    sample is drawn and scaled in float32 and rounded once, so that mean, variance and tails hold.
    """

    maker: ClassVar[str]
    """The public function that makes one; the repr is a call of it."""

    def __post_init__(self) -> None:
        """Checks the default dtype, for initializers that have that field."""
        if getattr(self, "dtype", None) is not None:
            settle(self, dtype=checked_dtype(getattr(self, "dtype")))  # noqa: B009

    def __call__(
        self,
        key: Key[Array, ""] | UInt32[Array, "..."],
        shape: Sequence[int],
        dtype: DTypeLike | None = None,
        out_sharding: OutSharding = None,
    ) -> Inexact[Array, "*shape"]:
        """Weights of the given shape.

        Args:
            key: a PRNG key, typed or raw, of any implementation.
            shape: the weights' shape; a size of 0 gives an empty array.
            dtype: of the result: floating or complex. Default: the initializer's own, else jax's default float.
            out_sharding: layout over a mesh, a `NamedSharding` or (under `jax.set_mesh`) a `PartitionSpec`.

        Returns:
            The weights: the same for the same arguments, whatever the layout.

        Raises:
            TypeError: key is no key, shape is not made of integers, dtype is not floating or complex.
            ValueError: a negative size, a batch of keys, or a shape that this initializer cannot serve.
        """
        sizes = checked_shape(shape)
        self._check_shape(sizes)
        own = getattr(self, "dtype", None)
        resolved = checked_dtype(dtype if dtype is not None else own if own is not None else jnp.result_type(float))
        self._check_dtype(resolved)
        typed = checked_key(key)
        if 0 in sizes:
            return jnp.zeros(sizes, resolved)
        if is_low_precision(resolved):
            self._check_range(sizes, resolved)
            return self._draw(typed, sizes, np.dtype(np.float32), out_sharding).astype(resolved)
        return self._draw(typed, sizes, resolved, out_sharding)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError for a shape that cannot be served. Any can, unless a subclass says otherwise."""

    def _check_dtype(self, dtype: np.dtype) -> None:
        """Raises TypeError for a floating or complex dtype that cannot be served. All can, unless a subclass says otherwise."""

    def _check_range(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Raises ValueError where the weights would overflow a narrow dtype. Unless a subclass says otherwise they do not."""

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        raise TypeError(f"{type(self).__name__} does not define _draw")

    def __repr__(self) -> str:
        shown = []
        for position, field in enumerate(dataclasses.fields(self)):
            value = getattr(self, field.name)
            required = field.default is dataclasses.MISSING
            if required or value != field.default:
                text = repr(value.name) if isinstance(value, np.dtype) else repr(value)
                shown.append(text if required and position == len(shown) else f"{field.name}={text}")
        return f"{self.maker}({', '.join(shown)})"


def settle(initializer: Initializer, **fields: Any) -> None:
    """Sets checked values on a frozen dataclass, from its `__post_init__`."""
    for name, value in fields.items():
        object.__setattr__(initializer, name, value)


def checked_std_fits(name: str, std: float, bound: float, dtype: np.dtype) -> None:
    """Raises ValueError where draws of that standard deviation, up to 6 or their bound, overflow a narrow dtype."""
    largest, limit = std * min(bound, 6.0), float(jnp.finfo(dtype).max)
    if largest > limit:
        raise ValueError(f"{name} must keep the weights within {dtype.name}'s largest, {limit:g}: they would reach {largest:g}")
