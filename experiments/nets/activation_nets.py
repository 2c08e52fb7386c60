"""The nets of `activation-decides`: seven activations under four scales, in one program to look at and one to train."""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments.lab.data import Samples
from experiments.lab.mean_field import propagate
from experiments.lab.training import cross_entropy, fit, minibatches
from experiments.nets.stacks import Classifier, Tower, leaky_relu, rescale

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "leaky relu": leaky_relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "selu": jax.nn.selu,
}
# 1/√E[φ(z)²] to ten digits, by quadrature at 50 digits.
EXACT_GAINS = {
    "relu": math.sqrt(2),
    "leaky relu": math.sqrt(2 / 1.0001),
    "tanh": 1.5925374197,
    "sigmoid": 1.8462285453,
    "gelu": 1.5335304412,
    "silu": 1.6765324703,
    "selu": 1.0,
}
SCHEMES = ("Xavier", "He", "exact", "logistic")
GUESS = math.log(10)  # the cross-entropy of ten classes that are guessed


@dataclass(frozen=True)
class Sizes:
    """Of the nets: first those that are only looked at, then those that are trained."""

    width: int = 256
    depth: int = 30
    batch: int = 32
    deep: int = 10
    shallow: int = 3
    batch_trained: int = 32
    deep_steps: int = 200
    shallow_steps: int = 300
    rates: tuple[float, ...] = (0.01, 0.1)

    def steps(self, depth: int) -> int:
        """How long a net of that depth is trained."""
        return self.deep_steps if depth == self.deep else self.shallow_steps


SIZES = Sizes()


def settings() -> list[tuple[str, str]]:
    """All pairs of activation and scheme; the logistic variant is the sigmoid's alone."""
    return [(a, scheme) for a in ACTIVATIONS for scheme in SCHEMES if scheme != "logistic" or a == "sigmoid"]


def factor(activation: str, scheme: str) -> float:
    """n·Var[w] of a square layer: Xavier 1, He 2, exact gain², NNDL's logistic variant 16."""
    return {"Xavier": 1.0, "He": 2.0, "exact": EXACT_GAINS[activation] ** 2, "logistic": 16.0}[scheme]


@functools.partial(jax.jit, static_argnames=("sizes",))
def signals(key, which, factors, *, sizes: Sizes) -> tuple[Float[Array, "settings depth"], Float[Array, "settings depth"]]:
    """ln of the second moment of each layer's pre-activations, and of the gradient there.

    The input is an activation of standard normal pre-activations, as if a layer stood before: so every net starts from second
    moment 1. The gradient at the output is standard normal.

    Args:
      key: of weights, inputs and the output's gradient.
      which: place in ACTIVATIONS, shape (settings,).
      factors: n·Var[w], shape (settings,).
      sizes: of the net.
    """
    key_weights, key_inputs, key_gradient = jax.random.split(key, 3)
    z = jax.random.normal(key_inputs, (sizes.batch, sizes.width))
    cotangent = jax.random.normal(key_gradient, z.shape)
    unit = Tower(sizes.width, sizes.depth, jnp.tanh).init(key_weights, z)

    def one(setting):
        which, factor = setting

        def activation(y):
            return jax.lax.switch(which, list(ACTIVATIONS.values()), y)

        tower = Tower(sizes.width, sizes.depth, activation)
        params = rescale(unit["params"], jnp.sqrt(factor))

        def output(perturbations):
            variables = {"params": params, "perturbations": perturbations}
            y, sown = tower.apply(variables, activation(z), mutable=["intermediates"])
            return jnp.sum(y * cotangent), sown["intermediates"]["layers"]["preactivation"][0]

        gradients, y = jax.grad(output, has_aux=True)(unit["perturbations"])
        g = gradients["layers"]["preactivation"]
        return tuple(jnp.log(jnp.mean(jnp.square(signal), axis=(1, 2))) for signal in (y, g))

    return jax.lax.map(one, (which, factors))


