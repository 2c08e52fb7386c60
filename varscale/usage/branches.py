"""Residual additions: which of two summands is the stream, and what the branch is made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterator
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
        start: linear maps before the point that stream and branch were both computed from.
    """

    number: int
    stream: int
    maps: int
    stream_scale: float | None
    branch_scale: float | None
    gates: frozenset[int]
    shortcut: bool
    loops: tuple[Loop, ...] = ()
    start: int = 0


class Residuals:
    """The residual additions met so far.

    Attributes:
        notes: in the order of execution.
        additions: on the longest way to the output.
    """

    def __init__(self) -> None:
        self.notes: list[BranchNote] = []
        self.additions = 0
        self._places: dict[Hashable, int] = {}
        self._streams = 0
        self._at: dict[int, list[Use]] = {}
        self._read: dict[int, float | None] = {}
        self._open: dict[int, frozenset[Hashable]] = {}
        self._streams_met: set[Hashable] = set()

    def anchored(self, use: Use, anchor: int) -> None:
        """Note at which value a parameter is used, so that the branch which that lies in can be told."""
        use.branch = None
        self._at.setdefault(anchor, []).append(use)

    def read(self, x: Flow) -> None:
        """Note what a value was multiplied by where it was first read: the square root of the width on an embedding, say."""
        if x.embedded and x.stream is None:
            self._read.setdefault(x.anchor, x.scale)

    def join(self, place: Hashable, stream: Flow, branch: Flow, start: int) -> tuple[int, int]:
        """Note an addition; its number, and the number of its stream.

        Args:
            place: equal for the same equation, walked again.
            stream: one summand.
            branch: the other.
            start: linear maps before the point that both were computed from.
        """
        number = stream.depth + 1
        self.additions = max(self.additions, number)
        if place not in self._places:
            self._places[place] = len(self.notes)
            on = self._begun(stream) if stream.stream is None else stream.stream
            self.notes.append(BranchNote(0, on, 0, 1.0, 1.0, frozenset(), False))
        index = self._places[place]
        note = self.notes[index]
        note.number, note.maps, note.gates, note.start = number, branch.maps - start, branch.gates, start
        before = self._read.get(stream.anchor, 1.0)
        note.stream_scale = stream.scale if before == 1 else stream.scale / before if before and stream.scale else None
        note.branch_scale = branch.scale
        note.shortcut = stream.maps > start
        for use in self._uses(branch.ancestors & ~stream.ancestors):
            if use.branch is None and not use.begins:
                use.branch = index
        return number, note.stream

    def summed(self, place: Hashable, stream: Flow, branch: Flow, total: Flow) -> None:
        """Note the sum of an addition: D ⊙ u, beside what layers make of u, is a stream only if a later branch is added to it.

        Args:
            place: as in `join`.
            stream: one summand.
            branch: the other.
            total: their sum.
        """
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
        """Places of sums that are no residual additions: a vector times a layer's output is added, and no stream begins."""
        return frozenset().union(*self._open.values()) - self._streams_met

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


def summands(x: Flow, y: Flow, maps_at: dict[int, int], in_time: bool) -> tuple[Flow, Flow, int] | None:
    """(stream, branch, maps before both) where one of two summands was computed from the other, or from what that was added to.

    Args:
        x: one summand.
        y: the other.
        maps_at: linear maps before each anchor.
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
    if y.ancestors >> x.anchor & 1 and y.maps > x.maps:
        return x, y, x.maps
    if x.ancestors >> y.anchor & 1 and x.maps > y.maps:
        return y, x, y.maps
    for stream, branch in ((x, y), (y, x)):
        # A second branch that reads what the first was added to: parallel attention and feed-forward layers.
        read = stream.added_to
        if read and branch.ancestors >> read & 1 and branch.added_to != read and branch.maps > maps_at.get(read, 0):
            return stream, branch, maps_at.get(read, 0)
    common = x.ancestors & y.ancestors
    if not common or x.maps == y.maps:
        return None
    at = maps_at.get(common.bit_length() - 1, 0)
    short, long = sorted((x, y), key=lambda flow: flow.maps)
    # A projection on the shortcut: one map beside a branch of several, from the same stream.
    return (short, long, at) if short.direct and not in_time and short.maps - at == 1 < long.maps - at else None


def times(scale: float | None, number: float | None) -> float | None:
    """A product of two factors of which either may be unknown."""
    return None if scale is None or number is None or not math.isfinite(number) else scale * number


def scaled_by_its_own(x: Flow, y: Flow) -> Flow | None:
    """The value that is normalised where one of two is the other's own scale, reduced and inverted."""
    for value, scale in ((x, y), (y, x)):
        is_scale = scale.reduced and bool(scale.functions & {"rsqrt", "sqrt"})
        if is_scale and scale.ancestors >> value.anchor & 1 and not value.reduced:
            return value
    return None
