"""Every scheme on a model that it is for: what is drawn by its plan is verified, and another scale of it refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from schemes_models import PICTURES, PostNormStack, ResidualNet

import varscale as vs
from varscale import schemes
from varscale.schemes import Scheme
from varscale.schemes.relative import Relative

IDS = jnp.arange(12).reshape(2, 6)
VECTORS = jax.ShapeDtypeStruct((2, 64), jnp.float32)
SEQUENCES = jax.ShapeDtypeStruct((2, 5, 64), jnp.float32)


class Blocks(nn.Module):
    """A pre-norm block of attention and a feed-forward layer, between a table and a readout."""

    width: int = 64

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(200, self.width, name="embed")(ids)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(nn.LayerNorm(name="norm")(x))
        x = x + nn.Dense(self.width, name="down")(nn.gelu(nn.Dense(256, name="up")(nn.LayerNorm(name="norm2")(x))))
        return nn.Dense(200, use_bias=False, name="head")(nn.LayerNorm(name="last")(x))


class Towers(nn.Module):
    """A policy of four actions and a value."""

    @nn.compact
    def __call__(self, x):
        policy, value = (jnp.tanh(nn.Dense(64, name=name)(x)) for name in ("pi", "v"))
        return nn.Dense(4, name="policy")(policy), nn.Dense(1, name="value")(value)


class Poles(nn.Module):
    """A linear recurrent unit with complex poles, as a loop."""

    @nn.compact
    def __call__(self, x):
        nu, theta, gamma = (self.param(name, nn.initializers.normal(1.0), (64,)) for name in ("nu", "theta", "gamma"))
        b, c = (self.param(name, nn.initializers.normal(1.0), (64, 64)) for name in ("b", "c"))
        poles = jnp.exp(-jnp.exp(nu) + 1j * jnp.exp(theta))
        u = ((x @ b) * jnp.exp(gamma)[None, None]).astype(jnp.complex64)

        def step(h, now):
            h = poles[None] * h + now
            return h, h

        _, h = jax.lax.scan(step, jnp.zeros((2, 64), jnp.complex64), jnp.swapaxes(u, 0, 1))
        return jnp.swapaxes(h, 0, 1).real @ c


class Diagonal(nn.Module):
    """A diagonal state space, step by step."""

    @nn.compact
    def __call__(self, x):
        real, imaginary, c = (self.param(name, nn.initializers.normal(1.0), (64, 8)) for name in ("real", "imaginary", "c"))
        step = jnp.exp(self.param("step", nn.initializers.normal(1.0), (64,)))[:, None]
        poles = -jnp.exp(real) + 1j * imaginary
        decay, drive = jnp.exp(step * poles), (jnp.exp(step * poles) - 1) / poles

        def advance(h, now):
            h = decay[None] * h + drive[None] * now[..., None].astype(jnp.complex64)
            return h, jnp.sum(h * c[None].astype(jnp.complex64), axis=-1).real

        _, y = jax.lax.scan(advance, jnp.zeros((2, 64, 8), jnp.complex64), jnp.swapaxes(x, 0, 1))
        return nn.Dense(64, name="mix")(jnp.swapaxes(y, 0, 1))


class Selective(nn.Module):
    """Mamba's recurrence: steps that the input chooses."""

    @nn.compact
    def __call__(self, x):
        a = -jnp.exp(self.param("a_log", nn.initializers.normal(1.0), (64, 16)))
        step = nn.softplus(nn.Dense(64, name="dt")(nn.Dense(8, use_bias=False, name="low")(x)))
        b, c = nn.Dense(16, name="b")(x), nn.Dense(16, name="c")(x)

        def advance(h, now):
            x, step, b, c = now
            h = jnp.exp(step[..., None] * a[None]) * h + (step * x)[..., None] * b[:, None]
            return h, jnp.sum(h * c[:, None], axis=-1)

        xs = [jnp.swapaxes(z, 0, 1) for z in (x, step, b, c)]
        return jnp.swapaxes(jax.lax.scan(advance, jnp.zeros((2, 64, 16)), xs)[1], 0, 1)


CASES = {
    **{
        name: ({}, Blocks(), IDS)
        for name in (
            "fan_in", "he", "glorot", "lecun", "orthogonal", "normal", "gpt2", "megatron", "llama_depth", "mitchell",
            "full_megatron", "small_wang", "zero_projection", "normalized", "deepnorm", "subln", "t5", "mimetic", "spectral",
        )
    },
    "critical": ({}, nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(64)]), VECTORS),
    "mup": ({"base": Blocks(32)}, Blocks(), IDS),
    "completep": ({"base": Blocks(32)}, Blocks(), IDS),
    "t_fixup": ({}, PostNormStack(1, norm=False), IDS),
    "fixup": ({}, ResidualNet(), PICTURES),
    "nf_resnet": ({}, ResidualNet(), PICTURES),
    "rezero": ({}, ResidualNet(gated=True), PICTURES),
    "skipinit": ({}, ResidualNet(gated=True), PICTURES),
    "ppo": ({}, Towers(), VECTORS),
    "lru": ({}, Poles(), SEQUENCES),
    "s4d": ({}, Diagonal(), SEQUENCES),
    "mamba": ({}, Selective(), SEQUENCES),
    "chrono": ({"longest": 50}, nn.RNN(nn.LSTMCell(64)), SEQUENCES),
}  # fmt: skip
NO_SCHEMES = {"declared", "graded", "interleaved", "orthogonal_over"}  # laws of a leaf


def test_every_scheme_has_a_model_here():
    assert set(CASES) == {name for name in schemes.__all__ if name[0].islower()} - NO_SCHEMES


@pytest.mark.parametrize("name", CASES)
def test_what_is_drawn_is_verified_and_any_other_scale_refused(name):
    """False alarms once in 1e9. The largest leaf has 64 entries or more, and 1.5 times as large is refused."""
    settings, model, x = CASES[name]
    make = getattr(schemes, name)(**settings)
    assert isinstance(make, Scheme | Relative)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        plan = make(model, x)
        params = vs.initialize(model, jax.random.key(0), x, scheme=plan)
    verdicts = plan.verify(params).verdicts
    tree, tested = params["params"], [one.path for one in verdicts if one.tested and one.path in {leaf.path for leaf in plan}]
    largest = max(tested, key=lambda path: np.prod(plan[path].shape))
    with pytest.raises(AssertionError, match=f"{largest} does not follow"):
        plan.verify({"params": scaled(tree, largest.split("/"))})


def scaled(tree, path):
    """The tree with one leaf 1.5 times as large; of zeros, ones."""
    if not path:
        return np.where(np.any(tree), 1.5 * np.asarray(tree), 1.0).astype(tree.dtype)
    return {**tree, path[0]: scaled(tree[path[0]], path[1:])}
