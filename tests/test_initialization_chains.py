"""Chains: equal laws share a program, programs need no memory but their result's, keys are jax's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers as theirs

import varscale as vs
from varscale.initialization import derivation
from varscale.initialization.drawing import compiled
from varscale.initialization.outline import outline
from varscale.initialization.tracing import trace

KEY = jax.random.key(9)
X = np.ones((2, 12), np.float32)


class Layer(nn.Module):
    dtype: object

    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(12, dtype=self.dtype, param_dtype=self.dtype)(x), None


class Stack(nn.Module):
    """Two stacks of the same layers in loops, one of them under remat, and two layers more."""

    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = jnp.asarray(x, self.dtype)
        for name, layer in (("first", Layer), ("second", nn.remat(Layer))):
            stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = stack(self.dtype, name=name)(x, None)
        for _ in range(2):
            x = nn.Dense(12, dtype=self.dtype, param_dtype=self.dtype, kernel_init=theirs.glorot_uniform())(x)
        return x


def planned(model, x=X):
    return outline(trace(model, KEY, x, None), KEY)


def test_equal_laws_share_one_program_that_needs_no_memory():
    plan = planned(Stack())
    programs = [task.program for task in plan.tasks if task.program is not None]
    assert len(programs) == 4
    assert len(set(programs)) == 2
    for program in set(programs):
        assert compiled(program).memory_analysis().temp_size_in_bytes == 0


def test_the_outline_is_shown_before_and_verified_after():
    plan = planned(Stack(), jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert "params/first/Dense_0/kernel" in plan.table(200)
    narrow = plan.account.table(60)
    assert max(map(len, narrow.splitlines())) <= 60
    assert "Not shown at this width: " in narrow
    params = plan.draw(KEY)
    plan.account.verify(params)
    with pytest.raises(ValueError, match=r"not those of the account: .*kernel is bfloat16\[3, 12, 12\], not float32"):
        plan.account.verify(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    with pytest.raises(ValueError, match="is missing"):
        plan.account.verify({"params": {}})
    other = jax.random.key(10)  # drawn again with another key
    expected = jax.jit(Stack().init)(other, X)
    jax.tree.map(np.testing.assert_array_equal, plan.draw(other), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64], ids=lambda d: np.dtype(d).name)
def test_other_dtypes_have_the_bits_of_the_jitted_init(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        model = Stack(dtype)
        params, expected = vs.initialize(model, KEY, X), jax.jit(model.init)(KEY, X)
        jax.tree.map(np.testing.assert_array_equal, params, expected)
        assert params["params"]["Dense_0"]["kernel"].dtype == dtype


@pytest.mark.parametrize("partitionable", [True, False])
def test_keys_in_numpy_are_those_of_jax(partitionable):
    with jax.threefry_partitionable(partitionable):
        words = np.asarray(jax.random.key_data(KEY))
        for data in (0, 7, 2**32 - 1):
            ours = derivation.fold_in(words, np.uint32(data))
            np.testing.assert_array_equal(ours, jax.random.key_data(jax.random.fold_in(KEY, data)))
        for shape in ((1,), (5,), (2, 3)):
            ours = derivation.split(words, shape, partitionable)
            np.testing.assert_array_equal(ours, jax.random.key_data(jax.random.split(KEY, shape)))
        many = jax.random.split(KEY, 4)
        ours = derivation.split(np.asarray(jax.random.key_data(many)), (3,), partitionable)
        np.testing.assert_array_equal(ours, jax.random.key_data(jax.vmap(lambda key: jax.random.split(key, 3))(many)))


class Carried(nn.Module):
    """Keys that a loop carries and folds with its counter, backwards; a seed of the model's own; a table of constants."""

    @nn.compact
    def __call__(self, x):
        def law(key, shape):
            def step(carry, i):
                key, count = carry
                key, now = jax.random.split(key)
                return (key, count + 1), jax.random.normal(jax.random.fold_in(now, count + i), shape)

            return jax.lax.scan(step, (key, jnp.int32(0)), jnp.arange(4, dtype=jnp.int32), reverse=True)[1]

        kernel = self.param("carried", law, (12, 12))
        seeded = self.param("seeded", lambda _: jax.random.uniform(jax.random.key(5), (12, 12)))
        table = self.param("table", lambda _: jnp.asarray(np.sin(np.arange(12 * 512, dtype=np.float32)).reshape(12, 512)))

        def walk(key):
            return jax.lax.fori_loop(0, 3, lambda i, w: w + jax.random.normal(key, (4,)), jnp.ones(4))

        walked = self.param("walked", walk)
        return (x @ kernel[0] @ seeded @ table).sum() + walked.sum()


def test_keys_carried_by_loops_and_constants():
    params, account = vs.initialize(Carried(), KEY, X, account=True)
    expected = jax.jit(Carried().init)(KEY, X)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert account["params/carried"].how == "elementwise"


def test_two_leaves_of_one_key_and_one_of_two():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x):
            key = self.make_rng("params")
            for name in "ab":
                self.param(name, lambda _: jax.random.normal(key, (8, 8)))
            sum_of = lambda one, other: jax.random.normal(one, (8,)) + jax.random.normal(other, (8,))  # noqa: E731
            self.param("c", lambda own: sum_of(own, jax.random.split(own)[0]))
            self.param("d", lambda own: sum_of(own, own))
            return x

    params = vs.initialize(Odd(), KEY, X)["params"]
    expected = jax.jit(Odd().init)(KEY, X)["params"]
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    np.testing.assert_array_equal(params["a"], params["b"])
