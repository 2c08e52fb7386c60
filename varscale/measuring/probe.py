"""What a model does on given inputs, module by module: `probe`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from varscale import _compat
from varscale.measuring import reducers, selection
from varscale.measuring.instrument import instrument
from varscale.measuring.rows import report
from varscale.measuring.scoped import scoped
from varscale.programs import faces, failures
from varscale.programs.patterns import Pattern
from varscale.programs.program import KEY_SEED, Inputs, Program
from varscale.programs.trees import open_tree
from varscale.report import Report

_FORWARD_MODE = "No gradients of rows: the model itself differentiates in forward mode, which marks of cotangents do not allow."


def probe(
    model: Any,
    params: Any,
    x: Any,
    *,
    loss: Callable[[Any], Any] | str | None = None,
    rngs: Any = None,
    stats: Any = "fast",
    rows: Pattern | Sequence[Pattern] = "**",
    method: str | None = None,
    memory: str = "fast",
) -> Report:
    """Measures every module's output on given inputs, and with a loss the gradients, in one compiled function.

    The statistics are reduced inside jit, in float32 at least; no activation leaves the device. The model is not changed.

    Layers of a scan over parameters have a row a step, "layers@3". A module inside a loop over time has no row: the module
    that runs the loop has one. A module inside `jax.lax.while_loop` has the row of the last step. Of a plain function every
    `jax.named_scope` block has a row, of what it puts out.

    Args:
        model: a linen module, an nnx instance, an nnx factory `lambda rngs: Net(..., rngs=rngs)`, or a function
            f(params, *args).
        params: the variables that `model.init` returns; for nnx None (a factory's weights are then drawn from key 0) or the
            state that `nnx.split` returns; for a function any tree of arrays.
        x: one input, or `vs.inputs(*args, **kwargs)`: arrays.
        loss: a function of the model's output that returns a scalar, or "random": a random cotangent of unit variance at
            every element of the output, as `predict` has it. With it, gradients are measured.
        rngs: a key or a dict of keys by stream, for dropout and the like. By default linen's streams come from key 0, and
            those of nnx are the model's own.
        stats: "fast": mean, second moment, variance (their difference), largest magnitude, shares of exact zeros and of
            non-finite values. "full" adds the shares within a factor 2 of the overflow and underflow ends of the output's own
            dtype, the mean square of channel means, the share of units (last axis) that are zero on the whole batch, the
            share of |x| above .99, the correlations between samples and between positions, kurtosis, and a histogram of at
            most 2¹⁴ values within 4 standard deviations of the mean. A function of an array that returns a tree of scalars,
            a dict of such functions, or a sequence of all these: `stats=["full", median]`.
        rows: patterns of the rows that are measured, as "blocks/*/attn"; brackets are literal, "**" crosses "/".
        method: the method to run in place of `__call__`.
        memory: "tight": the fast statistics are one reduction everywhere, as they are on a CPU by default, which takes no
            memory of an activation's size and may take longer on an accelerator.

    Returns:
        Report: rows in execution order. With a loss, `Row.gradient` is the mean square of the gradient at the row, and
        `Weight.gradient` and `Weight.gradient_ratio` (norm of gradient over norm of weight) are given. They are None where the
        model differentiates in forward mode, and at rows that depend on no floating-point parameter or input.

    Raises:
        TypeError: the model or an argument is of no known kind.
        ValueError: an argument is outside its range, the loss is no scalar, a pattern matches no row, or the model does not
            run on these parameters and inputs.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, varscale as vs
        >>> model, x = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(8)]), jnp.ones((4, 16))
        >>> report = vs.probe(model, model.init(jax.random.key(0), x), x, loss="random")
        >>> [row.path for row in report.rows], float(report.output.gradient)
        (['layers_0', 'layers_2', ''], 1.0)
    """
    if not (loss is None or loss == "random" or callable(loss)):
        raise ValueError(f"loss must be a function of the model's output, 'random' or None, not {loss!r}")
    reducer = selection.chosen(stats, memory)
    program = faces.program(model, method=method)
    if program.init is None and program.parameters is None:
        program = faces.program(scoped(model))
    inputs = _Inputs.of(faces.as_inputs(x))
    weights = _Weights.of(program, params, inputs)
    step = _Step(program, weights, inputs, loss, _streams(rngs))
    measured = instrument(
        step.run,
        weights.leaves,
        inputs.arrays,
        rows=rows,
        value=reducer,
        weights=[True] * len(weights.leaves) + [False] * len(inputs.arrays),
        method=method or "__call__",
    )
    of_weights, numbers = jax.jit(measured.run)(weights.leaves, inputs.arrays)
    found = [row for row in measured.read(numbers) if not row.averaged]
    if loss is None and any(row.value["nonfinite_share"] for row in found):  # the weights may be the cause
        of_weights = jax.jit(_of_weights)([weights.leaves[i] for i in weights.trained])
    parameters = [(weights.paths[i], weights.leaves[i]) for i in weights.trained]
    notes = () if loss is None or measured.gradients else (_FORWARD_MODE,)
    return report(found, list(zip(parameters, np.asarray(of_weights), strict=False)), notes)


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """The arrays of a model's inputs, and how they go back to their places among everything else."""

    arrays: list[Any]
    places: list[int]
    leaves: list[Any]
    tree: Any

    @classmethod
    def of(cls, given: Inputs) -> _Inputs:
        leaves, tree = jax.tree_util.tree_flatten((given.args, dict(given.kwargs)))
        for leaf in leaves:
            if faces.is_dynamic(leaf) and not isinstance(leaf, jax.Array | np.ndarray | np.generic):
                raise ValueError(f"x must hold arrays, since it is measured what becomes of them, not {leaf!r}")
        places = [i for i, leaf in enumerate(leaves) if faces.is_dynamic(leaf)]
        return cls([leaves[i] for i in places], places, leaves, tree)

    def join(self, arrays: Sequence[Any]) -> Inputs:
        leaves = list(self.leaves)
        for i, x in zip(self.places, arrays, strict=True):
            leaves[i] = x
        return Inputs(*jax.tree_util.tree_unflatten(self.tree, leaves))


