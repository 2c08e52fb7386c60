"""Tiles: leaves of all shapes share the program of their formula, and have the bits of the jitted init."""

import gc
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers as theirs

import varscale as vs
from varscale.initialization import formulas, tiles, tracing
from varscale.initialization.drawing import Drawing, compiled
from varscale.initialization.host_memory import reserved
from varscale.initialization.outline import outline
from varscale.initialization.tracing import trace

KEY = jax.random.key(4)


class Leaves(nn.Module):
    """Parameters of these laws and shapes, and a stack of them over three steps of a loop."""

    laws: tuple
    shapes: tuple = ((1, 1), (37, 53), (3, 3, 8, 15), (1500, 12))
    dtype: object = jnp.float32
    loop: bool = False

    @nn.compact
    def __call__(self, x=None, _=None):
        for i, law in enumerate(self.laws):
            for j, shape in enumerate(self.shapes):
                self.param(f"law{i}_{j}", law, shape, self.dtype)
        if self.loop:
            stack = nn.scan(Leaves, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            stack(self.laws, self.shapes[1:2], self.dtype, name="stack")(x, None)
        return x, None


def readings(model):
    plan = outline(trace(model, KEY, None, None), KEY)
    return [formulas.read(task.program) for task in plan.tasks if isinstance(task.program, Drawing)]


def check(model):
    jax.tree.map(np.testing.assert_array_equal, vs.initialize(model, KEY), jax.jit(model.init)(KEY))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: np.dtype(d).name)
def test_leaves_of_all_shapes_and_standard_deviations_share_a_program(dtype):
    if not tiles.serves():
        pytest.skip("tiles are for the CPU, and for counters of one number each")
    model = Leaves((theirs.he_normal(), theirs.variance_scaling(3.7, "fan_avg", "normal")), dtype=dtype, loop=True)
    found = readings(model)
    assert len(found) == 10
    # Below float32, XLA may round a product with a constant otherwise than one with an operand: factors stay in the formula.
    assert len({reading.formula for reading in found if reading is not None}) == (2 if dtype == jnp.float32 else 8)
    check(model)


@pytest.mark.parametrize("loop", [False, True])
def test_leaves_of_a_short_last_axis_are_compiled_for_their_shape(loop):
    """From jax 0.12 on, XLA rounds normal numbers of shape (900, 4) otherwise than those of shape (900, 9)."""
    laws = (theirs.he_normal(), theirs.truncated_normal(), vs.lecun_normal(), theirs.orthogonal())
    shapes = ((96, 4),) if loop else ((900, 4), (3, 3, 8, 5), (72, 1, 3))
    model = Leaves(laws, shapes=shapes, loop=loop)
    assert not any(readings(model))
    check(model)


def test_a_short_last_axis_made_of_a_long_one():
    """A layer that draws (72, 64), as its law sees it, and keeps (72, 16, 4)."""
    kernels = [lambda key, shape, dtype, draw=draw: draw(key, (72, 64), dtype).reshape(shape)
               for draw in (theirs.he_normal(), vs.he_normal())]  # fmt: skip
    model = Leaves(tuple(kernels), shapes=((72, 16, 4),))
    assert readings(model) == [None, None]
    check(model)


def law(f):
    return lambda key, shape, dtype: f(key, shape, dtype)


def test_laws_of_several_operations():
    def random(name, *arguments):
        return law(lambda key, shape, dtype: getattr(jax.random, name)(key, shape, dtype, *arguments))

    laws = (
        random("uniform", 1.0, 16.0),
        law(lambda key, shape, dtype: 1 + 0.3 * 0.7 * -jax.random.normal(key, shape, dtype) * 1.7),
        law(lambda key, shape, dtype: jax.random.normal(key, shape, dtype) / 7),
        law(lambda key, shape, dtype: jax.random.randint(key, shape, -5, 17).astype(dtype)),
    )
    model = Leaves(laws, shapes=((37, 53),))
    assert all(reading is not None for reading in readings(model))
    check(model)


