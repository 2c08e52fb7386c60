"""Loops over time, run on drawn weights, inputs and states, at some of their units and samples.

The same weights act at every step, so steps are correlated in ways that no step alone tells. Taken one by one, T steps have T²
cross-moments; drawn, a thousand of them take a second.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varscale import _compat
from varscale.theory.graph.expressions import Apply
from varscale.theory.graph.layout import Value, merged
from varscale.theory.graph.nodes import Array, Constant, Leaf, Node, View
from varscale.theory.propagation.sampler import Drawing, evenly
from varscale.theory.rules.prefix_scans import sub_jaxpr_of
from varscale.theory.rules.region_sizes import CannotShrink, Sizes, run, work
from varscale.theory.rules.registry import Opaque, parts

_REPLICATES = 16
_MOST_REPLICATES = 64
_FEWEST_REPLICATES = 4
_TRUSTED = 20.0  # squared standard errors that a mean square is trusted to: a normal's quantile at 1e-5
_DRAWN_NUMBERS = 1 << 21  # numbers that the draws of one array of a region may hold
_WORK = 2e10  # multiplications that a loop should take
_MOST_WORK = 1e12  # multiplications that one which does not shrink may take: steps taken one by one would take longer
_FEWEST_UNITS = 32  # units that are left of a layer: what n units differ by from infinitely many is of order 1/n
_SAMPLES = 4  # samples drawn of a batch
_INPUT_STEP = 0.1  # relative step in the second moment of the inputs for the response to it


class CannotDraw(Exception):
    """A loop that reads what cannot be drawn, or that even at its smallest is too much to run."""


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """An operand of a loop.

    Attributes:
        value: the parts of its value, each dimension of one atom at most; none for a random key.
        key: the key, where it is one.
        aval: its shape and type.
        stacked: whether it has a row a step.
        weight: whether it is independent zero-mean weights.
    """

    value: tuple[Value, ...]
    key: Any
    aval: Any
    stacked: bool
    weight: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape at one step."""
        return tuple(self.aval.shape)[self.stacked :]

    @property
    def random(self) -> bool:
        return any(not isinstance(x.node, Constant | Array) for x in self.value)


def operand(x: Any, aval: Any, *, stacked: bool) -> Operand:
    """An operand of a loop, of its value.

    Raises:
        CannotDraw: it is random whole numbers (ids), whose law is not their moments.
    """
    if isinstance(x, Opaque):
        return Operand((), x.key, aval, stacked, False)
    known = jnp.issubdtype(aval.dtype, jnp.inexact) or all(isinstance(v.node, Constant | Array) for v in parts(x))
    if not known and not all(_is_decided(v.node) for v in parts(x)):
        raise CannotDraw
    flat = []
    for part in parts(x):
        for d in range(len(part.dims)):
            part = merged(part, d)
        flat.append(part)
    weight = all(isinstance(p.node, Leaf) and p.node.odd and not p.node.is_input for p in flat) and not stacked
    return Operand(tuple(flat), None, aval, stacked, weight and len(aval.shape) > 1)


_COMPARED = {"lt", "le", "gt", "ge", "eq", "ne"}
_COMBINED = {"convert", "and", "or", "not", "min", "max"}


