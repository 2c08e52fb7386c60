"""The schemes of residual models in nnx: the same standard deviations and requirements as in linen."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from schemes_models import IDS, PICTURES, NnxPostNormStack, NnxResidualNet

import varscale as vs
from varscale.schemes import deepnorm, fixup, mimetic, nf_resnet, ppo, rezero, skipinit, subln, t5, t_fixup

D, FF, ROOT = 64, 256, 1 / 8
HE = (2 / (9 * 16)) ** 0.5


def nets(**settings):
    return lambda rngs: NnxResidualNet(rngs, **settings)


def stacks(**settings):
    return lambda rngs: NnxPostNormStack(rngs, **settings)


@pytest.mark.parametrize("layers", [2, 3])
def test_fixup(layers):
    plan = fixup()(nets(layers=layers, gated=True), PICTURES)
    assert plan["convs/0/0/kernel"].std == pytest.approx(4 ** (-1 / (2 * layers - 2)) * HE)
    assert plan[f"convs/3/{layers - 1}/kernel"].law == plan["head/kernel"].law == vs.zeros
    assert (plan["scales/2"].law, plan["scales/2"].multiplier("sgd_learning_rate")) == (vs.ones, 0.1)
    assert {r.status for r in plan.requirements} == {"present"}


def test_gates():
    for scheme in (rezero(), skipinit()):
        plan = scheme(nets(gated=True), PICTURES)
        assert [leaf.path for leaf in plan if leaf.shape == () and leaf.law == vs.zeros] == [f"scales/{i}" for i in range(4)]
        with pytest.raises(ValueError, match="4 of 4 branches have none"):
            scheme(nets(), PICTURES)


def test_nf_resnet():
    betas = tuple(v**-0.5 for v in (1, 1.04, 1.08, 1.04))
    gamma = (0.5 - 1 / (2 * math.pi)) ** -0.5
    plan = nf_resnet()(nets(alpha=0.2, betas=betas, gain=gamma), PICTURES)
    assert [r.expected for r in plan.requirements] == pytest.approx([0.2] * 4 + list(betas))
    assert {r.status for r in plan.requirements} == {"present"}
    assert plan["convs/0/1/kernel"].std == pytest.approx(1 / 12)
    assert nf_resnet()(nets(), PICTURES)["convs/0/1/kernel"].std == pytest.approx(gamma / 12)


@pytest.mark.parametrize(
    ("scheme", "gain", "table"),
    [(deepnorm, 16**-0.25, ROOT), (subln, math.log(4) ** 0.5, ROOT), (t_fixup, 0.67 * 2**-0.25, ROOT * 18**-0.25)],
)
def test_one_stack_of_two_blocks(scheme, gain, table):
    plan = scheme()(stacks(norm=scheme is not t_fixup), IDS)
    q, k, v, o = (plan[f"attention/1/{i}/kernel"].std for i in range(4))
    assert (q, k, v, o) == pytest.approx((ROOT, ROOT, gain * ROOT, gain * ROOT))
    assert plan["fc1/0/kernel"].std == plan["fc2/1/kernel"].std == pytest.approx(gain * (2 / (D + FF)) ** 0.5)
    assert plan["embed/embedding"].std == pytest.approx(table)
    if scheme is deepnorm:
        assert [r.status for r in plan.requirements] == ["missing"] * 4
        assert {r.status for r in deepnorm()(stacks(alpha=4**0.25), IDS).requirements} == {"present"}


def test_t5_and_mimetic():
    plan = t5()(stacks(scale=1.0), IDS)
    assert [plan[f"attention/0/{i}/kernel"].std for i in range(4)] == pytest.approx([ROOT / 4, ROOT, ROOT, ROOT])
    assert [r.status for r in plan.requirements] == ["folded"] * 2
    assert [r.status for r in t5()(stacks(), IDS).requirements] == ["present"] * 2
    laws = mimetic()(stacks(), IDS)
    assert [laws[f"attention/0/{i}/kernel"].law.side for i in range(4)] == ["left", "right", "left", "right"]
    assert laws["fc1/0/kernel"].why.startswith("as declared")


def test_ppo_in_linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = jnp.tanh(nn.Dense(32, name="trunk")(x))
            return nn.Dense(4, name="policy")(h), nn.Dense(1, name="value")(h)

    plan = ppo()(Net(), jax.ShapeDtypeStruct((3, 8), jnp.float32))
    found = [plan[f"{name}/kernel"].law.scale for name in ("trunk", "policy", "value")]
    assert found == pytest.approx([2**0.5, 0.01, 1.0])


def test_false_alarms_and_power_of_verify():
    """At alpha .05 a plan that was applied is refuted in at most .05 of draws (29 or more of 300 have a chance below 1e-3), and
    one of 1.2 times the standard deviation in nearly all (4096 weights: power above .999).
    """
    plan = vs.schemes.fan_in(distribution="normal")(nn.Dense(64, use_bias=False), jax.ShapeDtypeStruct((1, 64), jnp.float32))
    rng = np.random.default_rng(0)
    alarms = [0, 0]
    for _ in range(300):
        weights = rng.normal(0, 1 / 8, (64, 64)).astype(np.float32)
        for i, factor in enumerate((1.0, 1.2)):
            try:
                plan.verify({"kernel": weights * np.float32(factor)}, alpha=0.05)
            except AssertionError:
                alarms[i] += 1
    assert alarms[0] < 29
    assert alarms[1] >= 298
