"""Laws by pattern, values that are given, and models that exist: what is drawn anew, and what is left to the bit."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.nn import initializers as theirs

import varscale as vs

KEY = jax.random.key(3)
X = np.ones((1, 5, 8), np.float32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(8, name="dense")(x), None


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(2, name="attn")(x)
        x = nn.BatchNorm(use_running_average=False, name="norm")(x)
        x, _ = nn.scan(Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)(name="stack")(x, None)
        many = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
        return nn.Dense(12, name="head")(many(8, name="many")(x)[0])


class Model(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(8, 8, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 12, rngs=rngs)


def draw(**kwargs):
    return vs.initialize(Net(), KEY, X, **kwargs)


@pytest.fixture(scope="module")
def declared():
    return draw()


def leaves(tree):
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def changed(before, after):
    return [path for path, x in leaves(after).items() if not np.array_equal(x, leaves(before)[path])]


def test_patterns_name_modules_and_leaves(declared):
    scheme = {"*/query": vs.he_normal(), "head/**": vs.zeros, "**/bias": vs.constant(0.5)}
    params, account = draw(scheme=scheme, account=True)
    biases = [path for path in leaves(declared) if path.endswith("bias") and "head" not in path and "params" in path]
    kernels = ["params/attn/query/kernel", "params/head/kernel"]
    assert sorted(changed(declared, params)) == sorted(kernels + biases)
    assert not params["params"]["head"]["kernel"].any()
    assert account["params/attn/query/kernel"].notes == ("by '*/query'",)
    assert set(account.of(origin="scheme")) == {*kernels, *biases, "params/head/bias"}


def test_a_law_sees_the_shape_that_the_layer_drew():
    """Attention flattens its kernels, loops stack theirs: fans are those of one layer, keys one a layer."""
    seen = []

    def law(key, shape, dtype):
        seen.append(tuple(shape))
        return jax.random.normal(key, shape, dtype)

    params = draw(scheme={"attn/query/kernel": law, "stack/dense/kernel": law, "many/kernel": law})["params"]
    assert set(seen) == {(8, 8)}
    assert params["attn"]["query"]["kernel"].shape == (8, 2, 4)
    assert params["stack"]["dense"]["kernel"].shape == (8, 3, 8)
    stacked = np.moveaxis(params["stack"]["dense"]["kernel"], 1, 0).reshape(3, -1)
    assert np.abs(np.corrcoef(stacked) - np.eye(3)).max() < 0.6  # 64 numbers: 5 standard deviations
    assert not np.array_equal(*params["many"]["kernel"])


def test_a_function_as_scheme(declared):
    def scheme(path, shape, dtype):
        return vs.orthogonal() if path == "head/kernel" and shape == (8, 12) and dtype == np.float32 else None

    params, account = draw(scheme=scheme, account=True)
    assert changed(declared, params) == ["params/head/kernel"]
    kernel = np.asarray(params["params"]["head"]["kernel"])
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(8), atol=1e-5)
    assert account["params/head/kernel"].how == "orthogonal"


def test_parts_of_a_packed_kernel(declared):
    scheme = {"head/kernel": vs.fused([vs.zeros, None, vs.he_normal()], 3)}
    old, new = (np.split(tree["params"]["head"]["kernel"], 3, axis=1) for tree in (declared, draw(scheme=scheme)))
    assert not new[0].any()
    np.testing.assert_array_equal(new[1], old[1])
    assert not np.isclose(new[2], old[2]).any()


def test_dtype_rounds_parameters_alone(declared):
    params, account = draw(dtype=jnp.bfloat16, account=True)
    account.verify(params)
    assert params["batch_stats"]["norm"]["mean"].dtype == np.float32
    for path, x in leaves(params["params"]).items():
        np.testing.assert_array_equal(x, leaves(declared["params"])[path].astype(jnp.bfloat16))


@pytest.mark.parametrize("inside", [True, False])
def test_given_values_are_not_drawn(declared, inside):
    given = {"attn": jax.tree.map(np.ones_like, declared["params"]["attn"]), "head": {"bias": np.ones(12, np.float16)}}
    given["head"]["kernel"] = jax.ShapeDtypeStruct((8, 12), np.float32)  # no value
    params, account = draw(given={"params": given} if inside else given)
    assert all(x.all() for x in jax.tree.leaves(params["params"]["attn"]))
    assert params["params"]["head"]["bias"].dtype == np.float32
    assert account["params/head/bias"].notes == ("cast from float16",)
    assert len(account.given) == 9
    assert set(changed(declared, params)) == {*account.given}
    with pytest.raises(ValueError, match=r"given: the model has no leaf 'head/kernels'"):
        draw(given={"head": {"kernels": np.ones(3)}})
    with pytest.raises(ValueError, match=r"given: 'head/bias' has shape \(3,\), and the model's leaf \(12,\)"):
        draw(given={"head": {"bias": np.ones(3)}})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("head/bias", np.ones(12, np.complex64), "has dtype complex64, which the model's leaf of dtype float32 cannot hold"),
        ("head/bias", np.array([None] * 12), "has dtype object; give numbers"),
        ("head/bias", np.array(["a"] * 12), "has dtype <U1; give numbers"),
    ],
)
def test_given_values_that_a_leaf_cannot_hold(path, value, message):
    with pytest.raises(TypeError, match=f"given: '{path}' {message}"):
        draw(given={path: value})
    with pytest.raises(ValueError, match=f"given: the model's leaf 'params/{path}' is given two values"):
        draw(given={path: np.ones(12), f"params/{path}": np.ones(12)})


def test_given_values_out_of_range(declared):
    for value, dtype in (
        (np.full(12, 1e300), None),
        (jnp.full(12, 1e38), jnp.float8_e4m3fn),
        (np.full(12, 70000), jnp.float16),
    ):
        with pytest.raises(ValueError, match=r"given: 'params/head/bias' holds .*, which is out of the range of"):
            draw(given={"head/bias": value}, dtype=dtype)
    params, _ = draw(given={"head/bias": np.full(12, np.inf)})
    assert np.isinf(params["params"]["head"]["bias"]).all()
    gone = jnp.ones(12) + 1
    gone.delete()
    with pytest.raises(ValueError, match="given: 'head/bias' is an array that was deleted"):
        draw(given={"head/bias": gone})


def test_given_state_of_a_random_generator():
    rngs = {"key": vs.fast_key(9), "count": 7}
    model, _ = vs.initialize(Model, KEY, given={"drop": {"rngs": rngs}})
    found = model.drop.rngs.key[...]
    assert found == jax.random.key(9)
    assert found.dtype == jax.random.key(9).dtype
    assert model.drop.rngs.count[...] == 7
    for name, value, dtype, own in (
        ("key", jax.random.key(0, impl="rbg"), "key<rbg>", "key<fry>"), ("key", 1.0, "float64", "key<fry>"),
        ("count", 7.0, "float64", "uint32"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=f"dtype {dtype}, which the model's leaf of dtype {own} cannot hold"):
            vs.initialize(Model, KEY, given={"drop": {"rngs": {name: value}}})


def test_nothing_and_everything_given(declared):
    everything, account = draw(given=declared)
    assert not changed(declared, everything)
    assert not account.drawn
    nothing, account = draw(given={})
    assert not changed(declared, nothing)
    assert not account.given


def test_reinitialize_leaves_the_rest_alone(declared):
    new = vs.reinitialize(declared, {"head": vs.he_normal(), "stack/**/kernel": theirs.zeros}, KEY)
    assert changed(declared, new) == ["params/head/kernel", "params/stack/dense/kernel"]
    assert new["params"]["attn"]["query"]["kernel"] is declared["params"]["attn"]["query"]["kernel"]
    again = vs.reinitialize(declared["params"], {"head/kernel": vs.he_normal()}, KEY)
    assert changed(declared["params"], again) == ["head/kernel"]
    part = vs.reinitialize(declared, {"head/kernel": vs.fused([None, vs.zeros], 2)}, KEY)["params"]["head"]["kernel"]
    np.testing.assert_array_equal(part[:, :6], declared["params"]["head"]["kernel"][:, :6])
    assert not part[:, 6:].any()


def test_reinitialize_an_nnx_model():
    model = Model(nnx.Rngs(0))
    new = vs.reinitialize(model, {"head": vs.zeros, "body/kernel": vs.normal(1.0)}, KEY)
    assert isinstance(new, Model)
    assert not new.head.kernel[...].any()
    assert not np.array_equal(new.body.kernel[...], model.body.kernel[...])
    np.testing.assert_array_equal(new.norm.scale[...], model.norm.scale[...])
    assert new.drop.rngs.key[...] == model.drop.rngs.key[...]
    assert model.head.kernel[...].any()  # the model itself is as it was


def test_models_that_exist_have_no_declared_laws():
    model = Model(nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"instance of Model.*give the factory"):
        vs.initialize(model, KEY)
    for laws in ("declared", {"head": "declared"}):
        with pytest.raises(ValueError, match=r"declared.*factory"):
            vs.reinitialize(model, laws, KEY)


def test_bad_schemes():
    with pytest.raises(ValueError, match=r"scheme: tail/\*\* matches no parameter of the model \(attn/key/bias"):
        draw(scheme={"tail/**": vs.zeros, "head": vs.zeros})
    with pytest.raises(
        ValueError, match=r"scheme: 'head/bias' names 'params/head/bias' of shape \(12,\), which .* cannot draw"
    ):
        draw(scheme={"head/bias": vs.he_normal()})
    with pytest.raises(TypeError, match="scheme must be 'declared'"):
        draw(scheme=3)
    with pytest.raises(TypeError, match="must be an initializer"):
        draw(scheme={"head": 3.0})
    with pytest.raises(ValueError, match=r"draws \(12, 8\) for"):
        draw(scheme={"head/kernel": lambda key, shape, dtype: jnp.zeros(shape[::-1], dtype)})
    with pytest.raises(ValueError, match="blocks"):
        draw(scheme={"head/kernel": vs.fused(vs.he_normal(), 5)})
    with pytest.raises(TypeError, match="dtype must be a floating"):
        draw(dtype=jnp.int32)
    with pytest.raises(TypeError, match="dtype must be a floating dtype, to round floating parameters to, not complex64"):
        draw(dtype=jnp.complex64)
    with pytest.raises(TypeError, match="key must be a PRNG key"):
        vs.initialize(Net(), 0, X)
    with pytest.raises(TypeError, match="model must be a linen module or an nnx factory"):
        vs.initialize(lambda params, x: x, KEY, X)


@pytest.mark.parametrize("law", [vs.he_normal, jax.nn.initializers.lecun_normal, nn.initializers.zeros_init])
def test_laws_that_were_not_called(law):
    with pytest.raises(TypeError, match=rf"is {law.__name__}, which makes initializers: call it, {law.__name__}\(\)"):
        draw(scheme={"head/kernel": law})


def test_random_keys_among_parameters_have_no_law():
    class Keyed(nn.Module):
        @nn.compact
        def __call__(self):
            self.param("key", lambda key: key)
            self.param("scale", nn.initializers.normal(), (3,))

    variables = vs.initialize(Keyed(), KEY, scheme={"**": vs.ones}, dtype=jnp.bfloat16)
    assert jnp.issubdtype(variables["params"]["key"].dtype, jax.dtypes.prng_key)
    np.testing.assert_array_equal(variables["params"]["scale"], 1)


def test_jitted_functions_may_close_over_the_key(declared):
    """Leaves that depend on the data are traced too."""

    class Centred(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.variable("statistics", "mean", x.mean)
            return nn.Dense(3)(x)

    x = jnp.arange(8.0).reshape(2, 4)
    ours, own = (jax.jit(lambda x, f=f: f(KEY, x))(x) for f in (partial(vs.initialize, Centred()), Centred().init))
    jax.tree.map(np.testing.assert_array_equal, ours, own)
    assert jax.vmap(lambda x: vs.initialize(Centred(), KEY, x)["statistics"]["mean"])(x).shape == (2,)
    tree, law = {"a": x, "b": x}, {"a": vs.normal(1.0)}
    jitted = jax.jit(lambda tree: vs.reinitialize(tree, law, KEY))(tree)
    np.testing.assert_array_equal(jitted["a"], vs.reinitialize(tree, law, KEY)["a"])


def test_fast_keys_draw_the_same_and_leave_no_trace():
    fast = vs.fast_key(3)
    for law in (jax.random.normal, jax.random.gumbel, lambda k, shape: jax.random.permutation(k, 8)):
        np.testing.assert_array_equal(jax.jit(law, static_argnums=1)(fast, (8,)), jax.jit(law, static_argnums=1)(KEY, (8,)))
    model = vs.initialize(Model, fast)
    assert model.drop.rngs.key[...].dtype == KEY.dtype
    other = vs.initialize(Model, KEY)
    np.testing.assert_array_equal(model.body.kernel[...], other.body.kernel[...])
    assert jax.jit(vs.fast_key)(3) == fast
    for bad in ("a", 1.5, True, None, np.bool_(True), np.arange(3)):
        with pytest.raises(TypeError, match="key must be a PRNG key"):
            vs.fast_key(bad)
