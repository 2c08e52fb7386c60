"""Tables of rows that are found by path: what their classes share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar


class HasPath(Protocol):
    """A row."""

    @property
    def path(self) -> str: ...


R = TypeVar("R", bound=HasPath)


def found_by_path(rows: Sequence[R], path: str, what: str = "row") -> R:
    """The row at this path.

    Raises:
        KeyError: there is none; the message names those whose paths begin alike, or the first ones.
    """
    for row in rows:
        if row.path == path:
            return row
    paths = [row.path for row in rows]
    near = [p for p in paths if p.split("/")[0] == path.split("/")[0]] or paths
    raise KeyError(f"no {what} has the path {path!r}; there are {', '.join(near[:8])}")


class RowsByPath(Generic[R]):
    """Indexed by path, iterated in order; a class that has the attribute `rows` inherits it."""

    rows: tuple[R, ...]

    def __getitem__(self, path: str) -> R:
        """The row at this path.

        Raises:
            KeyError: there is none; the message lists paths that begin alike.
        """
        return found_by_path(self.rows, path)

    def __iter__(self) -> Iterator[R]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)
