"""Marks in a jaxpr that say which module's method made what: a scope around the method, and a name on what it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

MODULE = "module:"  # opens the name of a scope, or of an output, that says its module's whole path, whoever calls it
WITHIN = "within:"  # opens one that says the path inside the piece that it is part of
FIELD = "|"  # separates that path, which array of the output it is, and how many there are


def is_open(method: str) -> bool:
    """Whether a method has a row."""
    return not method.startswith("_") or method == "__call__"


def call_path(path: str, name: str, method: str) -> str:
    """The path of a call of the method `name`: that of its module, "path.encode" where it is another than `__call__`.

    The method that was asked for is the model itself.
    """
    return path if name == "__call__" or not is_open(name) or (path == "" and name == method) else f"{path}.{name}"


def named(path: str, name: str, method: str, call: Callable[[], Any], mark: str = MODULE) -> Any:
    """The output of a method of the module at `path`, the jaxpr telling where it was made and which arrays it is."""
    where = mark + call_path(path, name, method)
    with jax.named_scope(where):
        output = call()
    if not is_open(name):
        return output
    from flax import nnx

    # A module that a method hands out stays the one it is.
    leaves, tree = jax.tree_util.tree_flatten_with_path(output, is_leaf=lambda x: isinstance(x, nnx.Module | nnx.Variable))
    is_array = [isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact) for _, leaf in leaves]
    marked = [
        checkpoint_name(leaf, FIELD.join((where, field_path(keys), str(sum(is_array))))) if array else leaf
        for (keys, leaf), array in zip(leaves, is_array, strict=True)
    ]
    return jax.tree_util.tree_unflatten(tree, marked)


def field_path(keys: Any) -> str:
    """Where in an output an array is: "" for the output itself, "[0]", "['k']"."""
    return jax.tree_util.keystr(tuple(_plain(key) for key in keys))


def _plain(key: Any) -> Any:
    """A field of a dataclass as its name, a place in some other container as its number."""
    if isinstance(key, jax.tree_util.GetAttrKey):
        return jax.tree_util.DictKey(key.name)
    return jax.tree_util.SequenceKey(key.key) if isinstance(key, jax.tree_util.FlattenedIndexKey) else key
