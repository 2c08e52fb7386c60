"""Three ways to pretrain, each a loss over a batch: with labels, from what is masked, and from two views of one picture.

Each is a function of the network's outputs, so that all share one training step (`experiments.lab.training.fit`).
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


def supervised(logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Float[Array, ""]:
    """Mean cross-entropy, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def masked(
    key: jax.Array, images: Float[Array, "batch pixels"], share: float
) -> tuple[Float[Array, "batch pixels"], Bool[Array, "batch pixels"]]:
    """The images with a share of their pixels set to zero, and which they are."""
    hidden = jax.random.bernoulli(key, share, images.shape)
    return jnp.where(hidden, 0.0, images), hidden


def reconstruction(
    decoded: Float[Array, "batch pixels"], images: Float[Array, "batch pixels"], hidden: Bool[Array, "batch pixels"]
) -> Float[Array, ""]:
    """Mean squared error over the pixels that were hidden (Pathak et al. 2016; He et al. 2022)."""
    weight = hidden.astype(images.dtype)
    return jnp.sum(weight * (decoded - images) ** 2) / jnp.maximum(weight.sum(), 1.0)


def nt_xent(
    first: Float[Array, "batch features"], second: Float[Array, "batch features"], temperature: float = 0.2
) -> Float[Array, ""]:
    """Cross-entropy of finding a picture's other view among all other views of the batch.

    Chen et al. 2020 (SimCLR), equation 1.

    Args:
      first: one view of each picture; rows are normalized here.
      second: the other view, in the same order.
      temperature: that the cosines are divided by.
    """
    views = jnp.concatenate([first, second])
    views = views * jax.lax.rsqrt(jnp.sum(views**2, axis=1, keepdims=True) + 1e-12)
    count = len(first)
    itself = jnp.eye(2 * count, dtype=bool)
    similarity = jnp.where(itself, -jnp.inf, views @ views.T / temperature)
    other = jnp.concatenate([jnp.arange(count, 2 * count), jnp.arange(count)])
    return supervised(similarity, other)


def placed(key: jax.Array, images: Float[Array, "batch pixels"], side: int, canvas: int) -> Float[Array, "batch canvas"]:
    """Each picture somewhere on a larger, empty one: where is drawn, every place alike.

    Args:
      key: of the places.
      images: squares of `side` pixels, one row a picture.
      side: of the pictures.
      canvas: the side of the larger squares.
    """
    corners = jax.random.randint(key, (len(images), 2), 0, canvas - side + 1)
    index = jnp.arange(canvas).reshape(1, -1, 1) - jnp.arange(side).reshape(1, 1, -1)
    rows, columns = ((index == corners[:, i].reshape(-1, 1, 1)).astype(images.dtype) for i in (0, 1))
    return jnp.einsum("bRr,brc,bCc->bRC", rows, images.reshape(-1, side, side), columns).reshape(len(images), -1)
