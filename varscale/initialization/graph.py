"""The trace of an init as a graph of values, opened through jit, remat and scan, in which keys are told from numbers.

A value is *derived* if it is made from the key by operations that only make keys (`fold_in`, `split`, indexing): these are
evaluated apart, in NumPy (`derivation`). What is left of a leaf are the operations between the last key and the leaf: its
chain (`chains`). Loops are opened too, so that the keys of stacked layers are derived for all steps at once and layers with
equal laws have equal chains.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from varscale import _compat

_SEEDS = frozenset({"random_seed", "random_wrap"})
_KEYS_FROM_KEYS = frozenset({"random_fold_in", "random_split", "random_unwrap", "random_clone"})
_INDEXING = frozenset(
    {
        "slice", "squeeze", "unstack", "reshape", "broadcast_in_dim", "convert_element_type", "add", "sub", "mul",
        "concatenate", "transpose", "dynamic_slice", "select_n", "lt", "ge", "rem", "gather", "xor", "and", "or", "iota",
        "copy", "max", "min", "shift_left", "shift_right_logical", "clamp", "copy_p", "expand_dims",
    }
)  # fmt: skip
DERIVING = _SEEDS | _KEYS_FROM_KEYS | _INDEXING
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "remat2": "jaxpr",
          "checkpoint": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
          "custom_vjp_call_jaxpr": "fun_jaxpr"}  # fmt: skip
_MOST_KEYS = 2**20  # more than these are left to the chain: hashing them in NumPy would take longer than compiling

Kind = Literal["constant", "key", "data", "result", "step", "carry", "stacked", "final"]


@dataclasses.dataclass(eq=False, slots=True)
class Value:
    """A value of the trace.

    Attributes:
        kind: a constant, an input (a "key" or "data"), the result of an equation; inside a loop the "step" of a stream or the
            "carry"; and of a loop the "stacked" results or the "final" carry.
        aval: shape and dtype; of a value inside a loop, those of one step.
        order: grows along the trace.
        region: the innermost loop it is computed in.
        derived: whether it is made from keys by operations that only make keys.
        known: whether it can be computed without the numbers of any draw: derived, or small integers made of constants.
        source: the constant; the `Equation`; or the `Loop` it enters or leaves.
        position: which output of the equation, which stream or carry of the loop, which input.
    """

    kind: Kind
    aval: Any
    order: int
    region: Loop | None
    derived: bool
    known: bool
    source: Any
    position: int = 0


@dataclasses.dataclass(eq=False, slots=True)
class Equation:
    """An equation that is evaluated as it stands."""

    eqn: Any
    inputs: tuple[Value, ...]


@dataclasses.dataclass(eq=False, slots=True)
class Loop:
    """A `scan` that was opened: what enters and what leaves its body."""

    length: int
    reverse: bool
    parent: Loop | None
    start: tuple[Value, ...]
    streams: tuple[Value, ...]
    carries: tuple[Value, ...] = ()
    steps: tuple[Value, ...] = ()
    outputs: tuple[Value, ...] = ()
    """Of the body: the next carries, then what is stacked."""

    def is_inside(self, other: Loop | None) -> bool:
        """Whether this loop is `other` or runs in its body."""
        loop: Loop | None = self
        while loop is not None and loop is not other:
            loop = loop.parent
        return loop is other


def open_trace(closed: Any, keys: int) -> tuple[list[Value], list[Value]]:
    """The inputs and outputs of a traced init as values.

    Args:
        closed: the closed jaxpr; its first `keys` inputs are random keys, the others data.
        keys: how many inputs are keys.
    """
    opener = _Opener()
    inputs = [
        opener.value("key" if i < keys else "data", v.aval, None, derived=i < keys, known=i < keys, source=None, position=i)
        for i, v in enumerate(closed.jaxpr.invars)
    ]
    constants = [opener.constant(c, v.aval, None) for c, v in zip(closed.consts, closed.jaxpr.constvars, strict=True)]
    return inputs, opener.execute(closed.jaxpr, constants, inputs, None)


def is_key(aval: Any) -> bool:
    """Whether values of this shape and dtype are random keys."""
    return jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)


class _Opener:
    def __init__(self) -> None:
        self.count = itertools.count()
        self.deriving: dict[int, tuple[Any, bool]] = {}

    def value(
        self, kind: Kind, aval: Any, region: Loop | None, *, derived: bool, known: bool, source: Any, position: int = 0
    ) -> Value:
        return Value(kind, aval, next(self.count), region, derived, known, source, position)

    def constant(self, x: Any, aval: Any, region: Loop | None) -> Value:
        known = _is_small_integer(aval) or is_key(aval)
        return self.value("constant", aval, region, derived=False, known=known, source=x)

    def execute(self, jaxpr: Any, constants: Sequence[Value], inputs: Sequence[Value], region: Loop | None) -> list[Value]:
        env: dict[Any, Value] = dict(zip(jaxpr.constvars, constants, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Value:
            return self.constant(atom.val, atom.aval, None) if _compat.is_literal(atom) else env[atom]

        for eqn in jaxpr.eqns:
            given = tuple(map(read, eqn.invars))
            env.update(zip(eqn.outvars, self.equation(eqn, given, region), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, given: tuple[Value, ...], region: Loop | None) -> list[Value]:
        name = eqn.primitive.name
        if name in CALLS and CALLS[name] in eqn.params and self.derives(eqn.params[CALLS[name]]):
            inner, constants = _compat.sub_jaxpr(eqn.params[CALLS[name]])
            held = [self.constant(c, v.aval, None) for c, v in zip(constants, inner.constvars, strict=True)]
            return self.execute(inner, held, given, region)
        if name == "scan" and (self.derives(eqn.params["jaxpr"]) or any(x.derived for x in given)):
            return self.loop(eqn, given, region)
        small = all(math.prod(v.aval.shape) <= _MOST_KEYS for v in eqn.outvars)
        derived = name in DERIVING and small and all(x.known for x in given)
        derived = derived and (name in _SEEDS or any(x.derived for x in given))
        known = derived or (name in DERIVING and all(x.known for x in given) and all(map(_is_small_integer, _avals(eqn))))
        source = Equation(eqn, given)
        within = _innermost(given, region) if known else region
        return [
            self.value("result", v.aval, within, derived=derived, known=known, source=source, position=i)
            for i, v in enumerate(eqn.outvars)
        ]

    def loop(self, eqn: Any, given: tuple[Value, ...], region: Loop | None) -> list[Value]:
        params = eqn.params
        body, held = _compat.sub_jaxpr(params["jaxpr"])
        outer, start, streams = _compat.scan_operands(params, given)
        loop = Loop(params["length"], params["reverse"], region, tuple(start), tuple(streams))
        avals = [v.aval for v in body.invars[len(outer) :]]
        loop.steps = tuple(
            self.value("step", aval, loop, derived=x.derived, known=x.known, source=loop, position=i)
            for i, (x, aval) in enumerate(zip(streams, avals[len(start) :], strict=True))
        )
        # A carry is derived if the next one is, given that it is: tried with all that may be, until none is found wrong.
        may = [x.known and (is_key(x.aval) or jnp.issubdtype(x.aval.dtype, jnp.integer)) for x in start]
        fixed = [self.constant(c, v.aval, None) for c, v in zip(held, body.constvars, strict=True)]
        while True:
            loop.carries = tuple(
                self.value("carry", aval, loop, derived=ok, known=ok, source=loop, position=i)
                for i, (ok, aval) in enumerate(zip(may, avals[: len(start)], strict=True))
            )
            outs = self.execute(body, fixed, [*outer, *loop.carries, *loop.steps], loop)
            wrong = [ok and not x.known for ok, x in zip(may, outs, strict=False)]
            if not any(wrong):
                break
            may = [ok and not bad for ok, bad in zip(may, wrong, strict=True)]
        loop.outputs = tuple(outs)
        carried = len(start)
        return [
            self.value(
                "final" if i < carried else "stacked", v.aval, region,
                derived=(may[i] if i < carried else x.derived and x.known), known=(may[i] if i < carried else x.known),
                source=loop, position=i,
            )
            for i, (x, v) in enumerate(zip(outs, eqn.outvars, strict=True))
        ]  # fmt: skip

    def derives(self, jaxpr: Any) -> bool:
        """Whether a jaxpr makes keys from keys, so that it is worth opening."""
        inner, _ = _compat.sub_jaxpr(jaxpr)
        found = self.deriving.get(id(inner))
        if found is None:  # the jaxpr is kept, so that no other takes its address
            made = any(
                eqn.primitive.name in ("random_fold_in", "random_split", "random_seed") or any(map(self.derives, _inner(eqn)))
                for eqn in inner.eqns
            )
            found = self.deriving[id(inner)] = inner, made
        return found[1]


def _inner(eqn: Any) -> list[Any]:
    """The jaxprs that an equation holds."""
    values = itertools.chain.from_iterable(x if isinstance(x, tuple | list) else (x,) for x in eqn.params.values())
    return [x for x in values if hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")]


def inner_jaxprs(eqn: Any) -> list[Any]:
    """The jaxprs that an equation holds, without their constants."""
    return [_compat.sub_jaxpr(x)[0] for x in _inner(eqn)]


def _avals(eqn: Any) -> list[Any]:
    return [v.aval for v in eqn.outvars]


def _is_small_integer(aval: Any) -> bool:
    dtype = aval.dtype
    integral = not is_key(aval) and (jnp.issubdtype(dtype, jnp.integer) or dtype == np.bool_)
    return integral and math.prod(aval.shape) <= _MOST_KEYS


def _innermost(values: Sequence[Value], region: Loop | None) -> Loop | None:
    """The loop that known values depend on: what is the same in all steps belongs outside."""
    loop = region
    while loop is not None and not any(x.region is not None and x.region.is_inside(loop) for x in values):
        loop = loop.parent
    return loop
