"""Schemes whose leaves are drawn together, and those of recurrences."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from schemes_models import IDS, Decoder, EncoderDecoder, NnxDecoder

import varscale as vs
from varscale.schemes import chrono, lru, mamba, mimetic, s4d

D, HEADS, K = 64, 4, 16
X = jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)


def rank_16(alpha, beta, seed):
    """Size of the best approximation of rank 16 to αZ + βI, over that of the whole, for an independent Z."""
    z = np.random.default_rng(seed).normal(0, D**-0.5, (D, D))
    s = np.linalg.svd(alpha * z + beta * np.eye(D), compute_uv=False)
    return s[:K]


def test_mimetic_attention():
    """W_q W_kᵀ has the singular values and the trace of such a matrix's best approximation."""
    plan = mimetic()(Decoder(1), IDS)
    leaves = {name: plan[f"block0/attention/{name}/kernel"] for name in ("query", "key", "value", "out")}
    assert len({leaf.law.shared for leaf in leaves.values()}) == 1
    q, k = (leaves[name].law(jax.random.key(0), leaves[name].shape) for name in ("query", "key"))  # the key that they share
    for head in range(HEADS):
        product = np.asarray(q[:, head] @ k[:, head].T)
        s = np.linalg.svd(product, compute_uv=False)
        assert s[:K] == pytest.approx(rank_16(0.7, 0.7, head), rel=0.1)  # 3 % from draw to draw
        assert np.trace(product) > 0.5 * s.sum()  # near the identity: 0 where the factors were independent
    assert np.linalg.norm(q[:, 0] @ k[:, 1].T) > 0
    assert not np.allclose(q[:, 0], q[:, 1])
    assert vs.Plan.from_json(plan.to_json()) == plan


def test_mimetic_packed_in_thirds():
    def model(rngs):
        return NnxDecoder(rngs, 1)

    plan = mimetic()(model, IDS)
    block = vs.initialize(model, jax.random.key(0), scheme=plan).blocks[0]
    q, k, v = jnp.split(block.qkv.kernel.get_value(), 3, axis=1)
    product = q[:, :K] @ k[:, :K].T
    assert np.trace(product) > 0.5 * np.linalg.svd(product, compute_uv=False).sum()
    noise = np.asarray(v @ block.wo.kernel.get_value()) + 0.4 * np.eye(D)  # W_v W_out is the whole matrix
    assert noise.std() * D**0.5 == pytest.approx(0.4, rel=0.05)  # 4096 entries: 4.5 standard errors
    assert abs(np.diag(noise).mean()) < 0.4 / D * 6
    assert plan["blocks/0/w1/kernel"].why.startswith("as declared")
    with pytest.raises(ValueError, match="no self-attention"):
        mimetic()(nn.Dense(3), X)
    cross = mimetic()(EncoderDecoder(), vs.inputs(IDS, IDS))
    assert cross["decoder/cross0/q/kernel"].why == "as declared: it attends to another stream"
    with pytest.raises(ValueError, match="scores must be"):
        mimetic((-1.0, 0.0))


