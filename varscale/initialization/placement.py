"""Where each leaf of a model is to lie: shardings from a tree, a function, or the model's own metadata."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from varscale import _compat
from varscale.programs.patterns import canonical
from varscale.programs.trees import Leaf, is_box


def shardings(out_shardings: Any, leaves: Sequence[Leaf], tree: Any) -> list[Sharding | None]:
    """The sharding of every leaf; None for the default device.

    Args:
        out_shardings: None, for where flax's own init puts them: the default device, or all devices of the mesh that is set;
            nnx variables that are sharded eagerly, as their metadata says, and arrays on explicit axes as their type says;
            "declared", for flax's partitioning metadata, else that type; a sharding or `PartitionSpec` for all leaves; a
            function of (path, shape); or a tree of shardings, of which an inner node's holds for all below it. None for a
            leaf means all devices of the mesh that is set, the default device without one.
        leaves: the leaves of the model.
        tree: the tree of shapes that they are from, with its metadata.

    Raises:
        TypeError: out_shardings is none of these, or a leaf's is no sharding.
        ValueError: the tree has another structure, no mesh is set, an axis is not of the mesh, or does not divide the leaf.
    """
    if out_shardings is None:
        mesh = _compat.set_mesh()
        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        own = [_of_type(leaf) if p is None else p for p, leaf in zip(_eager(tree), leaves, strict=True)]
        return [everywhere if p is None else _checked(p, leaf) for p, leaf in zip(own, leaves, strict=True)]
    if isinstance(out_shardings, str):
        if out_shardings != "declared":
            raise ValueError(f"out_shardings must be 'declared', a tree or a function of (path, shape), not {out_shardings!r}")
        wanted = [_of_type(leaf) if p is None else p for p, leaf in zip(_declared(tree), leaves, strict=True)]
    elif isinstance(out_shardings, Sharding | PartitionSpec):
        wanted = [out_shardings] * len(leaves)
    elif callable(out_shardings):
        wanted = [out_shardings(leaf.path.removeprefix("params/"), leaf.shape) for leaf in leaves]
    else:
        wanted = _of_tree(out_shardings, leaves)
    return [_checked(place, leaf) for place, leaf in zip(wanted, leaves, strict=True)]


def _of_type(leaf: Leaf) -> PartitionSpec | None:
    """Where an initializer itself laid a leaf out: axes of a mesh that are explicit are part of an array's type."""
    own = getattr(leaf.value, "sharding", None)
    return own.spec if isinstance(own, NamedSharding) and any(own.spec) and _current_mesh() is not None else None


def _checked(place: Any, leaf: Leaf) -> Sharding | None:
    if place is None:
        if _current_mesh() is None:
            return None
        place = PartitionSpec()
    mesh: Any = None
    if isinstance(place, PartitionSpec):
        mesh = _mesh(leaf.path)
        names = {name for entry in place for name in (entry if isinstance(entry, tuple) else (entry,)) if name is not None}
        if unknown := sorted(map(str, names - set(mesh.axis_names))):
            raise ValueError(
                f"out_shardings: {leaf.path!r} is split along {', '.join(unknown)}, and the mesh has the axes "
                f"{', '.join(map(str, mesh.axis_names))}"
            )
    elif not isinstance(place, Sharding):
        raise TypeError(f"out_shardings: {leaf.path!r} must have a jax.sharding.Sharding or PartitionSpec, not {place!r}")
    try:
        found = NamedSharding(mesh, place) if isinstance(place, PartitionSpec) else place
        if isinstance(found, NamedSharding) and not isinstance(found.mesh, jax.sharding.Mesh):
            raise ValueError("its mesh is abstract and has no devices")
        if isinstance(found, NamedSharding) and len(found.spec) > len(leaf.shape):
            raise ValueError(f"it names {len(found.spec)} axes, and the leaf has {len(leaf.shape)}")
        found.shard_shape(leaf.shape)
    except Exception as error:  # jax's own of an axis named twice is no ValueError
        raise ValueError(
            f"out_shardings: {leaf.path!r} of shape {leaf.shape} cannot be laid out by {place}: {error}"
        ) from error
    return found


