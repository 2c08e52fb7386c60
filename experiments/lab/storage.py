"""Files and folders that are written whole or not at all: filled under another name, then renamed."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

MARK = "results.json"  # the file by which a folder of results is known; its "files" names all that belongs to it


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and is gone when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of the results in `path`. What others keep in `path` moves along."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if path.exists():
            os.rename(path, Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent)) / path.name)
        os.rename(temporary, path)
        recover(path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def recover(path: Path) -> None:
    """Clear away what a process killed inside `replaced_folder(path)` left beside `path`; nothing but its own files goes."""
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        shutil.rmtree(partial)
    for trash in path.parent.glob(f".{path.name}.*.old"):
        old = trash / path.name
        if old.exists() and not path.exists():
            os.rename(old, path)
        elif old.exists():
            ours = set(files_of(old))
            for entry in old.iterdir():
                if entry.name not in ours and not (path / entry.name).exists():
                    os.rename(entry, path / entry.name)
        shutil.rmtree(trash)


def files_of(folder: Path) -> list[str]:
    """The names of the files that belong to the results in `folder`: none where there are no results."""
    try:
        return [*json.loads((folder / MARK).read_text())["files"], MARK]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
