"""Numbers that a scheme needs in the program, each looked up in the trace.

A number may stand in three places: in the program, where it multiplies an activation; in the program, where it multiplies a
parameter, which does the same and is called "folded"; or nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from varscale.schemes.plan import Requirement, Status
from varscale.schemes.structure import Structure

_CLOSE = 0.01  # relative: codes write constants with three digits


def looked_up(
    name: str, where: str, expected: float, program: float | None, weight: float | None = 1.0, mend: str = ""
) -> Requirement:
    """A requirement, from what the trace has.

    Args:
        name: what the number is.
        where: the path at which it is needed.
        expected: the number.
        program: what activations are multiplied by there; None where the trace does not tell.
        weight: what a weight is multiplied by, in the program or in its law.
        mend: what to write where it is missing.
    """
    folded = None if program is None or weight is None else program * weight
    status: Status = "unknown"
    if program is not None and math.isclose(program, expected, rel_tol=_CLOSE):
        return Requirement(name, where, expected, program, "present", mend)
    if folded is not None:
        status = "folded" if math.isclose(folded, expected, rel_tol=_CLOSE) else "missing"
    return Requirement(name, where, expected, program, status, mend)


def residual_scales(structure: Structure, expected: Callable[[int], float]) -> Iterator[Requirement]:
    """The number that the stream is multiplied by at each residual addition, over that of the branch.

    Args:
        structure: the residual streams of the model.
        expected: from the place of a branch in `Uses.branches` to the number.
    """
    for i, branch in enumerate(structure.uses.branches):
        weight = _common(p.main.kernel_scale for p in structure.last(i) if p.main is not None)
        found = None
        if branch.stream_scale is not None and branch.branch_scale:
            found = branch.stream_scale / branch.branch_scale
        alpha = expected(i)
        mend = f"write {alpha:.4g} * x + branch(x)"
        yield looked_up("residual scale", _where(structure, i), alpha, found, 1 / weight if weight else None, mend)


def branch_scales(structure: Structure, expected: Callable[[int], float]) -> Iterator[Requirement]:
    """The number that each residual branch is multiplied by before it is added, over that of the stream; see above."""
    for i, branch in enumerate(structure.uses.branches):
        weight = _common(p.main.kernel_scale for p in structure.last(i) if p.main is not None)
        found = None
        if branch.branch_scale is not None and branch.stream_scale:
            found = branch.branch_scale / branch.stream_scale
        scale = expected(i)
        yield looked_up("branch scale", _where(structure, i), scale, found, weight, f"write x + {scale:.4g} * branch(x)")


def logit_scales(structure: Structure, expected: Callable[[int], float], folded: float = 1.0) -> Iterator[Requirement]:
    """The number that each attention's scores are multiplied by between the product q · k and the softmax.

    Args:
        structure: the model's.
        expected: from the number of terms of q · k, the head's width, to the number.
        folded: what the law of the query kernels multiplies the scores by, beside the scheme's usual standard deviation.
    """
    for attention in structure.uses.attentions:
        scale = expected(attention.terms)
        where = attention.query[0] if attention.query else ""
        yield looked_up("attention scale", where, scale, attention.scale, folded, f"multiply q · k by {scale:.4g}")


def _common(scales: Iterator[float | None]) -> float | None:
    """The one number of several; None where they differ or one is not known."""
    found = set(scales)
    return found.pop() if len(found) == 1 else None


def _where(structure: Structure, index: int) -> str:
    last = structure.last(index)
    return last[0].path if last else ""
