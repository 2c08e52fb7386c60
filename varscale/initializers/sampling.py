"""Counter-based random bits in one pass: the same bits as `jax.random`, several times faster on the CPU.

On the CPU, jax lowers the Threefry hash as a rolled loop, which costs several passes over memory, cannot fuse with what
follows and takes long to compile for kernels of many axes. Written out as twenty rounds of plain integer operations on an
iota, XLA fuses hash, transform and scale into one pass. The rounds enter through a PRNG implementation of our own:
`jax.random.normal` and its kin then run unchanged on a key of that implementation, so that every transform stays jax's own
and only the source of the bits differs. In a jaxpr the draw is an ordinary `random_bits` equation.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3 (Threefry-2x32, 20 rounds).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import define_prng_impl
from jaxtyping import Array, Key, Shaped, UInt32

Raw = Callable[..., Shaped[Array, "*shape"]]
OutSharding = jax.sharding.NamedSharding | jax.sharding.PartitionSpec | None

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_UNROLLED = 8  # steps up to which LLVM unrolls a loop whole
_UNSIGNED = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}


def threefry_2x32(
    key: UInt32[Array, "2"], high: UInt32[Array, "*shape"], low: UInt32[Array, "*shape"]
) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]]:
    """The Threefry-2x32 hash of the counters (high, low), its twenty rounds written out."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    x, y = high + schedule[0], low + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:  # by lax, which traces in a third of the time of operators
            x = lax.add(x, y)
            turned = lax.shift_left(y, np.uint32(rotation)), lax.shift_right_logical(y, np.uint32(32 - rotation))
            y = lax.bitwise_xor(x, lax.bitwise_or(*turned))
        x = x + schedule[(group + 1) % 3]
        y = y + (schedule[(group + 2) % 3] + np.uint32(group + 1))
    return x, y


def _linear_index(shape: Sequence[int]) -> UInt32[Array, "*shape"]:
    """0, 1, 2, … in row-major order, as a sum of iotas, which XLA's partitioner can split along any axis."""
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        if shape[axis] > 1:
            index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride)
        stride *= shape[axis]
    return index


def is_narrow(shape: Sequence[int]) -> bool:
    """Whether XLA's CPU compiler may unroll the loop over the last axis of an array of this shape.

    From jax 0.12 on it contracts multiplications and additions of an unrolled loop otherwise: a normal number of shape (900, 4)
    differs in the last place from that of shape (3600,) with the same random bits. Loops of more than `_UNROLLED` steps stay
    loops, and so do those that compute the hash too.
    """
    long = [n for n in shape if n > 1]
    return len(long) > 1 and long[-1] <= _UNROLLED


def _unrolled_bits(key: UInt32[Array, "2"], bit_width: int, shape: Sequence[int]) -> Shaped[Array, "*shape"]:
    index = _linear_index(shape)
    words = threefry_2x32(key, jnp.zeros_like(index), index)
    # Kept out of the loop that transforms the bits, as jax's own hash is, so that both are unrolled alike.
    return _bits(lax.optimization_barrier(words) if is_narrow(shape) else words, bit_width)


def bits_at(key: UInt32[Array, "2"], bit_width: int, index: UInt32[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """The random bits of these positions, in row-major order, of an array that is drawn with partitionable counters."""
    return _bits(threefry_2x32(key, jnp.zeros_like(index), index), bit_width)


def _bits(words: tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]], bit_width: int) -> Shaped[Array, "*shape"]:
    x, y = words
    if bit_width == 64:
        return lax.shift_left(x.astype(jnp.uint64), np.uint64(32)) | y.astype(jnp.uint64)
    return (x ^ y).astype(_UNSIGNED[bit_width])


def _wrap(key: UInt32[Array, "2"]) -> Key[Array, ""]:
    return jax.random.wrap_key_data(key, impl="threefry2x32")


def _random_bits(key: UInt32[Array, "2"], bit_width: int, shape: Sequence[int]) -> Shaped[Array, "*shape"]:
    def plain(key: UInt32[Array, "2"]) -> Shaped[Array, "*shape"]:
        return jax.random.bits(_wrap(key), tuple(shape), _UNSIGNED[bit_width])

    # The older counter scheme pairs the two halves of the array; and past 2³² numbers the counter has a high word.
    if not jax.config.jax_threefry_partitionable or math.prod(shape) >= 2**32:  # pyright: ignore[reportAttributeAccessIssue]
        return plain(key)
    return lax.platform_dependent(key, cpu=lambda key: _unrolled_bits(key, bit_width, shape), default=plain)


