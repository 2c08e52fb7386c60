"""Which part of a parameter's axes each axis of an array holds, through reshapes, transposes and slices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Atom:
    """A run of one axis of the original array.

    Attributes:
        axis: the original axis; None for an axis that was added by broadcasting.
        size: how many entries of it.
        part: (start, stop, of) where a slice took entries start to stop of a run of `of`; None for the whole.
        stride: entries of the original axis from one entry of the run to the next.
    """

    axis: int | None
    size: int
    part: tuple[int, int, int] | None = None
    stride: int = 1


Axes = tuple[tuple[Atom, ...], ...]


def whole(shape: Sequence[int]) -> Axes:
    """The layout of an array that is the original."""
    return tuple((Atom(k, n),) for k, n in enumerate(shape))


def added(shape: Sequence[int]) -> Axes:
    """The layout of an array none of whose axes belongs to the original."""
    return tuple((Atom(None, n),) for n in shape)


def size(atoms: Sequence[Atom]) -> int:
    """The length of an axis."""
    return math.prod(atom.size for atom in atoms)


def of(axes: Axes, which: Sequence[int]) -> tuple[int, ...]:
    """The original axes that lie in some axes of the array, each once, in order."""
    return tuple(sorted({atom.axis for k in which for atom in axes[k] if atom.axis is not None}))


def reshaped(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The layout after a row-major reshape; None where an axis would hold a broken run, or there are no numbers."""
    if 0 in shape:
        return None
    pending = [atom for atoms in axes for atom in atoms if atom.size != 1][::-1]
    result: list[tuple[Atom, ...]] = []
    for n in shape:
        taken: list[Atom] = []
        need = n
        while need > 1:
            if not pending:
                return None
            atom = pending.pop()
            if need % atom.size == 0:
                taken.append(atom)
                need //= atom.size
            elif atom.size % need == 0:  # the run is cut in two: what is left goes into the next axis
                taken.append(dataclasses.replace(atom, size=need, stride=atom.stride * (atom.size // need)))
                pending.append(dataclasses.replace(atom, size=atom.size // need))
                need = 1
            else:
                return None
        result.append(tuple(taken))
    return tuple(result) if not pending else None


def followed(before: Sequence[int], after: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Which axes of one shape hold the entries of each axis of another, of which it is a row-major reshape.

    >>> followed((2, 6, 5), (2, 3, 2, 5)), followed((2, 3, 5), (6, 1, 5))
    ({0: (0,), 1: (1, 2), 2: (3,)}, {0: (0,), 1: (0,), 2: (2,)})
    """

    def runs(shape: Sequence[int]) -> list[tuple[int, int]]:
        """How many entries of the whole array lie in one entry of an axis, and in all of it."""
        return [(math.prod(shape[k + 1 :]), math.prod(shape[k:])) for k in range(len(shape))]

    return {
        i: tuple(j for j, (start, stop) in enumerate(runs(after)) if max(low, start) < min(high, stop))
        for i, (low, high) in enumerate(runs(before))
        if low < high
    }


def transposed(axes: Axes, permutation: Sequence[int]) -> Axes:
    """The layout after a transposition."""
    return tuple(axes[k] for k in permutation)


def broadcast(axes: Axes, dimensions: Sequence[int], shape: Sequence[int]) -> Axes:
    """The layout after `broadcast_in_dim`."""
    result: list[tuple[Atom, ...]] = [(Atom(None, n),) if n != 1 else () for n in shape]
    for atoms, k in zip(axes, dimensions, strict=True):
        if size(atoms) == shape[k]:
            result[k] = atoms
    return tuple(result)


def sliced(axes: Axes, axis: int, start: int, stop: int) -> Axes:
    """The layout after a slice of one axis; the part of a run that it takes is noted."""
    atoms = axes[axis]
    length, width = size(atoms), stop - start
    if not atoms or width == length:
        return axes
    first, rest = atoms[0], atoms[1:]
    unit = size(rest)
    if width % unit or start % unit:
        return (*axes[:axis], (Atom(None, width),), *axes[axis + 1 :])
    width, start = width // unit, start // unit
    part = (start, start + width, first.size) if width > 0 and first.part is None else first.part
    return (*axes[:axis], (dataclasses.replace(first, size=width, part=part), *rest), *axes[axis + 1 :])


def cut(axes: Axes) -> tuple[int, int] | None:
    """Axis and stride of the run that the array is a part of, where exactly one axis of the original was cut."""
    cuts = {(atom.axis, atom.stride) for atoms in axes for atom in atoms if atom.part and atom.axis is not None}
    return cuts.pop() if len(cuts) == 1 else None


def part(axes: Axes) -> tuple[int, int, int] | None:
    """The part that an array is of the original, where exactly one axis was cut."""
    parts = {atom.part for atoms in axes for atom in atoms if atom.part is not None and atom.axis is not None}
    return parts.pop() if len(parts) == 1 else None
