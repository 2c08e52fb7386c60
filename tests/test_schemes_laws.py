"""Every scheme against the standard deviations of its source, by role, on models that know nothing of it, in linen and nnx.

The numbers are the formulas of the sources, written out for these models: width 64, 4 heads of 16, 3 blocks, a feed-forward
layer of 256 (linen) or a gated one of 128 (nnx), 200 tokens.
"""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from schemes_models import (
    IDS,
    PICTURES,
    ActorCritic,
    Decoder,
    EncoderDecoder,
    PostNormStack,
    ResidualNet,
    ScannedDecoder,
    nnx_decoder,
)  # fmt: skip

import varscale as vs
from experiments.nets.residual_towers import ResidualTower
from varscale.schemes import deepnorm, fixup, nf_resnet, ppo, rezero, skipinit, subln, t5, t_fixup

D, FF, GATED, BLOCKS, TOKENS = 64, 256, 128, 3, 200
DEPTH = [(2 * (block + 1)) ** -0.5 for block in range(BLOCKS)]
CUT = 0.98657839  # of a normal law cut at ±3 and not rescaled
BOTH = vs.inputs(IDS, IDS)


def expected(q, out, up, down, embed, head, gate=None, position=None):
    """Standard deviations by path of the three decoders; `out`, `up`, `down` and `gate` one a block or one for all."""

    def at(std, block):
        return std[block] if isinstance(std, list) else std

    linen, packed = {"embed/embedding": embed, "head/kernel": head}, {"embed/embedding": embed, "head/kernel": head}
    for i in range(BLOCKS):
        linen |= {f"block{i}/attention/{name}/kernel": q for name in ("query", "key", "value")}
        linen |= {f"block{i}/attention/out/kernel": at(out, i), f"block{i}/up/kernel": at(up[0], i)}
        linen |= {f"block{i}/down/kernel": at(down[0], i)}
        packed |= {f"blocks/{i}/qkv/kernel": q, f"blocks/{i}/wo/kernel": at(out, i), f"blocks/{i}/w1/kernel": at(up[1], i)}
        packed |= {f"blocks/{i}/w3/kernel": at(gate or up[1], i), f"blocks/{i}/w2/kernel": at(down[1], i)}
    return linen | ({"positions": position} if position else {}), packed


def same(std):
    return (std, std)


