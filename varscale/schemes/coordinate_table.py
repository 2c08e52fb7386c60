"""What a coordinate check found: exponents in the width, row by row, as a table and as a picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import special

from varscale.reporting.layout import Column, Style, terminal_width, text_table, wrapped
from varscale.reporting.plots import COLORS, pyplot
from varscale.reporting.rows_by_path import RowsByPath
from varscale.schemes.extra_rows import SCORES

# Of an exponent; what is wrong grows or shrinks as √width or faster. At small widths what is sound has an exponent too: a sum
# of few terms has not yet the size of its mean, and the update of a readout behind a pool goes as width^.22 from 16 to 128. So
# the hypothesis that a finding rejects is not the exponent 0, but any up to these limits.
_ERROR = 0.5
GROWTH, SHRINKAGE = _ERROR / 2, 0.3
_AT_FIRST = 0.1  # before training outputs are sums of independent terms, whose sizes settle as 1/width
_CONFIDENCE = 0.99  # of one interval, and of all tests of a check together


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a quantity depends on the width: a power law fitted to all draws.

    Attributes:
        exponent: of the width; NaN where the quantity is zero or not finite at some width.
        half_width: of its 99 % interval, from the scatter about the line; infinite where nothing is left to estimate it from.
        margin: how far the exponent may lie beyond its true value, on one side, with probability 1 % / tests (Bonferroni): with
            99 % none of so many exponents does.
        spread: largest over smallest of the widths' geometric means.
    """

    exponent: float
    half_width: float
    margin: float
    spread: float

    @property
    def is_defined(self) -> bool:
        return not math.isnan(self.exponent)

    @property
    def grows(self) -> bool:
        """Whether the exponent is above .25 by more than its margin."""
        return self.least > GROWTH

    @property
    def least(self) -> float:
        """The exponent less its margin; −∞ where it is undefined."""
        return self.exponent - self.margin if self.is_defined else -math.inf

    @property
    def shrinks(self) -> bool:
        """Whether the exponent is below −.3 by more than its margin."""
        return self.exponent + self.margin < -SHRINKAGE

    def __str__(self) -> str:
        return f"{self.exponent:+.2f}" if self.is_defined else "-"


_UNDEFINED = Fit(math.nan, math.inf, math.inf, math.nan)


def fit(widths: Sequence[int], values: Float[np.ndarray, "widths draws"], tests: int = 1) -> Fit:
    """The power law through positive values, one of as many as are tested together.

    >>> round(fit([64, 256], np.array([[1.0], [2.0]])).exponent, 6)
    0.5
    """
    if not np.all(np.isfinite(values)) or np.any(values <= 0):
        return _UNDEFINED
    logs = np.log(values)
    x = np.repeat(np.log(widths), values.shape[1])
    x, y = x - x.mean(), logs.ravel()
    slope = float(x @ y / (x @ x))
    left = y.size - 2
    error = math.sqrt(float(np.sum((y - y.mean() - slope * x) ** 2)) / left / float(x @ x)) if left > 0 else math.inf
    means = logs.mean(axis=1)
    missed = 1 - _CONFIDENCE
    two_sided, one_sided = (-float(special.stdtrit(max(left, 1), p)) for p in (missed / 2, missed / tests))  # Student's t
    return Fit(slope, two_sided * error, one_sided * error, float(np.exp(means.max() - means.min())))


