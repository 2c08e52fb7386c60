"""Other frameworks' layouts, against the definitions of their layers written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from varscale import transfer

RNG = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def grafted(module, x, weights, **options):
    variables = module.init(jax.random.key(0), x)
    new, _ = transfer.graft(variables, weights, strict=True, **options)
    return np.asarray(module.apply(new, x))


def correlate(x, weight, groups=1):
    """PyTorch's convolution in two dimensions, out×in×h×w, valid, by its definition; x is channels last."""
    out, per_group, height, width = weight.shape
    windows = np.lib.stride_tricks.sliding_window_view(x, (height, width), axis=(1, 2))
    results = []
    for unit in range(out):
        first = unit // (out // groups) * per_group
        results.append(np.einsum("nxychw,chw->nxy", windows[..., first : first + per_group, :, :], weight[unit]))
    return np.stack(results, axis=-1)


@pytest.mark.parametrize(("channels", "features", "groups"), [(3, 4, 1), (4, 4, 4), (4, 6, 2)])
def test_convolutions_of_pytorch(channels, features, groups):
    x, weight, bias = draw(2, 5, 4, channels), draw(features, channels // groups, 3, 2), draw(features)
    module = nn.Conv(features, (3, 2), padding="VALID", feature_group_count=groups)
    np.testing.assert_allclose(
        grafted(module, x, {"weight": weight, "bias": bias}, layout="pytorch"), correlate(x, weight, groups) + bias, atol=1e-5
    )


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_transposed_convolutions_of_pytorch(transpose_kernel):
    x, weight, stride = draw(2, 4, 3), draw(3, 5, 4), 2
    expected = np.zeros((2, (4 - 1) * stride + 4, 5), np.float32)
    for place in range(4):  # each input spreads the window over its place in the output
        expected[:, place * stride : place * stride + 4] += np.einsum("ni,iow->nwo", x[:, place], weight)
    module = nn.ConvTranspose(5, (4,), strides=(stride,), padding="VALID", use_bias=False, transpose_kernel=transpose_kernel)
    layout = "pytorch" if transpose_kernel else "pytorch_transposed"
    np.testing.assert_allclose(grafted(module, x, {"weight": weight}, layout=layout), expected, atol=1e-5)
    keras = {"kernel": weight.transpose(2, 1, 0)}  # window×out×in
    layout = "flax" if transpose_kernel else "keras_transposed"
    np.testing.assert_allclose(grafted(module, x, keras, layout=layout), expected, atol=1e-5)


def test_depthwise_kernels_of_keras():
    x, kernel = draw(2, 5, 5, 3), draw(3, 3, 3, 2)  # height, width, channels, outputs a channel
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    expected = np.einsum("nxychw,hwcm->nxycm", windows, kernel).reshape(2, 3, 3, 6)
    module = nn.Conv(6, (3, 3), padding="VALID", feature_group_count=3, use_bias=False)
    for name, layout in (("depthwise_kernel", "keras"), ("kernel", "keras_depthwise")):
        np.testing.assert_allclose(grafted(module, x, {f"{name}:0": kernel}, layout=layout), expected, atol=1e-5)


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("kind", ["pytorch", "conv1d", "by head"])
def test_packed_attention(kind):
    heads, width, size = 2, 6, 3
    x, packed, bias, out = draw(2, 4, width), draw(3 * width, width), draw(3 * width), draw(width, width)
    q, k, v = ((x @ w.T + b).reshape(2, 4, heads, size) for w, b in zip(np.split(packed, 3), np.split(bias, 3), strict=True))
    mixed = np.einsum("nhqk,nkhd->nqhd", softmax(np.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(size)), v)
    expected = mixed.reshape(2, 4, width) @ out.T
    into = tuple(f"{name}" for name in ("query", "key", "value"))
    if kind == "pytorch":
        weights = {
            "in_proj_weight": packed,
            "in_proj_bias": bias,
            "out_proj.weight": out,
            "out_proj.bias": np.zeros(width, "f"),
        }
        options = {"layout": "pytorch", "rearrange": transfer.pytorch_attention(), "rename": {"out_proj": "out"}}
    elif kind == "conv1d":
        weights = {"c_attn.weight": packed.T, "c_attn.bias": bias, "c_proj.weight": out.T, "c_proj.bias": np.zeros(width, "f")}
        options = {"layout": "conv1d", "rearrange": transfer.Split("c_attn", into, axis=-1), "rename": {"c_proj": "out"}}
    else:  # one head's q, k and v beside each other, then the next head's
        by_head = packed.reshape(3, heads, size, width).swapaxes(0, 1).reshape(3 * width, width)
        bias_by_head = bias.reshape(3, heads, size).swapaxes(0, 1).reshape(-1)
        weights = {"qkv.weight": by_head, "qkv.bias": bias_by_head, "out.weight": out, "out.bias": np.zeros(width, "f")}
        options = {"layout": "pytorch", "rearrange": transfer.Split("qkv", into, groups=heads)}
    module = nn.MultiHeadDotProductAttention(heads)
    np.testing.assert_allclose(grafted(module, x, weights, **options), expected, atol=1e-5)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gates(count: int, hidden: int, features: int) -> dict[str, np.ndarray]:
    return {
        "weight_ih_l0": draw(count * hidden, features),
        "weight_hh_l0": draw(count * hidden, hidden),
        "bias_ih_l0": draw(count * hidden),
        "bias_hh_l0": draw(count * hidden),
    }


def run_lstm(w, x):
    h = c = np.zeros((len(x), 4), np.float32)
    outputs = []
    for step in range(x.shape[1]):
        z = x[:, step] @ w["weight_ih_l0"].T + h @ w["weight_hh_l0"].T + w["bias_ih_l0"] + w["bias_hh_l0"]
        i, f, g, o = np.split(z, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs, axis=1)


def run_gru(w, x):
    h, outputs = np.zeros((len(x), 4), np.float32), []
    for step in range(x.shape[1]):
        i_r, i_z, i_n = np.split(x[:, step] @ w["weight_ih_l0"].T + w["bias_ih_l0"], 3, axis=-1)
        h_r, h_z, h_n = np.split(h @ w["weight_hh_l0"].T + w["bias_hh_l0"], 3, axis=-1)
        z = sigmoid(i_z + h_z)
        h = (1 - z) * np.tanh(i_n + sigmoid(i_r + h_r) * h_n) + z * h
        outputs.append(h)
    return np.stack(outputs, axis=1)


def keras_of(w: dict[str, np.ndarray], order: tuple[int, ...]) -> dict[str, np.ndarray]:
    """PyTorch's gates as Keras keeps them: transposed, its own order of gates, both biases in one leaf for a GRU."""

    def ordered(name):
        return np.concatenate([np.split(w[name], len(order))[gate] for gate in order]).T

    inputs, hidden = ordered("bias_ih_l0"), ordered("bias_hh_l0")
    bias = inputs + hidden if len(order) == 4 else np.stack([inputs, hidden])
    return {"kernel": ordered("weight_ih_l0"), "recurrent_kernel": ordered("weight_hh_l0"), "bias": bias}


X, LSTM, GRU = draw(2, 5, 3), gates(4, 4, 3), gates(3, 4, 3)
NNX_GRU = GRU | {"bias_hh_l0": GRU["bias_hh_l0"] * (np.arange(12) < 8)}  # no bias behind the reset gate
# The weights of cells, the recipe for them, their layout, and the cells of linen and nnx they fit.
CELLS = {
    "LSTM of PyTorch": (LSTM, transfer.pytorch_lstm, "pytorch", (nn.LSTMCell, nnx.LSTMCell, nnx.OptimizedLSTMCell)),
    "LSTM of Keras": (keras_of(LSTM, (0, 1, 2, 3)), transfer.keras_lstm, "keras", (nn.OptimizedLSTMCell, nnx.LSTMCell)),
    "GRU of PyTorch": (GRU, transfer.pytorch_gru, "pytorch", (nn.GRUCell,)),
    "GRU of PyTorch without a bias behind the reset gate": (NNX_GRU, transfer.pytorch_gru, "pytorch", (nnx.GRUCell,)),
    "GRU of Keras": (keras_of(GRU, (1, 0, 2)), transfer.keras_gru, "keras", (nn.GRUCell,)),
    "GRU of Keras without": (keras_of(NNX_GRU, (1, 0, 2)), transfer.keras_gru, "keras", (nnx.GRUCell,)),
}


@pytest.mark.parametrize("kind", CELLS)
def test_recurrent_cells(kind):
    weights, recipe, layout, cells = CELLS[kind]
    expected = run_lstm(LSTM, X) if "LSTM" in kind else run_gru(NNX_GRU if "without" in kind else GRU, X)
    other = {"dense.kernel": draw(3, 8), "dense.bias": draw(8)} if layout == "keras" else {}  # no cell: the recipe passes it by
    for cell in cells:
        options = {"layout": layout, "rearrange": recipe(), "rename": {"dense": None} if other else {}}
        if issubclass(cell, nnx.Module):
            model = nnx.RNN(cell(3, 4, rngs=nnx.Rngs(0)))
            model, account = transfer.graft(model, {f"cell.{n}": v for n, v in weights.items()} | other, strict=True, **options)
            assert not account.mismatched
            assert all(entry.intended for entry in account.left_over.values())
            found = model(X)
        else:
            named = {f"cell.{name}": value for name, value in weights.items()}
            variables = nn.RNN(cell(4)).init(jax.random.key(0), X)
            new, account = transfer.graft(variables, named | other, **options)
            assert len(account.moved) == len(jax.tree.leaves(variables))
            found = nn.RNN(cell(4)).apply(new, X)
        np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=str(cell))


