"""Functions of numbers and of averages of the same numbers: norms on norms, squashes, response normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import varscale as vs

NONE = {"w": jnp.zeros(1)}
FEW = 8


def output(f, shape=(64, FEW)):
    return vs.predict(lambda _, x: f(x), jax.ShapeDtypeStruct(shape, jnp.float32), params=NONE, backward=False).output


def squares(x):
    return jnp.sum(x**2, axis=-1, keepdims=True)


class NormedTwice(nn.Module):
    """What a norm puts out is normalised again, over the same features or after an activation; its input is narrow."""

    first: type
    second: type
    between: object = None

    @nn.compact
    def __call__(self, x):
        x = self.first()(nn.Dense(32)(x))
        return self.second()(x if self.between is None else self.between(x))


@pytest.mark.parametrize(
    ("first", "second", "between"),
    [(nn.LayerNorm, nn.LayerNorm, None), (nn.RMSNorm, nn.RMSNorm, None), (nn.RMSNorm, nn.RMSNorm, nn.gelu)],
    ids=["layer norms", "RMS norms", "gelu between"],
)
def test_a_norm_of_a_norm_has_unit_mean_square(first, second, between):
    """The scale of 12 features is gone behind the first norm, and the second's with it: were it handed on, 10 % too large."""
    row = vs.predict(NormedTwice(first, second, between), jax.ShapeDtypeStruct((16, 12), jnp.float32), backward=False).output
    assert row.second_moment == pytest.approx(1.0, abs=5e-3)
    assert row.typical == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda x: x * jnp.sqrt(squares(x)), FEW + 2),
        (lambda x: x / jnp.mean(jnp.abs(x), axis=-1, keepdims=True), 1.508),
    ],
    ids=["by its norm", "over its mean modulus"],
)
def test_a_vector_of_few_numbers_times_its_own_norm(f, expected):
    """Of n normals Σ x² and the direction are independent: E[x² Σ x²] = n + 2. The second was drawn, to .1 %."""
    row = output(f)
    assert abs(row.second_moment / expected - 1) <= row.error_bound
    assert row.how == "assumed"


@pytest.mark.parametrize("few", [4, 16])
def test_a_rectified_number_times_the_root_of_its_mean_square(few):
    """E[r² v] = E[v²] with v the mean of r² over n: 1/4 + (3/2 − 1/4)/n, whatever the law of v."""
    row = output(lambda x: nn.relu(x) * jnp.sqrt(jnp.mean(nn.relu(x) ** 2, axis=-1, keepdims=True)), (64, few))
    assert abs(row.second_moment / (0.25 + 1.25 / few) - 1) <= row.error_bound
    assert row.how == "assumed"


class Capsules(nn.Module):
    """Two rounds of routing by agreement: each capsule's votes are shared out over those above, and squashed."""

    @nn.compact
    def __call__(self, x):
        squash = lambda v: v * squares(v) / (1 + squares(v)) / jnp.sqrt(squares(v) + 1e-8)  # noqa: E731
        votes = nn.Dense(5 * 8)(x).reshape(*x.shape[:2], 5, 8)
        shares = nn.softmax(jnp.zeros(votes.shape[:3]), axis=2)
        above = squash(jnp.einsum("bij,bijd->bjd", shares, votes))
        shares = nn.softmax(jnp.einsum("bijd,bjd->bij", votes, above), axis=2)
        return squash(jnp.einsum("bij,bijd->bjd", shares, votes))


def test_routing_by_agreement_is_no_attention():
    """Shares of each capsule's votes, added up over capsules: within its error bound of 100 nets and four standard errors."""
    struct, model = jax.ShapeDtypeStruct((8, 12, 16), jnp.float32), Capsules()

    def one(key):
        x = jax.random.normal(key, struct.shape)
        return jnp.mean(model.apply(model.init(key, x), x) ** 2)

    row = vs.predict(model, struct, backward=False).output
    drawn = jax.lax.map(jax.jit(one), jax.random.split(jax.random.key(0), 100))
    error = float(drawn.std() / drawn.mean()) / 99**0.5
    assert error < 0.05, "the test has lost its power"
    assert abs(row.second_moment / float(drawn.mean()) - 1) <= row.error_bound + 4 * error
    assert row.error_bound < 1


@pytest.mark.parametrize(("few", "f"), [(4, lambda x: x), (8, lambda x: x), (8, nn.relu)], ids=["4", "8", "rectified"])
def test_an_outer_product_has_its_diagonal(few, f):
    """Of x_i x_j one in n is x_i²: a share 1/n has E[x⁴] = 3 in place of 1 (3/2 in place of 1/4, rectified); fixed draws."""
    row = output(lambda x: f(x)[:, :, None] * f(x)[:, None, :], (256, few))
    square, fourth = (0.25, 1.5) if f is nn.relu else (1.0, 3.0)
    assert abs(row.second_moment / (square + (fourth - square) / few) - 1) < row.error_bound < 0.2
