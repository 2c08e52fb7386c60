"""A model's pass over its inputs as a function of arrays: forward, and with a loss backward."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from varscale import _compat
from varscale.measuring import reducers
from varscale.programs import faces, failures
from varscale.programs.program import KEY_SEED, Inputs, Program
from varscale.programs.trees import open_tree


@dataclasses.dataclass(frozen=True)
class Arrays:
    """The arrays of a model's inputs, and how they go back to their places among everything else."""

    arrays: list[Any]
    places: list[int]
    leaves: list[Any]
    tree: Any

    @classmethod
    def of(cls, given: Inputs) -> Arrays:
        leaves, tree = jax.tree_util.tree_flatten((given.args, dict(given.kwargs)))
        places = [i for i, leaf in enumerate(leaves) if faces.is_dynamic(leaf)]
        return cls([leaves[i] for i in places], places, leaves, tree)

    def join(self, arrays: Sequence[Any]) -> Inputs:
        leaves = list(self.leaves)
        for i, x in zip(self.places, arrays, strict=True):
            leaves[i] = x
        return Inputs(*jax.tree_util.tree_unflatten(self.tree, leaves))


@dataclasses.dataclass(frozen=True)
class Variables:
    """A model's variables.

    Attributes:
        leaves: the arrays.
        tree: their tree.
        paths: of each array its path, the collection "params" left out.
        trained: numbers of the arrays that are parameters: floating-point, and no statistics, caches or keys.
    """

    leaves: list[Any]
    tree: Any
    paths: list[str]
    trained: list[int]

    @classmethod
    def of(cls, program: Program, params: Any, inputs: Arrays) -> Variables:
        if params is None:
            params = _own_parameters(program, inputs)
        elif isinstance(params, nnx.Module):
            params = nnx.split(params)[1]
        leaves, tree = jax.tree_util.tree_flatten(params)
        named = open_tree(params, "params").leaves
        kinds = jax.tree_util.tree_flatten(params, is_leaf=lambda x: isinstance(x, nnx.Variable))[0]
        collections = any(leaf.path.startswith("params/") for leaf in named)
        trained = []
        for i, (leaf, x) in enumerate(zip(named, leaves, strict=True)):
            counts = isinstance(kinds[i], nnx.Param) if isinstance(kinds[i], nnx.Variable) else True
            counts &= not collections or leaf.path.startswith("params/")
            if counts and jnp.issubdtype(jnp.result_type(x), jnp.inexact):
                trained.append(i)
        return cls(leaves, tree, [leaf.path.removeprefix("params/") for leaf in named], trained)


def _own_parameters(program: Program, inputs: Arrays) -> Any:
    if program.parameters is not None:
        return program.parameters
    if not program.has_own_init:
        raise ValueError("params must be given: the variables that model.init returns, or the arrays that a function takes")
    assert program.init is not None
    nothing = Inputs((), {})
    return jax.jit(functools.partial(program.init, x=nothing))(jax.random.key(KEY_SEED))


@dataclasses.dataclass(frozen=True)
class Pass:
    """What is measured: a forward pass, and with a loss the gradients of parameters and inputs."""

    program: Program
    weights: Variables
    inputs: Arrays
    loss: Any
    rngs: Any

    def run(self, leaves: list[Any], arrays: list[Any]) -> Any:
        """Statistics of the parameters and their gradients, (parameters, 5); nothing without a loss."""
        if self.loss is None:
            self.output(leaves, arrays)
            return jnp.zeros((0, 5))
        floating = [i for i, x in enumerate(arrays) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]

        def scalar(trained: list[Any], given: list[Any]) -> Any:
            everything = _with(leaves, self.weights.trained, trained)
            return self.scalar(self.output(everything, _with(arrays, floating, given)))

        # With respect to the inputs too: that is what rows before the first parameter depend on.
        trained = [leaves[i] for i in self.weights.trained]
        gradients, _ = jax.grad(scalar, argnums=(0, 1))(trained, [arrays[i] for i in floating])
        return weight_statistics(trained, gradients)

    def output(self, leaves: list[Any], arrays: list[Any]) -> Any:
        """The model's output.

        Raises:
            ValueError: the model does not run.
        """
        params = jax.tree_util.tree_unflatten(self.weights.tree, leaves)
        inputs = self.inputs.join(arrays)
        try:
            return self.program.run(params, inputs, self.rngs)
        except Exception as error:
            if _compat.is_forward_mode_error(error):
                raise
            raise ValueError(_diagnosis(self.program, params, inputs, error)) from error

    def scalar(self, output: Any) -> Any:
        """The loss.

        Raises:
            ValueError: it is no floating-point scalar.
        """
        if self.loss == "random":
            return random_loss(output, jax.random.key(KEY_SEED + 1))
        value = self.loss(output)
        if not (jnp.shape(value) == () and jnp.issubdtype(jnp.result_type(value), jnp.floating)):
            what = (
                f"an array of shape {jnp.shape(value)} and dtype {jnp.result_type(value)}" if _is_array(value) else repr(value)
            )
            raise ValueError(f"loss must return a floating-point scalar, not {what}")
        return value


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _with(all_of: list[Any], places: Sequence[int], new: Sequence[Any]) -> list[Any]:
    found = list(all_of)
    for i, x in zip(places, new, strict=True):
        found[i] = x
    return found


def random_loss(output: Any, key: Any) -> Any:
    """Σ c·y with independent signs c: the gradient at y has second moment 1 in every sample.

    Raises:
        ValueError: the output holds no floating-point array.
    """
    leaves = [x for x in jax.tree_util.tree_leaves(output) if _is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact)]
    if not leaves:
        raise ValueError("loss='random' needs a model that returns floating-point arrays")
    keys = jax.random.split(key, len(leaves))
    signs = [jax.random.rademacher(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    return sum(jnp.sum(jnp.real(c * y).astype(jnp.float32)) for c, y in zip(signs, leaves, strict=True))


def weight_statistics(weights: list[Any], gradients: list[Any] | None = None) -> Any:
    """Mean, second moment and non-finite share of each; second moment and non-finite share of its gradient."""
    found = []
    for i, x in enumerate(weights):
        own = reducers.fast(x)
        numbers = [own["mean"], own["second_moment"], own["nonfinite_share"]]
        if gradients is not None:
            numbers += reducers.cotangent(gradients[i]).values()
        found.append(jnp.stack([jnp.asarray(number, jnp.float32) for number in numbers]))
    return jnp.stack(found) if found else jnp.zeros((0, 5))


def _diagnosis(program: Program, params: Any, inputs: Inputs, error: Exception) -> str:
    """Why a model does not run: the inputs, the parameters, or something else."""
    if program.init is None:
        return f"the model does not run on these parameters and inputs: {failures.told(error)}"
    try:
        expected = jax.eval_shape(functools.partial(program.init, x=inputs), jax.random.key(KEY_SEED))
    except Exception as wrong:
        return f"x does not fit the model: {failures.told(wrong)}"
    needed = {leaf.path: tuple(leaf.shape) for leaf in open_tree(expected, "params").leaves}
    given = {leaf.path: tuple(leaf.shape) for leaf in open_tree(params, "params").leaves}
    for path, shape in needed.items():
        if path not in given:
            some = ", ".join(map(repr, list(given)[:4]))
            return f"params must hold {path!r} of shape {shape}, as model.init returns it; they hold {some or 'nothing'}"
        if given[path] != shape:
            return f"params: {path!r} must have shape {shape} on these inputs, not {given[path]}"
    return f"the model does not run on these inputs: {failures.told(error)}"
