"""What a program does with each parameter, read off its trace, against constructions whose answer is known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from optax.contrib import muon

import varscale as vs
from varscale.usage import layouts
from varscale.usage.table import uses
from varscale.usage.values import after_function

ROWS = jax.ShapeDtypeStruct((4, 16), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 6, 16), jnp.float32)
IDS = jax.ShapeDtypeStruct((2, 6), jnp.int32)
PICTURES = jax.ShapeDtypeStruct((2, 16, 16, 8), jnp.float32)


class Block(nn.Module):
    """A pre-norm transformer block."""

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(h, h)
        h = nn.gelu(nn.Dense(64, name="up")(nn.RMSNorm()(x)))
        return x + nn.Dense(16, name="down")(h)


class LanguageModel(nn.Module):
    """Tied embeddings, learned positions, two blocks."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(100, 16)
        x = embed(ids) + self.param("positions", nn.initializers.normal(0.02), (1, 6, 16))
        for i in range(2):
            x = Block(name=f"block{i}")(x)
        return embed.attend(nn.LayerNorm(name="final")(x))


def roles(model, x, **kwargs):
    return {p.path: p.role for p in uses(model, x, **kwargs)}


def test_an_mlp():
    found = uses(nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(32), jnp.tanh, nn.Dense(10)]), ROWS)
    kernels = [found[f"layers_{i}/kernel"] for i in (0, 2, 4)]
    assert [k.role for k in kernels] == ["input", "hidden", "readout"]
    assert [(k.main.before, k.main.after) for k in kernels] == [("", "relu"), ("relu", "tanh"), ("tanh", "")]
    assert [(k.main.fan_in, k.main.fan_out) for k in kernels] == [(16, 32), (32, 32), (32, 10)]
    assert found["layers_0/bias"].role == "vector"
    assert found.additions == 0


def test_rows_of_known_places_are_a_table_of_positions():
    """Looked up by `arange`, as GPT-2's; a table of relative places is one where it is added to scores."""

    def model(p, ids):
        x = p["tokens"][ids] + p["positions"][jnp.broadcast_to(jnp.arange(6), ids.shape)]
        apart = p["relative"][jnp.arange(6)[:, None] - jnp.arange(6)[None]]
        return jax.nn.softmax(x @ x.mT + apart[None, ..., 0]) @ x @ p["head"]

    shapes = {"tokens": (30, 8), "positions": (9, 8), "relative": (11, 1), "head": (8, 30)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    found = uses(model, IDS, params=params)
    roles = {"tokens": "embedding", "positions": "position", "relative": "position", "head": "readout"}
    assert {path: found[path].role for path in roles} == roles


def test_a_transformer():
    found = uses(LanguageModel(), IDS)
    assert found.additions == 4
    embedding = found["Embed_0/embedding"]
    assert (embedding.role, embedding.tied, embedding.times) == ("embedding", True, 2)
    assert [use.role for use in embedding.uses] == ["embedding", "readout"]
    assert [(use.fan_in, use.fan_out) for use in embedding.uses] == [(1, 16), (16, 100)]
    assert found["positions"].role == "position"
    for i in (0, 1):
        block = f"block{i}"
        attention = {name: found[f"{block}/attention/{name}/kernel"].main for name in ("query", "key", "value", "out")}
        assert [attention[name].parts for name in attention] == [("query",), ("key",), ("value",), ()]
        assert all(attention[name].output_axes == (1, 2) and attention[name].fan_in == 16 for name in ("query", "key", "value"))
        assert (attention["out"].reduction_axes, attention["out"].ends, attention["out"].depth) == ((0, 1), 2 * i + 1, 2 * i)
        assert (found[f"{block}/down/kernel"].main.ends, found[f"{block}/down/kernel"].main.before) == (2 * i + 2, "gelu")
        assert (found[f"{block}/up/kernel"].main.before, found[f"{block}/up/kernel"].main.ends) == ("norm", None)
        assert found[f"{block}/RMSNorm_0/scale"].role == "norm scale"


@pytest.mark.parametrize("remat", [False, True])
def test_layers_that_are_scanned(remat):
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return Block(name="block")(x), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = nn.remat(Body) if remat else Body
            x, _ = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=5)(name="layers")(x, None)
            return nn.Dense(3, name="head")(x)

    found = uses(Net(), TOKENS)
    out = found["layers/block/attention/out/kernel"].main
    assert (out.batch_axes, out.reduction_axes, out.output_axes, out.ends) == ((0,), (1, 2), (3,), 1)
    assert (found.additions, found["head/kernel"].main.depth, found["head/kernel"].role) == (10, 10, "readout")
    numbers = found.muon_dimension_numbers()
    assert numbers["layers"]["block"]["up"]["kernel"] == optax.contrib.MuonDimensionNumbers((1,), (2,))
    assert numbers["head"]["kernel"] is None


