"""Leaves drawn tile by tile: one program for every leaf that shares a formula, whatever its shape.

A tile is a stretch of one leaf. The program draws many tiles at once, each with the key, the offset and the last factor of its
own leaf, and the threads of the host copy what it draws into arrays that jax then takes over without a copy. This serves the
CPU, where compiling a program takes longer than drawing a million numbers; elsewhere, and where leaves are laid out over
several devices, every leaf has a program of its own (`drawing`).
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varscale import _compat
from varscale.initialization import formulas
from varscale.initialization.drawing import Drawing, LaidDrawing, compiled
from varscale.initialization.formulas import Formula
from varscale.initialization.host_memory import Space, reserved

_TILE = 1024
_FEW, _MANY = 192, 1024  # tiles a call: few take little memory, many make calls cheap
_AHEAD = 1  # calls that a thread has started when it waits for the first of them
_LARGE = 2**26  # numbers of a model from which on calls are to be cheap
_SMALL = 2**20  # numbers that it takes no time worth saving to draw


def _one_word(even: jax.Array, odd: jax.Array) -> jax.Array:
    low, high = (jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) for x in (even, odd))
    return low | high << 16


# How two neighbours become one number, by their bytes. A loop that draws both loads the constants of their formula once:
# it takes four fifths of the time.
_PAIRS: dict[int, Callable[[jax.Array, jax.Array], jax.Array]] = {2: _one_word, 4: jax.lax.complex}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The program that draws tiles of leaves with this formula.

    Attributes:
        formula: of their numbers.
        count: how many tiles a call draws.
        settings: jax's settings that the compiled program depends on.
    """

    formula: Formula
    count: int
    settings: Hashable

    @property
    def told(self) -> Hashable:
        """What the program is."""
        return self.formula, self.count, self.settings

    @property
    def shardings(self) -> tuple[None]:
        """The default device."""
        return (None,)

    @property
    def argument_shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Of each tile the words of its keys, its offset in the leaf, and the leaf's last factor; memory for the result."""
        return [
            jax.ShapeDtypeStruct((self.count, self.formula.keys, 2), np.uint32),
            jax.ShapeDtypeStruct((self.count,), np.uint32),
            jax.ShapeDtypeStruct((self.count,), self.formula.scaled or np.float32),
            self.result,
        ]

    @property
    def donated(self) -> tuple[int]:
        """The argument whose memory the result takes."""
        return (3,)

    @property
    def result(self) -> jax.ShapeDtypeStruct:
        """The numbers as the program lays them out: pairs as one number of twice the size."""
        dtype = {2: np.uint32, 4: np.complex64}[self.formula.dtype.itemsize] if self._pair else self.formula.dtype
        return jax.ShapeDtypeStruct((self.count, _TILE // (2 if self._pair else 1)), dtype)

    @property
    def _pair(self) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
        return _PAIRS.get(self.formula.dtype.itemsize) if jnp.issubdtype(self.formula.dtype, jnp.floating) else None

    @property
    def cost(self) -> int:
        """How many numbers a call draws."""
        return self.count * _TILE

    def __call__(self, words: jax.Array, offset: jax.Array, factor: jax.Array, _: jax.Array) -> jax.Array:
        """The numbers of the tiles, as the program lays them out in memory: traced by the program."""
        keys = [(words[:, i, :1], words[:, i, 1:]) for i in range(self.formula.keys)]
        pair = self._pair
        together = 1 if pair is None else 2
        index = together * jax.lax.broadcasted_iota(jnp.uint32, (self.count, _TILE // together), 1) + offset[:, None]
        formula = jax.jit(self.formula)  # traced and lowered once for both of a pair
        drawn = [formula(keys, index + np.uint32(i), factor[:, None]) for i in range(together)]
        return drawn[0] if pair is None else pair(*drawn)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What is drawn for one leaf.

    Attributes:
        program: what draws it.
        words: the words of its keys, (draws, keys, 2): it is made of so many draws, one after the other in memory.
        factor: its last factor.
        size: how many numbers a draw has.
        shape: of the leaf.
    """

    program: Tiles
    words: np.ndarray
    factor: np.generic
    size: int
    shape: tuple[int, ...]


def serves() -> bool:
    """Whether leaves for the default device are drawn tile by tile."""
    device: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    platform = jax.default_backend() if device is None else getattr(device, "platform", device)
    return platform == "cpu" and _compat.threefry_is_partitionable()


def tiled(
    programs: Mapping[int, Drawing | LaidDrawing], arguments: Mapping[int, Callable[[], Sequence[Any]]]
) -> dict[int, Leaf]:
    """Those leaves, of all that programs of their own would draw, that can be drawn tile by tile.

    Args:
        programs: what would draw each leaf.
        arguments: what each would be given; keys as their words.
    """
    found: dict[int, tuple[formulas.Reading, np.ndarray]] = {}
    for i, program in programs.items() if serves() else ():
        reading = formulas.read(program) if program.shardings == (None,) else None
        if reading is None:
            continue
        words = reading.words(arguments[i]())
        if fits(len(words), reading.size):
            found[i] = reading, words
    numbers = sum(len(words) * reading.size for reading, words in found.values())
    count = _MANY if numbers >= _LARGE else _FEW
    return {
        i: Leaf(Tiles(reading.formula, count, programs[i].settings), words, reading.factor, reading.size, reading.shape)
        for i, (reading, words) in found.items()
    }


def fits(draws: int, size: int) -> bool:
    """Whether so many draws of this size fill their tiles well enough."""
    filled = draws * -(-size // _TILE) * _TILE
    return filled <= max(_SMALL, 4 * draws * size)


def drawn(leaves: Sequence[Leaf]) -> list[np.ndarray]:
    """The leaves, drawn by all cores, as arrays of the host that jax takes over without a copy."""
    return started(leaves)()


def started(leaves: Sequence[Leaf]) -> Callable[[], list[np.ndarray]]:
    """Start to draw leaves on all cores but the caller's; what it returns helps them to the end and gives what `drawn` does."""
    spaces = reserved([leaf.shape for leaf in leaves], [leaf.program.formula.dtype for leaf in leaves])
    groups: dict[Tiles, list[int]] = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault(leaf.program, []).append(i)
    calls: list[tuple[_Group, int]] = []
    for program, chosen in groups.items():
        group = _Group(program, [leaves[i] for i in chosen], [spaces[i] for i in chosen])
        calls += ((group, first) for first in range(0, len(group.row), program.count))
    waiting = iter(calls)  # of a list: threads may share it
    has_x64 = bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]

    def work() -> None:
        running: collections.deque[tuple[_Group, int, jax.Array]] = collections.deque()
        used: jax.Array | None = None  # what a call drew, once copied, is memory for a later one
        with jax.enable_x64(has_x64):  # may hold for the thread that calls alone
            for group, first in waiting:
                running.append((group, first, group.start(first, used)))
                if len(running) > _AHEAD:
                    group, first, used = running.popleft()
                    group.finish(first, used)
            for group, first, tiles in running:
                group.finish(first, tiles)

    others = min(len(calls), os.cpu_count() or 1) - 1
    pool = ThreadPoolExecutor(max(1, others))
    helping = [pool.submit(work) for _ in range(others)]
    pool.shutdown(wait=False)  # takes no more work, and ends with what it has

    def finish() -> list[np.ndarray]:
        work()
        for future in helping:
            future.result()
        return [space.array for space in spaces]

    return finish


class _Group:
    """The leaves of one program, as one row of tiles."""

    def __init__(self, program: Tiles, leaves: Sequence[Leaf], spaces: Sequence[Space]):
        self.compiled, self.count, self.dtype = compiled(program), program.count, program.formula.dtype
        self.result = program.result
        self.draws = [(space, leaf.size, i) for space, leaf in zip(spaces, leaves, strict=True) for i in range(len(leaf.words))]
        draws = [len(leaf.words) for leaf in leaves]
        self.words = np.concatenate([leaf.words for leaf in leaves])
        self.factors = np.repeat(np.asarray([leaf.factor for leaf in leaves]), draws)
        tiles = np.repeat([-(-leaf.size // _TILE) for leaf in leaves], draws)
        self.ends = np.cumsum(tiles)
        self.begins = self.ends - tiles
        row = np.repeat(np.arange(len(tiles), dtype=np.uint32), tiles)
        self.row = np.pad(row, (0, -len(row) % self.count), mode="edge")  # the draw that each tile belongs to

    def start(self, first: int, used: jax.Array | None) -> jax.Array:
        """Start to draw the tiles from this one on, into memory that an earlier call used."""
        end = first + self.count
        row = self.row[first:end]
        offsets = ((np.arange(first, end) - self.begins[row]) * _TILE).astype(np.uint32)
        fits = used is not None and (used.shape, used.dtype) == (self.result.shape, self.result.dtype)
        memory = used if fits else np.empty(self.result.shape, self.result.dtype)
        return self.compiled(self.words[row], offsets, self.factors[row], memory)

    def finish(self, first: int, tiles: Any) -> None:
        """Copy drawn tiles to where they belong."""
        end = first + self.count
        tiles.block_until_ready()
        # `np.asarray` would be kept by the array, and keep its memory from being used again
        numbers = np.frombuffer(tiles, self.dtype) if tiles.dtype.kind in "biufc" else np.asarray(tiles).reshape(-1)
        for i in range(self.row[first], self.row[end - 1] + 1):
            space, size, place = self.draws[i]
            start = max(self.begins[i], first)
            begin, stop = (start - self.begins[i]) * _TILE, min(size, (end - self.begins[i]) * _TILE)
            source = (start - first) * _TILE
            space.write(place * size + begin, numbers[source : source + stop - begin])
