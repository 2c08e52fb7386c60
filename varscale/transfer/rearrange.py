"""Surgery on a checkpoint before its leaves look for their places: split, join, add, stack, unstack, permute.

Every operation is a frozen dataclass whose first field is a glob over the paths of the checkpoint as they are called THERE
(before any rename), and works on arrays as they are laid out THERE (before any transposition). `graft(..., rearrange=[...])`
applies them in order; one that catches nothing is an error.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from varscale.programs.patterns import caught, matches, substitute


@dataclass(frozen=True, eq=False)
class Piece:
    """A leaf of the checkpoint, or what surgery made of some.

    Attributes:
      path: its path by now, in the checkpoint's own names.
      value: the array.
      sources: the paths of the leaves it was made of.
      stacked: how many leading axes count layers, and so belong to no kernel.
      done: what was done to it.
      permuted: whether the caller said in which order its units stand (`Permute`).
    """

    path: str
    value: np.ndarray
    sources: tuple[str, ...]
    stacked: int = 0
    done: tuple[str, ...] = ()
    permuted: bool = False

    def become(self, path: str, value: np.ndarray, done: str, **changes) -> "Piece":
        return replace(self, path=path, value=value, done=(*self.done, done), **changes)


class Operation(Protocol):
    """What `rearrange` takes: any callable from pieces to pieces."""

    def __call__(self, pieces: Sequence[Piece], /) -> list[Piece]: ...


@dataclass(frozen=True)
class Split:
    """Split packed kernels, such as query, key and value in one, or the gates of an LSTM.

    Attributes:
      node: a glob that ends at the packed leaf, or at the module that holds it.
      into: what takes the place of the node's last key, a name a part ("query", or "query/weight" where the node is a leaf).
      axis: the packed axis, in the checkpoint's layout (PyTorch packs axis 0).
      sizes: of the parts along that axis; equal by default.
      groups: how often the sequence of parts repeats along the axis (a checkpoint that interleaves q, k, v by head has one
        group a head).
    """

    node: str
    into: tuple[str, ...]
    axis: int = 0
    sizes: tuple[int, ...] | None = None
    groups: int = 1

    def __call__(self, pieces: Sequence[Piece], /) -> list[Piece]:
        def parts(piece: Piece, stem: str, rest: str) -> Iterable[Piece]:
            axis = _axis(self, piece, self.axis)
            length = piece.value.shape[axis]
            sizes = self.sizes or (length // (self.groups * len(self.into)),) * len(self.into)
            if len(sizes) != len(self.into) or sum(sizes) * self.groups != length:
                raise ValueError(
                    f"{self}: axis {self.axis} of {piece.path!r} (shape {piece.value.shape}) has length {length}, which is not "
                    f"{self.groups} x {len(self.into)} {'equal parts' if self.sizes is None else f'parts of {self.sizes}'}"
                )
            grouped = piece.value.reshape(*piece.value.shape[:axis], self.groups, sum(sizes), *piece.value.shape[axis + 1 :])
            for name, part in zip(self.into, np.split(grouped, np.cumsum(sizes)[:-1], axis=axis + 1), strict=True):
                flat = part.reshape(*piece.value.shape[:axis], -1, *piece.value.shape[axis + 1 :])
                yield piece.become(_join(stem, name, rest), flat, f"split off as {name}")

        return _each(self, pieces, self.node, parts)


@dataclass(frozen=True)
class Join:
    """Join kernels into a packed one: the inverse of `Split`, along the same axis of the same layout."""

    node: str
    parts: tuple[str, ...]
    into: str
    axis: int = 0
    groups: int = 1

    def __call__(self, pieces: Sequence[Piece], /) -> list[Piece]:
        def joined(members: list[Piece]) -> np.ndarray:
            axis = _axis(self, members[0], self.axis)
            for member in members:
                if member.value.shape[axis] % self.groups:
                    raise ValueError(
                        f"{self}: axis {self.axis} of {member.path!r} (shape {member.value.shape}) is not {self.groups} groups"
                    )
            views = [m.value.reshape(*m.value.shape[:axis], self.groups, -1, *m.value.shape[axis + 1 :]) for m in members]
            shape = members[0].value.shape
            return np.concatenate(views, axis=axis + 1).reshape(*shape[:axis], -1, *shape[axis + 1 :])

        return _gathered(self, pieces, self.node, self.parts, self.into, joined, "joined")


@dataclass(frozen=True)
class Add:
    """Add leaves up, such as the two biases that PyTorch gives every gate of an LSTM."""

    node: str
    parts: tuple[str, ...]
    into: str

    def __call__(self, pieces: Sequence[Piece], /) -> list[Piece]:
        return _gathered(self, pieces, self.node, self.parts, self.into, _sum, "added up")


@dataclass(frozen=True)
class Stack:
    """Stack numbered layers into one leaf with a leading axis, as `nn.scan` and `nnx.vmap` keep them.

    Attributes:
      layers: a glob whose last "*" is the layer's number ("h/*").
      into: the node that takes their place ("h"); earlier wildcards carry over.
    """

    layers: str
    into: str

    def __call__(self, pieces: Sequence[Piece], /) -> list[Piece]:
        groups: dict[str, dict[int, Piece]] = {}
        wanted = set()
        for piece in pieces:
            if (found := caught(self.layers, piece.path)) is not None:
                if not found[0] or not found[0][-1].isdecimal():
                    raise ValueError(f"{self}: {piece.path!r} has no number in the place of the last '*' of layers")
                path = substitute(self.layers, self.into, piece.path)
                assert path is not None
                groups.setdefault(path, {})[int(found[0][-1])] = piece
                wanted.add(piece.path)
        _require(self, groups)
        out = [piece for piece in pieces if piece.path not in wanted]
        for path, numbered in groups.items():
            members = [numbered[number] for number in sorted(numbered)]
            if sorted(numbered) != list(range(len(numbered))) or len({(m.value.shape, m.value.dtype) for m in members}) > 1:
                shapes = {number: numbered[number].value.shape for number in sorted(numbered)}
                raise ValueError(
                    f"{self}: layers must be numbered from 0 without a gap and have one shape; {path!r} has {shapes}"
                )
            value = np.stack([m.value for m in members])
            sources = tuple(source for m in members for source in m.sources)
            done = (*members[0].done, f"{len(members)} layers stacked")
            out.append(Piece(path, value, sources, members[0].stacked + 1, done, members[0].permuted))
        return out


@dataclass(frozen=True)
class Unstack:
    """Take a leaf with a leading axis apart into numbered layers: the inverse of `Stack`.

    Attributes:
      node: a glob that ends at the module whose leaves are stacked ("blocks").
      into: what takes the place of the node, with "*" for the layer's number ("blocks/*"); earlier wildcards come first.
    """

    node: str
    into: str

    def __call__(self, pieces: Sequence[Piece], /) -> list[Piece]:
        if "*" not in self.into:
            raise ValueError(f"{self}: into must have a '*' in the place of the layer's number")
        head, _, tail = self.into.rpartition("*")

        def layers(piece: Piece, _: str, __: str) -> Iterable[Piece]:
            if not piece.value.ndim:
                raise ValueError(f"{self}: {piece.path!r} is a scalar, so it has no layers")
            for number, value in enumerate(piece.value):
                path = substitute(self.node, f"{head}{number}{tail}", piece.path)
                assert path is not None
                yield piece.become(path, value, f"layer {number} unstacked", stacked=max(piece.stacked - 1, 0))

        return _each(self, pieces, self.node, layers)


@dataclass(frozen=True)
class Permute:
    """Reorder the units along one axis: after a flattening, PyTorch counts channel, row, column and flax row, column, channel.

    Attributes:
      node: a glob.
      axis: the axis whose units are reordered, in the checkpoint's layout (the inputs of PyTorch's Linear: 1).
      shape: what the axis was flattened from, such as (channels, rows, columns).
      order: the axes of `shape` in their new order; from channels first to channels last (1, 2, 0). The order (0, 1, 2) changes
        nothing and tells `graft` not to warn of a map that is not there.
    """

    node: str
    axis: int
    shape: tuple[int, ...]
    order: tuple[int, ...]

    def __call__(self, pieces: Sequence[Piece], /) -> list[Piece]:
        if sorted(self.order) != list(range(len(self.shape))):
            raise ValueError(f"{self}: order must hold each axis of shape {self.shape} once")

        def permuted(piece: Piece, _: str, __: str) -> Iterable[Piece]:
            axis = _axis(self, piece, self.axis)
            before, length, after = piece.value.shape[:axis], piece.value.shape[axis], piece.value.shape[axis + 1 :]
            if length != np.prod(self.shape):
                raise ValueError(f"{self}: axis {self.axis} of {piece.path!r} has length {length}, not {np.prod(self.shape)}")
            order = (
                *range(axis),
                *(axis + step for step in self.order),
                *range(axis + len(self.shape), axis + len(self.shape) + len(after)),
            )
            value = piece.value.reshape(*before, *self.shape, *after).transpose(order).reshape(piece.value.shape)
            yield piece.become(piece.path, value, f"units reordered {self.order} of {self.shape}", permuted=True)

        return _each(self, pieces, self.node, permuted)


@dataclass(frozen=True)
class Transpose:
    """Transpose leaves: `axes` as numpy takes them, counted without the axes of stacked layers."""

    node: str
    axes: tuple[int, ...]

    def __call__(self, pieces: Sequence[Piece], /) -> list[Piece]:
        def transposed(piece: Piece, _: str, __: str) -> Iterable[Piece]:
            if sorted(self.axes) != list(range(piece.value.ndim - piece.stacked)):
                raise ValueError(f"{self}: {piece.path!r} has shape {piece.value.shape}; axes must name each of its axes once")
            order = (*range(piece.stacked), *(axis + piece.stacked for axis in self.axes))
            yield piece.become(piece.path, piece.value.transpose(order), f"transposed {self.axes}")

        return _each(self, pieces, self.node, transposed)


@dataclass(frozen=True)
class Apply:
    """Any function of one array: a scale that is stored less 1, a sign, a unit; `why` is what the account says of it."""

    node: str
    function: Callable[[np.ndarray], np.ndarray] = dataclasses.field(repr=False)
    why: str = "changed by a function of the caller's"

    def __call__(self, pieces: Sequence[Piece], /) -> list[Piece]:
        def applied(piece: Piece, _: str, __: str) -> Iterable[Piece]:
            yield piece.become(piece.path, np.asarray(self.function(piece.value)), self.why)

        return _each(self, pieces, self.node, applied)


def _each(
    operation: Operation, pieces: Sequence[Piece], node: str, change: Callable[[Piece, str, str], Iterable[Piece]]
) -> list[Piece]:
    """Every piece that the glob catches replaced by what `change(piece, stem, rest)` makes of it.

    `stem` is the path above the node that was caught, `rest` the path below it.
    """
    chosen = {id(piece) for piece in pieces if matches(node, piece.path)}
    _require(operation, chosen)
    out: list[Piece] = []
    for piece in pieces:
        if id(piece) not in chosen:
            out.append(piece)
            continue
        stem, rest = _around(node, piece.path)
        out.extend(change(piece, stem, rest))
    return out


def _gathered(
    operation: Operation,
    pieces: Sequence[Piece],
    node: str,
    parts: tuple[str, ...],
    into: str,
    combine: Callable[[list[Piece]], np.ndarray],
    done: str,
) -> list[Piece]:
    """Pieces that differ only in the key `parts` below a node that the glob catches, combined into one."""
    groups: dict[str, dict[str, Piece]] = {}
    for part in parts:
        for piece in pieces:
            if matches(f"{node}/{part}", piece.path):
                stem, rest = _around(f"{node}/{part}", piece.path)
                groups.setdefault(_join(_above(stem, part), into, rest), {})[part] = piece
    _require(operation, groups)
    used = {id(piece) for members in groups.values() for piece in members.values()}
    out = [piece for piece in pieces if id(piece) not in used]
    for path, members in groups.items():
        if set(members) != set(parts):
            raise ValueError(f"{operation}: for {path!r} the checkpoint has {', '.join(members)} only, not {', '.join(parts)}")
        ordered = [members[part] for part in parts]
        try:
            value = np.asarray(combine(ordered))
        except ValueError as error:
            shapes = ", ".join(f"{piece.path} {piece.value.shape}" for piece in ordered)
            raise ValueError(f"{operation}: {shapes} do not fit together: {error}") from error
        sources = tuple(source for piece in ordered for source in piece.sources)
        out.append(Piece(path, value, sources, ordered[0].stacked, (*ordered[0].done, done), ordered[0].permuted))
    return out


def _sum(members: list[Piece]) -> np.ndarray:
    return functools.reduce(np.add, (member.value for member in members))


def _around(node: str, path: str) -> tuple[str, str]:
    """What stands above the node that the glob catches in the path, and what below it."""
    found = caught(node, path)
    assert found is not None
    below = found[1]
    return path.removesuffix(below).strip("/").rpartition("/")[0], below


def _above(stem: str, part: str) -> str:
    """The node's own path, where the part itself has several keys."""
    for _ in range(part.count("/")):
        stem = stem.rpartition("/")[0]
    return stem


def _axis(operation: Operation, piece: Piece, axis: int) -> int:
    rank = piece.value.ndim - piece.stacked
    if not -rank <= axis < rank:
        raise ValueError(f"{operation}: {piece.path!r} has shape {piece.value.shape}; it has no axis {axis}")
    return axis % rank + piece.stacked


def _join(*keys: str) -> str:
    return "/".join(key for key in keys if key)


def _require(operation: Operation, found: Collection) -> None:
    if not found:
        raise ValueError(f"{operation} catches nothing in the checkpoint")
