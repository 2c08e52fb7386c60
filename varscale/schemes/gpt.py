"""Schemes of decoder language models that shrink what each block adds to the residual stream with the number of blocks."""

from __future__ import annotations

import math

from varscale.initializers.distributions import DistributionName
from varscale.initializers.distributions import distribution as checked_distribution
from varscale.initializers.initializer import checked_number
from varscale.schemes.residuals import needs_additions
from varscale.schemes.scheme import Choice, Scheme, Subject, spread


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
    words = f"{name}(stddev={stddev:g}, distribution={distribution!r})"

    def rule(subject: Subject) -> Choice:
        if subject.ends and subject.is_matrix:
            count = subject.whole.additions
            return Choice(spread(distribution, stddev / math.sqrt(count)), f"÷ √{count}, the residual additions")
        if subject.is_matrix or subject.role == "position":
            return Choice(spread(distribution, stddev), "the plain standard deviation")
        return subject.kept()

    return Scheme(words, rule, check=needs_additions(words))
