"""Given samples in classes of nearly one scale: a norm divides each by its own, and E[1/s²] is not 1/E[s²]."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.cluster import hierarchy

from varscale.theory.domain.axes import MOST_CLASSES, Axis, labelled

_ALIKE_SCALES = 0.02  # variance of ln s² in a class, which is the relative error of E[1/s²] there
_MOST_SORTED = 256  # samples that are clustered; of more, those between two of these go with the nearest


def sample_axis(numbers: Float[np.ndarray, "samples ..."]) -> Axis:
    """The first axis of given numbers, its positions in classes of samples whose mean squares are nearly one.

    Samples that are all zero, as paddings are, are a class of their own.
    """
    squares = np.mean(np.square(numbers, dtype=np.float64).reshape(len(numbers), -1), axis=1)
    positive = squares > 0
    labels = np.zeros(len(numbers), int)
    if positive.sum() > 1:
        logs, chance = (
            np.log(squares[positive]),
            2 / (numbers.size // len(numbers)),
        )  # variance of ln of a mean of n squares
        if logs.var() > _ALIKE_SCALES + 2 * chance:
            labels[positive] = 1 + _classes_by_scale(logs, MOST_CLASSES - (not positive.all()))
        else:
            labels[positive] = 1
    return labelled(labels) if len(np.unique(labels)) > 1 else Axis(len(numbers))


def _classes_by_scale(logs: Float[np.ndarray, " samples"], most: int) -> np.ndarray:
    """The class of each: as few as keep the variance within classes below `_ALIKE_SCALES`, at most `most`."""
    ends = np.unique(np.quantile(logs, np.linspace(0, 1, min(len(logs), _MOST_SORTED)), method="nearest"))
    found = np.zeros(len(logs), int)
    if len(ends) < 2:
        return found
    nearest = np.abs(logs[:, None] - ends[None]).argmin(axis=1)
    tree = hierarchy.ward(ends[:, None])
    for count in range(2, most + 1):
        found = hierarchy.fcluster(tree, count, "maxclust")[nearest] - 1
        sizes = np.bincount(found)
        means = np.bincount(found, logs) / np.maximum(sizes, 1)
        if np.mean((logs - means[found]) ** 2) <= _ALIKE_SCALES:
            break
    return found
