"""Save and load parameters: safetensors files and Orbax checkpoints, whole or not at all, and never a pickle."""

import contextlib
import os
import pickletools
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from varscale.programs.trees import open_tree
from varscale.transfer import orbax_folder, safetensors_file, shards
from varscale.transfer.structure import leaves_of, not_finite

PICKLES = "a pickle runs whatever code it holds when it is read. Convert it once, where you trust it, to safetensors"
_FORMATS = "give NAME.safetensors for one file, or a name without suffix (or .orbax) for the folder of an Orbax checkpoint"
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib", ".npy", ".npz"})


class CheckpointError(ValueError):
    """A checkpoint that is not read, and why: pickled, damaged, not finite, or not what was asked for."""


def save(path: str | os.PathLike[str], params: Any) -> None:
    """Write a tree of parameters. What stood at `path` is replaced when the new checkpoint is whole, and untouched if it never
    is.

    Args:
      path: NAME.safetensors for one file; without a suffix, or with .orbax, the folder of an Orbax checkpoint.
      params: nested dicts, lists and tuples of arrays of any dtype, linen variables, an nnx.State or nnx.Module.

    Raises:
      ValueError: the path names no format, or the format cannot hold the tree.
      TypeError: a leaf is not an array.
      FileNotFoundError: the folder that `path` is to stand in does not exist.
      FileExistsError: a folder stands at `path` that is no checkpoint.
    """
    path = Path(path)
    if path.suffix in _PICKLE_SUFFIXES:
        raise ValueError(f"path is {str(path)!r}: {path.suffix} names a format that can hold a pickle; {_FORMATS}")
    if path.suffix not in (".safetensors", ".orbax", ""):
        raise ValueError(f"path is {str(path)!r}: {path.suffix} names no format known here; {_FORMATS}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path is {str(path)!r}: there is no folder {str(path.parent)!r}")
    if path.suffix == ".safetensors":
        if path.is_dir():
            raise FileExistsError(f"path is {str(path)!r}, and a folder stands there")
        with _beside(path) as temporary:
            safetensors_file.write(temporary, params)
            temporary.chmod(_usual_mode(temporary.parent))  # the library's own files are private
            _flush(temporary)
            os.replace(temporary, path)
    else:
        if path.is_file() or (path.is_dir() and any(path.iterdir()) and not orbax_folder.is_checkpoint(path)):
            raise FileExistsError(f"path is {str(path)!r}, and something that is no Orbax checkpoint stands there")
        with _beside(path) as temporary:
            orbax_folder.write(temporary, params)
            _swap(temporary, path)
    _flush(path.parent)


def load(path: str | os.PathLike[str], *, like: Any = None, allow_nonfinite: bool = False) -> Any:
    """Read a tree of parameters, whole or not at all.

    The format is told by content, not by name. Files that `save` did not write are read too: safetensors as a flat dict (which
    `graft` takes as it is), split over several files or not, Orbax checkpoints as Orbax gives them. Pickles (PyTorch's .pt and
    .bin, joblib, object arrays) are refused.

    Args:
      path: a safetensors file; an index of several ("model.safetensors.index.json"); a folder that holds either; or the folder
        of an Orbax checkpoint.
      like: a tree of arrays or `jax.ShapeDtypeStruct`; paths, shapes and dtypes must be the same as its own, and its kinds of
        containers are what comes back.
      allow_nonfinite: whether NaN and infinity are read as they are.

    Returns:
      Nested dicts, lists and tuples of numpy arrays, or a tree of the kind of `like`.

    Raises:
      FileNotFoundError: nothing stands at `path`.
      CheckpointError: what stands there is a pickle, damaged, holds values that are not finite, or is not like `like`.
    """
    path = Path(path)
    try:
        tree = _read(path)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} was not read: {error}") from error
    if not allow_nonfinite and (bad := {name: count for name, leaf in leaves_of(tree) if (count := not_finite(leaf))}):
        listed = ", ".join(f"{name} ({count})" for name, count in list(bad.items())[:4])
        raise CheckpointError(
            f"{str(path)!r} was not read: {len(bad)} leaves hold NaN or infinity: {listed}; allow_nonfinite=True reads them"
        )
    return tree if like is None else _as_like(tree, like, path)


