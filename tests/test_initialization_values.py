"""Bits: what `vs.initialize` draws is what the jitted init of the model itself draws, for zoos of linen and nnx models."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.nn import initializers as theirs

import varscale as vs

X = np.linspace(-1, 1, 32, dtype=np.float32).reshape(4, 8)
IMAGE = np.linspace(-1, 1, 128, dtype=np.float32).reshape(1, 8, 8, 2)
TOKENS = np.arange(6, dtype=np.int32).reshape(1, 6)


def assert_same(ours, other, except_for=()):
    """Trees of one structure, leaves of one kind, and the same bits but for the paths named."""
    assert jax.tree.structure(ours) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(other), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        if any(part in name for part in except_for):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


def check(model, x=X, key=None, except_for=()):
    key = jax.random.key(7) if key is None else key
    params, account = vs.initialize(model, key, x, account=True)
    account.verify(params)
    assert_same(params, jax.jit(model.init)(key, x), except_for)
    return account


class Mlp(nn.Module):
    widths: tuple[int, ...] = (8, 8, 3)
    kernel_init: object = theirs.lecun_normal()

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.Dense(width, kernel_init=self.kernel_init)(x)
        return x


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))), None


def stack(axis=0, block=Block, length=3, **kwargs):
    return nn.scan(block, variable_axes={"params": axis}, split_rngs={"params": True}, length=length, **kwargs)


class Lifted(nn.Module):
    """Loops in loops, remat, jit and vmap; the leading and another axis."""

    @nn.compact
    def __call__(self, x):
        x, _ = stack(block=nn.remat(Block))(name="remat")(x, None)
        x, _ = stack(axis=1)(name="second_axis")(x, None)
        x, _ = stack(block=stack(length=2))(name="nested")(x, None)
        many = nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, out_axes=1, axis_size=2
        )
        return nn.jit(Mlp)()(many(5, name="many")(x).sum(1))


class Mixed(nn.Module):
    """Convolutions, norms, attention, a tied embedding, a recurrent cell, variables and streams of its own."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8)
        x = embed(tokens)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = nn.BatchNorm(use_running_average=False)(nn.Conv(8, (3,))(x))
        x = nn.RNN(nn.OptimizedLSTMCell(8))(x)
        self.variable("counts", "seen", lambda: jnp.zeros((), jnp.int32))
        noise = self.variable("noise", "mask", lambda: jax.random.uniform(self.make_rng("dropout"), (1, 1, 8)))
        self.variable("noise", "key", lambda: self.make_rng("noise"))
        shape = (1, 1, 8)
        gamma = self.param("gamma", lambda key: jax.random.gamma(key, 2.0, shape))
        beta = self.param("beta", lambda key: jax.random.beta(key, 2.0, 3.0, shape))
        self.param("order", lambda key: jax.random.permutation(key, 8))
        return embed.attend(x * noise.value + gamma + beta)


