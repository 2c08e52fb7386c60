"""The first NaN or infinity of a report, with the rows that led to it: what to look at when step 0 gives NaN."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from varscale.reporting.columns import ABSENT, number, percent, shape
from varscale.reporting.folding import MODEL
from varscale.reporting.layout import Column, Style, terminal_width, text_table, wrapped
from varscale.reporting.rows import Row, Weight

_BEFORE = 10  # rows shown before the first that is not finite: with headers and advice they fill 20 lines


@dataclasses.dataclass(frozen=True)
class FirstNonfinite:
    """Where the first NaN or infinity appears; print it to see one screen.

    Attributes:
        row: the first row in execution order that holds one; a `Weight` where only a parameter's gradient does.
        direction: "forward", or "backward" where all outputs are finite and a gradient is not. The backward pass runs from the
            last row to the first.
        before: the rows that were computed before it, in the order of `direction`.
        weights: parameters that hold a NaN or an infinity themselves.
    """

    row: Row | Weight
    direction: Literal["forward", "backward"]
    before: tuple[Row, ...]
    weights: tuple[Weight, ...] = ()

    @property
    def path(self) -> str:
        """The path of `row`."""
        return self.row.path

    def table(self, width: int | None = None, *, color: bool = False) -> str:
        """The row, up to ten rows before it, and in words where it is.

        Args:
            width: columns of the terminal; None for the terminal's own.
            color: whether to mark the row with ANSI escape sequences.

        Raises:
            ValueError: `width` is below 40.
        """
        width = terminal_width(width)
        shown = (*self.before[-_BEFORE:], self.row)
        styles: list[Style] = [*("plain" for _ in shown[:-1]), "red"]
        text, _ = text_table(_columns(shown, self.direction), width, styles=styles, color=color)
        skipped = len(self.before) - len(shown) + 1
        lines = [self._headline(), *([f"({skipped} finite rows before)"] if skipped > 0 else [])]
        lines = [wrapped(line, width) for line in lines]
        advice = [wrapped(line, width) for line in self._advice()]
        return "\n".join([*lines, text, *advice])

    def __str__(self) -> str:
        return self.table()

    def _headline(self) -> str:
        where = f"{self.row.path or MODEL} ({self.row.kind})" if isinstance(self.row, Row) else f"parameter {self.row.path}"
        share = _share(self.row, self.direction == "forward")
        what = "output" if self.direction == "forward" else "gradient"
        amount = "" if share is None else f"; {percent(share)} of the {what} is not finite"
        return f"First NaN or infinity: {self.direction} pass, {where}{amount}."

    def _advice(self) -> Iterable[str]:
        if self.weights:
            names = ", ".join(weight.path for weight in self.weights[:4]) + (", ..." if len(self.weights) > 4 else "")
            yield f"Parameters that are not finite themselves: {names}."
        elif self.direction == "forward" and not self.before:
            yield "No row precedes it: look at the input and at this layer's parameters."
        last = self.before[-1] if self.before else None
        if last is not None and (magnitude := last.largest_magnitude) is not None and self.direction == "forward":
            yield f"Largest magnitude just before it: {number(magnitude)}" + (f" in {last.dtype}." if last.dtype else ".")


def first_nonfinite(rows: Sequence[Row], weights: Mapping[str, Weight]) -> FirstNonfinite | None:
    """The first row that is not finite; forward before backward; None where all is finite."""
    bad = tuple(weight for weight in weights.values() if weight.nonfinite_share)
    for place, row in enumerate(rows):
        if _is_bad(row.nonfinite_share, row.second_moment):
            return FirstNonfinite(row, "forward", tuple(rows[:place]), bad)
    backward = rows[::-1]
    for place, row in enumerate(backward):
        if _is_bad(row.gradient_nonfinite_share, row.gradient):
            return FirstNonfinite(row, "backward", tuple(backward[:place]), bad)
    for weight in weights.values():
        if _is_bad(weight.gradient_nonfinite_share, weight.gradient):
            return FirstNonfinite(weight, "backward", tuple(backward), bad)
    return None


def _is_bad(share: float | None, second_moment: float | None) -> bool:
    """Judged by the share where it was measured: finite values may have a square that is not."""
    if share is not None:
        return share != 0  # a NaN share is bad too
    return second_moment is not None and not math.isfinite(second_moment)


def _columns(rows: Sequence[Row | Weight], direction: str) -> list[Column]:
    forward = direction == "forward"

    def cells(read) -> tuple[str, ...]:
        return tuple(read(row) for row in rows)

    def optional(value: float | None, write=number) -> str:
        return ABSENT if value is None else write(value)

    columns = [
        Column("path", cells(lambda row: row.path or MODEL), is_left=True),
        Column("kind", cells(lambda row: getattr(row, "kind", "parameter")), 5, is_left=True),
        Column("shape", cells(lambda row: shape(row.shape)), 4),
        Column("not finite", cells(lambda row: optional(_share(row, forward), percent)), 0),
    ]
    if forward:
        columns.append(Column("second moment", cells(lambda row: optional(getattr(row, "second_moment", None))), 2))
        columns.append(Column("largest magnitude", cells(lambda row: optional(getattr(row, "largest_magnitude", None))), 1))
        columns.append(Column("dtype", cells(lambda row: row.dtype or ABSENT), 3, is_left=True))
    else:
        columns.append(Column("gradient", cells(lambda row: optional(row.gradient)), 1))
    return columns


def _share(row: Row | Weight, forward: bool) -> float | None:
    return row.nonfinite_share if forward else row.gradient_nonfinite_share
