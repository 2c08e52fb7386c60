"""Orbax's partial saving, which it calls experimental: all that this package knows of it stands here.

A checkpoint is written in several calls into a session, the folder `<path>.partial_save`, one folder inside it a call, and
becomes the checkpoint `<path>` when it is finalized. What was saved cannot be replaced.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

Route = tuple[str, ...]


def session(path: Path) -> Path:
    """The folder that a checkpoint is written in until it is finalized."""
    return path.with_name(f"{path.name}.partial_save")


def parts(path: Path) -> list[str]:
    """What the session holds so far: a folder a call, committed or not."""
    folder = session(path)
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def keep_parts(path: Path, kept: Sequence[str]) -> bool:
    """Drop the parts that are not named; whether all that are named are there, and were committed."""
    for name in parts(path):
        if name not in kept:
            shutil.rmtree(session(path) / name)
    return set(kept) <= set(parts(path)) and all((session(path) / name / "commit_success.txt").is_file() for name in kept)


def save(path: Path, leaves: Mapping[Route, Any]) -> None:
    """Add leaves to the session, on the disk before this returns."""
    import orbax.checkpoint.experimental.v1 as ocp

    before = set(parts(path))
    with _quiet():
        ocp.partial.save(str(path.absolute()), _nested(leaves))
    for name in set(parts(path)) - before:
        sync_tree(session(path) / name)
    sync_folder(session(path))


def finalize(path: Path) -> None:
    """Make the session the checkpoint."""
    import orbax.checkpoint.experimental.v1 as ocp

    with _quiet():
        ocp.partial.finalize(str(path.absolute()))
    sync_folder(path.parent)


def read(path: Path, wanted: Mapping[Route, jax.ShapeDtypeStruct], others: Iterable[Route]) -> list[Any]:
    """Some leaves of the checkpoint, in the order they are asked for.

    Args:
        path: the checkpoint.
        wanted: their shapes and dtypes.
        others: the routes of all other leaves, which are not read.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    with _quiet():
        tree = ocp.load(str(path.absolute()), _nested({**wanted, **dict.fromkeys(others, ocp.PLACEHOLDER)}))
    return [_at(tree, route) for route in wanted]


def discard(path: Path) -> None:
    """Throw the session away, and the checkpoint if there is one."""
    for folder in (session(path), path):
        if folder.exists():
            shutil.rmtree(folder)
    sync_folder(path.parent)


def sync_tree(folder: Path) -> None:
    """Have the disk hold all files below a folder."""
    for room, _, files in os.walk(folder):
        for name in files:
            _sync(Path(room) / name)
        _sync(Path(room))


def sync_folder(folder: Path) -> None:
    """Have the disk hold which files a folder has."""
    if folder.is_dir():
        _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _nested(leaves: Mapping[Route, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for route, leaf in leaves.items():
        node = tree
        for name in route[:-1]:
            node = node.setdefault(name, {})
        node[route[-1]] = leaf
    return tree


def _at(tree: Any, route: Route) -> Any:
    for name in route:
        tree = tree[name]
    return tree


def _quiet() -> warnings.catch_warnings:
    return warnings.catch_warnings(action="ignore")
