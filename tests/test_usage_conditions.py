"""Conditions, memories and linear skips beside residual branches, in linen, nnx and plain functions: who lies in a branch."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import varscale as vs
from varscale.usage.table import uses

TOKENS = jax.ShapeDtypeStruct((2, 6, 16), jnp.float32)
CONDITION = jax.ShapeDtypeStruct((2, 8), jnp.float32)


def modulated(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class Conditioned(nn.Module):
    """Blocks as in DiT: a condition gives shifts, scales and gates, packed in one kernel or one each; a skip with a map."""

    packed: bool = True
    shortcut: bool = False

    @nn.compact
    def __call__(self, x, c):
        c = nn.silu(nn.Dense(16, name="c2")(nn.silu(nn.Dense(16, name="c1")(c))))
        x = nn.Dense(16, name="in")(x)
        for i in range(3):
            if self.packed:
                shift, scale, gate = jnp.split(nn.Dense(48, name=f"condition{i}")(c), 3, axis=-1)
            else:
                shift, scale, gate = (nn.Dense(16, name=f"condition{i}{k}")(c) for k in range(3))
            h = modulated(nn.LayerNorm(name=f"norm{i}")(x), shift, scale)
            h = nn.Dense(16, name=f"down{i}")(nn.gelu(nn.Dense(32, name=f"up{i}")(h)))
            x = (nn.Dense(16, name=f"skip{i}")(x) if self.shortcut else x) + gate[:, None] * h
        return nn.Dense(3, name="head")(x)


class NnxConditioned(nnx.Module):
    """Blocks as in EDM's U-Net: the condition is added between the two kernels of a branch."""

    def __init__(self, rngs, shortcut=False):
        def linear(inputs, outputs):
            return nnx.Linear(inputs, outputs, rngs=rngs)

        self.c1, self.c2, self.first, self.head = linear(8, 16), linear(16, 16), linear(16, 16), linear(16, 3)
        self.condition = nnx.List([linear(16, 32) for _ in range(3)])
        self.up, self.down = nnx.List([linear(16, 32) for _ in range(3)]), nnx.List([linear(32, 16) for _ in range(3)])
        self.skip = nnx.List([linear(16, 16) for _ in range(3 * shortcut)])
        self.norm = nnx.List([nnx.LayerNorm(16, rngs=rngs) for _ in range(3)])

    def __call__(self, x, c):
        c, x = jax.nn.silu(self.c2(jax.nn.silu(self.c1(c)))), self.first(x)
        for i in range(3):
            h = self.up[i](jax.nn.silu(self.norm[i](x))) + self.condition[i](c)[:, None]
            x = ((self.skip[i](x) if self.skip else x) + self.down[i](jax.nn.silu(h))) * 0.5**0.5
        return self.head(x)


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize(
    ("model", "within"),
    [
        (lambda shortcut: Conditioned(True, shortcut), "{}{}/kernel"),
        (lambda shortcut: Conditioned(False, shortcut), "{}{}/kernel"),
        (lambda shortcut: lambda rngs: NnxConditioned(rngs, shortcut), "{}/{}/kernel"),
    ],
    ids=["packed", "a kernel each", "nnx"],
)
def test_kernels_of_a_condition_lie_in_no_branch(model, within, shortcut):
    found = uses(model(shortcut), vs.inputs(TOKENS, CONDITION))
    assert [(b.number, b.stream, b.maps, b.shortcut) for b in found.branches] == [(i, 0, 2, shortcut) for i in (1, 2, 3)]
    kernels = {p.path: p.main for p in found if p.path.endswith("kernel")}
    for i in range(3):
        up, down = (kernels.pop(within.format(name, i)) for name in ("up", "down"))
        assert [(use.branch, use.position, use.ends) for use in (up, down)] == [(i, 0, None), (i, 1, i + 1)]
    assert {use.branch for use in kernels.values()} == {None}
    assert {use.ends for use in kernels.values()} == {None}


def test_keys_and_values_of_a_memory_lie_in_the_branch_that_attends_to_it():
    """Two streams that attend to each other; each branch has two maps in series, however deep its memory is."""

    def attend(p, x, y):
        return jax.nn.softmax((x @ p["q"]) @ (y @ p["k"]).mT) @ (y @ p["v"]) @ p["o"]

    def model(p, x, y):
        x, y = x @ p["x"], y @ p["y"]
        for i in range(2):
            x = x + attend(p[f"x{i}"], x, y)
            y = y + attend(p[f"y{i}"], y, x)
        return x @ p["head"] + jnp.mean(y)

    square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    params = {f"{stream}{i}": dict.fromkeys("qkvo", square) for stream in "xy" for i in range(2)}
    params |= {
        name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in {"x": (16, 8), "y": (16, 8), "head": (8, 3)}.items()
    }
    found = uses(model, vs.inputs(TOKENS, TOKENS), params=params)
    assert [(b.number, b.stream, b.maps) for b in found.branches] == [(1, 0, 2), (1, 1, 2), (2, 0, 2), (2, 1, 2)]
    for index, block in enumerate(("x0", "y0", "x1", "y1")):
        assert [found[f"{block}/{name}"].main.branch for name in "qkvo"] == [index] * 4
        assert [found[f"{block}/{name}"].main.position for name in "qkvo"] == [0, 0, 0, 1]


