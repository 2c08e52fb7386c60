"""The networks of the experiments: plain stacks of dense layers, which is where the law is seen best."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

Activation = Callable[[Array], Array]


class Stack(nn.Module):
    """Dense layers, each followed by its activation.

    A layer's pre-activation and activation can be seen with `capture` and its gradient with `flax.linen.Module.perturb`'s
    collection ("perturbations", one entry `preactivation_<layer>` a layer).

    Attributes:
      widths: the features of each layer.
      activation: applied after each.
      kernel_init: of every kernel; variances that are arguments of a compiled program are set with `rescale`.
      use_bias: whether the layers have biases (zero at the start).
      norm: makes the normalization between the dense layer and the activation, if there is one.
    """

    widths: tuple[int, ...]
    activation: Activation
    kernel_init: jax.nn.initializers.Initializer = jax.nn.initializers.lecun_normal()
    use_bias: bool = False
    norm: Callable[[], Callable[[Array], Array]] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch features"]) -> Float[Array, "batch width"]:
        for layer, width in enumerate(self.widths):
            x = nn.Dense(width, use_bias=self.use_bias, kernel_init=self.kernel_init, name=f"dense_{layer}")(x)
            if self.norm is not None:
                x = self.norm()(x)
            x = self.perturb(f"preactivation_{layer}", x)
            x = self.activation(x)
            self.sow("intermediates", f"activation_{layer}", x)
        return x


class Classifier(nn.Module):
    """A stack and a linear layer that reads the classes' logits off it."""

    stack: Stack
    classes: int
    kernel_init: jax.nn.initializers.Initializer = jax.nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "batch features"]) -> Float[Array, "batch classes"]:
        return nn.Dense(self.classes, kernel_init=self.kernel_init, name="head")(self.stack(x))


def activations(model: nn.Module, variables: Any, x: Array) -> list[Any]:
    """What each layer of a `Stack` puts out, first layer first."""
    sown = model.apply(variables, x, mutable=["intermediates"])[1]["intermediates"]
    return [sown[f"activation_{layer}"][0] for layer in range(len(sown))]


def rescale(params: Any, factor: Any) -> Any:
    """Every kernel times `factor`, a number or an array that may be traced: so that one compiled program serves all scales."""
    return jax.tree.map_with_path(lambda path, leaf: leaf * factor if _is_kernel(path) else leaf, params)


def _is_kernel(path) -> bool:
    return jax.tree_util.keystr(path[-1:], simple=True) == "kernel"


def leaky_relu(x: Array) -> Array:
    """The leaky ReLU with the slope .01 that every framework defaults to."""
    return jnp.where(x >= 0, x, 0.01 * x)
