"""Poles, steps and gates are recognised by what programs do with them, whatever they are called."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import varscale as vs
from experiments.nets.healthy_architectures import ARCHITECTURES
from varscale.schemes import chrono, lru, mamba, s4d

X = jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)
NORMAL = nn.initializers.normal(1.0)


@pytest.fixture(autouse=True)
def models_as_people_write_them():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Ring(nn.Module):
    """Two linear recurrent units with names of their own, in one module; the first by a loop, the second by a parallel scan."""

    states: int = 16
    real: bool = False

    @nn.compact
    def __call__(self, x):
        def leaf(name, *shape):
            return self.param(name, NORMAL, shape)

        n = self.states
        for k in range(2):
            inputs = jax.lax.complex(leaf(f"p{k}", n, 8), leaf(f"q{k}", n, 8))
            outputs = leaf(f"r{k}", 8, n) + 1j * leaf(f"s{k}", 8, n)
            if self.real:
                values = jnp.exp(-jnp.exp(leaf(f"a{k}", n))) * jnp.exp(1j * leaf(f"b{k}", n))
            else:
                values = jnp.exp(-jnp.exp(leaf(f"a{k}", n)) + 1j * jnp.exp(leaf(f"b{k}", n)))
            u = (x.astype(jnp.complex64) @ inputs.T) * jnp.exp(leaf(f"c{k}", n))[None, None].astype(jnp.complex64)
            if k:
                every = jnp.broadcast_to(values[None, None], u.shape)
                _, h = jax.lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (every, u), axis=1)
            else:

                def step(h, now, values=values):
                    h = values[None] * h + now
                    return h, h

                _, h = jax.lax.scan(step, jnp.zeros((2, n), jnp.complex64), jnp.swapaxes(u, 0, 1))
                h = jnp.swapaxes(h, 0, 1)
            x = x + nn.Dense(8)(nn.gelu((h @ outputs.T).real))
        return x


@pytest.mark.parametrize("real", [False, True])
def test_linear_recurrent_units(real):
    model = Ring(real=real)
    plan = lru(0.4, 0.9, math.pi)(model, X)
    p = vs.initialize(model, jax.random.key(0), X, scheme=plan)["params"]
    for k in range(2):
        modulus = np.exp(-np.exp(np.asarray(p[f"a{k}"], np.float64)))
        assert 0.4 <= modulus.min() < modulus.max() <= 0.9
        assert np.exp(p[f"c{k}"]) == pytest.approx(np.sqrt(1 - modulus**2), rel=1e-4)
        turn = np.abs(p[f"b{k}"]) if real else np.exp(p[f"b{k}"])
        assert 0 <= turn.min() < turn.max() <= math.pi
        assert [plan[f"{name}{k}"].std for name in "pqrs"] == [
            0.25,
            0.25,
            0.25,
            0.25,
        ]  # 1/√16: inputs 8 in two parts, states 16
        assert plan[f"Dense_{k}/kernel"].why.startswith("as declared")
    assert not np.allclose(p["a0"], p["a1"])


def test_patterns_override_what_the_program_shows():
    plan = lru(decay="a0", phase="b0", normalizer="c0", inputs="p0", outputs="s0")(Ring(), X)
    changed = {leaf.path for leaf in plan if not leaf.why.startswith("as declared")}
    assert changed == {"a0", "b0", "c0", "p0", "s0"}
    with pytest.raises(ValueError, match="no parameter matches nowhere"):
        lru(decay="nowhere")(Ring(), X)


class Space(nn.Module):
    """A diagonal state space as a long convolution, or step by step, with names of its own."""

    steps: bool = False

    @nn.compact
    def __call__(self, x):
        def leaf(name, *shape):
            return self.param(name, NORMAL, shape)

        u, v, w, c, d = leaf("u", 8, 4), leaf("v", 8, 4), leaf("w", 8), leaf("c", 8, 4, 2), leaf("d", 8)
        poles, step = -jnp.exp(u) + 1j * v, jnp.exp(w)[:, None]
        weights = c[..., 0] + 1j * c[..., 1]
        if self.steps:
            decay, drive = jnp.exp(step * poles), (jnp.exp(step * poles) - 1) / poles

            def advance(h, now):
                h = decay[None] * h + drive[None] * now[..., None]
                return h, jnp.einsum("bdn,dn->bd", h, weights).real

            _, y = jax.lax.scan(advance, jnp.zeros((2, 8, 4), jnp.complex64), jnp.swapaxes(x, 0, 1))
            y = jnp.swapaxes(y, 0, 1)
        else:
            weights = weights * (jnp.exp(step * poles) - 1) / poles
            powers = jnp.exp((step * poles)[:, :, None] * jnp.arange(5.0)[None, None])
            kernel = 2 * jnp.einsum("dn,dnt->dt", weights, powers).real
            spectrum = jnp.fft.rfft(jnp.swapaxes(x, 1, 2), n=10) * jnp.fft.rfft(kernel, n=10)[None]
            y = jnp.swapaxes(jnp.fft.irfft(spectrum, n=10)[..., :5], 1, 2)
        return nn.Dense(8, name="mix")(nn.gelu(y + x * d[None, None]))


@pytest.mark.parametrize("steps", [False, True])
def test_state_spaces(steps):
    plan = s4d()(Space(steps), X)
    p = vs.initialize(Space(steps), jax.random.key(0), X, scheme=plan)["params"]
    assert np.exp(p["u"]) == pytest.approx(0.5)
    assert p["v"][3] == pytest.approx(math.pi * np.arange(4))
    assert math.log(0.001) <= p["w"].min() < p["w"].max() <= math.log(0.1)
    assert plan["c"].std == pytest.approx(0.5**0.5)
    assert plan["mix/kernel"].why.startswith("as declared")
    assert steps or plan["d"].std == 1.0


class VmappedSpace(nn.Module):
    """A space of one feature, with the real parts of its poles as they are, clipped."""

    @nn.compact
    def __call__(self, u):
        real, imaginary = (self.param(name, NORMAL, (3,)) for name in ("re", "im"))
        c, step = self.param("c", NORMAL, (3, 2)), jnp.exp(self.param("log_step", NORMAL, (1,)))
        poles = jnp.clip(real, None, -1e-4) + 1j * imaginary
        kernel = (
            (c[:, 0] + 1j * c[:, 1]) * (jnp.exp(poles * step) - 1) / poles @ jnp.exp(poles[:, None] * step * jnp.arange(5.0))
        )
        made = jnp.fft.irfft(jnp.fft.rfft(u, n=10) * jnp.fft.rfft(kernel.real, n=10), n=10)[:5]
        return made + self.param("d", NORMAL, (1,)) * u


def test_a_space_a_feature_has_its_poles_along_its_states():
    features = nn.vmap(VmappedSpace, in_axes=1, out_axes=1, variable_axes={"params": 1}, split_rngs={"params": True})
    plan = s4d()(features(), jax.ShapeDtypeStruct((5, 8), jnp.float32))
    drawn = {leaf.path: leaf.law(jax.random.key(0), leaf.shape) for leaf in plan if leaf.path != "d"}
    assert np.all(drawn["re"] == -0.5)
    assert drawn["im"] == pytest.approx(np.broadcast_to(math.pi * np.arange(3)[:, None], (3, 8)))
    assert plan["c"].std == pytest.approx(0.5**0.5)
    assert plan["d"].std == 1.0


class Selective(nn.Module):
    """A block as the paper has it, by a parallel scan."""

    @nn.compact
    def __call__(self, x):
        u = nn.silu(nn.Conv(8, (4,), feature_group_count=8, padding="CAUSAL", name="conv")(nn.Dense(8, name="in")(x)))
        step, b, c = jnp.split(nn.Dense(2 + 6, use_bias=False, name="x")(u), [2, 5], -1)
        step = nn.softplus(nn.Dense(8, name="dt")(step))
        decay = jnp.exp(jnp.einsum("bld,dn->bldn", step, -jnp.exp(self.param("a_log", NORMAL, (8, 3)))))
        drive = jnp.einsum("bld,bln,bld->bldn", step, b, u)
        _, h = jax.lax.associative_scan(lambda p, q: (p[0] * q[0], q[0] * p[1] + q[1]), (decay, drive), axis=1)
        return x + nn.Dense(8, name="out")(jnp.einsum("bldn,bln->bld", h, c) + u * self.param("d", NORMAL, (8,)))


def test_the_sums_inside_a_recurrence_are_no_residual_additions():
    plan = mamba()(nn.Sequential([Selective(), Selective()]), X)
    for k in (0, 1):
        assert plan[f"layers_{k}/out/kernel"].why == "PyTorch's Linear ÷ √2, the branches"
        assert plan[f"layers_{k}/x/kernel"].why == "PyTorch's Linear: ±1/√fan_in"
        assert plan[f"layers_{k}/conv/bias"].std == pytest.approx(0.5 / math.sqrt(3))  # of PyTorch's convolution of 4 taps
        assert plan[f"layers_{k}/in/bias"].std == 0


class SkippedUnit(nn.Module):
    """A linear recurrent unit whose skip scales a norm's output, or a linear layer's; in time by a parallel scan or a loop."""

    parallel: bool = True
    raw: bool = False

    @nn.compact
    def __call__(self, x):
        u = nn.LayerNorm(name="norm")(x)
        if self.raw:
            u = nn.Dense(8, name="in")(u)
        decay, drive = jnp.exp(-jnp.exp(self.param("nu", NORMAL, (6,)))), nn.Dense(6)(u)
        if self.parallel:
            every = jnp.broadcast_to(decay, (2, 5, 6))
            _, h = jax.lax.associative_scan(lambda p, q: (p[0] * q[0], q[0] * p[1] + q[1]), (every, drive), axis=1)
        else:
            steps = jax.lax.scan(lambda h, d: (decay[None] * h + d,) * 2, jnp.zeros((2, 6)), drive.swapaxes(0, 1))
            h = steps[1].swapaxes(0, 1)
        return x + nn.Dense(8, name="mix")(nn.gelu(nn.Dense(8, name="c")(h) + self.param("d", NORMAL, (8,)) * u))


@pytest.mark.parametrize(("parallel", "raw"), [(True, False), (True, True), (False, True)])
def test_a_skip_beside_a_recurrence_is_no_residual_addition(parallel, raw):
    unit = SkippedUnit(parallel, raw)
    model = nn.Sequential([nn.Dense(8), unit, unit.copy(), unit.copy()])
    plan = vs.schemes.gpt2()(model, X)
    divided = {leaf.path for leaf in plan if leaf.std == pytest.approx(0.02 / math.sqrt(3))}
    assert divided == {f"layers_{k}/mix/kernel" for k in (1, 2, 3)}
    assert vs.uses(model, X).additions == 3  # the five steps in time add none
    with pytest.raises(ValueError, match="no residual addition"):
        vs.schemes.gpt2()(Unskipped(), X)


class Unskipped(nn.Module):
    """A vector times a linear layer's output beside what two layers make of it, outside of any residual branch."""

    @nn.compact
    def __call__(self, x):
        u = nn.Dense(8, name="in")(x)
        return nn.Dense(3)(nn.tanh(nn.Dense(8)(nn.tanh(nn.Dense(8)(u))) + self.param("d", NORMAL, (8,)) * u))


