"""The one table that prediction and measurement both fill: a row for every module's output, in execution order."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from typing import Any, Literal

How = Literal["exact", "quadrature", "sampled", "assumed", "measured"]


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of one module's output, over all its elements and, where weights are random, over initializations.

    Attributes:
        path: module path joined with "/" as flax's capture gives it; the model itself is "".
        kind: class name of the module, or of the operation.
        shape: shape of the output.
        mean: E[x].
        second_moment: E[x²].
        variance: E[x²] − E[x]².
        typical: exp E[ln mean x²]: the mean square that a typical single initialization shows.
        band: interval that holds the mean square of one initialization in 99 of 100 draws.
        sample_correlation: E[x x'] / E[x²] for the same unit in two different samples (first axis); None where there is one
            sample.
        position_correlation: likewise for two positions of one sample (axes between the first and the last).
        gradient: second moment of the loss gradient at this output, for a cotangent of unit variance at the model's output.
        how: how second_moment was obtained; the worst of the steps that led to it.
        error_bound: bound on the relative error of second_moment.
        gradient_error_bound: bound on the relative error of gradient.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    mean: float
    second_moment: float
    variance: float
    typical: float
    band: tuple[float, float]
    sample_correlation: float | None = None
    position_correlation: float | None = None
    gradient: float | None = None
    how: How = "measured"
    error_bound: float = 0.0
    gradient_error_bound: float | None = None


@dataclasses.dataclass(frozen=True)
class Weight:
    """The law of one parameter and the law its use asks for.

    Attributes:
        path: parameter path joined with "/".
        shape: its shape.
        law: the declared law in words, such as "normal(std=0.0625)".
        mean: E[w].
        variance: Var[w].
        fan_in: inputs that meet in one output, as used: contraction, groups, stride and padding's coverage included; of several
            uses that with the most.
        fan_out: outputs that one input reaches, in that use.
        uses: how many times the forward pass applies it.
        ratio: variance that would keep the second moment from the map's input to its output, 1/fan_in whatever activation comes
            after, over the variance it has; None where it has none or is not applied as a linear map.
    """

    path: str
    shape: tuple[int, ...]
    law: str
    mean: float
    variance: float
    fan_in: float | None = None
    fan_out: float | None = None
    uses: int = 0
    ratio: float | None = None


_COLUMNS = (
    "path",
    "kind",
    "shape",
    "mean",
    "second_moment",
    "typical",
    "band",
    "sample_correlation",
    "gradient",
    "how",
    "error_bound",
)


def _cell(value: Any) -> str:
    if value is None:
        return "·"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, tuple):
        return "×".join(map(str, value)) if all(isinstance(n, int) for n in value) else "–".join(map(_cell, value))
    return str(value)


@dataclasses.dataclass(frozen=True)
class Report:
    """Rows in execution order, and the laws of the weights.

    Attributes:
        rows: one a module output.
        weights: parameter path to `Weight`.
    """

    rows: tuple[Row, ...]
    weights: dict[str, Weight] = dataclasses.field(default_factory=dict)

    def __getitem__(self, path: str) -> Row:
        """The row at `path`.

        Raises:
            KeyError: no row has this path; the nearest ones are named.
        """
        for row in self.rows:
            if row.path == path:
                return row
        import difflib

        paths = [row.path for row in self.rows]
        near = difflib.get_close_matches(path, paths, n=4, cutoff=0.3) or paths[:4]
        raise KeyError(f"no row {path!r} in this report of {len(paths)} rows; nearest: {', '.join(map(repr, near))}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def output(self) -> Row:
        """The model's own output: the row "", or the last one where the output is a tuple or a dict."""
        return next((row for row in self.rows if row.path == ""), self.rows[-1])

    @property
    def shares(self) -> dict[str, float]:
        """Share of the rows by how they were obtained; they sum to 1."""
        counts = Counter(row.how for row in self.rows)
        return {how: count / len(self.rows) for how, count in counts.items()}

    def table(self, width: int = 120) -> str:
        """The rows as text, `width` characters wide; the shares by `how` on the last line."""
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in _COLUMNS:
            text = column in ("path", "kind", "how")
            table.add_column(
                column.replace("_", " "), justify="left" if text else "right", overflow="fold" if text else "ellipsis"
            )
        for row in self.rows:
            table.add_row(*(_cell(getattr(row, column)) for column in _COLUMNS))
        console = Console(width=width, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(table)
        shares = ", ".join(f"{share:.0%} {how}" for how, share in self.shares.items())
        return f"{capture.get()}{len(self.rows)} rows: {shares}"

    def __str__(self) -> str:
        return self.table()

    def to_records(self) -> list[dict[str, Any]]:
        """The rows as dicts of plain Python values."""
        return [dataclasses.asdict(row) for row in self.rows]

    def to_json(self, **options: Any) -> str:
        """Rows and weights as JSON; numbers that are not finite become null.

        Args:
            **options: passed on to `json.dumps`.
        """

        def plain(value: Any) -> Any:
            if isinstance(value, float):
                return value if math.isfinite(value) else None
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return [plain(item) for item in value] if isinstance(value, list | tuple) else value

        weights = [dataclasses.asdict(weight) for weight in self.weights.values()]
        return json.dumps(plain({"rows": self.to_records(), "weights": weights}), **options)

    def diff(self, other: Report) -> dict[str, float]:
        """Relative difference of the second moments, other over this minus one, for the paths in both."""
        theirs = {row.path: row.second_moment for row in other.rows}
        return {
            row.path: theirs[row.path] / row.second_moment - 1
            if row.second_moment
            else math.inf * theirs[row.path]
            if theirs[row.path]
            else 0.0
            for row in self.rows
            if row.path in theirs
        }
