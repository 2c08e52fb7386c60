"""What schemes read of families beside the plain decoder: vision transformers, soft caps, one table for two streams."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import varscale as vs

IDS = jax.ShapeDtypeStruct((2, 6), jnp.int32)
PICTURES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
NORMAL = nn.initializers.normal(1.0)


class VisionTransformer(nn.Module):
    """Patches by a convolution, with a class token or without; a block whose attention has biases by head."""

    token: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (4, 4), strides=(4, 4), name="patch")(x).reshape(2, 4, 16)
        if self.token:
            x = jnp.concatenate([jnp.broadcast_to(self.param("token", NORMAL, (1, 1, 16)), (2, 1, 16)), x], axis=1)
        x = x + self.param("positions", NORMAL, (1, x.shape[1], 16))
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm()(x))
        return nn.Dense(3)(x.mean(1))


class NnxVisionTransformer(nnx.Module):
    """Patches by a reshape; positions with an axis for rows and one for columns."""

    def __init__(self, rngs):
        self.patch, self.head = nnx.Linear(48, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (2, 2, 16)))
        self.attention = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)

    def __call__(self, x):
        x = x.reshape(2, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 2, 2, 48)
        x = (self.patch(x) + self.positions[...][None]).reshape(2, 4, 16)
        return self.head((x + self.attention(x)).mean(1))


@pytest.mark.parametrize(
    "model", [VisionTransformer(False), VisionTransformer(True), lambda rngs: NnxVisionTransformer(rngs)],
    ids=["linen", "with a token", "nnx"],
)  # fmt: skip
def test_positions_of_patches_are_a_table_and_biases_by_head_are_not(model):
    plan = vs.schemes.gpt2()(model, PICTURES)
    assert (plan["positions"].role, plan["positions"].std) == ("position", 0.02)
    assert [plan[f"attention/{name}/bias"].role for name in ("query", "out")] == ["vector"] * 2


class Capped(nn.Module):
    """A readout behind a soft cap, with its multiplier inside, outside or nowhere; `blocks` of numbered layers."""

    width: int
    blocks: int = 1
    inside: float = 1.0
    outside: float = 1.0

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(30, self.width, name="embed")(ids)
        for i in range(self.blocks):
            h = nn.relu(nn.Dense(4 * self.width, name=f"block{i}/fc1")(nn.LayerNorm(name=f"block{i}/norm")(x)))
            x = x + nn.Dense(self.width, name=f"block{i}/fc2")(h)
        return self.outside * 30.0 * jnp.tanh(self.inside * nn.Dense(30, name="head")(x) / 30.0)


def test_a_multiplier_inside_a_soft_cap_is_present():
    def status(**own):
        return [
            (r.expected, r.found, r.status)
            for r in vs.schemes.mup(base=Capped(16), table=8)(Capped(64, **own), IDS).requirements
        ]

    expected = pytest.approx(0.25, rel=1e-5)
    assert status() == [(expected, pytest.approx(1.0, rel=1e-5), "missing")]
    assert status(inside=0.25) == [(expected, expected, "present")]
    assert status(outside=0.25) == [(expected, expected, "present")]


def test_layers_that_the_base_has_not_are_compared_with_the_same_part_of_an_earlier_one():
    """Of the numbers in a path the fewest differ: fc2 of block 3 is compared with fc2 of block 0, not with fc1."""
    plan = vs.schemes.completep(base=Capped(16))(Capped(32, 4), IDS)
    assert plan["block3/fc1/kernel"].std == pytest.approx(32**-0.5, rel=1e-3)
    assert plan["block3/fc2/kernel"].std == pytest.approx(128**-0.5, rel=1e-3)

    class Net(nnx.Module):
        def __init__(self, rngs, width, blocks):
            self.embed = nnx.Embed(30, width, rngs=rngs)
            self.blocks = nnx.List([
                nnx.List([nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)])
                for _ in range(blocks)
            ])  # fmt: skip

        def __call__(self, ids):
            x = self.embed(ids)
            for up, down in self.blocks:
                x = x + down(nnx.relu(up(x)))
            return x

    plan = vs.schemes.completep(base=lambda rngs: Net(rngs, 16, 1))(lambda rngs: Net(rngs, 32, 4), IDS)
    assert [plan[f"blocks/3/{i}/kernel"].std for i in (0, 1)] == pytest.approx([32**-0.5, 128**-0.5], rel=1e-3)


class TwoStreams(nn.Module):
    """An encoder and a decoder that look up one table, which is the readout too or not."""

    tied: bool

    @nn.compact
    def __call__(self, source, target):
        embed = nn.Embed(30, 16, name="embed")
        x, y = embed(source), embed(target)
        x = x + nn.Dense(16, name="encoder")(nn.relu(x))
        y = y + nn.MultiHeadDotProductAttention(2, name="cross")(y, x)
        return embed.attend(y) if self.tied else nn.Dense(30, name="head")(y)


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_that_two_streams_look_up_is_not_tied_to_the_readout(tied):
    inputs = vs.inputs(IDS, IDS)
    assert vs.schemes.llama_depth()(TwoStreams(tied), inputs)["embed/embedding"].std == (0.25 if tied else 1.0)
    assert vs.schemes.zero_projection()(TwoStreams(tied), inputs)["embed/embedding"].std == (0.001 if tied else 1.0)


def test_a_packed_gate_and_what_it_multiplies_have_laws_of_their_own():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.wi = nnx.Linear(16, 128, use_bias=False, rngs=rngs)
            self.wo = nnx.Linear(64, 16, use_bias=False, rngs=rngs)

        def __call__(self, x):
            gate, up = jnp.split(self.wi(x), 2, axis=-1)
            return x + self.wo(jax.nn.silu(gate) * up)

    plan = vs.schemes.llama_depth()(lambda rngs: Block(rngs), jax.ShapeDtypeStruct((2, 6, 16), jnp.float32))
    drawn = plan["wi/kernel"].law(jax.random.key(0), (16, 128), jnp.float32)
    # Of 1024 normal weights the standard deviation is within 10 % but once in 2e5 draws; the key is fixed.
    assert [float(half.std()) for half in jnp.split(drawn, 2, axis=1)] == pytest.approx([0.02, 0.02 / 2**0.5], rel=0.1)