def _read(path: Path) -> Any:
    """The tree at the path, whatever format known here it is in."""
    if path.is_dir():
        if orbax_folder.is_checkpoint(path):
            return orbax_folder.read(path)
        file = shards.find(path)
        if file is None:
            raise CheckpointError(
                f"{str(path)!r} is a folder, but neither an Orbax checkpoint of a tree (it has no _METADATA) nor one with a "
                f"safetensors file or an index of some"
            )
        return _read(file)
    with open(path, "rb") as file:
        head = file.read(4096)
    return shards.read(path, _read_file) if shards.is_index(head) else _read_file(path)


def _read_file(path: Path) -> Any:
    _refuse_others(path)
    return safetensors_file.read(path)


def _as_like(tree: Any, like: Any, path: Path) -> Any:
    """The tree in the containers of `like`, which it must match."""
    wanted, found = open_tree(like, "like"), {leaf.path: leaf for leaf in open_tree(tree, str(path)).leaves}
    wrong = [f"{leaf.path} is missing" for leaf in wanted.leaves if leaf.path not in found]
    wrong += [f"{name} was not expected" for name in found if name not in set(wanted.paths)]
    for leaf in wanted.leaves:
        other = found.get(leaf.path)
        if other is not None and (leaf.shape, leaf.dtype) != (other.shape, other.dtype):
            wrong.append(f"{leaf.path} is {other.dtype}{list(other.shape)}, not {leaf.dtype}{list(leaf.shape)}")
    if wrong:
        raise CheckpointError(
            f"{str(path)!r} is not like the tree given: {'; '.join(wrong[:6])}{' ...' if len(wrong) > 6 else ''}"
        )
    return wanted.rebuild([found[leaf.path].value for leaf in wanted.leaves])


def _refuse_others(path: Path) -> None:
    """Raise CheckpointError, with the reason, for what is known not to be a safetensors file."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head:
        raise CheckpointError(f"{str(path)!r} is empty")
    compressed = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith(".pkl") for name in names):
            raise CheckpointError(
                f"{str(path)!r} is refused: it is a PyTorch file, which is a pickle in a zip archive; {PICKLES}"
            )
        raise CheckpointError(f"{str(path)!r} is a zip archive (of {', '.join(names[:3])}), not a safetensors file; {_FORMATS}")
    if head.startswith(b"\x93NUMPY"):
        if b"'O'" in head[:512] or b"|O" in head[:512]:
            raise CheckpointError(f"{str(path)!r} is refused: it is a numpy array of objects, which is a pickle; {PICKLES}")
        raise CheckpointError(f"{str(path)!r} is a numpy array, not a safetensors file; {_FORMATS}")
    if head.startswith(b"\x89HDF"):
        raise CheckpointError(f"{str(path)!r} is an HDF5 file; read it with h5py and give graft the arrays by name")
    if compressed or _is_zlib(head):
        kind = compressed or "zlib"
        raise CheckpointError(
            f"{str(path)!r} is refused: it is compressed ({kind}), as joblib's pickles are; if it is one, {PICKLES}"
        )
    if _is_pickle(head, path):
        raise CheckpointError(f"{str(path)!r} is refused: it is a pickle; {PICKLES}")


def _is_zlib(head: bytes) -> bool:
    # A safetensors file begins with its header's length: no such file has one that looks like this and a '{' at byte 8.
    return head[:2] in (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda") and head[8:9] != b"{"


def _is_pickle(head: bytes, path: Path) -> bool:
    """Whether the bytes read as opcodes of the pickle machine; nothing is executed."""
    if head[8:9] == b"{":
        return False
    if head[0] == 0x80 and len(head) > 1 and 2 <= head[1] <= 5:
        return True
    try:  # protocols 0 and 1 have no mark: read opcodes to the end, or as far as the first page goes
        for count, _ in enumerate(pickletools.genops(head)):
            if count > 200:
                return True
        return True
    except Exception:
        return False


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A free path in the same folder (and so on the same disk), gone at the end."""
    room = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield room / path.name
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _swap(new: Path, path: Path) -> None:
    """Put a folder in the place of another, which steps aside first and is put back if that fails."""
    if not path.exists():
        os.rename(new, path)
        return
    old = new.with_name(f"{new.name}.old")
    os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(old, path)
        raise


def _usual_mode(room: Path) -> int:
    """The permissions that new files have here."""
    probe = room / ".mode"
    probe.touch()
    return probe.stat().st_mode & 0o777


def _flush(path: Path) -> None:
    """Have the disk hold what was written, file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
