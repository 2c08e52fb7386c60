"""`vs.lsuv`: one sweep is exact where each kernel is used once; parts, stacks, shared kernels; what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import varscale as vs

KEY = jax.random.key


def data(*shape, seed=0):
    return jax.random.normal(KEY(seed), shape)


class Block(nn.Module):
    """A transformer block with one packed kernel for query, key and value."""

    @nn.compact
    def __call__(self, x, _=None):
        qkv = nn.Dense(3 * 16, name="qkv")(nn.LayerNorm()(x)).reshape(*x.shape[:2], 3, 2, 8)
        q, k, v = (qkv[:, :, i] for i in range(3))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5)
        x = x + nn.Dense(16, name="out")(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))
        return x + nn.Dense(16, name="down")(nn.gelu(nn.Dense(32, name="up")(nn.LayerNorm()(x)))), None


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(20, 16)(ids)
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(5, name="head")(stack(name="layers")(x, None)[0])


IDS = jax.random.randint(KEY(0), (4, 8), 0, 20)


def test_a_chain_is_exact_after_one_sweep_at_depth_1000_and_width_16():
    def net(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])[0] @ params["head"]

    params = {"layers": data(1000, 16, 16) * 0.1, "head": data(16, 3, seed=1)}
    found, account = vs.lsuv(net, params, data(32, 16, seed=2))
    assert account.sweeps == 1
    assert len(account) == 1001
    assert max(abs(row.after - 1) for row in account) < 1e-5
    assert account["layers@7"].factor == pytest.approx(
        np.linalg.norm(found["layers"][7]) / np.linalg.norm(params["layers"][7]), rel=1e-4
    )
    x = data(32, 16, seed=2)
    for w in found["layers"][:30]:  # what the account says is what a plain pass gives
        y = x @ w
        assert float(y.std()) == pytest.approx(1, abs=1e-4)
        x = jnp.tanh(y)


def test_packed_parts_and_scanned_layers_have_factors_of_their_own():
    model = Encoder()
    params = model.init(KEY(1), IDS)
    for part, scale in ((slice(0, 16), 3.0), (slice(32, 48), 0.2)):
        kernel = params["params"]["layers"]["qkv"]["kernel"]
        params["params"]["layers"]["qkv"]["kernel"] = kernel.at[1, :, part].multiply(scale)
    found, account = vs.lsuv(model, params, IDS)
    assert account.sweeps == 1
    assert not account.missed
    assert [row.path for row in account][:4] == [f"layers/qkv/kernel@0[{part}]" for part in ("query", "key", "value")] + [
        "layers/out/kernel@0"
    ]
    ratio = account["layers/qkv/kernel@1[value]"].factor / account["layers/qkv/kernel@1[query]"].factor
    assert ratio == pytest.approx(15, rel=0.3)
    again, second = vs.lsuv(model, found, IDS)
    assert second.sweeps == 0
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again, found))
    assert account.left_alone == {"Embed_0/embedding": "a table that is looked up"}


def test_convolutions_batch_norm_and_a_zero_head():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(x)))
            x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8)(x))
            x = nn.relu(nn.ConvTranspose(4, (3, 3), strides=(2, 2))(x))
            return nn.Dense(3, kernel_init=nn.initializers.zeros)(x.mean((1, 2)))

    model, x = Net(), data(4, 8, 8, 3)
    given = vs.inputs(x, train=True)
    variables = model.init(KEY(1), x, train=True)
    found, account = vs.lsuv(model, variables, given)
    assert [row.after for row in account][:3] == pytest.approx([1, 1, 1], abs=1e-4)
    assert account.left_alone == {"Dense_0/kernel": "zero"}
    assert account["Dense_0/kernel"].factor is None
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found["batch_stats"], variables["batch_stats"]))
    assert "brought to standard deviation 1 in 1 sweep" in str(account)


def test_a_bias_that_is_not_zero_counts():
    """What a layer puts out has a mean square of 1, the bias included; where the bias alone has more, the product has 1."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            biased = nn.initializers.normal(0.6)
            x = jnp.tanh(nn.Dense(32, bias_init=biased, name="a")(x))
            x = nn.relu(nn.Dense(32, bias_init=nn.initializers.constant(0.5), name="b")(x))
            return nn.Dense(3, bias_init=nn.initializers.constant(3.0), name="c")(x)

    net, x = Net(), data(64, 16)
    params, account = vs.lsuv(net, net.init(KEY(1), x), x)
    assert [row.after for row in account][:2] == pytest.approx([1, 1], abs=1e-4)
    assert [row.path for row in account.missed] == ["c/kernel"]
    _, state = net.apply(params, x, capture_intermediates=True, mutable=["intermediates"])
    made = {name: out["__call__"][0] for name, out in state["intermediates"].items() if name != "__call__"}
    assert [float(jnp.mean(made[name] ** 2)) for name in "ab"] == pytest.approx([1, 1], abs=1e-3)
    assert float(jnp.mean((made["c"] - 3) ** 2)) == pytest.approx(1, abs=1e-3)


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(20, 16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.head = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        return self.head(x + self.attention(x))


def test_an_nnx_model_gives_a_new_model_and_a_state_gives_a_state():
    model = Attention(nnx.Rngs(0))
    before = np.asarray(model.head.kernel[...])
    new, account = vs.lsuv(model, None, IDS)
    assert isinstance(new, Attention)
    assert np.array_equal(before, model.head.kernel[...])
    assert not np.array_equal(before, new.head.kernel[...])
    assert len(account) == 5
    assert not account.missed
    assert float(new(IDS).std()) == pytest.approx(1, abs=0.01)
    state, _ = vs.lsuv(model, nnx.split(model)[1], IDS, rows="head")
    assert isinstance(state, nnx.State)
    changed = [row.path for row in vs.lsuv(model, None, IDS, rows="attention/*").__getitem__(1) if row.factor is not None]
    assert changed == [f"attention/{name}/kernel" for name in ("query", "key", "value", "out")]


def test_shared_kernels_have_one_factor():
    def net(params, x):
        for _ in range(6):
            x = jnp.tanh(x @ params["w"])
        return x @ params["head"]

    found, account = vs.lsuv(net, {"w": data(32, 32) * 0.1, "head": data(32, 4)}, data(64, 32, seed=1))
    stds = [row.after for row in account if row.path == "w"]
    assert account.sweeps <= 5
    assert np.exp(np.mean(np.log(stds))) == pytest.approx(1, abs=0.01)
    assert account["head"].after == pytest.approx(1, abs=0.01)
    assert len({row.factor for row in account if row.path == "w"}) == 1
    assert account.missed
    assert found["w"].shape == (32, 32)


def test_a_recurrent_cell_and_a_loop():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.RNN(nn.GRUCell(12))(x))

    x = data(4, 6, 8)
    _, account = vs.lsuv(Net(), Net().init(KEY(1), x), x)
    assert not account.missed
    assert account.sweeps <= 5


