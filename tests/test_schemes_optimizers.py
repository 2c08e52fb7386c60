"""Multipliers around optax optimizers: what each leaf's update is, that the kind is found, and the size of the first step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from optax.contrib import muon

import varscale as vs
from varscale.schemes.optimizers import adamw, kinds_of, scaled
from varscale.schemes.parametrization import Scaling

PARAMS = {"a": {"kernel": jnp.arange(1.0, 7.0).reshape(2, 3)}, "b": jnp.array([2.0, -1.0])}
GRADIENTS = jax.tree.map(lambda x: jnp.cos(x) / 8, PARAMS)
SCALINGS = {"a/kernel": Scaling(adam=0.25, sgd=0.5, muon=2.0, epsilon=0.125), "b": Scaling(adam=3.0, sgd=4.0, epsilon=2.0)}
X = jax.ShapeDtypeStruct((16, 8), jnp.float32)


def mlp(width):
    return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(3)])


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as optax has it
        yield


def stepped(tx, steps=3, params=PARAMS):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(GRADIENTS, state, params)
    return updates


def leafwise(make):
    """What each leaf's own optimizer does to it alone."""
    return {
        "a": {"kernel": stepped(make(SCALINGS["a/kernel"]))["a"]["kernel"]},
        "b": stepped(make(SCALINGS["b"]))["b"],
    }


def close(x, y, rtol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), x, y)


def test_adam_has_its_learning_rate_and_epsilon_multiplied_leaf_by_leaf():
    eps = 0.1  # as large as the gradients
    tx = scaled(optax.adam(0.1, eps=eps), SCALINGS)
    close(stepped(tx), leafwise(lambda s: optax.adam(0.1 * s.adam, eps=eps * s.epsilon)), rtol=1e-5)


def test_adamw_decays_every_leaf_alike():
    tx = adamw(0.1, SCALINGS, weight_decay=0.3, eps=0.1)
    expected = leafwise(lambda s: optax.adamw(0.1 * s.adam, eps=0.1 * s.epsilon, weight_decay=0.3 / s.adam))
    close(stepped(tx), expected, rtol=1e-5)
    assert tx.decays == {"a/kernel": 4.0, "b": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("optimizer", "kind", "expected"),
    [
        (optax.sgd(0.1, momentum=0.9), None, lambda s: optax.sgd(0.1 * s.sgd, momentum=0.9)),
        (optax.sgd(0.1), "sgd", lambda s: optax.sgd(0.1 * s.sgd)),
        (optax.lion(0.1), None, lambda s: optax.lion(0.1 * s.adam)),
        (optax.sign_sgd(0.1), "lion", lambda s: optax.sign_sgd(0.1 * s.adam)),
        (optax.rmsprop(0.1, eps=0.1), None, lambda s: optax.rmsprop(0.1 * s.adam, eps=0.1 * s.epsilon**2)),  # √(ν + ε)
        (optax.inject_hyperparams(optax.adam)(0.1), None, lambda s: optax.adam(0.1 * s.adam)),
        (optax.MultiSteps(optax.lion(0.1), 1), None, lambda s: optax.lion(0.1 * s.adam)),
    ],
    ids=["momentum", "sgd", "lion", "sign", "rmsprop", "injected", "several steps"],
)
def test_the_kind_of_other_optimizers(optimizer, kind, expected):
    close(stepped(scaled(optimizer, SCALINGS, kind=kind)), leafwise(expected), rtol=1e-4)


def test_steps_of_adam_that_do_not_adapt_have_the_learning_rates_of_sgd():
    """RAdam's first steps: gradients are divided by ε's multiplier, and the update multiplied by Adam's."""
    plan = vs.schemes.mup(base=mlp(16))(mlp(64), X)
    for leaf in plan:
        rate = leaf.multiplier("adam_learning_rate") / leaf.multiplier("adam_epsilon")
        assert rate == pytest.approx(leaf.multiplier("sgd_learning_rate")), leaf.path


def test_each_leaf_has_a_kind_of_its_own():
    tx = muon(0.1)
    assert kinds_of(tx.init(PARAMS), ["a/kernel", "b"]) == {"a/kernel": "muon", "b": "adam"}
    plain, multiplied = stepped(tx), stepped(scaled(tx, SCALINGS))
    np.testing.assert_allclose(multiplied["a"]["kernel"], 2 * plain["a"]["kernel"], rtol=1e-5)
    labels = {"a": {"kernel": "one"}, "b": "other"}
    split = optax.partition({"one": optax.adam(0.1), "other": optax.sgd(0.1, momentum=0.9)}, labels)
    assert kinds_of(split.init(PARAMS), ["a/kernel", "b"]) == {"a/kernel": "adam", "b": "sgd"}
    close(stepped(scaled(split, SCALINGS))["b"], stepped(optax.sgd(0.4, momentum=0.9))["b"])


def test_it_is_an_ordinary_transformation_and_printable():
    tx = scaled(optax.adam(0.1), SCALINGS)
    chained = optax.chain(optax.clip_by_global_norm(1.0), tx)
    jax.jit(chained.update)(GRADIENTS, chained.init(PARAMS), PARAMS)
    assert isinstance(tx, optax.GradientTransformation)
    assert "a/kernel" in str(tx)
    assert "0.125" in tx.table(100)
    assert "weight" in adamw(0.1, SCALINGS).table(100)


