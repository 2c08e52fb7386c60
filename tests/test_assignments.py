"""nnx models inside a trace: assignments do what flax's do, and the work is proportional to depth."""

import contextlib
import cProfile
import functools
import pstats

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from varscale.programs.assignments import quick_assignments
from varscale.programs.faces import as_inputs, program

X = jax.ShapeDtypeStruct((8, 16), jnp.float32)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(16, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(jax.nn.relu(self.dense(x))))


class Deep(nnx.Module):
    def __init__(self, depth, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(depth)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_the_work_of_a_trace_is_proportional_to_depth():
    def calls(depth):
        found = program(lambda rngs: Deep(depth, rngs))
        assert found.start is not None
        start = functools.partial(found.start, jax.random.key(0))
        profile = cProfile.Profile()
        profile.runcall(jax.make_jaxpr(lambda x: start(as_inputs(x))[1]), X)
        return pstats.Stats(profile).total_calls  # pyright: ignore[reportAttributeAccessIssue]

    calls(1)  # what is done once in a process
    few, more, most = map(calls, (4, 12, 20))
    assert most - more == pytest.approx(more - few, rel=0.05)


def test_parameters_and_outputs_are_those_of_flax():
    x, key = jax.random.normal(jax.random.key(1), X.shape), jax.random.key(2)
    made = Deep(2, nnx.Rngs(key))
    _, expected = nnx.split(made)
    found = program(lambda rngs: Deep(2, rngs))
    assert found.init is not None
    parameters = found.init(key, as_inputs(x))
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), parameters, expected)
    assert all(jax.tree.leaves(same))
    output, captures = jax.jit(lambda p, x: found.apply(p, as_inputs(x)))(parameters, x)
    np.testing.assert_allclose(output, made(x), atol=1e-6)
    np.testing.assert_allclose(captures["blocks/0"], Deep(2, nnx.Rngs(key)).blocks[0](x), atol=1e-6)


class Doubled(nnx.Variable):
    def on_set_value(self, value):
        return 2 * value


@pytest.mark.parametrize("kind", [nnx.Param, Doubled])
@pytest.mark.parametrize("index", [..., 0, slice(1)])
@pytest.mark.parametrize("new", [np.full(3, 5.0, np.float32), np.float32(5), np.full(3, 5)])
def test_an_assignment_does_what_flax_does(kind, index, new):
    class Holder(nnx.Module):
        def __init__(self):
            self.variable = kind(jnp.zeros(3))

    def assigned(new, quick=False):
        holder = Holder()
        try:
            with quick_assignments(holder) if quick else contextlib.nullcontext():
                holder.variable[index] = new
        except ValueError as error:
            return type(error)
        assert type(holder.variable) is kind
        return holder.variable.get_value()

    expected = assigned(jnp.asarray(new))
    seen = []

    def traced(new):
        seen.append(assigned(new, quick=True))
        return seen[-1] if isinstance(seen[-1], jax.Array) else 0

    found = jax.jit(traced)(new)
    if isinstance(expected, jax.Array):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    else:
        assert seen == [expected]


def test_variables_get_their_class_back():
    model = Deep(1, nnx.Rngs(0))
    kinds = {path: type(x) for path, x in nnx.iter_graph(model) if isinstance(x, nnx.Variable)}
    with contextlib.suppress(ZeroDivisionError), quick_assignments(model):
        assert type(model.blocks[0].norm.mean) is not nnx.BatchStat
        raise ZeroDivisionError
    assert {path: type(x) for path, x in nnx.iter_graph(model) if isinstance(x, nnx.Variable)} == kinds
