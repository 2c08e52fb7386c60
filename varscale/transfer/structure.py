"""A tree's containers as JSON and its leaves as a flat list: what a file of named arrays needs to give the tree back."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from varscale.programs.trees import is_box, is_key, nnx_if_imported

Skeleton = dict[str, Any] | None


def describe(tree: Any) -> tuple[Skeleton, dict[str, Any]]:
    """The containers of a tree, and its leaves by name (their keys joined with "/").

    Dicts (keys str or int), lists and tuples come back as they are; FrozenDicts, nnx states and modules, named tuples and other
    nodes come back as dicts.

    Raises:
      TypeError: a leaf is not an array, or a key is neither a str nor an int.
    """
    leaves: dict[str, Any] = {}

    def name(keys: tuple[str, ...]) -> str:
        plain = "/".join(keys) or "value"
        unique, number = plain, 2
        while unique in leaves or unique == "__metadata__":  # keys that hold "/" may collide; the skeleton tells them apart
            unique, number = f"{plain}#{number}", number + 1
        return unique

    def walk(node: Any, keys: tuple[str, ...]) -> Skeleton:
        if node is None:
            return None
        if is_box(node):
            inner = jax.tree.leaves(node)
            return walk(inner[0] if len(inner) == 1 else inner, keys)
        children = _children(node)
        if children is not None:
            kind, entries = children
            for key, _ in entries:
                if not isinstance(key, str | int) or isinstance(key, bool):
                    raise TypeError(f"params: the key {key!r} at {'/'.join(keys)!r} is a {type(key).__name__}; use str or int")
            return {kind: [[key, walk(child, (*keys, str(key)))] for key, child in entries]}
        if isinstance(node, jax.ShapeDtypeStruct):
            raise TypeError(f"params: {'/'.join(keys)!r} is a jax.ShapeDtypeStruct: it has no values to save")
        if not (isinstance(node, bool | int | float | complex) or (hasattr(node, "shape") and hasattr(node, "dtype"))):
            raise TypeError(f"params: the leaf {'/'.join(keys)!r} is a {type(node).__name__}, not an array")
        unique = name(keys)
        leaves[unique] = node
        return {"leaf": unique}

    return walk(tree, ()), leaves


def restore(skeleton: Skeleton, leaves: Mapping[str, Any]) -> Any:
    """The tree back from its containers and leaves.

    Raises:
      ValueError: the skeleton is malformed, or its leaves are not those given.
    """
    used: set[str] = set()

    def walk(node: Any) -> Any:
        if node is None:
            return None
        if not isinstance(node, dict) or len(node) != 1:
            raise ValueError("its description of the tree is malformed")
        ((kind, content),) = node.items()
        if kind == "leaf":
            if content not in leaves or content in used:
                raise ValueError(f"its description of the tree names the leaf {content!r}, which is not there once")
            used.add(content)
            return leaves[content]
        if kind not in _MAKE or not isinstance(content, list) or any(not isinstance(e, list) or len(e) != 2 for e in content):
            raise ValueError("its description of the tree is malformed")
        return _MAKE[kind]([(key, walk(child)) for key, child in content])

    try:
        tree = walk(skeleton)
    except RecursionError as error:
        raise ValueError("its description of the tree is nested too deeply") from error
    if missed := set(leaves) - used:
        raise ValueError(f"it holds leaves that its description of the tree does not know: {', '.join(sorted(missed)[:4])}")
    return tree


def digest(skeleton: Skeleton, leaves: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of structure, names, dtypes, shapes and values."""
    total = hashlib.sha256(json.dumps(skeleton).encode())
    for name, array in sorted(leaves.items()):
        total.update(repr((name, array.dtype.name, array.shape)).encode())
        total.update(np.asarray(array, order="C").reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def to_host(value: Any) -> tuple[np.ndarray, str]:
    """A leaf as a contiguous little-endian numpy array, and its dtype's name; a random key is given as its data."""
    if is_key(value):
        return np.asarray(jax.random.key_data(value)), f"key:{jax.random.key_impl(value)}"
    array = np.asarray(value, order="C")
    if array.dtype.hasobject or (array.dtype.kind in "USMmV" and not _is_ml(array.dtype)):
        raise TypeError(f"an array of dtype {array.dtype} holds no numbers")
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array, array.dtype.name


def from_host(array: np.ndarray, dtype: str) -> Any:
    """The leaf that `to_host` gave this array for."""
    return (
        jax.random.wrap_key_data(jax.numpy.asarray(array), impl=dtype.removeprefix("key:"))
        if dtype.startswith("key:")
        else array
    )


def dtype_called(name: str) -> np.dtype:
    """The dtype of that name, numpy's or ml_dtypes'.

    Raises:
      ValueError: there is none.
    """
    if isinstance(getattr(ml_dtypes, name, None), type):
        return np.dtype(getattr(ml_dtypes, name))
    try:
        dtype = np.dtype(name)
    except TypeError as error:
        raise ValueError(f"it names a dtype {name!r} that is not known here") from error
    if dtype.kind not in "biufc":
        raise ValueError(f"it names a dtype {name!r} that holds no numbers")
    return dtype


def not_finite(array: Any) -> int:
    """How many values are NaN or infinite; 0 for what cannot be."""
    if is_key(array) or (array.dtype.kind in "biu" or (_is_ml(array.dtype) and "int" in array.dtype.name)):
        return 0
    # numpy asks this of ml_dtypes' smallest types only after widening, which is exact.
    wide = array.astype(np.float32) if _is_ml(array.dtype) else array
    return int(wide.size - np.isfinite(wide).sum())


def leaves_of(tree: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of a restored tree by name."""
    yield from describe(tree)[1].items()


_MAKE = {
    "dict": dict,
    "list": lambda entries: [child for _, child in entries],
    "tuple": lambda entries: tuple(child for _, child in entries),
}


def _children(node: Any) -> tuple[str, Sequence[tuple[Any, Any]]] | None:
    """The kind of container a node is and its entries; None for a leaf."""
    nnx = nnx_if_imported()
    if nnx is not None and isinstance(node, nnx.Module):
        node = nnx.state(node)
    if isinstance(node, Mapping):
        return "dict", list(node.items())
    if isinstance(node, tuple) and (fields := getattr(node, "_fields", None)) is not None:
        return "dict", list(zip(fields, node, strict=True))
    if isinstance(node, list | tuple):
        return ("list" if isinstance(node, list) else "tuple"), list(enumerate(node))
    if jax.tree_util.all_leaves([node]):
        return None
    entries = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)[0]
    return "dict", [(jax.tree_util.keystr(keys, simple=True, separator="/"), child) for keys, child in entries]


def _is_ml(dtype: np.dtype) -> bool:
    return hasattr(ml_dtypes, dtype.name)
