"""Dense kernels that may read a flattened map, whose units other frameworks count in another order than flax.

A map of c channels and k places, flattened, has its channels outermost in a framework with channels first and innermost in
flax. Both have c·k units, so shapes tell nothing: the kernel has to be reordered (`Permute`), or the outputs are wrong. Which
kernel reads a map is not in a checkpoint either. What is in it: its input is c·k wide, c the outputs of a convolution, and
nothing else in the checkpoint is as wide.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from varscale.transfer.layouts import Layout
from varscale.transfer.rearrange import Piece


@dataclass(frozen=True)
class Flattened:
    """A dense kernel that may read a flattened map.

    Attributes:
      target: the leaf of the model it was moved to.
      source: the leaf of the checkpoint it came from.
      axis: the axis of its inputs, as it is stored.
      channels: of the map.
      places: of the map.
    """

    target: str
    source: str
    axis: int
    channels: int
    places: int

    def __str__(self) -> str:
        return f"{self.source} ({self.channels * self.places} inputs = {self.channels} channels x {self.places} places)"


def find_flattened(kernels: Iterable[tuple[str, Piece, Layout]], embeddings: Iterable[int]) -> list[Flattened]:
    """The dense kernels that may read a flattened map, in the order of the checkpoint.

    Args:
      kernels: every kernel that was moved, with its leaf of the model and its layout, in the order of the checkpoint.
      embeddings: the widths of the tables that are looked up.

    Returns:
      Those of a layout with channels first, to which no `Permute` was applied, and whose width is c·k, k > 1, for a convolution
      of c > 1 outputs, but not the outputs of a convolution, of an embedding or of another dense kernel. A dense kernel that
      comes first of all and behind a convolution is among them even where another one has as many outputs.
    """
    dense, convolutions, leads = [], [], False
    for target, piece, layout in kernels:
        if not layout.convolution.endswith("*"):  # the window is not innermost: channels come last
            continue
        shape = piece.value.shape[piece.stacked :]
        if len(shape) > 2:
            convolutions.append(shape[layout.convolution.index("O")])
        elif len(shape) == 2:
            leads = leads or bool(convolutions and not dense)
            axis = layout.dense.index("I")
            dense.append((target, piece, axis, shape[axis], shape[1 - axis]))
    known = {*convolutions, *embeddings}
    found = []
    for place, (target, piece, axis, width, _) in enumerate(dense):
        channels = next((c for c in reversed(convolutions) if 1 < c < width and width % c == 0), None)
        others = {outputs for other, (*_, outputs) in enumerate(dense) if other != place}
        if channels and not piece.permuted and width not in known and (width not in others or (leads and place == 0)):
            found.append(Flattened(target, piece.sources[0], axis, channels, width // channels))
    return found


def warning(found: list[Flattened]) -> str:
    """What to tell the caller of them."""
    one, *more = {each.source: each for each in found}.values()
    side = math.isqrt(one.places)
    window = (side, side) if side**2 == one.places else (one.places,)
    flax, same = (*range(1, len(window) + 1), 0), tuple(range(len(window) + 1))
    named = "; ".join(map(str, (one, *more[:3]))) + (f"; and {len(more) - 3} more" if len(more) > 3 else "")
    permute = f"transfer.Permute({one.source!r}, {one.axis}, {(one.channels, *window)}, order={flax})"
    return (
        f"graft: shapes do not tell whether these dense kernels read a flattened map, whose units are in another order where "
        f"channels come first: {named}. If so, give rearrange={permute}, with the rows and columns of the map; if not, the "
        f"same with order={same} says so"
    )
