"""What schemes of residual models ask of one."""

from __future__ import annotations

from collections.abc import Callable

from varscale.schemes.structure import Structure


def needs_additions(words: str) -> Callable[[Structure], None]:
    """A check that a model has residual branches.

    Args:
        words: the call of the scheme, for the error.
    """

    def check(found: Structure) -> None:
        if not found.uses.additions:
            raise ValueError(
                f"{words} is for models with residual branches, and the trace of this one has no residual addition "
                "(a value added to what was computed from it)"
            )

    return check