def test_a_stream_that_a_vector_scales_is_one():
    """x ← s ⊙ x + branch(x), from the first addition on: a later branch is added to it."""

    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return self.param("s", nn.initializers.ones, (8,)) * x + nn.Dense(8, name="out")(nn.gelu(nn.Dense(9)(x)))

    found = vs.uses(nn.Sequential([nn.Dense(8), Scaled(), Scaled(), nn.Dense(2)]), X)
    assert [found[f"layers_{k}/out/kernel"].main.ends for k in (1, 2)] == [1, 2]


def test_selective_state_spaces():
    model, x = ARCHITECTURES["Mamba"]
    plan = mamba()(model, x)
    p = vs.initialize(model, jax.random.key(0), x, scheme=plan)["params"]
    for k, dense in enumerate(("Dense_2", "Dense_7")):
        assert np.exp(p[f"A_log_{k}"]) == pytest.approx(np.broadcast_to([1, 2, 3, 4], (32, 4)))
        steps = np.log1p(np.exp(p[dense]["bias"]))
        assert 0.001 * 0.99 <= steps.min() < steps.max() <= 0.1 * 1.01
        assert plan[f"{dense}/kernel"].why == "±1/√rank"
        assert plan[f"D_{k}"].law == vs.ones
    with pytest.raises(ValueError, match="the program shows no poles"):
        mamba()(nn.Dense(2), X)


