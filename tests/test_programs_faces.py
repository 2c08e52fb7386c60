"""What a user may give for a model, an input and parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import varscale as vs

X = jax.ShapeDtypeStruct((4, 8), jnp.float32)


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(x)


class Sized(nnx.Module):
    def __init__(self, width: int = 8, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(8, width, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


class Needy(nnx.Module):
    def __init__(self, width: int, depth: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(8, width * depth, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


class Pretrained:
    """As Hugging Face's: called with parameters, and the linen module is its `module`."""

    module = Linear()

    def __call__(self, x, params=None):
        return self.module.apply(params, x)


@pytest.mark.parametrize(
    "model",
    [
        Linear(),
        Pretrained(),
        Sized,
        functools.partial(Sized, 8),
        functools.partial(Needy, depth=2, width=4),
        lambda rngs: Sized(8, rngs=rngs),
        lambda *, rngs: Sized(8, rngs=rngs),
        lambda key: Sized(8, rngs=nnx.Rngs(key)),
        lambda *, key: Sized(8, rngs=nnx.Rngs(key)),
    ],
)
def test_model_is_taken_for_what_it_is(model):
    assert vs.predict(model, X).output.second_moment == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("model", [Needy, functools.partial(Needy, 8), nn.Dense, functools.partial(nn.Dense, 8)])
def test_model_that_is_not_built_says_what_to_give(model):
    with pytest.raises(TypeError, match=r"model must be .*rngs"):
        vs.predict(model, X)


def test_tuple_of_integers_is_a_shape():
    assert vs.predict(Linear(), (4, 8)).rows == vs.predict(Linear(), X).rows


class Synchronised(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=False, axis_name="batch")(x)
        return x if self.is_initializing() else x / jax.lax.psum(1, "model")


class SynchronisedNnx(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, axis_name="batch", rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


@pytest.mark.parametrize("model", [Synchronised(), SynchronisedNnx])
def test_mapped_axis_that_nothing_binds_has_one_device(model):
    x = jax.random.normal(jax.random.key(0), (16, 8))
    predicted = vs.predict(model, x)
    drawn = vs.initialize(model, jax.random.key(1), x)
    measured = vs.probe(model, drawn, x) if isinstance(model, nn.Module) else vs.probe(drawn, None, x)
    assert [row.path for row in measured.rows] == [row.path for row in predicted.rows]
    assert measured.rows[-1].second_moment == pytest.approx(1, abs=1e-2)
    assert predicted.rows[-1].second_moment == pytest.approx(1, abs=2e-2)
    assert vs.uses(model, x).muon_dimension_numbers() is not None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kernel", "inner"], meta_fields=[])
@dataclasses.dataclass
class Chain:
    """A tree of arrays that is callable, as an Equinox module is, and may hold another."""

    kernel: jax.Array
    inner: "Chain | None" = None

    def __call__(self, x):
        return x @ self.kernel if self.inner is None else self.inner(x @ self.kernel)


def test_callable_tree_of_parameters_is_opened():
    kernels = [jax.random.normal(jax.random.key(i), (8, 8)) / 8**0.5 for i in range(2)]
    given = vs.predict(lambda p, x: p(x), X, params=Chain(kernels[0], Chain(kernels[1]))).output
    listed = vs.predict(lambda p, x: x @ p[0] @ p[1], X, params=kernels).output
    assert (given.second_moment, given.gradient) == (listed.second_moment, listed.gradient)
