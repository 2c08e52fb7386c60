"""The net of the photographs, 5-5-1, trained by plain gradient descent: many draws, laws and activations in one program."""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float

import varscale as vs
from experiments.lab.training import fit
from varscale import gaussian

WIDTHS = (5, 5, 1)
ITERATIONS = 3000
LAWS: dict[str, Any] = {
    "zeros": vs.zeros,
    "normal ×10": vs.normal(10.0),
    "uniform ×10": vs.symmetric_uniform(10.0),
    "uniform ×17.3": vs.symmetric_uniform(10 * math.sqrt(3)),
    "He 2/n": vs.variance_scaling(2.0, "fan_in", "normal"),
    "Xavier 1/n": vs.variance_scaling(1.0, "fan_in", "normal"),
}
ACTIVATIONS = ("tanh", "ReLU")
MOST_WEIGHTS = 30_000_000  # of the nets that are held at once


class Net(nn.Module):
    """Layers of 5, 5 and 1 units, one column a sample as the source has them; `relu` chooses the hidden units' activation."""

    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "features samples"], relu: Any) -> Float[Array, " samples"]:
        for layer, width in enumerate(WIDTHS):
            shape = (x.shape[0], width)
            x = nn.Einsum(shape, "is,io->os", kernel_init=self.kernel_init, name=f"dense_{layer}")(x)
            if layer + 1 < len(WIDTHS):
                x = jnp.where(relu, jax.nn.relu(x), jnp.tanh(x))
        return x[0]


@functools.partial(jax.jit, static_argnames=("law", "features"))
def draw(keys: Array, *, law: str, features: int) -> Any:
    """The parameters of one net a key."""
    net = Net(LAWS[law])
    return jax.vmap(lambda key: net.init(key, jnp.zeros((features, 1)), False)["params"])(keys)


def draw_all(keys: Array, *, features: int) -> dict[str, Any]:
    """The nets of every law, one a key and the same keys for all; of zeros, one."""
    return {law: draw(keys[:1] if law == "zeros" else keys, law=law, features=features) for law in LAWS}


def logits(params: Any, x: Float[Array, "features samples"], relu: Any) -> Float[Array, " samples"]:
    """What the net says of each sample, before the sigmoid."""
    return jnp.asarray(Net(vs.zeros).apply({"params": params}, x, relu))


@dataclass(frozen=True, eq=False)
class Span:
    """The subspace that some images span.

    The gradient of the first kernel lies in it (it is x·gᵀ), so plain gradient descent never changes what is outside of it.
    Training in coordinates of the span is therefore the same descent with as many features as there are images: 150, in place
    of the 625 or 67,500 of the images.
    """

    basis: Float[np.ndarray, "features images"]

    @classmethod
    def of(cls, x: Float[np.ndarray, "features images"]) -> "Span":
        return cls(np.linalg.qr(x.astype(np.float64))[0].astype(np.float32))

    def enter(self, params: Any) -> Any:
        """The parameters in the span's coordinates; a leading axis of runs."""
        kernel = jnp.einsum("fi,rfo->rio", self.basis, params["dense_0"]["kernel"])
        return params | {"dense_0": params["dense_0"] | {"kernel": kernel}}

    def leave(self, trained: Any, start: Any) -> Any:
        """The whole parameters after training, from those in the span and those before."""
        moved = trained["dense_0"]["kernel"] - self.enter(start)["dense_0"]["kernel"]
        kernel = start["dense_0"]["kernel"] + jnp.einsum("fi,rio->rfo", self.basis, moved)
        return trained | {"dense_0": trained["dense_0"] | {"kernel": kernel}}


