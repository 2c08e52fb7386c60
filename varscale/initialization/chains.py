"""The chain of a leaf: the operations between its last keys and itself, comparable with those of other leaves.

Two leaves whose chains have the same text differ in their keys only: one compiled program draws both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from varscale import _compat
from varscale.initialization.graph import Equation, Loop, Value, inner_jaxprs, is_key
from varscale.initializers.sampling import is_narrow
from varscale.programs.content import Same

Kind = Literal["constant", "elementwise", "orthogonal", "reduction", "data"]

# Sums depend on the order in which they are taken, and so on how XLA lays the program out; maxima and sorts do not.
_REDUCING = frozenset(
    {"reduce_sum", "reduce_prod", "dot_general", "conv_general_dilated", "cumsum", "cumprod", "cumlogsumexp", "reduce",
     "scatter-add", "scatter_add", "scatter_mul", "reduce_window_sum", "reduce_window", "fft", "ragged_dot_general",
     "reduce_precision_sum"}
)  # fmt: skip
_DECOMPOSING = frozenset({"qr", "geqrf", "householder_product", "eigh", "svd", "lu", "cholesky", "triangular_solve", "schur",
                          "eig", "tridiagonal", "hessenberg"})  # fmt: skip
# Floating operations that XLA's CPU compiler rounds alike in loops over every shape. Others (exponentials, logarithms, ...) are
# sums of products, of which LLVM contracts one or the other, as the loop around them has it.
EVEN = frozenset(
    {"abs", "add", "bitcast_convert_type", "ceil", "clamp", "convert_element_type", "copy", "copy_p", "div", "erf_inv", "floor",
     "max", "min", "mul", "neg", "nextafter", "round", "select_n", "sign", "sqrt", "stop_gradient", "sub"}
)  # fmt: skip
ROW_MAJOR = frozenset({"broadcast_in_dim", "expand_dims", "reshape", "squeeze"})
_SMALL = 1024  # constants up to this size are part of the program, where XLA may fold them; larger ones are arguments


@dataclasses.dataclass(frozen=True)
class Chain:
    """What is left of a leaf when its keys are given.

    Attributes:
        text: equal for chains that compute the same from their arguments.
        leaves: the values it computes.
        arguments: what it computes them from: derived values (a stack of them where they are inside loops), large constants
            and data, in the order of their first use.
        kind: whether its numbers depend on the order of sums ("reduction") or on the model's input ("data"), or whether they
            come out the same however they are computed.
        words: the names of its operations.
        needs_own_hash: whether its bits are those of the jitted init only if the hash is compiled as jax has it: samplers such
            as that of gamma are loops, which XLA compiles together with the hash.
        uneven: whether its bits are those of the jitted init only if it is compiled for the same shapes: XLA rounds its
            operations otherwise in other loops.
    """

    text: Hashable
    leaves: tuple[Value, ...] = dataclasses.field(compare=False)
    arguments: tuple[Value, ...] = dataclasses.field(compare=False)
    kind: Kind = dataclasses.field(compare=False)
    words: tuple[str, ...] = dataclasses.field(compare=False)
    needs_own_hash: bool = dataclasses.field(compare=False)
    uneven: bool = dataclasses.field(compare=False)


def chain(leaves: Sequence[Value]) -> Chain:
    """The chain of values of the whole trace."""
    writer = _Writer()
    text = writer.body(None, leaves)
    kind: Kind = "constant" if not writer.arguments and not writer.random else "elementwise"
    if writer.reduces:
        kind = "reduction"
    elif writer.decomposes:
        kind = "orthogonal"
    if any(x.kind == "data" for x in writer.arguments):
        kind = "data"
    sums = sum(is_key(v.aval) for v in writer.arguments) > 1 and not writer.operations.isdisjoint({"add", "sub"})
    mixes = sums or not writer.operations <= {*EVEN, "narrow", "narrow draw", "wide draw"}
    uneven = not writer.loops and ("narrow" in writer.operations or (kind == "elementwise" and mixes))
    # The hash of a narrow draw is compiled apart from what follows, as jax's own is.
    apart = not mixes and "wide draw" not in writer.operations
    needs_own_hash = writer.loops or kind in ("reduction", "data") or (uneven and not apart)
    return Chain(text, tuple(leaves), tuple(writer.arguments), kind, tuple(writer.words), needs_own_hash, uneven)


def law_words(found: Chain) -> str:
    """The operations of a chain, those alone that tell one law from another."""
    silent = {
        "broadcast_in_dim",
        "convert_element_type",
        "reshape",
        "squeeze",
        "transpose",
        "copy",
        "sqrt",
        "div",
        "mul",
        "slice",
    }
    told = [word.lstrip("_") for word in found.words if word not in silent]
    return ", ".join(dict.fromkeys(told)) or "constant"


def stacking(v: Value) -> tuple[int, ...]:
    """The leading axes of an argument: the steps of the loops it is computed in."""
    lengths, loop = [], v.region
    while loop is not None and v.derived:
        lengths.append(loop.length)
        loop = loop.parent
    return tuple(reversed(lengths))


def is_argument(v: Value) -> bool:
    """Whether chains are given the value instead of computing it."""
    return v.derived or v.kind in ("data", "key") or (v.kind == "constant" and _is_large(v))


def _is_large(v: Value) -> bool:
    return int(np.prod(v.aval.shape, dtype=np.int64)) > _SMALL and not is_key(v.aval)


def evaluate(found: Chain, arguments: Sequence[Any]) -> list[Any]:
    """The leaves of a chain, from its arguments as jax arrays; traced by the program that draws it."""
    env: dict[Hashable, Any] = dict(zip(found.arguments, arguments, strict=True))
    vectorized = found.kind in ("elementwise", "orthogonal", "constant") and not found.uneven
    return _Evaluation(vectorized).body(None, found.leaves, env)


def body_values(region: Loop | None, wanted: Sequence[Value]) -> list[Value]:
    """What the body of a loop (or the trace) computes for the wanted values, in order; loops inside it by their results."""
    found: set[Value] = set()
    waiting = list(wanted)
    while waiting:
        v = waiting.pop()
        if v in found or is_argument(v) or v.region is not region or v.kind == "constant":
            continue
        found.add(v)
        waiting.extend(_needs(v))
    return sorted(found, key=lambda v: v.order)


def _needs(v: Value) -> Sequence[Value]:
    """What a value is computed from, seen from the body that it is in."""
    if v.kind == "result":
        return v.source.inputs
    if v.kind in ("stacked", "final"):
        return _uses_of(v.source, (v.position,)).outside
    return ()


@dataclasses.dataclass(frozen=True)
class _Use:
    """What a loop needs for some of its outputs: which carries and streams, and which values around it."""

    carries: tuple[int, ...]
    steps: tuple[int, ...]
    outside: tuple[Value, ...]


def _uses_of(loop: Loop, outputs: tuple[int, ...]) -> _Use:
    carries: set[int] = {i for i in outputs if i < len(loop.carries)}
    while True:
        wanted = [loop.outputs[i] for i in (*sorted(carries), *outputs)]
        inside = body_values(loop, wanted)
        now = carries | {v.position for v in inside if v.kind == "carry"}
        if now == carries:
            break
        carries = now
    steps = sorted(v.position for v in inside if v.kind == "step")
    reached = [x for v in inside for x in _needs(v)] + wanted
    outside = [x for x in reached if x.region is not loop and not is_argument(x)]
    # Values of loops further out are theirs to bring in; arguments come by another way.
    outside += [loop.start[i] for i in sorted(carries)] + [loop.streams[i] for i in steps]
    return _Use(tuple(sorted(carries)), tuple(steps), tuple(dict.fromkeys(outside)))


def _grouped(values: Sequence[Value]) -> Iterator[Value | tuple[Loop, tuple[int, ...]]]:
    """Values in order; the results of a loop as the loop and which of them are wanted, once."""
    outputs: dict[Loop, list[int]] = {}
    for v in values:
        if v.kind in ("stacked", "final"):
            outputs.setdefault(v.source, []).append(v.position)
    seen: set[Any] = set()
    for v in values:
        source = v.source
        if v.kind in ("stacked", "final"):
            if source not in seen:
                seen.add(source)
                yield source, tuple(sorted(outputs[source]))
        elif v.kind == "result":
            if source not in seen:
                seen.add(source)
                yield v
        else:
            yield v


class _Writer:
    """Writes a chain down, with its values numbered in the order they appear."""

    def __init__(self) -> None:
        self.numbers: dict[Hashable, int] = {}
        self.arguments: list[Value] = []
        self.reduces = self.decomposes = self.random = self.loops = False
        self.operations: set[str] = set()
        self.words: list[str] = []

    def number(self, v: Value) -> Hashable:
        slot = _slot(v)
        if slot in self.numbers:
            return self.numbers[slot]
        if is_argument(v):
            self.arguments.append(v)
            self.numbers[v] = len(self.numbers)
            return self.numbers[v], v.kind == "data", str(v.aval), stacking(v)
        return _constant_text(v) if v.kind == "constant" else self.define(slot)

    def define(self, slot: Hashable) -> int:
        return self.numbers.setdefault(slot, len(self.numbers))

    def body(self, region: Loop | None, wanted: Sequence[Value]) -> Hashable:
        lines: list[Hashable] = []
        for part in _grouped(body_values(region, wanted)):
            if isinstance(part, tuple):
                loop, outputs = part
                use = _uses_of(loop, outputs)
                given = tuple(map(self.number, use.outside))
                inside = self.body(loop, [loop.outputs[i] for i in (*use.carries, *outputs)])
                ends = tuple(self.define((loop, i)) for i in outputs)
                lines.append(("scan", loop.length, loop.reverse, use.carries, use.steps, given, inside, ends))
            elif part.kind == "result":
                lines.append(self.equation(part.source))
            elif part.kind in ("step", "carry"):
                lines.append((part.kind, part.position, self.number(part)))
        return tuple(lines), tuple(map(self.number, wanted))

    def equation(self, equation: Equation) -> Hashable:
        given = tuple(map(self.number, equation.inputs))
        eqn = equation.eqn
        fixed = all(x.kind == "constant" for x in equation.inputs)
        names = _names(eqn)
        self.random = self.random or "random_bits" in names or "random_gamma" in names
        self.loops = self.loops or not names.isdisjoint(("random_gamma", "while"))
        self.reduces = self.reduces or (not fixed and not _REDUCING.isdisjoint(names))
        self.decomposes = self.decomposes or not _DECOMPOSING.isdisjoint(names)
        self.operations |= _operations(eqn)
        if any(x.kind == "constant" and _is_floating_array(x.aval) for x in equation.inputs):
            self.operations.add("constant")
        self.words.append(eqn.params.get("name", eqn.primitive.name))
        for i in range(len(eqn.outvars)):
            self.define((equation, i))
        return eqn.primitive.name, given, tuple(str(v.aval) for v in eqn.outvars), params_text(eqn)


def _constant_text(v: Value) -> Hashable:
    if is_key(v.aval):
        return "key", str(v.aval), np.asarray(jax.random.key_data(v.source)).tobytes()
    x = np.asarray(v.source)
    return str(v.aval), x.tobytes()


def _names(eqn: Any) -> frozenset[str]:
    found = {eqn.primitive.name}
    if eqn.params.get("name") == "diagonal":
        return frozenset(found)  # of whose sums each has one term that is not zero
    for jaxpr in inner_jaxprs(eqn):
        found |= _all_names(Same(jaxpr))
    return frozenset(found)


@functools.lru_cache(maxsize=4096)
def _all_names(held: Same) -> frozenset[str]:
    return frozenset().union(*map(_names, held.value.eqns))


def _operations(eqn: Any) -> frozenset[str]:
    """Names of the operations in an equation that give floating arrays, what it draws, and whether an array is narrow."""
    name, inner = eqn.primitive.name, inner_jaxprs(eqn)
    if name == "random_bits":
        return frozenset({"narrow draw" if is_narrow(eqn.params["shape"]) else "wide draw"})
    if inner:
        return frozenset().union(*(_all_operations(Same(jaxpr)) for jaxpr in inner))
    arrays = [v.aval for v in eqn.outvars if _is_floating_array(v.aval) or name == "iota"]
    laid_out = name in ROW_MAJOR and all(v.aval.size in (1, arrays[0].size) for v in eqn.invars if arrays)
    return frozenset({name} if arrays and not laid_out else ()) | {"narrow" for x in arrays if is_narrow(x.shape)}


def _is_floating_array(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.inexact) and aval.size > 1


@functools.lru_cache(maxsize=4096)
def _all_operations(held: Same) -> frozenset[str]:
    return frozenset().union(*map(_operations, held.value.eqns))


def params_text(eqn: Any) -> Hashable:
    """The parameters of an equation, so that they compare by what they say."""
    has_body = bool(inner_jaxprs(eqn))
    return tuple((name, _param(x)) for name, x in sorted(eqn.params.items()) if not (has_body and callable(x)))


def _param(x: Any) -> Hashable:
    if hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns"):
        jaxpr, constants = _compat.sub_jaxpr(x)
        return _jaxpr_text(Same(jaxpr)), tuple(_array(c) for c in constants)
    if isinstance(x, tuple | list):
        return tuple(map(_param, x))
    return _array(x) if isinstance(x, np.ndarray | jax.Array) else f"{type(x).__name__} {x}"


def _array(x: Any) -> Hashable:
    if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return str(x.dtype), np.asarray(jax.random.key_data(x)).tobytes()
    return str(np.asarray(x).dtype), np.shape(x), np.asarray(x).tobytes()


@functools.lru_cache(maxsize=4096)
def _jaxpr_text(held: Same) -> Hashable:
    jaxpr, numbers = held.value, {}

    def number(atom: Any) -> Hashable:
        if _compat.is_literal(atom):
            return str(atom.aval), _array(atom.val)
        return numbers.setdefault(atom, len(numbers))

    def typed(variables: Sequence[Any]) -> Hashable:
        return tuple((number(v), str(v.aval)) for v in variables)

    head = typed(jaxpr.constvars), typed(jaxpr.invars)
    lines = tuple((e.primitive.name, tuple(map(number, e.invars)), typed(e.outvars), params_text(e)) for e in jaxpr.eqns)
    return hash((head, lines, tuple(map(number, jaxpr.outvars)))), str(jaxpr.outvars and jaxpr.outvars[0].aval)


class _Evaluation:
    """Computes chains; loops that carry nothing are run for all steps at once where that changes no bits."""

    def __init__(self, vectorized: bool):
        self.vectorized = vectorized

    def body(self, region: Loop | None, wanted: Sequence[Value], env: Mapping[Hashable, Any]) -> list[Any]:
        found = dict(env)
        for part in _grouped(body_values(region, wanted)):
            if isinstance(part, tuple):
                loop, outputs = part
                outs = self.loop(loop, outputs, found)
                found.update(((loop, i), x) for i, x in zip(outputs, outs, strict=True))
            elif part.kind == "result":
                source = part.source
                outs = _compat.evaluated(source.eqn, [self.read(x, found) for x in source.inputs])
                found.update(((source, i), x) for i, x in enumerate(outs))
        return [self.read(v, found) for v in wanted]

    def read(self, v: Value, env: Mapping[Hashable, Any]) -> Any:
        if v.kind == "constant" and v not in env:
            return v.source if is_key(v.aval) else jnp.asarray(v.source, v.aval.dtype)
        return env[_slot(v)]

    def loop(self, loop: Loop, outputs: tuple[int, ...], env: Mapping[Hashable, Any]) -> list[Any]:
        use = _uses_of(loop, outputs)
        streams: dict[Hashable, Any] = {
            v: x
            for v, x in env.items()
            if isinstance(v, Value) and v.derived and v.region is not None and v.region.is_inside(loop)
        }
        streams |= {loop.steps[i]: self.read(loop.streams[i], env) for i in use.steps}
        keys = list(streams)
        stacked = [i for i in outputs if i >= len(loop.carries)]

        def step(carry: Sequence[Any], now: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            inner = {**env, **dict(zip(keys, now, strict=True)), **dict(zip(carried, carry, strict=True))}
            outs = self.body(loop, [loop.outputs[i] for i in (*use.carries, *stacked)], inner)
            return outs[: len(use.carries)], outs[len(use.carries) :]

        carried = [loop.carries[i] for i in use.carries]
        if self.vectorized and not use.carries and loop.length:
            return jax.vmap(lambda *now: step([], now)[1], axis_size=loop.length)(*(streams[v] for v in keys))
        start = [self.read(loop.start[i], env) for i in use.carries]
        final, ys = jax.lax.scan(step, start, [streams[v] for v in keys], loop.length, loop.reverse)
        ends = dict(zip(use.carries, final, strict=True)) | dict(zip(stacked, ys, strict=True))
        return [ends[i] for i in outputs]


def _slot(v: Value) -> Hashable:
    """What a value is stored under: the outputs of one equation or loop by their position."""
    return (v.source, v.position) if v.kind in ("result", "stacked", "final") and not v.derived else v