def test_slices_of_one_array_are_kernels_of_their_own():
    def net(params, x):
        for i in range(3):
            x = jnp.tanh(x @ params["w"][i])
        return x

    params = {"w": data(3, 16, 16) * jnp.array([1.0, 5.0, 0.1])[:, None, None]}
    found, account = vs.lsuv(net, params, data(64, 16, seed=1))
    assert account.sweeps == 1
    assert [row.after for row in account] == pytest.approx([1, 1, 1], abs=1e-4)
    measured = [float(jnp.linalg.norm(found["w"][i]) / jnp.linalg.norm(params["w"][i])) for i in range(3)]
    assert [row.factor for row in account] == pytest.approx(measured, rel=1e-5)


def test_low_precision_keeps_its_dtype():
    net = nn.Sequential([nn.Dense(32, param_dtype=jnp.bfloat16), nn.relu, nn.Dense(8, param_dtype=jnp.bfloat16)])
    x = data(64, 16).astype(jnp.bfloat16)
    found, account = vs.lsuv(net, net.init(KEY(0), x), x)
    assert not account.missed
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}


def test_a_normalised_kernel_and_a_tied_table_keep_their_values():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            table = nn.Embed(20, 16)
            return table.attend(nn.tanh(nn.Dense(16)(nn.WeightNorm(nn.Dense(16))(table(ids)))))

    model = Net()
    params = model.init(KEY(1), IDS)
    found, account = vs.lsuv(model, params, IDS)
    same = jax.tree_util.tree_map_with_path(lambda path, a, b: (path, bool(jnp.array_equal(a, b))), params, found)
    kept = {jax.tree_util.keystr(p) for p, equal in jax.tree.leaves(same, is_leaf=lambda x: isinstance(x, tuple)) if equal}
    assert "['params']['Embed_0']['embedding']" in kept
    assert set(account.left_alone.values()) == {
        "a table that is looked up",
        "its scale has no effect: the program normalises it",
    }
    assert not account.missed


def test_kernels_stacked_by_vmap_have_factors_of_their_own():
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(5, name="expert")(x)

    x = data(3, 40, 16) * jnp.array([1.0, 10.0, 0.1])[:, None, None]
    found, account = vs.lsuv(Experts(), Experts().init(KEY(1), x), x)
    assert [row.path for row in account] == [f"expert/kernel[{i}]" for i in range(3)]
    assert Experts().apply(found, x).std((1, 2)) == pytest.approx([1, 1, 1], abs=1e-4)


def test_sharded_parameters_keep_their_sharding():
    mesh = jax.make_mesh((2,), ("model",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    net, x = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(8)]), data(16, 8)
    params = jax.tree.map(lambda leaf: jax.device_put(leaf, place) if leaf.ndim == 2 else leaf, net.init(KEY(0), x))
    found, account = vs.lsuv(net, params, x)
    assert not account.missed
    assert found["params"]["layers_0"]["kernel"].sharding.is_equivalent_to(place, 2)


def plain(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


GOOD = {"a": data(8, 8), "b": data(8, 2)}


@pytest.mark.parametrize(
    ("params", "x", "options", "message"),
    [
        (GOOD, data(4, 8), {"tolerance": 0}, "tolerance must be"),
        (GOOD, data(4, 8), {"rows": "c*"}, "matches none"),
        ({**GOOD, "b": GOOD["b"] * jnp.nan}, data(4, 8), {}, "'b' holds NaN"),
        (jax.tree.map(jnp.zeros_like, GOOD), data(4, 8), {}, "are zero"),
        (GOOD, jnp.zeros((4, 8)), {}, "variance 0"),
        (GOOD, data(4, 8) * jnp.inf, {}, "not finite"),
        (GOOD, data(4, 7), {}, "does not run"),
        (GOOD, jax.ShapeDtypeStruct((4, 8), "float32"), {}, "must hold arrays"),
        ({"a": GOOD["a"]}, data(4, 8), {}, "does not run"),
    ],
)
def test_bad_input(params, x, options, message):
    with pytest.raises(ValueError, match=message):
        vs.lsuv(plain, params, x, **options)


def test_a_model_without_kernels():
    with pytest.raises(ValueError, match="no kernel"):
        vs.lsuv(lambda params, x: x + params["b"][None], {"b": data(8)}, data(4, 8))
