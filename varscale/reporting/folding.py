"""Rows that repeat in a pattern, such as those of thirty equal blocks, joined into one line each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from varscale.reporting.rows import Row

MODEL = "(model)"  # how the path "" is printed
_FEWEST = 3  # repetitions that are worth a fold
_LONGEST = 1000  # rows of one repetition
_NUMBER = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
        label: the path; numbers that run through the repetitions are written "{0..29}".
        rows: the rows it stands for.
    """

    label: str
    rows: tuple[Row, ...]


def one_each(rows: Sequence[Row]) -> list[Line]:
    """A line for every row."""
    return [Line(row.path or MODEL, (row,)) for row in rows]


def folded(rows: Sequence[Row]) -> list[Line]:
    """Runs of at least three repetitions joined, the run that covers most rows first.

    Rows repeat where their kinds and shapes agree, and their paths agree but for numbers that stay or count up evenly.
    """
    tokens = [(_NUMBER.sub("#", row.path), row.kind, row.shape) for row in rows]
    numbers = [tuple(map(int, _NUMBER.findall(row.path))) for row in rows]
    lines: list[Line] = []
    start = 0
    while start < len(rows):
        period, times = _longest_run(tokens, numbers, start)
        if times < _FEWEST:
            lines += one_each(rows[start : start + 1])
            start += 1
            continue
        for offset in range(period):
            same = tuple(rows[start + offset + period * i] for i in range(times))
            lines.append(Line(_label(same[0].path, same[-1].path), same))
        start += period * times
    return lines


def _longest_run(tokens: Sequence[object], numbers: Sequence[tuple[int, ...]], start: int) -> tuple[int, int]:
    """Period and number of repetitions of the run from `start` on that covers most rows; the shortest period of equal ones."""
    best = (1, 1)
    left = len(tokens) - start
    for period in range(1, min(left // _FEWEST, _LONGEST) + 1):
        length = period
        while length < left and _repeats(tokens, numbers, start, period, length):
            length += 1
        if length // period >= _FEWEST and length // period * period > best[0] * best[1]:
            best = (period, length // period)
        if length == left:
            break  # no longer period covers more
    return best


def _repeats(tokens: Sequence[object], numbers: Sequence[tuple[int, ...]], start: int, period: int, length: int) -> bool:
    """Whether the row `length` after `start` continues the run of this period."""
    times, offset = divmod(length, period)
    if tokens[start + length] != tokens[start + offset]:
        return False
    first, second = numbers[start + offset], numbers[start + offset + period]
    return all(n == a + times * (b - a) for n, a, b in zip(numbers[start + length], first, second, strict=True))


def _label(first: str, last: str) -> str:
    """The first path with each number that changes replaced by its range."""
    ends = zip(_NUMBER.findall(first), _NUMBER.findall(last), strict=True)
    written = [low if low == high else f"{{{low}..{high}}}" for low, high in ends]
    return "".join(text + part for text, part in zip(_NUMBER.split(first), [*written, ""], strict=True))
