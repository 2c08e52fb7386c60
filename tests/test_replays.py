"""Calls of linen modules that do the same are traced once: the report is the one of the plain trace, whatever modules do."""

import dataclasses
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks.architectures import MLP, Recurrent, Residual, Transformer
from varscale.programs import faces, replays
from varscale.programs.pieces import PIECE
from varscale.theory import predict
from varscale.theory.interpreter.predict import first_pass

X = jax.ShapeDtypeStruct((8, 32), jnp.float32)
DEPTH = 5


def dense(gain=1.0, **kwargs):
    return nn.Dense(32, kernel_init=nn.initializers.variance_scaling(gain, "fan_in", "normal"), **kwargs)


class Block(nn.Module):
    """A block with submodules of its own; `gain` and `config` tell blocks apart."""

    gain: float = 1.0
    config: Any = None

    @nn.compact
    def __call__(self, x):
        gain = self.gain if self.config is None else self.config.gain
        return x + gain * dense(name="down")(jnp.tanh(dense()(nn.LayerNorm()(x))))


REMATERIALIZED = nn.remat(Block)


class Deep(nn.Module):
    """Some blocks after each other, made by `make(i)`."""

    make: Any

    @nn.compact
    def __call__(self, x):
        for i in range(DEPTH):
            x = self.make(i)(x)
        return x


class Set(nn.Module):
    gain: float = 1.0

    def setup(self):
        self.inner = [dense(), dense()]

    def __call__(self, x):
        for layer in self.inner:
            x = self.gain * jnp.tanh(layer(x))
        return x + self.half(x)

    def half(self, x):
        return x / 2


class Named(nn.Module):
    """What it does hangs on its name, its path or its parent."""

    question: str
    gains: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 3.0)

    @nn.compact
    def __call__(self, x):
        match self.question:
            case "name":
                last = self.name == f"Named_{DEPTH - 1}"
            case "path":
                last = f"Named_{DEPTH - 1}" in self.path
            case _:
                last = self.parent.make is not None and self.parent.scope.name is None and x.ndim > 2
        return (3.0 if last else 1.0) * dense()(x)


class Fixed(nn.Module):
    """Draws one kernel from a key of its own, the same in every block."""

    @nn.compact
    def __call__(self, x):
        free = self.param("free", nn.initializers.normal(0.2), (32, 32))
        fixed = self.param("fixed", lambda _: 0.2 * jax.random.normal(jax.random.key(7), (32, 32)))
        return x @ free + x @ fixed


class Pair(nn.Module):
    """Another function of an array and itself than of two arrays."""

    @nn.compact
    def __call__(self, x, y):
        return dense()(x) * (2.0 if x is y else 1.0)


class Pairs(nn.Module):
    @nn.compact
    def __call__(self, x):
        out = [Pair()(x, x if i % 2 else x + 1) for i in range(8)]
        return sum(out)


class Flag(nn.Module):
    @nn.compact
    def __call__(self, x, flag, scale=None):
        return dense()(x) * (2.0 if flag is True else 1.0), {"scale": x if scale is None else scale * x}