@pytest.mark.parametrize(
    ("layer", "settings"),
    [
        (nn.Conv(16, (3, 3)), {"padding": "SAME"}),
        (nn.Conv(16, (3, 3), strides=2, padding="VALID"), {"strides": 2}),
        (nn.Conv(16, (3, 3), feature_group_count=4), {"groups": 4, "padding": "SAME"}),
        (nn.Conv(16, (3, 3), kernel_dilation=2, padding="VALID"), {"dilation": 2}),
        (nn.ConvTranspose(16, (4, 4), strides=(2, 2)), {"strides": 2, "transposed": True, "padding": "SAME"}),
    ],
    ids=["same", "strided", "grouped", "dilated", "transposed"],
)
def test_fans_of_convolutions_are_those_of_their_settings(layer, settings):
    found = uses(nn.Sequential([nn.relu, layer, nn.relu, nn.Conv(3, (1, 1))]), PICTURES)
    kernel = found["layers_1/kernel"]
    fans = vs.conv_fans(kernel.shape, input_size=16, **settings)
    assert (kernel.main.fan_in, kernel.main.fan_out) == pytest.approx((fans.fan_in, fans.fan_out), rel=1e-12)
    assert (kernel.main.reduction_axes, kernel.main.output_axes) == ((0, 1, 2), (3,))


def test_a_residual_net_with_a_projection_on_its_shortcut():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
            for i, (width, stride) in enumerate([(8, 1), (16, 2)]):
                y = nn.relu(nn.GroupNorm(4)(nn.Conv(width, (3, 3), stride, name=f"a{i}")(x)))
                y = nn.GroupNorm(4)(nn.Conv(width, (3, 3), name=f"b{i}")(y))
                if y.shape != x.shape:
                    x = nn.Conv(width, (1, 1), stride, name=f"shortcut{i}")(x)
                x = nn.relu(x + y)
            return nn.Dense(10, name="head")(x.mean((1, 2)))

    found = uses(Net(), PICTURES)
    assert [found[f"{name}/kernel"].main.ends for name in ("a0", "b0", "a1", "b1", "shortcut1")] == [None, 1, None, 2, None]
    assert (found.additions, found["stem/kernel"].role, found["head/kernel"].role) == (2, "input", "readout")
    assert found["a0/kernel"].main.after == "relu"


def test_packed_attention_and_gates():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.qkv = nnx.Linear(16, 48, rngs=rngs)
            self.out = nnx.Linear(16, 16, rngs=rngs)
            self.gates = nnx.Linear(16, 64, rngs=rngs)
            self.down = nnx.Linear(32, 16, rngs=rngs)

        def __call__(self, x):
            q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
            x = x + self.out(jax.nn.softmax(q @ k.swapaxes(1, 2) / 4) @ v)
            gate, up = jnp.split(self.gates(x), 2, axis=-1)
            return x + self.down(jax.nn.silu(gate) * up)

    found = uses(lambda rngs: Net(rngs), TOKENS)
    assert found["qkv/kernel"].main.parts == ("query", "key", "value")
    assert found["gates/kernel"].main.parts == ("gate", "up")
    assert (found["out/kernel"].main.ends, found["down/kernel"].main.ends) == (1, 2)


def test_experts_and_heads_with_kernels_of_their_own():
    def moe(params, x):
        h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, params["up"]))
        y = jnp.einsum("btef,efd->bted", h, params["down"])
        return jnp.einsum("bted,bte->btd", y, jax.nn.softmax(x @ params["router"])) @ params["head"]

    shapes = {"up": (4, 16, 32), "down": (4, 32, 16), "router": (16, 4), "head": (16, 3)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    found = uses(moe, TOKENS, params=params)
    assert {p.path: p.role for p in found} == {"up": "expert", "down": "expert", "router": "input", "head": "readout"}
    up, down = found["up"].main, found["down"].main
    assert (up.fan_in, up.fan_out, up.batch_axes, up.output_axes) == (16, 32, (0,), (2,))
    assert (down.fan_in, down.fan_out, down.batch_axes, down.output_axes) == (32, 16, (0,), (2,))
    assert found.muon_dimension_numbers()["up"] == optax.contrib.MuonDimensionNumbers((1,), (2,))
    heads = uses(nn.Sequential([nn.relu, nn.DenseGeneral(8, axis=-1, batch_dims=0), nn.Dense(1)]), TOKENS)["layers_1/kernel"]
    assert (heads.main.fan_in, heads.main.batch_axes) == (16, (0,))


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.SimpleCell])
def test_recurrent_cells(cell):
    """Every kernel is read once a step, with the fans of its own block, and gates are no residual additions."""
    found = uses(nn.Sequential([nn.RNN(cell(8)), nn.Dense(3)]), TOKENS)
    kernels = [p for p in found if p.path.endswith("kernel") and "layers_1" not in p.path]
    assert len(kernels) >= 2
    for p in kernels:
        assert p.times == 6
        assert (p.main.fan_in, p.main.fan_out) == p.shape
    assert found.additions == 0


