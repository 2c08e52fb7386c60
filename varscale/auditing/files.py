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
        ValueError: it is damaged, is or holds a pickle, or is of another format.
    """
    path = pathlib.Path(file)
    if path.is_file() and _is_pickle(path):
        told = "PyTorch pickles run code and are not read. Save safetensors.torch.save_file(model.state_dict(), ...)"
        raise ValueError(f"{os.fspath(file)!r} was not read: {told}")
    if path.is_file() and path.suffix == ".npz" and not zipfile.is_zipfile(path):
        raise ValueError(f"{os.fspath(file)!r} was not read: it is no whole .npz file")
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


def _is_pickle(path: pathlib.Path) -> bool:
    """Whether it is what `torch.save` writes: a zip file with a pickle in it, or formerly the pickle alone."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    with path.open("rb") as file:
        return path.suffix in (".bin", ".pt", ".pth", ".ckpt") and file.read(1) == b"\x80"


def _holds_arrays(path: pathlib.Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)