@dataclasses.dataclass(frozen=True)
class _Weights:
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
    def of(cls, program: Program, params: Any, inputs: _Inputs) -> _Weights:
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


def _own_parameters(program: Program, inputs: _Inputs) -> Any:
    if program.parameters is not None:
        return program.parameters
    if not program.has_own_init:
        raise ValueError("params must be given: the variables that model.init returns, or the arrays that a function takes")
    assert program.init is not None
    nothing = Inputs((), {})
    return jax.jit(functools.partial(program.init, x=nothing))(jax.random.key(KEY_SEED))


def _streams(rngs: Any) -> Any:
    """Keys by stream, or one key, or None."""

    def key(x: Any) -> Any:
        if isinstance(x, int | np.integer):
            return jax.random.key(int(x))
        if hasattr(x, "dtype") and (jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or x.dtype == jnp.uint32):
            return x
        raise TypeError(f"rngs must be a key, an int, or a dict of these by stream, not {x!r}")

    if rngs is None:
        return None
    return {name: key(x) for name, x in rngs.items()} if isinstance(rngs, Mapping) else key(rngs)


@dataclasses.dataclass(frozen=True)
class _Step:
    """What is measured: a forward pass, and with a loss the gradients of parameters and inputs."""

    program: Program
    weights: _Weights
    inputs: _Inputs
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
        return _of_weights(trained, gradients)

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
            return _random_loss(output)
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


def _random_loss(output: Any) -> Any:
    """Σ c·y with independent signs c: the gradient at y has second moment 1 in every sample."""
    leaves = [x for x in jax.tree_util.tree_leaves(output) if _is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact)]
    if not leaves:
        raise ValueError("loss='random' needs a model that returns floating-point arrays")
    keys = jax.random.split(jax.random.key(KEY_SEED + 1), len(leaves))
    signs = [jax.random.rademacher(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    return sum(jnp.sum(jnp.real(c * y).astype(jnp.float32)) for c, y in zip(signs, leaves, strict=True))


def _of_weights(weights: list[Any], gradients: list[Any] | None = None) -> Any:
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
