"""The journal of a checkpoint that is being written: what is on the disk for sure, whatever happens next."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from varscale.initialization.orbax_sessions import sync_folder


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a journal says.

    Attributes:
        plan: fingerprint of what is being written; "" where the journal's first line cannot be read.
        digests: of the leaves that are written, by path.
        parts: the parts of Orbax's session that hold them.
        finalizing: whether Orbax was told to finalize.
    """

    plan: str
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    parts: tuple[str, ...] = ()
    finalizing: bool = False


class Journal:
    """A file of JSON lines beside the checkpoint, of which every line is on the disk before the next step is taken."""

    def __init__(self, path: Path):
        self.file = path.with_name(f"{path.name}.journal")

    def read(self) -> Progress | None:
        """What the journal says; None where there is none. A last line that was cut off is not counted."""
        if not self.file.exists():
            return None
        lines = self.file.read_text(errors="replace").split("\n")[:-1]
        progress = Progress("")
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
                progress = _with(progress, entry) if number else Progress(str(entry["plan"]))
            except (ValueError, KeyError, TypeError, AttributeError):
                return progress if number == len(lines) - 1 and number else Progress("")
        return progress

    def begin(self, plan: str) -> None:
        """Start anew."""
        self._write("w", {"plan": plan})
        sync_folder(self.file.parent)

    def wrote(self, digests: Mapping[str, str], parts: Sequence[str]) -> None:
        """Leaves are on the disk, in these parts of the session."""
        self._write("a", {"digests": dict(digests), "parts": list(parts)})

    def finalizing(self) -> None:
        """From here on the session cannot be trusted."""
        self._write("a", {"finalizing": True})

    def end(self) -> None:
        """The checkpoint is whole."""
        self.file.unlink()
        sync_folder(self.file.parent)

    def _write(self, mode: str, entry: Mapping[str, Any]) -> None:
        with open(self.file, mode) as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _with(progress: Progress, entry: Mapping[str, Any]) -> Progress:
    if entry.get("finalizing"):
        return dataclasses.replace(progress, finalizing=True)
    return dataclasses.replace(progress, digests={**progress.digests, **entry["digests"]}, parts=tuple(entry["parts"]))
