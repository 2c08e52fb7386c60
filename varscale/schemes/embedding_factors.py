"""What a program multiplies embeddings with, compared with the base: the embedded stream is not to grow with the width.

Ashish Vaswani et al. 2017, "Attention is all you need" (arXiv 1706.03762), section 3.4, multiplies embeddings by √d_model.
Under μP (arXiv 2203.03466, table 3) the output of an input layer has the base's size at every width; by lemma J.1 a factor of
the program can be undone in the parameter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from varscale.schemes.growth import Grown, GrownLeaf
from varscale.schemes.parametrization import Scaling
from varscale.schemes.plan import Requirement
from varscale.schemes.structure import part_names
from varscale.usage.parameters import OneUse, ParameterUses

EMBEDDING = "embedding multiplier"  # name of a requirement
_TABLES = ("embedding", "position")
SAME = 1e-3  # relative difference of two numbers in a program that are meant to be equal: a program may hold them in bfloat16


def of_embeddings(both: Grown, scalings: dict[str, Scaling]) -> Iterator[Requirement]:
    """What embeddings and positions are multiplied with is to be what it is in the base: √d grows with the width.

    The rest is part of the table, where that is not the readout too, and of an input layer's kernel and bias.
    """
    for leaf in both.leaves:
        if leaf.growth.position != "input" or leaf.place != "outside" or not _is_embedding(leaf, both):
            continue
        factors = _looked_up(leaf, both)
        changes = [(mine, base) for mine, base in factors if not math.isclose(mine, base, rel_tol=SAME)]
        if not changes:
            if leaf.conflict is not None and factors and (factor := max(factors))[1] != 1:
                yield Requirement(EMBEDDING, leaf.path, factor[1], factor[0], "present")
            continue
        found, expected = changes[0]
        mend = f"multiply what {leaf.path!r} gives by {expected:.6g} at every width"
        if math.isnan(found / expected) or both.base_uses is None:
            told = "give the base as a model: its own factor is not known from shapes"
            yield Requirement(EMBEDDING, leaf.path, expected, None if math.isnan(found) else found, "unknown", told)
            continue
        folds = leaf.conflict is None and len(factors) == 1 and bool(found)
        if folds:
            for path in (leaf.path, *_biases(leaf, both)):
                scalings[path] = dataclasses.replace(scalings[path], multiplier=rounded(expected / found)).folded()
        yield Requirement(EMBEDDING, leaf.path, expected, found, "folded" if folds else "missing", mend)


def _is_embedding(leaf: GrownLeaf, both: Grown) -> bool:
    """Whether it begins the stream: a table, or an input layer whose output no readout or attention claims the factor of."""
    use = leaf.uses.main
    if use is None or leaf.uses.role in _TABLES:
        return use is not None
    if not use.reduction_axes or frozenset().union(*part_names(leaf.uses)) & {"query", "key"}:
        return False
    for other in both.leaves:
        mine, base = use_as_readout(other, both)
        if other.growth.position != "readout" or mine is None or base is None or mine.depth != use.depth:
            continue
        if mine.input_scale != base.input_scale:
            return False
    return True


def _biases(leaf: GrownLeaf, both: Grown) -> list[str]:
    """Paths of the biases that are added to the output of a layer's only kernel."""
    layer = of_layer(leaf, both)
    alone = is_kernel(leaf) and "/" in leaf.path and sum(map(is_kernel, layer)) == 1
    return [other.path for other in layer if alone and other.uses.main and other.uses.main.kind == "shift"]


def use_as_readout(leaf: GrownLeaf, both: Grown) -> tuple[OneUse | None, OneUse | None]:
    """A parameter's main use, of a tied table that of the readout: the model's and the base's; None for none."""
    both_uses = (leaf.uses, None if both.base_uses is None else both.base_uses[leaf.base])
    mine, base = (None if p is None else p.main if leaf.conflict is None or not p.uses else p.uses[-1] for p in both_uses)
    return mine, base


def own_factors(use: OneUse) -> tuple[float | None, ...]:
    """The constants that a parameter and its output are multiplied by."""
    # Inside a bounded function too, whose slope at 0 is 1: a soft cap c tanh(y / c) of logits.
    return use.kernel_scale, use.function_scale, use.output_scale


def product(factors: Sequence[float | None]) -> float:
    """Their product; NaN where one is not known."""
    return math.prod(math.nan if factor is None else factor for factor in factors)


def reads_embeddings(leaf: GrownLeaf, both: Grown) -> bool:
    """Whether the constant that its input is multiplied by is that of the embeddings, which their law undoes."""
    mine, base = use_as_readout(leaf, both)
    if mine is None or base is None or mine.depth or not mine.input_scale or not base.input_scale:
        return False
    ratio = mine.input_scale / base.input_scale
    return ratio != 1 and any(
        math.isclose(found, ratio * of_base, rel_tol=SAME)
        for table in both.leaves
        if table.uses.role in _TABLES and table.place == "outside"
        for found, of_base in _looked_up(table, both)
    )


def _looked_up(leaf: GrownLeaf, both: Grown) -> set[tuple[float, float]]:
    """What rows of a table, or outputs of an input layer, are multiplied with, in the model and in the base."""

    def found(p: ParameterUses) -> list[float]:
        return [product(own_factors(use)) for use in p.uses if p.main is not None and use.role == p.main.role]

    mine = found(leaf.uses)
    base = [1.0] * len(mine) if both.base_uses is None else found(both.base_uses[leaf.base])
    return set(zip(mine, base, strict=False))


def is_kernel(leaf: GrownLeaf) -> bool:
    """Whether it mixes or looks up."""
    return leaf.uses.main is not None and bool(leaf.uses.main.reduction_axes)


def of_layer(leaf: GrownLeaf, both: Grown) -> list[GrownLeaf]:
    """The parameters of the same layer."""
    layer = leaf.path.rpartition("/")[0]
    return [other for other in both.leaves if other.path.rpartition("/")[0] == layer]


def rounded(ratio: float) -> float:
    """The digits of a ratio that numbers in float32 have."""
    return float(f"{ratio:.6g}")