def cells():
    """Cells, the place of the forget gate's bias in them, and of the input gate's."""

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.scan(Cells, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return layer(name="layers")(x, None)[0]

    class Cells(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.RNN(nn.OptimizedLSTMCell(8, name="cell"))(x), None

    def packed(rngs):
        return nnx.RNN(nnx.OptimizedLSTMCell(8, 6, rngs=rngs))

    def update(rngs):
        return nnx.RNN(nnx.GRUCell(8, 6, rngs=rngs))

    return {
        "one a gate": (nn.RNN(nn.OptimizedLSTMCell(6)), ("cell/hf/bias", slice(0, 6)), ("cell/hi/bias", slice(0, 6))),
        "stacked": (Stack(), ("layers/cell/hf/bias", slice(0, 8)), ("layers/cell/hi/bias", slice(0, 8))),
        "packed": (packed, ("cell/dense_h/bias", slice(6, 12)), ("cell/dense_h/bias", slice(0, 6))),
        "update gate": (nn.RNN(nn.GRUCell(6)), ("cell/iz/bias", slice(0, 6)), None),
        "packed update gate": (update, ("cell/dense_i/bias", slice(6, 12)), None),
    }


@pytest.mark.parametrize("name", list(cells()))
def test_gates(name):
    model, (forget, where), remember = cells()[name]
    plan = chrono(100)(model, X)

    def drawn(path):
        leaf = plan[path]
        return np.asarray(leaf.law(jax.random.key(0), leaf.shape))  # the key that both leaves share

    own = drawn(forget)[..., where]
    assert 0 <= own.min() < own.max() <= math.log(99)
    if remember is not None:
        path, other = remember
        assert drawn(path)[..., other] == pytest.approx(-own)
        assert getattr(plan[path].law, "shared", "") == getattr(plan[forget].law, "shared", "")
    changed = {leaf.path for leaf in plan if not leaf.why.startswith("as declared")}
    assert changed == {forget, *([] if remember is None else [remember[0]])}


class Written(nn.Module):
    """An LSTM with gates in another order, and 1 added to the forget gate."""

    @nn.compact
    def __call__(self, x):
        w, v = self.param("w", NORMAL, (8, 24)), self.param("v", NORMAL, (6, 24))
        bias = self.param("bias", NORMAL, (24,))

        def step(carry, now):
            h, c = carry
            cell, i, f, o = jnp.split(now @ w + h @ v + bias, 4, -1)
            c = nn.sigmoid(f + 1) * c + nn.sigmoid(i) * jnp.tanh(cell)
            return (nn.sigmoid(o) * jnp.tanh(c), c), None

        return jax.lax.scan(step, 2 * (jnp.zeros((2, 6)),), jnp.swapaxes(x, 0, 1))[0][0]


def test_a_constant_that_the_program_adds_to_a_gate_is_subtracted():
    leaf = chrono(100)(Written(), X)["bias"]
    cell, i, f, o = np.split(np.asarray(leaf.law(jax.random.key(0), leaf.shape)), 4)
    assert not np.any([cell, o])
    assert 0 <= (f + 1).min() < (f + 1).max() <= math.log(99)
    assert i == pytest.approx(-(f + 1), abs=1e-5)
