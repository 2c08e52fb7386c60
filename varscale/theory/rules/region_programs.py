"""What a loop or a region computes, compiled: once for all that compute the same."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varscale import _compat
from varscale.theory.rules.region_sizes import Sizes, run


@dataclasses.dataclass(frozen=True)
class Program:
    """What a loop computes; equal where the same equations do it at the same sizes, so that equal layers are compiled once.

    Attributes:
        params: the equation's parameters.
        sizes: at which sizes it is run.
        shapes: the sizes that are made smaller, and how small.
        written: its equations.
        weights: which operands are independent zero-mean weights.
        floating: which operands gradients flow into.
    """

    params: dict[str, Any] = dataclasses.field(compare=False)
    sizes: Sizes = dataclasses.field(compare=False)
    shapes: tuple[tuple[int, int], ...]
    written: str
    weights: tuple[bool, ...]
    floating: tuple[int, ...]

    def run(self, *operands: Any) -> list[jax.Array]:
        """One run: every output at the smaller sizes, the parts of complex ones in succession."""
        jaxpr, literals = _compat.sub_jaxpr(self.params["jaxpr"])
        fixed, carry, streams = _compat.scan_operands(self.params, list(operands))

        def step(now: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
            out = run(jaxpr, literals, [*fixed, *now, *row], self.weights, self.sizes)
            return out[: len(now)], out[len(now) :]

        last, rows = jax.lax.scan(
            step, carry, streams, length=self.params["length"], reverse=self.params["reverse"]
        )
        return [part for x in (*last, *rows) for part in _real_arrays(x)]

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


def written(params: dict[str, Any]) -> str:
    """The equations of a loop, and the numbers in it."""
    jaxpr, literals = _compat.sub_jaxpr(params["jaxpr"])
    digests = [hashlib.sha1(np.asarray(x).tobytes()).hexdigest() for x in literals if not _is_key_array(x)]
    keys = [jax.random.key_data(x).tolist() for x in literals if _is_key_array(x)]
    return f"{params['length']} {params['reverse']} {digests} {keys} {jaxpr}"


def _is_key_array(x: Any) -> bool:
    return jnp.issubdtype(getattr(x, "dtype", np.dtype(float)), jax.dtypes.prng_key)


def _real_arrays(x: jax.Array) -> tuple[jax.Array, ...]:
    """An output as real arrays; of a random key nothing is told."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return (jnp.zeros(()),)
    return (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
