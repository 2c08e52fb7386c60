"""Keys derived from keys in NumPy: what a jitted program would take a second to compile takes a millisecond here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varscale import _compat
from varscale.initialization.graph import Loop, Value, is_key
from varscale.initializers.sampling import unrolled_key

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_WORD = 0xFFFFFFFF
_THREEFRY = frozenset({"key<fry>", "key<varscale_fry>"})
Words = np.ndarray


def is_traced(key: Any) -> bool:
    """Whether what is made of a key has no numbers yet: it is a tracer, or a jitted function closes over it."""
    return _compat.is_tracer(jax.random.key_data(key))


def threefry_2x32(key: Words, high: Words, low: Words) -> tuple[Words, Words]:
    """The Threefry-2x32 hash of the counters (high, low) under keys of shape (*batch, 2), in NumPy.

    Source: Salmon et al. 2011, section 3.3, as `varscale.initializers.sampling` has it for XLA.
    """
    x, y, first, second = high, low, key[..., 0], key[..., 1]
    if key.ndim == 1 and low.ndim == 0:  # one hash: Python's integers take a sixth of the time of NumPy's
        x, y, first, second = map(int, (x, y, first, second))
    schedule = (first, second, first ^ second ^ _PARITY)
    x, y = x + schedule[0] & _WORD, y + schedule[1] & _WORD
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y & _WORD
            y = (y << rotation & _WORD | y >> 32 - rotation) ^ x
        x = x + schedule[(group + 1) % 3] & _WORD
        y = y + schedule[(group + 2) % 3] + group + 1 & _WORD
    return np.asarray(x, np.uint32), np.asarray(y, np.uint32)


def fold_in(key: Words, data: Any) -> Words:
    """`jax.random.fold_in` of Threefry keys (*batch, 2) with data of the batch's shape."""
    word = np.asarray(data).astype(np.uint32)
    return np.stack(threefry_2x32(key, np.zeros_like(word), word), axis=-1)


def split(key: Words, shape: Sequence[int], partitionable: bool) -> Words:
    """`jax.random.split` of Threefry keys (*batch, 2): keys (*batch, *shape, 2)."""
    count = int(np.prod(shape, dtype=np.int64))
    batched = key[..., None, :]
    if partitionable:
        low = np.arange(count, dtype=np.uint32)
        words = np.stack(threefry_2x32(batched, np.zeros_like(low), low), axis=-1)
    else:  # the older scheme pairs the two halves of 0 … 2n − 1
        counters = np.arange(2 * count, dtype=np.uint32)
        words = np.concatenate(threefry_2x32(batched, counters[:count], counters[count:]), axis=-1)
    return words.reshape(*key.shape[:-1], *shape, 2)


@dataclasses.dataclass
class _Frame:
    """One step of a loop: what was computed in it, and what its carries are."""

    loop: Loop | None
    step: int
    parent: _Frame | None
    known: dict[Value, Any]


class Derivation:
    """The derived values of a trace for one key.

    Where keys are traced (inside jit, or mapped by vmap), values are jax's; otherwise they are NumPy arrays, keys as their raw
    words.
    """

    def __init__(self, keys: Mapping[Value, Any], *, traced: bool = False):
        self.traced = traced or any(map(is_traced, keys.values()))
        self.partitionable = _compat.threefry_is_partitionable()
        given = dict(keys) if self.traced else {v: np.asarray(jax.random.key_data(k)) for v, k in keys.items()}
        self.top = _Frame(None, 0, None, given)
        self.frames: dict[tuple[Loop, int], list[_Frame]] = {}

    def value(self, v: Value) -> Any:
        """The value; one inside loops for all their steps, along leading axes, the outermost loop first."""
        return self._stacked(v, v.region, self.top)

    def _stacked(self, v: Value, region: Loop | None, frame: _Frame) -> Any:
        path = []
        while region is not frame.loop:
            path.append(region)
            region = region.parent  # pyright: ignore[reportOptionalMemberAccess]
        if not path:
            return self._at(v, frame)
        return self._stack([self._stacked(v, v.region, inner) for inner in self._steps(path[-1], frame)])

    def _stack(self, values: list[Any]) -> Any:
        return jnp.stack(values) if self.traced else np.stack(values)

    def _steps(self, loop: Loop, parent: _Frame) -> list[_Frame]:
        """A frame a step, by position in the streams; carries are computed as the loop runs."""
        if (loop, id(parent)) not in self.frames:
            order = range(loop.length)[:: -1 if loop.reverse else 1]
            before: _Frame | None = None
            frames = {}
            for step in order:
                frame = _Frame(loop, step, parent, {})
                for i, carry in enumerate(loop.carries):
                    if carry.known:
                        frame.known[carry] = (
                            self._at(loop.start[i], parent) if before is None else self._at(loop.outputs[i], before)
                        )
                frames[step] = before = frame
            self.frames[loop, id(parent)] = [frames[i] for i in range(loop.length)]
        return self.frames[loop, id(parent)]

    def _at(self, wanted: Value, frame: _Frame) -> Any:
        """A value in a frame. What it needs is computed first, without recursion along the trace, which may be long."""
        waiting = [wanted]
        while waiting:
            v = waiting[-1]
            home = _home(v, frame)
            if v in home.known:
                waiting.pop()
                continue
            if v.kind == "result":
                missing = [x for x in v.source.inputs if x.kind == "result" and x not in _home(x, frame).known]
                if missing:
                    waiting.extend(missing)
                    continue
            home.known[v] = self._computed(v, home)
            waiting.pop()
        return _home(wanted, frame).known[wanted]

    def _computed(self, v: Value, frame: _Frame) -> Any:
        if v.kind == "constant":
            return self._constant(v)
        if v.kind == "step":
            return self._at(v.source.streams[v.position], frame.parent)[frame.step]  # pyright: ignore[reportArgumentType]
        if v.kind in ("stacked", "final"):
            loop = v.source
            steps = self._steps(loop, frame)
            if v.kind == "stacked":
                return self._stack([self._at(loop.outputs[v.position], step) for step in steps])
            if not steps:
                return self._at(loop.start[v.position], frame)
            return self._at(loop.outputs[v.position], steps[0 if loop.reverse else -1])
        eqn, inputs = v.source.eqn, [self._at(x, frame) for x in v.source.inputs]
        return self._operation(eqn, inputs, [x.aval for x in v.source.inputs])[v.position]

    def _constant(self, v: Value) -> Any:
        if self.traced:
            return v.source if is_key(v.aval) else jnp.asarray(v.source, v.aval.dtype)
        return np.asarray(jax.random.key_data(v.source)) if is_key(v.aval) else np.asarray(v.source, v.aval.dtype)

    def _operation(self, eqn: Any, inputs: list[Any], avals: Sequence[Any]) -> Sequence[Any]:
        by_numpy = None if self.traced else _NUMPY.get(eqn.primitive.name)
        if by_numpy is not None and all(str(a.dtype) in _THREEFRY for a in avals if is_key(a)):
            found = by_numpy(self, eqn.params, inputs, avals)
            if found is not None:
                return found if isinstance(found, tuple) else (found,)
        if self.traced:
            return _compat.evaluated(eqn, inputs)
        typed = [wrapped(x, a.dtype) if is_key(a) else jnp.asarray(x, a.dtype) for x, a in zip(inputs, avals, strict=True)]
        with jax.ensure_compile_time_eval():
            outs = _compat.evaluated(eqn, typed)
        return [np.asarray(jax.random.key_data(x)) if is_key(x) else np.asarray(x) for x in outs]


