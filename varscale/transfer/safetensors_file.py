"""Trees in safetensors files: named arrays in one flat file that executes nothing.

The format knows names, shapes and most dtypes. What it does not know stands in the file's metadata: the tree's containers,
dtypes it has no code for (stored as bytes), and a SHA-256 of everything, since the format has no checksum of its own. Files
that others wrote have none of this and are read as a flat dict.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from varscale.transfer.structure import Skeleton, describe, digest, dtype_called, from_host, restore, to_host

TREE, DTYPES, DIGEST = "varscale.tree", "varscale.dtypes", "varscale.sha256"

# Codes of the format, with the dtypes they are for. Written are only those that its oldest supported release writes.
_CODES = {
    "BOOL": "bool",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
}
_WRITTEN = frozenset(list(_CODES.values())[:15])


def write(path: Path, tree: Any) -> None:
    """Write the tree into one file, which must be free to be overwritten."""
    import safetensors.numpy

    skeleton, leaves = describe(tree)
    arrays, stored, dtypes = {}, {}, {}
    for name, value in leaves.items():
        arrays[name], dtype = to_host(value)
        known = dtype in _WRITTEN
        if not known:
            dtypes[name] = {"dtype": dtype, "shape": list(arrays[name].shape)}
        # Keys of random generators are stored as their data, which the format does know.
        stored[name] = arrays[name] if known or dtype.startswith("key:") else arrays[name].reshape(-1).view(np.uint8)
    metadata = {TREE: json.dumps(skeleton), DTYPES: json.dumps(dtypes), DIGEST: digest(skeleton, arrays)}
    safetensors.numpy.save_file(stored, path, metadata=metadata)


def read(path: Path) -> Any:
    """The tree of a file, or a flat dict of arrays where this module did not write it.

    Raises:
      ValueError: the file is truncated, corrupted or not of this format.
    """
    import safetensors

    content = path.read_bytes()
    try:
        entries = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise ValueError(f"it is no whole safetensors file ({error})") from error
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header.get("__metadata__") or {}
    arrays = {name: _array(name, entry) for name, entry in entries}
    # Any of the three marks the file as ours, so that damage to the name of one does not pass it off as another's.
    return _checked(arrays, metadata) if {TREE, DTYPES, DIGEST} & set(metadata) else arrays


def _array(name: str, entry: dict[str, Any]) -> np.ndarray:
    if entry["dtype"] not in _CODES:
        raise ValueError(f"{name!r} has the dtype {entry['dtype']}, which is not supported; known are {', '.join(_CODES)}")
    return np.frombuffer(entry["data"], dtype_called(_CODES[entry["dtype"]])).reshape(entry["shape"])


def _checked(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> Any:
    try:
        skeleton: Skeleton = json.loads(metadata[TREE])
        dtypes = {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in json.loads(metadata[DTYPES]).items()}
        expected = metadata[DIGEST]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"its metadata is damaged ({type(error).__name__}: {error})") from error
    if strange := set(dtypes) - set(arrays):
        raise ValueError(f"its metadata names leaves that are not there: {', '.join(sorted(strange)[:4])}")
    for name, (dtype, shape) in dtypes.items():
        if not dtype.startswith("key:"):
            try:
                arrays[name] = arrays[name].view(dtype_called(dtype)).reshape(shape)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name!r} is not the {dtype} of shape {shape} that its metadata says ({error})") from error
    if digest(skeleton, arrays) != expected:
        raise ValueError("its SHA-256 is not the one that was written: the file was changed or damaged")
    return restore(skeleton, {name: from_host(array, dtypes.get(name, ("", ()))[0]) for name, array in arrays.items()})