def test_depthwise_vectors_and_unused():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(16, name="in")(x)
            self.param("nobody", nn.initializers.ones, (16, 16))
            y = nn.Conv(16, (3,), feature_group_count=16, name="depthwise")(x)
            x = x + self.param("layer_scale", nn.initializers.constant(1e-6), (1, 1, 16)) * y
            token = jnp.broadcast_to(self.param("token", nn.initializers.zeros, (1, 1, 16)), (2, 1, 16))
            return nn.Dense(3, name="head")(jnp.concatenate([token, x], axis=1))

    found = roles(Net(), TOKENS)
    assert found["depthwise/kernel"] == "depthwise"
    assert found["layer_scale"] == found["token"] == "vector"
    assert found["nobody"] == "unused"


def test_parts_of_a_complex_kernel_are_both_read():
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            real, imaginary = (self.param(name, nn.initializers.lecun_normal(), (8, 8)) for name in ("real", "imaginary"))
            decay, phase = (self.param(name, nn.initializers.uniform(), (8,)) for name in ("decay", "phase"))
            kernel, factor = jax.lax.complex(real, imaginary), jnp.exp(jax.lax.complex(-decay, phase))
            return (x.astype(kernel.dtype) @ kernel * factor[None]).real

    found = vs.uses(Recurrent(), jax.ShapeDtypeStruct((4, 8), jnp.float32))
    assert all(p.uses for p in found.parameters)


def test_muon_takes_the_dimension_numbers_in_linen():
    shapes = jax.eval_shape(LanguageModel().init, jax.random.key(0), IDS)["params"]
    found = uses(LanguageModel(), IDS)
    numbers = found.muon_dimension_numbers()
    assert numbers["Embed_0"]["embedding"] is None
    assert numbers["positions"] is None
    assert numbers["block0"]["attention"]["query"]["kernel"] == optax.contrib.MuonDimensionNumbers((0,), (1, 2))
    optimizer = muon(1e-3, muon_weight_dimension_numbers=numbers)
    with jax.numpy_dtype_promotion("standard"):  # as optax has it
        state = jax.eval_shape(optimizer.init, shapes)
        updates, _ = jax.eval_shape(optimizer.update, shapes, state, shapes)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, shapes)
    momentum = state.inner_states["muon"].inner_state[0].mu
    assert momentum["block0"]["up"]["kernel"].shape == (16, 64)
    assert isinstance(momentum["positions"], optax.MaskedNode)
    assert jax.tree.structure(found.labels()) == jax.tree.structure(shapes)


def test_muon_takes_the_dimension_numbers_in_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(50, 16, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)
            self.head = nnx.Linear(16, 50, rngs=rngs)

        def __call__(self, ids):
            x = self.embed(ids)
            return self.head(self.dropout(x + self.norm(self.attention(x))))

    model = Net(nnx.Rngs(0))
    for found in (uses(lambda rngs: Net(rngs), IDS), uses(model, IDS)):
        optimizer = muon(1e-3, muon_weight_dimension_numbers=found.muon_dimension_numbers())
        parameters = nnx.state(model, nnx.Param)
        pure = nnx.as_pure(parameters)
        with jax.numpy_dtype_promotion("standard"):
            state = jax.eval_shape(optimizer.init, parameters)
            jax.eval_shape(optimizer.update, pure, nnx.as_pure(state), pure)  # as nnx.Optimizer calls it
        assert found["attention/query/kernel"].main.parts == ("query",)
        by_role = {role: optax.sgd(0.1) for role in ("embedding", "hidden", "readout", "vector", "norm scale", "input")}
        chosen = optax.partition(by_role, found.labels())
        jax.eval_shape(chosen.update, pure, nnx.as_pure(jax.eval_shape(chosen.init, parameters)), pure)


