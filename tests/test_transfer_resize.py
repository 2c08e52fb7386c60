"""Leaves of another size: interpolation that keeps what it claims to keep, units added and taken away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from varscale import transfer

RNG = np.random.default_rng(0)


def resized(own, old, method):
    new, account = transfer.graft({"x": np.asarray(own)}, {"x": np.asarray(old)}, resize=method)
    assert not account.mismatched, account.mismatched["x"].why
    return new["x"]


def test_a_grown_window_keeps_its_response_to_a_grown_patch():
    kernel, patch = RNG.standard_normal((4, 4, 3, 2)), RNG.standard_normal((4, 4, 3))
    grown = resized(np.zeros((8, 6, 3, 2)), kernel, transfer.Window("linear"))
    large = np.asarray(jax.image.resize(patch.astype(np.float32), (8, 6, 3), "linear"))
    np.testing.assert_allclose(np.einsum("hwi,hwio->o", large, grown), np.einsum("hwi,hwio->o", patch, kernel), rtol=1e-4)


def test_interpolated_values_are_those_of_jax_image():
    kernel = RNG.standard_normal((4, 4, 3, 2)).astype(np.float32)
    grown = resized(np.zeros((8, 6, 3, 2), np.float32), kernel, transfer.Window("cubic", preserve="values"))
    np.testing.assert_allclose(grown, jax.image.resize(kernel, (8, 6, 3, 2), "cubic"), atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1])
def test_position_tables_with_and_without_a_class_token(prefix):
    old = RNG.standard_normal((1, prefix + 9, 5)).astype(np.float32)
    method = transfer.Positions(grid=(3, 3), new_grid=(4, 2), prefix=prefix, method="linear")
    new = resized(np.zeros((1, prefix + 8, 5), np.float32), old, method)
    np.testing.assert_array_equal(new[:, :prefix], old[:, :prefix])
    expected = jax.image.resize(old[0, prefix:].reshape(3, 3, 5), (4, 2, 5), "linear").reshape(8, 5)
    np.testing.assert_allclose(new[0, prefix:], expected, atol=1e-5)
    longer = resized(np.zeros((20, 5), np.float32), old[0, prefix:], transfer.Positions())
    np.testing.assert_allclose(longer, jax.image.resize(old[0, prefix:], (20, 5), "cubic"), atol=1e-5)


SIZES = st.integers(1, 4)


@given(old=st.tuples(SIZES, SIZES), new=st.tuples(SIZES, SIZES))
def test_old_units_are_kept_in_front_and_new_ones_follow_the_law(old, new):
    weights, own = np.full(old, 7, np.float32), np.full(new, -1, np.float32)
    common = tuple(slice(min(a, b)) for a, b in zip(old, new, strict=True))
    for law, fill in ((None, -1), (jax.nn.initializers.constant(3.0), 3)):
        key = None if law is None else jax.random.key(0)
        found = resized(own, weights, transfer.Units(law, key))
        assert found.shape == new
        np.testing.assert_array_equal(found[common], 7)
        rest = np.ones(new, bool)
        rest[common] = False
        np.testing.assert_array_equal(found[rest], fill) if old != new else None


def test_new_units_are_drawn_by_path_and_again_alike():
    law = transfer.Units(jax.nn.initializers.normal(1.0), jax.random.key(0))
    params = {name: np.zeros((4, 4), np.float32) for name in "ab"}
    old = {name: np.zeros((2, 2), np.float32) for name in "ab"}
    first, account = transfer.graft(params, old, resize=law)
    again, second = transfer.graft(first, old, resize=law)
    assert second == account
    np.testing.assert_array_equal(first["a"], again["a"])
    assert not np.array_equal(first["a"], first["b"])
    assert account.moved["a"].why == "Units from 2×2"


def test_blocks_grow_each_at_its_end():
    packed = np.concatenate([np.full((2, 2), part, np.float32) for part in (1, 2, 3)], axis=1)
    new = resized(np.zeros((3, 9), np.float32), packed, transfer.Units(blocks={-1: 3}))
    np.testing.assert_array_equal(new[0], [1, 1, 0, 2, 2, 0, 3, 3, 0])
    np.testing.assert_array_equal(new[2], 0)


def test_a_wider_net_whose_new_units_are_read_with_zeros_computes_the_same():
    def net(params, x):
        return jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]

    old = {"a": {"kernel": jnp.ones((3, 4)) / 3}, "b": {"kernel": jnp.arange(8.0).reshape(4, 2)}}
    wide = {"a": {"kernel": jnp.zeros((3, 6))}, "b": {"kernel": jnp.zeros((6, 2))}}
    key = jax.random.key(0)
    rules = {
        "a": transfer.Units(jax.nn.initializers.he_normal(), key),
        "b": transfer.Units(jax.nn.initializers.zeros, key),
    }
    new, _ = transfer.graft(wide, old, resize=rules, strict=True)
    assert np.asarray(new["a"]["kernel"][:, 4:]).all(), "new units are drawn"
    np.testing.assert_allclose(net(new, jnp.ones((1, 3))), net(old, jnp.ones((1, 3))), rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "old", "own", "why"),
    [
        (transfer.Window(), (3, 3, 2, 2), (5, 5, 2, 3), "differ in others"),
        (transfer.Window(), (3, 2), (4, 2), "differ in others"),
        (transfer.Positions(), (1, 9, 4), (1, 16, 5), "differ in others"),
        (transfer.Positions(grid=(3, 3), new_grid=(4, 4), prefix=1), (9, 4), (17, 4), "are not grids"),
        (transfer.Positions(grid=(3, 3)), (9, 4), (16, 4), "as many axes"),
        (transfer.Units(), (2,), (2, 2), "not their number"),
        (transfer.Units(blocks={0: 3}), (4, 2), (6, 2), "do not divide"),
        (None, (4, 2), (6, 2), "does not fit"),
    ],
)
@pytest.mark.filterwarnings("ignore:graft moved nothing")
def test_what_cannot_be_resized_is_mismatched_and_says_why(method, old, own, why):
    _, account = transfer.graft({"x": np.zeros(own)}, {"x": np.ones(old)}, resize=method)
    assert why in account.mismatched["x"].why


def test_a_law_needs_a_key():
    with pytest.raises(ValueError, match="law is given without key"):
        transfer.Units(jax.nn.initializers.zeros)
