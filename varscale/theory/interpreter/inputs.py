"""Inputs as values: known numbers, descriptions of arrays, and arrays whose moments are measured.

Given samples are in classes of nearly one scale: a norm divides each by its own, and E[1/s²] is not 1/E[s²].
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.cluster import hierarchy

from varscale.programs import faces
from varscale.programs.faces import Inputs
from varscale.theory.domain.axes import MOST_CLASSES, Axis, labelled
from varscale.theory.domain.tables import Moments, Table, estimate, independent
from varscale.theory.graph.known_arrays import measured
from varscale.theory.graph.layout import Value, full
from varscale.theory.graph.nodes import Leaf
from varscale.theory.rules.lookup import PADDED, filled_shapes, is_mask, unknown
from varscale.theory.rules.random import input_leaf
from varscale.theory.rules.registry import Complex, Context, Opaque

MODEL_SEED = 0  # laws do not depend on the seed
_ALIKE_SCALES = 0.02  # variance of ln s² in a class, which is the relative error of E[1/s²] there
_MOST_SORTED = 256  # samples that are clustered; of more, those between two of these go with the nearest


class TracedInputs:
    """The arrays and descriptions of arrays of a model's inputs; everything else is passed as it is.

    Attributes:
        arrays: these.
        join: puts others in their places.
        structs: their shapes, of 32 bits unless x64 is on.
    """

    def __init__(self, given: Inputs):
        self.arrays, self.join = faces.split(given)
        wide = [
            not isinstance(x, Moments) and x.dtype in (np.float64, np.int64, np.uint64, np.complex128)
            for x in self.arrays
        ]
        self.structs = [
            jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype) if is_wide else x.dtype)
            for x, is_wide in zip(self.arrays, wide, strict=True)
        ]

    def values(self, interpreter: Context) -> list[Any]:
        """Their values; given arrays may go together, and one that is given twice is one."""
        PADDED.put(interpreter.graph, None, filled_shapes(self.arrays))
        made, leaves = [], list[Leaf]()
        for k, x in enumerate(self.arrays):
            first = next(j for j, y in enumerate(self.arrays) if j == k or _is_same(x, y))
            made.append(input_value(interpreter, x, f"input {first}"))
            if _is_measured(x) and isinstance(made[k], Value) and isinstance(made[k].node, Leaf):
                leaves.append(made[k].node)
        every = functools.reduce(operator.or_, (leaf.deps for leaf in leaves), 0)
        for leaf in leaves:
            leaf.deps = every
        return made


def _is_measured(x: Any) -> bool:
    """Whether it is an array of real floating-point numbers, whose moments are estimated."""
    described = isinstance(x, Moments | jax.ShapeDtypeStruct)
    return not described and jnp.issubdtype(x.dtype, jnp.floating)


def _is_same(x: Any, y: Any) -> bool:
    """Whether both are arrays of the same numbers, not descriptions of arrays or keys."""
    if not (_is_measured(x) and _is_measured(y)):
        return False
    return x.shape == y.shape and x.dtype == y.dtype and np.array_equal(x, y)


def input_value(interpreter: Context, x: Any, name: str) -> Any:
    """An input as a value: known numbers, or a leaf with its law.

    Raises:
        ValueError: it contains NaN or infinities.
    """
    graph, shape = interpreter.graph, tuple(x.shape)
    axes = tuple(Axis(n) for n in shape if n != 1)
    described = isinstance(x, jax.ShapeDtypeStruct)
    if math.prod(shape) == 0:
        raise ValueError(f"{name} has shape {shape}: it is empty")
    if isinstance(x, Moments):
        second = x.second()[tuple(slice(None) if n != 1 else 0 for n in shape)]
        table = Table(axes, np.full([1] * len(axes), float(x.mean)), second)
        return input_leaf(interpreter, name, shape, table, odd=False)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        key = jax.random.key(MODEL_SEED)
        return Opaque(x if isinstance(x, jax.Array) else jax.random.split(key, shape) if shape else key)
    kind = np.dtype(x.dtype).kind if np.dtype(x.dtype).kind != "V" else "f"
    if kind == "c":
        # Of one that is only described, two parts that have E|x|² = 1 between them.
        both = [Moments(0.0, 0.5, shape=shape)] * 2 if described else [np.real(x), np.imag(x)]
        names = f"{name} (real part)", f"{name} (imaginary part)"
        return Complex(*(input_value(interpreter, part, of) for part, of in zip(both, names, strict=True)))
    if described and kind == "b":
        return full(graph, 1.0, shape)
    if described and kind in "iu":
        return unknown(interpreter, name, shape)
    if described:
        return input_leaf(interpreter, name, shape, independent(0.0, 1.0, axes), odd=True)
    numbers = np.asarray(x)
    if kind in "iub":
        return interpreter.known(numbers)
    numbers = numbers.astype(np.float64)
    if not np.all(np.isfinite(numbers)):
        raise ValueError(f"{name} contains NaN or infinities")
    if np.all(numbers == numbers.flat[0]):
        return full(graph, float(numbers.flat[0]), shape)
    if is_mask(graph, numbers):
        return interpreter.known(numbers)
    if len(shape) > 1 and shape[0] > 1:
        axes = (sample_axis(numbers), *axes[1:])
    numbers = numbers.reshape([a.size for a in axes])
    made = input_leaf(interpreter, name, shape, estimate(numbers, axes), odd=False)
    measured(made.node, numbers)
    return made


def sample_axis(numbers: Float[np.ndarray, "samples ..."]) -> Axis:
    """The first axis of given numbers, its positions in classes of samples whose mean squares are nearly one.

    Samples that are all zero, as paddings are, are a class of their own.
    """
    squares = np.mean(np.square(numbers, dtype=np.float64).reshape(len(numbers), -1), axis=1)
    positive = squares > 0
    labels, logs = positive.astype(int), np.log(squares[positive])
    if len(logs) < 2:
        return Axis(len(numbers))
    # Beyond twice the variance of ln of a mean of n squares, 2/n.
    if logs.var() > _ALIKE_SCALES + 4 / (numbers.size // len(numbers)):
        labels[positive] += _classes_by_scale(logs, MOST_CLASSES - (not positive.all()))
    return labelled(labels)


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
