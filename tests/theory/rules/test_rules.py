"""Rules alone: tables of small arrays against enumeration of every index pair, and rules against high-replicate sampling."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

import varscale as vs
from varscale.theory import Moments, predict
from varscale.theory.domain.axes import Axis, average, labelled
from varscale.theory.domain.axis_maps import split_axis
from varscale.theory.domain.tables import estimate, gaussian, independent
from varscale.theory.graph.convolutions import Window, hits, output_axis, tap_pairs
from varscale.theory.integrals.primitives import FUNCTIONS as FUNCTION_TABLE
from varscale.theory.integrals.softmax import weight_moments
from varscale.theory.rules.lookup import repeat_rates


@given(st.lists(st.integers(0, 2), min_size=2, max_size=6), st.lists(st.integers(0, 1), min_size=2, max_size=5))
def test_estimate_enumerates_every_pair(rows, columns):
    axes = (labelled(rows), labelled(columns))
    x = np.random.default_rng(0).standard_normal((len(rows), len(columns)))
    table = estimate(x, axes)
    sums, counts = np.zeros_like(table.second), np.zeros_like(table.second)
    for i, j in itertools.product(np.ndindex(x.shape), repeat=2):
        place = tuple(
            a.label_array[p] if p == q else a.classes + a.label_array[p] * a.classes + a.label_array[q]
            for a, p, q in zip(axes, i, j, strict=True)
        )
        sums[place] += x[i] * x[j]
        counts[place] += 1
    seen = counts > 0
    np.testing.assert_allclose(table.second[seen], sums[seen] / counts[seen], atol=1e-12)
    assert table.mean_square == pytest.approx(np.mean(x**2))
    assert average(table.second, axes, free=(0, 1)) == pytest.approx(np.mean(x) ** 2, abs=1e-12)


def test_gaussian_draws_and_estimates_invert_each_other():
    """40000 replicates of entries of at most 13: standard errors below .06, atol is four; a wrong inversion is off by 1."""
    axes = (labelled([0, 0, 1]), Axis(4))
    rng = np.random.default_rng(0)
    both, rows, columns = (rng.standard_normal((*shape, 500)) for shape in ((3, 4), (3, 1), (1, 4)))
    shared = rng.standard_normal(500)
    made = (both + rows + shared) * np.array([1.0, 1.0, 2.0])[:, None, None] + columns
    truth = np.mean([estimate(x, axes).second for x in np.moveaxis(made, -1, 0)], axis=0)
    # Any average of outer products is a covariance, and so is what is left when its classes are pooled.
    x = gaussian(truth, axes, [np.arange(3), np.arange(4)], 40_000, np.random.default_rng(1))
    found = estimate(x, [Axis(len(x)), *axes]).second[0]
    np.testing.assert_allclose(found, truth, atol=0.25)


def test_gaussian_draws_keep_variances_where_moments_by_type_are_those_of_no_array():
    """Averages over merged places: correlations of -.5 among six of a class. 24000 entries: 4 standard errors are 4 %."""
    axis = labelled([0, 0, 0, 0, 0, 0, 1, 1])
    # The same place of either class, then different ones of the classes i, j.
    second = np.array([2.0, 0.5, -1.0, 0.3, 0.3, 0.4])
    x = gaussian(second, (axis,), [np.arange(8)], 4000, np.random.default_rng(0))
    squares = np.square(x).mean(axis=0)
    np.testing.assert_allclose([squares[:6].mean(), squares[6:].mean()], [2.0, 0.5], rtol=0.04)


@given(st.integers(2, 4), st.integers(2, 4))
def test_splitting_an_axis_agrees_only_where_both_factors_do(a, b):
    factors, _, types, _ = split_axis(Axis(a * b), (a, b))
    assert [f.size for f in factors] == [a, b]
    np.testing.assert_array_equal(types, [[0, 1], [1, 1]])


@given(
    size=st.integers(3, 9),
    taps=st.integers(1, 4),
    stride=st.integers(1, 3),
    low=st.integers(0, 2),
    dilation=st.integers(1, 2),
    input_dilation=st.integers(1, 2),
)
def test_tap_pairs_count_what_enumeration_counts(size, taps, stride, low, dilation, input_dilation):
    window = Window(4, taps, stride, low, input_dilation, dilation)
    axis = Axis(size)
    out = output_axis(window, axis)
    same, other = tap_pairs(window, axis, out)
    at = hits(window, size)
    expected = np.zeros((2, out.types, axis.types))
    for p, q in itertools.product(range(4), repeat=2):
        row = out.label_array[p] if p == q else out.classes + out.label_array[p] * out.classes + out.label_array[q]
        for s, t in itertools.product(range(taps), repeat=2):
            if at[p, s] >= 0 and at[q, t] >= 0:
                expected[int(s != t), row, int(at[p, s] != at[q, t])] += 1
    pairs = np.maximum(out.pairs, 1)[:, None]
    np.testing.assert_allclose(same, expected[0] / pairs)
    np.testing.assert_allclose(other, expected[1] / pairs)


def test_repeat_rates_enumerate():
    ids = np.array([[0, 1, 1], [0, 0, 2]])
    rates = repeat_rates(ids, [Axis(2), Axis(3)])
    assert rates[0, 0] == 1
    assert rates[0, 1] == pytest.approx(4 / 12)
    assert rates[1, 0] == pytest.approx(2 / 6)
    assert rates[1, 1] == pytest.approx(2 / 12)


@pytest.mark.parametrize(("n", "variance"), [(2, 1.0), (16, 1.0), (256, 4.0)])
def test_softmax_moments_against_sampling(n, variance):
    """200000 rows: relative standard error below 1 %; e^{s²}/n would be off by 3x at n = 256, s = 2."""
    logits = np.random.default_rng(0).standard_normal((200_000 // n * 16, n)) * np.sqrt(variance)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    found = weight_moments(np.array([float(n)]), np.array([variance]))
    assert found.first[0] == pytest.approx(1 / n, rel=1e-3)
    assert found.square[0] == pytest.approx(np.mean(p**2), rel=0.03)
    assert found.pull == pytest.approx(np.mean(np.sum(p * logits, 1) ** 2), rel=0.03)


FUNCTIONS = {
    "exp": lambda x: jnp.exp(x / 2),
    "gelu": jax.nn.gelu,
    "square": jnp.square,
    "sum": lambda x: x.sum(1),
    "mean of relu": lambda x: jax.nn.relu(x).mean((0, 1)),
    "max": lambda x: x.max(-1),
    "concatenate": lambda x: jnp.concatenate([x, 2 * x[:, :2]], 1),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 2))),
    "slice": lambda x: x[:, 1:3] - x[:, :2],
    "transpose": lambda x: jnp.tanh(x).T @ jnp.ones((4, 3)),
    "reshape": lambda x: x.reshape(2, 2, 6).mean(1),
    "softmax": jax.nn.softmax,
    "logistic gate": lambda x: x * jax.nn.sigmoid(x.mean(0, keepdims=True)),
    "clip": lambda x: jnp.clip(x, -1, 0.5),
    "where": lambda x: jnp.where(x > 0.3, x, -1.0),
    "cumulative": lambda x: jnp.cumsum(x, axis=1),
    "sort": lambda x: jnp.sort(x, axis=1),
    "layer norm": lambda x: (x - x.mean(1, keepdims=True)) / jnp.sqrt(x.var(1, keepdims=True)),
    "stack": lambda x: jnp.stack([x, jnp.tanh(x)], axis=1),
    "tile": lambda x: jnp.tile(x, (2, 1)),
    "split": lambda x: jnp.split(x, 3, axis=1)[1],
    "rev": lambda x: x[:, ::-1] + x,
    "squeeze": lambda x: x[:1].squeeze(0),
    "dynamic slice": lambda x: jax.lax.dynamic_slice(x, (1, 2), (2, 3)),
    "gather": lambda x: jnp.take(x, jnp.array([0, 0, 3, 5]), axis=1).sum(1),
    "scatter-add": lambda x: jnp.zeros((4, 3)).at[:, jnp.array([0, 0, 1, 2, 2, 2])].add(x),
    "segment sum": lambda x: jax.ops.segment_sum(x, jnp.array([0, 1, 1, 1]), 2),
    "products": lambda x: jnp.einsum("ij,kj->ik", x, jnp.cos(jnp.arange(18.0).reshape(3, 6))),
    "convolution": lambda x: jax.lax.conv_general_dilated(x[None], jnp.ones((2, 4, 3)), (1,), "SAME"),
    "window sum": lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2), (1, 2), "VALID"),
    "window max": lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3), (1, 1), "VALID"),
    "min": lambda x: x.min(0),
    "loop": lambda x: jax.lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y) + x, x),
    "scan": lambda x: jax.lax.scan(lambda c, row: (jnp.tanh(c + row), c), jnp.zeros(6), x)[0],
    "branch": lambda x: jax.lax.cond(True, lambda y: 2 * y, lambda y: y, x),
    "checkpoint": jax.checkpoint(lambda x: jnp.sin(x) * 2),
    "custom rule": jax.nn.relu,
    "triangle": lambda x: jnp.where(jnp.tri(4, 6) > 0, x, 0.0).sum(1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rules_against_sampling(name):
    """20000 draws of a 4 x 6 array of N(.3, 1): relative standard errors below 3 %."""
    f = FUNCTIONS[name]
    row = predict(lambda params, x: f(x), Moments(0.3, 1.09, (4, 6)), params={"w": jnp.ones(1)}, backward=False).output
    x = 0.3 + jax.random.normal(jax.random.key(0), (20_000, 4, 6))
    y = np.asarray(jax.jit(jax.vmap(f))(x), float)
    limit = 0.05 + (row.error_bound if row.how in ("sampled", "assumed") or "norm" in name or name == "mean of relu" else 0)
    assert row.second_moment == pytest.approx(np.mean(y**2), rel=limit)
    assert row.shape == y.shape[1:]


# Where each elementwise primitive is tried: the mean and standard deviation of its arguments, inside its domain.
ANYWHERE, SMALL, POSITIVE = (0.3, 1.0), (0.1, 0.2), (3.0, 0.2)
UNARY = dict.fromkeys(["abs", "asinh", "atan", "cbrt", "ceil", "cos", "cosh", "erf", "erfc", "exp", "exp2"], ANYWHERE)
UNARY |= dict.fromkeys(
    ["expm1", "floor", "is_finite", "logistic", "neg", "round", "sign", "sin", "sinh", "square", "tanh"], ANYWHERE
)
UNARY |= dict.fromkeys(["acos", "asin", "atanh", "erf_inv", "log1p", "tan"], SMALL)
UNARY |= dict.fromkeys(["acosh", "digamma", "lgamma", "log", "rsqrt", "sqrt"], POSITIVE)
BINARY = dict.fromkeys(["add", "atan2", "ge", "gt", "le", "lt", "max", "min", "mul", "sub"], ANYWHERE)
BINARY |= dict.fromkeys(["div", "eq", "ne", "nextafter", "pow", "rem"], POSITIVE)
# With static parameters, of three arguments, and on the bits of integers (that is how weights are drawn: every initializer
# whose law is read from the model's own init goes through them). `add_any` is what derivatives call `add`.
OWN = {"add_any", "affine", "clamp", "convert", "integer_pow", "own_gradient", "power", "select_n", "stop_gradient"}
ELSEWHERE = {*OWN, "largest", "row"}  # the latter two: gradients of extremes, test_pooling.py, and of copies, test_rows.py
ON_BITS = {"and", "bitcast", "not", "or", "shift_left", "shift_right_logical", "shift_right_arithmetic", "xor"}


def quantiles(law, n):
    """n equally likely points of a normal: the rule they make is off by about 1/n, and by 5/n for its square."""
    return law[0] + law[1] * special.ndtri((np.arange(n) + 0.5) / n)


def test_every_elementwise_primitive_is_tried():
    own = {name for name in FUNCTION_TABLE if name != "hypot" and not name.startswith(("real ", "imaginary "))}
    assert own == {*UNARY, *BINARY, *ELSEWHERE, *ON_BITS}  # those of complex numbers: test_sequences.py


@pytest.mark.parametrize("name", UNARY)
def test_unary_primitives_against_exact_integrals(name):
    """Mean and second moment within 1 % of jax's own primitive averaged over 100000 quantiles."""
    law = UNARY[name]
    f = getattr(jax.lax, name)
    given = Moments(law[0], law[0] ** 2 + law[1] ** 2, (8,))
    row = predict(lambda params, x: f(x).astype(jnp.float32), given, params={}, backward=False).output
    y = np.asarray(f(jnp.asarray(quantiles(law, 100_000), jnp.float32)), float)
    assert row.second_moment == pytest.approx(np.mean(y**2), rel=0.01)
    assert row.mean == pytest.approx(np.mean(y), rel=0.01, abs=0.005 * np.sqrt(np.mean(y**2)))


