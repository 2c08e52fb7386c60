"""Independent draws of an initializer, one key each, in bounded memory."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Key, PyTree, Shaped

from varscale import initializers

Init = Callable[..., Array]

_ENTRIES_A_CALL, _EAGER_CALLS, _VECTORIZED_BELOW = 2**20, 2**13, 64


def key_of(*case: object, salt: str = "") -> Key[Array, ""]:
    """The key that belongs to a case: `jax.random.key(crc32(repr(case) + salt))`.

    A case so has one verdict, which replays and shrinks; no seed is drawn, so no search for an unlucky one is possible.
    """
    return jax.random.key(zlib.crc32((repr(case) + salt).encode()))


@partial(jax.jit, static_argnames=("function", "vectorize"))
def _map_compiled(function: Callable[[Key[Array, ""]], PyTree], vectorize: bool, keys: Key[Array, " n"]) -> PyTree:
    if vectorize:
        return jax.vmap(function)(keys)
    # Mapped, XLA compiles the function as it is, in a fraction of the time that the vectorized one takes. On the CPU a
    # loop copies all its results in every step where they are small floats; bits are written in place.
    stored = jax.lax.map(lambda key: jax.tree.map(lambda leaf: _bitcast(leaf, _stored(leaf.dtype)), function(key)), keys)
    return jax.tree.map(lambda leaf, shape: _bitcast(leaf, shape.dtype), stored, jax.eval_shape(function, keys[0]))


def _stored(dtype: Any) -> Any:
    small = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return jnp.dtype(f"uint{8 * dtype.itemsize}") if small else dtype


def _bitcast(leaf: Array, dtype: Any) -> Array:
    return leaf if leaf.dtype == dtype else jax.lax.bitcast_convert_type(leaf, dtype)


def map_keys(
    function: Callable[[Key[Array, ""]], PyTree], key: Key[Array, ""], count: int, entries: int, together: int | None = None
) -> PyTree:
    """`function` of at least `count` independent keys, stacked along a new leading axis, as NumPy arrays.

    Args:
        function: from a key to a pytree of arrays. Compiled and vectorized; called key by key where JAX cannot trace it. Two
            calls with equal hashable functions share their compilation.
        key: the source of the keys.
        count: how many results are needed.
        entries: how many numbers one call holds.
        together: how many calls one compiled program makes; by default as many as fit a fixed budget.

    Returns:
        The stacked results: `count` or a few more; fewer where more than 8192 calls would have to be made one by one.
    """
    if together is None:
        together = -(-count // min(-(-count * entries // _ENTRIES_A_CALL), count))
    rounds = -(-count // together)
    # XLA compiles a split once for each size: the sizes are powers of 2, and what is split beyond the rounds stays unused.
    source = jax.random.split(key, (1 << (rounds - 1).bit_length(), together))
    try:
        parts: Iterable[PyTree] = [
            jax.tree.map(np.asarray, _map_compiled(function, entries < _VECTORIZED_BELOW, source[index]))
            for index in range(rounds)
        ]
    except (jax.errors.JAXTypeError, NotImplementedError):
        flat = source.reshape(-1, *key.shape)[: min(count, _EAGER_CALLS)]
        parts = [jax.tree.map(lambda leaf: np.asarray(leaf)[None], function(one)) for one in flat]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


class _Draw:
    """`key -> init(key, shape, dtype)`, equal to another of the same parts so that they share a compilation."""

    def __init__(self, init: Init, shape: tuple[int, ...], dtype: Any):
        try:
            hash(init)
        except TypeError:
            self._identity: Any = id(self)
        else:
            self._identity = init
        self._init, self._shape, self._dtype = init, shape, dtype

    def __call__(self, key: Key[Array, ""]) -> Shaped[Array, "*shape"]:
        return jnp.asarray(self._init(key, self._shape, self._dtype))

    def _parts(self) -> tuple[Any, ...]:
        return type(self), self._identity, self._shape, self._dtype

    def __hash__(self) -> int:
        return hash(self._parts())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Draw) and self._parts() == other._parts()


def draw(
    init: Init, shape: tuple[int, ...], dtype: DTypeLike, key: Key[Array, ""], replicates: int
) -> Shaped[np.ndarray, "replicates *shape"]:
    """At least `replicates` independent draws of an initializer, in the dtype in which they are stored."""
    size = int(np.prod(shape, dtype=np.int64))
    return map_keys(_Draw(init, shape, jnp.dtype(dtype)), key, replicates, size)


def checked_init(init: Init) -> Init:
    """The initializer, if it can be one.

    Raises:
        TypeError: it is no function of (key, shape, dtype), or one that makes an initializer.
    """
    __tracebackhide__ = True
    name = getattr(init, "__name__", "")
    if not callable(init):
        raise TypeError(f"init must be an initializer (key, shape, dtype) -> weights, not {init!r}")
    if isinstance(init, type):
        raise TypeError(f"init must be an initializer, not the class {name}: write {name}(...)")
    if name in initializers.__all__ and getattr(initializers, name) is init:
        raise TypeError(f"init must be an initializer; vs.{name} makes one: write vs.{name}()")
    return init


@functools.lru_cache(maxsize=256)
def _same_twice_cached(init: Init, shape: tuple[int, ...], dtype: np.dtype) -> tuple[jax.ShapeDtypeStruct, bool]:
    return same_twice(init, shape, dtype, jax.random.key(0))


def same_twice_once(
    init: Init, shape: tuple[int, ...], dtype: DTypeLike, key: Key[Array, ""]
) -> tuple[jax.ShapeDtypeStruct, bool]:
    """`same_twice`, remembered for initializers that hash: tracing twice costs more than a quick test's whole budget."""
    try:
        hash(init)
    except TypeError:
        return same_twice(init, shape, dtype, key)
    return _same_twice_cached(init, shape, jnp.dtype(dtype))


def same_twice(init: Init, shape: tuple[int, ...], dtype: DTypeLike, key: Key[Array, ""]) -> tuple[jax.ShapeDtypeStruct, bool]:
    """What an initializer returns, and whether it returns the same again for the same key.

    Chance from outside the key (NumPy's generator, a counter) enters a traced program as a constant: two programs that
    read alike and hold the same constants are the same function. Only where they differ, or where JAX cannot trace, is
    the initializer called twice.
    """
    traced = []
    try:
        for _ in range(2):
            jaxpr, out = jax.make_jaxpr(lambda key: init(key, shape, dtype), return_shape=True)(key)
            traced.append((str(jaxpr), [np.asarray(constant).tobytes() for constant in jaxpr.consts]))
        if traced[0] == traced[1]:
            return jax.ShapeDtypeStruct(out.shape, out.dtype), True
    except (jax.errors.JAXTypeError, AttributeError, TypeError):
        # Not traceable, or not an array: the call itself says which.
        pass
    first, second = init(key, shape, dtype), init(key, shape, dtype)
    if callable(first):
        name = getattr(init, "__name__", "init")
        raise TypeError(f"init must be an initializer, but {name} returned {first!r}: it makes one; write {name}()")
    found = jax.ShapeDtypeStruct(np.shape(first), jnp.asarray(first).dtype)
    return found, np.asarray(first).tobytes() == np.asarray(second).tobytes()
