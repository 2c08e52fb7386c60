"""Surgery that is the same for every checkpoint of a framework: packed attention, gates of recurrent cells."""

from varscale.transfer.rearrange import Add, Operation, Split


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


def pytorch_lstm(node: str = "**", layer: int = 0) -> tuple[Operation, ...]:
    """One layer of PyTorch's `nn.LSTM` for linen's `LSTMCell` and `OptimizedLSTMCell` (use layout="pytorch").

    Its gates i, f, g, o become ii, if, ig, io and hi, hf, hg, ho beside each other; PyTorch's two biases are added up.
    """
    add, ih, hh = f"bias_l{layer}", f"weight_ih_l{layer}", f"weight_hh_l{layer}"
    return (
        Add(node, (f"bias_ih_l{layer}", f"bias_hh_l{layer}"), add),
        Split(f"{node}/{ih}", tuple(f"i{gate}/weight" for gate in "ifgo")),
        Split(f"{node}/{hh}", tuple(f"h{gate}/weight" for gate in "ifgo")),
        Split(f"{node}/{add}", tuple(f"h{gate}/bias" for gate in "ifgo")),
    )


def pytorch_gru(node: str = "**", layer: int = 0) -> tuple[Operation, ...]:
    """One layer of PyTorch's `nn.GRU` for linen's `GRUCell` (use layout="pytorch"): gates r, z, n.

    The two biases of r and z are added up; those of n stay apart, for the reset gate stands between them.
    """
    ih, hh = f"weight_ih_l{layer}", f"weight_hh_l{layer}"
    return (
        Split(f"{node}/{ih}", tuple(f"i{gate}/weight" for gate in "rzn")),
        Split(f"{node}/{hh}", tuple(f"h{gate}/weight" for gate in "rzn")),
        Split(f"{node}/bias_ih_l{layer}", ("ir/input_bias", "iz/input_bias", "in/bias")),
        Split(f"{node}/bias_hh_l{layer}", ("ir/hidden_bias", "iz/hidden_bias", "hn/bias")),
        Add(f"{node}/ir", ("input_bias", "hidden_bias"), "bias"),
        Add(f"{node}/iz", ("input_bias", "hidden_bias"), "bias"),
    )


def keras_lstm(node: str = "**") -> tuple[Operation, ...]:
    """Keras' `LSTM` for linen's `LSTMCell` and `OptimizedLSTMCell` (use layout="keras").

    `node` is the module that holds kernel, recurrent_kernel and bias.
    """
    return (
        Split(f"{node}/kernel", tuple(f"i{gate}/kernel" for gate in "ifgo"), axis=-1),
        Split(f"{node}/recurrent_kernel", tuple(f"h{gate}/kernel" for gate in "ifgo"), axis=-1),
        Split(f"{node}/bias", tuple(f"h{gate}/bias" for gate in "ifgo"), axis=-1),
    )
