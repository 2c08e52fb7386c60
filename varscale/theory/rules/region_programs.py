"""What a region computes, compiled: once for all that compute the same."""

from __future__ import annotations

import dataclasses
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
        floating: which operands cotangents are asked of.
        short: whether it takes less time to run it than to compile it.
    """

    jaxpr: Any = dataclasses.field(compare=False)
    sizes: Sizes = dataclasses.field(compare=False)
    shapes: tuple[tuple[int, int], ...]
    written: str
    weights: tuple[bool, ...]
    floating: tuple[int, ...]
    short: bool = dataclasses.field(compare=False)

    def run(self, *operands: Any) -> list[jax.Array]:
        """One run: every output at the smaller sizes, the parts of complex ones in succession."""
        out = run(self.jaxpr.jaxpr, self.jaxpr.consts, operands, self.weights, self.sizes)
        return [part for x in out for part in _real_arrays(x)]

    def back(self, operands: Sequence[Any], seeds: Sequence[jax.Array]) -> Any:
        """Cotangents of the floating operands, given those of all outputs that are real numbers."""

        def f(*xs: jax.Array) -> list[jax.Array]:
            whole = list(operands)
            for i, x in zip(self.floating, xs, strict=True):
                whole[i] = x
            return [x for x in self.run(*whole) if jnp.issubdtype(x.dtype, jnp.inexact)]

        out, pull = jax.vjp(f, *[operands[i] for i in self.floating])
        return pull([seed.astype(x.dtype) for seed, x in zip(seeds, out, strict=True)])


def _run_all(program: Program, operands: list[Any]) -> list[jax.Array]:
    return jax.vmap(lambda xs: program.run(*xs))(operands)


def _back_all(program: Program, operands: list[Any], seeds: list[Any]) -> Any:
    return jax.vmap(program.back)(operands, seeds)


def _compiled(f: Any) -> tuple[Any, Any]:
    """As it is for programs that run for long; for others with LLVM's optimizations off, which take longer than they save."""
    quickly = {"xla_backend_optimization_level": 0}
    return jax.jit(f, static_argnums=0), jax.jit(f, static_argnums=0, compiler_options=quickly)


_RUN, _BACK = _compiled(_run_all), _compiled(_back_all)


def run_all(program: Program, operands: list[Any]) -> list[jax.Array]:
    """Its outputs on some draws of its operands."""
    return _RUN[program.short](program, operands)


def back_all(program: Program, operands: list[Any], seeds: list[Any]) -> Any:
    """Cotangents of its floating operands, draw by draw, given those of its real outputs: one program for all of them."""
    return _BACK[program.short](program, operands, seeds)


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
