"""Gaussian arrays of a given covariance by type: crossed random effects."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from varscale.theory.domain.axes import Axis

Positions = Sequence[Int[np.ndarray, " kept"]]


def gaussian(
    covariance: Float[np.ndarray, "..."],
    axes: Sequence[Axis],
    positions: Positions,
    replicates: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, "replicates ..."]:
    """Zero-mean Gaussian arrays of a given covariance by type, at some positions of its axes.

    The law is that of a crossed random-effects model: for every set of axes, an effect that is drawn anew at each of their
    positions and shared along the others, there with one value a class.
    """
    labels = [axis.label_array[kept] for axis, kept in zip(axes, positions, strict=True)]
    blocks = covariance.reshape([axis.types for axis in axes])
    out = np.zeros((replicates, *map(len, positions)))
    for own in itertools.product((True, False), repeat=len(axes)):
        part = blocks
        for k, (axis, anew) in enumerate(zip(axes, own, strict=True)):
            c = axis.classes
            same, different = np.split(part, [c], axis=k)
            part = same - np.take(different, np.arange(c) * (c + 1), axis=k) if anew else different
        if np.max(np.abs(part)) > 1e-14:
            out += _effect(part, axes, labels, own, replicates, rng)
    return out


def _effect(
    part: np.ndarray,
    axes: Sequence[Axis],
    labels: Sequence[np.ndarray],
    own: Sequence[bool],
    replicates: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """One effect: independent along the axes in `own`, correlated between the classes of the others."""
    mine = [k for k, anew in enumerate(own) if anew]
    others = [k for k, anew in enumerate(own) if not anew]
    classes = [axes[k].classes for k in others]
    square = part.transpose([*mine, *others]).reshape(
        [axes[k].classes for k in mine] + [n for c in classes for n in (c, c)]
    )
    at = len(mine)
    pairs = [*range(at), *range(at, square.ndim, 2), *range(at + 1, square.ndim, 2)]
    total = math.prod(classes)
    matrix = square.transpose(pairs).reshape([axes[k].classes for k in mine] + [total, total])
    values, vectors = np.linalg.eigh((matrix + np.swapaxes(matrix, -1, -2)) / 2)
    factor = vectors * np.sqrt(np.maximum(values, 0.0))[..., None, :]
    for place, k in enumerate(mine):
        factor = np.take(factor, labels[k], axis=place)
    sizes = [len(labels[k]) for k in mine]
    noise = rng.standard_normal((replicates, *sizes, total))
    effect = (factor @ noise[..., None])[..., 0].reshape([replicates, *sizes, *classes])
    for place, k in enumerate(others):
        effect = np.take(effect, labels[k], axis=1 + at + place)
    return effect.transpose([0, *(1 + i for i in np.argsort([*mine, *others]))])