@functools.partial(jax.jit, static_argnames=("iterations",))
def train(params, relu, weights, rate, x, labels, *, iterations: int = ITERATIONS):
    """Gradient descent on all samples at once, for many nets at once.

    Args:
      params: of the nets, a leading axis of runs.
      relu: whether each has ReLUs (or else tanh), shape (runs,).
      weights: of the samples in each run's loss, shape (runs, samples), of sum 1.
      rate: the learning rate.
      x: the samples, shape (features, samples).
      labels: 0 or 1, shape (samples,).
      iterations: how many steps.

    Returns:
      The parameters after the last step, and the cost before each: (runs, iterations).
    """

    def one(params, relu, weights):
        def loss(params, _):
            return jnp.sum(weights * optax.sigmoid_binary_cross_entropy(logits(params, x, relu), labels))

        return fit(loss, optax.sgd(rate), params, jnp.arange(iterations))

    return jax.vmap(one)(params, relu, weights)


@jax.jit
def errors(params, relu, x, labels):
    """The share of samples each net gets wrong, shape (runs,)."""
    said = jax.vmap(lambda params, relu: logits(params, x, relu))(params, relu) > 0
    return jnp.mean((said != (labels > 0)[None]).astype(jnp.float32), axis=1)


@jax.jit
def start(params, relu, x, labels):
    """Of each net before training: the second moment of its logits, its cost, and whether it says the same of all samples."""

    def one(params):
        y = logits(params, x, relu)
        return jnp.mean(y**2), optax.sigmoid_binary_cross_entropy(y, labels).mean(), jnp.ptp(y) == 0

    return jax.vmap(one)(params)


def starts(
    keys: Array,
    x: Float[np.ndarray, "features samples"],
    labels: Float[np.ndarray, " samples"],
    track: Callable[[list], Iterable] = list,
) -> dict[str, np.ndarray]:
    """`start` of one net a key, for every law but zeros and both activations: each array has shape (laws, 2, keys).

    Args:
      keys: shape (draws,).
      x: the samples.
      labels: 0 or 1.
      track: shows progress over a list.
    """
    size = min(len(keys), max(1, MOST_WEIGHTS // (len(x) * WIDTHS[0])))
    # Pieces of one size, which are one program; the last overlaps the one before where the size does not divide.
    begins = [min(begin, len(keys) - size) for begin in range(0, len(keys), size)]
    laws = [law for law in LAWS if law != "zeros"]
    names = ("second_moment", "cost", "dead")
    found = {name: np.zeros((len(laws), 2, len(keys))) for name in names}
    for row, begin in track([(row, begin) for row in range(len(laws)) for begin in begins]):
        part = slice(begin, begin + size)
        nets = draw(keys[part], law=laws[row], features=len(x))
        for relu in (0, 1):
            for name, values in zip(names, start(nets, bool(relu), x, labels), strict=True):
                found[name][row, relu, part] = values
    return found


def predictions(x: Float[np.ndarray, "features samples"]) -> Float[np.ndarray, "laws 2"]:
    """`predicted` for every law but zeros and both activations."""
    return np.array([[predicted(law, relu, x) for relu in (False, True)] for law in LAWS if law != "zeros"])


def rows(seeds: int) -> list[tuple[str, int, int]]:
    """(law, relu, seed) of every run; zeros have no seeds."""
    return [(law, relu, seed) for law in LAWS for relu in (0, 1) for seed in range(1 if law == "zeros" else seeds)]


def seeds_of(part: dict[str, np.ndarray]) -> int:
    """How many seeds a part was run with: two runs of zeros, two of unequal classes, the rest by law and activation."""
    return (len(part["cost"]) - 4) // (2 * (len(LAWS) - 1))


def predicted(law: str, relu: bool, x: np.ndarray) -> float:
    """The second moment of the logits that the law gives: n·Var[w]·E[x²] through two activations, over the images' mean."""
    activation: Callable = jax.nn.relu if relu else jnp.tanh

    def variance(fan_in: int) -> float:
        return {"He 2/n": 2 / fan_in, "Xavier 1/n": 1 / fan_in, "uniform ×10": 100 / 3, "zeros": 0.0}.get(law, 100.0)

    moments = [variance(len(image)) * float(np.sum(image**2)) for image in x.T.astype(np.float64)]
    for fan_in in WIDTHS[:-1]:
        moments = [variance(fan_in) * fan_in * float(gaussian.second_moment(activation, variance=q)) for q in moments]
    return float(np.mean(moments))
