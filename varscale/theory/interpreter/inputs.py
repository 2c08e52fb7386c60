"""Inputs as values: known numbers, descriptions of arrays, and arrays whose moments are measured.

Given samples are in classes of nearly one scale: a norm divides each by its own, and E[1/s²] is not 1/E[s²].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
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
from varscale.theory.rules.lookup import unknown
from varscale.theory.rules.padding import PADDED, filled_shapes, is_mask
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
        args, kwargs = jax.tree_util.tree_unflatten(self.tree, flat)
        return Inputs(args, kwargs)

    def values(self, interpreter: Interpreter) -> list[Any]:
        PADDED.put(interpreter.graph, None, filled_shapes(self.leaves))
        made = [input_value(interpreter, self.leaves[i], self._name(i)) for i in self.places]
        related([(self.leaves[i], x) for i, x in zip(self.places, made, strict=True)])
        return made

    def _name(self, i: int) -> str:
        """The place where its numbers are first given: an array that is given twice is one."""
        x = self.leaves[i]
        return f"input {next(j for j in self.places if j == i or _same_numbers(self.leaves[j], x))}"


def _same_numbers(x: Any, y: Any) -> bool:
    """Whether both are arrays of the same numbers, not descriptions of arrays or keys."""
    if not (_is_measured(x) and _is_measured(y)):
        return False
    return x is y or (x.shape == y.shape and x.dtype == y.dtype and np.array_equal(x, y))


def _is_measured(x: Any) -> bool:
    """Whether it is an array of real floating-point numbers, whose moments are estimated."""
    described = isinstance(x, Moments | jax.ShapeDtypeStruct)
    return not described and jnp.issubdtype(x.dtype, jnp.floating)


def related(inputs: Sequence[tuple[Any, Any]]) -> None:
    """Notes that given arrays may go together."""
    leaves = [
        made.node
        for x, made in inputs
        if _is_measured(x) and isinstance(made, Value) and isinstance(made.node, Leaf)
    ]
    every = functools.reduce(lambda bits, node: bits | node.deps, leaves, 0)
    for node in leaves:
        node.deps = every


def _struct(x: Any) -> jax.ShapeDtypeStruct:
    if isinstance(x, Moments):
        return jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype))
    dtype = x.dtype
    if dtype in (np.float64, np.int64, np.uint64, np.complex128):
        dtype = jax.dtypes.canonicalize_dtype(dtype)  # 32 bits, unless x64 is on
    return jax.ShapeDtypeStruct(x.shape, dtype)


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
        return Opaque(
            x
            if isinstance(x, jax.Array)
            else jax.random.split(jax.random.key(_MODEL_SEED), shape)
            if shape
            else jax.random.key(_MODEL_SEED)
        )
    kind = np.dtype(x.dtype).kind if np.dtype(x.dtype).kind != "V" else "f"
    if kind == "c":
        return Complex(
            *(input_value(interpreter, part, f"{name} ({which} part)") for which, part in _parts(x))
        )
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


def _parts(x: Any) -> list[tuple[str, Any]]:
    """The parts of a complex input; of one that is only described, two that have E|x|² = 1 between them."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        return [("real", np.real(x)), ("imaginary", np.imag(x))]
    return [(which, Moments(0.0, 0.5, shape=x.shape)) for which in ("real", "imaginary")]


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
