"""One trace gives a linen model's parameters and its forward pass, where one pass does both; and work is shared by layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs
from varscale.programs import faces
from varscale.theory import predict
from varscale.theory.graph.expressions import form
from varscale.theory.interpreter.interpreter import Interpreter
from varscale.theory.interpreter.parameters import first_alike, output_recipes
from varscale.theory.interpreter.predict import first_pass

X = jax.ShapeDtypeStruct((8, 64), jnp.float32)
KERNEL = nn.initializers.normal(1 / 8)  # width 64: keeps the scale


class _Split:
    """The inputs of a model that takes one array."""

    structs = (X,)

    def join(self, dynamic):
        return faces.as_inputs(dynamic[0])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(64, kernel_init=KERNEL)(jnp.tanh(x))


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Block()(Block()(x))


class Rematerialized(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block)
        return block(name="Block_1")(block(name="Block_0")(x))


class Looped(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = lambda block, x, _: (block(x), None)  # noqa: E731
        loop = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return loop(Block(), x, None)[0]


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(Block()(x))


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(Block()(x), rng=self.make_rng("params"))


class Asking(nn.Module):
    """Another function once its parameters are there; `question` is how it finds out."""

    question: str

    @nn.compact
    def __call__(self, x):
        match self.question:
            case "is_initializing":
                new = self.is_initializing()
            case "is_mutable_collection":
                new = self.is_mutable_collection("params")
            case _:
                new = not self.has_variable("params", "Block_0")
        y = Block()(x)
        return y if new else 3 * y


def _passes(model):
    return first_pass(faces.program(model), _Split())


def test_a_pass_that_initializes_is_the_forward_pass():
    found = _passes(Plain())
    assert found.forward is not None
    assert len(found.used) == 4
    assert len(found.forward.jaxpr.invars) == 5


@pytest.mark.parametrize("model", [Rematerialized(), Looped(), Normalized(), Dropped(), Asking("is_initializing")], ids=str)
def test_what_an_init_computes_with_must_be_what_it_returns(model):
    assert _passes(model).forward is None


@pytest.mark.parametrize("model", [Rematerialized(), Looped()], ids=str)
def test_one_trace_or_two_predict_the_same(model):
    one, two = predict(Plain(), X).rows[-1], predict(model, X).rows[-1]
    for name in ("mean", "second_moment", "typical", "gradient", "error_bound"):
        np.testing.assert_allclose(getattr(two, name), getattr(one, name), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("question", ["is_initializing", "is_mutable_collection", "has_variable"])
def test_what_is_predicted_is_what_apply_computes(question):
    plain = predict(Block(), X)[""].second_moment
    np.testing.assert_allclose(predict(Asking(question), X)[""].second_moment, 9 * plain, rtol=1e-6)


def test_asking_leaves_flax_as_it_was():
    before = nn.Module.is_initializing
    _passes(Asking("is_initializing"))
    assert nn.Module.is_initializing is before


def test_given_parameters_take_the_place_of_those_an_init_draws():
    params = jax.tree.map(lambda x: 2 * x, Block().init(jax.random.key(0), jnp.ones((8, 64))))
    drawn, given = predict(Block(), X)[""].second_moment, predict(Block(), X, params=params)[""].second_moment
    # The mean square of 4096 weights is within 10 % of its own mean but once in 10⁵ draws, and the key is fixed.
    np.testing.assert_allclose(given, 4 * drawn, rtol=0.1)


def test_what_flax_captured_inside_a_vmap_is_left_out():
    class Mapped(nn.Module):
        def setup(self):
            self.dense = nn.Dense(16)

        def one(self, x):
            return self.dense(x)

        def __call__(self, x):
            return jax.vmap(self.one)(x) + self.dense(x)

    # The row is that of the mark in the jaxpr, which knows the mapped axis; the captured array has left its transformation.
    assert predict(Mapped(), X)[".one"].shape == (8, 16)


def test_the_form_tells_one_root_from_two():
    interpreter = Interpreter()
    x, y = (interpreter.leaf(("input", i), (8, 64), 0.0, 1.0, odd=True) for i in range(2))
    both = [interpreter.elementwise("max", interpreter.elementwise("tanh", a), b).node for a, b in ((x, x), (x, y), (y, x))]
    assert form(both[0]) not in (form(both[1]), form(both[2]))


def alike(f):
    return first_alike(output_recipes(jax.make_jaxpr(f)(jax.random.key(0)).jaxpr))


def test_draws_from_keys_of_their_own_are_alike():
    def init(key):
        a, b, c = (jax.random.fold_in(key, i) for i in range(3))
        draw = lambda k, gain=1.0: gain * jax.random.normal(k, (4, 3))  # noqa: E731
        return draw(a), draw(b), draw(c, 2.0), jnp.zeros(3), jnp.zeros(3), jnp.ones(3)

    assert alike(init) == [0, 0, 2, 3, 3, 5]


def test_draws_that_share_a_key_are_not_alike():
    """The second and third are one array under two names; the fourth is a function of the first's key."""

    def init(key):
        a, b, c = (jax.random.fold_in(key, i) for i in range(3))
        draw = lambda k: jax.random.normal(k, (4, 3))  # noqa: E731
        return draw(a), draw(b), draw(b), jnp.tanh(draw(a)), draw(c)

    assert alike(init) == [0, 1, 2, 3, 4]


def test_the_order_of_two_keys_matters():
    def init(key):
        k = [jax.random.fold_in(key, i) for i in range(6)]
        mixed = lambda x, y: jax.random.normal(x, (4,)) + 2 * jax.random.normal(y, (4,))  # noqa: E731
        twice = lambda x: mixed(x, x)  # noqa: E731
        return mixed(k[0], k[1]), mixed(k[2], k[3]), twice(k[4]), twice(k[5])

    assert alike(init) == [0, 0, 2, 2]


def test_parameters_drawn_alike_are_independent():
    """E[(x A + x B)²] = 2 E[(x A)²] for independent A and B, 4 E[(x A)²] where B is A."""

    def params(key, shared):
        a, b = jax.random.fold_in(key, 0), jax.random.fold_in(key, 0 if shared else 1)
        return {"a": jax.random.normal(a, (64, 32)), "b": jax.random.normal(b, (64, 32))}

    def model(p, x):
        return x @ p["a"] + x @ p["b"]

    x = jax.ShapeDtypeStruct((8, 64), jnp.float32)
    for shared, factor in ((False, 2), (True, 4)):
        report = vs.predict(model, x, params=lambda key, shared=shared: params(key, shared), backward=False)
        np.testing.assert_allclose(report.rows[-1].second_moment, factor * 64, rtol=1e-3)
