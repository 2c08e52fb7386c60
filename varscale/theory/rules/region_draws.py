"""Draws of a region: equations run on drawn weights, inputs and states, at some of their units and samples.

A loop over time is one such equation. The same weights act at every step, so steps are correlated in ways that no step alone
tells. Taken one by one, T steps have T² cross-moments; drawn, a thousand of them take a second.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from functools import cached_property, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from varscale.programs.pieces import is_key
from varscale.theory.domain.axes import Axis
from varscale.theory.domain.tables import NEGLIGIBLE
from varscale.theory.graph.layout import Value, axes_along, merged
from varscale.theory.graph.nodes import Array, Leaf, Node
from varscale.theory.integrals.primitives import COMPARISONS
from varscale.theory.propagation.inherited_fluctuations import SCALE_STEP
from varscale.theory.propagation.sampler import Drawing, evenly
from varscale.theory.rules.region_sizes import (
    CannotShrink,
    Program,
    Sizes,
    every_equation,
    has_own_kernels,
    over_draws,
    shrunk,
    work,
)
from varscale.theory.rules.registry import Opaque, parts

_REPLICATES = 16
_MOST_REPLICATES = 64  # where they take less time than it takes to compile them
_FEWEST_REPLICATES = 4
_TAIL = 1e-4  # probability that the mean of draws is further off than is said
_DRAWN_NUMBERS = 1 << 22  # numbers that the draws of one array of a region may hold
_WORK = 2e10  # multiplications that a region should take
_HELD_NUMBERS = 1 << 28  # numbers that all draws of all its equations should be
_SHORT = 1e9  # multiplications that take less time than it takes to compile them
_MOST_WORK = 1e12  # multiplications that one which does not shrink may take
_FEWEST_UNITS = 32  # units left of a layer: what n units differ by from infinitely many is of order 1/n
_SAMPLES = 4  # samples drawn of a batch


class CannotDraw(Exception):
    """A region that reads what cannot be drawn, or that even at its smallest is too much to run."""


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """An operand of a region."""

    value: tuple[Value, ...]  # its parts, each dimension of one atom at most; none for a random key
    key: Any  # the key, where it is one
    aval: Any  # its shape and type
    nudge: bool = False  # whether it is zeros that are added to an output where it is made

    @cached_property
    def weight(self) -> bool:
        """Whether it is independent zero-mean weights."""
        fresh = all(isinstance(x.node, Leaf) and x.node.odd and not x.node.is_input for x in self.value)
        return fresh and len(self.value) > 0 and len(self.aval.shape) > 1

    @property
    def random(self) -> bool:
        return any(not x.node.is_literal for x in self.value)

    @property
    def is_value(self) -> bool:
        """Whether it is something that other rows are made of, and no parameter."""
        return self.random and any(not isinstance(x.node, Leaf) or x.node.is_input for x in self.value)


def operand(x: Any, aval: Any, *, nudge: bool = False) -> Operand:
    """An operand of a region, of its value; none of random whole numbers (ids), whose law is not their moments."""
    if isinstance(x, Opaque):
        return Operand((), x.key, aval)
    if not (jnp.issubdtype(aval.dtype, jnp.inexact) or all(_is_decided(v.node) for v in parts(x))):
        raise CannotDraw("random whole numbers are read by it")
    flat = (reduce(merged, range(len(part.dims)), part) for part in parts(x))
    return Operand(tuple(flat), None, aval, nudge)


_COMBINED = {"convert", "and", "or", "not", "min", "max"}


def _is_decided(node: Node) -> bool:
    """Whether it is known, comparisons of real numbers, or logic of such: as good as what is compared when it is drawn."""
    combined = node.primitive in _COMBINED and all(_is_decided(view.node) for view in node.args)
    return combined or node.primitive in COMPARISONS or node.is_literal


@dataclasses.dataclass(frozen=True, eq=False)
class RegionDraws:
    """A region on draws of its operands."""

    jaxpr: Any  # its equations, closed
    operands: tuple[Operand, ...]  # what they read
    sizes: Sizes  # at which sizes they are run
    replicates: int  # how many draws of all its operands they are run on
    batch: int  # how many of these are run at a time

    @cached_property
    def drawing(self) -> Drawing:
        return Drawing(self.replicates, self.positions)

    def positions(self, axis: Axis) -> np.ndarray:
        """Which positions along an axis are drawn."""
        return evenly(axis.size, *self.sizes.shape([axis.size]))

    def draw(self, x: Value) -> np.ndarray:
        """A value drawn at its smaller sizes, (replicates, ...)."""
        numbers = self.drawing.at(x.node.whole, x.node.axes, list(map(self.positions, x.node.axes)))
        numbers = numbers.transpose([0, *(1 + k for k in axes_along(x.dims))])
        numbers = np.expand_dims(numbers, [1 + d for d, dim in enumerate(x.dims) if not axes_along([dim])])
        return np.broadcast_to(numbers, (self.replicates, *self.sizes.shape(x.shape)))

    @cached_property
    def drawn(self) -> list[Any]:
        """Every operand, drawn: (replicates, ...)."""
        out = []
        for x in self.operands:
            if x.value:
                re, *im = map(self.draw, x.value)
                out.append((re + 1j * im[0] if im else re).astype(x.aval.dtype))
            else:
                split = jax.vmap(lambda key: jax.random.split(key, self.replicates), out_axes=1)
                out.append(split(x.key.reshape(-1)).reshape(self.replicates, *x.key.shape))
        return out

    @cached_property
    def program(self) -> Program:
        """What is compiled."""
        asked = [(x.nudge or x.is_value) and jnp.issubdtype(x.aval.dtype, np.inexact) for x in self.operands]
        weights, floating = tuple(x.weight for x in self.operands), tuple(np.flatnonzero(asked).tolist())
        short = self.batch * work(self.jaxpr.jaxpr, self.sizes)[0] < _SHORT
        numbers = (jax.random.key_data(x) if is_key(x) else x for x in self.jaxpr.consts)
        written = f"{[hashlib.sha1(np.asarray(x).tobytes()).hexdigest() for x in numbers]} {self.jaxpr.jaxpr}"
        apart = any(map(has_own_kernels, every_equation(self.jaxpr.jaxpr)))
        return Program(self.jaxpr, self.sizes, written, weights, floating, short and not apart, apart)

    def _in_batches(self, method: Any, count: int, *arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """A method of the program on `count` draws, so many at a time: what is compiled does not depend on how many."""
        f = over_draws(method, short=self.program.short, apart=self.program.apart)
        batches = [slice(start, min(start + self.batch, count)) for start in range(0, count, self.batch)]
        found = [f(self.program, *([x[some] for x in own] for own in arrays)) for some in batches]
        return list(map(np.concatenate, zip(*found, strict=True)))

    @cached_property
    def raw(self) -> list[np.ndarray]:
        """Outputs on draws of the operands, (replicates, ...), as they come out of the program."""
        return self._in_batches(Program.run, self.replicates, self.drawn)

    @cached_property
    def outputs(self) -> list[np.ndarray]:
        """The same in finite numbers, dimensions of size 1 left out."""
        return [_numbers(x).reshape(len(x), *(n for n in x.shape[1:] if n > 1)) for x in self.raw]

    @cached_property
    def response(self) -> list[float]:
        """By output: d ln E[y²] / d ln q on the first batch, q the second moment of all that it reads and that is no weight."""
        scaled = list(self.drawn)
        for i, (x, o) in enumerate(zip(self.drawn, self.operands, strict=True)):
            if o.random and not o.weight and jnp.issubdtype(x.dtype, np.inexact):
                scaled[i] = x[: self.batch] * np.sqrt(1 + SCALE_STEP).astype(x.dtype)
        pairs = zip(self._in_batches(Program.run, self.batch, scaled), self.outputs, strict=True)
        moments = [(float(np.mean(_numbers(a) ** 2)), float(np.mean(b[: self.batch] ** 2))) for a, b in pairs]
        return [math.log(a / b) / math.log1p(SCALE_STEP) if a > 0 and b > 0 else 0.0 for a, b in moments]

    @cached_property
    def odd(self) -> list[int]:
        """By output: bits of the zero-mean weights that it is linear in: draw by draw another one is multiplied by −2."""
        found = [0] * len(self.raw)
        real = ((i, x) for i, x in enumerate(self.operands) if x.weight and len(x.value) == 1)
        weights = [(i, x.value[0].node.odd) for i, x in real]
        for start in range(0, len(weights), self.batch):
            some, turned = weights[start : start + self.batch], list(self.drawn)
            for draw, (i, _) in enumerate(some):
                turned[i] = np.array(turned[i][: self.batch])
                turned[i][draw] *= -2
            ys = self._in_batches(Program.run, self.batch, turned)
            for k, (y, x) in enumerate(zip(ys, self.raw, strict=True)):
                for draw, (_, bit) in enumerate(some):
                    rounding = NEGLIGIBLE * np.abs(x[draw]).max(initial=0.0)
                    if np.allclose(y[draw], -2 * x[draw], rtol=0.0, atol=rounding):
                        found[k] |= bit
        return found

    def back(self, which: int, seed: np.ndarray) -> list[np.ndarray | None]:
        """Cotangents of the operands, (replicates, ...), given those of one output; None where none are asked of."""
        seeds = [np.zeros((len(seed), *x.shape[1:]), np.float32) for x in self.raw]
        seeds[which] = seed.astype(np.float32).reshape(seeds[which].shape)
        real = [x for x, out in zip(seeds, self.raw, strict=True) if jnp.issubdtype(out.dtype, np.inexact)]
        found = self._in_batches(Program.back, len(seed), self.drawn, real)
        passed = dict(zip(self.program.floating, found, strict=True))
        clean = (passed.get(i) for i in range(len(self.operands)))
        return [x if x is None or np.iscomplexobj(x) else _numbers(x) for x in clean]


def with_enough_draws(draws: RegionDraws, bound: float) -> RegionDraws:
    """So many draws that the outputs' mean squares are known to this, or as many numbers as there may be."""
    largest = max((numbers[0].size for numbers in draws.outputs), default=1)
    most = _DRAWN_NUMBERS // max(draws.batch * largest, 1)
    while draws.replicates < draws.batch * most:
        error = max(map(relative_error, draws.outputs), default=0.0)
        if error <= bound:
            break
        # The error goes by the root of the draws; of few, by Student's law, it is larger.
        surer = special.ndtri(1 - _TAIL / 2) / special.stdtrit(draws.replicates - 1, 1 - _TAIL / 2)
        batches = math.ceil(draws.replicates * (error / bound) ** 2 * surer / draws.batch)
        batches = min(max(batches, 2 * draws.replicates // draws.batch), most)
        draws = dataclasses.replace(draws, replicates=draws.batch * batches)
    return draws


def relative_error(draws: np.ndarray) -> float:
    """How far the mean square of independent draws may be off by chance: a t-quantile at 1e-4 of their logarithms."""
    squares = np.mean(np.square(np.abs(draws), dtype=float).reshape(len(draws), -1), axis=1)
    n, relative = len(squares), squares / max(squares.mean(), 1e-300)
    logarithms = np.log(np.maximum(relative, 1e-12))
    scatter = max(relative.std(), logarithms.std() if squares.any() else 0.0)
    return float(special.stdtrit(n - 1, 1 - _TAIL / 2) * scatter) / math.sqrt(n - 1)


def _numbers(x: Any) -> np.ndarray:
    return np.nan_to_num(np.asarray(x, np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def sizes_to_run(jaxpr: Any, operands: Sequence[Operand]) -> tuple[Sizes, int]:
    """Sizes, and a number of draws, at which equations can be run: their own, or fewer samples, or fewer units, too."""
    cost, held = np.maximum(work(jaxpr.jaxpr, Sizes({})), 1.0)
    fits = min(_WORK / (4 * cost), _HELD_NUMBERS / held)  # backward: about three times as much
    if fits >= _REPLICATES / 2:
        return Sizes({}), int(min(fits, np.clip(_SHORT / cost, _REPLICATES, _MOST_REPLICATES)))
    read = [x for x in operands if not x.nudge]
    units = {n for x in read if x.weight or (x.value and len(x.aval.shape) == 1) for n in x.aval.shape}
    samples = {n for x in read if x.value for n in x.aval.shape} - units
    every = {n for eqn, _ in every_equation(jaxpr.jaxpr) for v in eqn.outvars for n in v.aval.shape}
    # Kernels of several gates laid side by side are as many times as wide as a layer.
    units |= {n for n in every - samples if any(n % m == 0 for m in units if m >= _FEWEST_UNITS)}
    nodes = [v.node for x in read for v in x.value]
    apart = {a.size for node in nodes for a in node.axes if isinstance(node, Array) or a.classes > 1}
    kept = {n for n in units | samples if n < 2 * _SAMPLES} | apart
    few = {n: next(m for m in range(min(_SAMPLES, n), n + 1) if n % m == 0) for n in samples}
    ratio, weights = 1, [x.weight for x in operands]
    while True:
        fewer = {n: n // ratio for n in units if n % ratio == 0 and n // ratio >= _FEWEST_UNITS}
        sizes = Sizes({n: m for n, m in {**fewer, **few}.items() if n not in kept and m < n})
        try:
            shrunk(jaxpr, weights, sizes)
        except CannotShrink as trouble:
            kept |= trouble.args[0]
            continue
        fits = _WORK / (4 * work(jaxpr.jaxpr, sizes)[0])
        if fits < _REPLICATES and any(n // (2 * ratio) >= _FEWEST_UNITS for n in units - kept):
            ratio *= 2
        elif fits * _MOST_WORK < _WORK * _FEWEST_REPLICATES:
            raise CannotDraw("it is too large at its smallest")
        else:
            return sizes, int(np.clip(fits, _FEWEST_REPLICATES, _REPLICATES))
