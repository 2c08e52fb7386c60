"""What experiment `pretraining` trains: one body, three ways to pretrain it, four to fine-tune it, all seeds at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int

import varscale as vs
from experiments.lab import objectives
from experiments.lab.data import Samples
from experiments.lab.training import fit, minibatches
from experiments.nets.stacks import Stack
from varscale import transfer
from varscale.transfer.rules import Rules

SIDE, CANVAS = 8, 12  # a digit of 8x8 pixels stands somewhere on an empty square of 12x12
CLASSES = 5  # digits 0 to 4 to pretrain with labels, 5 to 9 to fine-tune on
PIXELS = CANVAS * CANVAS
WIDTHS = (96, 96, 96)
BATCH = 25  # five classes of five labels: the smallest training set is one batch
PRETRAINING_BATCH = 64
MASKED = 0.5


class Net(nn.Module):
    """A body of three layers and what a task puts on it: hidden layers, if any, and a linear one.

    Attributes:
      widths: of the layers on the body, the outputs' last.
    """

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "batch pixels"]) -> Float[Array, "batch outputs"]:
        x = Stack(WIDTHS, jax.nn.relu, vs.he_normal(), use_bias=True, name="body")(x)
        for number, width in enumerate(self.widths[:-1]):
            x = jax.nn.relu(nn.Dense(width, kernel_init=vs.he_normal(), name=f"hidden_{number}")(x))
        return nn.Dense(self.widths[-1], kernel_init=vs.lecun_normal(), name="head")(x)


CLASSIFIER = Net((CLASSES,))
# Contrastive learning throws the layers behind the body away afterwards (Chen et al. 2020, section 2.1).
NETS = {"supervised": CLASSIFIER, "masked": Net((PIXELS,)), "contrastive": Net((64, 32))}

# Named after what people call them. The first layers are the body's; its last layer and the head make "the top".
WAYS: dict[str, Rules | None] = {
    "head only": transfer.head_only("head"),
    "body frozen, top trained": {"head": 1.0, "body/dense_2": 1.0, "**": "freeze"},
    "small rate for the body": {"head": 1.0, "body": 0.1},
    "one rate": None,
}
STARTS = ("random", "supervised", "masked", "contrastive")


def outputs(net: Net, params: Any, images: Float[Array, "batch pixels"]) -> Array:
    """What the net makes of the images."""
    made: Any = net.apply({"params": params}, images)
    return made


def random_start(key: jax.Array) -> Any:
    """The classifier's parameters as He et al. draw them."""
    return CLASSIFIER.init(key, jnp.zeros((1, PIXELS)))["params"]


@functools.partial(jax.jit, static_argnames=("start", "steps"))
def pretrain(
    keys: jax.Array,
    pictures: Float[Array, "samples pixels"],
    labels: Int[Array, " samples"],
    pool: Int[Array, "seeds pool"],
    start: str,
    steps: int,
) -> tuple[Any, Float[Array, "seeds steps"]]:
    """Pretrain one net a seed, and the loss before each step.

    Args:
      keys: one a seed.
      pictures: all of them.
      labels: all of them; only "supervised" looks at them.
      pool: the pictures that each seed may see.
      start: "supervised", "masked" or "contrastive".
      steps: of Adam, at a rate that falls from 3e-3 to 0 as a cosine does.
    """
    net = NETS[start]

    def loss(params: Any, batch: tuple[jax.Array, jax.Array]) -> Array:
        key, rows = batch
        first, second = jax.random.split(key)
        images = objectives.placed(first, pictures[rows], SIDE, CANVAS)
        if start == "supervised":
            return objectives.supervised(outputs(net, params, images), labels[rows])
        if start == "masked":
            seen, hidden = objectives.masked(second, images, MASKED)
            return objectives.reconstruction(outputs(net, params, seen), images, hidden)
        again = objectives.placed(second, pictures[rows], SIDE, CANVAS)
        return objectives.nt_xent(outputs(net, params, images), outputs(net, params, again))

    def one(key: jax.Array, pool: Int[Array, " pool"]) -> tuple[Any, Array]:
        draw, order, noise = jax.random.split(key, 3)
        params = net.init(draw, jnp.zeros((1, PIXELS)))["params"]
        batches = pool[minibatches(order, len(pool), PRETRAINING_BATCH, steps)]
        optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
        return fit(loss, optimizer, params, (jax.random.split(noise, steps), batches))

    return jax.vmap(one)(keys, pool)


@functools.partial(jax.jit, static_argnames=("way",))
def fine_tune(
    params: Any,
    pictures: Float[Array, "seeds samples pixels"],
    labels: Int[Array, " samples"],
    batches: Int[Array, "seeds steps batch"],
    test: Int[Array, "seeds test"],
    rate: Float[Array, ""],
    last: Int[Array, ""],
    way: str,
) -> tuple[Float[Array, "seeds steps"], Float[Array, " seeds"]]:
    """Fine-tune one net a seed: the loss before each step, and the accuracy on its test pictures after the last.

    Args:
      params: where to start, one net a seed.
      pictures: all of them, in the places where each seed sees them.
      labels: of all pictures.
      batches: the rows of each step.
      test: the rows to test on.
      rate: of Adam.
      last: the number of steps after which the rate is 0, so that one program shows the way at any step.
      way: to fine-tune.
    """
    rules = WAYS[way]

    def one(params: Any, pictures: Array, batches: Array, test: Array) -> tuple[Array, Array]:
        def loss(params: Any, rows: Int[Array, " batch"]) -> Array:
            return objectives.supervised(outputs(CLASSIFIER, params, pictures[rows]), labels[rows])

        optimizer = optax.adam(lambda step: jnp.where(step < last, rate, 0.0))
        params, losses = fit(loss, optimizer if rules is None else transfer.fine_tune(optimizer, rules), params, batches)
        guesses = jnp.argmax(outputs(CLASSIFIER, params, pictures[test]), axis=-1)
        return losses, jnp.mean((guesses == labels[test]).astype(jnp.float32))

    return jax.vmap(one)(params, pictures, batches, test)


def started(keys: jax.Array, body: Any) -> tuple[Any, transfer.Account | None]:
    """One classifier a seed with a fresh head on a pretrained body (or all random), and the account of what was moved."""
    params = jax.vmap(random_start)(keys)
    return (params, None) if body is None else transfer.graft(params, body, fresh=["head"], rename={"hidden_*": None})


def split(digits: Samples, seed: int, labels_a_class: tuple[int, ...]) -> tuple[dict[int, np.ndarray], np.ndarray, np.ndarray]:
    """One seed's pictures: those with labels by number a class (fewer are among more), the unlabelled pool, the test set."""
    rng = np.random.default_rng(seed)
    ours = [rng.permutation(np.flatnonzero(digits.labels == digit)) for digit in range(CLASSES, 2 * CLASSES)]
    half = [len(rows) // 2 for rows in ours]
    test = np.concatenate([rows[n:] for rows, n in zip(ours, half, strict=True)])
    unlabelled = np.concatenate([rows[:n] for rows, n in zip(ours, half, strict=True)])
    return {count: np.concatenate([rows[:count] for rows in ours]) for count in labels_a_class}, unlabelled, test
