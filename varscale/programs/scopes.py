"""The modules and `jax.named_scope` blocks that an equation of a jaxpr was made in, read from its name stack."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

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
    last = ""
    for name, call in _compat.scopes(eqn):
        if name.startswith((MODULE, WITHIN)):
            path = whole_path(name, piece)
            if last and not last.startswith((MODULE, WITHIN)) and path.endswith(last):
                found.pop()  # flax opens a scope of its own for each module
        elif "->" in name:  # so does `jnp.einsum`
            continue
        else:
            path = "/".join(filter(None, [path, name]))
            found.append(Scope(path, call))
        last = name
    return found, path


def whole_path(mark: str, piece: str) -> str:
    """The whole path that a mark tells."""
    if mark.startswith(MODULE):
        return mark.removeprefix(MODULE)
    inside = mark.removeprefix(WITHIN)
    return piece + inside if not inside or inside.startswith(".") else f"{piece}/{inside}"


def ends(eqns: Sequence[Any], outputs: Sequence[Any], path: str = "", piece: str = "") -> dict[int, list[tuple[Scope, Any]]]:
    """The `jax.named_scope` blocks that end with each equation, the innermost first, and what each puts out.

    That is, of what is used after the block, the largest floating-point array, the last of equals.

    Args:
        eqns: the equations of a jaxpr.
        outputs: its output variables.
        path: the scopes that the call of the jaxpr was made in.
        piece: the path at which the piece that it is part of is called.
    """
    scopes = [opened(eqn, path, piece)[0] for eqn in eqns]
    users: dict[Any, list[int]] = collections.defaultdict(list)
    for i, eqn in enumerate(eqns):
        for var in eqn.invars:
            if not _compat.is_literal(var):
                users[var].append(i)
    for var in outputs:
        if not _compat.is_literal(var):
            users[var].append(-1)
    inside: dict[Scope, list[int]] = collections.defaultdict(list)
    for i, around in enumerate(scopes):
        for scope in around:
            inside[scope].append(i)
    found: dict[int, list[tuple[Scope, Any]]] = collections.defaultdict(list)
    for scope, mine in inside.items():
        own = set(mine)
        out = [v for i in mine for v in eqns[i].outvars if is_floating(v) and not own.issuperset(users[v])]
        if out:
            largest = max(math.prod(v.aval.shape) for v in out)
            found[mine[-1]].append((scope, [v for v in out if math.prod(v.aval.shape) == largest][-1]))
    for i, ended in found.items():
        ended.sort(key=lambda end, order=scopes[i]: -order.index(end[0]))
    return found


def is_floating(var: Any) -> bool:
    """Whether a variable of a jaxpr holds floating-point or complex numbers."""
    return jnp.issubdtype(getattr(var.aval, "dtype", jnp.int32), jnp.inexact)
