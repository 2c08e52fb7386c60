"""Small flax layers with what the law needs to know of each: its input's shape and the fans of its use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from flax import linen, nnx

from varscale.initializers.fans import Fans, conv_fans, einsum_fans

Framework = Literal["linen", "nnx"]
Kind = Literal["Dense", "DenseGeneral", "Einsum", "Conv", "ConvTranspose", "Attention"]


@dataclass(frozen=True)
class LayerCase:
    """A layer without bias, to be built with any `kernel_init`.

    Attributes:
        framework: `"linen"` or `"nnx"`.
        kind: the layer, by linen's name; nnx's `Linear`, `LinearGeneral` and `MultiHeadAttention` go by it too.
        input_shape: a batch of inputs.
        settings: its remaining arguments, as pairs.
    """

    framework: Framework
    kind: Kind
    input_shape: tuple[int, ...]
    settings: tuple[tuple[str, Any], ...]

    @property
    def depth(self) -> int:
        """How many kernels the signal passes: 1, but 2 in attention.

        On equal tokens attention mixes equal values, whatever its weights: it is its value projection, then its output
        projection.
        """
        return 2 if self.kind == "Attention" else 1

    @property
    def fans(self) -> Fans:
        """Fans of use, borders, strides and groups counted; of attention, those of each of the two projections."""
        arguments = dict(self.settings)
        match self.kind:
            case "Dense":
                return Fans(self.input_shape[-1], arguments["features"])
            case "DenseGeneral":
                return Fans(
                    int(np.prod([self.input_shape[axis] for axis in arguments["axis"]])), int(np.prod(arguments["features"]))
                )
            case "Einsum":
                return einsum_fans(arguments["einsum_str"], arguments["shape"])
            case "Conv":
                groups = arguments["groups"]
                kernel = (*arguments["kernel_size"], self.input_shape[-1] // groups, arguments["features"])
                use = {name: arguments[name] for name in ("groups", "strides", "dilation", "padding")}
                return conv_fans(kernel, **use, input_size=self.input_shape[1:-1])
            case "ConvTranspose":
                kernel = (*arguments["kernel_size"], self.input_shape[-1], arguments["features"])
                use = {name: arguments[name] for name in ("strides", "padding")}
                return conv_fans(kernel, **use, input_size=self.input_shape[1:-1], transposed=True)
            case "Attention":
                return Fans(self.input_shape[-1], self.input_shape[-1])

    def build(self, kernel_init: Callable[..., jax.Array]) -> Any:
        """The layer: a linen module, or an nnx factory `lambda rngs: ...`."""
        arguments = dict(self.settings)
        return (_linen if self.framework == "linen" else _nnx)(self.kind, arguments, self.input_shape, kernel_init)


def _linen(kind: Kind, arguments: dict[str, Any], input_shape: tuple[int, ...], init: Callable[..., jax.Array]) -> linen.Module:
    common: dict[str, Any] = dict(kernel_init=init, use_bias=False)
    match kind:
        case "Dense":
            return linen.Dense(arguments["features"], **common)
        case "DenseGeneral":
            return linen.DenseGeneral(
                arguments["features"], axis=arguments["axis"], batch_dims=arguments["batch_dims"], **common
            )
        case "Einsum":
            return linen.Einsum(arguments["shape"], arguments["einsum_str"], **common)
        case "Conv":
            return linen.Conv(
                arguments["features"], arguments["kernel_size"], arguments["strides"], padding=arguments["padding"],
                kernel_dilation=arguments["dilation"], feature_group_count=arguments["groups"], **common,
            )  # fmt: skip
        case "ConvTranspose":
            return linen.ConvTranspose(
                arguments["features"], arguments["kernel_size"], arguments["strides"], padding=arguments["padding"], **common
            )
        case "Attention":
            return linen.MultiHeadDotProductAttention(arguments["num_heads"], **common)


def _nnx(
    kind: Kind, arguments: dict[str, Any], input_shape: tuple[int, ...], init: Callable[..., jax.Array]
) -> Callable[[nnx.Rngs], nnx.Module]:
    common: dict[str, Any] = dict(kernel_init=init, use_bias=False)
    features = input_shape[-1]
    match kind:
        case "Dense":
            return lambda rngs: nnx.Linear(features, arguments["features"], **common, rngs=rngs)
        case "DenseGeneral":
            batch = {axis: input_shape[axis] for axis in arguments["batch_dims"]}
            contracted = tuple(input_shape[axis] for axis in arguments["axis"])
            return lambda rngs: nnx.LinearGeneral(
                contracted, arguments["features"], axis=arguments["axis"], batch_axis=batch, **common, rngs=rngs
            )
        case "Einsum":
            return lambda rngs: nnx.Einsum(arguments["einsum_str"], arguments["shape"], kernel_init=init, rngs=rngs)
        case "Conv":
            return lambda rngs: nnx.Conv(
                features, arguments["features"], arguments["kernel_size"], arguments["strides"], padding=arguments["padding"],
                kernel_dilation=arguments["dilation"], feature_group_count=arguments["groups"], **common, rngs=rngs,
            )  # fmt: skip
        case "ConvTranspose":
            return lambda rngs: nnx.ConvTranspose(
                features, arguments["features"], arguments["kernel_size"], arguments["strides"],
                padding=arguments["padding"], **common, rngs=rngs,
            )  # fmt: skip
        case "Attention":
            return lambda rngs: nnx.MultiHeadAttention(arguments["num_heads"], features, decode=False, **common, rngs=rngs)