ROOT = D**-0.5
CASES = {
    "fan_in": (vs.schemes.fan_in(), expected(ROOT, ROOT, same(ROOT), (FF**-0.5, GATED**-0.5), 1.0, ROOT)),
    "he": (
        vs.schemes.he(),
        expected(*[2**0.5 * ROOT] * 2, same(2**0.5 * ROOT), ((2 / FF) ** 0.5, (2 / GATED) ** 0.5), 2**0.5, 2**0.5 * ROOT),
    ),
    "glorot": (
        vs.schemes.glorot(),
        expected(
            ROOT, ROOT, *[((2 / (D + FF)) ** 0.5, (2 / (D + GATED)) ** 0.5)] * 2, 1.0, (2 / (D + TOKENS)) ** 0.5,
        ),
    ),
    "normal": (vs.schemes.normal(), expected(0.02, 0.02, same(0.02), same(0.02), 0.02, 0.02, position=0.02)),
    "gpt2": (
        vs.schemes.gpt2(),
        expected(0.02, 0.02 / 6**0.5, same(0.02), same(0.02 / 6**0.5), 0.02, 0.02, position=0.02),
    ),
    "llama_depth": (
        vs.schemes.llama_depth(),
        expected(
            0.02, [0.02 * f for f in DEPTH], same(0.02), same([0.02 * f for f in DEPTH]), 1.0, ROOT,
            gate=[0.02 * f for f in DEPTH], position=0.02,
        ),
    ),
    "llama_depth, OLMo-core": (
        vs.schemes.llama_depth(convention="olmo-core"),
        expected(
            0.02 * CUT, [0.02 * CUT * f for f in DEPTH], same(0.02 * CUT), same([0.02 * CUT * f for f in DEPTH]), 1.0,
            ROOT * CUT, gate=[0.02 * CUT * f for f in DEPTH], position=0.02 * CUT,
        ),
    ),
    "llama_depth, torchtitan": (
        vs.schemes.llama_depth(convention="torchtitan"),
        expected(
            0.02, [0.02 * f for f in DEPTH], same(0.02), same([0.02 * f for f in DEPTH]), 1.0, ROOT * CUT,
            gate=[0.02 * f for f in DEPTH], position=0.02,
        ),
    ),
    "mitchell": (
        vs.schemes.mitchell(),
        expected(
            ROOT, [ROOT * f for f in DEPTH], same(ROOT), tuple([n**-0.5 * f for f in DEPTH] for n in (FF, GATED)), ROOT, ROOT,
            position=ROOT,
        ),
    ),
    "full_megatron": (
        vs.schemes.full_megatron(convention="olmo"),
        expected(
            0.02 * CUT, 0.02 * CUT / 6**0.5, same(0.02 * CUT), same(0.02 * CUT / 6**0.5), 0.02 * CUT, ROOT * CUT,
            position=0.02 * CUT,
        ),
    ),
    "small_wang": (
        vs.schemes.small_wang(),
        expected(
            (2 / 5 / D) ** 0.5, 2 / (BLOCKS * D**0.5), same((2 / 5 / D) ** 0.5), same(2 / (BLOCKS * D**0.5)),
            (2 / 5 / D) ** 0.5, (2 / 5 / D) ** 0.5, position=(2 / 5 / D) ** 0.5,
        ),
    ),
    "zero_projection": (vs.schemes.zero_projection(), expected(ROOT, 0.0, same(ROOT), same(0.0), 1.0, 0.001)),
    "normalized": (
        vs.schemes.normalized(), expected(ROOT, ROOT / 6**0.5, same(ROOT), same(ROOT / 6**0.5), ROOT, ROOT, position=ROOT),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_laws_of_decoders(case):
    """In linen, in nnx with packed kernels, and for blocks stacked by a scan."""
    scheme, (linen, packed) = CASES[case]
    for model, wanted in ((Decoder(), linen), (nnx_decoder, packed)):
        plan = scheme(model, IDS)
        assert {path: plan[path].std for path in wanted} == pytest.approx(wanted, rel=1e-6)
    if case not in ("gpt2", "llama_depth", "mitchell"):
        return
    stacked = scheme(ScannedDecoder(), IDS)
    for name in ("attention/query", "attention/out", "up", "down"):
        own = [linen[f"block{i}/{name}/kernel"] for i in range(BLOCKS)]
        stds = stacked[f"layers/block/{name}/kernel"].stds
        assert stds == pytest.approx(own if len(set(own)) > 1 else own[:1], rel=1e-6)


def test_what_a_scheme_says_is_what_is_drawn():
    """One plan with a law a layer, drawn and verified: chance of a false alarm 1e-9."""
    plan = vs.schemes.llama_depth()(ScannedDecoder(), IDS)
    params = vs.initialize(ScannedDecoder(), jax.random.key(0), IDS, scheme=plan)
    assert plan.verify(params).holds
    kernel = params["params"]["layers"]["block"]["down"]["kernel"]
    params["params"]["layers"]["block"]["down"]["kernel"] = kernel[::-1]
    with pytest.raises(AssertionError, match="layers/block/down/kernel does not follow graded"):
        plan.verify(params)


@functools.cache
def encoder_decoder(scheme, **settings):
    return scheme(**dict(settings))(EncoderDecoder(norm=scheme is not t_fixup), BOTH)


def glorot(fan_in, fan_out):
    return math.sqrt(2 / (fan_in + fan_out))


@pytest.mark.parametrize(
    ("scheme", "encoder", "decoder", "tables"),
    [
        (deepnorm, 0.87 * (4**4 * 2) ** (-1 / 16), 24**-0.25, (ROOT, ROOT)),
        (subln, math.sqrt(math.log(6) * math.log(8) / 3), math.sqrt(math.log(6)), (ROOT, ROOT)),
        (t_fixup, 0.67 * 4**-0.25, 18**-0.25, (ROOT * 36**-0.25, ROOT * 18**-0.25)),
    ],
)
def test_gains_of_encoder_and_decoder(scheme, encoder, decoder, tables):
    """4 and 2 blocks; scores are never scaled, the readout and tables have their own laws."""
    plan = encoder_decoder(scheme)
    found = {leaf.path: leaf.std for leaf in plan}
    for stack, gain, blocks in (("encoder/self", encoder, 4), ("decoder/self", decoder, 2), ("decoder/cross", decoder, 2)):
        for i in range(blocks):
            assert found[f"{stack}{i}/q/kernel"] == found[f"{stack}{i}/k/kernel"] == pytest.approx(ROOT)
            assert found[f"{stack}{i}/v/kernel"] == found[f"{stack}{i}/o/kernel"] == pytest.approx(ROOT * gain)
    for stack, gain in (("encoder", encoder), ("decoder", decoder)):
        for name in ("fc1", "fc2"):
            assert found[f"{stack}/ff1/{name}/kernel"] == pytest.approx(gain * glorot(D, FF))
    assert (found["encoder/embed/embedding"], found["decoder/embed/embedding"]) == pytest.approx(tables)
    assert found["head/kernel"] == pytest.approx(glorot(D, TOKENS) if scheme is t_fixup else ROOT)


def test_deepnorm_of_one_stack_and_as_torchscale_has_it():
    plan = deepnorm()(nnx_decoder, IDS)
    beta = (8 * 3) ** -0.25
    assert plan["blocks/1/qkv/kernel"].stds == pytest.approx((ROOT, ROOT * beta))
    assert plan["blocks/1/w3/kernel"].std == pytest.approx(beta * glorot(D, GATED))
    model = vs.initialize(nnx_decoder, jax.random.key(0), scheme=plan)
    assert plan.verify(model).holds
    code = deepnorm(convention="torchscale")(EncoderDecoder(), BOTH)
    gain = 1.15 * (4**4 * 2) ** (-1 / 16)
    assert code["encoder/self0/q/kernel"].std == pytest.approx(ROOT / 2**0.5)
    assert code["encoder/self0/v/kernel"].std == pytest.approx(gain * ROOT / 2**0.5)
    assert code["encoder/self0/o/kernel"].std == pytest.approx(gain * ROOT)
    assert code["encoder/ff0/fc1/kernel"].std == pytest.approx(gain / math.sqrt(3 * D))


def test_requirements_are_present_missing_or_folded():
    alphas = (0.81 * (4**4 * 2) ** (1 / 16), 6**0.25)
    wrong = encoder_decoder(deepnorm).requirements
    assert [round(r.expected, 4) for r in wrong] == [round(alphas[0], 4)] * 8 + [round(alphas[1], 4)] * 6
    assert {r.status for r in wrong} == {"missing"}
    assert "7 more places" in encoder_decoder(deepnorm).table(100)
    right = deepnorm()(EncoderDecoder(alphas=alphas), BOTH).requirements
    assert {(r.status, r.found == pytest.approx(r.expected)) for r in right} == {("present", True)}

    class Folded(nn.Module):
        """1/α on the last kernel of each branch does what α on the stream does."""

        @nn.compact
        def __call__(self, x):
            w = [self.param(f"w{i}", nn.initializers.lecun_normal(), (D, D)) for i in range(2)]
            for kernel in w:
                x = nn.LayerNorm()(x + nn.relu(nn.Dense(D)(x)) @ (kernel / 4**0.25))
            return x

    assert [r.status for r in deepnorm()(Folded(), jax.ShapeDtypeStruct((2, D), jnp.float32)).requirements] == ["folded"] * 2


def test_what_multiplies_an_embedding_is_no_residual_scale():
    class Net(nn.Module):
        alpha: float = 1.0

        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(TOKENS, D)(ids) * D**0.5
            return nn.LayerNorm()(self.alpha * x + nn.Dense(D)(nn.LayerNorm()(nn.relu(nn.Dense(D)(x)))))

    assert [r.found for r in deepnorm()(Net(), IDS).requirements] == [1.0]
    assert [r.status for r in deepnorm()(Net(2**0.25), IDS).requirements] == ["present"]


def test_rotary_halves_are_one_kernel_and_packed_kernels_are_orthogonal_each():
    def attention(params, x):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, w) for w in (params["q"], *jnp.moveaxis(params["kv"], 1, 0)))
        angle = jnp.arange(6.0)[:, None, None] * jnp.ones((1, 1, 8))
        q1, q2 = jnp.split(q, 2, axis=-1)
        cos, sin = (f(angle)[None] for f in (jnp.cos, jnp.sin))
        q = jnp.concatenate([q1 * cos - q2 * sin, q2 * cos + q1 * sin], -1)
        weights = jax.nn.softmax(jnp.einsum("bqhk,bshk->bhqs", q, k) / 4)
        return x + jnp.einsum("bhqs,bshk,hkd->bqd", weights, v, params["o"])

    shapes = {"q": (D, 4, 16), "kv": (D, 2, 4, 16), "o": (4, 16, D)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x = jax.ShapeDtypeStruct((2, 6, D), jnp.float32)
    plan = vs.schemes.glorot()(attention, x, params=params)
    assert [plan[name].std for name in ("q", "kv")] == pytest.approx([glorot(D, D)] * 2)
    law = vs.schemes.orthogonal()(attention, x, params=params)["kv"].law
    w = law(jax.random.key(0), shapes["kv"])[:, 1].reshape(D, D)
    assert jnp.allclose(w.T @ w, jnp.eye(D), atol=1e-5)


def test_t5():
    plan = t5()(PostNormStack(2, scale=1.0), IDS)
    assert plan["self0/q/kernel"].std == pytest.approx((D * 16) ** -0.5)
    assert plan["self0/k/kernel"].std == plan["ff0/fc1/kernel"].std == pytest.approx(ROOT)
    assert (plan["ff0/fc2/kernel"].std, plan["embed/embedding"].std) == pytest.approx((FF**-0.5, 1.0))
    assert [r.status for r in plan.requirements] == ["folded"] * 2
    scaled = t5()(PostNormStack(1), IDS)
    assert scaled["self0/q/kernel"].std == pytest.approx(ROOT)
    assert [r.status for r in scaled.requirements] == ["present"]
    with pytest.raises(ValueError, match="no attention"):
        t5()(nn.Dense(2), PICTURES)


@pytest.mark.parametrize("layers", [2, 3])
def test_fixup(layers):
    plan = fixup()(ResidualNet(layers, gated=True), PICTURES)
    factor = 4 ** (-1 / (2 * layers - 2))
    assert plan["conv00/kernel"].std == pytest.approx(factor * (2 / (9 * 16)) ** 0.5)
    assert fixup(mode="fan_out")(ResidualNet(layers), PICTURES)["conv20/kernel"].std == pytest.approx(
        factor * (2 / (9 * 32)) ** 0.5
    )
    assert plan[f"conv1{layers - 1}/kernel"].law == plan["head/kernel"].law == vs.zeros
    assert plan["shortcut2/kernel"].std == pytest.approx((2 / 16) ** 0.5)
    assert plan["scale3"].law == vs.ones
    assert plan["scale3"].multiplier("adam_learning_rate") == 0.1
    assert {r.status for r in plan.requirements} == {"present"}
    assert {r.status for r in fixup()(ResidualNet(layers), PICTURES).requirements} == {"missing"}


def test_fixup_knows_scalars_that_a_scan_stacks():
    plan = fixup()(ResidualTower("fixup", 16, 3), jax.ShapeDtypeStruct((4, 8), jnp.float32))
    scalars = [leaf for leaf in plan if leaf.shape == (3,)]
    assert len(scalars) == 5
    assert {leaf.multiplier("adam_learning_rate") for leaf in scalars} == {0.1}
    assert [leaf.path for leaf in scalars if leaf.law == vs.ones] == ["blocks/multiplier"]


def test_gates():
    for scheme in (rezero(), skipinit()):
        plan = scheme(ResidualNet(gated=True), PICTURES)
        assert [leaf.path for leaf in plan if leaf.law == vs.zeros and leaf.shape == ()] == [f"scale{i}" for i in range(4)]
        params = vs.initialize(ResidualNet(gated=True), jax.random.key(0), PICTURES, scheme=plan)
        assert plan.verify(params).holds
        with pytest.raises(ValueError, match="4 of 4 branches have none, such as that of 'conv01/kernel'"):
            scheme(ResidualNet(), PICTURES)


def test_nf_resnet():
    gamma, variances = (0.5 - 1 / (2 * math.pi)) ** -0.5, [1, 1.04, 1.08, 1.04]
    betas = tuple(v**-0.5 for v in variances)
    plan = nf_resnet()(ResidualNet(alpha=0.2, betas=betas, gain=gamma), PICTURES)
    assert plan["conv00/kernel"].std == plan["conv01/kernel"].std == pytest.approx(1 / 12)
    assert [r.expected for r in plan.requirements] == pytest.approx([0.2] * 4 + list(betas))
    assert {r.status for r in plan.requirements} == {"present"}
    folded = nf_resnet()(ResidualNet(alpha=0.2, betas=betas), PICTURES)
    assert (folded["conv00/kernel"].std, folded["conv31/kernel"].std * 2**0.5) == pytest.approx((gamma / 12,) * 2)
    assert {r.status for r in folded.requirements} == {"present"}
    code = nf_resnet(convention="nfnets")(ResidualNet(alpha=0.2, betas=betas), PICTURES)
    assert code["conv00/kernel"].std == pytest.approx(1.7140 / 12, rel=1e-4)
    missing = nf_resnet()(ResidualNet(), PICTURES).requirements
    assert [r.status for r in missing] == ["missing"] * 4 + ["present"] + ["missing"] * 3


def test_a_branch_may_be_scaled_before_its_activation():
    """x + α f(γ gelu(β x)): the formula of the paper; β passes through a relu alone."""
    gamma, beta = 1.700926, 1.04**-0.5

    def net(p, x):
        for i, scale in enumerate((1.0, beta)):
            x = x + 0.2 * (gamma * jax.nn.gelu(scale * x) @ p[i])
        return x

    params = [jax.ShapeDtypeStruct((8, 8), jnp.float32)] * 2
    plan = nf_resnet()(net, jax.ShapeDtypeStruct((4, 8), jnp.float32), params=params)
    assert [(r.status, round(r.found, 3)) for r in plan.requirements[2:]] == [("present", 1.0), ("present", round(beta, 3))]
    assert plan["1"].std == pytest.approx(8**-0.5)


def test_ppo():
    x = jax.ShapeDtypeStruct((3, 8), jnp.float32)
    plan = ppo()(lambda rngs: ActorCritic(rngs), x)
    model = vs.initialize(lambda rngs: ActorCritic(rngs), jax.random.key(0), scheme=plan)
    assert plan.verify(model).holds
    norms = [float(jnp.linalg.norm(layer.kernel.get_value()[:, 0])) for layer in (model.pi2, model.policy, model.value)]
    assert norms == pytest.approx([2**0.5, 0.01, 1.0], rel=1e-5)
    assert plan["pi1/bias"].law == vs.zeros

    class TwoScalars(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1, name="a")(x), nn.Dense(1, name="b")(x)

    with pytest.raises(ValueError, match="a/kernel, b/kernel have a single output"):
        ppo()(TwoScalars(), x)
    assert ppo(value_head="b")(TwoScalars(), x)["a/kernel"].std == pytest.approx(0.01 / 8**0.5)


def test_bad_arguments_and_models():
    for make in (lambda: vs.schemes.he(distribution="cauchy"), lambda: vs.schemes.gpt2(0.0), lambda: fixup(mode="fan_avg")):
        with pytest.raises(ValueError, match=r"must be"):
            make()
    with pytest.raises(ValueError, match="convention must be None or 'olmo'"):
        vs.schemes.mitchell(convention="gpt")
    plain = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(4)])
    for scheme in (vs.schemes.gpt2(), vs.schemes.llama_depth(), deepnorm(), subln(), fixup(), nf_resnet(), rezero()):
        with pytest.raises(ValueError, match="no residual addition"):
            scheme(plain, jax.ShapeDtypeStruct((2, 4), jnp.float32))


