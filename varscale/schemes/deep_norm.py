"""Schemes that make room for depth beside a normalisation: DeepNorm and Sub-LN."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from varscale.initializers.distributions import DistributionName
from varscale.initializers.initializer import Initializer
from varscale.schemes.plan import PlannedLeaf, Requirement
from varscale.schemes.requirements import residual_scales
from varscale.schemes.residuals import needs_additions
from varscale.schemes.scheme import Choice, Scheme, Subject, checked_convention, spread
from varscale.schemes.structure import Structure

_SCORES = frozenset({"query", "key"})


def deepnorm(*, distribution: DistributionName = "normal", convention: str | None = None) -> Scheme:
    """Glorot's law, times β for what a branch passes on: feed-forward layers, values and output projections; never q and k.

    The program must multiply the stream by α at each addition, x = norm(α · x + branch(x)): no initializer can. One stack of N
    layers: α = (2N)^¼, β = (8N)^−¼. An encoder of N and a decoder of M: α = .81 (N⁴M)^(1/16), β = .87 (N⁴M)^(−1/16) and
    α = (3M)^¼, β = (12M)^−¼. Tables and the readout have 1/√d.

    Args:
        distribution: of the kernels.
        convention: None: as the paper has it. "torchscale": its code, where an encoder with a decoder has 1.15 in place of .87,
            attention's inputs have gain 1/√2 and feed-forward layers start from PyTorch's Linear, all uniform.

    Raises:
        ValueError: convention is unknown; when called: a model without residual additions.

    Source: Wang et al. 2022, "DeepNet: Scaling Transformers to 1,000 Layers", figure 2 and section 4.
    """
    checked_convention(convention, "torchscale")
    words = f"deepnorm(distribution={distribution!r}, convention={convention!r})"
    encoder_gain = 0.87 if convention is None else 1.15

    def gain(structure: Structure, stream: int) -> float:
        n, m = _depths(structure, stream)
        if m is None:
            return (8 * n) ** -0.25
        return (12 * m) ** -0.25 if structure.crossed(stream) else encoder_gain * (n**4 * m) ** (-1 / 16)

    def alpha(structure: Structure, stream: int) -> float:
        n, m = _depths(structure, stream)
        if m is None:
            return (2 * n) ** 0.25
        return (3 * m) ** 0.25 if structure.crossed(stream) else 0.81 * (n**4 * m) ** (1 / 16)

    def requires(structure: Structure, leaves: Sequence[PlannedLeaf]) -> Sequence[Requirement]:
        return list(residual_scales(structure, lambda i: alpha(structure, structure.uses.branches[i].stream)))

    rule = _scaled(gain, distribution, convention, "β")
    return Scheme(words, rule, check=needs_additions(words), requires=requires)


def subln(*, distribution: DistributionName = "normal", convention: str | None = None) -> Scheme:
    """Glorot's law, times γ for feed-forward layers, values and output projections, each of which reads a normalised input.

    One stack of N layers: γ = √(ln 2N). A decoder of M layers beside an encoder of N: √(ln 3M), and √(ln 3M · ln 2N / 3) in the
    encoder. Tables and the readout have 1/√d.

    Args:
        distribution: of the kernels.
        convention: None: as the paper has it; "torchscale": as for `deepnorm`.

    Raises:
        ValueError: convention is unknown; when called: a model without residual additions.

    Source: Wang et al. 2022, "Foundation Transformers" (Magneto), section 2.
    """
    checked_convention(convention, "torchscale")
    words = f"subln(distribution={distribution!r}, convention={convention!r})"

    def gain(structure: Structure, stream: int) -> float:
        n, m = _depths(structure, stream)
        if m is None:
            return math.sqrt(math.log(2 * n))
        return math.sqrt(math.log(3 * m) * (1.0 if structure.crossed(stream) else math.log(2 * n) / 3))

    notes = ("Sub-LN has a second normalisation in each branch, before its last kernel.",)
    return Scheme(words, _scaled(gain, distribution, convention, "γ"), check=needs_additions(words), notes=notes)


def _depths(structure: Structure, stream: int) -> tuple[int, int | None]:
    """(N, M): blocks of the encoder and of the decoder that attends to it; (blocks of this stream, None) for one stack."""
    decoders = [s for s in structure.streams if structure.crossed(s)]
    encoders = [s for s in structure.streams if s not in decoders]
    if not decoders or not encoders:
        return structure.blocks(stream), None
    of_decoder = structure.blocks(stream if stream in decoders else decoders[0])
    return structure.blocks(stream if stream in encoders else encoders[0]), of_decoder


def _scaled(
    gain: Callable[[Structure, int], float], distribution: DistributionName, convention: str | None, name: str
) -> Callable[[Subject], Choice]:
    """Glorot's law times a gain for what lies in a branch and is no query or key."""

    def rule(subject: Subject) -> Choice:
        if not subject.is_matrix and subject.role != "position":
            return subject.kept()
        if subject.is_table or subject.role in ("readout", "position"):
            return Choice(spread("normal", subject.width**-0.5), "1/√d")
        branch = subject.branch
        factor = 1.0 if branch is None or subject.main.after == "softmax" else gain(subject.structure, branch.stream)

        def law(names: frozenset[str], fan_out: float) -> Initializer:
            own = 1.0 if names and names <= _SCORES else factor
            if convention is None:
                return spread(distribution, own * math.sqrt(2 / (subject.fan_in + fan_out)))
            return spread("uniform", own * _torchscale(subject, names, fan_out))

        made = subject.by_part(law)
        if made != law(_SCORES, subject.fan_out):
            return Choice(made, f"Glorot × {name} = {factor:.4g}")
        return Choice(made, "Glorot" if branch is None else "Glorot: scores are not scaled")

    return rule


def _torchscale(subject: Subject, names: frozenset[str], fan_out: float) -> float:
    """The standard deviation before β of torchscale's kernels."""
    glorot = math.sqrt(2 / (subject.fan_in + fan_out))
    if names & {"query", "key", "value"}:
        return glorot / math.sqrt(2)
    return glorot if subject.attends else math.sqrt(1 / (3 * subject.fan_in))