@functools.partial(jax.jit, static_argnames=("names", "depth", "steps", "batch"))
def train(
    keys, x, labels, which, factors, rates, *, names: tuple[str, ...], depth: int, steps: int, batch: int
) -> Float[Array, "settings rates seeds steps"]:
    """Losses of classifiers trained by gradient descent with momentum .9, for all settings, rates and seeds.

    Args:
      keys: a key a seed.
      x: inputs, shape (samples, features), of second moment 1.
      labels: shape (samples,).
      which: place in `names`, shape (settings,).
      factors: n·Var[w] of the hidden layers, shape (settings,).
      rates: learning rates, shape (rates,).
      names: the activations that occur; fewer compile sooner.
      depth: hidden layers.
      steps: of gradient descent.
      batch: samples a step.
    """

    def one(which, factor, rate, key):
        branches = [ACTIVATIONS[name] for name in names]
        model = Classifier(Tower(x.shape[1], depth, lambda y: jax.lax.switch(which, branches, y), use_bias=True), 10)
        key_weights, key_batches = jax.random.split(key)
        params = dict(model.init(key_weights, x[:1])["params"])
        params["stack"] = rescale(params["stack"], jnp.sqrt(factor))

        def loss(params, batch):
            logits: Any = model.apply({"params": params}, x[batch])
            return cross_entropy(logits, labels[batch])

        batches = minibatches(key_batches, len(x), batch, steps)
        return fit(loss, optax.sgd(rate, momentum=0.9), params, batches)[1]

    def one_setting(setting):
        which, factor = setting
        return jax.vmap(lambda rate: jax.vmap(lambda key: one(which, factor, rate, key))(keys))(rates)

    return jax.lax.map(one_setting, (which, factors))


@dataclass(frozen=True)
class Outcome:
    """What came of training each setting at the better of the learning rates.

    Attributes:
      best: place of that rate, shape (settings,).
      final: mean loss of the last 20 steps, shape (settings, seeds).
      steps: steps until ten losses in a row are on average half of what guessing gives, shape (settings, seeds); where that was
        never reached, all steps: a lower bound.
    """

    best: np.ndarray
    final: np.ndarray
    steps: np.ndarray

    @staticmethod
    def of(losses: np.ndarray) -> "Outcome":
        """From losses of shape (settings, rates, seeds, steps); a run that diverged counts as a loss of 10."""
        tame = np.minimum(np.nan_to_num(losses.astype(np.float64), nan=10.0, posinf=10.0), 10.0)
        final = tame[..., -20:].mean(axis=-1)
        best = final.mean(axis=-1).argmin(axis=-1)
        rows = np.arange(len(best))
        window = np.lib.stride_tricks.sliding_window_view(tame[rows, best], 10, axis=-1).mean(axis=-1)
        reached = window < GUESS / 2
        steps = np.where(reached.any(axis=-1), reached.argmax(axis=-1) + 10, losses.shape[-1])
        return Outcome(best, final[rows, best], steps)


def all_signals(keys: Iterable[Array], sizes: Sizes) -> dict[str, np.ndarray]:
    """`signals` of one net a key under all `settings()`, (seeds, settings, depth), and what the law predicts of each layer."""
    pairs = settings()
    which = jnp.asarray([list(ACTIVATIONS).index(activation) for activation, _ in pairs])
    factors = jnp.asarray([factor(*pair) for pair in pairs])
    drawn = [signals(key, which, factors, sizes=sizes) for key in keys]
    variance, slope = propagate(tuple(ACTIVATIONS.values()), which, factors, jnp.ones_like(factors), depth=sizes.depth + 1)
    return {
        "forward": np.stack([forward for forward, _ in drawn]),
        "backward": np.stack([backward for _, backward in drawn]),
        "predicted_forward": np.log(variance[:, 1:]),
        "predicted_backward": np.log(slope[:, 1:-1]),
    }


def all_losses(
    keys: Array,
    samples: Samples,
    pairs: list[tuple[str, str]],
    track: Callable[[list], Iterable] = list,
    *,
    depth: int,
    sizes: Sizes,
) -> np.ndarray:
    """Training losses of nets of one depth, one a key and learning rate, for pairs of activation and scheme.

    Args:
      keys: shape (seeds,).
      samples: to train on; features are centred and scaled to second moment 1.
      pairs: of activation and scheme.
      track: shows progress over a list.
      depth: of the nets.
      sizes: of the nets.

    Returns:
      Shape (pairs, rates, seeds, steps).
    """
    x = samples.features - samples.features.mean(axis=0)
    x, labels = jnp.asarray(x / np.sqrt(np.mean(x**2))), jnp.asarray(samples.labels)
    names = tuple(dict.fromkeys(activation for activation, _ in pairs))
    curves = []
    for pair in track(pairs):
        which, factors = jnp.asarray([names.index(pair[0])]), jnp.asarray([factor(*pair)])
        arguments = (keys, x, labels, which, factors, jnp.asarray(sizes.rates))
        curves.append(train(*arguments, names=names, depth=depth, steps=sizes.steps(depth), batch=sizes.batch_trained)[0])
    return np.stack(curves)
