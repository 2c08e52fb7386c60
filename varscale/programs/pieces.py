"""Functions traced once to be called from many places of one trace."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import compress
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from varscale import _compat
from varscale.programs.content import Unknown

# What a call of a piece is called in a jaxpr.
PIECE = "varscale_piece"
REMAT = ("remat", "remat2", "checkpoint")  # what `jax.checkpoint` is called in a jaxpr


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
    """The piece of a function of arrays.

    Raises:
        Unknown: it closes over arrays of the trace around it, makes random keys out of nothing (so that all calls draw the
            same), has side effects, or returns something else than arrays.
    """
    closed, shapes = _traced(f, args)
    return _part(closed, closed.jaxpr.invars, closed.jaxpr.outvars, jax.tree_util.tree_structure(shapes))


def two_pieces(f: Callable[..., tuple[Any, Any]], *args: Any) -> tuple[Piece, Piece]:
    """Two pieces of a function of arrays: to the first of its two outputs, and from it and the arrays to the second.

    Raises:
        Unknown: as `piece` does.
    """
    closed, (first, second) = _traced(f, args)
    out = jax.tree_util.tree_structure(first)
    between, rest = closed.jaxpr.outvars[: out.num_leaves], closed.jaxpr.outvars[out.num_leaves :]
    return (
        _part(closed, closed.jaxpr.invars, between, out),
        _part(closed, [*between, *closed.jaxpr.invars], rest, jax.tree_util.tree_structure(second)),
    )


def _traced(f: Callable[..., Any], args: Sequence[Any]) -> tuple[ClosedJaxpr, Any]:
    def arrays(*args: Any) -> Any:
        out = f(*args)
        if not all(isinstance(x, jax.Array) for x in jax.tree_util.tree_leaves(out)):
            raise Unknown("output")
        return out

    closed, shapes = jax.make_jaxpr(arrays, return_shape=True)(*args)
    if closed.effects or _seeds(closed.jaxpr) or any(_compat.is_tracer(x) or is_key(x) for x in closed.consts):
        raise Unknown("function")
    return closed, shapes


def _part(closed: ClosedJaxpr, inputs: Sequence[Any], outputs: Sequence[Any], out: Any) -> Piece:
    """The piece between variables of a jaxpr."""
    place = {v: i for i, v in reversed(list(enumerate(inputs))) if not _compat.is_literal(v)}
    part = closed.jaxpr.replace(invars=list(place), outvars=list(outputs))
    part = part.replace(eqns=live(part, part.eqns))
    used = {v for v in (*outputs, *(v for eqn in part.eqns for v in eqn.invars)) if not _compat.is_literal(v)}
    part = part.replace(invars=[v for v in place if v in used])

    def varscale_piece(*values: Any) -> Any:
        return jaxpr_as_fun(ClosedJaxpr(part, closed.consts))(*values)

    return Piece(jax.jit(varscale_piece), [place[v] for v in part.invars], out)


def is_key(x: Any) -> bool:
    """Whether an array, its description or a variable of a jaxpr is random keys; what has no dtype is none."""
    return jnp.issubdtype(getattr(getattr(x, "aval", x), "dtype", bool), jax.dtypes.prng_key)


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
    """The equations, of these, that the outputs of a jaxpr depend on; rematerializations and scans less what they do not."""
    given = set(jaxpr.invars)
    needed = {v for v in jaxpr.outvars if not _compat.is_literal(v)}
    found = []
    for eqn in reversed(eqns):
        if not needed.isdisjoint(eqn.outvars):
            part = _part_of_scan if eqn.primitive.name == "scan" else _part_of_remat
            found.append(part(eqn, needed) if eqn.primitive.name in {"scan", *REMAT} else eqn)
            needed.update(v for v in found[-1].invars if not _compat.is_literal(v) and v not in given)
    return found[::-1]


def _part_of_remat(eqn: Any, needed: set[Any]) -> Any:
    """A rematerialization that only computes what is needed: a layer's own equation computes its parameters and its output."""
    kept, made = eqn.params["prevent_cse"], tuple(v in needed for v in eqn.outvars)
    part, reads = _part_computing(eqn.params["jaxpr"], made)
    params = dict(eqn.params, jaxpr=part)
    if isinstance(kept, tuple):  # operand by operand
        params["prevent_cse"] = tuple(compress(kept, reads))
    return eqn.replace(invars=list(compress(eqn.invars, reads)), outvars=list(compress(eqn.outvars, made)), params=params)


def _part_of_scan(eqn: Any, needed: set[Any]) -> Any:
    """A scan that reads zeros for what only outputs that are not needed are made of: parameters are drawn for any input."""
    _, reads = parts_of_scan(eqn, [v in needed for v in eqn.outvars])
    lost = {v for v in compress(eqn.invars, map(operator.not_, reads)) if not (_compat.is_literal(v) or is_key(v))}
    read = {v for v in compress(eqn.invars, reads) if not _compat.is_literal(v)}
    zeros = {v: _compat.zeros(v.aval) for v in lost - read}
    return eqn.replace(invars=[v if _compat.is_literal(v) else zeros.get(v, v) for v in eqn.invars]) if zeros else eqn


def parts_of_scan(eqn: Any, made: Sequence[bool]) -> tuple[Sequence[bool], Sequence[bool]]:
    """Which outputs of a scan some of them depend on, themselves included, and which of its operands."""
    reads = _part_computing(_compat.sub_jaxpr(eqn.params["jaxpr"])[0], tuple(made))[1]
    carry = _compat.scan_operands(eqn.params, reads)[1]
    more = [*map(operator.or_, made, carry), *made[len(carry) :]]
    return (made, reads) if more == [*made] else parts_of_scan(eqn, more)


@lru_cache(maxsize=256)  # so that equal parts are one
def _part_computing(jaxpr: Any, made: tuple[bool, ...]) -> tuple[Any, list[bool]]:
    """What some outputs of a jaxpr are computed by, and which inputs that reads."""
    part = _compat.replaced(jaxpr, outvars=list(compress(jaxpr.outvars, made)))
    part = part.replace(eqns=live(part, part.eqns))
    used = {v for v in (*part.outvars, *(v for e in part.eqns for v in e.invars)) if not _compat.is_literal(v)}
    reads = [v in used for v in part.invars]
    return _compat.replaced(part, invars=list(compress(part.invars, reads))), reads


def environment(jaxpr: Any, consts: Iterable[Any], args: Iterable[Any]) -> dict[Any, Any]:
    """What the variables of a jaxpr hold before its first equation."""
    return dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))


def read(env: Mapping[Any, Any], atoms: Sequence[Any], literal: Callable[[Any], Any] = lambda number: number) -> list[Any]:
    """What operands, or outputs, are: variables by an environment, literals by their numbers."""
    return [literal(atom.val) if _compat.is_literal(atom) else env[atom] for atom in atoms]
