"""Where a Monitor's records go: JSON lines, TensorBoard, or anything that takes (step, dict of numbers)."""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from varscale.measuring.records import Records
from varscale.reporting.records import jsonable, restored

Scalars = Mapping[str, float]
Sink = Callable[[int, Scalars], Any]
_LINES = (".jsonl", ".ndjson")


def as_sink(given: Any) -> Sink:
    """The function of (step, scalars) behind what a user gives as a sink.

    Args:
        given: the path of a JSON lines file (".jsonl" or ".ndjson"), the path of a directory for TensorBoard, an object with
            `write_scalars(step, scalars)` (clu) or `add_scalar(tag, value, step)` (a SummaryWriter), or a function of both.

    Raises:
        TypeError: it is none of these.
        ValueError: a path is neither a JSON lines file nor a directory, or the file holds something else.
        ImportError: it is a directory and tensorboardX is not installed.
        OSError: the path cannot be written.
    """
    if isinstance(given, str | os.PathLike):
        text = os.fspath(given)
        path = pathlib.Path(text)
        if path.suffix in _LINES and not path.is_dir():
            return JsonLines(path)
        if path.is_dir() or text.endswith(("/", os.sep)) or not path.suffix:
            return _summary_writer(_tensorboard(path))
        raise ValueError(f'a sink must be a path that ends in ".jsonl", or a directory for TensorBoard, not {text!r}')
    if hasattr(given, "write_scalars"):
        return lambda step, scalars: given.write_scalars(step, dict(scalars))
    if hasattr(given, "add_scalar"):
        return _summary_writer(given)
    if callable(given) and not isinstance(given, type):
        return lambda step, scalars: given(step, dict(scalars))
    raise TypeError(
        "a sink must be a path, an object with write_scalars(step, dict) or add_scalar(tag, value, step), "
        f"or a function f(step, dict), not {given!r}"
    )


class JsonLines:
    """A file of one JSON object a line: "step", "time" in seconds since 1970, and the scalars.

    Lines are appended whole or not at all: what a killed process left of a line is removed before the next one is written.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Check that the file can be written, and mend its end.

        Raises:
            ValueError: the file exists and holds something else.
            OSError: it cannot be written.
        """
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            with self.path.open("rb") as file:
                _parsed(file.readline(), self.path, 1)
        with self.path.open("ab"):
            pass  # it can be written
        _mend(self.path)

    def __call__(self, step: int, scalars: Scalars) -> None:
        """Append one line.

        Raises:
            OSError: it could not be written; nothing of it stays.
        """
        fields = jsonable({"step": int(step), "time": time.time(), **{key: float(value) for key, value in scalars.items()}})
        line = json.dumps(fields, separators=(",", ":")).encode() + b"\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            if os.write(file, line) != len(line):
                os.ftruncate(file, size)
                raise OSError(f"{self.path}: the disk is full; the record of step {step} was not written")
        finally:
            os.close(file)


def read(path: str | os.PathLike[str]) -> Records:
    """The records of a JSON lines file; a last line that was not finished is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no record; its number is named.
    """
    found = []
    with pathlib.Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n") and (fields := _parsed(line, path, number)) is not None:
                found.append(fields)
    return Records(found)


def _parsed(line: bytes, path: str | os.PathLike[str], number: int) -> dict[str, Any] | None:
    """The record of a line; None for one that is empty or not finished."""
    if not line.endswith(b"\n") or not line.strip():
        return None
    try:
        fields = restored(json.loads(line))
        int(fields["step"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{os.fspath(path)}: line {number} is no record of a Monitor: {line[:60]!r}") from error
    return fields


def _mend(path: pathlib.Path) -> None:
    """Remove what comes after the last end of a line."""
    with path.open("rb+") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            last = file.read(end - start).rfind(b"\n")
            if last >= 0:
                end = start + last + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def _tensorboard(directory: pathlib.Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(f"the sink {str(directory)!r} needs tensorboardX: pip install 'varscale[tensorboard]'") from error
    # Its own thread writes, and flushes what it has every second, not every two minutes: a killed process loses no more.
    return SummaryWriter(str(directory), flush_secs=1)


def _summary_writer(writer: Any) -> Sink:
    def write(step: int, scalars: Scalars) -> None:
        for key, value in scalars.items():
            writer.add_scalar(key.rstrip("/"), value, step)
        if hasattr(writer, "flush"):
            writer.flush()

    return write
