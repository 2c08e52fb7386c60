"""Checkpoints split over several safetensors files, with an index that names the file of each array (`weight_map`)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

INDEX = ".safetensors.index.json"


def find(folder: Path) -> Path | None:
    """The one file of a folder to read: its index, or its only safetensors file; None where it has neither.

    Raises:
      ValueError: there are several, so that the caller has to choose.
    """
    for kind, files in (
        ("indices", sorted(folder.glob(f"*{INDEX}"))),
        ("safetensors files without an index", sorted(folder.glob("*.safetensors"))),
    ):
        if len(files) > 1:
            names = ", ".join(file.name for file in files[:4]) + (" ..." if len(files) > 4 else "")
            raise ValueError(f"the folder holds {len(files)} {kind}: {names}; give the path of one")
        if files:
            return files[0]
    return None


def is_index(head: bytes) -> bool:
    """Whether a file that begins so is JSON. A safetensors file begins with its header's length, which has zero bytes."""
    return head.lstrip()[:1] == b"{" and b"\0" not in head[:8]


def read(index: Path, read_shard: Callable[[Path], Any]) -> dict[str, np.ndarray]:
    """The arrays that an index names, each from the file it names for it, in the order of the index.

    Args:
      index: a JSON file with a "weight_map" from the names of arrays to files beside it.
      read_shard: reads one of those files into a flat dict.

    Raises:
      ValueError: the index is malformed, or a file or an array that it names is not there.
    """
    weight_map = _weight_map(index)
    files = list(dict.fromkeys(weight_map.values()))
    if absent := [name for name in files if not (index.parent / name).is_file()]:
        listed = ", ".join(absent[:4]) + (" ..." if len(absent) > 4 else "")
        raise ValueError(f"{len(absent)} of the {len(files)} files that it names are not there: {listed}")
    arrays: dict[str, np.ndarray] = {}
    for file in files:
        shard = read_shard(index.parent / file)
        wanted = [name for name, home in weight_map.items() if home == file]
        if missing := [name for name in wanted if name not in shard]:
            raise ValueError(f"{file!r} does not hold {', '.join(missing[:4])}, which the index says it does")
        arrays.update((name, shard[name]) for name in wanted)
    return {name: arrays[name] for name in weight_map}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"it is no index of safetensors files: JSON with a 'weight_map' ({error!r})") from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError("it is no index of safetensors files: its 'weight_map' must map names of arrays to names of files")
    if outside := [file for file in weight_map.values() if Path(file).name != file or file in ("", "..")]:
        raise ValueError(f"its 'weight_map' names {outside[0]!r}; files must stand beside the index")
    return weight_map
