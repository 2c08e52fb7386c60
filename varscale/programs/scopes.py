"""The modules and `jax.named_scope` blocks that an equation of a jaxpr was made in, read from its name stack."""

from __future__ import annotations

from typing import Any, NamedTuple

from varscale import _compat
from varscale.programs.marks import MODULE, WITHIN


class Scope(NamedTuple):
    """A scope an equation was made in: its full path, and which call of it."""

    path: str
    call: int


def opened(eqn: Any, path: str = "", piece: str = "") -> tuple[list[Scope], str]:
    """The blocks that an equation is in, from the outermost in, and its path.

    A module's scope says its whole path, or that inside the piece which is called at the path `piece`.
    """
    found: list[Scope] = []
    for name, call in _compat.scopes(eqn):
        if name.startswith((MODULE, WITHIN)):
            path = whole_path(name, piece)
        elif "->" not in name:  # `jnp.einsum` opens a scope of its own
            path = "/".join(filter(None, [path, name]))
            found.append(Scope(path, call))
    return found, path


def whole_path(mark: str, piece: str) -> str:
    """The whole path that a mark tells."""
    if mark.startswith(MODULE):
        return mark.removeprefix(MODULE)
    inside = mark.removeprefix(WITHIN)
    return piece + inside if not inside or inside.startswith(".") else f"{piece}/{inside}"
