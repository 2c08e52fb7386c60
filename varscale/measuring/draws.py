"""Statistics of every module over many networks, each drawn anew and measured once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from varscale.measuring.instrument import Instrumented, instrument
from varscale.measuring.passes import Arrays, Pass, Variables, random_loss
from varscale.programs.program import Inputs, Program


@dataclasses.dataclass(frozen=True)
class Network:
    """A model, and how its parameters and inputs are drawn.

    Attributes:
        program: the model.
        init: key, inputs -> parameters (every collection of variables); traceable.
        sample: key -> the inputs; it runs on the host.
        method: method of the model that is the model's own output.
    """

    program: Program
    init: Callable[[Any, Inputs], Any]
    sample: Callable[[Any], Inputs]
    method: str = "__call__"


def measured_draws(
    network: Network, key: Any, count: int, *, backward: bool
) -> dict[str, Float[np.ndarray, "count statistics=3"]]:
    """Mean, mean square and mean squared gradient of each module's output in `count` networks, by path.

    Parameters, inputs, the keys of dropout and cotangents are drawn anew for each. Gradients are those of Σ c·y with
    independent signs c at the elements y of the model's output; NaN where there are none.

    Raises:
        ValueError: the model does not run.
    """
    keys = jax.random.split(key, 2 * count)
    samples = (network.sample(k) for k in keys[:count])
    first = next(samples)
    one, measured = _compiled(network, Arrays.of(first), keys[0], backward=backward)
    found: dict[str, list[tuple[float, float, float]]] = {}
    for own, x in zip(keys[count:], (first, *samples), strict=True):
        for row in measured.read(one(own, Arrays.of(x).arrays)):
            if row.averaged:
                continue
            gradient = float("nan") if row.cotangent is None else float(row.cotangent["second_moment"])
            numbers = (float(row.value["mean"]), float(row.value["second_moment"]), gradient)
            found.setdefault(row.path, []).append(numbers)
    return {path: np.array(numbers) for path, numbers in found.items()}


def _compiled(network: Network, inputs: Arrays, key: Any, *, backward: bool) -> tuple[Callable[..., Any], Instrumented]:
    """One network as a compiled function of a key and its input arrays, and what reads its numbers."""
    program = network.program
    shapes = jax.eval_shape(lambda key, arrays: network.init(key, inputs.join(arrays)), key, inputs.arrays)
    weights = Variables.of(program, shapes, inputs)
    backward = backward and _is_floating(program, shapes, inputs)

    def step(leaves: Sequence[Any], arrays: Sequence[Any], key: Any) -> Any:
        for_output, streams = jax.random.split(key)
        loss = functools.partial(random_loss, key=for_output) if backward else None
        return Pass(program, weights, inputs, loss, streams).run(list(leaves), list(arrays))

    are_weights = [True] * len(weights.leaves) + [False] * (len(inputs.arrays) + 1)
    measured = instrument(step, weights.leaves, inputs.arrays, key, weights=are_weights, method=network.method)

    @jax.jit
    def one(key: Any, arrays: Any) -> Any:
        for_weights, rest = jax.random.split(key)
        leaves = jax.tree_util.tree_leaves(network.init(for_weights, inputs.join(arrays)))
        return measured.run(leaves, arrays, rest)[1]

    return one, measured


def _is_floating(program: Program, shapes: Any, inputs: Arrays) -> bool:
    """Whether the model's output holds floating-point numbers."""
    output = jax.eval_shape(lambda params, arrays: program.run(params, inputs.join(arrays)), shapes, inputs.arrays)
    return any(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree_util.tree_leaves(output))
