"""What schemes of residual models ask of one."""

from __future__ import annotations

from collections.abc import Callable

from varscale.schemes.structure import Structure


def needs_additions(words: str) -> Callable[[Structure], None]:
    """A check that a model has residual branches.

    Args:
        words: the call of the scheme, for the error.
    """

    def check(structure: Structure) -> None:
        if not structure.uses.additions:
            raise ValueError(
                f"{words} is for models with residual branches, and the trace of this one has no residual addition "
                "(a value added to what was computed from it)"
            )

    return check


def needs_gates(words: str) -> Callable[[Structure], None]:
    """A check that every residual branch of a model is multiplied by a parameter before it is added.

    Args:
        words: the call of the scheme, for the error.
    """
    has_branches = needs_additions(words)

    def check(structure: Structure) -> None:
        has_branches(structure)
        without = [i for i, branch in enumerate(structure.uses.branches) if not branch.gates]
        if without:
            last = structure.last(without[0])
            where = f", such as that of {last[0].path!r}" if last else ""
            raise ValueError(
                f"{words} needs a parameter that multiplies each residual branch, and {len(without)} of "
                f"{len(structure.uses.branches)} branches have none{where}: write x + scale * branch(x), scale of shape ()"
            )

    return check
