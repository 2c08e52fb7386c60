"""How far to trust a prediction, in one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from varscale.reporting.rows import Row

NEAR, FLAGGED = 0.15, 0.5  # bounds on relative errors


@dataclasses.dataclass(frozen=True)
class Trust:
    """Shares of a prediction's rows by the bounds on their errors; print it to see one line.

    Attributes:
        rows: number of predicted rows.
        near: share of them whose `error_bound` is 15 % or less.
        flagged: share of them whose `error_bound` is above 50 %.
        sampled: share of them that were computed from samples.
        gradients: number of predicted gradients.
        gradients_near: share of them whose `gradient_error_bound` is 15 % or less.
        gradients_flagged: share of them whose `gradient_error_bound` is above 50 %.
    """

    rows: int
    near: float
    flagged: float
    sampled: float
    gradients: int
    gradients_near: float
    gradients_flagged: float

    def __str__(self) -> str:
        forward = f"{self.near:.0%} of rows within 15 %, {self.flagged:.0%} flagged (above 50 %), {self.sampled:.0%} sampled"
        if not self.gradients:
            return f"Trust: {forward}."
        return f"Trust: {forward}; gradients: {self.gradients_near:.0%} within 15 %, {self.gradients_flagged:.0%} flagged."


def trust(rows: Sequence[Row]) -> Trust | None:
    """The trust in predicted rows; None where no row is predicted."""
    predicted = [row for row in rows if row.how != "measured"]
    if not predicted:
        return None
    gradients = [row.gradient_error_bound for row in predicted if row.gradient_error_bound is not None]
    return Trust(
        len(predicted),
        _share([row.error_bound <= NEAR for row in predicted]),
        _share([not row.error_bound <= FLAGGED for row in predicted]),
        _share([row.how == "sampled" for row in predicted]),
        len(gradients),
        _share([bound <= NEAR for bound in gradients]),
        _share([not bound <= FLAGGED for bound in gradients]),
    )


def held(rows: Sequence[Row]) -> str | None:
    """In how many rows the prediction holds beside drawn networks, as one sentence; None where none were drawn."""
    forward = [row.holds for row in rows if row.holds is not None]
    if not forward:
        return None
    sentence = f"Drawn networks: the prediction holds in {sum(forward)} of {len(forward)} rows"
    if backward := [row.gradient_holds for row in rows if row.gradient_holds is not None]:
        sentence += f", of gradients in {sum(backward)} of {len(backward)}"
    shares = [row.draws_in_band for row in rows if row.draws_in_band is not None]
    return f"{sentence}; bands hold {sum(shares) / len(shares):.1%} of the draws." if shares else f"{sentence}."


def _share(are: Sequence[bool]) -> float:
    return sum(are) / len(are) if are else 0.0