@pytest.mark.parametrize(("packed", "message"), [(False, "query 32, key 16"), (True, "head by head")])
def test_mimetic_needs_a_key_for_each_query_in_one_run(packed, message):
    def attend(p, x):
        if packed:
            q, k, v = jnp.split((x @ p["qkv"]).reshape(2, 5, 4, 24), 3, axis=-1)
        else:
            q, k, v = (
                jnp.repeat((x @ p[name]).reshape(2, 5, -1, 8), n, axis=2) for name, n in zip("qkv", (1, 2, 2), strict=True)
            )
        return x + nn.dot_product_attention(q, k, v).reshape(2, 5, 32) @ p["o"]

    shapes = {"qkv": (32, 96), "o": (32, 32)} if packed else {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        mimetic()(attend, jax.ShapeDtypeStruct((2, 5, 32), jnp.float32), params=params)


def test_products_of_mimetic_factors_are_verified():
    """Refuted wrongly once in 1e9; twice the noise, a lost identity, and a key of its own for each factor are found."""
    plan = mimetic()(Decoder(1), IDS)
    params = vs.initialize(Decoder(1), jax.random.key(0), IDS, scheme=plan)
    found = plan.verify(params)
    names = [verdict.path for verdict in found.verdicts if " · " in verdict.path]
    assert len(names) == 2
    kernels = params["params"]["block0"]["attention"]

    def refuted(**changed):
        edited = {name: {**kernels[name], "kernel": kernel} for name, kernel in changed.items()}
        block = {**params["params"]["block0"], "attention": {**kernels, **edited}}
        with pytest.raises(AssertionError) as caught:
            plan.verify({"params": {**params["params"], "block0": block}})
        return str(caught.value)

    q, k, v, out = (kernels[name]["kernel"] for name in ("query", "key", "value", "out"))
    assert "off orthogonal columns" in refuted(query=1.01 * q)
    assert "largest singular value" in refuted(query=1.5 * q, key=1.5 * k)
    assert "sum of squares" in refuted(query=0.6 * q, key=0.6 * k)
    assert "second moment" in refuted(value=1.05 * v, out=1.05 * out)
    other = vs.initialize(Decoder(1), jax.random.key(1), IDS, scheme=plan)["params"]["block0"]["attention"]
    assert "off orthogonal columns" in refuted(value=other["value"]["kernel"])


def test_verify_refutes_wrongly_as_seldom_as_it_says_and_sees_five_percent():
    """200 draws at α = 10 %: more than 45 refuted has probability 2e-8 at most. Of 16384 normal weights the mean square has a
    standard error of 1.1 %, so that a deviation 5 % off, 9 errors away, is missed at α = 1e-6 with probability 3e-5.
    """
    sizes = {width: jax.ShapeDtypeStruct((1, width), jnp.float32) for width in (64, 128)}
    plans = {width: vs.schemes.normal(0.02)(nn.Dense(width), x) for width, x in sizes.items()}

    def refuted(kernel, alpha):
        width = len(kernel)
        try:
            plans[width].verify({"kernel": kernel, "bias": np.zeros(width, np.float32)}, alpha=alpha)
        except AssertionError:
            return True
        return False

    assert sum(refuted(kernel, 0.1) for kernel in np.asarray(0.02 * jax.random.normal(jax.random.key(5), (200, 64, 64)))) <= 45
    for factor in (0.95, 1.05):
        wrong = np.asarray(factor * 0.02 * jax.random.normal(jax.random.key(6), (10, 128, 128)))
        assert all(refuted(kernel, 1e-6) for kernel in wrong)


class Ring(nn.Module):
    """A linear recurrence with complex eigenvalues."""

    states: int = 512

    @nn.compact
    def __call__(self, x):
        normal = nn.initializers.normal(1.0)
        nu, theta, gamma = (self.param(name, normal, (self.states,)) for name in ("nu_log", "theta_log", "gamma_log"))
        b, c = (
            jax.lax.complex(*(self.param(f"{name}_{part}", normal, shape) for part in ("re", "im")))
            for name, shape in (("B", (self.states, 8)), ("C", (4, self.states)))
        )
        eigenvalues = jnp.exp(jax.lax.complex(-jnp.exp(nu), jnp.exp(theta)))
        u = jnp.einsum("btd,nd,n->btn", x.astype(jnp.complex64), b, jnp.exp(gamma).astype(jnp.complex64))
        return jnp.einsum("bn,on->bo", jnp.einsum("btn,n->bn", u, eigenvalues), c).real


def test_lru():
    """γ is that of the very eigenvalues that are drawn; |λ|² and the phase are uniform."""
    plan = lru(0.4, 0.9, math.pi)(Ring(), X)
    p = vs.initialize(Ring(), jax.random.key(0), X, scheme=plan)["params"]
    modulus = np.exp(-np.exp(np.asarray(p["nu_log"], np.float64)))
    assert np.exp(p["gamma_log"]) == pytest.approx(np.sqrt(1 - modulus**2), rel=1e-4)
    assert plan.verify(vs.initialize(Ring(), jax.random.key(1), X, scheme=plan)).holds
    with pytest.raises(AssertionError, match=r"theta_log does not follow.*distribution"):
        lru(0.4, 0.9, 1.0)(Ring(), X).verify({"params": p})
    assert 0.4 <= modulus.min() < modulus.max() <= 0.9
    assert np.mean(modulus**2) == pytest.approx((0.16 + 0.81) / 2, abs=0.05)  # 6 standard errors
    assert np.exp(p["theta_log"]).mean() == pytest.approx(math.pi / 2, abs=0.25)
    assert (plan["B_re"].std, plan["C_im"].std) == (0.25, 512**-0.5)
    with pytest.raises(ValueError, match=r"no parameter matches \*\*/nu_log"):
        lru()(nn.Dense(3), X)
    with pytest.raises(ValueError, match="low and high"):
        lru(0.9, 0.5)


class StateSpace(nn.Module):
    """The leaves of Mamba and of S4D, used in some way."""

    @nn.compact
    def __call__(self, x):
        normal = nn.initializers.normal(1.0)
        h = nn.Dense(16, name="in_proj")(x)
        a = -jnp.exp(self.param("A_log", normal, (16, 4)))
        step = nn.softplus(nn.Dense(16, name="dt_proj")(nn.Dense(2, use_bias=False, name="x_proj")(h)))
        y = jnp.einsum("btd,dn,btd->btd", step, a, h) + jnp.einsum("d,btd->btd", self.param("D", normal, (16,)), h)
        s4 = [self.param(name, normal, shape) for name, shape in
              (("log_A_real", (16, 4)), ("A_imag", (16, 4)), ("log_dt", (16,)), ("C", (16, 4, 2)))]  # fmt: skip
        return x + nn.Dense(8, name="out_proj")(y + sum(w.sum() for w in s4))


def test_mamba_and_s4d():
    plan = mamba()(StateSpace(), X)
    p = vs.initialize(StateSpace(), jax.random.key(0), X, scheme=plan)["params"]
    assert np.exp(p["A_log"]) == pytest.approx(np.broadcast_to([1, 2, 3, 4], (16, 4)))
    assert plan.verify(p)["dt_proj/bias"].tested
    steps = np.log1p(np.exp(p["dt_proj"]["bias"]))
    assert 0.001 * 0.99 <= steps.min() < steps.max() <= 0.1 * 1.01
    assert plan["dt_proj/kernel"].std == pytest.approx(6**-0.5)
    assert plan["in_proj/kernel"].std == pytest.approx((3 * 8) ** -0.5)
    assert (plan["D"].law, plan["in_proj/bias"].law) == (vs.ones, vs.zeros)
    spaces = s4d()(StateSpace(), X)
    q = vs.initialize(StateSpace(), jax.random.key(0), X, scheme=spaces)["params"]
    assert q["A_imag"][3] == pytest.approx(math.pi * np.arange(4))
    assert np.exp(q["log_A_real"]) == pytest.approx(0.5)
    assert math.log(0.001) <= q["log_dt"].min() < q["log_dt"].max() <= math.log(0.1)
    assert (spaces["C"].std, spaces["D"].std) == pytest.approx((0.5**0.5, 1.0))
    hippo = s4d(poles="inv")(StateSpace(), X)["A_imag"].law.value
    assert hippo == pytest.approx([8 / math.pi * (8 / (2 * n + 1) - 1) for n in range(4)])
    for scheme in (mamba(), s4d()):
        assert vs.Plan.from_json(scheme(StateSpace(), X).to_json()) == scheme(StateSpace(), X)
        with pytest.raises(ValueError, match="no parameter matches"):
            scheme(nn.Dense(2), X)


def test_chrono():
    """Input gates are minus the forget gates, in cells with a bias a gate and in cells with all gates in one."""
    net = nn.RNN(nn.LSTMCell(64))
    plan = chrono(100)(net, X)
    p = vs.initialize(net, jax.random.key(0), X, scheme=plan)["params"]["cell"]
    assert plan.verify({"params": {"cell": p}})["cell/hf/bias"].tested
    forget = np.asarray(p["hf"]["bias"])
    assert p["hi"]["bias"] == pytest.approx(-forget)
    assert 0 <= forget.min() < forget.max() <= math.log(99)
    assert np.exp(forget).mean() == pytest.approx(50, abs=20)  # 5.6 standard errors
    packed = chrono(100)(lambda rngs: nnx.RNN(nnx.OptimizedLSTMCell(8, 64, rngs=rngs)), X)
    leaf = packed["cell/dense_h/bias"]
    i, f, g, o = jnp.split(leaf.law(jax.random.key(0), leaf.shape), 4)
    assert np.asarray(i) == pytest.approx(-np.asarray(f))
    assert float(jnp.abs(jnp.concatenate([g, o])).max()) == 0 < float(f.min())
    with pytest.raises(ValueError, match="longest"):
        chrono(1.0)
    with pytest.raises(ValueError, match="no parameter matches"):
        chrono(10)(nn.Dense(2), X)
