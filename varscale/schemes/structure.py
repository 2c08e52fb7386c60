"""How deep each parameter of a residual model lies: its branch, its block, and what stands beside it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any

from varscale.schemes.recurrence_values import Recurrences
from varscale.schemes.recurrences import recurrences
from varscale.usage.branches import Branch
from varscale.usage.parameters import ParameterUses
from varscale.usage.table import Uses

_ATTENTION = frozenset({"query", "key"})


def part_names(parameter: ParameterUses) -> tuple[frozenset[str], ...]:
    """What each part of a kernel's output is: of a kernel in one part one set, empty where nothing is known."""
    if parameter.main is None or not parameter.main.parts:
        return (frozenset(),)
    return tuple(frozenset(part.split("+")) for part in parameter.main.parts)


def packed_kernels(parameter: ParameterUses) -> tuple[tuple[frozenset[str], int], ...]:
    """The kernels packed in one: what each makes, and of how many entries; neighbours that make the same are one.

    The halves that rotary positions take of a query are parts of one kernel, and no kernels of their own.
    """
    found: list[tuple[frozenset[str], int]] = []
    sizes = (parameter.main and parameter.main.part_sizes) or (1,)
    for names, size in zip(part_names(parameter), sizes, strict=False):
        if found and found[-1][0] == names:
            found[-1] = (names, found[-1][1] + size)
        else:
            found.append((names, size))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Structure:
    """The residual streams of a model.

    Attributes:
        uses: what the program does with each parameter.
    """

    uses: Uses

    @functools.cached_property
    def _members(self) -> dict[int, list[ParameterUses]]:
        found: dict[int, list[ParameterUses]] = {}
        for parameter in self.uses:
            if parameter.main is not None and parameter.main.branch is not None:
                found.setdefault(parameter.main.branch, []).append(parameter)
        return found

    @functools.cached_property
    def notes(self) -> dict[Hashable, Any]:
        """What a scheme has looked up in it, kept while its plan is made."""
        return {}

    @functools.cached_property
    def recurrences(self) -> Recurrences:
        """What the parameters are in the recurrences of the model."""
        return recurrences(self.uses)

    def members(self, index: int) -> tuple[ParameterUses, ...]:
        """The parameters of a branch, by its place in `Uses.branches`."""
        return tuple(self._members.get(index, ()))

    def branch(self, parameter: ParameterUses) -> Branch | None:
        """The branch that a parameter lies in."""
        use = parameter.main
        return None if use is None or use.branch is None else self.uses.branches[use.branch]

    @functools.cached_property
    def streams(self) -> tuple[int, ...]:
        """The residual streams, in the order of execution."""
        return tuple(dict.fromkeys(branch.stream for branch in self.uses.branches))

    def additions(self, stream: int) -> int:
        """Residual additions on a stream."""
        return max((max(b.numbers) for b in self.uses.branches if b.stream == stream), default=0)

    def attends(self, index: int) -> bool:
        """Whether a branch is an attention."""
        return any(names & _ATTENTION for p in self.members(index) for names in part_names(p))

    def crosses(self, index: int) -> bool:
        """Whether a branch attends from its stream to another: a decoder's to the encoder's output."""
        own = self.uses.branches[index].stream
        return any(
            p.main is not None and p.main.stream not in (own, None) and any("key" in names for names in part_names(p))
            for p in self.members(index)
        )

    def last(self, index: int) -> tuple[ParameterUses, ...]:
        """The kernels whose output is what a branch adds."""
        return tuple(p for p in self.members(index) if p.main is not None and p.main.ends is not None and p.main.reduction_axes)

    def crossed(self, stream: int) -> bool:
        """Whether a stream attends to another: a decoder's."""
        return any(b.stream == stream and self.crosses(i) for i, b in enumerate(self.uses.branches))

    @functools.cached_property
    def _periods(self) -> dict[int, int]:
        """How many additions make a block, by stream: the shortest period of what its branches are made of."""
        found = {}
        for stream in self.streams:
            at: dict[int, Hashable] = {}
            marks = [(i, b) for i, b in enumerate(self.uses.branches) if b.stream == stream]
            has_attention = any(self.attends(i) for i, _ in marks)
            for i, branch in marks:
                mark = (self.attends(i), self.crosses(i)) if has_attention else self._shapes(i)
                at.update(dict.fromkeys(branch.numbers, mark))
            sequence = [at.get(k) for k in range(1, self.additions(stream) + 1)]
            found[stream] = _period(sequence)
        return found

    def _shapes(self, index: int) -> Hashable:
        layers = {axis: None for axis in range(len(self.uses.branches[index].loops))}
        return tuple(sorted(p.shape[len(layers) :] for p in self.members(index) if p.main and p.main.reduction_axes))

    def period(self, stream: int) -> int:
        """Residual additions a block."""
        return self._periods[stream]

    def blocks(self, stream: int) -> int:
        """Blocks on a stream: the length of its repeating pattern of branches counts as one."""
        return -(-self.additions(stream) // self.period(stream))

    def block(self, stream: int, number: int) -> int:
        """The index, from 0, of the block that an addition lies in."""
        return (number - 1) // self.period(stream)


def _period(sequence: list[Hashable]) -> int:
    """The shortest period of a sequence of which each element repeats after it, a broken last one allowed; 1 for no pattern.

    >>> _period(["a", "f"] * 3), _period(["p"] * 4), _period(["a", "x", "f", "a", "x", "f"]), _period(["a", "b", "c"])
    (2, 1, 3, 1)
    """
    for period in range(1, len(sequence) // 2 + 1):
        if all(x == y for x, y in zip(sequence, sequence[period:], strict=False)):
            return period
    # One block alone: an attention and a feed-forward layer, say, make a pattern that does not come back.
    first = sequence[:1]
    return len(sequence) if len(sequence) > 1 and sequence.count(first[0]) == 1 and _attends(first[0]) else 1


def _attends(mark: Hashable) -> bool:
    return isinstance(mark, tuple) and bool(mark) and mark[0] is True