BAD = [
    (lambda: scaled(optax.sgd(0.1), SCALINGS).init(PARAMS), "kind must be given, one of 'adam', 'lion', 'sgd', 'muon'"),
    (lambda: scaled(optax.adam(0.1), SCALINGS, kind="adamw"), "kind must be one of"),
    (lambda: scaled(optax.adam(0.1), {"b": Scaling()}).init(PARAMS), "has no parameter 'a/kernel'"),
    (lambda: scaled(optax.chain(optax.clip(1.0), optax.adam(0.1)), SCALINGS).init(PARAMS), "stands before Adam"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_errors_say_what_to_give(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_no_optimizer():
    with pytest.raises(TypeError, match="optimizer must be an optax optimizer"):
        scaled(0.1, SCALINGS)


def test_a_plan_serves_linen_variables_and_nnx():
    plan = vs.schemes.mup(base=mlp(16))(mlp(64), X)
    params = vs.initialize(mlp(64), jax.random.key(0), X, scheme=plan)
    gradients = jax.tree.map(jnp.ones_like, params)
    tx = plan.optimizer(optax.adam(0.1))
    updates, _ = tx.update(gradients, tx.init(params), params)  # the whole of the variables
    assert float(updates["params"]["layers_2"]["kernel"][0, 0]) == pytest.approx(-0.1 / 4, rel=1e-4)

    class Net(nnx.Module):
        def __init__(self, width, rngs):
            self.first, self.second = nnx.Linear(8, width, rngs=rngs), nnx.Linear(width, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    plan = vs.schemes.mup(base=lambda rngs: Net(16, rngs))(lambda rngs: Net(64, rngs), X)
    model = vs.initialize(lambda rngs: Net(64, rngs), jax.random.key(0), X, scheme=plan)
    optimizer = nnx.Optimizer(model, plan.optimizer(optax.adam(0.1)), wrt=nnx.Param)
    before = model.second.kernel[...]
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 8)))))(model))
    assert float(jnp.abs(model.second.kernel[...] - before).max()) == pytest.approx(0.1 / 4, rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon", "radam"])
def test_the_first_update_has_the_size_that_the_plan_tells(name):
    model, x = mlp(64), jax.random.normal(jax.random.key(1), (16, 8))
    plan = vs.schemes.mup(base=mlp(16))(model, x)
    plan = plan.edit({"**/bias": vs.constant(0.5)})
    params = vs.initialize(model, jax.random.key(0), x, scheme=plan)
    target = jax.random.normal(jax.random.key(2), (16, 3))

    def loss(y):
        return jnp.mean((y - target) ** 2)

    tx = {
        "adamw": plan.adamw(0.01, 2.0), "sgd": plan.optimizer(optax.sgd(0.1), kind="sgd"),
        "lion": plan.optimizer(optax.lion(0.01)), "muon": plan.optimizer(muon(0.01)), "radam": plan.optimizer(optax.radam(0.1)),
    }[name]  # fmt: skip
    report = vs.probe(model, params, x, loss=loss)
    told = plan.first_updates(tx, gradients=report)
    params = params["params"]
    gradients = jax.grad(lambda p: loss(model.apply({"params": p}, x)))(params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    for path, size in told.items():
        layer, leaf = path.split("/")
        update, own = updates[layer][leaf], params[layer][leaf]
        measured = float(jnp.sqrt(jnp.mean(update**2) / jnp.mean(own**2)))
        # The weights are one draw, of 192 entries at least, and some units are dead.
        assert measured <= 1.25 * size, path
        assert name == "muon" or measured >= size / 1.25, path  # Muon's gradients are told as if of full rank
    table = plan.table(150, optimizer=tx, gradients=report)
    assert "first" in table.splitlines()[0] + table.splitlines()[1]


NEEDY = [(optax.sgd(0.1), "sgd"), (optax.radam(0.1), None), (optax.adagrad(0.1), None), (optax.adam(0.1, eps=0.1), None)]


@pytest.mark.parametrize(("optimizer", "kind"), NEEDY, ids=["sgd", "radam", "adagrad", "a large epsilon"])
def test_a_first_update_that_depends_on_the_size_of_gradients_needs_them(optimizer, kind):
    """RAdam's first steps divide by no second moment."""
    plan = vs.schemes.fan_in()(nn.Dense(3), X)
    with pytest.raises(ValueError, match="gradients must be given: the first update of 'kernel'"):
        plan.first_updates(optimizer, kind=kind)


def test_a_first_update_that_does_not_needs_none():
    plan = vs.schemes.fan_in()(nn.Dense(3), X)
    assert plan.first_updates(optax.adam(0.1))["bias"] == float("inf")
    size = plan.first_updates(optax.lars(0.1, momentum=0.0, weight_decay=0.0))["kernel"]
    assert size == pytest.approx(1e-4, rel=0.02)  # learning rate and trust coefficient, of the weights' own norm


def test_a_scaling_tells_its_weight_decay():
    assert dataclasses.replace(Scaling(), adam=0.25).weight_decay("adam") == 4.0
    with pytest.raises(ValueError, match="kind must be one of"):
        Scaling().learning_rate("adamw")
