"""An array read at two places of one axis: x_i − x_j over all i and j, of which some coincide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs

WIDTH = 16


def predicted(f, places):
    """The row of f(x) for x (samples, places, units) of independent standard normals."""
    x = jax.ShapeDtypeStruct((4, places, WIDTH), jnp.float32)
    return vs.predict(lambda _, x: f(x), x, params={}, backward=False).output


@pytest.mark.parametrize("places", [4, 16])
@pytest.mark.parametrize(
    ("f", "apart", "together"),
    [
        (jnp.square, 12.0, 0.0),  # E[d⁴] of d = x_i − x_j with variance 2; d = 0 where i = j
        (lambda d: jnp.exp(0.5 * d), np.exp(1.0), 1.0),
        (jax.nn.relu, 1.0, 0.0),
    ],
)
def test_functions_of_differences(places, f, apart, together):
    """E[f(x_i − x_j)²] is that of a difference n − 1 times in n, and f(0)² once; fixed draws, within the bound of so many."""
    row = predicted(lambda x: f(x[:, :, None] - x[:, None]), places)
    assert row.how == "sampled"
    assert abs(row.second_moment * places / (apart * (places - 1) + together) - 1) < row.error_bound < 0.2


@pytest.mark.parametrize("places", [4, 16])
def test_distances_lie_within_their_bound(places):
    """Σ_u (x_iu − x_ju)² is 0 for all units at once where i = j: E[d²] = (4 · 16² + 8 · 16)(1 − 1/n)."""
    row = predicted(lambda x: jnp.sum((x[:, :, None] - x[:, None]) ** 2, axis=-1), places)
    right = (4 * WIDTH**2 + 8 * WIDTH) * (1 - 1 / places)
    assert abs(row.second_moment / right - 1) < row.error_bound < 0.5


def test_places_keep_their_classes():
    """Running sums t_i of −1 − x/10: E[exp(t_i − t_j)²] = e^{2(j − i) + |i − j|/50}, and no more where j ≥ i is masked."""
    places, steps = 4, np.subtract.outer(np.arange(4), np.arange(4))

    def differences(x):
        total = jnp.cumsum(-1 - 0.1 * x, axis=1)
        return total[:, :, None] - total[:, None]

    right = np.exp(-2 * steps + np.abs(steps) / 50)
    seen = (steps >= 0)[None, :, :, None]
    for mask, kept in ((np.ones_like(seen), 1), (seen, steps >= 0)):
        row = predicted(lambda x, mask=mask: jnp.exp(jnp.where(mask, differences(x), -jnp.inf)), places)
        assert abs(row.second_moment / np.mean(right * kept) - 1) < row.error_bound < 0.2
