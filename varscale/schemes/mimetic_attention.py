"""Mimetic initialization: attention whose products of kernels look like those of pretrained transformers."""

from __future__ import annotations

from collections.abc import Sequence

from varscale.initializers.initializer import Initializer, checked_number
from varscale.schemes.joint_laws import Factor, Together
from varscale.schemes.scheme import Choice, Scheme, Subject
from varscale.schemes.structure import Structure, packed_kernels
from varscale.usage.parameters import ParameterUses


def mimetic(scores: tuple[float, float] = (0.7, 0.7), values: tuple[float, float] = (0.4, 0.4)) -> Scheme:
    """W_q W_kᵀ ≈ αZ + βI in each head, and W_v W_out ≈ αZ − βI, each split in two by its singular values.

    Z has independent normal entries of variance 1/d. All other parameters keep their declared laws. Attention's four kernels
    must be kernels of their own, or query, key and value packed in thirds; each query has a key and a value of its own.

    Args:
        scores: (α, β) of queries and keys, finite and ≥ 0.
        values: (α, β) of values and the output.

    Raises:
        ValueError: a number is out of range; when called: a model without self-attention in a residual branch, or with grouped
            queries, or kernels that are packed otherwise.

    Source: Trockman & Kolter 2023, "Mimetic Initialization of Self-Attention Layers", section 4.
    """
    for name, pair in (("scores", scores), ("values", values)):
        for number in pair:
            checked_number(name, number, at_least=0.0)
    words = f"mimetic(scores={scores}, values={values})"

    def check(structure: Structure) -> None:
        own = [i for i in range(len(structure.uses.branches)) if structure.attends(i) and not structure.crosses(i)]
        if not own:
            raise ValueError(f"{words} is for transformers, and the trace of this model has no self-attention in a branch")
        for index in own:
            _check_packing(words, structure.members(index))

    def rule(subject: Subject) -> Choice:
        use = subject.uses.main
        if not subject.is_matrix or not subject.attends or use is None or use.branch is None:
            return subject.kept()
        if subject.structure.crosses(use.branch):
            return subject.kept("as declared: it attends to another stream")
        last = subject.structure.last(use.branch)
        shared = last[0].path if last else ""
        heads, kernels = _heads(subject), packed_kernels(subject.uses)

        def law(part: frozenset[str]) -> Initializer | None:
            axes, own = (use.reduction_axes, use.output_axes), shared if len(kernels) == 1 else ""
            if part & {"query", "key"}:
                return Factor(own, "left" if "query" in part else "right", *scores, heads, *axes)
            if "value" in part:
                return Factor(own, "left", values[0], -values[1], 1, *axes, tag=1)
            return Factor(own, "right", values[0], -values[1], 1, *axes, tag=1) if subject.ends else None

        laws = [law(names) for names, _ in kernels]
        if any(one is None for one in laws) or (len(laws) > 1 and not _in_blocks(subject.uses)):
            return subject.kept("as declared: it is none of attention's four kernels")
        if len(laws) == 1:
            return Choice(laws[0], "near the identity")  # pyright: ignore[reportArgumentType]
        axis, run = use.packed or (-1, 0)
        sizes = tuple(run * n // sum(n for _, n in kernels) for _, n in kernels)
        return Choice(Together(tuple(laws), sizes, axis, shared), "near the identity, part by part")

    return Scheme(words, rule, check=check)


def _heads(subject: Subject) -> int:
    """The heads of the attention that a kernel belongs to."""
    structure, index = subject.structure, subject.main.branch
    assert index is not None
    queries = {p.path: p for p in structure.members(index)}
    for attention in structure.uses.attentions:
        for path in attention.query:
            if path in queries:
                parameter = queries[path]
                assert parameter.main is not None
                kernels = packed_kernels(parameter)
                share = sum(n for names, n in kernels if "query" in names or not names) / sum(n for _, n in kernels)
                fan_out = parameter.main.fan_out * share
                return max(1, round(fan_out / attention.terms))
    return 1


def _check_packing(words: str, members: Sequence[ParameterUses]) -> None:
    """Raises ValueError where an attention's kernels do not pair up: one query, key and value a head, each in one run."""
    sizes = {"query": 0.0, "key": 0.0, "value": 0.0}
    for parameter in members:
        kernels, main = packed_kernels(parameter), parameter.main
        held = [(names & set(sizes), n) for names, n in kernels]
        if main is None or not main.reduction_axes or not any(names for names, _ in held):
            continue
        if len(kernels) > 1 and not _in_blocks(parameter):
            raise ValueError(
                f"{words} needs query, key and value in kernels of their own or packed in thirds, and {parameter.path!r} packs "
                f"them head by head in the shape {parameter.shape}"
            )
        for names, n in held:
            for name in names:
                sizes[name] += main.fan_out * n / sum(n for _, n in kernels)
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {size:g}" for name, size in sizes.items())
        raise ValueError(
            f"{words} needs a key and a value for each query, and the attention of {members[0].path!r} has the widths {told}"
        )


def _in_blocks(parameter: ParameterUses) -> bool:
    packed = parameter.main and parameter.main.packed
    return bool(packed) and packed[1] == parameter.shape[packed[0]]
