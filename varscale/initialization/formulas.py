"""The formula of a leaf: what each of its numbers is, from its own random word and nothing else.

With partitionable counters the random word of a number depends on the key and on the number's position alone. Where the rest
of a chain works number by number, the shape of the leaf does not matter: leaves of all shapes that share a formula are drawn
by one program (`tiles`). A last factor, such as the standard deviation, is no part of the formula but an operand of that
program.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varscale import _compat
from varscale.initialization.chains import EVEN, ROW_MAJOR, Chain, body_values, params_text
from varscale.initialization.derivation import split
from varscale.initialization.drawing import Drawing, LaidDrawing, Told
from varscale.initialization.graph import CALLS, Loop, Value, is_key
from varscale.initialization.laws import drawn_from
from varscale.initializers.sampling import bits_at, is_narrow, unrolled_key

# Operations on words and truth values, and comparisons.
_OF_WORDS = frozenset({"and", "eq", "ge", "gt", "is_finite", "le", "lt", "ne", "not", "or", "rem", "shift_left",
                       "shift_right_arithmetic", "shift_right_logical", "xor"})  # fmt: skip
_OF_ONE_NUMBER = frozenset({"erf", "exp", "integer_pow", "log", "pow", "rsqrt", "square"})
_MOST_NUMBERS = 2**32  # beyond, the counter has a high word

# Operations on numbers that NumPy and XLA both round correctly, so that it does not matter who computes them.
_EXACT: dict[str, Callable[..., Any]] = {"mul": np.multiply, "div": np.divide, "add": np.add, "sub": np.subtract,
                                         "sqrt": np.sqrt, "neg": np.negative, "stop_gradient": np.positive}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation of a formula.

    Attributes:
        name: of the operation; "bits" for random words, "literal" for a number.
        text: its parameters, comparable.
        operands: the steps whose results it takes.
        dtype: of its result.
        repeats: whether its result is the same for all numbers of a leaf.
        bound: the operation itself; the number, of a literal; the key's place, of random words.
    """

    name: str
    text: Hashable
    operands: tuple[int, ...]
    dtype: np.dtype
    repeats: bool
    bound: Any = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Formula:
    """What a number of a leaf is.

    Attributes:
        steps: the operations, the result last.
        keys: how many keys a leaf is drawn from.
        scaled: the dtype of the last factor, which the result is multiplied by; None without one.
        dtypes: what the result, scaled, is rounded to, one after the other.
    """

    steps: tuple[Step, ...]
    keys: int
    scaled: np.dtype | None
    dtypes: tuple[np.dtype, ...]

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.steps, self.keys, self.scaled, self.dtypes))

    def __hash__(self) -> int:  # of dozens of steps, and asked for once a leaf
        return self._hash

    @property
    def dtype(self) -> np.dtype:
        """Of the leaf."""
        return self.dtypes[-1] if self.dtypes else self.steps[-1].dtype

    def __call__(self, words: Sequence[Any], index: Any, factor: Any) -> Any:
        """The numbers: traced by the program.

        Args:
            words: the two words of each key, in shapes that broadcast with the index.
            index: positions of the numbers in their leaf.
            factor: the last factor, in a shape that broadcasts with it.
        """
        found: list[Any] = []
        for step in self.steps:
            if step.name == "bits":
                slot, width = step.bound
                found.append(bits_at(words[slot], width, index))
            elif step.name == "literal":
                found.append(jnp.asarray(step.bound))
            else:
                given = [found[i] for i in step.operands]
                if not step.repeats:
                    given = [jnp.broadcast_to(x, index.shape) for x in given]
                found.append(step.bound(*given))
        x = found[-1] if self.scaled is None else found[-1] * factor
        for dtype in self.dtypes:
            x = x.astype(dtype)
        return x


@dataclasses.dataclass(frozen=True)
class Reading:
    """A leaf read as a formula.

    Attributes:
        formula: of its numbers.
        keys: which of the program's arguments are the keys it is drawn from.
        splits: into how many keys, one a draw, its key is split first; 0 where each key is used as it is.
        factor: its last factor.
        size: how many numbers one draw has.
        shape: of the leaf.
    """

    formula: Formula
    keys: tuple[int, ...]
    splits: int
    factor: np.generic
    size: int
    shape: tuple[int, ...]

    def words(self, arguments: Sequence[Any]) -> np.ndarray:
        """The words of the keys of all its draws, (draws, keys, 2), from the program's arguments."""
        keys = [np.asarray(arguments[k]) for k in self.keys]
        if self.splits:
            keys = [split(key, (self.splits,), partitionable=True) for key in keys]
        return np.stack([key.reshape(-1, 2) for key in keys], axis=1)


class _Unread(Exception):
    """No formula says what a chain computes."""


