"""Surgery that is the same for every checkpoint of a framework: packed attention, gates of recurrent cells."""

from collections.abc import Sequence
from dataclasses import dataclass

from varscale.programs.patterns import matches
from varscale.transfer.rearrange import Add, Operation, Piece, Split


def pytorch_attention(node: str = "**", *, cross: bool = False) -> tuple[Operation, ...]:
    """PyTorch's `nn.MultiheadAttention` for flax's `MultiHeadDotProductAttention` and `MultiHeadAttention` (use
    layout="pytorch").

    The packed in_proj becomes query, key and value; `out_proj` is left for a rename rule ({"**/out_proj": "**/out"}).

    Args:
      node: a glob of the attention modules.
      cross: whether keys and values have other widths than the queries, which PyTorch keeps unpacked.
    """
    names = ("query", "key", "value")
    bias = Split(f"{node}/in_proj_bias", tuple(f"{name}/bias" for name in names))
    if cross:
        return (bias,)
    return (Split(f"{node}/in_proj_weight", tuple(f"{name}/weight" for name in names)), bias)


def pytorch_lstm(node: str = "**", layer: int | str = 0) -> tuple[Operation, ...]:
    """One layer of PyTorch's `nn.LSTM` for flax's `LSTMCell` and `OptimizedLSTMCell`, linen's and nnx's (use layout="pytorch").

    Its gates i, f, g, o become ii, if, ig, io and hi, hf, hg, ho beside each other, which `graft` packs again for a cell that
    keeps them packed (nnx's `OptimizedLSTMCell`); PyTorch's two biases are added up.

    Args:
      node: a glob of the modules.
      layer: the layer's number; "0_reverse" is the backward half of a bidirectional one. A net of several layers is grafted
        cell by cell, each from the whole checkpoint.
    """
    add, ih, hh = f"bias_l{layer}", f"weight_ih_l{layer}", f"weight_hh_l{layer}"
    kernels = (
        Split(f"{node}/{ih}", tuple(f"i{gate}/weight" for gate in "ifgo")),
        Split(f"{node}/{hh}", tuple(f"h{gate}/weight" for gate in "ifgo")),
    )
    biases = (
        Add(node, (f"bias_ih_l{layer}", f"bias_hh_l{layer}"), add),
        Split(f"{node}/{add}", tuple(f"h{gate}/bias" for gate in "ifgo")),
    )
    return (_Cell(f"{node}/{hh}", kernels, biases),)


def pytorch_gru(node: str = "**", layer: int | str = 0) -> tuple[Operation, ...]:
    """One layer of PyTorch's `nn.GRU` for flax's `GRUCell` (use layout="pytorch"): gates r, z, n.

    The two biases of r and z are added up; those of n stay apart, for the reset gate stands between them. nnx's `GRUCell` has
    no place for the second of these: it is left over, and the outputs are PyTorch's only if it is zero.

    Args:
      node: a glob of the modules.
      layer: as for `pytorch_lstm`.
    """
    ih, hh = f"weight_ih_l{layer}", f"weight_hh_l{layer}"
    kernels = (
        Split(f"{node}/{ih}", tuple(f"i{gate}/weight" for gate in "rzn")),
        Split(f"{node}/{hh}", tuple(f"h{gate}/weight" for gate in "rzn")),
    )
    return (_Cell(f"{node}/{hh}", kernels, _gru_biases(node, f"bias_ih_l{layer}", f"bias_hh_l{layer}", "rzn", axis=0)),)


def keras_lstm(node: str = "**") -> tuple[Operation, ...]:
    """Keras' `LSTM` for flax's `LSTMCell` and `OptimizedLSTMCell`, linen's and nnx's (use layout="keras").

    Args:
      node: a glob of the modules that hold kernel, recurrent_kernel and bias. Modules without a recurrent_kernel stay as they
        are.
    """
    kernels = (
        Split(f"{node}/kernel{_INDEX}", tuple(f"i{gate}/kernel" for gate in "ifgo"), axis=-1),
        Split(f"{node}/recurrent_kernel{_INDEX}", tuple(f"h{gate}/kernel" for gate in "ifgo"), axis=-1),
    )
    biases = (Split(f"{node}/bias{_INDEX}", tuple(f"h{gate}/bias" for gate in "ifgo"), axis=-1),)
    return (_Cell(f"{node}/recurrent_kernel{_INDEX}", kernels, biases),)