def test_cells_of_a_framework_without_biases_and_with_tensorflow_s_names():
    weights = {f"{name}:0": value for name, value in keras_of(LSTM, (0, 1, 2, 3)).items() if "bias" not in name}
    cell, account = transfer.graft(
        nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0)), weights, layout="keras", rearrange=transfer.keras_lstm()
    )
    assert set(account.moved) == {"dense_i/kernel", "dense_h/kernel"}
    assert account.moved["dense_h/kernel"].why.endswith("4 gates packed")
    np.testing.assert_array_equal(cell.dense_i.kernel[...], weights["kernel:0"])


def test_linen_s_gates_are_packed_for_nnx_and_missing_gates_are_told_of():
    linen = nn.LSTMCell(3).init(jax.random.key(0), (jnp.zeros(3), jnp.zeros(3)), jnp.zeros(3))["params"]
    cell = nnx.OptimizedLSTMCell(3, 3, rngs=nnx.Rngs(1))
    new, account = transfer.graft(cell, linen, strict=True)
    np.testing.assert_array_equal(new.dense_h.kernel[:, 3:6], linen["hf"]["kernel"])
    back, _ = transfer.graft(nnx.LSTMCell(3, 3, rngs=nnx.Rngs(1)), linen, strict=True)
    np.testing.assert_array_equal(back.if_.kernel[...], linen["if"]["kernel"])
    again, _ = transfer.graft(linen, back, strict=True)
    np.testing.assert_array_equal(again["if"]["kernel"], linen["if"]["kernel"])
    del linen["hf"]
    _, account = transfer.graft(cell, linen)
    assert "packs the gates hi, hf, hg, ho; found are hg, hi, ho" in account.left_over["hi/kernel"].why
    assert set(account.kept) == {"dense_h/kernel", "dense_h/bias"}
    with pytest.raises(transfer.GraftError, match="both go to 'dense_i/kernel'"):
        transfer.graft(cell, {"a": linen["ii"], "ii": linen["ii"]}, rename={"a": "ii"})