def _home(v: Value, frame: _Frame) -> _Frame:
    """The frame of the loop that a value is computed in: this one or one around it."""
    while frame.loop is not v.region:
        if frame.parent is None:
            raise ValueError("a value is asked for outside the loop that it is computed in")
        frame = frame.parent
    return frame


def wrapped(words: Any, dtype: Any) -> Any:
    """Raw words as keys of a key dtype."""
    name = str(dtype)
    if name == "key<varscale_fry>":
        return unrolled_key(jax.random.wrap_key_data(words, impl="threefry2x32"))
    return jax.random.wrap_key_data(words, impl=_compat.implementation(dtype))


def _fold_in(_: Derivation, __: Any, inputs: list[Any], ___: Any) -> Words:
    return fold_in(*inputs)


def _split(derivation: Derivation, params: Any, inputs: list[Any], _: Any) -> Words:
    return split(inputs[0], params["shape"], derivation.partitionable)


def _same(_: Derivation, __: Any, inputs: list[Any], ___: Any) -> Any:
    return inputs[0]


def _seed(_: Derivation, params: Any, inputs: list[Any], avals: Any) -> Words | None:
    if "threefry" not in str(params["impl"]) or avals[0].dtype.itemsize > 4 or not np.issubdtype(avals[0].dtype, np.integer):
        return None
    low = np.asarray(inputs[0]).astype(np.uint32)
    return np.stack([np.zeros_like(low), low], axis=-1)


def _wrap(_: Derivation, params: Any, inputs: list[Any], __: Any) -> Words | None:
    return inputs[0]


def _add(_: Derivation, params: Any, inputs: list[Any], avals: Any) -> Any:
    with np.errstate(over="ignore"):
        return np.asarray(inputs[0] + inputs[1], avals[0].dtype)


def _convert(_: Derivation, params: Any, inputs: list[Any], avals: Any) -> Any:
    return np.asarray(inputs[0]).astype(params["new_dtype"])


def _slice(_: Derivation, params: Any, inputs: list[Any], __: Any) -> Any:
    strides = params["strides"] or (1,) * len(params["start_indices"])
    cut = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return inputs[0][tuple(slice(*c) for c in cut)]


def _squeeze(_: Derivation, params: Any, inputs: list[Any], avals: Any) -> Any:
    rank = len(avals[0].shape)
    return inputs[0].squeeze(tuple(d % rank for d in params["dimensions"]))


def _unstack(_: Derivation, params: Any, inputs: list[Any], avals: Any) -> tuple[Any, ...]:
    return tuple(np.moveaxis(inputs[0], params["axis"] % len(avals[0].shape), 0))


_NUMPY: dict[str, Callable[[Derivation, Any, list[Any], Any], Any]] = {
    "random_fold_in": _fold_in,
    "random_split": _split,
    "random_unwrap": _same,
    "random_clone": _same,
    "random_seed": _seed,
    "random_wrap": _wrap,
    "add": _add,
    "convert_element_type": _convert,
    "slice": _slice,
    "squeeze": _squeeze,
    "unstack": _unstack,
}
