"""Residual additions: which of two summands is the stream, and what the branch is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from varscale.usage.values import Flow

if TYPE_CHECKING:
    from varscale.usage.notes import Use

Loop = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Branch:
    """A residual branch of a model: what is computed from a stream and added to it.

    Attributes:
        number: of the addition on its stream, counted from 1; in a loop over layers that of the first.
        stream: which residual stream it is on, numbered from 0 in order of execution: an encoder's, a decoder's.
        maps: linear maps in series in the branch.
        stream_scale: constant that the stream is multiplied by where it is added; None where the trace does not tell.
        branch_scale: likewise of the branch, after its last map.
        gates: paths of the parameters that the branch is multiplied by after its last map.
        shortcut: whether the stream passes a map of its own beside the branch.
        loops: (length, additions a step) of each loop over layers around it, from the outermost.
    """

    number: int
    stream: int
    maps: int
    stream_scale: float | None
    branch_scale: float | None
    gates: tuple[str, ...]
    shortcut: bool
    loops: tuple[Loop, ...]

    @property
    def numbers(self) -> tuple[int, ...]:
        """The number of its addition in every step of the loops around it, in the order of stacked layers."""
        found = [self.number]
        for length, gained in self.loops:
            found = [number + step * gained for number in found for step in range(length)]
        return tuple(found)


@dataclasses.dataclass
class BranchNote:
    """A residual addition, as the walk fills it in.

    Attributes:
        number: of the addition on its stream, counted from 1; in a loop over layers that of the first.
        stream: which residual stream it is on.
        maps: linear maps in series in the branch.
        stream_scale: constant that the stream is multiplied by where it is added; None where it is not known.
        branch_scale: likewise of the branch, after its last map.
        gates: numbers of the parameters that the branch is multiplied by after its last map.
        shortcut: whether the stream passes a map of its own beside the branch.
        loops: (length, additions a step) of each loop over layers around it, from the outermost.
    """

    number: int
    stream: int
    maps: int
    stream_scale: float | None
    branch_scale: float | None
    gates: frozenset[int]
    shortcut: bool
    loops: tuple[Loop, ...] = ()


class Ways:
    """What each value was computed from, and the linear maps on the way from one value to another; values by their anchors."""

    def __init__(self) -> None:
        self._read: dict[int, dict[int, frozenset[str]]] = {}  # what a value was computed from, and by which functions of it
        self._mapped: set[int] = set()
        self._bent: set[int] = set()
        self._streams: dict[int, int] = {}
        self._sides: dict[int, tuple[frozenset[int], ...]] = {}

    def made(self, x: Flow, of: Sequence[Flow], *, maps: bool, linear: bool) -> None:
        """Note a value.

        Args:
            x: the value.
            of: what it was computed from.
            maps: whether by a linear map.
            linear: whether it is a linear function of these functions.
        """
        self._read[x.anchor] = {y.anchor: y.functions for y in of}
        if maps:
            self._mapped.add(x.anchor)
        if x.normalised or not linear:
            self._bent.add(x.anchor)

    def added(self, total: Flow, stream: Flow) -> None:
        """Note the sum of a residual addition."""
        self._streams[total.anchor] = stream.anchor

    def contracted(self, total: Flow, sides: Iterable[Iterable[int]]) -> None:
        """Note a product of two activations, and of each the values that it is made of."""
        self._sides[total.anchor] = tuple(map(frozenset, sides))

    def between(self, start: int, end: Flow) -> dict[int, int]:
        """The values on the ways from one value to another, with the most linear maps from the first to each; empty for no way.

        No way leads along a stream that what is added to it alone depends on: a condition of the blocks before is no start.
        """
        found, dead = {start: 0}, set[int]()
        readers: dict[int, list[int]] = {}
        left, anchor = end.ancestors >> start + 1, start
        while left:
            skipped = (left & -left).bit_length()
            left, anchor = left >> skipped, anchor + skipped
            before = [read for read in self._read[anchor] if read in found]
            for read in before:
                readers.setdefault(read, []).append(anchor)
            if before and self._streams.get(anchor, start) not in found:
                dead.add(anchor)
            elif before:
                found[anchor] = max(found[read] for read in before) + self.maps(anchor)
        for anchor in reversed(found):  # what leads to such streams alone
            if anchor in readers and dead.issuperset(readers[anchor]):
                dead.add(anchor)
        return {anchor: maps for anchor, maps in found.items() if anchor not in dead} if end.anchor in found else {}

    def maps(self, anchor: int) -> bool:
        """Whether a linear map made a value."""
        return anchor in self._mapped

    def bends(self, way: Mapping[int, int], branch: Flow, shortcut: Flow) -> bool:
        """Whether a branch is no linear function of what a shortcut reads.

        Args:
            way: the values from their common start to the branch.
            branch: the branch.
            shortcut: a linear map of a function of the start.
        """
        start, *later = way
        first = self._read[shortcut.anchor].get(start, frozenset())
        edges = [(read, functions) for anchor in later for read, functions in self._read[anchor].items() if read in way]
        if any(functions != (first if read == start else frozenset()) for read, functions in edges):
            return True
        return bool(branch.functions) or not self._bent.isdisjoint(later)

    def beside(self, way: Mapping[int, int]) -> Iterator[int]:
        """The values that others on a way are contracted with: keys and values that are made of something else."""
        for anchor in way:
            for side in self._sides.get(anchor, ()):
                if way.keys().isdisjoint(side):
                    yield from side


@dataclasses.dataclass(frozen=True)
class Addition:
    """A residual addition.

    Attributes:
        stream: one summand.
        branch: the other.
        way: the values between what both were computed from and the branch, by their anchors, with the linear maps before each.
        shortcut: whether the stream passes a map of its own beside the branch.
    """

    stream: Flow
    branch: Flow
    way: Mapping[int, int]
    shortcut: bool = False


class Residuals:
    """The residual additions met so far.

    Attributes:
        notes: in the order of execution.
        additions: on the longest way to the output.
        ways: what the values of the program were computed from.
    """

    def __init__(self) -> None:
        self.ways = Ways()
        self.notes: list[BranchNote] = []
        self.additions = 0
        self._places: dict[Hashable, int] = {}
        self._streams = 0
        self._at: dict[int, list[Use]] = {}
        self._read: dict[int, float | None] = {}
        self._open: dict[int, frozenset[Hashable]] = {}
        self._streams_met: set[Hashable] = set()
        self._projected: dict[int, Hashable] = {}
        self._enclosed: set[Hashable] = set()

    def anchored(self, use: Use, anchor: int) -> None:
        """Note at which value a parameter is used, so that the branch which that lies in can be told."""
        use.branch, use.anchor = None, anchor
        self._at.setdefault(anchor, []).append(use)

    def read(self, x: Flow) -> None:
        """Note what a value was multiplied by where it was first read: the square root of the width on an embedding, say."""
        if x.embedded and x.stream is None:
            self._read.setdefault(x.anchor, x.scale)

    def join(self, place: Hashable, found: Addition) -> tuple[int, int]:
        """Note an addition; its number, and the number of its stream.

        Args:
            place: equal for the same equation, walked again.
            found: the addition.
        """
        stream, branch, way = found.stream, found.branch, found.way
        number = stream.depth + 1
        self.additions = max(self.additions, number)
        if place not in self._places:
            self._places[place] = len(self.notes)
            on = self._begun(stream) if stream.stream is None else stream.stream
            self.notes.append(BranchNote(0, on, 0, 1.0, 1.0, frozenset(), False))
        index = self._places[place]
        note = self.notes[index]
        note.number, note.maps, note.gates, note.shortcut = number, max(way.values()), branch.gates, found.shortcut
        before = self._read.get(stream.anchor, 1.0)
        note.stream_scale = stream.scale if before == 1 else stream.scale / before if before and stream.scale else None
        note.branch_scale = branch.scale
        within = {anchor: maps - self.ways.maps(anchor) for anchor, maps in way.items()}
        for anchor, maps in (dict.fromkeys(self.ways.beside(way), 0) | within).items():
            for use in () if stream.ancestors >> anchor & 1 else self._at.get(anchor, ()):
                if use.branch is None and not use.begins:
                    use.branch, use.position = index, maps if use.reduction else way.get(anchor, 0)
        return number, note.stream

    def summed(self, place: Hashable, found: Addition, total: Flow) -> None:
        """Note the sum of an addition, and whether it is one.

        D ⊙ u, beside what layers make of u, is a stream only if a later branch is added to it. So is D u where the sum lies in
        another branch: a state space's output C h + D u.

        Args:
            place: as in `join`.
            found: the addition.
            total: the sum.
        """
        stream, branch, (start, *later) = found.stream, found.branch, found.way
        self.ways.added(total, stream)
        self._enclosed.update(self._projected[anchor] for anchor in later if anchor in self._projected)
        self._streams_met.update([self._projected[start]] if start in self._projected else [])
        if found.shortcut:
            self._projected[total.anchor] = place
            return
        before, reads = self._open.get(stream.anchor, frozenset()), branch.ancestors >> stream.anchor & 1
        if reads:
            self._streams_met |= before
            before = frozenset()
        scaled = stream.functions or stream.normalised or (stream.direct and stream.maps)
        if before or (stream.gates and scaled):
            self._open[total.anchor] = before | {place}
        else:
            self._streams_met.add(place)

    @property
    def skips(self) -> frozenset[Hashable]:
        """Places of sums that are no residual additions: a layer's output is added, times a vector or a matrix alone."""
        return frozenset(self._enclosed).union(*self._open.values()) - self._streams_met

    def _uses(self, anchors: int) -> Iterator[Use]:
        """The uses at anchors that are given as bits."""
        while anchors:
            lowest = anchors & -anchors
            yield from self._at.get(lowest.bit_length() - 1, ())
            anchors ^= lowest

    def _begun(self, stream: Flow) -> int:
        """The number of a new stream; what it was computed from begins it."""
        number = self._streams
        self._streams += 1
        for use in self._uses(stream.ancestors):
            if use.stream is None:
                use.stream, use.begins = number, True
        return number

    def repeated(self, first: int, loop: Loop) -> None:
        """Note that the additions from the `first` on lie in a loop over layers."""
        for note in self.notes[first:]:
            note.loops = (loop, *note.loops)

    def saved(self) -> tuple[int, dict[Hashable, int], int, int]:
        """What `restored` takes back."""
        return len(self.notes), dict(self._places), self.additions, self._streams

    def restored(self, saved: tuple[int, dict[Hashable, int], int, int]) -> None:
        """Forget what was met since."""
        count, self._places, self.additions, self._streams = saved
        del self.notes[count:]


