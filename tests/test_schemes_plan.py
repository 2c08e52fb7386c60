"""Plans: as values, as what initialize, reinitialize and predict take, and as claims that can be tested."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from schemes_models import IDS, Decoder, ScannedDecoder, nnx_decoder

import varscale as vs
from varscale.schemes import Requirement, declared, graded, orthogonal_over

X = jax.ShapeDtypeStruct((4, 16), jnp.float32)


class Net(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="b")(nn.relu(nn.Dense(32, name="a")(x)))


NET = Net()


@functools.cache
def gpt2_plan():
    return vs.schemes.gpt2()(Decoder(), IDS)


@functools.cache
def drawn():
    return vs.initialize(Decoder(), jax.random.key(0), IDS, scheme=gpt2_plan())


def test_a_plan_is_a_value():
    plan = gpt2_plan()
    again = vs.schemes.gpt2()(Decoder(), IDS)
    assert plan == again
    assert hash(plan) == hash(again)
    assert plan.diff(again) == ()
    assert {leaf.path for leaf in plan} == {p.path for p in vs.uses(Decoder(), IDS)}
    with pytest.raises(KeyError, match="block0/attention/key/kernel"):
        plan["block0/nothing"]


def test_the_table_names_every_leaf_and_fits():
    plan = gpt2_plan()
    for width in (60, 100, 200):
        text = plan.table(width)
        assert max(map(len, text.splitlines())) <= width
        assert "head/kernel" in text
    assert "÷ √6, the residual additions" in plan.table(220)
    with pytest.raises(ValueError, match="width"):
        plan.table(10)


def test_json_round_trip():
    laws = {
        "a/kernel": vs.fused([vs.normal(0.1), None], 2),
        "b/kernel": graded(vs.truncated_normal(1.0, lower=-3.0, upper=3.0), tuple(range(1, 33))),
        "a/bias": vs.constant(np.linspace(-1, 1, 32)),
        "b/bias": vs.scaled(vs.variance_scaling(2.0, fans=vs.Fans(3, 5), dtype="bfloat16"), 0.5),
    }
    plan = vs.schemes.he()(NET, X).edit(laws).multiply("a", adam_learning_rate=0.25)
    requirement = Requirement("readout multiplier", "b/kernel", 0.25, None, "missing", "multiply the logits by 0.25")
    plan = vs.Plan(plan.scheme, plan.leaves, (requirement,), ("a note",))
    back = vs.Plan.from_json(plan.to_json(indent=1))
    assert back == plan
    assert back["a/kernel"].multiplier("adam_learning_rate") == 0.25
    assert back["b/kernel"].multiplier("adam_learning_rate") == 1
    assert "readout multiplier 0.25 at b/kernel: multiply the logits" in plan.table(100)
    with pytest.raises(TypeError, match="initializer of varscale"):
        plan.edit({"a/kernel": jax.nn.initializers.normal()}).to_json()
    with pytest.raises(ValueError, match="JSON of a plan"):
        vs.Plan.from_json("{}")
    with pytest.raises(ValueError, match="format 99"):
        vs.Plan.from_json(json.dumps({**json.loads(plan.to_json()), "format": 99}))
    with pytest.raises(ValueError, match="a law must be one of"):
        vs.Plan.from_json(plan.to_json().replace('"Fused"', '"Nonsense"'))


def test_edits_and_differences():
    plan = gpt2_plan()
    other = plan.edit({"block0/attention": vs.orthogonal(), "**/bias": vs.ones}, why="mine")
    assert other["block0/attention/key/kernel"].law == vs.orthogonal()
    assert other["block0/attention/key/kernel"].why == "mine"
    assert other["block1/attention/key/kernel"] == plan["block1/attention/key/kernel"]
    assert {change.what for change in plan.diff(other)} == {"law"}
    assert sum(change.path.endswith("kernel") for change in plan.diff(other)) == 4
    assert {c.what for c in plan.diff(vs.schemes.gpt2()(Decoder(2), IDS))} == {"law", "only here"}
    with pytest.raises(ValueError, match="nowhere"):
        plan.edit({"nowhere/**": vs.zeros})
    with pytest.raises(ValueError, match="final/bias"):
        plan.edit({"final/bias": vs.orthogonal()})
    with pytest.raises(ValueError, match="nowhere"):
        plan.multiply("nowhere", adam_learning_rate=2.0)
    with pytest.raises(TypeError, match="mapping"):
        plan.edit(vs.zeros)


def test_initialize_applies_it_and_verify_tests_it():
    plan, params = gpt2_plan(), drawn()
    found = plan.verify(params)
    assert found.holds
    assert len(found.verdicts) == len(plan)
    assert found["block0/down/kernel"].ratio == pytest.approx(1, abs=0.1)
    assert "✗" not in found.table(100)
    scaled = jax.tree.map(lambda x: x, params)
    scaled["params"]["block1"]["down"]["kernel"] *= 1.1  # 16384 weights: power to see 10 % at 1e-9 / 200 is 1 − 1e-12
    with pytest.raises(AssertionError, match=r"block1/down/kernel does not follow.*standard deviation 0.00[89]") as caught:
        plan.verify(scaled)
    assert [v.path for v in caught.value.verification.failed] == ["block1/down/kernel"]
    with pytest.raises(AssertionError, match="constant: largest distance from the number is 1"):
        plan.edit({"final/bias": vs.ones}).verify(params)
    with pytest.raises(ValueError, match="alpha"):
        plan.verify(params, alpha=0.0)


def test_a_plan_of_another_model_is_an_error():
    with pytest.raises(ValueError, match=r"another model.*has no law"):
        vs.initialize(NET, jax.random.key(0), X, scheme=gpt2_plan())
    with pytest.raises(ValueError, match="has shape"):
        vs.initialize(nn.Dense(8), jax.random.key(0), X, scheme=vs.schemes.he()(nn.Dense(9), X))
    with pytest.raises(ValueError, match="must have the leaf"):
        gpt2_plan().verify({"params": {}})
    with pytest.raises(ValueError, match="must have shape"):
        vs.schemes.he()(nn.Dense(9), X).verify({"kernel": jnp.zeros((16, 8)), "bias": jnp.zeros(8)})
    with pytest.raises(ValueError, match="a model with parameters"):
        vs.schemes.he()(nn.Sequential([nn.relu]), X)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_verify_knows_every_law(dtype):
    """Chance of a false alarm 1e-9; each law's own draw holds and one of 1.3 times its scale is refuted (4096 weights)."""
    laws = [
        vs.normal(0.3), vs.truncated_normal(0.3), vs.truncated_normal(0.3, lower=-3.0, upper=3.0), vs.cut_normal(0.3, 0.5),
        vs.symmetric_uniform(0.3), vs.lecun_normal(), vs.orthogonal(0.5), orthogonal_over(2.0, (0, 1), (2,)),
        vs.scaled(vs.he_uniform(), 0.1), graded(vs.normal(1.0), tuple(np.linspace(0, 2, 16))),
        vs.fused([vs.zeros, vs.normal(0.1)], 2), vs.variance_scaling(1.0, "fan_in", "rademacher"),
    ]  # fmt: skip
    shape = (16, 16, 16)
    leaf = vs.schemes.he()(nn.Dense(2), X)["kernel"]
    for law in laws:
        one = vs.Plan("one", (type(leaf)("w", shape, "hidden", 1.0, 1.0, law, ""),))
        w = law(jax.random.key(3), shape, dtype)
        assert one.verify({"w": w}).holds, law
        assert one.leaves[0].std == pytest.approx(float(jnp.std(w.astype(jnp.float32))), rel=0.1), law
        with pytest.raises(AssertionError):
            one.verify({"w": (w * 1.3).astype(dtype)})
        with pytest.raises(AssertionError, match="not finite"):
            one.verify({"w": w.at[0, 0, 0].set(jnp.nan)})