def test_what_has_no_formula_is_drawn_by_a_program_of_its_own():
    def of_two_keys(key, shape, dtype):
        return jnp.where(jax.random.bernoulli(jax.random.split(key)[0], 0.3, shape), jax.random.normal(key, shape, dtype), 0)

    laws = (
        of_two_keys,
        law(lambda key, shape, dtype: jnp.log(jnp.expm1(jax.random.exponential(key, shape, dtype)))),
        law(jax.random.gumbel),
        law(lambda key, shape, dtype: jax.random.normal(key, shape, dtype) * np.linspace(0.1, 1, shape[-1], dtype=dtype)[None]),
        law(lambda key, shape, dtype: jax.random.normal(key, shape[::-1], dtype).T),
        law(lambda key, shape, dtype: jax.random.normal(key, shape, dtype) * jnp.arange(shape[-1], dtype=dtype)[None]),
        law(lambda key, shape, dtype: jnp.broadcast_to(jax.random.normal(key, shape[-1:], dtype)[None], shape)),
    )
    model = Leaves(laws, shapes=((31, 33),))
    assert not any(readings(model))
    check(model)


def test_leaves_that_xla_may_round_otherwise_are_named():
    """Logarithms are sums of products, of which a loop contracts one or the other; normal numbers are the same in every one."""
    model = Leaves((law(jax.random.gumbel), theirs.he_normal()), shapes=((31, 33),))

    def named(exact):
        _, account = vs.initialize(model, KEY, exact=exact, account=True)
        return [path for path, entry in account.entries.items() if any("last place" in note for note in entry.notes)]

    assert named(False) == ["params/law0_0"]
    assert named(True) == []


def test_calls_draw_into_the_memory_of_earlier_ones():
    if not tiles.serves():
        pytest.skip("tiles are for the CPU, and for counters of one number each")
    for dtype in (jnp.float32, jnp.bfloat16):
        model = Leaves((theirs.normal(),), shapes=((3000, 100),), dtype=dtype)
        (program,) = outline(trace(model, KEY, None, None), KEY).programs(KEY)
        words, offsets, factors, _ = (np.zeros(a.shape, a.dtype) for a in program.argument_shapes)
        first = compiled(program)(words, offsets, factors, np.empty(program.result.shape, program.result.dtype))
        place = first.unsafe_buffer_pointer()
        np.frombuffer(first, program.formula.dtype)  # a view that is gone does not keep the memory
        assert compiled(program)(words, offsets, factors, first).unsafe_buffer_pointer() == place


def test_many_small_draws_are_not_padded_to_tiles():
    assert tiles.fits(1000, 1)
    assert tiles.fits(10**6, 300)
    assert not tiles.fits(10**6, 16)


def test_caches_of_programs_keep_no_trace():
    graph = weakref.ref(graph_that_was_drawn())
    tracing._remembered.cache_clear()
    gc.collect()
    assert graph() is None


def graph_that_was_drawn():
    traced = trace(Leaves((theirs.he_normal(), theirs.orthogonal()), shapes=((6, 5),)), KEY, None, None)
    outline(traced, KEY).draw(KEY)
    return traced.graph


def test_arrays_of_the_host_are_taken_over_without_a_copy() -> None:
    """On pages of their own (from 2 MB on; not touched here) and on shared ones, whatever the dtype."""
    shapes = [(2**27, 2), (0, 3), (), (5,)]
    dtypes = [np.int8, np.float32, jnp.bfloat16, np.float64]
    arrays = [space.array for space in reserved(shapes, dtypes)]
    assert [(x.shape, x.dtype) for x in arrays] == [(s, np.dtype(d)) for s, d in zip(shapes, dtypes, strict=True)]
    assert all(x.flags.writeable and x.__array_interface__["data"][0] % 64 == 0 for x in arrays if x.size)
    large, small = arrays[0], reserved([(2**19 + 3,)], [np.float32])[0].array
    small[...] = 1
    for array in (large, small):
        assert jax.device_put(array).unsafe_buffer_pointer() == array.__array_interface__["data"][0]
