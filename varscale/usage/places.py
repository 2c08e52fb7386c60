"""Where in a program the walk is: scopes, and the names that a prediction gives to rows of equations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from varscale.programs.pieces import PIECE
from varscale.programs.scopes import opened


class Places:
    """The scopes around the equation that is walked."""

    def __init__(self) -> None:
        self._around = ("", "")  # the path of the call that the walk is in, and of the piece
        self._rows: dict[str, list[tuple[int, ...]]] = {}

    def scope(self, eqn: Any) -> str:
        """The path of the scope that an equation is in."""
        return opened(eqn, *self._around)[1]

    def row(self, eqn: Any, within: Sequence[int]) -> str:
        """The row of an equation: its scope and primitive, and from the second one there on which it is.

        Args:
            eqn: the equation.
            within: the equations that it is inside of, which tell two calls of one jaxpr apart.
        """
        path = "/".join(filter(None, [self.scope(eqn), eqn.primitive.name]))
        met, place = self._rows.setdefault(path, []), tuple(within)
        if place not in met:
            met.append(place)
        count = met.index(place)
        return f"{path}#{count}" if count else path

    @contextlib.contextmanager
    def inside(self, eqn: Any) -> Iterator[None]:
        """Where the body of an equation is walked."""
        outer = self._around
        path = self.scope(eqn)
        self._around = path, path if eqn.params.get("name") == PIECE else outer[1]
        yield
        self._around = outer