def test_an_nnx_factory_an_instance_and_a_plain_function():
    plan = vs.schemes.gpt2()(nnx_decoder, IDS)
    model = vs.initialize(nnx_decoder, jax.random.key(0), scheme=plan)
    assert plan.verify(model).holds
    instance = nnx_decoder(nnx.Rngs(1))
    with pytest.raises(AssertionError, match="do not follow"):
        plan.verify(instance)
    again = vs.reinitialize(instance, plan, jax.random.key(2))
    assert plan.verify(nnx.state(again, nnx.Param)).holds
    of_instance = vs.schemes.gpt2()(instance, IDS)
    assert {change.path.rpartition("/")[2] for change in plan.diff(of_instance)} == {"scale"}  # whose law nobody knows now
    params = {"w": jnp.zeros((16, 8)), "b": jnp.zeros(8)}
    plain = vs.schemes.lecun()(lambda p, x: x @ p["w"] + p["b"][None], X, params=params)
    assert (plain["w"].std, plain["b"].law) == (0.25, declared())
    assert plain.verify(vs.reinitialize(params, plain, jax.random.key(0)))["b"].tested is False


def test_stacked_layers_and_sharded_dtypes():
    plan = vs.schemes.gpt2()(ScannedDecoder(), IDS)
    params = vs.initialize(ScannedDecoder(), jax.random.key(0), IDS, scheme=plan, dtype=jnp.bfloat16)
    assert params["params"]["layers"]["block"]["down"]["kernel"].dtype == jnp.bfloat16
    assert plan.verify(params).holds


