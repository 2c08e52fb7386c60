"""Any tree of parameters as named leaves, and back: dicts, FrozenDicts, linen variables, nnx states and modules."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from varscale.programs.patterns import canonical


@dataclass(frozen=True)
class Leaf:
    """One leaf of a tree.

    Attributes:
      path: its keys joined with "/".
      value: an array, a number, or a `jax.ShapeDtypeStruct`.
      is_weight: False for the state of random generators, which is nobody's to transfer.
    """

    path: str
    value: Any
    is_weight: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(np.shape(self.value))

    @property
    def dtype(self) -> Any:
        return self.value.dtype if hasattr(self.value, "dtype") else np.result_type(self.value)


@dataclass(frozen=True)
class Tree:
    """The leaves of a tree in its own order, and what makes a tree of the same kind from other values."""

    leaves: tuple[Leaf, ...]
    rebuild: Callable[[list[Any]], Any]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(leaf.path for leaf in self.leaves)


def open_tree(tree: Any, name: str) -> Tree:
    """The named leaves of a tree.

    Args:
      tree: nested or flat dicts (keys may hold "/" or "." themselves), FrozenDicts, linen variables with or without axis
        metadata, an nnx.State, an nnx.Module, or any other pytree.
      name: what to call it in errors.

    Raises:
      TypeError: a leaf is not an array.
      ValueError: two leaves have the same path.
    """
    if (nnx := nnx_if_imported()) is not None and isinstance(tree, nnx.Module):
        graph, state = nnx.split(tree)
        inner = open_tree(state, name)
        return Tree(inner.leaves, lambda values: nnx.merge(graph, inner.rebuild(values)))
    leaves: list[Leaf] = []
    seen: dict[str, str] = {}
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)[0]:
        random = nnx is not None and isinstance(node, nnx.RngState)
        # A box (an nnx.Variable, linen's Partitioned) is one leaf; its own keys, ".value" and the like, are no part of the
        # path.
        inside = jax.tree_util.tree_flatten_with_path(node)[0] if is_box(node) else [((), node)]
        for extra, value in inside:
            path = canonical("/".join(_text(key) for key in (*keys, *(extra if len(inside) > 1 else ()))))
            written = jax.tree_util.keystr((*keys, *extra))
            if path in seen:
                raise ValueError(f"{name}: two leaves have the path {path!r}: {seen[path]} and {written}; rename one of them")
            seen[path] = written
            leaves.append(Leaf(path, _checked(value, path, name), not (random or is_key(value))))
    structure = jax.tree.structure(tree)
    return Tree(tuple(leaves), lambda values: jax.tree.unflatten(structure, values))


def is_abstract(value: Any) -> bool:
    """Whether the leaf is a shape without numbers."""
    return isinstance(value, jax.ShapeDtypeStruct)


def to_numpy(value: Any, path: str, name: str = "pretrained") -> np.ndarray:
    """A leaf's numbers on the host; tensors of PyTorch are read without importing it. Errors call the tree by `name`.

    Raises:
      TypeError: the leaf has a shape but no numbers, or is of a kind numpy cannot hold.
    """
    if is_abstract(value):
        raise TypeError(f"{name}: {path!r} is a jax.ShapeDtypeStruct: it has a shape but no numbers to move")
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if "bfloat16" in str(value.dtype):  # numpy has none of its own, and PyTorch does not know ml_dtypes'
            return np.asarray(value.float()).astype(jax.numpy.bfloat16)
    array = np.asarray(value)
    if array.dtype.kind in "OUSMm":
        raise TypeError(f"{name}: {path!r} has dtype {array.dtype}; give numbers")
    return array


def like(value: np.ndarray, target: Any) -> Any:
    """The numbers as the kind of array that `target` is: numpy's stays numpy's, jax's keeps its sharding."""
    if isinstance(target, jax.Array):
        array = jax.numpy.asarray(value)
        return array if len(target.sharding.device_set) == 1 else jax.device_put(array, target.sharding)
    if is_abstract(target):
        array = jax.numpy.asarray(value)
        return array if target.sharding is None else jax.device_put(array, target.sharding)
    return value


def is_collections(paths: Mapping[str, Any] | tuple[str, ...]) -> bool:
    """Whether these are linen variables: collections, of which one is "params"."""
    return any(path.startswith("params/") for path in paths)


def nnx_if_imported() -> Any:
    """Flax's nnx if someone has imported it: a tree that holds nothing of nnx should not wait for its import."""
    return sys.modules.get("flax.nnx")


def is_box(node: Any) -> bool:
    nnx, meta = nnx_if_imported(), sys.modules.get("flax.core.meta")
    return (nnx is not None and isinstance(node, nnx.Variable)) or (meta is not None and isinstance(node, meta.AxisMetadata))


def is_key(value: Any) -> bool:
    return isinstance(value, jax.Array | jax.ShapeDtypeStruct) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key)


def _text(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _checked(value: Any, path: str, name: str) -> Any:
    if isinstance(value, bool | int | float | complex) or (hasattr(value, "shape") and hasattr(value, "dtype")):
        return value
    raise TypeError(f"{name}: the leaf {path!r} is a {type(value).__name__}, not an array")