@functools.cache
def _unrolled_implementation() -> Hashable:
    return define_prng_impl(
        key_shape=(2,),
        seed=lambda seed: jax.random.key_data(jax.random.key(seed, impl="threefry2x32")),
        split=lambda key, shape: jax.random.key_data(jax.random.split(_wrap(key), tuple(shape))),
        random_bits=_random_bits,
        fold_in=lambda key, data: jax.random.key_data(jax.random.fold_in(_wrap(key), data)),
        name="threefry2x32_unrolled",
        tag="varscale_fry",
    )


def checked_key(key: Key[Array, ""] | UInt32[Array, "..."]) -> Key[Array, ""]:
    """A single typed key, from a typed key or a raw one of the default implementation.

    Raises:
        TypeError: key is neither.
        ValueError: key is a batch of keys.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32):
        raise TypeError(f"key must be a PRNG key, as jax.random.key(0) makes it, not {key!r}")
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        try:
            key = jax.random.wrap_key_data(key)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"key must be a PRNG key: a raw uint32 array of shape {key.shape} is none of the default implementation"
            ) from error
    if key.shape:
        raise ValueError(f"key must be a single PRNG key, not an array of keys of shape {key.shape}: use jax.vmap for a batch")
    return key


def unrolled_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """The key with which `jax.random` draws the same bits by the unrolled hash, where that serves its implementation."""
    if jax.random.key_impl(key) != "threefry2x32":
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=_unrolled_implementation())


@functools.partial(jax.jit, static_argnames=("raw", "shape", "dtype", "watched"))
def _drawn(
    key: Key[Array, ""], arguments: tuple[float, ...], *, raw: Raw, shape: tuple[int, ...], dtype: np.dtype, watched: bool
) -> Shaped[Array, "*shape"]:
    # Unwrapping a key would hide its use from jax's key-reuse checker.
    return raw(key if watched else unrolled_key(key), shape, dtype, *arguments)


def drawn(
    raw: Raw,
    key: Key[Array, ""],
    shape: Sequence[int],
    dtype: np.dtype,
    arguments: tuple[float, ...] = (),
    out_sharding: OutSharding = None,
) -> Shaped[Array, "*shape"]:
    """raw(key, shape, dtype, *arguments) as one compiled call, its bits by the unrolled hash, laid out by `out_sharding`.

    The arguments are traced, as they are where `jax.random` is called eagerly: folded into the program as constants they
    would round differently.
    """
    watched = jax.config.jax_debug_key_reuse  # pyright: ignore[reportAttributeAccessIssue]

    def draw(key: Key[Array, ""]) -> Shaped[Array, "*shape"]:
        return _drawn(key, arguments, raw=raw, shape=tuple(shape), dtype=dtype, watched=watched)

    return placed(draw, key, out_sharding)


def placed(
    draw: Callable[[Key[Array, ""]], Shaped[Array, "*shape"]], key: Key[Array, ""], out_sharding: OutSharding
) -> Shaped[Array, "*shape"]:
    """draw(key), laid out as `out_sharding` says, each device computing its own part.

    Beyond `jax.random`, which takes meshes with explicit axes only, meshes with automatic axes are served too.

    Raises:
        ValueError: out_sharding is a PartitionSpec and no mesh is set.
    """
    if out_sharding is None:
        return draw(key)
    named = isinstance(out_sharding, jax.sharding.NamedSharding)
    mesh = out_sharding.mesh if named else jax.sharding.get_abstract_mesh()
    if not mesh.axis_names:
        raise ValueError(
            f"out_sharding {out_sharding} names axes of a mesh: set one with jax.set_mesh, or give a NamedSharding"
        )
    if jax.sharding.AxisType.Explicit in mesh.axis_types:
        return jax.sharding.auto_axes(draw, out_sharding=out_sharding)(key)  # pyright: ignore[reportReturnType]
    return lax.with_sharding_constraint(draw(key), out_sharding)