def test_predict_under_a_plan():
    """`predict` gives what probes of several draws measure, and the law of each layer of a stack counts for that layer."""
    x = jax.random.normal(jax.random.key(1), (64, 32))

    class Add(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(32, use_bias=False, name="inner")(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(Add, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
            return layers(name="layers")(x, None)[0]

    plan = vs.schemes.fan_in()(Stack(), x)
    assert vs.predict(Stack(), X.update(shape=(64, 32)), scheme=plan).output.second_moment == pytest.approx(16, rel=1e-4)
    edited = plan.edit({"layers": graded(vs.normal(32**-0.5), (2.0, 1.0, 0.5, 0.0))})
    expected = (1 + 4) * (1 + 1) * (1 + 0.25)
    found = vs.predict(Stack(), X.update(shape=(64, 32)), scheme=edited, backward=False, draws=30)
    assert found.output.second_moment == pytest.approx(expected, rel=1e-4)
    assert "layers/inner@2" in {row.path for row in found.rows}
    assert found["layers/inner@1"].second_moment == pytest.approx(5, rel=1e-4)
    assert found.output.holds  # false alarms 1 in 16000; without the plan the draws measure 16
    mapped = vs.predict(NET, X, scheme={"b": vs.zeros}, backward=False)
    assert mapped.output.second_moment == 0
    with pytest.raises(ValueError, match="another model"):
        vs.predict(NET, X, scheme=plan)


def test_a_scheme_that_is_not_applied_yet_serves_wherever_its_plan_does():
    x = jax.ShapeDtypeStruct((4, 16), jnp.float32)
    scheme, plan, key = vs.schemes.he(), vs.schemes.he()(NET, X), jax.random.key(0)
    assert vs.predict(NET, X, scheme=scheme).rows == vs.predict(NET, X, scheme=plan).rows
    one, other = (vs.initialize(NET, key, X, scheme=chosen) for chosen in (scheme, plan))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    lacks = vs.audit(Decoder(), IDS, scheme=vs.schemes.deepnorm()).findings
    assert [f for f in lacks if f.code == "VS125"]
    params = {"w": vs.Moments(0.0, 1.0, shape=(16, 4))}
    found = vs.predict(lambda p, x: x @ p["w"], x, params=params, scheme=vs.schemes.lecun(), backward=False)
    assert found.output.second_moment == pytest.approx(1)
    with pytest.raises(ValueError, match="x must be given with the scheme"):
        vs.initialize(nnx_decoder, key, scheme=scheme)
    with pytest.raises(TypeError, match=r"the plan of a scheme: scheme\(model, x\)"):
        vs.reinitialize(drawn(), scheme, key)


def test_a_module_may_be_called_value():
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="value")(x)

    params = {"value": {"kernel": 0.25, "bias": 0.0}}
    report = vs.predict(Attention(), X, params=params, backward=False)
    assert "value/kernel" in str(report.weights)
    assert report["value"].second_moment == pytest.approx(4)
