"""Residual nets of equal blocks as one loop, each in the form that a scheme for depth asks for."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

Form = Literal["plain", "pre-norm", "deep-norm", "fixup", "complete-p"]


class Block(nn.Module):
    """One residual branch of two dense layers.

    Attributes:
      form: "plain": x + f(x). "pre-norm": x + f(norm x). "deep-norm": norm(α x + f(x)), α = (2 depth)^¼. "fixup":
        x + m f(x + b) + b', with scalars. "complete-p": x + f(norm x)/depth.
      width: of the stream; the branch has twice as much inside.
      depth: number of blocks.
    """

    form: Form
    width: int
    depth: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch width"], _: None = None) -> tuple[Array, Array]:
        h = nn.LayerNorm(name="norm")(x) if self.form in ("pre-norm", "complete-p") else x
        h = self._shifted(h, "before up")
        h = nn.Dense(2 * self.width, use_bias=False, name="up")(h)
        h = self._shifted(nn.relu(self._shifted(h, "before relu")), "before down")
        h = nn.Dense(self.width, use_bias=False, name="down")(h)
        if self.form == "fixup":
            h = self._shifted(h * self.param("multiplier", nn.initializers.ones, ()), "after down")
        if self.form == "complete-p":
            h = h / self.depth
        x = nn.LayerNorm(name="norm")((2 * self.depth) ** 0.25 * x + h) if self.form == "deep-norm" else x + h
        x = self.perturb("stream", x)
        return x, jnp.mean(jnp.square(x))

    def _shifted(self, x: Array, name: str) -> Array:
        """Plus a scalar bias, where the form has one."""
        return x + self.param(name.replace(" ", "_"), nn.initializers.zeros, ()) if self.form == "fixup" else x


class ResidualTower(nn.Module):
    """A dense layer, blocks, and a linear layer: the classes' logits, the stream's second moment by block, and the stream."""

    form: Form
    width: int
    depth: int
    classes: int = 10

    @nn.compact
    def __call__(self, x: Float[Array, "batch features"]) -> tuple[Array, Float[Array, " depth"], Array]:
        x = nn.Dense(self.width, use_bias=False, name="embed")(x)
        axes: Any = {"params": 0, "perturbations": 0}
        loop = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=self.depth)
        stream, squares = loop(self.form, self.width, self.depth, name="blocks")(x, None)
        x = nn.LayerNorm(name="norm")(stream) if self.form in ("pre-norm", "complete-p") else stream
        return nn.Dense(self.classes, use_bias=False, name="head")(x), squares, stream


def drawn(plan: Any, key: jax.Array) -> dict[str, Any]:
    """The parameters of a plan, as nested dicts: each leaf by its law, under jit and vmap too."""
    params: dict[str, Any] = {}
    for number, leaf in enumerate(plan):
        *modules, name = leaf.path.split("/")
        at = params
        for module in modules:
            at = at.setdefault(module, {})
        at[name] = leaf.law(jax.random.fold_in(key, number), leaf.shape, jnp.float32)
    return params
