"""Hypothesis strategies for the structure of a variance claim: shapes, axes, modes, laws, dtypes, activations,
initializers, layers.

They draw structure and nothing else. The key of a case follows from the case (`varscale.testing.draws.key_of`), so that a
case has one verdict, which shrinks and replays. Never draw a seed, and never `target()` a p-value: both search for
unlucky seeds, not for defects.

Sizes come from a few buckets, since XLA compiles once for each shape and compilation is what costs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from varscale.initializers import orthogonal, variance_scaling
from varscale.initializers.distributions import DISTRIBUTIONS
from varscale.initializers.fans import MODES
from varscale.testing.layer_cases import LayerCase

_SIZES = (1, 2, 8, 32, 128)
_ACTIVATIONS: tuple[Callable[[jax.Array], jax.Array], ...] = (
    jax.nn.relu, jnp.tanh, jax.nn.gelu, jax.nn.silu, jax.nn.elu, jax.nn.sigmoid, jax.nn.softplus,
    jax.nn.leaky_relu, jax.nn.hard_tanh,
)  # fmt: skip

Shape = tuple[int, ...]
ShapeKind = Literal["dense", "conv", "general", "any"]


@st.composite
def _shapes(draw: st.DrawFn, *parts: st.SearchStrategy[Iterable[int]]) -> Shape:
    """The parts joined. A composite prints as the tuple that it is, where `st.builds` and `map` print their calls."""
    return tuple(itertools.chain.from_iterable(draw(part) for part in parts))


def kernel_shapes(kind: ShapeKind = "any", *, most: int = 2**16) -> st.SearchStrategy[Shape]:
    """Kernel shapes in flax's layout.

    Args:
        kind: `"dense"`: (in, out); `"conv"`: one to three spatial axes, then (in, out); `"general"`: two to four axes of
            any role; `"any"`: all.
        most: how many weights a kernel may have.

    Raises:
        ValueError: unknown kind.
    """
    size = st.sampled_from(_SIZES)
    kinds = {
        "dense": st.tuples(size, size),
        "conv": _shapes(st.lists(st.sampled_from((1, 3)), min_size=1, max_size=3), st.tuples(size, size)),
        "general": _shapes(st.lists(st.sampled_from((1, 2, 4, 16)), min_size=2, max_size=4)),
    }
    if kind not in (*kinds, "any"):
        raise ValueError(f"kind must be one of {', '.join(map(repr, (*kinds, 'any')))}, not {kind!r}")
    chosen = st.one_of(*kinds.values()) if kind == "any" else kinds[kind]
    return chosen.filter(lambda shape: math.prod(shape) <= most)


@st.composite
def axes(draw: st.DrawFn, shape: Shape) -> dict[str, int | tuple[int, ...]]:
    """`in_axis`, `out_axis` and `batch_axis` for a shape of two axes or more: each axis in at most one role, counted
    from either end.
    """
    order = draw(st.permutations(range(len(shape))))
    signed = [axis - len(shape) if draw(st.booleans()) else axis for axis in order]
    ins, outs = draw(st.integers(1, len(shape) - 1)), 1
    batch = draw(st.integers(0, len(shape) - ins - outs))
    parts = tuple(signed[:ins]), tuple(signed[ins : ins + outs]), tuple(signed[ins + outs : ins + outs + batch])
    one_or_many = [part[0] if len(part) == 1 and draw(st.booleans()) else part for part in parts]
    return dict(zip(("in_axis", "out_axis", "batch_axis"), one_or_many, strict=True))


def modes() -> st.SearchStrategy[str]:
    """The four modes of `variance_scaling`."""
    return st.sampled_from(MODES)


def distributions() -> st.SearchStrategy[str]:
    """The names of the laws."""
    return st.sampled_from(tuple(DISTRIBUTIONS))


def dtypes(*, low_precision: bool = True, complex_numbers: bool = False) -> st.SearchStrategy[np.dtype]:
    """Dtypes of weights: float32, and on demand bfloat16, float16, two float8 formats, and complex64."""
    names: list[Any] = [jnp.float32]
    names += [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2] if low_precision else []
    names += [jnp.complex64] if complex_numbers else []
    return st.sampled_from([np.dtype(name) for name in names])


def activations() -> st.SearchStrategy[Callable[[jax.Array], jax.Array]]:
    """Activations of jax: kinked, smooth, bounded and one-sided."""
    return st.sampled_from(_ACTIVATIONS)


def initializers() -> st.SearchStrategy[Callable[..., jax.Array]]:
    """Initializers of this library whose variance follows from the fans, and orthogonal ones."""
    scaling = st.builds(variance_scaling, st.sampled_from((0.01, 1.0, 2.0)), modes(), distributions())
    return st.one_of(scaling, st.builds(orthogonal, st.sampled_from((0.5, 1.0, math.sqrt(2)))))


@st.composite
def layers(draw: st.DrawFn, kind: str | None = None) -> LayerCase:
    """Flax layers of both interfaces with inputs of a few hundred numbers.

    Args:
        draw: given by Hypothesis.
        kind: one of `Dense`, `DenseGeneral`, `Einsum`, `Conv`, `ConvTranspose`, `Attention`; None for any.
    """
    framework = draw(st.sampled_from(("linen", "nnx")))
    if kind is None:
        kind = draw(st.sampled_from(("Dense", "DenseGeneral", "Einsum", "Conv", "ConvTranspose", "Attention")))
    width, features = draw(st.sampled_from((4, 16, 64))), draw(st.sampled_from((4, 16, 64)))
    if kind == "Dense":
        shape, settings = (4, width), dict(features=features)
    elif kind == "DenseGeneral":
        batched = draw(st.booleans())
        shape = (4, 8, width)
        settings = dict(
            axis=(2,) if batched else (1, 2),
            batch_dims=(0,) if batched else (),
            features=draw(st.sampled_from(((features,), (2, features)))),
        )
    elif kind == "Einsum":
        spec, kernel = draw(
            st.sampled_from(
                (
                    ("abc,cde->abde", (width, 2, features)),
                    ("abc,bcd->abd", (8, width, features)),
                    ("abc,bcd->ad", (8, width, features)),
                )
            )
        )
        shape, settings = (4, 8, width), dict(einsum_str=spec, shape=kernel)
    elif kind == "Conv":
        spatial = draw(st.sampled_from((1, 2)))
        groups = draw(st.sampled_from((1, 2)))
        strides = draw(st.sampled_from((1, 2)))
        dilation = draw(st.sampled_from((1, 2))) if strides == 1 else 1
        shape = (2, *(8,) * spatial, min(width, 16))
        settings = dict(
            features=min(features, 16), kernel_size=(3,) * spatial, groups=groups, strides=strides, dilation=dilation,
            padding=draw(st.sampled_from(("SAME", "VALID"))),
        )  # fmt: skip
    elif kind == "ConvTranspose":
        shape = (2, 6, 6, min(width, 16))
        kernel_size = draw(st.sampled_from((2, 3)))
        settings = dict(
            features=min(features, 16), kernel_size=(kernel_size,) * 2, strides=draw(st.sampled_from(((1, 1), (2, 2)))),
            padding=draw(st.sampled_from(("SAME", "VALID"))),
        )  # fmt: skip
    elif kind == "Attention":
        shape, settings = (4, 3, width), dict(num_heads=draw(st.sampled_from((1, 2))))
    else:
        raise ValueError(f"kind must be None or the name of a layer, not {kind!r}")
    return LayerCase(framework, kind, shape, tuple(settings.items()))
