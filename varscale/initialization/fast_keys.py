"""Keys with which any `jax.random` call draws the same bits as ever, by the unrolled hash."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from varscale.initializers.sampling import checked_key, unrolled_key


def fast_key(seed_or_key: Any) -> Key[Array, ""]:
    """A key that makes `jax.random` several times faster on the CPU, for a user's own code: the bits do not change.

    The key is of a PRNG implementation of its own, made by `jax.extend.random.define_prng_impl`; what is split or folded from
    it is so too. `jax.random.poisson`, which asks for threefry by name, refuses it. It cannot be mixed with other keys in one
    array or stored in a checkpoint; `vs.initialize` leaves none in a model: the random streams of an nnx model drawn with a
    fast key hold plain keys.

    Args:
        seed_or_key: an integer seed (also as an array), or a key; keys of other implementations than threefry are returned as
            they are.

    Raises:
        TypeError: it is neither.
        ValueError: it is an array of several keys.

    >>> import jax, varscale as vs
    >>> bool((jax.random.normal(vs.fast_key(0), (3,)) == jax.random.normal(jax.random.key(0), (3,))).all())
    True
    """
    given = seed_or_key
    is_seed = jnp.issubdtype(getattr(given, "dtype", bool), jnp.integer) and np.shape(given) == ()
    if is_seed or (isinstance(given, int) and not isinstance(given, bool)):
        given = jax.random.key(given, impl="threefry2x32")
    return unrolled_key(checked_key(given))  # pyright: ignore[reportArgumentType]
