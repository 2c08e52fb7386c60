"""What a model does on given inputs, module by module: `probe`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varscale.measuring import selection
from varscale.measuring.instrument import instrument
from varscale.measuring.passes import Arrays, Pass, Variables, weight_statistics
from varscale.measuring.rows import report
from varscale.measuring.scoped import scoped
from varscale.programs import faces
from varscale.programs.patterns import Pattern
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
    return prober(model, params, x, loss=loss, rngs=rngs, stats=stats, rows=rows, method=method, memory=memory)(params)


def prober(
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
) -> Callable[[Any], Report]:
    """The function from parameters to what `probe` reports, compiled once for all parameters of one structure.

    Args:
        model: as `probe` takes it, and all that follows.
        params: parameters of the structure that the function will be given.
        x: the input.
        loss: a function of the output.
        rngs: keys.
        stats: which statistics.
        rows: which rows.
        method: in place of `__call__`.
        memory: as `probe` takes it.

    Raises:
        TypeError: the model or an argument is of no known kind.
        ValueError: as of `probe`.
    """
    if not (loss is None or loss == "random" or callable(loss)):
        raise ValueError(f"loss must be a function of the model's output, 'random' or None, not {loss!r}")
    reducer = selection.chosen(stats, memory)
    program = faces.program(model, method=method)
    if program.init is None and program.parameters is None:
        program = faces.program(scoped(model))
    inputs = Arrays.of(faces.as_inputs(x))
    for array in inputs.arrays:
        if not isinstance(array, jax.Array | np.ndarray | np.generic):
            raise ValueError(f"x must hold arrays, since it is measured what becomes of them, not {array!r}")
    weights = Variables.of(program, params, inputs)
    step = Pass(program, weights, inputs, loss, _streams(rngs))
    measured = instrument(
        step.run,
        weights.leaves,
        inputs.arrays,
        rows=rows,
        value=reducer,
        weights=[True] * len(weights.leaves) + [False] * len(inputs.arrays),
        method=method or "__call__",
    )
    run, statistics = jax.jit(measured.run), jax.jit(weight_statistics)
    notes = () if loss is None or measured.gradients else (_FORWARD_MODE,)

    def probed(given: Any) -> Report:
        leaves = weights.leaves if given is params else Variables.of(program, given, inputs).leaves
        of_weights, numbers = run(leaves, inputs.arrays)
        found = [row for row in measured.read(numbers) if not row.averaged]
        if loss is None and any(row.value["nonfinite_share"] for row in found):  # the weights may be the cause
            of_weights = statistics([leaves[i] for i in weights.trained])
        parameters = [(weights.paths[i], leaves[i]) for i in weights.trained]
        return report(found, list(zip(parameters, np.asarray(of_weights), strict=False)), notes)

    return probed


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