def _current_mesh() -> Any:
    """The mesh that is set; None without one."""
    from flax.core import meta

    mesh = _compat.set_mesh() or meta.get_global_mesh()
    return mesh if mesh is not None and mesh.axis_names else None


def _mesh(path: str) -> Any:
    mesh = _current_mesh()
    if mesh is None:
        raise ValueError(
            f"out_shardings: {path!r} has a PartitionSpec, which needs a mesh, and none is set: use jax.set_mesh(mesh) or give "
            "NamedShardings"
        )
    return mesh


def _declared(tree: Any) -> list[Any]:
    """What flax's metadata says, leaf by leaf; None where it says nothing."""
    return _by_box(tree, _of_box)


def _eager(tree: Any) -> list[Any]:
    """What nnx does with that metadata when a variable is made."""
    from flax import nnx

    def place(box: Any) -> Any:
        metadata = box.get_metadata() if isinstance(box, nnx.Variable) else {}
        if not metadata.get("eager_sharding") or not metadata.get("out_sharding"):
            return None
        return _of_box(box) if _current_mesh() is not None or metadata.get("mesh") is not None else None

    return _by_box(tree, place)


def _by_box(tree: Any, place: Callable[[Any], Any]) -> list[Any]:
    """What a function says of flax's boxes, leaf by leaf; None for leaves in none."""
    found: list[Any] = []
    for node in jax.tree_util.tree_leaves(tree, is_leaf=is_box):
        count = len(jax.tree_util.tree_leaves(node)) if is_box(node) else 1
        found += [place(node) if is_box(node) else None] * count
    return found


def _of_box(box: Any) -> Any:
    import flax.linen as nn
    from flax import nnx

    mesh = getattr(box, "mesh", None)
    if isinstance(box, nnx.Variable):
        spec = box.get_metadata().get("out_sharding")
        if isinstance(spec, Sharding):
            return spec
        spec = nnx.get_partition_spec(box).get_value() if spec else None
        mesh = box.get_metadata().get("mesh")
    elif isinstance(box, nn.LogicallyPartitioned):
        spec = nn.spmd.logical_to_mesh_axes(tuple(box.names), box.rules)
    else:
        spec = box.get_partition_spec() if hasattr(box, "get_partition_spec") else None
    return NamedSharding(mesh, spec) if mesh is not None and spec is not None else spec


def _is_place(node: Any) -> bool:
    return node is None or isinstance(node, Sharding | PartitionSpec) or is_box(node)


def _of_tree(tree: Any, leaves: Sequence[Leaf]) -> list[Any]:
    """The places of a tree, whose inner nodes may stand for all that lies below them."""
    places: dict[str, Any] = {}
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_place)[0]:
        value = node.get_value() if hasattr(node, "get_value") else getattr(node, "value", node) if is_box(node) else node
        places[canonical(jax.tree_util.keystr(keys, simple=True, separator="/"))] = value
    found, used = [], set()
    for leaf in leaves:
        parts = leaf.path.split("/")
        above = ["/".join(parts[:i]) for i in range(len(parts), -1, -1)]
        path = next((p for p in above if p in places), None)
        if path is None:
            raise ValueError(f"out_shardings: the tree has nothing for {leaf.path!r} ({_some(places)})")
        used.add(path)
        found.append(places[path])
    if unused := [path for path in places if path not in used]:
        raise ValueError(f"out_shardings: the tree has {_some(unused)}, and the model has no such leaf")
    return found


def _some(paths: Any) -> str:
    listed = list(paths)
    return ", ".join(map(repr, listed[:4])) + (", ..." if len(listed) > 4 else "")
