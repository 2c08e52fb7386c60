"""Independent draws of an initializer, one key each, in bounded memory."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Key, PyTree, Shaped

Init = Callable[..., Array]

_ENTRIES_A_CALL, _EAGER_CALLS = 2**20, 2**13


def key_of(*case: object, salt: str = "") -> Key[Array, ""]:
    """The key that belongs to a case: `jax.random.key(crc32(repr(case) + salt))`.

    A case so has one verdict, which replays and shrinks; no seed is drawn, so no search for an unlucky one is possible.
    """
    return jax.random.key(zlib.crc32((repr(case) + salt).encode()))


@partial(jax.jit, static_argnames=("function",))
def _map_compiled(function: Callable[[Key[Array, ""]], PyTree], keys: Key[Array, " n"]) -> PyTree:
    return jax.vmap(function)(keys)


def map_keys(function: Callable[[Key[Array, ""]], PyTree], key: Key[Array, ""], count: int, entries: int) -> PyTree:
    """`function` of at least `count` independent keys, stacked along a new leading axis, as NumPy arrays.

    Args:
        function: from a key to a pytree of arrays. Compiled and vectorized; called key by key where JAX cannot trace it. Two
            calls with equal hashable functions share their compilation.
        key: the source of the keys.
        count: how many results are needed.
        entries: how many numbers one call holds; as many calls run together as fit a fixed budget.

    Returns:
        The stacked results: `count` or a few more; fewer where more than 8192 calls would have to be made one by one.
    """
    rounds = -(-count * entries // _ENTRIES_A_CALL)
    together = -(-count // min(rounds, count))
    rounds = -(-count // together)
    source = jax.random.split(key, (rounds, together))
    try:
        parts: Iterable[PyTree] = [jax.tree.map(np.asarray, _map_compiled(function, keys)) for keys in source]
    except (jax.errors.JAXTypeError, NotImplementedError):
        flat = source.reshape(-1)[: min(count, _EAGER_CALLS)]
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
