"""What will be done for every leaf of a model, and what was: the same table before the draw and after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from varscale.programs.tables import shape_text
from varscale.programs.trees import open_tree
from varscale.reporting.layout import Column, terminal_width, text_table, wrapped

How = Literal["constant", "elementwise", "orthogonal", "reduction", "data", "state", "given", "untouched"]

HOW = {
    "constant": "one number, or what the program computes from none",
    "elementwise": "drawn alone; the bits of the jitted init",
    "orthogonal": "drawn alone by a decomposition; the bits of the jitted init",
    "reduction": "drawn alone; sums over an axis may differ from the jitted init in the last places",
    "data": "computed from the model's input, as flax does",
    "state": "the state of a random generator",
    "given": "not drawn",
    "untouched": "not drawn",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf.

    Attributes:
        path: its keys joined with "/".
        shape: its shape.
        dtype: its dtype.
        origin: "declared" (the model's own initializer), "scheme", "given" or "kept".
        law: the law in words: the operations of the declared initializer, or the initializer laid on it.
        how: how its numbers come about; see `HOW`.
        notes: what else there is to know: a cast, a pattern, a draw that every device makes whole, a collective.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    origin: Literal["declared", "scheme", "given", "kept"]
    law: str
    how: How
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Account:
    """What became of every leaf, in the order of the tree.

    Attributes:
        entries: by path.
        notes: what holds for the whole, such as a key whose bits depend on the layout.
    """

    entries: Mapping[str, Entry]
    notes: tuple[str, ...] = ()

    def __getitem__(self, path: str) -> Entry:
        return self.entries[path]

    def of(self, *, origin: str | None = None, how: str | None = None) -> tuple[str, ...]:
        """The paths of the leaves with this origin, or drawn in this way."""
        return tuple(e.path for e in self.entries.values() if origin in (None, e.origin) and how in (None, e.how))

    @property
    def drawn(self) -> tuple[str, ...]:
        """The paths of the leaves that were drawn."""
        return tuple(e.path for e in self.entries.values() if e.origin in ("declared", "scheme"))

    @property
    def given(self) -> tuple[str, ...]:
        """The paths of the leaves whose values were given."""
        return self.of(origin="given")

    def verify(self, params: Any) -> None:
        """Check that a tree has the leaves of this account, of the shapes and dtypes it names.

        Raises:
            ValueError: a leaf is missing, unexpected, or of another shape or dtype.
        """
        found = {leaf.path: leaf for leaf in open_tree(params, "params").leaves}
        wrong = [f"{path} is missing" for path in self.entries if path not in found]
        wrong += [f"{path} was not expected" for path in found if path not in self.entries]
        for path, entry in self.entries.items():
            leaf = found.get(path)
            if leaf is not None and (leaf.shape, leaf.dtype) != (entry.shape, entry.dtype):
                wrong.append(f"{path} is {leaf.dtype}{list(leaf.shape)}, not {entry.dtype}{list(entry.shape)}")
        if wrong:
            raise ValueError(f"params are not those of the account: {'; '.join(wrong[:6])}{' ...' if len(wrong) > 6 else ''}")

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for entry in self.entries.values():
            counts[entry.how] = counts.get(entry.how, 0) + 1
        told = [f"{count} {how}" for how, count in counts.items()] or ["no variables"]
        return ", ".join(told) + "".join(f"; {note}" for note in self.notes)

    def table(self, width: int | None = None) -> str:
        """All leaves, one a line, in the order of the tree; columns that do not fit are named below.

        Args:
            width: columns of the terminal; None for the terminal's own, 80 where there is none.

        Raises:
            ValueError: `width` is below 40.
        """
        width, entries = terminal_width(width), tuple(self.entries.values())
        columns = [
            Column("leaf", tuple(self.entries), is_left=True),
            Column("shape", tuple(shape_text(e.shape) for e in entries), 0),
            Column("dtype", tuple(str(e.dtype) for e in entries), 4),
            Column("origin", tuple(e.origin for e in entries), 2, is_left=True),
            Column("how", tuple(e.how for e in entries), 1, is_left=True),
            Column("law", tuple(e.law for e in entries), 3, is_left=True),
            Column("notes", tuple("; ".join(e.notes) for e in entries), 5, is_left=True),
        ]
        shown, missing = text_table([columns[0], *(c for c in columns[1:] if any(c.cells))], width)
        told = [str(self), *([f"Not shown at this width: {', '.join(missing)}."] if missing else [])]
        return "\n".join([shown, *(wrapped(line, width) for line in told)])


def is_rng_key(dtype: Any) -> bool:
    """Whether a dtype is one of random keys."""
    return jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)
