"""What goes wrong in a prediction, told with the equation that it goes wrong in."""

from __future__ import annotations

import traceback
from typing import Any

from varscale import _compat
from varscale.programs.scopes import opened
from varscale.theory.graph.nodes import Node


class PredictionError(ValueError):
    """A model that cannot be predicted; the message says why, where, and what to do.

    Attributes:
        equation: the equation that the rules do not cover; None of any other failure.
    """

    equation: Any = None


UNCOVERED = (
    NotImplementedError,
    RecursionError,
)  # what a rule raises that does not cover an equation: it may be drawn


def source(eqn: Any) -> str:
    """Where an equation was written: "model.py:12 (Block)", inside a piece the path in that."""
    path = opened(eqn)[1].removeprefix("/")
    return _compat.source_line(eqn) + (f" ({path})" if path else "")


def told(error: Exception) -> str:
    """What an error says."""
    return f"{type(error).__name__}: {error}"


def located(error: Exception, eqn: Any = None) -> PredictionError:
    """The error with the equation that it belongs to: its primitive, source line and module path.

    Moments are computed when they are asked for, which may be many equations later: then the equation is the one that made
    the innermost node which was being computed.

    Args:
        error: what was raised.
        eqn: the equation that was being interpreted; None where all were.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for name in ("self", "node"):
            node = frame.f_locals.get(name)
            if isinstance(node, Node) and node.origin is not None:
                eqn = node.origin
    where = "" if eqn is None else f"primitive {eqn.primitive.name!r} at {source(eqn)}: "
    found = PredictionError(where + told(error))
    found.equation = eqn if isinstance(error, UNCOVERED) else None
    return found
