"""Where rules are registered by primitive, the values they read and write, what they may ask of the walk, and jaxprs' parts."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from varscale import _compat
from varscale.programs.pieces import live
from varscale.theory.graph.layout import Value
from varscale.theory.graph.nodes import Graph
from varscale.theory.graph.store import Fact

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
RECOGNISERS: dict[str, list[Rule]] = {}
# Primitives whose rules handle known numbers themselves, without writing them out.
ELEMENTWISE_OR_LAYOUT: set[str] = set()
STACKED: Fact[int, Sequence[Any]] = Fact()  # the values of the steps that a stacked node is made of
CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
CALLS += ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


def rule(*names: str, entrywise: bool = False) -> Callable[[Rule], Rule]:
    """Register what is called as f(interpreter, eqn, *values) for primitives of these names, and gives a value or a list.

    `entrywise` ones are elementwise functions or move entries, so that known numbers need not be written out.
    """

    def register(f: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, f))
        ELEMENTWISE_OR_LAYOUT.update(names if entrywise else ())
        return f

    return register


def recognise(name: str) -> Callable[[Rule], Rule]:
    """Register a function that may see more in an elementwise primitive than the primitive: a softmax in a division.

    It is called as f(context, *values), in the order of registration, and returns a value, or None where it sees nothing.
    """

    def register(f: Rule) -> Rule:
        RECOGNISERS.setdefault(name, []).append(f)
        return f

    return register


@dataclasses.dataclass(frozen=True, eq=False)
class Opaque:
    """A random key: known exactly, so that equal keys give equal bits."""

    key: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.key.shape


@dataclasses.dataclass(frozen=True, eq=False)
class Complex:
    """A complex value: its real and imaginary parts, of one shape."""

    re: Value
    im: Value

    @property
    def shape(self) -> tuple[int, ...]:
        return self.re.shape


def parts(x: Value | Complex) -> tuple[Value, ...]:
    """The real arrays that a value consists of."""
    return (x.re, x.im) if isinstance(x, Complex) else (x,)


def map_parts(f: Callable[[Any], Any], x: Any) -> Any:
    """f of a real value or of each part of a complex one."""
    return Complex(f(x.re), f(x.im)) if isinstance(x, Complex) else f(x)


class Waits(BaseException):
    """What a rule raises for an equation that the next walk draws; in this one placeholders stand for its outputs."""


class Context(Protocol):
    """The walk over a jaxpr, as rules see it (`interpreter.interpreter.Interpreter`)."""

    graph: Graph  # the nodes built so far
    place: Any  # where rows are kept; None where none are
    regions: Any  # the scopes that are drawn, or cannot be
    tie: float  # what of a cotangent each of two equal numbers has, of which one is the largest
    used: frozenset[Any]  # the variables that are read of the jaxpr that is being interpreted
    # (jaxpr, consts, args, step=None), the outputs of a jaxpr; `step` says which of a loop's it is
    run: Callable[..., list[Any]]
    known: Callable[[Any], Any]  # the value of a known array
    # (x, dtype=None), the numbers of a known value; None where it is random or too large
    concrete: Callable[..., np.ndarray | None]
    # (name, *xs, extra=()), an elementwise primitive of values of one shape (sizes of 1 broadcast)
    elementwise: Callable[..., Value]
    # (reason, whole=False), have the next walk draw this module, or the whole model, where it can (`Waits`)
    ask: Callable[..., None]
    ask_for: Callable[..., bool]  # (error), whether the module where it came up will be drawn
    # (name, shape, mean, second_moment, *, odd, **law), a new random tensor with independent entries
    leaf: Callable[..., Value]


def sub_jaxpr_of(eqn: Any) -> Any:
    """The jaxpr of a call; None for anything else."""
    return next((p for p in eqn.params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")), None)


@functools.lru_cache(maxsize=256)
def live_equations(jaxpr: Any) -> list[Any]:
    """The equations that the outputs depend on (an init's forward pass is not one)."""
    return live(jaxpr, jaxpr.eqns)


@functools.lru_cache(maxsize=256)
def used_variables(jaxpr: Any) -> frozenset[Any]:
    """The variables that live equations read, and the outputs."""
    read = [*jaxpr.outvars, *(v for eqn in live_equations(jaxpr) for v in eqn.invars)]
    return frozenset(v for v in read if not _compat.is_literal(v))