def test_experts_tied_tables_and_packed_heads():
    """Experts are scaled one by one; a tied table has the readout's law; heads packed head by head are told apart."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(TOKENS, D, rngs=rngs)
            self.qkv = nnx.Linear(D, 3 * D, use_bias=False, rngs=rngs)
            self.out = nnx.Linear(D, D, use_bias=False, rngs=rngs)
            self.router = nnx.Linear(D, 4, use_bias=False, rngs=rngs)
            self.up = nnx.Param(jnp.zeros((4, D, 32)))
            self.down = nnx.Param(jnp.zeros((4, 32, D)))

        def __call__(self, ids):
            x = self.embed(ids)
            q, k, v = jnp.moveaxis(self.qkv(x).reshape(*x.shape[:-1], 4, 3, 16), -2, 0)
            weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4)
            x = x + self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))
            h = jax.nn.relu(jnp.einsum("btd,edf->btef", x, self.up.get_value()))
            gates = jax.nn.softmax(self.router(x))
            x = x + jnp.einsum("bted,bte->btd", jnp.einsum("btef,efd->bted", h, self.down.get_value()), gates)
            return self.embed.attend(x)

    plan = vs.schemes.llama_depth()(lambda rngs: Net(rngs), IDS)
    assert plan["embed/embedding"].std == pytest.approx(ROOT)
    assert plan["up"].std == 0.02
    assert plan["down"].std == pytest.approx(0.02 / 2**0.5)
    assert vs.schemes.fan_in()(lambda rngs: Net(rngs), IDS)["down"].std == pytest.approx(32**-0.5)
    deep = deepnorm()(lambda rngs: Net(rngs), IDS)
    beta = 8**-0.25
    kernel = vs.initialize(lambda rngs: Net(rngs), jax.random.key(0), scheme=deep).qkv.kernel.get_value()
    parts = kernel.reshape(D, 4, 3, 16).std((0, 1, 3))
    assert parts.tolist() == pytest.approx([ROOT, ROOT, ROOT * beta], rel=0.05)  # 4096 weights each: 4.5 standard errors
    assert vs.Plan.from_json(deep.to_json()) == deep
    assert deep["router/kernel"].std == pytest.approx(glorot(D, 4))