def test_the_bias_behind_the_reset_gate_is_left_over_where_nnx_has_no_place_for_it():
    cell = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0))
    options = {"layout": "pytorch", "rearrange": transfer.pytorch_gru()}
    _, account = transfer.graft(cell, GRU, **options)
    assert "outputs differ without it" in account.left_over["bias_hh_l0"].why
    with pytest.raises(transfer.GraftError, match="strict"):
        transfer.graft(cell, GRU, strict=True, **options)
    old = keras_of(GRU, (1, 0, 2))
    with pytest.raises(ValueError, match="reset_after=False"):
        transfer.graft(cell, old | {"bias": old["bias"][0]}, layout="keras", rearrange=transfer.keras_gru())
    with pytest.raises(ValueError, match="no recurrent kernel"):
        transfer.graft(cell, old, layout="keras", rearrange=transfer.keras_gru("encoder"))


def test_a_dense_layer_behind_a_flattened_map_is_permuted():
    x, weight = draw(2, 3, 4, 5), draw(6, 60)  # rows, columns, channels
    expected = x.transpose(0, 3, 1, 2).reshape(2, -1) @ weight.T  # PyTorch flattens channels first
    module = nn.Dense(6, use_bias=False)
    permute = transfer.Permute("weight", axis=1, shape=(5, 3, 4), order=(1, 2, 0))
    found = grafted(module, x.reshape(2, -1), {"weight": weight}, layout="pytorch", rearrange=permute)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def zeros(weights):
    """Flax's leaves for a PyTorch checkpoint of convolutions (rank 4) and dense layers."""
    kinds = {name: "embedding" if name.startswith("table") else "kernel" for name in weights}
    axes = {2: (1, 0), 4: (2, 3, 1, 0)}
    return {
        name: {kinds[name]: np.zeros(w.shape if "table" in name else w.transpose(axes[w.ndim]).shape, np.float32)}
        for name, w in weights.items()
    }


