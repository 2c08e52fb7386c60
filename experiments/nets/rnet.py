"""R-Net of MTCNN, a small network that tells faces from the rest, with the weights its authors trained.

K. Zhang et al. 2016, "Joint face detection and alignment using multitask cascaded convolutional networks". The weights are
those of the package mtcnn 1.0.0 (MIT licence; `weights/README.md`), converted once by `experiments.nets.convert_rnet`.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float

import varscale as vs
from varscale import transfer

FOLDER = Path(__file__).parents[1] / "weights"
WEIGHTS = FOLDER / "rnet.safetensors"
OUTPUTS = FOLDER / "rnet_outputs.safetensors"


class PReLU(nnx.Module):
    """A leaky ReLU whose slope is learned, one a channel (He et al. 2015); 0.25 at the start, as there."""

    def __init__(self, channels: int):
        self.negative_slope = nnx.Param(jnp.full((channels,), 0.25))

    def __call__(self, x: Float[Array, "... channels"]) -> Float[Array, "... channels"]:
        slope = jnp.broadcast_to(self.negative_slope[...], x.shape)
        return jnp.where(x >= 0, x, slope * x)


class RNet(nnx.Module):
    """24x24 pictures in three colours to a box's offsets and the logits of (no face, face)."""

    def __init__(self, *, rngs: nnx.Rngs):
        def conv(features_in: int, features: int, size: int) -> nnx.Conv:
            return nnx.Conv(features_in, features, (size, size), padding="VALID", kernel_init=vs.he_normal(), rngs=rngs)

        self.conv1, self.prelu1 = conv(3, 28, 3), PReLU(28)
        self.conv2, self.prelu2 = conv(28, 48, 3), PReLU(48)
        self.conv3, self.prelu3 = conv(48, 64, 2), PReLU(64)
        self.fc4, self.prelu4 = nnx.Linear(576, 128, kernel_init=vs.he_normal(), rngs=rngs), PReLU(128)
        self.box = nnx.Linear(128, 4, rngs=rngs)
        self.face = nnx.Linear(128, 2, rngs=rngs)

    def __call__(self, x: Float[Array, "batch 24 24 3"]) -> tuple[Float[Array, "batch 4"], Float[Array, "batch 2"]]:
        x = nnx.max_pool(self.prelu1(self.conv1(x)), (3, 3), strides=(2, 2), padding="SAME")
        x = nnx.max_pool(self.prelu2(self.conv2(x)), (3, 3), strides=(2, 2), padding="VALID")
        x = self.prelu3(self.conv3(x))
        x = self.prelu4(self.fc4(x.reshape(len(x), -1)))
        return self.box(x), self.face(x)


def pretrained(model: RNet, **options: Any) -> tuple[RNet, transfer.Account]:
    """The model with the trained weights; `options` go to `varscale.transfer.graft`.

    The original counts the last map's columns before its rows when it flattens it, and this model its rows before its columns.
    """
    return transfer.graft(
        model,
        transfer.load(WEIGHTS),
        layout="keras",
        rename={"fc5-1": "box", "fc5-2": "face"},
        rearrange=transfer.Permute("fc4/kernel", axis=0, shape=(3, 3, 64), order=(1, 0, 2)),
        **options,
    )


def prepared(features: Float[ArrayLike, "batch 625"]) -> Float[Array, "batch 24 24 3"]:
    """Grey pictures of 25x25 pixels in [0, 1] as the network was trained on them: 24x24, three colours, −1 to 1."""
    grey = jnp.asarray(features).reshape(-1, 25, 25)[:, :24, :24]
    return jnp.repeat((grey[..., None] * 255 - 127.5) / 128, 3, axis=-1)


def patterns() -> Float[Array, "8 24 24 3"]:
    """Pictures that need no package, of integers and so the same everywhere."""
    index = jnp.arange(8 * 24 * 24 * 3, dtype=jnp.int32)
    return (((index * index) % 65521 * 31 + index) % 256).reshape(8, 24, 24, 3).astype(jnp.float32) / 128 - 127.5 / 128


def probabilities(logits: Float[Array, "batch 2"]) -> Float[Array, "batch 2"]:
    """What the original puts out in place of logits."""
    return jax.nn.softmax(logits, axis=-1)