def _is_decided(node: Node) -> bool:
    """Whether it is comparisons of real numbers, or logic of such: as good as what is compared when it is drawn."""
    if not isinstance(node, Apply):
        return isinstance(node, Constant | Array)
    return node.params[0] in _COMPARED or (node.params[0] in _COMBINED and all(_is_decided(view.node) for view in node.args))


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """A scan over time.

    Attributes:
        params: the equation's parameters.
        operands: its constants, its carry and its streams.
        sizes: at which sizes it is run.
        replicates: how many draws of all its operands it is run on.
        seed: where these come from; another one for every loop, whose weights would otherwise be the same.
    """

    params: dict[str, Any]
    operands: tuple[Operand, ...]
    sizes: Sizes
    replicates: int
    seed: int

    @functools.cached_property
    def drawing(self) -> Drawing:
        return Drawing((), self.replicates, self.seed, lambda axis: evenly(axis.size, self.sizes.shape([axis.size])[0]))

    def positions(self, x: Value, *, stacked: bool) -> list[np.ndarray]:
        """Which positions of a value's node are drawn, axis by axis."""
        out: list[np.ndarray] = [np.zeros(0, int)] * len(x.node.axes)
        for d, dim in enumerate(x.dims):
            for atom in dim:
                if atom.axis is not None:
                    kept = atom.size if stacked and d == 0 else self.sizes.shape([atom.size])[0]
                    out[atom.axis] = evenly(atom.size, kept)
        return out

    def draw(self, x: Value, *, stacked: bool) -> np.ndarray:
        """A value drawn at its smaller sizes, (replicates, ...)."""
        numbers = self.drawing.over(x.node.axes).values(
            View(x.node, tuple(range(len(x.node.axes)))), self.positions(x, stacked=stacked)
        )
        sizes = [n if stacked and d == 0 else self.sizes.shape([n])[0] for d, n in enumerate(x.shape)]
        axes = [a.axis for dim in x.dims for a in dim if a.axis is not None]
        numbers = np.moveaxis(numbers, -1, 0).transpose([0, *(1 + k for k in axes)])
        lengths = iter(numbers.shape[1:])
        shape = [next(lengths) if any(a.axis is not None for a in dim) else 1 for dim in x.dims]
        numbers = numbers.reshape(len(numbers), *shape)
        return np.broadcast_to(numbers, (self.replicates, *sizes))

    @functools.cached_property
    def drawn(self) -> list[Any]:
        """Every operand, drawn: (replicates, ...)."""
        out = []
        for x in self.operands:
            if not x.value:
                out.append(jnp.stack([x.key] * self.replicates))
                continue
            re, *im = [self.draw(part, stacked=x.stacked) for part in x.value]
            out.append((re + 1j * im[0] if im else re).astype(x.aval.dtype))
        return out

    def _run(self, *operands: Any) -> list[jax.Array]:
        """One run: every output at the smaller sizes, the parts of complex ones in succession."""
        jaxpr, literals = _compat.sub_jaxpr(self.params["jaxpr"])
        fixed, carry, streams = _compat.scan_operands(self.params, list(operands))
        weights = [x.weight for x in self.operands]

        def step(now: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
            out = run(jaxpr, literals, [*fixed, *now, *row], weights, self.sizes)
            return out[: len(now)], out[len(now) :]

        last, rows = jax.lax.scan(step, carry, streams, length=self.params["length"], reverse=self.params["reverse"])
        return [part for x in (*last, *rows) for part in _real_arrays(x)]

    @functools.cached_property
    def _runs(self) -> Any:
        return jax.jit(jax.vmap(self._run))

    def run_on(self, operands: Sequence[Any]) -> list[np.ndarray]:
        """Outputs on given draws of the operands."""
        return [_numbers(x) for x in self._runs(*operands)]

    @functools.cached_property
    def outputs(self) -> list[np.ndarray]:
        """Outputs on draws of the operands, (replicates, ...)."""
        return self.run_on(self.drawn)

    @functools.cached_property
    def response(self) -> list[float]:
        """By output: d ln E[y²] / d ln q, where q is the second moment of all that it reads and that is no weight."""
        louder = [
            x * np.sqrt(1 + _INPUT_STEP).astype(x.dtype)
            if o.random and not o.weight and np.issubdtype(x.dtype, np.inexact)
            else x
            for x, o in zip(self.drawn, self.operands, strict=True)
        ]
        pairs = zip(self.run_on(louder), self.outputs, strict=True)
        return [float(np.log(np.mean(a**2) / np.mean(b**2)) / np.log1p(_INPUT_STEP)) if np.any(b) else 0.0 for a, b in pairs]

    @property
    def memory(self) -> int:
        """Bytes that a backward pass keeps of one draw, roughly."""
        jaxpr, _ = _compat.sub_jaxpr(self.params["jaxpr"])
        made = (v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars)
        return 4 * self.params["length"] * sum(math.prod(self.sizes.shape(shape)) for shape in made)

    @property
    def width_ratio(self) -> float:
        """How many units each one that is left stands for."""
        weights = [n for x in self.operands if x.weight for n in x.shape]
        return max((self.sizes.ratio([n]) for n in weights), default=1.0)

    def back(self, which: int, seed: np.ndarray) -> list[np.ndarray | None]:
        """Cotangents of the operands, (replicates, ...), given those of one output; none for keys and whole numbers."""
        floating = [i for i, x in enumerate(self.operands) if x.value and np.issubdtype(x.aval.dtype, np.inexact)]
        out: list[np.ndarray | None] = [None] * len(self.operands)
        some = [x[: len(seed)] for x in self.drawn]
        found = self._vjp(which, tuple(floating), some, seed)
        for i, x in zip(floating, found, strict=True):
            out[i] = np.asarray(x) if np.iscomplexobj(x) else _numbers(x)
        return out

    @functools.cached_property
    def _vjp(self) -> Any:
        def one(which: int, floating: tuple[int, ...], operands: list[Any], seed: jax.Array) -> Any:
            def f(*xs: jax.Array) -> jax.Array:
                whole = list(operands)
                for i, x in zip(floating, xs, strict=True):
                    whole[i] = x
                return self._run(*whole)[which]

            out, pull = jax.vjp(f, *[operands[i] for i in floating])
            return pull(seed.astype(out.dtype))

        def back(which: int, floating: tuple[int, ...], operands: list[Any], seed: jax.Array) -> Any:
            return jax.vmap(lambda xs, g: one(which, floating, xs, g))(operands, seed)

        return jax.jit(back, static_argnums=(0, 1))


def enough(loop: Loop, bound: float) -> Loop:
    """The loop on as many draws as it takes to know its outputs' mean squares to this, within what a drawn array may hold."""
    if bound == math.inf:
        return loop
    worst, largest = 0.0, 1
    for numbers in loop.outputs:
        squares = np.mean(numbers.reshape(len(numbers), -1).astype(float) ** 2, axis=1)
        worst = max(worst, float(squares.std() / max(squares.mean(), 1e-300)))
        largest = max(largest, numbers[0].size)
    wanted = min(_TRUSTED * (worst / bound) ** 2, _DRAWN_NUMBERS / largest)
    # A power of two, so that regions that read the same arrays are drawn on the same numbers of them.
    return dataclasses.replace(loop, replicates=2 ** max(int(math.log2(max(wanted, 1.0))) + 1, 6))


def _real_arrays(x: jax.Array) -> tuple[jax.Array, ...]:
    """An output as real arrays; of a random key nothing is told."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return (jnp.zeros(()),)
    return (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)


def _numbers(x: Any) -> np.ndarray:
    return np.nan_to_num(np.asarray(x).astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def shrunk(params: dict[str, Any], operands: Sequence[Operand]) -> tuple[Sizes, int]:
    """Sizes, and a number of draws, at which a loop can be run.

    Raises:
        CannotDraw: there are none.
    """
    jaxpr, _ = _compat.sub_jaxpr(params["jaxpr"])
    units = {n for x in operands if x.weight or (x.value and not x.stacked and len(x.shape) == 1) for n in x.shape}
    samples = {n for x in operands if x.value for n in x.shape} - units
    # Kernels of several gates laid side by side are as many times as wide as a layer.
    units |= {n for n in _all_sizes(jaxpr) - samples if any(n % unit == 0 for unit in units if unit >= _FEWEST_UNITS)}
    told = {n for x in operands for v in x.value for n in _told_apart(v, stacked=x.stacked)}
    kept: set[int] = {n for n in units | samples if n < 2 * _SAMPLES} | told
    ratio = 1
    few = {n: _divisor(n) for n in samples}
    while True:
        smaller = {n: n // ratio for n in units - kept if n % ratio == 0 and n // ratio >= _FEWEST_UNITS and ratio > 1}
        smaller.update({n: m for n, m in few.items() if n not in kept and m < n})
        sizes = Sizes(smaller)
        trouble = _unfit(params, operands, sizes)
        if trouble:
            kept |= trouble
            continue
        # Backward takes about three times as much.
        cost = 4 * params["length"] * work(jaxpr, sizes)
        if cost * _REPLICATES <= _WORK:
            return sizes, int(np.clip(_WORK / cost, _REPLICATES, _MOST_REPLICATES))
        if any(n // (2 * ratio) >= _FEWEST_UNITS for n in units - kept):
            ratio *= 2
        elif cost * _FEWEST_REPLICATES <= _MOST_WORK:
            return sizes, int(np.clip(_WORK / cost, _FEWEST_REPLICATES, _REPLICATES))
        else:
            raise CannotDraw


def _all_sizes(jaxpr: Any) -> set[int]:
    """The sizes of all axes in a jaxpr."""
    out = {n for eqn in jaxpr.eqns for v in eqn.outvars for n in getattr(v.aval, "shape", ())}
    inner = [sub for eqn in jaxpr.eqns if (sub := sub_jaxpr_of(eqn)) is not None]
    return out.union(*(_all_sizes(_compat.sub_jaxpr(sub)[0]) for sub in inner))


def _told_apart(x: Value, *, stacked: bool) -> set[int]:
    """Sizes of the axes of a value, but for time's, along which positions differ."""
    own = [x.node.axes[a.axis] for dim in x.dims[stacked:] for a in dim if a.axis is not None]
    return {axis.size for axis in own if isinstance(x.node, Array) or axis.classes > 1}


def _divisor(n: int) -> int:
    """The smallest divisor of a batch that still is some samples."""
    return next(m for m in range(min(_SAMPLES, n), n + 1) if n % m == 0)


def _unfit(params: dict[str, Any], operands: Sequence[Operand], sizes: Sizes) -> set[int]:
    """Sizes that have to stay for a step to end with the carry it began with; none where it does."""
    jaxpr, literals = _compat.sub_jaxpr(params["jaxpr"])
    args = [jax.ShapeDtypeStruct(sizes.shape(v.aval.shape), v.aval.dtype) for v in jaxpr.invars]
    weights = [x.weight for x in operands]
    try:
        outs = jax.eval_shape(lambda *xs: run(jaxpr, literals, list(xs), weights, sizes), *args)
    except CannotShrink as trouble:
        return set(trouble.sizes) & set(sizes.smaller)
    except TypeError:
        return set(sizes.smaller)
    if any(out.shape != sizes.shape(v.aval.shape) for out, v in zip(outs, jaxpr.outvars, strict=True)):
        return set(sizes.smaller)
    return set()