def low_rank(p, u):
    return u @ p["a"] @ p["b"] + u @ p["d"]


def looped(step):
    def space(p, u):
        _, h = jax.lax.scan(lambda h, now: (step(p, h, now),) * 2, jnp.zeros((2, 8)), jnp.swapaxes(u @ p["a"], 0, 1))
        return jnp.swapaxes(h, 0, 1) @ p["b"] + u @ p["d"]

    return space


def parallel(p, u):
    """A selective state space, whose decay the input chooses."""
    decay = jnp.exp(-jax.nn.softplus(u @ p["steps"]))
    _, h = jax.lax.associative_scan(lambda s, t: (s[0] * t[0], t[0] * s[1] + t[1]), (decay, u @ p["a"]), axis=1)
    return h @ p["b"] + u @ p["d"]


def transformed(p, u):
    """A convolution by Fourier transforms."""
    kernel = jnp.fft.rfft(p["steps"], n=12, axis=0)[None]
    return jnp.fft.irfft(jnp.fft.rfft(u @ p["a"], n=12, axis=1) * kernel, n=12, axis=1)[:, :6] @ p["b"] + u @ p["d"]


@pytest.mark.parametrize(
    "mixer",
    [
        low_rank,
        looped(lambda p, h, now: jnp.exp(-p["poles"])[None] * h + now),
        looped(lambda p, h, now: jnp.tanh(h @ p["steps"] + now)),
        parallel,
        transformed,
    ],
    ids=["low rank", "linear state space", "recurrent cell", "selective state space", "Fourier"],
)
def test_a_skip_by_a_matrix_inside_a_branch_is_no_addition(mixer):
    """W u + B A u is one linear map; a state space's output C h + D u is a layer's output, and no stream begins there."""

    def model(p, x):
        x = x @ p["in"]
        for i in range(2):
            x = x + jax.nn.gelu(mixer(p[f"mixer{i}"], jax.nn.standardize(x))) @ p[f"out{i}"]
        return x @ p["head"]

    def shaped(**shapes):
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    square = shaped(a=(8, 8), b=(8, 8), d=(8, 8), steps=(8, 8) if mixer is not transformed else (6, 8), poles=(8,))
    params = {**shaped(**{"in": (16, 8)}, out0=(8, 8), out1=(8, 8), head=(8, 3)), "mixer0": square, "mixer1": square}
    found = uses(model, TOKENS, params=params)
    assert [(b.number, b.stream, b.maps, b.shortcut) for b in found.branches] == [(1, 0, 3, False), (2, 0, 3, False)]
    assert {p.path: p.main.ends for p in found if p.main and p.main.ends} == {"out0": 1, "out1": 2}


def test_blocks_that_all_have_a_projection_are_residual():
    """A transition to another width in every block, the last one before the readout too; norms before or after the fork."""

    class Net(nn.Module):
        before: bool

        @nn.compact
        def __call__(self, x):
            for i in range(3):
                h = nn.relu(nn.LayerNorm()(x)) if self.before else x
                y = nn.Dense(16, name=f"b{i}")(nn.relu(nn.LayerNorm()(nn.Dense(16, name=f"a{i}")(h))))
                x = nn.Dense(16, name=f"s{i}")(h) + y
                x = x if self.before else nn.relu(x)
            return nn.Dense(3)(x)

    for before in (False, True):
        found = uses(Net(before), TOKENS)
        assert [(b.number, b.maps, b.shortcut) for b in found.branches] == [(i, 2, True) for i in (1, 2, 3)]


def test_a_condition_without_residual_branches():
    """What a condition gives each layer is added, and scales; no layer's output is added to anything."""

    def model(p, x, c):
        c = jax.nn.relu(c @ p["c"])
        for i in range(3):
            x = jax.nn.relu(x @ p[f"w{i}"] * (1 + (c @ p[f"g{i}"])[:, None]) + (c @ p[f"b{i}"])[:, None])
        return x @ p["h"]

    shapes = {"c": (8, 8), "h": (16, 3)} | {f"{n}{i}": (16 if n == "w" else 8, 16) for n in "wgb" for i in range(3)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    assert uses(model, vs.inputs(TOKENS, CONDITION), params=params).branches == ()


def test_a_second_parallel_branch_has_no_shortcut():
    """Attention and a feed-forward layer that both read the stream as it was: neither's stream passes a map."""

    def model(p, x):
        x = x @ p["in"]
        x = x + jnp.tanh(x @ p["a0"]) @ p["a1"] + jnp.tanh(x @ p["b0"]) @ p["b1"]
        return x @ p["head"]

    shapes = {"in": (16, 8), "head": (8, 3), **dict.fromkeys(("a0", "a1", "b0", "b1"), (8, 8))}
    found = uses(model, TOKENS, params={name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()})
    assert [(b.number, b.maps, b.shortcut) for b in found.branches] == [(1, 2, False), (2, 2, False)]
