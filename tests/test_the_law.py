"""The property of the mission: `E[y²] = n·Var[w]·E[x²]`, forward and backward, for any layer, law, mode and input.

Each case is drawn by Hypothesis as a frozen description; its key follows from the description. A replicate has fresh weights, fresh inputs and fresh
gradients, so that replicates are independent whatever the layer shares within one. Error rates: at most 1e-9 of false alarms a claim
and case (three batches must agree), 1e-6 of misses at a ratio of 1.1; `Underpowered` fails a test, it does not pass it.
"""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import event, given, note, settings
from hypothesis import strategies as st

import varscale as vs
from varscale import programs
from varscale.testing import assert_output_variance, strategies
from varscale.testing.layer_cases import LayerCase

INPUTS: dict[str, tuple[Callable[[jax.Array, tuple[int, ...]], jax.Array], float, float]] = {
    # name: sampler of independent entries, E[x²], E[x]
    "centred": (lambda key, shape: jax.random.normal(key, shape), 1.0, 0.0),
    "relu": (lambda key, shape: jax.nn.relu(jax.random.normal(key, shape)), 0.5, (2 * np.pi) ** -0.5),
    "shifted": (lambda key, shape: 0.5 * jax.random.normal(key, shape) + 1.0, 1.25, 1.0),
    "small": (lambda key, shape: 1e-3 * jax.random.uniform(key, shape, minval=-(3**0.5), maxval=3**0.5), 1e-6, 0.0),
}


@dataclass(frozen=True)
class Case:
    layer: LayerCase
    scale: float
    mode: str
    distribution: str
    inputs: str

    @property
    def key(self):
        return jax.random.key(zlib.crc32(repr(self).encode()))

    @property
    def variance(self) -> float:
        return self.scale / self.layer.fans.of(self.mode)

    def initializer(self):
        return vs.variance_scaling(self.scale, self.mode, self.distribution, fans=self.layer.fans)


cases = st.builds(
    Case, strategies.layers(), st.sampled_from((0.5, 1.0, 2.0)), strategies.modes(), strategies.distributions(), st.sampled_from(tuple(INPUTS))
)


def _forward_and_backward(case: Case):
    """`key -> (y, ∂⟨y, g⟩/∂x)`, both divided by the root of what the law claims of them, as one vector each of equal weight."""
    face = programs.program(case.layer.build(case.initializer()))
    sample, second_moment, _ = INPUTS[case.inputs]
    depth, fans = case.layer.depth, case.layer.fans

    def replicate(key, which: str):
        key_w, key_x, key_g = jax.random.split(key, 3)
        # Attention sees equal tokens: one draw, repeated.
        shape = case.layer.input_shape
        x = sample(key_x, (shape[0], 1, shape[2]) if depth == 2 else shape)
        given = programs.as_inputs(jnp.broadcast_to(x, shape))
        assert face.init is not None
        parameters = face.init(key_w, given)

        def run(x):
            return face.apply(parameters, programs.as_inputs(jnp.broadcast_to(x, shape)))[0]

        y, pullback = jax.vjp(run, x)
        if which == "forward":
            return y / jnp.sqrt(second_moment * (fans.fan_in * case.variance) ** depth).astype(y.dtype)
        (gradient,) = pullback(jax.random.normal(key_g, y.shape))
        # The gradients of equal tokens add up in the one draw behind them.
        tokens = shape[1] if depth == 2 else 1
        return gradient / jnp.sqrt(tokens * (fans.fan_out * case.variance) ** depth).astype(gradient.dtype)

    return replicate


@settings(max_examples=20)
@given(case=cases)
def test_the_second_moment_of_the_output_is_fan_in_times_the_variance_times_that_of_the_input(case):
    replicate = _forward_and_backward(case)
    verdict = assert_output_variance(lambda key, x: replicate(key, "forward"), jnp.ones(1), expected=1.0, key=case.key)
    note(f"{case}\n{verdict}")
    event(case.layer.kind)


@settings(max_examples=16)
@given(case=cases)
def test_the_second_moment_of_the_gradient_is_fan_out_times_the_variance_times_that_of_the_gradient_above(case):
    replicate = _forward_and_backward(case)
    verdict = assert_output_variance(lambda key, x: replicate(key, "backward"), jnp.ones(1), expected=1.0, key=case.key)
    note(f"{case}\n{verdict}")
    event(case.layer.kind)
