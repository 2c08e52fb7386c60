"""Reading a checkpoint for an audit: what `vs.transfer.load` reads, NaN included, and NumPy's .npz and flax's .msgpack."""

from __future__ import annotations

import os
import pathlib
import zipfile
from typing import Any

import numpy as np
from flax import serialization

from varscale.transfer.files import load


def read(file: str | os.PathLike[str]) -> Any:
    """The tree of parameters in a file; no pickle is ever read.

    Args:
        file: a safetensors file or index, the folder of an Orbax checkpoint, a .npz of arrays, or a .msgpack that
            `flax.serialization` wrote.

    Raises:
        FileNotFoundError: nothing stands there.
        ValueError: it is damaged, holds pickled objects, or is of another format.
    """
    path = pathlib.Path(file)
    try:
        if path.suffix == ".msgpack":
            return serialization.msgpack_restore(path.read_bytes())
        if path.is_file() and zipfile.is_zipfile(path) and _holds_arrays(path):
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
    except OSError:
        raise
    except Exception as error:  # msgpack, zipfile and NumPy each have several of their own for what is damaged
        raise ValueError(f"{os.fspath(file)!r} was not read: {str(error) or type(error).__name__}") from error
    return load(path, allow_nonfinite=True)


def _holds_arrays(path: pathlib.Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)
