"""The nets of `learning-rate-transfer`, and their training at many learning rates in one program."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import varscale as vs
from experiments.lab.training import fit, minibatches

DIVERGED = 10.0  # nats that a run counts as which is not finite
SIZE = 16  # characters of context


class Perceptron(nn.Module):
    """Two hidden layers of ReLU units on the digits' pixels."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch pixels"]) -> Float[Array, "batch classes"]:
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


class Block(nn.Module):
    """A pre-norm residual block of two layers, as `nn.scan` takes it."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch width"], _: None) -> tuple[Float[Array, "batch width"], None]:
        h = nn.relu(nn.Dense(self.width, name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(self.width, name="down")(h), None


class Residual(nn.Module):
    """Residual blocks on the digits' pixels, stacked: any depth compiles in the same time."""

    blocks: int
    width: int = 32

    @nn.compact
    def __call__(self, x: Float[Array, "batch pixels"]) -> Float[Array, "batch classes"]:
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.blocks)
        x, _ = stack(self.width, name="blocks")(nn.Dense(self.width)(x), None)
        return nn.Dense(10)(nn.LayerNorm()(x))


class Characters(nn.Module):
    """A decoder of one block with two heads, which predicts each next character."""

    width: int
    vocabulary: int

    @nn.compact
    def __call__(self, ids: Array) -> Float[Array, "batch positions vocabulary"]:
        x = nn.Embed(self.vocabulary, self.width, embedding_init=nn.initializers.normal(1.0))(ids)
        x = x + self.param("positions", nn.initializers.normal(0.3), (ids.shape[1], self.width))
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(h, h, mask=nn.make_causal_mask(ids))
        h = nn.relu(nn.Dense(2 * self.width)(nn.LayerNorm()(x)))
        x = x + nn.Dense(self.width)(h)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


@dataclass(frozen=True, eq=False)
class Task:
    """What nets are trained on.

    Attributes:
      inputs: of every sample.
      targets: of every sample: a class, or one a position.
      batch: samples a step.
      steps: of training.
      held_out: how many samples, the last ones, are not trained on: the loss is told on them.
    """

    inputs: np.ndarray
    targets: np.ndarray
    batch: int
    steps: int
    held_out: int


def characters(text: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Windows of a text as ids, the windows one character later, and how many different characters there are."""
    known = sorted(set(text))
    ids = np.asarray([known.index(c) for c in text], np.int32)
    count = (len(ids) - 1) // SIZE
    return ids[: count * SIZE].reshape(count, SIZE), ids[1 : count * SIZE + 1].reshape(count, SIZE), len(known)


def final_losses(
    model: nn.Module, scheme: Any, task: Task, keys: Array, rates: Sequence[float]
) -> Callable[[], Float[np.ndarray, "seeds rates"]]:
    """A function that trains with Adam and returns the loss on what was held out.

    Nets are drawn and traced here. The function compiles and runs, so that threads can call several at a time.

    Args:
      model: the net.
      scheme: a scheme of varscale, whose plan gives laws and learning rates; None for the model's own laws and plain Adam.
      task: what it is trained on.
      keys: a key a seed, for weights and batches.
      rates: learning rates.
    """
    inputs, targets = jnp.asarray(task.inputs), jnp.asarray(task.targets)
    plan = None if scheme is None else scheme.at_any_width(model, inputs[:1])
    drawn = [vs.initialize(model, key, inputs[:1], scheme="declared" if plan is None else plan)["params"] for key in keys]
    params = jax.tree.map(lambda *xs: jnp.stack(xs), *drawn)

    def loss(params: Any, rows: Array) -> Float[Array, ""]:
        logits: Any = model.apply({"params": params}, inputs[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets[rows]).mean()

    def one(run: tuple[Any, Array, Array]) -> Float[Array, ""]:
        start, key, rate = run
        adam = optax.adam(lambda step: rate * (1 - step / task.steps))  # ends at zero: the last loss has little noise
        batches = minibatches(key, len(inputs) - task.held_out, task.batch, task.steps)
        ended, _ = fit(loss, adam if plan is None else plan.optimizer(adam), start, batches)
        return loss(ended, jnp.arange(len(inputs) - task.held_out, len(inputs)))

    def all_of(params: Any, keys: Array, rates: Array) -> Float[Array, "seeds rates"]:
        def of_seed(seed: tuple[Any, Array]) -> Float[Array, " rates"]:
            return jax.lax.map(lambda rate: one((*seed, rate)), rates)

        return jax.lax.map(of_seed, (params, keys))

    operands = params, keys, jnp.asarray(rates, jnp.float32)
    lowered = jax.jit(all_of).lower(*operands)

    def trained() -> Float[np.ndarray, "seeds rates"]:
        found = np.asarray(lowered.compile()(*operands), np.float64)
        return np.minimum(np.nan_to_num(found, nan=DIVERGED, posinf=DIVERGED), DIVERGED)

    return trained


def best_octave(losses: Float[np.ndarray, "seeds rates"], octaves: Sequence[float]) -> Float[np.ndarray, " seeds"]:
    """log₂ of the best rate of each seed: the vertex of the parabola through ln loss at the best rate and its neighbours."""
    found = []
    for row in np.log(losses):
        i = int(np.clip(np.argmin(row), 1, len(row) - 2))
        left, middle, right = row[i - 1 : i + 2]
        bend = left - 2 * middle + right
        shift = 0.5 * (left - right) / bend if bend > 0 else float(np.argmin(row) - i)
        found.append(octaves[i] + np.clip(shift, -1, 1) * (octaves[1] - octaves[0]))
    return np.asarray(found)
