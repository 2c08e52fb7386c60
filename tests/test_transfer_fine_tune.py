"""`varscale.transfer.fine_tune`: frozen leaves stay to the bit, multipliers are exact, and every rule is of use."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from varscale import transfer

# optax itself mixes Python floats with int32 counters, which strict promotion forbids.
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.5),
    "nadamw": optax.nadamw(0.1),
    "amsgrad": optax.amsgrad(0.1),
    "adamax": optax.adamax(0.1),
    "adabelief": optax.adabelief(0.1),
    "adan": optax.adan(0.1),
    "radam": optax.radam(0.1),
    "yogi": optax.yogi(0.1),
    "lion": optax.lion(0.1, weight_decay=0.5),
    "lamb": optax.lamb(0.1, weight_decay=0.5),
    "lars": optax.lars(0.1, weight_decay=0.5),
    "rmsprop": optax.rmsprop(0.1, momentum=0.9, centered=True),
    "adagrad": optax.adagrad(0.1),
    "adadelta": optax.adadelta(0.1, weight_decay=0.5),
    "adafactor": optax.adafactor(0.1, weight_decay_rate=0.5),
    "novograd": optax.novograd(0.1, weight_decay=0.5),
    "fromage": optax.fromage(0.1),
    "sm3": optax.sm3(0.1),
    "noisy": optax.noisy_sgd(0.1, key=0),
    "sign": optax.sign_sgd(0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.5), optax.sgd(0.1)),
}
# No subnormal number: XLA's own addition flushes it to zero, whatever is added.
EDGES = np.array([-0.0, 0.0, 1.0, -3e38, 2e-38, np.inf, np.nan], np.float32)


def tree() -> dict:
    body = {"kernel": jnp.asarray(EDGES), "half": jnp.asarray(EDGES, jnp.bfloat16), "complex": jnp.full(3, -0.0 - 0.0j)}
    return {"body": body, "head": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}


def bits(value) -> bytes:
    return np.asarray(value).tobytes()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_leaves_are_the_same_to_the_bit_under_any_optimizer(name):
    params = tree()
    optimizer = transfer.fine_tune(OPTIMIZERS[name], transfer.head_only("head"))
    gradient = jax.tree.map(jnp.ones_like, params) | {"body": jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params["body"])}

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    held = {np.shape(leaf) for leaf in jax.tree.leaves(state)}
    assert not held & {(7,)}, "a frozen leaf has state"
    new = params
    for _ in range(3):
        new, state = step(new, state)
    assert jax.tree.map(bits, new["body"]) == jax.tree.map(bits, params["body"])
    assert np.isfinite(np.asarray(new["head"]["kernel"])).all(), "a frozen leaf's NaN gradient leaked"
    assert not np.array_equal(new["head"]["kernel"], params["head"]["kernel"])


@pytest.mark.parametrize("rule", [0.0, transfer.UnfreezeAt(2)])
def test_a_multiplier_of_zero_changes_nothing_to_the_bit(rule):
    params = tree()
    optimizer = transfer.fine_tune(optax.adamw(0.1, weight_decay=0.5), {"body": rule})
    state = optimizer.init(params)
    gradient = jax.tree.map(jnp.ones_like, params)
    for step in range(3):
        updates, state = optimizer.update(gradient, state, params)
        new = optax.apply_updates(params, updates)
        moved = jax.tree.map(bits, new["body"]) != jax.tree.map(bits, params["body"])
        assert moved == (callable(rule) and step >= 2)


@settings(max_examples=10)
@given(multiplier=st.floats(0.0078125, 8), name=st.sampled_from(["sgd", "momentum", "adam"]))
def test_multipliers_scale_the_update_exactly(multiplier, name):
    params = {"body": jnp.linspace(-1, 1, 8), "head": jnp.linspace(1, 2, 8)}
    plain = OPTIMIZERS[name]
    optimizer = transfer.fine_tune(plain, {"body": multiplier})
    state, expected = optimizer.init(params), plain.init(params)
    for step in range(3):
        gradient = jax.tree.map(lambda x, step=step: jnp.sin(x * (step + 1)), params)
        updates, state = optimizer.update(gradient, state, params)
        reference, expected = plain.update(gradient, expected, params)
        np.testing.assert_array_equal(updates["body"], reference["body"] * np.float32(multiplier))
        np.testing.assert_array_equal(updates["head"], reference["head"])


@pytest.mark.parametrize("make", [optax.sgd, optax.adam])
def test_a_power_of_two_is_the_learning_rate_itself(make):
    params = {"w": jnp.linspace(-1, 1, 8)}
    tuned, plain = transfer.fine_tune(make(0.125), {"w": 0.5}), make(0.0625)
    found, _ = tuned.update(params, tuned.init(params), params)
    expected, _ = plain.update(params, plain.init(params), params)
    np.testing.assert_array_equal(found["w"], expected["w"])


def test_schedules_of_multipliers_count_steps_from_zero():
    params = {"w": jnp.ones(2), "v": jnp.ones(2)}
    optimizer = transfer.fine_tune(optax.sgd(1.0), {"w": optax.linear_schedule(0.0, 1.0, 4)})
    state = optimizer.init(params)
    seen = []
    for _ in range(6):
        updates, state = jax.jit(optimizer.update)(params, state, params)
        seen.append(float(updates["w"][0]))
        assert updates["v"][0] == -1
    assert seen == [0, -0.25, -0.5, -0.75, -1, -1]


def test_gradual_unfreezing_goes_from_the_output_down():
    layers = ["embed", "block", "head"]
    params = {name: jnp.ones(1) for name in layers}
    optimizer = transfer.fine_tune(optax.sgd(1.0), transfer.gradual_unfreezing(layers, every=2))
    state = optimizer.init(params)
    awake = []
    for _ in range(5):
        updates, state = optimizer.update(params, state, params)
        awake.append("".join(name[0] for name in layers if updates[name][0]))
    assert awake == ["h", "h", "bh", "bh", "ebh"]


def test_layerwise_decay():
    assert transfer.layerwise_decay(["embed", "blocks/0", "head"], 0.5) == {"embed": 0.25, "blocks/0": 0.5, "head": 1.0}
    for layers, decay in ((["a"], 0), (["a"], 1.5), ([], 0.5), ("abc", 0.5)):
        with pytest.raises(ValueError, match="give"):
            transfer.layerwise_decay(layers, decay)
    with pytest.raises(ValueError, match="every is 0"):
        transfer.gradual_unfreezing(["a"], 0)


def test_global_norms_are_taken_over_all_that_trains_and_nothing_else():
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1), "frozen": jnp.zeros(1)}
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    optimizer = transfer.fine_tune(clipped, {"a": 2.0, "frozen": "freeze"})
    gradient = {"a": jnp.full(1, 3.0), "b": jnp.full(1, 4.0), "frozen": jnp.full(1, 1e9)}
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-2 * 3 / 5, -4 / 5], rtol=1e-6)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.body = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        for layer in self.body:
            x = nnx.relu(layer(x))
        return self.head(self.norm(x))


def test_nnx_optimizers_inside_jit():
    model = Net(nnx.Rngs(0))
    rules = {"body/0": "freeze", "**/bias": 0.5, "head": 1.0, "**": 0.1}
    optimizer = nnx.Optimizer(model, transfer.fine_tune(optax.adam(0.1), rules), wrt=nnx.Param)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model))

    for _ in range(2):
        step(model, optimizer, jnp.ones((4, 3)) * jnp.arange(4.0)[:, None])
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert jax.tree.map(bits, after["body"][0]) == jax.tree.map(bits, before["body"][0])
    assert not np.array_equal(after["head"]["kernel"], before["head"]["kernel"])
    table = transfer.assign(rules, nnx.state(model, nnx.Param)).table()
    assert "26 of 38 parameters train" in table


def test_the_first_rule_that_matches_counts_and_the_table_shows_it():
    params = {"head": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}, "body": np.zeros(4), "other": np.zeros(1)}
    found = transfer.assign([("head/bias", "freeze"), ("head", 2.0), ("body", transfer.UnfreezeAt(5))], params)
    assert found["head/bias"].pattern == "head/bias"
    assert found["head/kernel"].rule == 2.0
    assert found["other"].place == -1
    table = found.table()
    assert table.splitlines()[0] == "11 of 14 parameters train"
    for part in ("frozen", "× 2", "UnfreezeAt(step=5, multiplier=1.0)", "(none)"):
        assert part in table


@pytest.mark.parametrize(
    ("rules", "error", "match"),
    [
        ({"haed": 1.0}, ValueError, "'haed' catches no leaf"),
        ({"**": 1.0, "head": 2.0}, ValueError, "'head' catches no leaf that no earlier rule does"),
    ],
)
def test_rules_of_no_use_are_refused_when_the_tree_is_known(rules, error, match):
    with pytest.raises(error, match=match):
        transfer.fine_tune(optax.sgd(0.1), rules).init({"head": jnp.ones(1), "body": jnp.ones(1)})


@pytest.mark.parametrize(
    ("rules", "error", "match"),
    [
        ({}, ValueError, "rules is empty"),
        ({"a": -1.0}, ValueError, "give 'freeze'"),
        ({"a": float("nan")}, ValueError, "give 'freeze'"),
        ({"a": True}, ValueError, "give 'freeze'"),
        ({"a": "frozen"}, ValueError, "give 'freeze'"),
        ({"a[0": 1.0}, ValueError, "never closes"),
        ("head", TypeError, "give a mapping"),
        ([("a", 1.0, 2.0)], TypeError, "give a mapping"),
        ({3: 1.0}, TypeError, "give a glob"),
    ],
)
def test_rules_that_say_nothing_are_refused_at_once(rules, error, match):
    with pytest.raises(error, match=match):
        transfer.fine_tune(optax.sgd(0.1), rules)
