"""What a region computes, compiled: once for all that compute the same."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varscale.theory.rules.region_sizes import Sizes, run


@dataclasses.dataclass(frozen=True)
class Program:
    """What a region computes; equal where the same equations do it at the same sizes: equal layers are compiled once.

    Attributes:
        jaxpr: its equations, closed.
        sizes: at which sizes they are run.
        shapes: the sizes that are made smaller, and how small.
        written: the equations, and the numbers in them.
        weights: which operands are independent zero-mean weights.
        floating: which operands gradients flow into.
    """

    jaxpr: Any = dataclasses.field(compare=False)
    sizes: Sizes = dataclasses.field(compare=False)
    shapes: tuple[tuple[int, int], ...]
    written: str
    weights: tuple[bool, ...]
    floating: tuple[int, ...]

    def run(self, *operands: Any) -> list[jax.Array]:
        """One run: every output at the smaller sizes, the parts of complex ones in succession."""
        out = run(self.jaxpr.jaxpr, self.jaxpr.consts, operands, self.weights, self.sizes)
        return [part for x in out for part in _real_arrays(x)]

    def back(self, which: int, operands: Sequence[Any], seed: jax.Array) -> Any:
        """Cotangents of the floating operands, given those of one output."""

        def f(*xs: jax.Array) -> jax.Array:
            whole = list(operands)
            for i, x in zip(self.floating, xs, strict=True):
                whole[i] = x
            return self.run(*whole)[which]

        out, pull = jax.vjp(f, *[operands[i] for i in self.floating])
        return pull(seed.astype(out.dtype))


@functools.partial(jax.jit, static_argnums=0)
def run_all(program: Program, operands: list[Any]) -> list[jax.Array]:
    """Its outputs on some draws of its operands."""
    return jax.vmap(lambda xs: program.run(*xs))(operands)


@functools.partial(jax.jit, static_argnums=(0, 1))
def back_all(program: Program, which: int, operands: list[Any], seed: jax.Array) -> Any:
    """Cotangents of its floating operands, draw by draw, given those of one output."""
    return jax.vmap(lambda xs, g: program.back(which, xs, g))(operands, seed)


def written(jaxpr: Any) -> str:
    """Equations, and the numbers in them."""
    digests = [
        hashlib.sha1(np.asarray(x).tobytes()).hexdigest() for x in jaxpr.consts if not _is_key_array(x)
    ]
    keys = [jax.random.key_data(x).tolist() for x in jaxpr.consts if _is_key_array(x)]
    return f"{digests} {keys} {jaxpr.jaxpr}"


def _is_key_array(x: Any) -> bool:
    return jnp.issubdtype(getattr(x, "dtype", np.dtype(float)), jax.dtypes.prng_key)


def _real_arrays(x: jax.Array) -> tuple[jax.Array, ...]:
    """An output as real arrays; of a random key nothing is told."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return (jnp.zeros(()),)
    return (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
