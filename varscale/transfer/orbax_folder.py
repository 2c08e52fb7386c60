"""Trees in Orbax checkpoints, the folders that flax's own training loops write."""

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from varscale.transfer.structure import describe, digest, dtype_called, from_host, restore, to_host

# Beside Orbax's own files: the tree's containers (Orbax turns int keys into str) and a SHA-256 of everything.
OURS = "varscale.json"
STATE = "state"  # the folder of the tree in a checkpoint of Orbax's newer API, as `vs.initialize_to_checkpoint` writes it


def write(folder: Path, tree: Any) -> None:
    """Write the tree into a folder that does not exist yet.

    Raises:
      ValueError: the tree is empty or has an array of size 0, which Orbax cannot store.
    """
    import orbax.checkpoint as ocp

    skeleton, leaves = describe(tree)
    arrays, stored, dtypes = {}, {}, {}
    for name, value in leaves.items():
        arrays[name], dtype = to_host(value)
        known = _is_storable(arrays[name].dtype)
        if dtype.startswith("key:") or not known:
            dtypes[name] = dtype
        stored[name] = _jax(arrays[name]) if known else arrays[name].view(np.uint8)
        if not arrays[name].size:
            raise ValueError(
                f"params: {name!r} has shape {arrays[name].shape}; Orbax stores no arrays of size 0: save it as .safetensors"
            )
    if not arrays:
        raise ValueError("params: the tree has no leaves; Orbax stores no empty trees: save it as .safetensors")
    with _quiet(), ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), _text_keys(restore(skeleton, stored)))
    (folder / OURS).write_text(json.dumps({"tree": skeleton, "dtypes": dtypes, "sha256": digest(skeleton, arrays)}))


def read(folder: Path) -> Any:
    """The tree of a checkpoint; one that others wrote, in the layout of either of Orbax's APIs, comes as Orbax gives it.

    Raises:
      ValueError: the checkpoint is incomplete or damaged.
    """
    import orbax.checkpoint as ocp

    folder = folder if (folder / "_METADATA").is_file() else folder / STATE
    try:
        with _quiet(), ocp.PyTreeCheckpointer() as checkpointer:
            # As numpy arrays: the devices that wrote it need not be there.
            shapes = checkpointer.metadata(folder.absolute()).item_metadata.tree
            plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
            tree = checkpointer.restore(folder.absolute(), args=ocp.args.PyTreeRestore(restore_args=plain))
    except Exception as error:  # Orbax and TensorStore have no common class of errors, and any of them means this
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"Orbax cannot read it ({first[0][:200]})") from error
    if not (folder / OURS).exists():
        return tree
    try:
        ours = json.loads((folder / OURS).read_text())
        skeleton, dtypes, expected = ours["tree"], ours["dtypes"], ours["sha256"]
        arrays = {name: _typed(np.asarray(_at(tree, route)), dtypes.get(name)) for name, route in _routes(skeleton, ())}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"its {OURS} is damaged or does not describe it ({type(error).__name__}: {error})") from error
    if len(arrays) != len(jax.tree.leaves(tree)):
        raise ValueError(f"its {OURS} does not describe it: {len(arrays)} leaves, and {len(jax.tree.leaves(tree))} are there")
    if digest(skeleton, arrays) != expected:
        raise ValueError("its SHA-256 is not the one that was written: the checkpoint was changed or damaged")
    return restore(skeleton, {name: from_host(array, dtypes.get(name, "")) for name, array in arrays.items()})


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is an Orbax checkpoint of a tree."""
    return any((room / "_METADATA").is_file() for room in (folder, folder / STATE))


def _is_storable(dtype: np.dtype) -> bool:
    """Whether TensorStore, which Orbax writes with, has this dtype; others are stored as bytes."""
    import tensorstore

    try:
        tensorstore.dtype(dtype)
    except (TypeError, ValueError):
        return False
    return True


def _typed(array: np.ndarray, dtype: str | None) -> np.ndarray:
    return array if dtype is None or dtype.startswith("key:") else array.view(dtype_called(dtype))


def _jax(array: np.ndarray) -> Any:
    """Orbax stores ml_dtypes' types as jax arrays only, and numpy's wide types as numpy arrays only (jax would narrow them)."""
    return jax.numpy.asarray(array) if jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype else array


def _text_keys(node: Any) -> Any:
    """The tree with its int keys as text, which is all Orbax takes."""
    if isinstance(node, dict):
        texts = {str(key): _text_keys(child) for key, child in node.items()}
        if len(texts) < len(node):
            raise ValueError(f"params: the keys {list(node)} are the same as text; Orbax cannot tell them apart")
        return texts
    if isinstance(node, list | tuple):
        return type(node)(map(_text_keys, node))
    return node


def _routes(skeleton: Any, route: tuple[Any, ...]):
    """Each leaf's name with the keys that lead to it in what Orbax gives."""
    if skeleton is None:
        return
    ((kind, content),) = skeleton.items()
    if kind == "leaf":
        yield content, route
        return
    for key, child in content:
        yield from _routes(child, (*route, str(key) if kind == "dict" else int(key)))


def _at(tree: Any, route: tuple[Any, ...]) -> Any:
    for key in route:
        tree = tree[key]
    return tree


def _quiet() -> warnings.catch_warnings:
    """Orbax warns of everything it finds out for itself, such as shardings."""
    return warnings.catch_warnings(action="ignore")
