"""The networks of the experiments: plain stacks of dense layers, which is where the law is seen best."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

import varscale as vs

Activation = Callable[[Array], Array]
Norm = Callable[[], Callable[[Array], Array]]


class Stack(nn.Module):
    """Dense layers, each followed by its activation.

    Activations are sown (`activations` reads them).

    Attributes:
      widths: the features of each layer.
      activation: applied after each.
      kernel_init: of every kernel; variances that are arguments of a compiled program are set with `rescale`.
      use_bias: whether the layers have biases (zero at the start).
    """

    widths: tuple[int, ...]
    activation: Activation
    kernel_init: vs.initializers.Initializer = vs.lecun_normal()
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch features"]) -> Float[Array, "batch width"]:
        for layer, width in enumerate(self.widths):
            x = nn.Dense(width, use_bias=self.use_bias, kernel_init=self.kernel_init, name=f"dense_{layer}")(x)
            x = self.activation(x)
            self.sow("intermediates", f"activation_{layer}", x)
        return x


class _Layer(nn.Module):
    """One layer of a `Tower`."""

    width: int
    activation: Activation
    kernel_init: vs.initializers.Initializer
    use_bias: bool
    norm: Norm | None

    @nn.compact
    def __call__(self, x: Float[Array, "batch width"]) -> tuple[Float[Array, "batch width"], None]:
        y = nn.Dense(self.width, use_bias=self.use_bias, kernel_init=self.kernel_init, name="dense")(x)
        y = self.perturb("preactivation", y)
        if self.norm is not None:
            y = self.norm()(y)
        self.sow("intermediates", "preactivation", y)
        return self.activation(y), None


class Tower(nn.Module):
    """Equal layers as one loop: it compiles in the time of one layer, however deep it is.

    Its parameters, its running averages, and what it sows and perturbs have a leading axis of layers. Sown as "preactivation"
    is what the activation is applied to; perturbed under that name is what the dense layer puts out.

    Attributes:
      width: features of every layer, the input's included.
      depth: number of layers.
      activation: applied after each.
      kernel_init: of every kernel.
      use_bias: whether the layers have biases (zero at the start).
      norm: makes the normalization between the dense layer and the activation, if there is one.
    """

    width: int
    depth: int
    activation: Activation
    kernel_init: vs.initializers.Initializer = vs.lecun_normal()
    use_bias: bool = False
    norm: Norm | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch width"]:
        axes: Any = {"params": 0, "batch_stats": 0, "perturbations": 0, "intermediates": 0}
        loop = nn.scan(_Layer, variable_axes=axes, split_rngs={"params": True}, length=self.depth)
        return loop(self.width, self.activation, self.kernel_init, self.use_bias, self.norm, name="layers")(x)[0]


class Classifier(nn.Module):
    """A `Stack` or a `Tower`, and a linear layer that reads the classes' logits off it."""

    stack: nn.Module
    classes: int
    kernel_init: vs.initializers.Initializer = vs.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "batch features"]) -> Float[Array, "batch classes"]:
        return nn.Dense(self.classes, kernel_init=self.kernel_init, name="head")(self.stack(x))


def activations(stack: Stack, variables: Any, x: Array) -> list[Array]:
    """What each layer puts out, first layer first."""
    sown: Any = stack.apply(variables, x, mutable=["intermediates"])[1]["intermediates"]
    return [sown[f"activation_{layer}"][0] for layer in range(len(stack.widths))]


def rescale(params: Any, factor: Any) -> Any:
    """Every kernel times `factor`, a number or an array that may be traced: so that one compiled program serves all scales."""
    return jax.tree.map_with_path(lambda path, leaf: leaf * factor if _is_kernel(path) else leaf, params)


def _is_kernel(path) -> bool:
    return jax.tree_util.keystr(path[-1:], simple=True) == "kernel"


def leaky_relu(x: Array) -> Array:
    """The leaky ReLU with the slope .01 that every framework defaults to."""
    return jnp.where(x >= 0, x, 0.01 * x)
