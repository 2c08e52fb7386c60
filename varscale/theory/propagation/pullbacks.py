"""Pullbacks of the core kinds of nodes: second moments of the cotangents of their arguments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from varscale.theory.domain.axes import Axis, apply_axis, contract_axis, lift_types, shares
from varscale.theory.domain.tables import full_types
from varscale.theory.graph.expressions import Mean, Sum
from varscale.theory.graph.nodes import View, pullback
from varscale.theory.graph.normal_form import mean_pullback
from varscale.theory.graph.store import BackwardNotes


def sum_out(second: np.ndarray, frame: Sequence[Axis], view: View) -> np.ndarray:
    """A frame's cotangent moments, summed over the axes that the viewed node does not have, by the node's own types."""
    out = np.array(full_types(second, frame))
    for k in reversed(range(len(frame))):
        if k not in view.bind:
            out = contract_axis(out, k, frame[k].pairs)
    kept = [k for k in range(len(frame)) if k in view.bind]
    for place, k in enumerate(kept):
        own = view.node.axes[view.bind.index(k)]
        if own.labels != frame[k].labels:
            out = apply_axis(out, place, coarsen(frame[k], own))
    return out.transpose([kept.index(b) for b in view.bind]) if view.bind else out


def coarsen(fine: Axis, coarse: Axis) -> np.ndarray:
    """Averages of a type array over the pairs that a coarser classing pools, (coarse types, fine types)."""
    index = lift_types(fine, coarse)
    if index.ndim == 2:
        return (
            lift_types(coarse, fine)
            if lift_types(coarse, fine).ndim == 2
            else np.eye(fine.types)[lift_types(coarse, fine)]
        )
    out = np.zeros((coarse.types, fine.types))
    out[index, np.arange(fine.types)] = np.maximum(fine.pairs, 1e-12)
    return out / np.maximum(out.sum(axis=1, keepdims=True), 1e-300)


def mean_square(second: np.ndarray, axes: tuple[Axis, ...]) -> float:
    """The average over elements of a type array."""
    return float(shares(axes) @ second[tuple(slice(0, axis.classes) for axis in axes)].ravel())


def centred(second: np.ndarray, axes: Sequence[int], frame: Sequence[Axis]) -> np.ndarray:
    """A cotangent less its mean over some axes: E[(g − ḡ)(g' − ḡ')] = E[g g'] − E[ḡ ḡ'] for exchangeable positions."""
    mean = np.array(full_types(second, frame))
    for k in axes:
        mean = np.repeat(np.expand_dims(contract_axis(mean, k, frame[k].any_pair), k), frame[k].types, axis=k)
    return second - mean


@pullback.register(Sum)
def pullback_of_sum(node: Sum, cotangent: np.ndarray, notes: BackwardNotes) -> list[np.ndarray | None]:

    centred_by = node.centring
    out: list[np.ndarray | None] = []
    for i, (c, view) in enumerate(zip(node.params, node.args, strict=True)):
        if i in centred_by.values():
            out.append(None)
            continue
        passed = cotangent
        if i in centred_by:
            mean = node.args[centred_by[i]]
            passed = centred(cotangent, [k for k in view.bind if k not in mean.bind], node.axes)
        out.append(c * c * sum_out(passed, node.axes, view))
    return out


@pullback.register(Mean)
def pullback_of_mean(node: Mean, cotangent: np.ndarray, notes: BackwardNotes) -> list[np.ndarray | None]:
    return [mean_pullback(cotangent, node.params, node.args[0].node.axes)]