def test_a_step_of_muon_orthogonalises_each_map():
    """One real step: the singular values of each matrix that the program applies become nearly equal, layer by layer."""

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(16, name="dense")(nn.relu(x)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(16, (3,), name="conv")(x)
            x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
            x, _ = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="layers")(x, None)
            experts = self.param("experts", nn.initializers.lecun_normal(batch_axis=0), (2, 16, 16))
            return nn.Dense(5, name="head")(jnp.einsum("bti,eio->bto", x, experts))

    x = jnp.zeros((2, 4, 8))
    params = jax.eval_shape(Net().init, jax.random.key(0), x)["params"]
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    # The gradients' outputs differ in size by up to 100.
    gradients = tree.unflatten([np.float32(rng.normal(size=p.shape) * np.logspace(0, -2, p.shape[-1])) for p in leaves])
    optimizer = muon(1.0, muon_weight_dimension_numbers=uses(Net(), x).muon_dimension_numbers())
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, _ = jax.jit(lambda g: optimizer.update(g, optimizer.init(g), g))(gradients)

    def ratios(tree):
        """The largest over the middle singular value of each of the 10 matrices; the smallest of a square one may be 0."""
        matrices = [tree["conv"]["kernel"].reshape(24, 16), *tree["layers"]["dense"]["kernel"], *tree["experts"]]
        matrices += [tree["attention"][name]["kernel"].reshape(16, 16) for name in ("query", "key", "value", "out")]
        values = [np.linalg.svd(np.asarray(matrix), compute_uv=False) for matrix in matrices]
        return np.array([v[0] / v[8] for v in values])

    assert (ratios(gradients) > 4).all()
    assert (ratios(updates) < 2).all()


def test_a_step_of_muon_on_an_nnx_model():
    """One real step of `nnx.Optimizer`: hidden and input maps, stacked layers too, move along orthogonal matrices."""

    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def stacked(rngs):
        return nnx.Linear(16, 16, rngs=rngs)

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(50, 16, rngs=rngs)
            self.conv = nnx.Conv(16, 16, (3,), rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
            self.layers = stacked(rngs)
            self.norm = nnx.RMSNorm(16, rngs=rngs)
            self.head = nnx.Linear(16, 50, rngs=rngs)

        def __call__(self, ids):
            x = self.attention(nnx.relu(self.conv(self.embed(ids))))
            x = nnx.scan(lambda x, layer: x + layer(nnx.relu(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
            return self.head(self.norm(x))

    model = Net(nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(
        lambda p: np.float32(rng.normal(size=p.shape) * np.logspace(0, -2, p.shape[-1])), nnx.state(model, nnx.Param)
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        chosen = muon(1.0, muon_weight_dimension_numbers=uses(model, IDS).muon_dimension_numbers())
        nnx.jit(lambda net, optimizer, g: optimizer.update(net, g))(model, nnx.Optimizer(model, chosen, wrt=nnx.Param), drawn)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    moved = jax.tree.map(lambda new, old: np.asarray(new) - old, after, before)
    matrices = [moved["conv"]["kernel"].reshape(48, 16), *moved["layers"]["kernel"]]
    matrices += [moved["attention"][name]["kernel"].reshape(16, 16) for name in ("query", "key", "value", "out")]
    values = [np.linalg.svd(matrix, compute_uv=False) for matrix in matrices]
    assert all(v[0] < 2 * v[8] for v in values)
    assert all(np.all(moved[name][leaf]) for name, leaf in (("embed", "embedding"), ("norm", "scale"), ("head", "bias")))


def test_a_thousand_layers():
    def deep(params, x):
        for w in params:
            x = x + jnp.tanh(x @ w)
        return x

    found = uses(deep, ROWS, params=[jax.ShapeDtypeStruct((16, 16), jnp.float32)] * 1000)
    assert (found.additions, found["999"].main.ends, found["500"].main.depth) == (1000, 1000, 500)


def test_errors_say_what_to_give():
    with pytest.raises(ValueError, match="params must be given for a plain function"):
        uses(lambda params, x: x, ROWS)
    with pytest.raises(KeyError, match="no parameter has the path 'nothing'"):
        uses(nn.Dense(3), ROWS)["nothing"]


def test_layouts_follow_axes():
    axes = layouts.whole((6, 4))
    split = layouts.reshaped(axes, (2, 3, 4))
    assert split is not None
    assert layouts.of(split, (0, 1)) == (0,)
    assert layouts.reshaped(split, (24,)) == ((layouts.Atom(0, 2, stride=3), layouts.Atom(0, 3), layouts.Atom(1, 4)),)
    assert layouts.reshaped(axes, (8, 3)) is None
    assert layouts.part(layouts.sliced(axes, 0, 2, 4)) == (2, 4, 6)


def test_functions_are_named_by_their_primitives():
    assert after_function({"tanh", "integer_pow", "mul"}) == "gelu"
    assert after_function(set()) == ""
