"""Drop-in: the same bits as jax.nn.initializers in float32 and float64, eager against eager and jitted against jitted."""

import json
import pathlib
import platform
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.nn import initializers as theirs

import varscale as vs
from varscale.initializers import sampling

# Few shapes: a rank-4 draw by jax's own hash takes seconds to compile.
SHAPES = [(3, 5), (1, 1), (160, 130), (2, 7, 9)]
MODES = ["fan_in", "fan_out", "fan_avg", "fan_geo_avg"]
LAWS = ["normal", "truncated_normal", "uniform"]


def assert_same_bits(ours, other, key, shape, dtype=jnp.float32):
    np.testing.assert_array_equal(ours(key, shape, dtype), other(key, shape, dtype))


def assert_same_bits_jitted(ours, other, key, shape, dtype=jnp.float32):
    def jitted(init):
        return jax.jit(init, static_argnums=(1, 2))(key, shape, jnp.dtype(dtype))

    np.testing.assert_array_equal(jitted(ours), jitted(other))


@st.composite
def scalings(draw):
    """A call of variance_scaling and a shape: axes of any sign and order, batch axes included."""
    shape = draw(st.sampled_from(SHAPES))
    axes = draw(st.permutations(range(len(shape))))
    signed = [axis - len(shape) * draw(st.booleans()) for axis in axes]
    roles = {"in_axis": signed[0], "out_axis": signed[1]}
    if len(shape) > 2 and draw(st.booleans()):
        roles["batch_axis"] = (signed[2],)
    return shape, {
        "scale": draw(st.sampled_from([1.0, 2.0, 1 / 3, 1.7])),
        "mode": draw(st.sampled_from(MODES)),
        "distribution": draw(st.sampled_from(LAWS)),
        **roles,
    }


@pytest.mark.parametrize("same", [assert_same_bits, assert_same_bits_jitted])
def test_short_last_axes(same):
    """From jax 0.12 on, XLA's CPU compiler rounds normal numbers of shape (900, 4) otherwise than those of shape (3600,)."""
    same(vs.he_normal(), theirs.he_normal(), jax.random.key(1), (900, 4))
    same(vs.lecun_normal(), theirs.lecun_normal(), jax.random.key(2), (500, 3))


@given(scalings(), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_variance_scaling_eager(case, seed):
    shape, arguments = case
    assert_same_bits(vs.variance_scaling(**arguments), theirs.variance_scaling(**arguments), jax.random.key(seed), shape)


@given(scalings())
@settings(max_examples=6)
def test_variance_scaling_jitted(case):
    shape, arguments = case
    assert_same_bits_jitted(vs.variance_scaling(**arguments), theirs.variance_scaling(**arguments), jax.random.key(3), shape)


@pytest.mark.parametrize("law", LAWS)
def test_variance_scaling_in_float64(law):
    with jax.enable_x64(True):
        for check in (assert_same_bits, assert_same_bits_jitted):
            ours, other = (v(2.0, "fan_avg", law) for v in (vs.variance_scaling, theirs.variance_scaling))
            check(ours, other, jax.random.key(5), (40, 30), jnp.float64)


PRESETS = ["he_normal", "he_uniform", "glorot_normal", "glorot_uniform", "lecun_normal", "lecun_uniform"]


@pytest.mark.parametrize("name", [*PRESETS, "kaiming_normal", "xavier_uniform", "normal", "orthogonal"])
def test_presets_by_name(name, key):
    assert_same_bits(getattr(vs, name)(), getattr(theirs, name)(), key, (160, 130))


@pytest.mark.parametrize("column_axis", [-1, 0, 1])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (3, 4, 5)])
def test_orthogonal(shape, column_axis, key):
    assert_same_bits(vs.orthogonal(2.0, column_axis), theirs.orthogonal(2.0, column_axis), key, shape)


@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 4, 4, 6), (2, 3, 4, 4, 6)])
def test_delta_orthogonal(shape, key):
    assert_same_bits(vs.delta_orthogonal(1.5), theirs.delta_orthogonal(1.5), key, shape)


def test_constants(key):
    for ours, other in ((vs.zeros, theirs.zeros), (vs.ones, theirs.ones), (vs.constant(0.3), theirs.constant(0.3))):
        for dtype in (jnp.float32, jnp.bfloat16, jnp.int32):
            assert_same_bits(ours, other, key, (3, 4), dtype)


