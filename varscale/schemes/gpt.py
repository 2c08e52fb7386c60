"""Schemes of decoder language models, which shrink what each block adds to the residual stream.

All of them read the same facts: what is looked up, what ends in a residual addition, in which block, and what is the readout.
Where a code differs from the stated standard deviation, `convention=` names the code.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from varscale.initializers.distributions import DistributionName
from varscale.initializers.distributions import distribution as checked_distribution
from varscale.initializers.fixed import cut_normal, truncated_normal
from varscale.initializers.initializer import Initializer, checked_number
from varscale.initializers.structured import zeros
from varscale.schemes.residuals import needs_additions
from varscale.schemes.scheme import Choice, Rule, Scheme, Subject, checked_convention, spread

Unit = Callable[[float], Initializer]  # from a standard deviation to a law


def gpt2(stddev: float = 0.02, *, distribution: DistributionName = "normal") -> Scheme:
    """Standard deviation .02; ÷ √(number of residual additions) for kernels whose output is added to the residual stream.

    A transformer block has two additions, so that L blocks divide by √(2L). Tables, positions and the readout have the plain
    standard deviation; norm scales and vectors keep their declared laws.

    Args:
        stddev: finite and positive.
        distribution: "normal", "truncated_normal", "uniform" or "rademacher".

    Raises:
        ValueError: stddev is not positive; when called: a model without residual additions.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3; Shoeybi et al. 2019,
    "Megatron-LM".
    """
    return _divided("gpt2", stddev, distribution)


def megatron(stddev: float = 0.02, *, distribution: DistributionName = "normal") -> Scheme:
    """The same law as `gpt2`, under the name of the code that most trainers took it from."""
    return _divided("megatron", stddev, distribution)


def _divided(name: str, stddev: float, distribution: DistributionName) -> Scheme:
    stddev = checked_number("stddev", stddev, above=0.0)
    checked_distribution(distribution)

    def rule(subject: Subject) -> Choice:
        if subject.ends and subject.is_matrix:
            count = _additions(subject)
            return Choice(spread(distribution, stddev / math.sqrt(count)), f"÷ √{count}, the residual additions")
        return _plain(subject, spread(distribution, stddev))

    return _residual(f"{name}(stddev={stddev:g}, distribution={distribution!r})", rule)


def llama_depth(stddev: float = 0.02, *, convention: str | None = None) -> Scheme:
    """Standard deviation .02; .02/√(2(l + 1)) for what makes block l's output: wo, w2 and the gated w3.

    Tables have standard deviation 1, the readout 1/√d.

    Args:
        stddev: finite and positive.
        convention: None: normal laws of these standard deviations. "torchtitan": cut at ±2 in absolute numbers, and the readout
            at ±3 of its standard deviations, not rescaled; "olmo-core": every kernel cut at ±3, not rescaled: .9866 of them.

    Raises:
        ValueError: stddev is not positive, or convention unknown; when called: a model without residual additions.

    Source: torchtitan, OLMo-core.
    """
    stddev = checked_number("stddev", stddev, above=0.0)
    checked_convention(convention, "torchtitan", "olmo-core")
    kernel: Unit = {None: _normal, "torchtitan": lambda s: cut_normal(s, 2.0), "olmo-core": _cut_at_3}[convention]
    readout: Unit = _normal if convention is None else _cut_at_3

    def rule(subject: Subject) -> Choice:
        if subject.role == "readout":
            return Choice(readout(subject.fan_in**-0.5), "1/√d")
        if subject.is_table:
            if subject.is_tied:
                return Choice(_normal(subject.width**-0.5), "tied: the readout's 1/√d")
            return Choice(_normal(1.0), "unit rows")
        if not subject.is_matrix or subject.branch is None:
            return _plain(subject, kernel(stddev))
        factors = [(2 * (block + 1)) ** -0.5 for block in subject.blocks]
        deep = _deep(subject, kernel, stddev, factors)
        if subject.ends:
            return Choice(deep, "÷ √(2(l + 1)): it ends block l's branch")
        law = subject.by_part(lambda names, _: deep if names == {"up"} else kernel(stddev))
        why = "the plain standard deviation" if law == kernel(stddev) else "÷ √(2(l + 1)): what the gate multiplies"
        return Choice(law, why)

    return _residual(f"llama_depth(stddev={stddev:g}, convention={convention!r})", rule)


def mitchell(*, convention: str | None = None) -> Scheme:
    """1/√(2 · fan_in · (l + 1)) for what ends a branch of block l; 1/√d for all other kernels, tables and the readout.

    Args:
        convention: None: normal laws truncated at ±3 of these standard deviations. "olmo": cut there and not rescaled: .9866 of
            them.

    Raises:
        ValueError: convention is unknown; when called: a model without residual additions.

    Source: Groeneveld et al. 2024, "OLMo", whose code calls it so.
    """
    checked_convention(convention, "olmo")
    unit: Unit = _truncated_at_3 if convention is None else _cut_at_3

    def rule(subject: Subject) -> Choice:
        if subject.ends and subject.is_matrix:
            factors = [(2 * (block + 1)) ** -0.5 for block in subject.blocks]
            why = "1/√(2 · fan_in · (l + 1)): it ends block l's branch"
            return Choice(_deep(subject, unit, subject.fan_in**-0.5, factors), why)
        if subject.is_matrix or subject.role == "position":
            return Choice(unit(subject.width**-0.5), "1/√d")
        return subject.kept()

    return _residual(f"mitchell(convention={convention!r})", rule)


def full_megatron(stddev: float = 0.02, *, convention: str | None = None) -> Scheme:
    """.02, .02/√(2L) for what ends one of the L blocks' branches, and 1/√d for the readout.

    Args:
        stddev: finite and positive.
        convention: None: normal laws truncated at ±3 of these standard deviations. "olmo": cut there and not rescaled.

    Raises:
        ValueError: stddev is not positive, or convention unknown; when called: a model without residual additions.

    Source: Groeneveld et al. 2024, "OLMo", whose code calls it so.
    """
    stddev = checked_number("stddev", stddev, above=0.0)
    checked_convention(convention, "olmo")
    unit: Unit = _truncated_at_3 if convention is None else _cut_at_3

    def rule(subject: Subject) -> Choice:
        if subject.ends and subject.is_matrix:
            count = 2 * _blocks(subject)
            return Choice(unit(stddev / math.sqrt(count)), f"÷ √{count}, twice the blocks")
        if subject.role == "readout":
            return Choice(unit(subject.fan_in**-0.5), "1/√d")
        return _plain(subject, unit(stddev))

    return _residual(f"full_megatron(stddev={stddev:g}, convention={convention!r})", rule)


def small_wang() -> Scheme:
    """√(2/(5d)) for every kernel and table, 2/(L√d) for what ends one of the L blocks' branches.

    Raises:
        ValueError: when called: a model without residual additions.

    Source: Nguyen & Salazar 2019, "Transformers without Tears", section 2.2 (small); Wang & Komatsuzaki 2021, "GPT-J" (wang);
    together in GPT-NeoX.
    """

    def rule(subject: Subject) -> Choice:
        if subject.ends and subject.is_matrix:
            return Choice(_normal(2 / (_blocks(subject) * math.sqrt(subject.width))), "2/(L√d): it ends a branch")
        if subject.is_matrix or subject.role == "position":
            return Choice(_normal(math.sqrt(2 / (5 * subject.width))), "√(2/(5d))")
        return subject.kept()

    return _residual("small_wang()", rule)


def zero_projection(readout: float = 0.001) -> Scheme:
    """Zero for what ends a branch, uniform of standard deviation 1/√d elsewhere, unit tables and a small readout.

    Args:
        readout: standard deviation of the readout, finite and ≥ 0.

    Raises:
        ValueError: readout is negative; when called: a model without residual additions.

    Source: nanochat.
    """
    readout = checked_number("readout", readout, at_least=0.0)

    def rule(subject: Subject) -> Choice:
        if subject.ends and subject.is_matrix:
            return Choice(zeros, "0: each block starts as the identity")
        if subject.role == "readout" or subject.is_tied:
            return Choice(spread("normal", readout), "a small readout")
        if subject.is_table:
            return Choice(_normal(1.0), "unit rows")
        if subject.is_matrix:
            return Choice(spread("uniform", subject.fan_in**-0.5), "uniform in ±√3/√d")
        return subject.kept()

    return _residual(f"zero_projection(readout={readout:g})", rule)


def normalized(*, convention: str | None = None) -> Scheme:
    """1/√d for every kernel, table and the readout; ÷ √(2L) for what ends one of the L blocks' branches.

    Args:
        convention: None: normal laws. "olmo-core": every kernel cut at ±3 of these standard deviations, not rescaled.

    Raises:
        ValueError: convention is unknown; when called: a model without residual additions.

    Source: Loshchilov et al. 2024, "nGPT", section 2.6; OLMo-core.
    """
    checked_convention(convention, "olmo-core")
    unit: Unit = _normal if convention is None else _cut_at_3

    def rule(subject: Subject) -> Choice:
        if not subject.is_matrix and subject.role != "position":
            return subject.kept()
        if subject.ends:
            count = 2 * _blocks(subject)
            return Choice(unit(subject.width**-0.5 / math.sqrt(count)), f"1/√d ÷ √{count}, twice the blocks")
        return Choice((_normal if subject.is_table else unit)(subject.width**-0.5), "1/√d")

    return _residual(f"normalized(convention={convention!r})", rule)


def _residual(words: str, rule: Rule) -> Scheme:
    return Scheme(words, rule, check=needs_additions(words))


def _plain(subject: Subject, law: Initializer) -> Choice:
    """The law for every kernel, table and position table; the model's own for vectors."""
    if subject.is_matrix or subject.role == "position":
        return Choice(law, "the plain standard deviation")
    return subject.kept()


def _deep(subject: Subject, unit: Unit, std: float, factors: list[float]) -> Initializer:
    """A law whose standard deviation is multiplied by a factor a layer."""
    return unit(std * factors[0]) if subject.layer_axis is None else subject.layered(unit(std), factors)


def _additions(subject: Subject) -> int:
    branch = subject.branch
    return subject.whole.additions if branch is None else subject.structure.additions(branch.stream)


def _blocks(subject: Subject) -> int:
    branch = subject.branch
    assert branch is not None
    return subject.structure.blocks(branch.stream)


def _normal(std: float) -> Initializer:
    return spread("normal", std)


def _truncated_at_3(std: float) -> Initializer:
    return truncated_normal(std, lower=-3.0, upper=3.0)


def _cut_at_3(std: float) -> Initializer:
    return cut_normal(std, 3 * std)
