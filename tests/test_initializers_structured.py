"""Structure, checked as structure: orthonormality, what a convolution of it does, exact counts, blocks, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import varscale as vs


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 3, 6), (1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_orthogonal_is_orthonormal(shape, dtype, key):
    w = np.asarray(vs.orthogonal(2.0)(key, shape, dtype)).reshape(-1, shape[-1])
    gram = w.conj().T @ w if w.shape[0] >= w.shape[1] else w @ w.conj().T
    np.testing.assert_allclose(gram, 4 * np.eye(len(gram)), atol=1e-5)


def test_orthogonal_is_haar():
    """Entries of Haar matrices: w² ~ Beta(½, (n−1)/2), and multiplying by a fixed rotation changes no law.

    Kolmogorov-Smirnov on one entry a matrix, 2000 matrices, with and without rotation and sign: false alarms at 1e-6 a test
    (keys are fixed, so there are none); a QR without the sign correction is caught with certainty, as its corner's sign is.
    """
    n = 4
    w = np.asarray(jax.vmap(lambda key: vs.orthogonal()(key, (n, n)))(jax.random.split(jax.random.key(1), 2000)), np.float64)
    turned = w @ scipy.stats.ortho_group.rvs(n, random_state=0)
    for matrices in (w, turned):
        for i, j in ((0, 0), (0, 3), (3, 0), (2, 1)):
            entry = matrices[:, i, j]
            assert scipy.stats.kstest(entry**2, scipy.stats.beta(0.5, (n - 1) / 2).cdf).pvalue > 1e-6
            assert scipy.stats.binomtest(int((entry > 0).sum()), 2000).pvalue > 1e-6


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("init", [vs.delta_orthogonal(), vs.dirac()])
def test_norms_survive_a_convolution(rank, init, key):
    kernel = init(key, (*(3,) * rank, 4, 6))
    x = jax.random.normal(key, (2, *(5,) * rank, 4))
    letters = "HWD"[:rank]
    y = jax.lax.conv_general_dilated(
        x, kernel, (1,) * rank, "SAME", dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C")
    )
    np.testing.assert_allclose((y**2).sum(), (x**2).sum(), rtol=1e-5)
    if init == vs.dirac():
        np.testing.assert_allclose(y[..., :4], x, rtol=1e-6)


@pytest.mark.parametrize("window", [2, 3, 4])
def test_dirac_passes_through_group_by_group(window, key):
    kernel = vs.dirac(2)(key, (window, 3, 6))
    x = jax.random.normal(key, (1, 5, 6))
    y = jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=2)
    np.testing.assert_array_equal(y, x)


def test_identity_of_rectangles(key):
    np.testing.assert_array_equal(vs.identity(2.0)(key, (3, 5)), 2 * np.eye(3, 5))


@pytest.mark.parametrize(("sparsity", "zeros"), [(0.0, 0), (0.5, 10), (0.9, 18), (0.91, 19)])
def test_sparse_counts(sparsity, zeros, key):
    w = vs.sparse(sparsity, 0.3)(key, (4, 5, 7))
    np.testing.assert_array_equal((w == 0).sum((0, 1)), zeros)
    assert len({tuple(np.flatnonzero(column)) for column in np.asarray(w).reshape(20, 7).T}) > (zeros > 0)


def test_fused_blocks_have_their_own_fans(key):
    packed = vs.fused(vs.orthogonal(), (4, 4, 8))(key, (16, 16))
    for block in (packed[:, :4], packed[:, 4:8], packed[:, 8:]):
        np.testing.assert_allclose(block.T @ block, np.eye(block.shape[1]), atol=1e-5)
    assert not jnp.allclose(packed[:, :4], packed[:, 4:8])
    grouped = vs.fused(vs.glorot_uniform(), 3, axis=0)(key, (300, 100))
    # Uniform of variance 2/(100+100): the bound is exact, and is not the fused array's.
    assert 0.99 < float(jnp.abs(grouped).max()) / np.sqrt(3 * 2 / 200) <= 1


def test_masked_and_scaled(key):
    mask = np.tri(6, 5) > 0
    whole = vs.he_normal()(key, (6, 5))
    np.testing.assert_array_equal(vs.masked(vs.he_normal(), mask)(key, (6, 5)), np.where(mask, whole, 0))
    np.testing.assert_array_equal(vs.scaled(vs.he_normal(), -0.5)(key, (6, 5)), -0.5 * whole)
    # bfloat16 is rounded once, after the factor.
    third = vs.scaled(vs.he_normal(), 1 / 3)(key, (6, 5), jnp.bfloat16)
    np.testing.assert_array_equal(third, (whole * jnp.float32(1 / 3)).astype(jnp.bfloat16))


def test_conventions(key):
    assert vs.pytorch_linear() == vs.kaiming_uniform(negative_slope=5**0.5)
    kernel = vs.pytorch_linear()(key, (400, 300))
    assert 0.999 < float(jnp.abs(kernel).max()) * 400**0.5 <= 1 + 1e-6
    assert vs.pytorch_bias(400) == vs.symmetric_uniform(0.05)
    np.testing.assert_array_equal(vs.lstm_bias(2.0, "fi")(key, (4,)), [2, 2, 0, 0])
    head = vs.log_prior_bias((0.2, 0.8))(key, (2,))
    np.testing.assert_allclose(jax.nn.softmax(head), [0.2, 0.8], rtol=1e-6)
    assert float(jax.nn.sigmoid(vs.log_prior_bias(0.01)(key, ()))) == pytest.approx(0.01)
    assert vs.siren(30.0).variance((64, 64)) == pytest.approx(6 / 64 / 900 / 3)
    assert 0.99 < float(jnp.abs(vs.siren_first()(key, (50, 400))).max()) * 50 <= 1
    assert vs.embedding(0.02**2).variance((50257, 768)) == pytest.approx(0.02**2)
    # ViT's default is a plain normal, cut a hundred standard deviations out; where the cut bites the law says so.
    assert vs.cut_normal().variance() == pytest.approx(0.02**2)
    assert vs.cut_normal(1.0, 2.0).variance() == pytest.approx(0.87962566103423978**2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda key: vs.orthogonal(0.0), ValueError, "scale"),
        (lambda key: vs.orthogonal(1.0, 1.5), TypeError, "column_axis"),
        (lambda key: vs.orthogonal()(key, (3,)), ValueError, "two axes"),
        (lambda key: vs.orthogonal(1.0, 2)(key, (3, 4)), ValueError, "column_axis"),
        (lambda key: vs.delta_orthogonal()(key, (3, 3, 5, 4)), ValueError, "outputs"),
        (lambda key: vs.delta_orthogonal()(key, (5, 4)), ValueError, "spatial"),
        (lambda key: vs.identity()(key, (3, 3, 3)), ValueError, "dirac"),
        (lambda key: vs.dirac(0), ValueError, "groups"),
        (lambda key: vs.dirac(3)(key, (3, 2, 4)), ValueError, "groups"),
        (lambda key: vs.sparse(1.0), ValueError, "sparsity"),
        (lambda key: vs.sparse(0.5, -1), ValueError, "stddev"),
        (lambda key: vs.normal(0.0), ValueError, "stddev"),
        (lambda key: vs.normal(float("inf")), ValueError, "stddev"),
        (lambda key: vs.symmetric_uniform(-1), ValueError, "bound"),
        (lambda key: vs.normal(1e5)(key, (2, 2), jnp.float16), ValueError, "float16"),
        (lambda key: vs.constant("one"), TypeError, "value"),
        (lambda key: vs.constant((1.0, 2.0))(key, (3,)), ValueError, "broadcast"),
        (lambda key: vs.constant(1j)(key, (3,)), TypeError, "complex"),
        (lambda key: vs.fused(3, 2), TypeError, "init"),
        (lambda key: vs.fused(vs.he_normal(), 0), ValueError, "blocks"),
        (lambda key: vs.fused(vs.he_normal(), ()), ValueError, "blocks"),
        (lambda key: vs.fused(vs.he_normal(), 2.5), TypeError, "blocks"),
        (lambda key: vs.fused(vs.he_normal(), 3)(key, (4, 8)), ValueError, "divide"),
        (lambda key: vs.fused(vs.he_normal(), (3, 4))(key, (4, 8)), ValueError, "add up"),
        (lambda key: vs.fused(vs.he_normal(), 2, axis=2)(key, (4, 8)), ValueError, "axis"),
        (lambda key: vs.scaled(vs.he_normal(), float("nan")), ValueError, "factor"),
        (lambda key: vs.masked(vs.he_normal(), [[2]]), TypeError, "mask"),
        (lambda key: vs.masked(vs.he_normal(), [[True], [True, False]]), ValueError, "mask"),
        (lambda key: vs.masked(vs.he_normal(), [True] * 3)(key, (4, 4)), ValueError, "mask"),
        (lambda key: vs.lstm_bias(gates="igo"), ValueError, "gates"),
        (lambda key: vs.lstm_bias()(key, (6,)), ValueError, "shape"),
        (lambda key: vs.log_prior_bias(1.0), ValueError, "prior"),
        (lambda key: vs.log_prior_bias((0.5, 0.6)), ValueError, "sum to 1"),
        (lambda key: vs.siren(0.0), ValueError, "omega"),
        (lambda key: vs.variance_scaling(0.0), ValueError, "scale"),
        (lambda key: vs.variance_scaling(float("nan")), ValueError, "scale"),
        (lambda key: vs.variance_scaling("1"), TypeError, "scale"),
        (lambda key: vs.variance_scaling(mode="fan"), ValueError, "mode"),
        (lambda key: vs.variance_scaling(distribution="gauss"), ValueError, "distribution"),
        (lambda key: vs.variance_scaling(fans=(1, 2)), TypeError, "fans"),
        (lambda key: vs.variance_scaling(fans=vs.Fans(0, 1)), ValueError, "fans"),
        (lambda key: vs.variance_scaling(dtype="int8"), TypeError, "dtype"),
        (lambda key: vs.he_normal()(key, (3, 4), "float99"), TypeError, "dtype"),
        (lambda key: vs.he_normal(negative_slope=float("inf")), ValueError, "negative_slope"),
        (lambda key: vs.he_normal()(key, (4, 4), None, jax.sharding.PartitionSpec("x")), ValueError, "out_sharding"),
        (lambda key: jax.jit(lambda s: vs.variance_scaling(s))(1.0), TypeError, "concrete"),
    ],
)
def test_bad_input(call, error, words, key):
    with pytest.raises(error, match=words):
        call(key)
