"""Programs that draw leaves: one for all leaves with equal chains, compiled side by side."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import os
import threading
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from varscale import _compat
from varscale.initialization.chains import Chain, evaluate, stacking
from varscale.initialization.derivation import wrapped
from varscale.initialization.graph import Value, is_key
from varscale.initialization.host_memory import filled
from varscale.initialization.laws import Core, Law, drawn


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A chain with what is done to what it draws.

    Attributes:
        chain: what is drawn.
        dtypes: what each of its leaves is rounded to; None where it stays as drawn.
        shardings: how each of its leaves is laid out; None for the default device.
        settings: jax's settings that the compiled program depends on.
        donated: the arguments whose memory the results take: none.
    """

    chain: Chain
    dtypes: tuple[np.dtype | None, ...]
    shardings: tuple[Any, ...]
    settings: Hashable
    donated: ClassVar[tuple[int, ...]] = ()

    @property
    def told(self) -> Hashable:
        """What the program is, without the values of the trace."""
        return self.chain.text, self.dtypes, self.shardings, self.settings

    @property
    def arguments(self) -> tuple[Value, ...]:
        """What it draws from."""
        return self.chain.arguments

    @property
    def argument_shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Their shapes and dtypes; keys as raw words."""
        return list(map(_argument_shape, self.arguments))

    @property
    def cost(self) -> int:
        """How many numbers it draws."""
        return sum(math.prod((*stacking(v), *v.aval.shape)) for v in self.chain.leaves)

    def __call__(self, *arguments: Any) -> list[Any]:
        """The leaves: traced by the program, from the arguments' numbers and raw keys."""
        outs = evaluate(self.chain, _typed(self.arguments, arguments))
        rounded = (x if dtype is None else x.astype(dtype) for x, dtype in zip(outs, self.dtypes, strict=True))
        return [jax.random.key_data(x) if is_key(x) else x for x in rounded]


@dataclasses.dataclass(frozen=True)
class LaidDrawing:
    """A law laid on a leaf.

    Attributes:
        law: the initializer.
        name: equal for laws that draw the same.
        core: what it draws, and what becomes of it.
        implementation: of the key.
        dtypes: the leaf's dtype.
        shardings: the leaf's sharding.
        declared: the chain of the declared law, where parts of the leaf keep it.
        settings: jax's settings that the compiled program depends on.
        donated: the arguments whose memory the results take: none.
    """

    law: Law = dataclasses.field(compare=False)
    name: Hashable
    core: Core
    implementation: Hashable
    dtypes: tuple[np.dtype]
    shardings: tuple[Any]
    declared: Chain | None
    settings: Hashable
    donated: ClassVar[tuple[int, ...]] = ()

    @property
    def told(self) -> Hashable:
        """What the program is, without the values of the trace."""
        declared = None if self.declared is None else self.declared.text
        core = self.core.shape, self.core.stack, self.core.text
        return self.name, core, self.implementation, self.dtypes, self.shardings, declared, self.settings

    @property
    def arguments(self) -> tuple[Value, ...]:
        """What the declared parts are drawn from; the leaf's own key comes before them."""
        return () if self.declared is None else self.declared.arguments

    @property
    def argument_shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the leaf's own key and of these; keys as raw words."""
        own = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=self.implementation)))  # pyright: ignore[reportArgumentType]
        return [own, *map(_argument_shape, self.arguments)]

    @property
    def cost(self) -> int:
        """How many numbers it draws."""
        return math.prod((*self.core.stack, *self.core.shape))

    def __call__(self, own: Any, *arguments: Any) -> list[Any]:
        """The leaf: traced by the program, from its own key and the arguments of the declared law."""
        declared = None
        if self.declared is not None:
            (declared,) = evaluate(self.declared, _typed(self.arguments, arguments))
            declared = declared.astype(self.dtypes[0])
        key = jax.random.wrap_key_data(own, impl=self.implementation)  # pyright: ignore[reportArgumentType]
        return [drawn(self.law, key, self.core, self.dtypes[0], declared)]


Program = Drawing | LaidDrawing