def summands(x: Flow, y: Flow, ways: Ways, in_time: bool) -> Addition | None:
    """The addition, where one of two summands was computed from the other, or from what that was added to.

    Args:
        x: one summand.
        y: the other.
        ways: what they were computed from.
        in_time: whether the shorter summand is made by a kernel that a loop over time repeats: gates add what they read at each
            step.
    """
    for u in (x, y):
        if (x.holds | y.holds) >> u.anchor & 1:
            return None  # u + g ⊙ u, as a parallel recurrence has it: no branch ends here
        if u.score is not None and u.score.pairs:
            other = y if u is x else x
            if other.raw or other.direct or other.score is not None:
                return None  # a mask, a bias of pairs or an earlier layer's scores beside the scores of an attention
    starts = [(stream, branch, stream.anchor) for stream, branch in ((x, y), (y, x))]
    # A second branch that reads what the first was added to: parallel attention and feed-forward layers.
    starts += [(u, v, u.added_to) for u, v, _ in starts if u.added_to and u.added_to != v.added_to]
    for stream, branch, start in starts:
        if branch.ancestors >> start & 1 and max((way := ways.between(start, branch)).values(), default=0):
            return Addition(stream, branch, way)
    if not (common := x.ancestors & y.ancestors):
        return None
    start = common.bit_length() - 1
    for stream, branch in ((x, y), (y, x)):
        # A projection on the shortcut: one map beside a branch of several, from the same stream. Where both are linear they are
        # one map together, as C h + D u of a state space and W u + B A u are; and a condition is spread over positions.
        if not stream.direct or in_time or stream.spread or stream.size < branch.size:
            continue
        if max(ways.between(start, stream).values(), default=0) == 1:
            way = ways.between(start, branch)
            if max(way.values(), default=0) > 1 and ways.bends(way, branch, stream):
                return Addition(stream, branch, way, shortcut=True)
    return None


def scaled_by_its_own(x: Flow, y: Flow) -> Flow | None:
    """The value that is normalised where one of two is the other's own scale, reduced and inverted."""
    for value, scale in ((x, y), (y, x)):
        is_scale = scale.reduced and bool(scale.functions & {"rsqrt", "sqrt"})
        if is_scale and scale.ancestors >> value.anchor & 1 and not value.reduced:
            return value
    return None