def keras_gru(node: str = "**") -> tuple[Operation, ...]:
    """Keras' `GRU` with `reset_after=True`, its default, for flax's `GRUCell` (use layout="keras"): gates z, r, h.

    Its two biases become flax's as in `pytorch_gru`. A GRU with `reset_after=False` resets the state before it multiplies it,
    which flax's cells do not: one with biases is refused, and one without cannot be told from its weights.

    Args:
      node: as for `keras_lstm`.
    """
    kernels = (
        Split(f"{node}/kernel{_INDEX}", tuple(f"i{gate}/kernel" for gate in "zrn"), axis=-1),
        Split(f"{node}/recurrent_kernel{_INDEX}", tuple(f"h{gate}/kernel" for gate in "zrn"), axis=-1),
    )
    biases = (
        _ResetAfter(f"{node}/bias{_INDEX}"),
        Split(f"{node}/bias{_INDEX}", ("input_bias", "recurrent_bias")),
        *_gru_biases(node, "input_bias", "recurrent_bias", "zrn", axis=-1),
    )
    return (_Cell(f"{node}/recurrent_kernel{_INDEX}", kernels, biases),)


# TensorFlow's names end in the index of an output.
_INDEX = "{,:0}"


def _gru_biases(node: str, inputs: str, hidden: str, gates: str, axis: int) -> tuple[Operation, ...]:
    """The packed biases of a GRU split: added up for r and z, apart for n."""
    own = {"n": ("in/bias", "hn/bias"), "r": ("ir/inputs", "ir/hidden"), "z": ("iz/inputs", "iz/hidden")}
    return (
        Split(f"{node}/{inputs}", tuple(own[gate][0] for gate in gates), axis=axis),
        Split(f"{node}/{hidden}", tuple(own[gate][1] for gate in gates), axis=axis),
        Add(f"{node}/ir", ("inputs", "hidden"), "bias"),
        Add(f"{node}/iz", ("inputs", "hidden"), "bias"),
    )


@dataclass(frozen=True)
class _Cell:
    """Operations on the modules that hold a recurrent kernel, and no others; those on biases only where there are any.

    Attributes:
      recurrent: a glob of the recurrent kernels.
      kernels: operations on kernels.
      biases: operations on biases.
    """

    recurrent: str
    kernels: tuple[Operation, ...]
    biases: tuple[Operation, ...]

    def __call__(self, pieces: Sequence[Piece], /) -> list[Piece]:
        def module(piece: Piece) -> str:
            return piece.path.rpartition("/")[0]

        cells = {module(piece) for piece in pieces if matches(self.recurrent, piece.path)}
        if not cells:
            raise ValueError(f"the checkpoint has no recurrent kernel {self.recurrent!r}")
        inside: Sequence[Piece] = [piece for piece in pieces if module(piece) in cells]
        biased = any("bias" in piece.path.rpartition("/")[2] for piece in inside)
        for operation in (*self.kernels, *(self.biases if biased else ())):
            inside = operation(inside)
        return [*(piece for piece in pieces if module(piece) not in cells), *inside]


@dataclass(frozen=True)
class _ResetAfter:
    """Refuse the one bias of a Keras GRU that resets the state before it multiplies it."""

    node: str

    def __call__(self, pieces: Sequence[Piece], /) -> list[Piece]:
        for piece in pieces:
            if matches(self.node, piece.path) and piece.value.ndim - piece.stacked != 2:
                raise ValueError(
                    f"keras_gru: {piece.path!r} has shape {piece.value.shape}, not (2, 3 * units): the layer was made with "
                    f"reset_after=False, which no cell of flax computes"
                )
        return list(pieces)