class Flags(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(8):
            x, _ = Flag()(x, True if i % 2 else 1, scale=None if i < 4 else 0.5)
        return x


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = Block()
        for _ in range(4):
            x = block(x)
        return x


class Again(nn.Module):
    """Calls every block of a stack twice: the second time it has its parameters."""

    @nn.compact
    def __call__(self, x):
        blocks = [Block() for _ in range(DEPTH)]
        for block in blocks + blocks[::-1]:
            x = block(x)
        return x


class Reaching(nn.Module):
    """Reads a block's parameters, and calls a part of one."""

    @nn.compact
    def __call__(self, x):
        blocks = [Set(name=f"set_{i}") for i in range(DEPTH)]
        for block in blocks:
            x = block(x)
        return blocks[-1].half(x) @ blocks[-1].inner[0].variables["params"]["kernel"]


class Holding(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.inner(x) + dense()(x)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
        inner = dense()
        for _ in range(DEPTH):
            x = Holding(inner)(x)
        return x


class Closed(nn.Module):
    """Blocks that close over an array of the trace."""

    @nn.compact
    def __call__(self, x):
        class Inner(nn.Module):
            @nn.compact
            def __call__(self, y):
                return dense()(y) + x

        y = x
        for _ in range(DEPTH):
            y = Inner()(y)
        return y


class Sown(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.sow("intermediates", "mine", 2 * x)
        self.sow("losses", "norm", jnp.mean(x**2))
        return nn.BatchNorm(use_running_average=False)(dense()(x))


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(dense()(x), rng=self.make_rng("params"))


class Seeing(nn.Module):
    """Asks whether it is being initialized, and starts from what its input is."""

    @nn.compact
    def __call__(self, x):
        scale = self.variable("stats", "scale", lambda: jnp.mean(x**2))
        if not self.is_initializing():
            scale.value = 0.5 * scale.value
        return dense()(x) + scale.value


class Keeping(nn.Module):
    """Sets an attribute, which its parent reads."""

    @nn.compact
    def __call__(self, x):
        object.__setattr__(self, "last", jnp.tanh(dense()(x)))
        return x


class Setting(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(DEPTH):
            block = Keeping()
            x = block(x) + block.last
        return x


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        return x + nn.Dense(32, kernel_init=kernel)(x)


class Twofold(nn.Module):
    """An inner block that calls its parent's method of the same name."""

    @nn.compact
    def __call__(self, x):
        return dense()(x)


class Child(Twofold):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x) + nn.LayerNorm()(x)


def mutated(i, config=types.SimpleNamespace(gain=1.0)):  # noqa: B008
    config.gain = float(1 + i)
    return Block(config=config)


@dataclasses.dataclass
class Config:
    gain: float


# Whether pieces are to be expected, in the pass that initializes and in one that does not.
MODELS = {
    "blocks": (Deep(lambda _: Block()), True),
    "setup": (Deep(lambda _: Set()), True),
    "gains": (Deep(lambda i: Block(1.0 + i)), True),  # the Dense layers in them are alike
    "configs": (Deep(lambda i: Block(config=Config(2.0))), True),
    "initializers": (Deep(lambda i: dense(gain=1.0 + i % 2)), True),
    "activations": (Deep(lambda i: nn.Sequential([dense(), jnp.tanh])), True),
    "rematerialized": (Deep(lambda _: REMATERIALIZED()), False),
    "inherited": (Deep(lambda _: Child()), True),
    "seeing": (Deep(lambda _: Seeing()), True),
    "setting": (Setting(), True),
    "boxed": (Deep(lambda _: Boxed()), True),
    "pairs": (Pairs(), True),
    "flags": (Flags(), True),
    "again": (Again(), True),
    "reaching": (Reaching(), True),
    "mutated": (Deep(mutated), True),
    "name": (Deep(lambda _: Named("name")), True),
    "path": (Deep(lambda _: Named("path")), True),
    "parent": (Deep(lambda _: Named("parent")), True),
    "fixed key": (Deep(lambda _: Fixed()), (False, True)),
    "shared": (Shared(), (False, True)),
    "tied": (Tied(), True),
    "closed": (Closed(), True),
    "sown": (Deep(lambda _: Sown()), True),
    "noisy": (Deep(lambda _: Noisy()), True),
    "MLP": (MLP(width=32, depth=DEPTH), True),
    "residual": (Residual(order="post", norm="batch", width=32, depth=DEPTH), True),
    "transformer": (Transformer(depth=DEPTH, width=32, vocabulary=50), True),
    "recurrent": (Recurrent("tanh", 32, depth=4, residual=True), True),
}
INPUTS = {
    "transformer": jax.ShapeDtypeStruct((2, 16), jnp.int32),
    "recurrent": jax.ShapeDtypeStruct((4, 6, 32), jnp.float32),
}


def pieces(model, x):
    """Calls of pieces in the pass that initializes, and, where another gives the rows, in that."""

    class Split:
        structs = (x,)

        def join(self, dynamic):
            return faces.as_inputs(dynamic[0])

    program = faces.program(model)
    found = first_pass(program, Split())
    jaxpr = jax.make_jaxpr(lambda v, x: program.apply(v, faces.as_inputs(x))[0])(found.drawing.shapes, x).jaxpr
    return [sum(eqn.params.get("name") == PIECE for eqn in part.eqns) for part in (found.drawing.jaxpr, jaxpr)]


@pytest.mark.parametrize("name", MODELS)
def test_the_report_is_that_of_the_plain_trace(name, monkeypatch):
    model, expected = MODELS[name]
    x = INPUTS.get(name, X)
    found = predict(model, x)
    assert tuple(count > 0 for count in pieces(model, x)) == (expected if isinstance(expected, tuple) else (expected, expected))
    monkeypatch.setattr(replays, "_PLAIN", 10**9)
    plain = predict(model, x)
    assert pieces(model, x) == [0, 0]
    assert [(row.path, row.kind, row.shape, row.how) for row in found.rows] == [
        (row.path, row.kind, row.shape, row.how) for row in plain.rows
    ]
    for a, b in zip(found.rows, plain.rows, strict=True):
        for field in ("mean", "second_moment", "typical", "band", "gradient", "error_bound", "sample_correlation"):
            mine, theirs = getattr(a, field), getattr(b, field)
            if theirs is not None:
                np.testing.assert_allclose(mine, theirs, rtol=1e-8, atol=1e-12, err_msg=f"{a.path} {field}")
    assert list(found.weights) == list(plain.weights)
    for path, weight in plain.weights.items():
        for field in dataclasses.fields(weight):
            mine, theirs = getattr(found.weights[path], field.name), getattr(weight, field.name)
            assert mine == theirs or mine == pytest.approx(theirs), (path, field.name)
