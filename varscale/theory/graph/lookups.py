"""Lookups: rows of a table by index, as nodes."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from varscale.theory.domain.axes import Axis
from varscale.theory.graph.nodes import Node
from varscale.theory.graph.store import Fact

INDICES: Fact[Any, np.ndarray] = Fact()  # known indices by digest


class GatherParams(NamedTuple):
    """What is looked up where.

    Attributes:
        row_axes: the axes of the table along which rows are.
        index_axes: the axes of the output that are the indices'.
        rates: P(same row) over the types of the indices, flat; None: rows are as likely as one another.
        rows: how many rows there are.
        ids: the indices: the key of known ones in the store, or the node of unknown ones.
    """

    row_axes: tuple[int, ...]
    index_axes: tuple[int, ...]
    rates: Any
    rows: Any
    ids: Any


class Gather(Node):
    """Rows of a table by index; the frame of its view is this node's axes and then the rows' own."""

    params: GatherParams
    collects = True

    def prepare(self) -> None:
        """What indices are computed from decides, too: the nearest row is no row like others, and may turn with the table."""
        self.odd, self.positive = self.args[0].node.odd, self.args[0].node.positive
        picker = self.params.ids
        if isinstance(picker, Node):
            self.deps |= picker.deps
            self.odd &= picker.unseen
            self.even &= picker.unseen

    @property
    def known(self) -> np.ndarray | None:
        """The indices, flat, where they are known."""
        return INDICES.get(self.graph, self.params.ids)

    @property
    def line(self) -> np.ndarray | None:
        """The known indices where they run over one axis and pick along one."""
        return self.known if len(self.params.row_axes) == len(self.params.index_axes) == 1 else None

    @property
    def indexed(self) -> list[Axis]:
        """The axes of the indices."""
        return [self.axes[k] for k in self.params.index_axes]

    def rates(self) -> np.ndarray:
        """P(same row) over the types of the indices."""
        rates, rows = self.params.rates, self.params.rows
        if rates is not None:
            return np.array(rates).reshape([axis.types for axis in self.indexed])
        same = functools.reduce(np.logical_and.outer, [axis.agrees for axis in self.indexed], np.array(True))
        return np.where(same, 1.0, 1.0 / rows)
