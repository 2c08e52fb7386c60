"""Which rows `vs.probe` gives, inside whatever transformations: those that `vs.predict` gives."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import varscale as vs

X = jax.random.normal(jax.random.key(1), (4, 8))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + jnp.tanh(nn.Dense(8)(x))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Block(name="inner")(x), None


class Inherits(Block):
    pass


class Overrides(Block):
    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class Methods(nn.Module):
    def setup(self):
        self.dense = nn.Dense(8)

    def encode(self, x):
        return self.dense(x)

    def __call__(self, x):
        return {"a": self.encode(x), "b": (self.dense(x), jnp.mean(x))}


class Linen(nn.Module):
    """One model that has everything."""

    @nn.compact
    def __call__(self, x):
        x = nn.remat(Block)(name="remat")(x)
        jitted = nn.jit(Block)
        x = jitted(name="jit0")(jitted(name="jit1")(x))
        x = Overrides(name="overrides")(Inherits(name="inherits")(x))
        layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = layers(name="layers")(x, None)
        stacked = nn.vmap(Block, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2)
        x = stacked(name="stacked")(jnp.stack([x, x]))[0]
        again = nn.Dense(8, name="again")
        x = jax.vmap(again)(again(x))
        return Methods(name="methods")(x)


LINEN = [
    "remat/Dense_0",
    "remat",
    "jit1/Dense_0",
    "jit1",
    "jit0/Dense_0",
    "jit0",
    "inherits/Dense_0",
    "inherits",
    "overrides/Dense_0",
    "overrides",
    "layers/inner/Dense_0@0",
    "layers/inner@0",
    "layers@0",
    "layers/inner/Dense_0@1",
    "layers/inner@1",
    "layers@1",
    "stacked/Dense_0",
    "stacked",
    "again",
    "again#1",
    "methods/dense",
    "methods.encode",
    "methods/dense#1",
    "methods['a']",
    "methods['b'][0]",
    "methods['b'][1]",
    "['a']",
    "['b'][0]",
    "['b'][1]",
]


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.parts = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)])

    def __call__(self, x):
        return x + jnp.tanh(self.parts[1](self.parts[0](x)))


class NnxInherits(NnxBlock):
    pass


class NnxOverrides(NnxBlock):
    def __call__(self, x):
        return 2 * super().__call__(x)

    def encode(self, x):
        return self(x) + 1.0


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.inherits, self.overrides = NnxInherits(rngs), NnxOverrides(rngs)
        self.layers = nnx.split_rngs(splits=2)(nnx.vmap(NnxBlock))(rngs)
        self.sequence = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), jnp.tanh)

    def __call__(self, x):
        x = nnx.remat(lambda block, x: block(x))(self.inherits, x)
        x = nnx.jit(lambda block, x: block.encode(x))(self.overrides, x)
        x = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)
        return jax.vmap(self.sequence)(x), self.inherits(x)


NNX = [
    "inherits/parts/0",
    "inherits/parts/1",
    "inherits",
    "overrides/parts/0",
    "overrides/parts/1",
    "overrides",
    "overrides.encode",
    "layers/parts/0@0",
    "layers/parts/1@0",
    "layers@0",
    "layers/parts/0@1",
    "layers/parts/1@1",
    "layers@1",
    "sequence/layers/0",
    "sequence",
    "inherits/parts/0#1",
    "inherits/parts/1#1",
    "inherits#1",
    "[0]",
    "[1]",
]


def function(params, x):
    """Scopes around and inside of transformations, and a model that the function runs."""

    def layer(x, w):
        with jax.named_scope("dense"):
            return jnp.tanh(x @ w), None

    with jax.named_scope("first"):
        x = nn.relu(x @ params["first"])
        with jax.named_scope("inner"):
            x = jax.jit(lambda x: 2 * x)(x)
    with jax.named_scope("stack"):
        x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["stack"])
    return Block().apply(params["block"], x), x


FUNCTION = [
    "first/inner",
    "first",
    "stack/dense@0",
    "stack/dense@1",
    "stack/dense@2",
    "stack",
    "Dense_0",
    "Block",
    "[0]",
    "[1]",
]


def _function():
    keys = jax.random.split(jax.random.key(0), 3)
    weights = {"first": jax.random.normal(keys[0], (8, 8)), "stack": jax.random.normal(keys[1], (3, 8, 8))}
    return function, weights | {"block": Block().init(keys[2], X)}, X


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.GRUCell(8), name="rnn")(x)


def _linen(model, x):
    return model, jax.jit(model.init)(jax.random.key(0), x), x


CASES = {
    "linen": (lambda: _linen(Linen(), X), LINEN),
    "nnx": (lambda: (lambda rngs: Nnx(rngs), None, X), NNX),
    "function": (_function, FUNCTION),
    "loop over time": (lambda: _linen(Recurrent(), X.reshape(2, 2, 8).repeat(3, 1)), ["rnn", ""]),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_predict(name):
    made, expected = CASES[name]
    model, params, x = made()
    report = vs.probe(model, params, x, loss="random")
    assert [row.path for row in report.rows] == expected
    given = params if name == "function" else None
    predicted = vs.predict(model, jax.ShapeDtypeStruct(x.shape, x.dtype), params=given, backward=False)
    found = [[(row.path, row.kind, row.shape) for row in r.rows] for r in (report, predicted)]
    assert found[0] == found[1]
    assert set(predicted.weights) <= set(report.weights)
    assert all(row.gradient is not None and row.gradient > 0 for row in report.rows)
    forward = vs.probe(model, params, x)
    assert [row.path for row in forward.rows] == expected
    for one, other in zip(forward.rows, report.rows, strict=True):
        np.testing.assert_allclose(one.second_moment, other.second_moment, rtol=1e-5, err_msg=one.path)


def test_branches_and_while_loops_have_the_rows_of_what_ran():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, which):
            one, two, loop = nn.Dense(8, name="one"), nn.Dense(8, name="two"), nn.Dense(8, name="loop")
            x = loop(two(one(x)))  # their parameters
            x = jax.lax.cond(which, lambda x: one(x), lambda x: two(x), x)
            return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(loop(s[1]))), (0, x))[1]

    model = Net()
    params = model.init(jax.random.key(0), X, True)
    for which, name in ((True, "one"), (False, "two")):
        report = vs.probe(model, params, vs.inputs(X, jnp.asarray(which)))
        assert [row.path for row in report.rows] == ["one", "two", "loop", f"{name}#1", "loop#1", ""]
    state = model.apply(params, X, jnp.asarray(False))
    last = jnp.arctanh(state)  # what the loop's layer put out in the last step
    np.testing.assert_allclose(report["loop#1"].second_moment, jnp.mean(last**2), rtol=1e-4)


def test_a_trace_that_jax_kept_from_before_has_rows():
    model = Block()
    jitted = jax.jit(model.apply)
    params = model.init(jax.random.key(0), X)
    jitted(params, X)
    report = vs.probe(lambda params, x: jitted(params, x), params, X)
    assert [row.path for row in report.rows] == ["Dense_0", "Block", ""]


def test_patterns_choose_rows_and_brackets_are_literal():
    model, params, x = _linen(Linen(), X)
    assert [row.path for row in vs.probe(model, params, x, rows=["**/inner", "methods['b'][1]"]).rows] == [
        *LINEN[10:12],
        *LINEN[13:15],
        "methods['b'][1]",
    ]
    assert [row.path for row in vs.probe(model, params, x, rows="layers@1").rows] == ["layers@1"]


def test_a_module_that_differentiates_in_forward_mode_has_no_gradients_and_says_so():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(8)
            return jax.jvp(lambda x: jnp.tanh(dense(x)), (dense(x),), (jnp.ones_like(x),))[1]

    report = vs.probe(*_linen(Net(), X), loss="random")
    assert [row.path for row in report.rows] == ["Dense_0", "Dense_0#1", ""]
    assert {row.gradient for row in report.rows} == {None}
    assert any("forward mode" in note for note in report.notes)
    assert report.weights["Dense_0/kernel"].gradient > 0


def test_gradients_inside_a_model_do_not_hide_those_of_the_loss():
    class Energy(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(8)
            dense(x)
            return jax.grad(lambda x: jnp.sum(jnp.tanh(dense(x))))(x)

    model, params, x = _linen(Energy(), X)
    report = vs.probe(model, params, x, loss=lambda y: jnp.sum(y**2))
    force = model.apply(params, x)
    np.testing.assert_allclose(report.output.gradient, np.mean(4 * np.square(force)), rtol=1e-5)

    def loss(eps):
        kernel, bias = params["params"]["Dense_0"]["kernel"], params["params"]["Dense_0"]["bias"]
        return jnp.sum(jax.grad(lambda x: jnp.sum(jnp.tanh(x @ kernel + bias[None] + eps)))(x) ** 2)

    expected = np.mean(np.square(jax.grad(loss)(jnp.zeros((4, 8)))))
    np.testing.assert_allclose(report["Dense_0#1"].gradient, expected, rtol=1e-4)


def test_no_class_is_changed():
    classes = [nn.Module, nn.Dense, nnx.Module, nnx.Linear, nnx.Variable, nnx.Param, NnxBlock, Block]
    before = [dict(vars(c)) for c in classes]
    seen = []

    class Looking(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            seen.append([dict(vars(c)) == b for c, b in zip(classes, before, strict=True)])
            return self.dense(x)

    instance = Looking(nnx.Rngs(0))
    vs.probe(instance, None, X, loss="random")
    vs.predict(lambda rngs: Looking(rngs), jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert seen
    assert all(map(all, seen))
    assert type(instance) is Looking
    assert type(instance.dense) is nnx.Linear
    assert not [name for name in vars(instance) if name.startswith("_varscale")]
