"""Values given for some leaves of a model, by the leaf that each is for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varscale import _compat
from varscale.programs.trees import Leaf, is_abstract, is_collections, open_tree, to_numpy

_KINDS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)


def given_values(given: Any, leaves: Sequence[Leaf]) -> dict[str, Any]:
    """The given values by the path of the leaf they are for.

    Raises:
        TypeError: a value holds no numbers, or numbers that the dtype of its leaf cannot hold.
        ValueError: a value has no leaf or another shape than it, or a leaf is given two values.
    """
    if given is None:
        return {}
    known = {leaf.path: leaf for leaf in leaves}
    within = is_collections(tuple(known))
    found: dict[str, Any] = {}
    for leaf in open_tree(given, "given").leaves:
        if is_abstract(leaf.value):
            continue
        path = leaf.path if leaf.path in known or not within else f"params/{leaf.path}"
        if path not in known:
            close = ", ".join(list(known)[:4])
            raise ValueError(f"given: the model has no leaf {leaf.path!r} (it has {close}{', ...' if len(known) > 4 else ''})")
        if leaf.shape != known[path].shape:
            raise ValueError(f"given: {leaf.path!r} has shape {leaf.shape}, and the model's leaf {known[path].shape}")
        if path in found:
            raise ValueError(f"given: the model's leaf {path!r} is given two values")
        value = leaf.value if isinstance(leaf.value, jax.Array) else to_numpy(leaf.value, leaf.path, "given")
        if isinstance(value, jax.Array) and not _compat.is_tracer(value) and value.is_deleted():
            raise ValueError(f"given: {leaf.path!r} is an array that was deleted or donated: it has no numbers any more")
        _check_dtype(leaf.path, value.dtype, known[path].dtype)
        found[path] = _plain_key(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value
    return found


def _plain_key(key: Any) -> Any:
    """A key that is not of our own implementation."""
    is_own = "varscale" in str(key.dtype)
    return jax.random.wrap_key_data(jax.random.key_data(key), impl="threefry2x32") if is_own else key


def _check_dtype(path: str, dtype: Any, own: Any) -> None:
    """Integers may become floating numbers and these complex ones, never the other way round; keys stay keys of their kind."""
    if jnp.issubdtype(own, jax.dtypes.prng_key) or jnp.issubdtype(dtype, jax.dtypes.prng_key):
        dtype, own = (str(x).replace("varscale_", "") for x in (dtype, own))
        kept = dtype == own
    else:
        place, wanted = (next(i for i, kind in enumerate(_KINDS) if jnp.issubdtype(x, kind)) for x in (dtype, own))
        kept = place <= wanted
    if not kept:
        raise TypeError(f"given: {path!r} has dtype {dtype}, which the model's leaf of dtype {own} cannot hold")


def check_range(path: str, value: Any, dtype: Any) -> None:
    """Check that a value's numbers are within the range of the dtype that it is cast to; rounding is no fault.

    Raises:
        ValueError: an integer would become another one, or a finite number infinite.
    """
    if _compat.is_tracer(value) or jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return
    (low, high), (least, most) = _limits(value.dtype), _limits(dtype)
    if least <= low and high <= most:
        return
    with np.errstate(over="ignore", invalid="ignore"):
        cast = value.astype(dtype)
    lost = cast != value if jnp.issubdtype(dtype, jnp.integer) else np.isfinite(value) & ~np.isfinite(cast)
    if lost.any():
        example = np.asarray(value)[np.asarray(lost)][0]
        raise ValueError(f"given: {path!r} holds {example}, which is out of the range of {np.dtype(dtype)}")


def _limits(dtype: Any) -> tuple[float, float]:
    if dtype == jnp.bool_:
        return 0, 1
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).min, jnp.iinfo(dtype).max
    return float(jnp.finfo(dtype).min), float(jnp.finfo(dtype).max)