def _typed(values: Sequence[Value], arguments: Sequence[Any]) -> list[Any]:
    return [wrapped(x, v.aval.dtype) if is_key(v.aval) else x for v, x in zip(values, arguments, strict=True)]


def _argument_shape(v: Value) -> jax.ShapeDtypeStruct:
    shape = (*stacking(v), *v.aval.shape)
    if not is_key(v.aval):
        return jax.ShapeDtypeStruct(shape, v.aval.dtype, weak_type=getattr(v.aval, "weak_type", False))
    return jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, v.aval.dtype))


def settings() -> Hashable:
    """jax's settings that the bits of a program depend on."""
    return _compat.threefry_is_partitionable(), str(jax.config.jax_default_matmul_precision), jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]


class _Lowered:
    """A program that is traced and lowered, and compiled when first asked for, by whichever thread asks first."""

    def __init__(self, lowered: Any):
        self._lowered: Any = lowered
        self._compiled: Any = None
        self._lock = threading.Lock()

    @property
    def compiled(self) -> Any:
        with self._lock:
            if self._compiled is None:
                self._compiled = self._lowered.compile()
                self._lowered = None
        return self._compiled


class Told:
    """A program as the key of a cache: compared by what it draws, and let go once the entry is made.

    A program holds the values of its chain, and these the whole trace of its model.
    """

    def __init__(self, program: Any):
        self._program = program
        self._told = type(program), program.told

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Told) and self._told == other._told

    def __hash__(self) -> int:
        return hash(self._told)

    def take(self) -> Any:
        """The program, which is kept no longer."""
        program, self._program = self._program, None
        return program


@functools.lru_cache(maxsize=512)
def _kept(told: Told) -> _Lowered:
    program = told.take()
    places = None if all(s is None for s in program.shardings) else list(program.shardings)
    asked: dict[str, Any] = {} if places is None else {"out_shardings": places}
    jitted = jax.jit(program.__call__, donate_argnums=program.donated, keep_unused=bool(program.donated), **asked)
    return _Lowered(jitted.lower(*program.argument_shapes))


def _lowered(program: Any) -> _Lowered:
    return _kept(Told(program))


def compiled(program: Any) -> Any:
    """The program, compiled; kept, so that a second model of the same layers compiles nothing."""
    return _lowered(program).compiled


def compile_all(programs: Sequence[Any]) -> None:
    """Compile each distinct program once, side by side: the largest first, so that no thread ends with it alone.

    They are lowered in this thread: jax's settings, such as `jax.enable_x64`, may hold for it alone.
    """
    if not programs:
        return
    *others, last = sorted(set(programs), key=lambda p: -p.cost)
    with concurrent.futures.ThreadPoolExecutor(max(1, min(len(others), os.cpu_count() or 1))) as pool:
        waiting = [pool.submit(getattr, _lowered(program), "compiled") for program in others]
        compiled(last)  # by this thread: what memory that takes serves it again
        for future in waiting:
            future.result()


def spread(number: np.ndarray, shape: tuple[int, ...], dtype: np.dtype, sharding: Any) -> jax.Array:
    """An array of one number over several devices, without a program."""
    return jax.make_array_from_callback(shape, sharding, lambda index: filled(number, _part(shape, index), dtype))


def _part(shape: tuple[int, ...], index: Any) -> tuple[int, ...]:
    return tuple(len(range(*cut.indices(size))) for size, cut in zip(shape, index, strict=True))


def filling(v: Value) -> np.ndarray | None:
    """The number that fills a value made by repeating one."""
    while v.kind in ("result", "stacked"):
        if v.kind == "stacked":
            inner = v.source.outputs[v.position]
            if inner.kind == "step":
                return None
            v = inner
        elif v.source.eqn.primitive.name in ("broadcast_in_dim", "copy", "reshape"):
            v = v.source.inputs[0]
        else:
            return None
    if v.kind != "constant" or is_key(v.aval) or math.prod(v.aval.shape) != 1:
        return None
    return np.asarray(v.source, v.aval.dtype).reshape(())
