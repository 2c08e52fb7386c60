"""Whole numbers of which only the shape is given (ids, lengths): what may be asked of them without knowing them.

Ids are uniform, so a row of `ids == arange(n)` is a row of the identity matrix, looked up by id. Masks are all true: an id is a
valid one and no padding (`ids != 0`, `ids > 0`, `ids < n`), a length is the whole (`arange(n) < lengths`). What else is done
with such numbers takes them for standard normals, in doubt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax import lax
from scipy import special

from varscale.theory.graph import layout
from varscale.theory.graph.expressions import Apply
from varscale.theory.graph.layout import Value
from varscale.theory.graph.linear_nodes import Concat
from varscale.theory.graph.nodes import UNKNOWN, Leaf, Node
from varscale.theory.integrals.hermite_series import Z
from varscale.theory.rules.lookup import rows_by_index
from varscale.theory.rules.registry import Context

_TURNED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}


def unknown(interpreter: Context, name: str, shape: Sequence[int]) -> Value:
    """Whole numbers described by their shape."""
    x = interpreter.leaf(("ids", name), shape, 0.0, 1.0, odd=False)
    x.node.flagged, x.node.doubt = "assumed", UNKNOWN
    return x


def compared(interpreter: Context, name: str, shape: Sequence[int], x: Value, y: Value) -> Value | None:
    """A comparison of unknown whole numbers with known numbers; None where it is none."""
    if name not in _TURNED:
        return None
    if _is_unknown(y.node):
        name, x, y = _TURNED[name], y, x
    if not _is_unknown(x.node) or (known := interpreter.concrete(y)) is None:
        return None
    if name in ("eq", "ne"):
        found = _one_hot(interpreter, shape, x, known) or layout.full(interpreter.graph, 0.0, shape)
        return (
            found
            if name == "eq"
            else interpreter.elementwise("sub", layout.full(interpreter.graph, 1.0, shape), found)
        )
    if name in ("gt", "ge"):
        return layout.full(interpreter.graph, 1.0, shape)
    # Below a bound, but not below the positions that it is the number of, nor below zero.
    return layout.full(interpreter.graph, float(known.size == 1 and known.item() > 0), shape)


def _is_unknown(node: Node) -> bool:
    """Whether it is whole numbers of which only the shape is given, moved, shifted or beside others."""
    if isinstance(node, Leaf):
        return node.name[0] == "ids"
    if isinstance(node, Concat):
        return any(_is_unknown(view.node) for view in node.args)
    shifted = isinstance(node, Apply) and node.params[0] == "affine" and node.params[1][0] > 0
    return (shifted or node.moves) and _is_unknown(node.args[0].node)


def _one_hot(interpreter: Context, shape: Sequence[int], x: Value, known: np.ndarray) -> Value | None:
    """Rows of the identity by id, where the known numbers are all different and along a dimension of their own."""
    along = [d for d, n in enumerate(known.shape) if n > 1 and np.ptp(known, axis=d).any()]
    if len(along) != 1 or any(atom.axis is not None for atom in x.dims[along[0]]):
        return None
    (d,) = along
    line = np.moveaxis(known, d, 0).reshape(len(known) if d == 0 else known.shape[d], -1)[:, 0]
    if len(np.unique(line)) < len(line):
        return None
    rest = [n for k, n in enumerate(shape) if k != d]
    ids = layout.broadcast_in_dim(
        Value(x.node, tuple(dim for k, dim in enumerate(x.dims) if k != d)), rest, range(len(rest))
    )
    rows = lax.GatherDimensionNumbers(
        offset_dims=(len(rest),), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    found = rows_by_index(interpreter, rows, (*rest, len(line)), interpreter.known(np.eye(len(line))), ids)
    found.node.drawn = (special.ndtr(Z) >= 1 - 1 / len(line)).astype(
        float
    )  # one or nothing, and neither normal nor lognormal
    return layout.transpose(found, [*range(d), len(rest), *range(d, len(rest))])
