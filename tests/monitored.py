"""A training loop to be watched by `vs.Monitor`, and what its tests share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

X = jax.random.normal(jax.random.key(0), (16, 8))
Y = jnp.arange(16) % 4
BATCH = {"x": X, "y": Y}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="head")(nn.relu(nn.Dense(8, name="body")(x)))


NET = Net()
PARAMS = NET.init(jax.random.key(1), X)["params"]


ROWS = ["body", "head", ""]


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(state, batch, scale=1.0, *, negate=False):
    """The loop of flax's TrainState."""

    def loss(params):
        return cross_entropy(state.apply_fn({"params": params}, batch["x"]), batch["y"]) * scale

    value, gradients = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradients), -value if negate else value


def state(tx=None):
    return TrainState.create(apply_fn=NET.apply, params=jax.tree.map(jnp.copy, PARAMS), tx=tx or optax.sgd(1e-2, momentum=0.9))


def counted(function):
    """The function, and how often it was traced."""
    calls = []

    @functools.wraps(function)
    def traced(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return traced, calls


def equal(a, b, agree=np.array_equal):
    """Whether two trees agree, to the bit by default."""

    def array(x):
        return np.asarray(jax.random.key_data(x) if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key) else x)

    return all(agree(array(x), array(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def rounded(x, y):
    """Whether two float32 arrays differ by no more than another order of the same operations explains.

    The longest path of a step forward and back goes through three layers of sums over 8 features and 16 rows, and some twenty
    operations number by number: k = 2·3·(8 + 16) + 24 roundings, each of 2⁻²⁴. Where a sum cancels, its terms count: those of
    the gradients here, of a mean over 16 rows, are below .1.
    """
    bound = (2 * 3 * (8 + 16) + 24) * 2.0**-24
    return np.allclose(x, y, rtol=bound, atol=0.1 * bound)


class Sink:
    """What a sink is given."""

    def __init__(self):
        self.found = []

    def write_scalars(self, step, scalars):
        self.found.append((step, scalars))