class Streamed(nn.Module):
    """Variables drawn from streams of their own."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3)(x)
        mask = self.variable("noise", "mask", lambda: jax.random.uniform(self.make_rng("dropout"), (1, 3)))
        self.variable("noise", "key", lambda: self.make_rng("noise"))
        return x * mask.value


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.WeightNorm(nn.Dense(8))(x)
        x = nn.SpectralNorm(nn.Dense(6))(x, update_stats=True)
        standard = lambda key, shape: jax.nn.standardize(jax.random.normal(key, shape), axis=0)  # noqa: E731
        x = x @ self.param("standard", standard, (6, 4))
        return x + self.param("mean", lambda _, x: x.mean((0,), keepdims=True), x)


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, kernel_init=nn.with_partitioning(theirs.he_normal(), ("a", "b")))(x)
        return nn.Dense(4, kernel_init=nn.with_logical_partitioning(theirs.orthogonal(), ("embed", "mlp")))(x)


def test_an_mlp_by_every_kind_of_key():
    for implementation in ("threefry2x32", "rbg", "unsafe_rbg"):
        account = check(Mlp(), key=jax.random.key(3, impl=implementation))
        assert bool(account.notes) == (implementation != "threefry2x32")
    check(Mlp(), key=jax.random.PRNGKey(3))
    with jax.threefry_partitionable(False):
        check(Mlp())


def test_lifted_transformations():
    account = check(Lifted())
    assert account.of(how="elementwise")
    assert not account.of(how="reduction")


def test_layers_laws_streams_and_collections():
    account = check(Mixed(), TOKENS)
    assert account["noise/key"].how == "state"
    assert account.of(how="orthogonal")  # the recurrent kernels


def test_streams_with_keys_of_their_own():
    streams = {"params": jax.random.key(7), "dropout": jax.random.key(1)}  # "noise" has none: its keys come from "params"
    ours = vs.initialize(Streamed(), streams, X)
    assert_same(ours, jax.jit(Streamed().init)(streams, X))
    assert not np.array_equal(ours["noise"]["mask"], vs.initialize(Streamed(), streams["params"], X)["noise"]["mask"])


def test_sums_and_data_are_named_and_exact_on_request():
    key = jax.random.key(2)
    reference = jax.jit(Normed().init)(key, X)
    ours, account = vs.initialize(Normed(), key, X, account=True)
    account.verify(ours)
    assert_same(ours, reference, ("standard", "/u", "sigma", "mean"))
    assert account["params/standard"].how == "reduction"
    assert account["params/mean"].how == "data"
    assert "reduction" in {account[path].how for path in account.entries if path.startswith("batch_stats")}
    assert_same(vs.initialize(Normed(), key, X, exact=True), reference)
    with pytest.raises(ValueError, match=r"x: .*params/mean.*ShapeDtypeStruct"):
        vs.initialize(Normed(), key, jax.ShapeDtypeStruct(X.shape, X.dtype))


def test_a_key_among_the_inputs():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x, key):
            self.param("scale", lambda _: jax.random.normal(key, (3,)))
            return nn.Dense(2)(x)

    for key in (jax.random.key(5), jax.random.PRNGKey(5)):
        ours, account = vs.initialize(Noisy(), jax.random.key(7), vs.inputs(X, key=key), account=True)
        assert account.of(how="data") == ("params/scale",)
        assert_same(ours, jax.jit(Noisy().init)(jax.random.key(7), X, key=key))


def test_boxes_keep_their_metadata():
    check(Boxed())


@given(st.data())
@settings(max_examples=8)
def test_architectures(data):
    """Random stacks of dense layers with random laws, widths from 1 on, and loops."""
    laws = [theirs.he_uniform(), theirs.orthogonal(), theirs.truncated_normal(0.1), vs.he_normal(), theirs.constant(0.5)]
    widths = tuple(data.draw(st.lists(st.sampled_from([1, 2, 8]), min_size=0, max_size=3)))
    model = Mlp(widths, data.draw(st.sampled_from(laws)))
    check(model, key=jax.random.key(data.draw(st.integers(0, 2**32 - 1))))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.cell = nnx.OptimizedLSTMCell(8, 8, rngs=rngs)
        self.lora = nnx.LoRALinear(8, 4, lora_rank=2, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.tied = self.embed

        @nnx.split_rngs(splits=3)
        @nnx.vmap(axis_size=3)
        def blocks(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.blocks = blocks(rngs)


def test_an_nnx_factory():
    key = jax.random.key(5)
    model, account = vs.initialize(Net, key, account=True)
    other = nnx.jit(lambda key: Net(nnx.Rngs(key)))(key)
    assert_same(nnx.state(model), nnx.state(other))
    assert nnx.graphdef(model) == nnx.graphdef(other)
    assert model.tied is model.embed
    account.verify(nnx.state(model))
    assert str(model.dropout.rngs.key[...].dtype) == "key<fry>"


def test_an_nnx_factory_with_several_streams():
    factory = functools.partial(nnx.LoRALinear, 8, 4, lora_rank=2)
    streams = {"params": jax.random.key(5), "dropout": jax.random.key(1)}
    dropping = lambda rngs: nnx.Sequential(factory(rngs=rngs), nnx.Dropout(0.1, rngs=rngs))  # noqa: E731
    theirs = nnx.jit(lambda keys: dropping(nnx.Rngs(**keys)))(streams)
    assert_same(nnx.state(vs.initialize(dropping, streams)), nnx.state(theirs))
    assert_same(
        nnx.state(vs.initialize(factory, streams)), nnx.state(nnx.jit(lambda keys: factory(rngs=nnx.Rngs(**keys)))(streams))
    )


def test_inside_jit_and_vmap():
    keys = jax.random.split(jax.random.key(1), 3)
    ours = jax.jit(jax.vmap(lambda key: vs.initialize(Mlp(), key, X)))(keys)
    assert_same(jax.tree.map(lambda x: x[1], ours), jax.jit(Mlp().init)(keys[1], X))


def test_a_thousand_layers():
    class Deep(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(1, 1, rngs=rngs) for _ in range(1000)])

    model = vs.initialize(Deep, jax.random.key(0))
    rngs = nnx.Rngs(jax.random.key(0))
    rngs.default.count[...] = jnp.uint32(2 * 999)  # keys that the layers before took, one a kernel and one a bias
    some = nnx.Linear(1, 1, rngs=rngs)
    np.testing.assert_allclose(model.layers[999].kernel[...], some.kernel[...], rtol=1e-6)


def test_an_init_that_cannot_be_traced():
    class Asks(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x * float(jnp.linspace(0, 1, 3)[1]))

    with pytest.raises(jax.errors.ConcretizationTypeError) as caught:
        vs.initialize(Asks(), jax.random.key(0), X)
    assert any("as jax.jit(model.init) does" in note for note in caught.value.__notes__)


def test_a_model_without_variables():
    class Nothing(nn.Module):
        def __call__(self, x):
            return x

    ours, account = vs.initialize(Nothing(), jax.random.key(0), X, account=True)
    assert ours == Nothing().init(jax.random.key(0), X)
    assert account.table(80).endswith("no variables")
