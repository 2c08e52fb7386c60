"""Functions traced once to be called from many places of one trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from varscale import _compat
from varscale.content import Unknown

# What a call of a piece is called in a jaxpr.
PIECE = "varscale_piece"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A traced function, less what its outputs do not depend on.

    Attributes:
        call: takes some of the flat inputs, returns the flat outputs: one equation of the trace around it.
        taken: which inputs those are.
        out: the tree of the outputs.
    """

    call: Callable[..., Sequence[Any]]
    taken: Sequence[int]
    out: Any

    def __call__(self, inputs: Callable[[int], Any]) -> Any:
        """The outputs, given the inputs by number."""
        return jax.tree_util.tree_unflatten(self.out, self.call(*map(inputs, self.taken)))


def piece(f: Callable[..., Any], *args: Any) -> Piece:
    """The piece of a function of such arguments.

    Raises:
        Unknown: it closes over arrays of the trace around it, makes random keys out of nothing (so that all calls draw the
            same), has side effects, or returns something else than arrays.
    """

    def arrays(*args: Any) -> Any:
        out = f(*args)
        if not all(isinstance(x, jax.Array) for x in jax.tree_util.tree_leaves(out)):
            raise Unknown("output")
        return out

    closed, shapes = jax.make_jaxpr(arrays, return_shape=True)(*args)
    if closed.effects or _seeds(closed.jaxpr) or any(isinstance(x, jax.core.Tracer) or is_key(x) for x in closed.consts):
        raise Unknown("function")
    eqns = live(closed.jaxpr, closed.jaxpr.eqns)
    used = {v for v in (*closed.jaxpr.outvars, *(v for eqn in eqns for v in eqn.invars)) if not _compat.is_literal(v)}
    taken = [i for i, v in enumerate(closed.jaxpr.invars) if v in used]
    part = closed.jaxpr.replace(eqns=eqns, invars=[closed.jaxpr.invars[i] for i in taken])

    def varscale_piece(*inputs: Any) -> Any:
        return jaxpr_as_fun(ClosedJaxpr(part, closed.consts))(*inputs)

    return Piece(jax.jit(varscale_piece), taken, jax.tree_util.tree_structure(shapes))


def is_key(x: Any) -> bool:
    """Whether an array or a variable of a jaxpr is random keys."""
    return jnp.issubdtype(getattr(x, "dtype", None) or x.aval.dtype, jax.dtypes.prng_key)


def _seeds(jaxpr: Any) -> bool:
    """Whether random keys are made from anything else than random keys."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("random_seed", "random_wrap"):
            return True
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                if hasattr(part, "eqns") and _seeds(getattr(part, "jaxpr", part)):
                    return True
    return False


def live(jaxpr: Any, eqns: Sequence[Any]) -> list[Any]:
    """The equations, of these, that the outputs of a jaxpr depend on."""
    given = set(jaxpr.invars)
    needed = {v for v in jaxpr.outvars if not _compat.is_literal(v)} - given
    found = []
    for eqn in reversed(eqns):
        if not needed.isdisjoint(eqn.outvars):
            found.append(eqn)
            needed.update(v for v in eqn.invars if not _compat.is_literal(v) and v not in given)
    return found[::-1]