def test_either_counter_scheme(key):
    with jax.threefry_partitionable(False):
        for check in (assert_same_bits, assert_same_bits_jitted):
            check(vs.he_normal(), theirs.he_normal(), key, (161, 130))


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_other_generators(implementation):
    assert_same_bits(vs.he_normal(), theirs.he_normal(), jax.random.key(1, impl=implementation), (160, 130))


def test_raw_keys():
    assert_same_bits(vs.he_normal(), theirs.he_normal(), jax.random.PRNGKey(1), (160, 130))


def test_embedding_idiom_of_flax(key):
    """in_axis −2 and out_axis 0 share the first of two axes; the number that comes out is 1/features, as always."""
    arguments = {"scale": 1.0, "mode": "fan_in", "distribution": "normal", "out_axis": 0}
    assert_same_bits(vs.variance_scaling(**arguments), theirs.variance_scaling(**arguments), key, (160, 130))
    assert vs.compute_fans((160, 130), -2, 0) == vs.Fans(130, 130)


@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_bits_of_every_width(width):
    with jax.enable_x64(True):
        dtype = np.dtype(f"uint{width}")
        key = jax.random.key(11)
        for shape in ((), (1,), (5, 7, 3)):
            expected = jax.random.bits(key, shape, dtype)
            np.testing.assert_array_equal(sampling.drawn(jax.random.bits, key, shape, dtype), expected)


def test_known_answers_of_the_hash():
    """Threefry-2x32, 20 rounds: the three vectors that Random123 publishes with the generator."""
    for key, counter, expected in (
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ):
        words = jnp.array(key, jnp.uint32), *(jnp.array([word], jnp.uint32) for word in counter)
        assert tuple(int(word[0]) for word in sampling.threefry_2x32(*words)) == expected


def test_derived_keys_are_jaxs(key):
    """Splitting and folding the unrolled key gives jax's own keys, so that composite draws agree as well."""
    unrolled = sampling.unrolled_key(key)
    for derive in (lambda key: jax.random.split(key, 3), lambda key: jax.random.fold_in(key, 9)):
        np.testing.assert_array_equal(jax.random.key_data(derive(unrolled)), jax.random.key_data(derive(key)))


GOLDEN = pathlib.Path(__file__).parent / "golden_bits.json"
DTYPES = ("float32", "float64", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128")
FROZEN = {law: vs.variance_scaling(2.0, "fan_avg", law) for law in (*LAWS, "rademacher")}
# The rest is made of the same laws: one wide and one narrow dtype each.
FROZEN_MAKERS = {
    "vs.normal": vs.normal(0.5),
    "vs.truncated_normal": vs.truncated_normal(0.5),
    "vs.truncated_normal cut at 3": vs.truncated_normal(0.5, None, -3.0, 3.0),
    "vs.symmetric_uniform": vs.symmetric_uniform(0.5),
    "vs.cut_normal": vs.cut_normal(0.5, 0.6),
    "vs.sparse": vs.sparse(0.5),
    "vs.fused": vs.fused(vs.lecun_normal(), 2),
    "vs.scaled": vs.scaled(vs.he_uniform(), 0.3),
    "vs.embedding": vs.embedding(),
    "vs.siren_first": vs.siren_first(),
}


def hashes_of_the_bits():
    """CRC-32 of the bytes of (24, 16) weights of every law and maker by dtype, drawn eagerly from key 7."""
    cases = [(name, init, dtype) for name, init in FROZEN.items() for dtype in DTYPES]
    cases += [(name, init, dtype) for name, init in FROZEN_MAKERS.items() for dtype in ("float32", "bfloat16")]
    with jax.enable_x64(True):
        weights = {f"{name} {dtype}": init(jax.random.key(7), (24, 16), jnp.dtype(dtype)) for name, init, dtype in cases}
    return {case: f"{zlib.crc32(np.asarray(w).tobytes()):08x}" for case, w in weights.items()}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors round the last place their own way")
def test_the_bits_are_frozen():
    """golden_bits.json: hashes by the version of jax from which on they hold; a later version names those that it changed."""
    expected = {}
    for version, hashes in json.loads(GOLDEN.read_text()).items():
        if jax.__version_info__ >= tuple(map(int, version.split("."))):
            expected |= hashes
    assert hashes_of_the_bits() == expected
