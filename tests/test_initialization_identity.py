"""Kept traces: a model that changed is never drawn by the trace of what it was."""

import dataclasses
import random

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import varscale as vs
from varscale.initialization.identity import identity
from varscale.programs.content import Unknown

KEY = jax.random.key(1)
WIDTH = 3


@dataclasses.dataclass
class Config:
    width: int = 2


class Net(nnx.Module):
    shift = 0.0

    def __init__(self, width, rngs):
        self.layer = nnx.Linear(2, width, rngs=rngs, bias_init=nnx.initializers.constant(self.shift))


class Mlp(nn.Module):
    width: int
    value: float = 0.0

    @nn.compact
    def __call__(self, x, double=False):
        return nn.Dense(self.width * (2 if double else 1), bias_init=nn.initializers.constant(self.value))(x)


def width_of(factory):
    return vs.initialize(factory, KEY).layer.kernel.shape[1]


def test_an_nnx_factory_that_reads_globals_closures_and_attributes(monkeypatch):
    config = Config()
    by_global, by_attribute = (lambda rngs: Net(WIDTH, rngs)), lambda rngs: Net(config.width, rngs)
    assert (width_of(by_global), width_of(by_attribute)) == (3, 2)
    monkeypatch.setitem(globals(), "WIDTH", 5)
    config.width = 4
    assert (width_of(by_global), width_of(by_attribute)) == (5, 4)
    monkeypatch.setattr(Net, "shift", 1.5)
    assert vs.initialize(by_global, KEY).layer.bias[0] == 1.5


def test_linen_fields_and_inputs_of_other_kinds_shapes_and_signs():
    x = np.ones((1, 2), np.float32)
    shapes = [
        vs.initialize(Mlp(width), KEY, vs.inputs(x, double=double))["params"]["Dense_0"]["kernel"].shape[1]
        for width, double in ((2, False), (2, True), (3, False), (2, False))
    ]
    assert shapes == [2, 4, 3, 2]
    assert vs.initialize(Mlp(2), KEY, np.ones((1, 7), np.float32))["params"]["Dense_0"]["kernel"].shape == (7, 2)
    signs = [np.signbit(vs.initialize(Mlp(1, value), KEY, x)["params"]["Dense_0"]["bias"][0]) for value in (0.0, -0.0)]
    assert signs == [False, True]
    with jax.enable_x64(True):
        assert vs.initialize(Mlp(2), KEY, x)["params"]["Dense_0"]["kernel"].dtype == jnp.float32


def test_equal_models_have_one_identity_and_others_none():
    assert identity(Mlp(2)) == identity(Mlp(2))
    assert identity(Mlp(2)) != identity(Mlp(True))
    assert identity(lambda rngs: Net(2, rngs)) != identity(lambda rngs: Net(3, rngs))
    counter = iter(range(9))
    stream = nnx.Rngs(0)

    def counted(rngs):
        global WIDTH
        WIDTH += 1
        return Net(WIDTH, rngs)

    for factory in (
        counted,
        lambda rngs: Net(next(counter), rngs),
        lambda rngs: Net(random.randint(1, 9), rngs),
        lambda rngs: Net(int(np.random.randint(1, 9)), rngs),  # noqa: NPY002
        lambda rngs: Net(2, stream),
    ):
        with pytest.raises(Unknown):
            identity(factory)


def test_models_of_one_trace_share_nothing_that_can_be_changed():
    class History(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(2, 2, rngs=rngs)
            self.seen = nnx.static(Config())

    first, second = vs.initialize(History, KEY), vs.initialize(History, KEY)
    assert first.seen is not second.seen
    first.layer.kernel.set_metadata(note=1)
    assert "note" not in vs.initialize(History, KEY).layer.kernel.get_metadata()


def test_data_is_not_kept_with_the_trace():
    class Mean(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x - self.param("mean", lambda _: x.mean(0, keepdims=True))

    drawn = [vs.initialize(Mean(), KEY, np.full((2, 3), v, np.float32))["params"]["mean"][0, 0] for v in (1.0, 2.0)]
    assert drawn == [1.0, 2.0]