@dataclasses.dataclass(frozen=True)
class _Key:
    slot: int
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Array:
    """Numbers of a leaf, or one number that is repeated (of any shape), by the step that gives them."""

    step: int
    shape: tuple[int, ...]


def read(program: Drawing | LaidDrawing) -> Reading | None:
    """The formula of the one leaf that a program draws; None where it has none, or draws several."""
    return _read(Told(program))


@functools.lru_cache(maxsize=512)
def _read(told: Told) -> Reading | None:
    program = told.take()
    if len(program.dtypes) != 1:
        return None
    reader = _Reader()
    try:
        if isinstance(program, LaidDrawing):
            x, keys, splits = _law(reader, program)
            shape, dtype = x.shape, None
        else:
            (leaf,), dtype = program.chain.leaves, program.dtypes[0]
            x, shape, splits = _chain(reader, program.chain), tuple(leaf.aval.shape), 0
            keys = tuple(map(program.chain.arguments.index, reader.keys))
    except _Unread:
        return None
    batch = math.prod(reader.batch or ())
    size = math.prod(shape) // batch if batch else 0
    if not isinstance(x, _Array) or reader.steps[x.step].repeats or x.shape != shape or not 0 < size < _MOST_NUMBERS:
        return None
    if is_narrow(shape):
        return None
    formula, factor = _finished(reader.steps, x.step, len(keys), dtype)
    return Reading(_one_of_equals(formula), keys, splits, factor, size, shape)


@functools.lru_cache(maxsize=512)
def _one_of_equals(formula: Formula) -> Formula:
    """The same object for equal formulas, which compares with itself at once."""
    return formula


def _chain(reader: _Reader, found: Chain) -> Any:
    leaf = found.leaves[0]
    if found.kind != "elementwise" or found.needs_own_hash or found.uneven or getattr(leaf.aval, "weak_type", False):
        raise _Unread
    return reader.body(None, leaf, ())


def _law(reader: _Reader, program: LaidDrawing) -> tuple[Any, tuple[int, ...], int]:
    """What a law laid on a leaf draws, from its own key or from as many as that is split into."""
    if program.declared is not None or "threefry" not in str(program.implementation):
        raise _Unread
    stack = program.core.stack
    key = jax.eval_shape(lambda: unrolled_key(jax.random.key(0, impl="threefry2x32")))
    shape: tuple[int, ...] = (math.prod(stack),) if stack else ()
    closed = jax.make_jaxpr(lambda key: drawn_from(program.law, key, program.core, program.dtypes[0]))(
        jax.ShapeDtypeStruct(shape, key.dtype)
    )
    reader.batch = shape
    (x,) = reader.jaxpr(closed.jaxpr, closed.consts, [_Key(0, shape)])
    return x, (0,), math.prod(stack) if stack else 0


def _finished(steps: Sequence[Step], root: int, keys: int, dtype: np.dtype | None) -> tuple[Formula, np.generic]:
    """The formula of a step's result, in canonical order, and the last factor."""
    dtypes = [] if dtype is None else [dtype]
    end = root
    while steps[end].name == "convert_element_type":
        dtypes.insert(0, steps[end].dtype)
        end = steps[end].operands[0]
    factors: list[np.generic] = []
    while (split := _factor(steps, end)) is not None:
        end, factor = split
        factors.append(factor)
    if not factors:
        end, dtypes, last = root, [] if dtype is None else [dtype], np.float32(1)
    else:
        last = functools.reduce(np.multiply, reversed(factors))
    order: dict[int, int] = {}
    kept: list[Step] = []

    def keep(i: int) -> int:
        if i not in order:
            operands = tuple(map(keep, steps[i].operands))
            order[i] = len(kept)
            kept.append(dataclasses.replace(steps[i], operands=operands))
        return order[i]

    keep(end)
    return Formula(tuple(kept), keys, last.dtype if factors else None, tuple(dtypes)), last


def _factor(steps: Sequence[Step], i: int) -> tuple[int, np.generic] | None:
    """A product of numbers with one that is repeated: (the numbers, that one). XLA multiplies such factors with each other."""
    if steps[i].name != "mul" or steps[i].dtype not in (np.float32, np.float64):
        return None
    one, other = steps[i].operands
    if steps[one].repeats:
        one, other = other, one
    value = _number(steps, other) if steps[other].repeats and not steps[one].repeats else None
    return None if value is None else (one, value)


def _number(steps: Sequence[Step], i: int) -> np.generic | None:
    """The number that a repeating step gives, where it does not matter who computes it."""
    step = steps[i]
    if step.name == "literal":
        return step.bound
    if step.name not in _EXACT or step.dtype not in (np.float32, np.float64):
        return None
    given = [_number(steps, j) for j in step.operands]
    if any(x is None or x.dtype != step.dtype for x in given):
        return None
    with np.errstate(all="ignore"):
        return _EXACT[step.name](*given)