@dataclasses.dataclass(frozen=True, eq=False)
class CoordinateRow:
    """One module's output over widths, draws and steps.

    Attributes:
        path: of the row.
        kind: class name of the module; "scores" for what enters an attention's softmax.
        widths: of the models.
        is_fixed: whether the output's shape does not depend on the width, as that of a readout.
        sizes: root mean square of the output, step 0 being before training.
        changes: root mean square of its difference to step 0.
        updates: root mean square of what the updates of its kernels add, (W − W₀) x; None where it has none.
        follows_fixed: whether an earlier row of its module has a fixed shape and shrinks, as values do whose heads do not grow.
        heads_grow: whether the heads of the model's attention grow with the width.
        is_readout: whether its kernel sums over a number of terms that grows with the width, and its shape is fixed.
        tests: of all rows of the check together, by which findings are made surer.
    """

    path: str
    kind: str
    widths: tuple[int, ...]
    is_fixed: bool
    sizes: Float[np.ndarray, "widths draws steps"]
    changes: Float[np.ndarray, "widths draws steps"]
    updates: Float[np.ndarray, "widths draws steps"] | None = None
    follows_fixed: bool = False
    heads_grow: bool = False
    is_readout: bool = False
    tests: int = 1

    @property
    def own_tests(self) -> int:
        """How many tests of its exponents can make a finding: growth and its opposite, before training and in it."""
        steps, has_updates = self.sizes.shape[2] - 1, self.updates is not None
        return (2 + self.shrinks_by_right) + (steps + 1) + has_updates * (steps + self._must_learn)

    def size_at(self, step: int) -> Fit:
        """The fit of the output's size after a step."""
        return fit(self.widths, self.sizes[:, :, step], self.tests)

    def change_at(self, step: int) -> Fit:
        """The fit of the output's change since step 0."""
        return fit(self.widths, self.changes[:, :, step], self.tests)

    def update_at(self, step: int) -> Fit:
        """The fit of what the updates of its kernels add after a step; undefined where it has none."""
        return _UNDEFINED if self.updates is None else fit(self.widths, self.updates[:, :, step], self.tests)

    @property
    def change(self) -> Fit:
        """The change after the last step."""
        return self.change_at(-1)

    @property
    def steepest(self) -> int:
        """The step after which the change grows most, of those where it surely does: what is unstable need not stay large."""
        return max(range(1, self.sizes.shape[2]), key=lambda step: _steepness(self.change_at(step)))

    @property
    def update(self) -> Fit:
        """What the updates of its kernels add, after the step chosen as `steepest` is; undefined where it has none."""
        return max((self.update_at(step) for step in range(1, self.sizes.shape[2])), key=_steepness)

    @property
    def may_shrink_at_first(self) -> bool:
        """Whether μP lets it shrink with the width before training: readouts and scores, what follows, and zeros."""
        return self.is_fixed or self.follows_fixed or self.kind == SCORES or not np.any(self.sizes[:, :, 0])

    @property
    def grows(self) -> bool:
        """Whether its size before training, or its change or update after some step, grows with the width.

        The size after training grows with one of these. Where a size shrinks before and a change does not, it seems to grow.
        """
        return any(f.grows for f in (self.size_at(0), self.change_at(self.steepest), self.update))

    @property
    def vanishes(self) -> bool:
        """Whether its change, or a readout's update, shrinks with the width, or its size before training where it must not."""
        return self._change_vanishes or self._update_vanishes or (self.size_at(0).shrinks and not self.may_shrink_at_first)

    @property
    def _update_vanishes(self) -> bool:
        return self._must_learn and self.update_at(-1).shrinks

    @property
    def _must_learn(self) -> bool:
        """Readouts read what has its full size; other kernels may read or meet what is small at first, and learn little."""
        return self.is_readout and not self.follows_fixed

    @property
    def _change_vanishes(self) -> bool:
        """Scores divided by d_head change by 1/√d_head as long as queries and keys have not turned towards each other.

        What reads values of a fixed size changes likewise as long as these have not grown out of their start.
        """
        limit = -0.75 if self.kind == SCORES or self.follows_fixed else -SHRINKAGE
        return self.change.shrinks and self.change.exponent < limit

    @property
    def shrinks_by_right(self) -> bool:
        """Whether μP has its size before training go as 1/√width: scores of heads that grow, and readouts."""
        return self.size_at(0).is_defined and ((self.kind == SCORES and self.heads_grow) or self.is_readout)

    @property
    def keeps_size(self) -> bool:
        """Whether what is to shrink does not before training: scores divided by √d_head, readouts of variance 1/fan_in."""
        first = self.size_at(0)
        return self.shrinks_by_right and first.exponent > -_ERROR / 2 and first.least > -_ERROR + _AT_FIRST

    @property
    def is_undecided(self) -> bool:
        """Whether it has no finding, and some exponent is nearer to ±.5, which an error shows, or has ±.5 in its interval.

        A check with an error is flat only where the row with the error is called so: here every interval stands for itself.
        """
        first, change = self.size_at(0), self.change
        grown = (first, self.change_at(self.steepest), self.update)
        below = (change,) if self.may_shrink_at_first else (first, change)
        # What may shrink by itself has less room, and is told by its growth.
        below = () if self.kind == SCORES or self.follows_fixed or self.is_fixed else below
        below = (self.update_at(-1),) if self._must_learn else below
        reaches = any(f.is_defined and f.exponent + f.half_width >= _ERROR for f in (*grown, self.size_at(-1)))
        reaches |= any(f.is_defined and f.exponent - f.half_width <= -_ERROR for f in below)
        nearer = any(f.exponent > GROWTH for f in grown) or (self.shrinks_by_right and first.exponent > -_ERROR / 2)
        nearer |= any(f.exponent + f.half_width < -SHRINKAGE for f in below)
        return not self.finding and (reaches or nearer)

    @property
    def is_finite(self) -> bool:
        return bool(np.all(np.isfinite(self.sizes)))

    @property
    def finding(self) -> str:
        """What is wrong with the row, in one sentence; "" where it is flat."""
        name = self.path or "the output"
        if not self.is_finite:
            return f"{name}: not finite at some width"
        last, step = self.sizes.shape[2] - 1, self.steepest
        told = []
        if (first := self.size_at(0)).grows or (first.shrinks and not self.may_shrink_at_first):
            told.append(_told("size before training", first))
        if self.grows and (after := self.size_at(-1)).grows:
            told.append(_told(f"size after step {last}", after))
        if (steepest := self.change_at(step)).grows:
            told.append(_told(f"change after step {step}", steepest))
        if self._change_vanishes:
            told.append(_told(f"change after step {last}", self.change))
        if self.update.grows:
            told.append(_told("what the update of its kernel adds", self.update))
        if self._update_vanishes:
            told.append(_told(f"what the update of its kernel adds after step {last}", self.update_at(-1)))
        if self.keeps_size:
            sound = "division by d_head" if self.kind == SCORES else "a variance of 1/fan_in²"
            told.append(f"size before training goes as width^{first}, where {sound} gives width^-0.50")
        return f"{name}: {', '.join(told)}{self._advice()}" if told else ""

    def _advice(self) -> str:
        if self.kind == SCORES and (self.grows or self.keeps_size):
            return "; divide the products of queries and keys by d_head, not √d_head"
        if self.is_fixed and (self.grows or self.keeps_size or self._update_vanishes):
            return "; the readout's law or learning rate is not that of the width"
        if self.update.grows:
            return "; its learning rate is not that of the width"
        return ""