@pytest.mark.parametrize("name", BINARY)
def test_binary_primitives_against_exact_integrals(name):
    """Likewise on a grid of 600 x 600 quantiles of two independent arguments."""
    law = BINARY[name]
    f = getattr(jax.lax, name)
    given = Moments(law[0], law[0] ** 2 + law[1] ** 2, (8,))
    row = predict(lambda params, x, y: f(x, y).astype(jnp.float32), vs.inputs(given, given), params={}, backward=False).output
    x = jnp.asarray(quantiles(law, 600), jnp.float32)
    both = np.asarray(f(*jnp.broadcast_arrays(x[:, None], x[None])), float)
    expected = {"eq": 0.0, "ne": 1.0}.get(name, np.mean(both**2))  # the grid's diagonal is no event
    assert row.second_moment == pytest.approx(expected, rel=0.01, abs=1e-3)


def test_independent_tables_have_no_covariance():
    table = independent(0.5, 1.0, (Axis(3), labelled([0, 0, 1])))
    assert table.variance == pytest.approx(0.75)
    np.testing.assert_allclose(table.second[1], 0.25)


PARTS = {
    "a token": lambda y: y[:, 0],
    "other tokens": lambda y: y[:, 1:],
    "every other token": lambda y: y[:, ::2],
    "rolled": lambda y: jnp.roll(y, 3, 1),
    "reversed": lambda y: y[:, ::-1],
    "windows": lambda y: y.reshape(2, 4, 4, 16).transpose(0, 2, 1, 3).reshape(8, 4, 16),
    "heads": lambda y: y.reshape(2, 16, 4, 4),
    "a feature": lambda y: y[..., 3],
    "some features": lambda y: y[..., :4],
    "every fourth feature": lambda y: y[..., ::4],
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_normalised_row_is_normalised(part):
    """Where what a row has in common with its own mean is lost, it gains 2/16."""

    def normalised(params, x):
        x = x @ params["w"]
        centred = x - x.mean(-1, keepdims=True)
        return PARTS[part](centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True)))

    report = vs.predict(
        normalised, jax.ShapeDtypeStruct((2, 16, 8), jnp.float32), params={"w": vs.Moments(0.0, 1 / 8, (8, 16))}
    )
    assert report.output.second_moment == pytest.approx(1, rel=1e-3)
