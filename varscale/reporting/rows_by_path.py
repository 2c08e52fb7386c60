"""Tables of rows that are found by path: what their classes share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class HasPath(Protocol):
    """A row."""

    @property
    def path(self) -> str: ...


R = TypeVar("R", bound=HasPath)


class RowsByPath(Generic[R]):
    """Indexed by path, iterated in order; a class that has the attribute `rows` inherits it."""

    rows: tuple[R, ...]

    def __getitem__(self, path: str) -> R:
        """The row at this path.

        Raises:
            KeyError: there is none; the message names the first ones.
        """
        for row in self.rows:
            if row.path == path:
                return row
        raise KeyError(f"no row {path!r}; there are {', '.join(repr(row.path) for row in self.rows[:8])}")

    def __iter__(self) -> Iterator[R]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)