@dataclasses.dataclass(frozen=True, eq=False)
class CoordinateCheck(RowsByPath[CoordinateRow]):
    """Rows in order of execution; see `varscale.coordinate_check`.

    Attributes:
        widths: in ascending order.
        rows: those that the models of all widths have.
        losses: of each width and draw, before training and after each step.
        missing: requirements of the widest model's plan that its program lacks.
    """

    widths: tuple[int, ...]
    rows: tuple[CoordinateRow, ...]
    losses: Float[np.ndarray, "widths draws steps"]
    missing: tuple[str, ...] = ()

    @property
    def findings(self) -> tuple[str, ...]:
        """A sentence for every row that is not flat, in order of execution, and for what the program lacks."""
        return (*(row.finding for row in self.rows if row.finding), *self.missing)

    @property
    def undecided(self) -> tuple[str, ...]:
        """Paths of the rows without a finding whose exponents are not known well enough to call them flat."""
        return tuple(row.path for row in self.rows if row.is_undecided)

    @property
    def is_flat(self) -> bool:
        """Whether there are no findings, and no row is undecided."""
        return not self.findings and not self.undecided

    def table(self, width: int | None = None) -> str:
        """Exponents in the width, a line a row; findings below.

        Args:
            width: columns of the terminal; None for the terminal's own, 80 where there is none.

        Raises:
            ValueError: `width` is below 40.
        """
        width = terminal_width(width)
        styles: list[Style] = ["red" if row.finding else "plain" for row in self.rows]
        columns = [
            Column("path", tuple(row.path or "(output)" for row in self.rows), is_left=True),
            Column("kind", tuple(row.kind for row in self.rows), 5, is_left=True),
            Column("size, step 0", tuple(str(row.size_at(0)) for row in self.rows), 2),
            Column("size, last step", tuple(str(row.size_at(-1)) for row in self.rows), 3),
            Column("change, steepest", tuple(str(row.change_at(row.steepest)) for row in self.rows)),
            Column("change, last step", tuple(str(row.change) for row in self.rows), 0),
            Column("update", tuple(str(row.update) for row in self.rows), 1),
            Column("±", tuple(f"{row.change.half_width:.2f}" for row in self.rows), 1),
            Column("spread", tuple(_number(row.change.spread) for row in self.rows), 4),
        ]
        text, missing = text_table(columns, width, styles=styles)
        told = [f"Exponents in the width, from {', '.join(map(str, self.widths))}: 0 where a row is flat."]
        told += [f"Not shown at this width: {', '.join(missing)}."] if missing else []
        told += list(self.findings)
        if self.undecided:
            some = ", ".join(path or "the output" for path in self.undecided[:3])
            more = f" and {len(self.undecided) - 3} more" if len(self.undecided) > 3 else ""
            why = "an exponent is nearer to the ±.5 of an error, or has it in its interval"
            told.append(f"Undecided, as {why}: {some}{more}. Give more widths or more draws.")
        told += ["Every row is flat."] if self.is_flat else []
        return "\n".join([text, *(wrapped(line, width) for line in told)])

    def __str__(self) -> str:
        return self.table()

    def to_records(self) -> list[dict[str, Any]]:
        """The rows as dicts of plain Python values."""
        return [
            {
                "path": row.path, "kind": row.kind, "widths": list(self.widths), "sizes": row.sizes.tolist(),
                "changes": row.changes.tolist(), "exponent": row.change.exponent if row.change.is_defined else None,
                "finding": row.finding, "is_undecided": row.is_undecided,
            }
            for row in self.rows
        ]  # fmt: skip

    def plot(self) -> Any:
        """Sizes before training and changes by step, against the width on log axes: flat lines where a model is sound.

        Lines are colored by row; rows with a finding are drawn thick. Each line is the geometric mean over draws.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        plt = pyplot()
        steps = self.rows[0].sizes.shape[2] if self.rows else 1
        panels = [("size before training", 0)] + [(f"change after step {t}", t) for t in sorted({1, steps - 1} - {0})]
        figure, axes = plt.subplots(
            1, len(panels), figsize=(4.2 * len(panels), 4), sharex=True, squeeze=False, layout="constrained"
        )
        for axis, (title, step) in zip(axes[0], panels, strict=True):
            for i, row in enumerate(self.rows):
                values = (row.sizes if step == 0 else row.changes)[:, :, step]
                if np.all(values > 0) and np.all(np.isfinite(values)):
                    line = {"linewidth": 2.6 if row.finding else 1.0, "color": COLORS[i % len(COLORS)]}
                    axis.loglog(
                        self.widths, np.exp(np.log(values).mean(axis=1)), marker="o", label=row.path or "output", **line
                    )
            axis.set(title=title, xlabel="width", xticks=self.widths, xticklabels=self.widths)
            axis.minorticks_off()
        if len(self.rows) <= 20:
            axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        plt.close(figure)
        return figure


def _steepness(f: Fit) -> tuple[bool, float]:
    return f.grows, f.exponent if f.is_defined else -math.inf


def _told(what: str, f: Fit) -> str:
    return f"{what} {'grows' if f.exponent > 0 else 'shrinks'} as width^{f.exponent:+.2f} ± {f.margin:.2f}"


def _number(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.2f}"