class _Reader:
    """Reads the values of a chain."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.keys: list[Value] = []
        self.batch: tuple[int, ...] | None = None

    def body(self, region: Loop | None, wanted: Value, stack: tuple[int, ...]) -> Any:
        """What a value is, computed in the body of a loop (or in the trace) that runs in loops of these lengths."""
        env: dict[Any, Any] = {}

        def operand(v: Value) -> Any:
            if v.derived and is_key(v.aval):
                return self.key(v, region, stack)
            if v.kind == "constant":
                return self.literal(v.source, v.aval)
            if v.kind == "result" and not v.derived and v.region is region:
                return env[v.source, v.position]
            if v.kind == "stacked" and not v.derived and v.region is region:
                return env[v.source, v.position]
            raise _Unread

        for v in body_values(region, [wanted]):
            if v.kind == "stacked":
                inner = self.body(v.source, v.source.outputs[v.position], (*stack, v.source.length))
                if not isinstance(inner, _Array) or self.steps[inner.step].repeats:
                    raise _Unread
                env[v.source, v.position] = _Array(inner.step, (v.source.length, *inner.shape))
            elif v.kind != "result":
                raise _Unread
            elif (v.source, v.position) not in env:
                outs = self.equation(v.source.eqn, list(map(operand, v.source.inputs)))
                env.update(((v.source, i), x) for i, x in enumerate(outs))
        return operand(wanted)

    def key(self, v: Value, region: Loop | None, stack: tuple[int, ...]) -> _Key:
        if v.region is not region or str(v.aval.dtype) != "key<varscale_fry>":
            raise _Unread  # the same key in every step, or one whose words are not made one by one
        shape = tuple(v.aval.shape)
        if self.batch not in (None, (*stack, *shape)):
            raise _Unread
        self.batch = (*stack, *shape)
        if v not in self.keys:
            self.keys.append(v)
        return _Key(self.keys.index(v), shape)

    def literal(self, x: Any, aval: Any) -> _Array:
        if is_key(aval) or math.prod(aval.shape) != 1:
            raise _Unread
        number = np.asarray(x, aval.dtype).reshape(())[()]
        return _Array(self.add("literal", (str(number.dtype), number.tobytes()), (), number.dtype, True, number), aval.shape)

    def add(self, name: str, text: Hashable, operands: tuple[int, ...], dtype: Any, repeats: bool, bound: Any) -> int:
        self.steps.append(Step(name, text, operands, np.dtype(dtype), repeats, bound))
        return len(self.steps) - 1

    def jaxpr(self, jaxpr: Any, constants: Sequence[Any], given: Sequence[Any]) -> list[Any]:
        env = {v: self.literal(c, v.aval) for v, c in zip(jaxpr.constvars, constants, strict=True)}
        env |= dict(zip(jaxpr.invars, given, strict=True))

        def operand(atom: Any) -> Any:
            return self.literal(atom.val, atom.aval) if _compat.is_literal(atom) else env[atom]

        for eqn in jaxpr.eqns:
            env.update(zip(eqn.outvars, self.equation(eqn, list(map(operand, eqn.invars))), strict=True))
        return list(map(operand, jaxpr.outvars))

    def equation(self, eqn: Any, given: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        if name in CALLS and CALLS[name] in eqn.params:
            return self.jaxpr(*_compat.sub_jaxpr(eqn.params[CALLS[name]]), given)
        out = eqn.outvars[0].aval
        shape = tuple(out.shape)
        if name == "random_bits":
            (key,) = given
            width = eqn.params["bit_width"]
            if not isinstance(key, _Key) or shape != (*key.shape, *eqn.params["shape"]):
                raise _Unread
            return [_Array(self.add("bits", (key.slot, width), (), out.dtype, False, (key.slot, width)), shape)]
        if not all(isinstance(x, _Array) for x in given):
            raise _Unread
        repeats = all(self.steps[x.step].repeats for x in given)
        if name in ROW_MAJOR and (repeats or math.prod(given[0].shape) == math.prod(shape)):
            if len(given) != 1 or (name == "reshape" and eqn.params.get("dimensions") is not None):
                raise _Unread
            return [_Array(given[0].step, shape)]
        known = EVEN | _OF_WORDS | (_OF_ONE_NUMBER if repeats else frozenset())
        if name not in known or any(x.shape != shape and not self.steps[x.step].repeats for x in given):
            raise _Unread
        if name == "bitcast_convert_type" and out.dtype.itemsize != self.steps[given[0].step].dtype.itemsize:
            raise _Unread
        bound = functools.partial(eqn.primitive.bind, **eqn.params)
        return [_Array(self.add(name, params_text(eqn), tuple(x.step for x in given), out.dtype, repeats, bound), shape)]
