"""Inputs as values: known numbers, descriptions of arrays, and arrays whose moments are measured.

Given samples are in classes of nearly one scale: a norm divides each by its own, and E[1/s²] is not 1/E[s²].
"""

from __future__ import annotations

import functools
import math
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
from varscale.theory.interpreter.interpreter import Interpreter
from varscale.theory.rules.lookup import PADDED, filled_shapes, is_mask, unknown
from varscale.theory.rules.random import input_leaf
from varscale.theory.rules.registry import Complex, Opaque

_MODEL_SEED = 0  # laws do not depend on the seed
_ALIKE_SCALES = 0.02  # variance of ln s² in a class, which is the relative error of E[1/s²] there
_MOST_SORTED = 256  # samples that are clustered; of more, those between two of these go with the nearest


class TracedInputs:
    """Inputs apart: arrays and descriptions of arrays, which are traced, and everything else, which is passed as it is."""

    def __init__(self, given: Inputs):
        self.leaves, self.tree = jax.tree_util.tree_flatten(
            (given.args, dict(given.kwargs)), is_leaf=lambda x: isinstance(x, Moments)
        )
        self.places = [i for i, x in enumerate(self.leaves) if isinstance(x, Moments) or faces.is_dynamic(x)]
        self.structs = [_struct(self.leaves[i]) for i in self.places]

    def join(self, dynamic: list[Any]) -> Inputs:
        flat = list(self.leaves)
        for i, x in zip(self.places, dynamic, strict=True):
            flat[i] = x
        return Inputs(*jax.tree_util.tree_unflatten(self.tree, flat))

    def values(self, interpreter: Interpreter) -> list[Any]:
        """Their values; given arrays may go together, and one that is given twice is one."""
        PADDED.put(interpreter.graph, None, filled_shapes(self.leaves))
        given = [self.leaves[i] for i in self.places]
        made = []
        for k, x in enumerate(given):
            first = next(j for j, y in enumerate(given) if j == k or _is_same(x, y))
            made.append(input_value(interpreter, x, f"input {self.places[first]}"))
        nodes = [
            value.node
            for x, value in zip(given, made, strict=True)
            if _is_measured(x) and isinstance(value, Value) and isinstance(value.node, Leaf)
        ]
        every = functools.reduce(lambda bits, node: bits | node.deps, nodes, 0)
        for node in nodes:
            node.deps = every
        return made


def _is_same(x: Any, y: Any) -> bool:
    """Whether both are arrays of the same numbers, not descriptions of arrays or keys."""
    if not (_is_measured(x) and _is_measured(y)):
        return False
    return x is y or (x.shape == y.shape and x.dtype == y.dtype and np.array_equal(x, y))


def _is_measured(x: Any) -> bool:
    """Whether it is an array of real floating-point numbers, whose moments are estimated."""
    described = isinstance(x, Moments | jax.ShapeDtypeStruct)
    return not described and jnp.issubdtype(x.dtype, jnp.floating)


def _struct(x: Any) -> jax.ShapeDtypeStruct:
    # 32 bits, unless x64 is on; keys are of no such type.
    wide = x.dtype in (np.float64, np.int64, np.uint64, np.complex128) and not isinstance(x, Moments)
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype) if wide else x.dtype)


def input_value(interpreter: Interpreter, x: Any, name: str) -> Any:
    """An input as a value: known numbers, or a leaf with its law.

    Raises:
        ValueError: it contains NaN or infinities.
    """
    graph = interpreter.graph
    shape = tuple(x.shape)
    axes = tuple(Axis(n) for n in shape if n != 1)
    if math.prod(shape) == 0:
        raise ValueError(f"{name} has shape {shape}: it is empty")
    if isinstance(x, Moments):
        second = x.second()
        second = second[tuple(slice(None) if n != 1 else 0 for n in shape)]
        table = Table(axes, np.full([1] * len(axes), float(x.mean)), second)
        return input_leaf(interpreter, name, shape, table, odd=False)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        key = jax.random.key(_MODEL_SEED)
        return Opaque(x if isinstance(x, jax.Array) else jax.random.split(key, shape) if shape else key)
    kind = np.dtype(x.dtype).kind if np.dtype(x.dtype).kind != "V" else "f"
    if kind == "c":
        # Of one that is only described, two parts that have E|x|² = 1 between them.
        described = isinstance(x, jax.ShapeDtypeStruct)
        both = [Moments(0.0, 0.5, shape=shape)] * 2 if described else [np.real(x), np.imag(x)]
        names = f"{name} (real part)", f"{name} (imaginary part)"
        return Complex(*(input_value(interpreter, part, of) for part, of in zip(both, names, strict=True)))
    if isinstance(x, jax.ShapeDtypeStruct):
        if kind == "b":
            return full(graph, 1.0, shape)
        if kind in "iu":
            return unknown(interpreter, name, shape)
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
