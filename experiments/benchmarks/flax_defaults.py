"""Claim: as they come, these layers of flax miss E[y²] = E[x²] at their own scale of 1; with the fans of use they keep it.

    python -m experiments.benchmarks.flax_defaults

Each layer is initialized 64 times and applied to standard normal inputs; the table shows the mean of E[y²]/E[x²] with its
standard error, for flax's default and for this library's initializer in its place.
"""

from __future__ import annotations

from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from rich.console import Console
from rich.table import Table

import varscale as vs
from varscale.initializers import Initializer

NETS = 64
HE = nnx.initializers.he_normal()
Layer = Callable[[dict[str, Initializer]], Callable[[jax.Array, jax.Array], jax.Array]]


def _linen(make: Callable[..., linen.Module]) -> Layer:
    return lambda init: lambda key, x: make(**init).init_with_output(key, x)[0]  # pyright: ignore[reportReturnType]


def _nnx(make: Callable[..., nnx.Module]) -> Layer:
    return lambda init: lambda key, x: make(rngs=nnx.Rngs(params=key), **init)(x)  # pyright: ignore[reportCallIssue]


def _recurrent(cell: type[nnx.Module], blocks: int) -> Layer:
    """The recurrent map alone: what a gate sees of the hidden state, through one block of the packed kernel."""

    def layer(init: dict[str, Initializer]) -> Callable[[jax.Array, jax.Array], jax.Array]:
        def apply(key: jax.Array, h: jax.Array) -> jax.Array:
            kernel = cell(h.shape[-1], h.shape[-1], rngs=nnx.Rngs(params=key), **init).dense_h.kernel[...]  # pyright: ignore
            return h @ kernel[:, : kernel.shape[1] // blocks]

        return apply

    return layer


ROWS: list[tuple[str, Layer, tuple[int, ...], dict[str, Initializer]]] = [
    (
        "linen DenseGeneral(batch_dims=0), 8 heads",
        _linen(lambda **k: linen.DenseGeneral(64, axis=-1, batch_dims=(0,), **k)),
        (8, 16, 64),
        {"kernel_init": vs.variance_scaling(fans=vs.einsum_fans("hni,hio->hno", (8, 64, 64)))},
    ),
    (
        "nnx LinearGeneral(batch_axis={0: 8})",
        _nnx(lambda rngs, **k: nnx.LinearGeneral(64, 64, batch_axis={0: 8}, rngs=rngs, **k)),
        (8, 16, 64),
        {"kernel_init": vs.variance_scaling(fans=vs.einsum_fans("hni,hio->hno", (8, 64, 64)))},
    ),
    (
        'nnx Einsum("abc,cde->abde"), 8 heads',
        _nnx(lambda rngs, **k: nnx.Einsum("abc,cde->abde", (64, 8, 8), rngs=rngs, **k)),
        (4, 16, 64),
        {"kernel_init": vs.variance_scaling(fans=vs.einsum_fans("abc,cde->abde", (64, 8, 8)))},
    ),
    (
        "linen ConvTranspose 4x4, stride 2",
        _linen(lambda **k: linen.ConvTranspose(32, (4, 4), strides=(2, 2), **k)),
        (4, 16, 16, 32),
        {
            "kernel_init": vs.variance_scaling(
                fans=vs.conv_fans((4, 4, 32, 32), strides=2, padding="SAME", input_size=16, transposed=True)
            )
        },
    ),
    (
        "linen ConvLocal 3x3 on 14x14 (VALID)",
        _linen(lambda **k: linen.ConvLocal(16, (3, 3), padding="VALID", **k)),
        (4, 14, 14, 16),
        {"kernel_init": vs.lecun_normal(batch_axis=(0, 1))},
    ),
    (
        "nnx Conv 7x7 SAME on 8x8",
        _nnx(lambda rngs, **k: nnx.Conv(16, 16, (7, 7), rngs=rngs, **k)),
        (4, 8, 8, 16),
        {"kernel_init": vs.variance_scaling(fans=vs.conv_fans((7, 7, 16, 16), padding="SAME", input_size=8))},
    ),
    (
        "nnx OptimizedLSTMCell, recurrent kernel, a gate",
        _recurrent(nnx.OptimizedLSTMCell, 4),
        (16, 64),
        {"recurrent_kernel_init": vs.fused(vs.orthogonal(), 4)},
    ),
    (
        "nnx GRUCell, recurrent kernel, a gate",
        _recurrent(nnx.GRUCell, 3),
        (16, 64),
        {"recurrent_kernel_init": vs.fused(vs.orthogonal(), 3)},
    ),
    (
        "nnx Linear 4096 wide, he_normal in bfloat16, after a ReLU",
        _nnx(lambda rngs, kernel_init=HE, **k: nnx.Linear(4096, 64, kernel_init=kernel_init, rngs=rngs, **k)),
        (16, 4096),
        {"kernel_init": vs.he_normal()},
    ),
]


def _ratio(layer: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array) -> tuple[float, float]:
    @jax.jit
    def one(key: jax.Array) -> jax.Array:
        return (layer(key, x).astype(jnp.float32) ** 2).mean() / (x.astype(jnp.float32) ** 2).mean()

    ratios = np.asarray([one(key) for key in jax.random.split(jax.random.key(1), NETS)], np.float64)
    return float(ratios.mean()), float(ratios.std(ddof=1) / np.sqrt(NETS))


def main() -> None:
    """Measures and prints."""
    table = Table(title=f"E\\[y²]/E\\[x²] over {NETS} draws, flax {flax.__version__}. It should be 1 (last row: 2)")
    for column in ("layer", "flax's default", "with varscale"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for name, layer, shape, init in ROWS:
        x = jax.random.normal(jax.random.key(0), shape)
        if "bfloat16" in name:
            x = jax.nn.relu(x).astype(jnp.bfloat16)
            init = init | {"param_dtype": jnp.bfloat16, "dtype": jnp.float32}
            theirs = {"param_dtype": jnp.bfloat16, "dtype": jnp.float32}
        else:
            theirs = {}
        cells = [f"{mean:.3f} ± {error:.3f}" for mean, error in (_ratio(layer(theirs), x), _ratio(layer(init), x))]  # pyright: ignore
        table.add_row(name, *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
