"""Marks: by what way a result was worked out, and how far it may be off for that."""

from __future__ import annotations

HOWS = ("exact", "quadrature", "sampled", "assumed")  # from the best to the worst


class Marked:
    """What is worked out once, and marked while it is (`Graph.flag`).

    Attributes:
        flagged: the worst way, in the order of `HOWS`, in which a step of the working was taken; None where none was marked.
        doubt: a bound on the relative error that those steps may have made.
    """

    flagged: str | None = None
    doubt: float = 0.0

    def mark(self, how: str, doubt: float) -> None:
        """It rests on `how`, with this relative error at most."""
        self.flagged = max(self.flagged or "exact", how, key=HOWS.index)
        self.doubt = max(self.doubt, doubt)
