"""What `lsuv` did: every product of a kernel and its input before and after."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from varscale.reporting.layout import Column, terminal_width, text_table, wrapped
from varscale.reporting.rows_by_path import RowsByPath


@dataclasses.dataclass(frozen=True)
class Rescaled:
    """One product of a kernel and its input.

    Attributes:
        path: path of the kernel; "@3" is the layer of a stack, "[query]" the part of a packed kernel.
        shape: shape of the product, of all parts.
        before: its standard deviation on the data with the parameters as they were given.
        after: the same with those that are returned.
        factor: what the entries of the kernel were multiplied by; None where they keep their values.
        note: what else there is to know.
    """

    path: str
    shape: tuple[int, ...]
    before: float
    after: float
    factor: float | None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Account(RowsByPath[Rescaled]):
    """All products, in execution order.

    Attributes:
        rows: the products.
        sweeps: how many passes rescaled kernels.
        tolerance: largest |std − 1| that was asked for.
        left_alone: path of a kernel that keeps its values -> why.
    """

    rows: tuple[Rescaled, ...]
    sweeps: int
    tolerance: float
    left_alone: Mapping[str, str]

    @property
    def missed(self) -> tuple[Rescaled, ...]:
        """The rescaled rows whose standard deviation is not within the tolerance of 1: those of shared kernels may not be."""
        return tuple(row for row in self.rows if row.factor is not None and not abs(row.after - 1) <= self.tolerance)

    def table(self, width: int | None = None) -> str:
        """The rows as text that fits the terminal.

        Args:
            width: columns of the terminal; None for the terminal's own, 80 where there is none.

        Raises:
            ValueError: `width` is below 40.
        """
        width = terminal_width(width)
        rows = self.rows
        columns = [
            Column("kernel", tuple(row.path for row in rows), is_left=True),
            Column("std before", tuple(f"{row.before:.4g}" for row in rows), 0),
            Column("after", tuple(f"{row.after:.4g}" for row in rows), 0),
            Column("factor", tuple("" if row.factor is None else f"{row.factor:.4g}" for row in rows), 1),
            Column("shape", tuple("×".join(map(str, row.shape)) for row in rows), 3),
            Column("note", tuple(row.note for row in rows), 2, is_left=True),
        ]
        text, missing = text_table(columns, width)
        changed = sum(row.factor is not None for row in rows)
        told = [f"{changed} of {len(rows)} products brought to standard deviation 1 in {self.sweeps} sweeps."]
        if self.missed:
            told.append(f"{len(self.missed)} are not within {self.tolerance:g} of it: their kernels are used more than once.")
        told += [f"Left alone: {path} ({why})." for path, why in self.left_alone.items()]
        told += [f"Not shown at this width: {', '.join(missing)}."] if missing else []
        return "\n".join([text, *(wrapped(line, width) for line in told)])

    def __str__(self) -> str:
        return self.table()

    def to_records(self) -> list[dict[str, Any]]:
        """The rows as dictionaries."""
        return [dataclasses.asdict(row) for row in self.rows]
