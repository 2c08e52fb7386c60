"""Which piece of a checkpoint goes to which leaf of a model."""

import difflib
import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from varscale.programs.patterns import Pattern, first_match
from varscale.programs.trees import is_collections
from varscale.transfer.account import GraftError
from varscale.transfer.layouts import Declared, Layout
from varscale.transfer.ledger import NOT_A_WEIGHT, Ledger
from varscale.transfer.rearrange import Piece
from varscale.transfer.rename import Renaming

# The gates of recurrent cells in the order in which nnx packs them into one kernel: LSTM, then GRU.
_PACKED = {
    "dense_i": (("ii", "if", "ig", "io"), ("ir", "iz", "in")),
    "dense_h": (("hi", "hf", "hg", "ho"), ("hr", "hz", "hn")),
}


@dataclass(frozen=True)
class Claim:
    """The pieces that are to stand at one leaf of the model: one, or all gates of a cell that keeps them packed.

    Attributes:
      pieces: in the order in which they are packed, along the leaf's last axis.
      renamed: whether the leaf's own name was changed.
    """

    pieces: tuple[Piece, ...]
    renamed: bool

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(source for piece in self.pieces for source in piece.sources))


def find_claims(
    ledger: Ledger, pieces: Sequence[Piece], renaming: Renaming, layouts: Declared, fresh: Sequence[Pattern]
) -> dict[str, Claim]:
    """Which pieces go to which leaf of the model; what goes nowhere is entered in the ledger.

    Raises:
      GraftError: two pieces go to one leaf, or one piece may go to two.
    """
    index = _index(ledger)
    strip = is_collections(tuple(ledger.checkpoint)) and not is_collections(tuple(ledger.model))
    found: dict[str, dict[str, Piece]] = {}
    for piece in pieces:
        sent = renaming(piece.path)
        if not sent.places:
            ledger.leave(piece.sources, sent.dropped_by, intended=True)
        for place in sent.places:
            if place in ledger.model and not ledger.model[place].is_weight:
                ledger.leave(piece.sources, NOT_A_WEIGHT, intended=True)
                continue
            place = place.partition("/")[2] if strip and place not in index else place
            target, gate = _target(piece, place, layouts.of(piece.path), index)
            if not target:
                _leave_without_place(ledger, piece, place, layouts.of(piece.path), index)
            elif first_match([(pattern, None) for pattern in fresh], target):
                ledger.leave(piece.sources, f"{_part(piece)}{target} is kept fresh", intended=True)
            else:
                others = found.setdefault(target, {})
                if rivals := [others[name] for name in others if gate in ("", name) or name == ""]:
                    both = " and ".join(sorted({*rivals[0].sources, *piece.sources}))
                    raise GraftError(f"pretrained: {both} both go to {target!r}; drop one of them with rename")
                others[gate] = piece
    claims = {target: _claim(ledger, target, gates) for target, gates in found.items()}
    return {target: claim for target, claim in claims.items() if claim is not None}


def _claim(ledger: Ledger, target: str, gates: Mapping[str, Piece]) -> Claim | None:
    """The claim to a leaf; None, with an entry in the ledger, where it packs gates of which some were not found.

    Args:
      ledger: the account.
      target: the leaf.
      gates: the pieces by gate, or one piece under "" for a leaf that packs none.
    """
    if "" in gates:
        return Claim((gates[""],), _renamed(gates[""], target))
    cell = next(cell for cell in _PACKED[target.split("/")[-2]] if set(gates) & set(cell))
    if set(gates) == set(cell):
        return Claim(tuple(gates[gate] for gate in cell), any(_renamed(piece, target) for piece in gates.values()))
    for piece in gates.values():
        ledger.leave(piece.sources, f"{target} packs the gates {', '.join(cell)}; found are {', '.join(gates)}")
    return None


def _renamed(piece: Piece, target: str) -> bool:
    return piece.path.rpartition("/")[2] != target.rpartition("/")[2]


