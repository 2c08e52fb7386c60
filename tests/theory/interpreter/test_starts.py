"""Reductions that start from a number of their own, and lookups by several indices, against draws and enumeration.

Error rates: 20000 rows of independent normals with a fixed key; second moments are asked for within the stated error bound and
four standard errors.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs

SEGMENTS = np.array([0, 0, 1, 2, 2, 2, 4, 4])


def of_normals(f, shape):
    """The row that is predicted of f of independent normals, and the mean square of f of drawn ones with its error."""
    row = vs.predict(lambda _, x: f(x), jax.ShapeDtypeStruct(shape, jnp.float32), params={}, backward=False).output
    squares = np.asarray(f(jax.random.normal(jax.random.key(0), shape))) ** 2
    rows = squares.reshape(-1, squares.shape[-1]).mean(axis=0)
    return row, rows.mean(), rows.std() / len(rows) ** 0.5


@pytest.mark.parametrize("start", [0.0, -0.5, 0.7])
@pytest.mark.parametrize("kind", ["max", "min"])
def test_extremes_by_segment_start_from_what_is_there(kind, start):
    """Without the start they are off by 11 to 28 %."""
    row, truth, error = of_normals(lambda x: getattr(jnp.full((6, 20_000), start).at[SEGMENTS], kind)(x), (8, 20_000))
    assert abs(row.second_moment / truth - 1) <= row.error_bound + 4 * error / truth
    assert row.second_moment == pytest.approx(truth, rel=0.03)


@pytest.mark.parametrize(
    ("combine", "start"), [(jax.lax.max, 0.5), (jax.lax.min, 0.5), (jax.lax.add, 1.0)], ids=["max", "min", "add"]
)
@pytest.mark.parametrize("padding", ["VALID", "SAME"])
def test_windows_start_from_what_is_there(combine, start, padding):
    """Without the start they are off by 20 to 50 %; it is there once, whatever is padded."""
    window = lambda x: jax.lax.reduce_window(x, start, combine, (2, 1), (2, 1), padding)  # noqa: E731
    row, truth, error = of_normals(window, (5, 20_000))
    assert abs(row.second_moment / truth - 1) <= row.error_bound + 4 * error / truth
    assert row.second_moment == pytest.approx(truth, rel=0.03)


def test_rows_of_several_indices_are_different_where_one_of_them_is():
    """Four independent rows have a mean of variance 1/4."""
    ids = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    init = lambda key: jax.random.normal(key, (2, 2, 16))  # noqa: E731
    row = vs.predict(
        lambda table, x: table[ids[:, 0], ids[:, 1]].mean(0) + 0 * x,
        jax.ShapeDtypeStruct((16,), jnp.float32),
        params=init,
        backward=False,
    ).output
    assert row.second_moment == pytest.approx(0.25)