@pytest.mark.parametrize(
    ("shapes", "flagged"),
    [
        ({"conv": (16, 3, 3, 3), "fc1": (120, 400), "fc2": (10, 120)}, {"fc1"}),  # 400 = 16 x 25
        ({"classifier": (10, 64), "features": (16, 3, 3, 3)}, {"classifier"}),  # a file may be sorted by name
        ({"conv": (16, 3, 3, 3), "fc1": (64, 64), "fc2": (10, 64)}, {"fc1"}),  # 64 are fc1's outputs too
        ({"conv": (16, 3, 3, 3), "fc": (10, 16)}, set()),  # a mean over places
        ({"conv": (1, 3, 3, 3), "fc": (10, 25)}, set()),  # one channel: one order
        ({"patch": (16, 3, 4, 4), "up": (64, 16), "down": (16, 64)}, set()),  # a transformer's block
        ({"fc1": (64, 8), "conv": (16, 3, 3, 3), "gate": (16, 64)}, set()),  # a time embedding
        ({"table": (99, 32), "conv": (16, 3, 3, 3), "fc": (8, 32)}, set()),  # an embedding's width
        ({"fc1": (120, 400), "fc2": (10, 120)}, set()),  # no convolution
    ],
)
def test_a_flattened_map_is_warned_of_where_shapes_do_not_tell(recwarn, shapes, flagged):
    weights = {name: draw(*shape) for name, shape in shapes.items()}
    state_dict = {f"{name}.weight": weight for name, weight in weights.items()}
    _, account = transfer.graft(zeros(weights), state_dict, layout="pytorch", strict=True)
    assert {path.split("/")[0] for path, entry in account.moved.items() if "flattened map" in entry.why} == flagged
    assert len(recwarn) == len(flagged)
    for name in flagged:
        assert f"{name}/weight (" in str(recwarn[0].message)


@pytest.mark.parametrize(("order", "differs"), [((1, 2, 0), True), ((0, 1, 2), False)])
def test_either_order_of_a_flattened_map_can_be_said(recwarn, order, differs):
    weights = {"conv": draw(16, 3, 3, 3), "fc": draw(10, 400)}
    permute = transfer.Permute("fc", 1, (16, 5, 5), order)
    state_dict = {f"{name}.weight": weight for name, weight in weights.items()}
    new, _ = transfer.graft(zeros(weights), state_dict, layout="pytorch", rearrange=permute, strict=True)
    assert not len(recwarn)
    assert np.array_equal(new["fc"]["kernel"], weights["fc"].T) != differs
    with pytest.warns(UserWarning, match=r"transfer.Permute\('fc/weight', 1, \(16, 5, 5\), order=\(1, 2, 0\)\)"):
        transfer.graft(zeros(weights), state_dict, layout="pytorch", strict=True)
    transfer.graft({"fc": {"kernel": weights["fc"].T}, "conv": zeros(weights)["conv"]}, {"fc.kernel": weights["fc"].T})
    assert not len(recwarn), "a checkpoint of flax's own order"


def test_an_embedding_is_not_transposed_whatever_its_shape():
    table = draw(3, 3)
    new, _ = transfer.graft({"embedding": jnp.zeros((3, 3))}, {"weight": table}, layout="pytorch", strict=True)
    np.testing.assert_array_equal(new["embedding"], table)


@pytest.mark.filterwarnings("ignore:graft moved nothing")
def test_a_kernel_that_goes_to_a_leaf_of_an_unknown_name_is_refused_until_it_is_explained():
    params, weight = {"lora": {"a": np.zeros((2, 2), np.float32)}}, draw(2, 2)
    rename = {"lora_A/weight": "lora/a"}
    _, account = transfer.graft(params, {"lora_A.weight": weight}, rename=rename, layout="pytorch")
    assert "cannot be told" in account.mismatched["lora/a"].why
    new, _ = transfer.graft(
        params,
        {"lora_A.weight": weight},
        rename=rename,
        layout={"lora_A": "flax", "**": "pytorch"},
        rearrange=transfer.Transpose("lora_A", (1, 0)),
        strict=True,
    )
    np.testing.assert_array_equal(new["lora"]["a"], weight.T)


@pytest.mark.parametrize(
    ("old", "new", "allowed"),
    [
        ((12,), (3, 4), True),
        ((6, 12), (6, 3, 4), True),
        ((12, 6), (3, 4, 6), True),
        ((1, 1, 5), (5,), True),
        ((1,), (), True),
        ((6, 4), (4, 6), False),
        ((6, 4), (24,), False),
        ((2, 2, 6), (4, 6), False),
        ((0, 3), (3, 0), False),
    ],
)
def test_axes_are_regrouped_only_where_that_leaves_no_choice(old, new, allowed):
    from varscale.transfer.layouts import regroups

    assert regroups(old, new) == allowed


def test_a_layout_of_ones_own():
    layout = transfer.Layout("mine", {"w": ("kernel",)}, frozenset({"w"}), dense="OI", convolution="IO*")
    weight = draw(2, 3)
    new, account = transfer.graft({"kernel": np.zeros((3, 2), np.float32)}, {"w": weight}, layout=layout, strict=True)
    np.testing.assert_array_equal(new["kernel"], weight.T)
    assert account.moved["kernel"].why == "OI to IO"
    with pytest.raises(ValueError, match="dense is 'OII'"):
        transfer.Layout("mine", dense="OII")