def _index(ledger: Ledger) -> dict[str, list[str]]:
    """The model's leaves by every name they answer to.

    That is their path, their path with `if_` and the like spelled without the underscore that Python asks for, and in linen
    variables both without the collection.
    """
    index: dict[str, list[str]] = {}
    names = [path for path, leaf in ledger.model.items() if leaf.is_weight]
    bare = is_collections(tuple(ledger.model)) and not is_collections(tuple(ledger.checkpoint))
    for path in names:
        spellings = {path, _plain(path)}
        if bare and (inner := path.partition("/")[2]) and inner not in ledger.model:
            spellings |= {inner, _plain(inner)}
        for spelling in spellings:
            index.setdefault(spelling, []).append(path)
    return index


def _plain(path: str) -> str:
    """The path with the keys that avoid a keyword of Python, such as `if_`, as they are in other frameworks."""
    return "/".join(key[:-1] if key.endswith("_") and keyword.iskeyword(key[:-1]) else key for key in path.split("/"))


def _targets(place: str, layout: Layout, index: Mapping[str, list[str]]) -> list[str]:
    """The leaves that a path may mean: itself, or under the names flax has for what the layout calls its last key."""
    for spelling in (place, _plain(place)):
        if spelling in index:
            return index[spelling]
    stem, _, leaf = _plain(place).rpartition("/")
    names = (f"{stem}/{name}" if stem else name for name in layout.candidates(leaf))
    return [target for name in names for target in index.get(name, ())]


def _target(piece: Piece, place: str, layout: Layout, index: Mapping[str, list[str]]) -> tuple[str, str]:
    """The leaf that a path means, or the packed leaf it is a gate of with the gate's name; "" where there is none.

    Raises:
      GraftError: there are several.
    """
    targets = _targets(place, layout, index)
    if len(targets) > 1:
        raise GraftError(f"pretrained: {piece.path!r} may go to {' or '.join(targets)}; tell which with rename")
    if targets:
        return targets[0], ""
    *above, gate, leaf = ("", *_plain(place).split("/"))  # so that a place of one key has a gate too: ""
    for name, cells in _PACKED.items():
        if any(gate in cell for cell in cells):
            packed = _targets("/".join((*above[1:], name, leaf)), layout, index)
            return (packed[0], gate) if len(packed) == 1 else ("", "")
    return "", ""


def _leave_without_place(ledger: Ledger, piece: Piece, place: str, layout: Layout, index: Mapping[str, list[str]]) -> None:
    """Enter a piece that has no place in the model, and why."""
    *above, gate, leaf = ("", *place.split("/"))
    if layout.is_unwanted(piece.path.rpartition("/")[2]):
        ledger.leave(piece.sources, "a counter that flax does not keep", intended=True)
    elif (gate, leaf) == ("hn", "bias") and "/".join((*above[1:], "dense_h/kernel")) in index:
        zero = not np.any(np.asarray(piece.value, np.float32))
        what = "it is zero" if zero else "outputs differ without it; linen's GRUCell has it"
        why = f"{_part(piece)}nnx.GRUCell has no bias behind its reset gate: {what}"
        ledger.leave(piece.sources, why, intended=zero)
    else:
        ledger.leave(piece.sources, _part(piece) + _no_place(place, ledger))


def _part(piece: Piece) -> str:
    """How an account begins that is about a part of a leaf."""
    return "" if piece.path in piece.sources else f"the part {piece.path}: "


def _no_place(place: str, ledger: Ledger) -> str:
    if place.rpartition("/")[2].startswith("in_proj_"):
        return f"no leaf {place!r} in params: packed attention is split by transfer.pytorch_attention()"
    close = difflib.get_close_matches(place, ledger.model, n=1)
    return f"no leaf {place!r} in params" + (f"; the nearest is {close[0]!r}" if close else "")
