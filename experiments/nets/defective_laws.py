"""Small models whose laws are usual ones, but not those that are meant, and models with defects of scale."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import varscale as vs
from experiments.nets.defective_models import normal

BLOCKS, WIDTH = 4, 64
ENDS = 2 / (BLOCKS * WIDTH**0.5)  # the deviation of what ends a branch: GPT-J's and GPT-NeoX's "Wang" law
TOWER = {"**/down/kernel": vs.normal(ENDS)}
TOWER_CUT = {"**/down/kernel": vs.truncated_normal(ENDS)}


def cut_at(deviation: float, bound: float) -> Any:
    """A normal law cut at ±bound, as an absolute number."""
    reach = bound / deviation

    def init(key: Any, shape: Any, dtype: Any = jnp.float32) -> Any:
        drawn = jax.random.truncated_normal(key, -reach, reach, shape, dtype) * deviation
        return drawn * (1 if reach > 10 else 1 / 0.87962566)

    return init


class Tower(nn.Module):
    """Pre-norm blocks; the deviation of what ends them, or where its normal law is cut."""

    deviation: float = ENDS
    cut: float | None = None

    @nn.compact
    def __call__(self, x):
        down = normal(self.deviation) if self.cut is None else cut_at(self.deviation, self.cut)
        for i in range(BLOCKS):
            x = TowerBlock(down, name=f"block_{i}")(x)
        return nn.Dense(3)(nn.LayerNorm()(x))


class TowerBlock(nn.Module):
    down: Any

    @nn.compact
    def __call__(self, x):
        h = nn.gelu(nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH, kernel_init=self.down, name="down")(h)


def widened(factor: float, width: int = 128) -> nn.Module:
    """A net of four times the base's width, whose hidden kernel has its deviation times a factor; the base itself at 32."""
    hidden, last = (1.0, 1.0) if width == 32 else (factor, 0.25)
    kernels = [vs.lecun_normal(), normal(hidden / 32**0.5), normal(last / 32**0.5)]
    layers = [nn.Dense(n, kernel_init=k) for n, k in zip((width, width, 10), kernels, strict=True)]
    return nn.Sequential([layers[0], nn.relu, layers[1], nn.relu, layers[2]])


class DeepNet(nn.Module):
    """Post-norm feed-forward blocks after DeepNorm; a factor on the embedding, which is to have none."""

    factor: float
    blocks: int = 4

    @nn.compact
    def __call__(self, ids):
        beta, alpha = (8 * self.blocks) ** -0.25, (2 * self.blocks) ** 0.25
        x = nn.Embed(100, WIDTH, embedding_init=normal(self.factor / WIDTH**0.5), name="embed")(ids)
        branch = vs.scaled(vs.glorot_normal(), beta)
        for i in range(self.blocks):
            h = nn.Dense(WIDTH, kernel_init=branch, name=f"up_{i}")(x)
            x = nn.LayerNorm()(alpha * x + nn.Dense(WIDTH, kernel_init=branch, name=f"down_{i}")(nn.relu(h)))
        return nn.Dense(100, kernel_init=normal(WIDTH**-0.5), name="head")(x)


def recurrent(deviation: float) -> nn.Module:
    """A recurrent net of 64 units."""
    return nn.Sequential([nn.RNN(nn.SimpleCell(64, recurrent_kernel_init=normal(deviation))), nn.Dense(3)])


class Placed(nn.Module):
    """Tokens of deviation .02 and a table of positions."""

    deviation: float

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(100, 64, embedding_init=normal(0.02))(ids)
        x = x + self.param("positions", normal(self.deviation), (ids.shape[1], 64))
        for _ in range(2):
            x = x + nn.Dense(64, kernel_init=normal(0.02))(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x))))
        return nn.Dense(100)(nn.LayerNorm()(x))


class Normed(nn.Module):
    """Pre-norm blocks; the deviation of what ends them, times √fan-in."""

    last: float

    @nn.compact
    def __call__(self, x):
        for i in range(4):
            h = nn.gelu(nn.Dense(64)(nn.RMSNorm(name=f"norm_{i}")(x)))
            x = x + nn.Dense(x.shape[-1], kernel_init=vs.scaled(vs.lecun_normal(), self.last))(h)
        return nn.Dense(3)(nn.RMSNorm()(x))
