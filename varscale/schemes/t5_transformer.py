"""T5: scores without 1/√d_head in the program, which the query's law has instead."""

from __future__ import annotations

from collections.abc import Sequence

from varscale.initializers.distributions import DistributionName
from varscale.schemes.plan import PlannedLeaf, Requirement
from varscale.schemes.requirements import logit_scales
from varscale.schemes.scheme import Choice, Scheme, Subject, spread
from varscale.schemes.structure import Structure

_CLOSE = 0.01


def t5(*, distribution: DistributionName = "normal") -> Scheme:
    """1/√fan_in for every kernel, 1/√(d · d_kv) for the query, whose scores the program does not scale; tables of tokens 1.

    Tables that begin no residual stream, such as relative positions, have 1/√d. In a model that does scale its scores by
    1/√d_kv the query has 1/√d, and the plan says that the scale is present.

    Args:
        distribution: of the kernels.

    Raises:
        ValueError: unknown distribution; when called: a model without attention.

    Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning", as Mesh TensorFlow and T5X initialize it.
    """
    words = f"t5(distribution={distribution!r})"

    def check(structure: Structure) -> None:
        if not structure.uses.attentions:
            raise ValueError(f"{words} is for transformers, and the trace of this model has no attention")

    def unscaled(structure: Structure, path: str) -> int:
        """The width of a head where the program does not scale the scores that a parameter makes the queries of; else 1."""
        for attention in structure.uses.attentions:
            if path in attention.query and attention.scale is not None:
                in_program = abs(attention.scale * attention.terms**0.5 - 1) < _CLOSE
                return 1 if in_program else attention.terms
        return 1

    def rule(subject: Subject) -> Choice:
        if subject.role == "position" or (subject.is_table and subject.main.stream is None):
            return Choice(spread("normal", _width(subject.structure) ** -0.5), "1/√d: it begins no stream")
        if not subject.is_matrix:
            return subject.kept()
        if subject.is_table:
            return Choice(spread("normal", 1.0), "unit rows")
        std, head = subject.fan_in**-0.5, unscaled(subject.structure, subject.uses.path)
        law = subject.by_part(lambda names, _: spread(distribution, std * head**-0.5 if names == {"query"} else std))
        return Choice(law, "1/√(d · d_kv): the scores' scale is in the query" if head > 1 else "1/√fan_in")

    def requires(structure: Structure, leaves: Sequence[PlannedLeaf]) -> Sequence[Requirement]:
        found = []
        for attention, one in zip(structure.uses.attentions, logit_scales(structure, lambda terms: terms**-0.5), strict=True):
            head = max((unscaled(structure, path) for path in attention.query), default=1)
            folded = one.status == "missing" and head > 1 and attention.scale is not None and abs(attention.scale - 1) < _CLOSE
            found.append(
                Requirement(one.name, one.where, one.expected, one.found, "folded" if folded else one.status, one.mend)
            )
        return found

    return Scheme(words, rule, check=check, requires=requires)


def _width(structure: Structure) -> float:
    """The width of the first residual stream."""
    return next((p.main.fan_out for i in range(len(structure.uses.branches)) for p in structure.last(i) if p.main), 1.0)
