"""What a prediction may not claim: moments that no array has, terms taken for uncorrelated, doubts that cancel."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs
from varscale.theory.domain.axes import MOST_CLASSES, Axis, join, labelled
from varscale.theory.domain.axis_maps import class_shares, split_axis
from varscale.theory.graph.layout import Value
from varscale.theory.graph.linear_nodes import Concat
from varscale.theory.graph.nodes import Graph, Node, View, leaf, second_moments
from varscale.theory.graph.normal_form import affine, apply, mean_node
from varscale.theory.interpreter.interpreter import Interpreter
from varscale.theory.interpreter.parameters import measured_law
from varscale.theory.propagation.cross_moments import STRATEGIES
from varscale.theory.propagation.doubts import doubt_of
from varscale.theory.rules.registry import RULES

NONE = {"w": jnp.zeros(1)}


def output(f, *inputs, params=NONE, **kwargs):
    """The last row of a function of parameters and inputs."""
    return vs.predict(f, vs.inputs(*inputs), params=params, backward=False, **kwargs).output


@pytest.mark.parametrize("mean", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(4, 8, 8, 3), (4, 64, 3)])
def test_positions_are_correlated_along_every_axis(shape, mean):
    """The mean of 64 positions has E[m²] = ρ q + (1 − ρ) q / 64."""
    given = vs.Moments(mean, 1.0, shape, position_correlation=0.9)
    row = output(lambda _, x: x.mean(axis=tuple(range(1, len(shape) - 1))), given)
    assert row.second_moment == pytest.approx(0.9 + 0.1 / 64, rel=1e-6)


def test_samples_and_positions_may_be_correlated_at_once():
    """About the mean .5 the correlations are .6 and .8: of two positions of two samples .48."""
    q, square = 1.0, 0.25
    given = vs.Moments(0.5, q, (16, 64, 3), sample_correlation=(0.25 + 0.6 * 0.75), position_correlation=(0.25 + 0.8 * 0.75))
    row = output(lambda _, x: x.mean(axis=(0, 1)), given)
    expected = square + 0.75 * (1 / 16 + 15 / 16 * 0.6) * (1 / 64 + 63 / 64 * 0.8)
    assert row.second_moment == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["sample_correlation", "position_correlation"])
def test_correlations_that_no_numbers_have_are_refused(name):
    shape = (4, 2, 2, 3)
    with pytest.raises(ValueError, match=rf"{name} of 4 entries .* \[-0\.333333, 1\], not -0\.5"):
        vs.Moments(0.0, 1.0, shape, **{name: -0.5})
    with pytest.raises(ValueError, match=rf"{name} of 4 entries .* \[0\.3, 1\], not 0\.2"):
        vs.Moments(0.475**0.5, 1.0, shape, **{name: 0.2})
    least = vs.Moments(0.0, 1.0, shape, **{name: -1 / 3})
    summed = 0 if name == "sample_correlation" else (1, 2)
    assert output(lambda _, x: x.mean(axis=summed), least).second_moment == pytest.approx(0, abs=1e-9)


WIDTH = 64
X = jax.ShapeDtypeStruct((8, WIDTH), jnp.float32)


def kernels(n):
    """Independent square kernels of variance 1/width."""
    return lambda key: tuple(jax.random.normal(k, (WIDTH, WIDTH)) / WIDTH**0.5 for k in jax.random.split(key, n))


class Doubtful(Node):
    """An array of the moments of another, of which nothing else is known: off by 15 %, it may be."""

    how = "sampled"


@second_moments.register(Doubtful)
def second_moments_of_doubtful(node):
    node.graph.flag("sampled", 0.15)
    return node.args[0].node.table


@pytest.fixture
def sorts_are_doubtful(monkeypatch):
    def rule(interpreter, eqn, x):
        view = View(x.node, tuple(range(len(x.node.axes))))
        return [Value(interpreter.graph.make(Doubtful, x.node.axes, [view]), x.dims)]

    monkeypatch.setitem(RULES, "sort", rule)


def ranked(p, x):
    """Two independent projections in rising order: nearly equal, of which theory knows nothing."""
    return tuple(jnp.sort(x @ w, -1) for w in p)


@pytest.mark.usefixtures("sorts_are_doubtful")
def test_terms_that_may_be_equal_are_in_doubt():
    """Equal ones have E[(u + v)²] = 4, E[(u − v)²] = 0 and E[u²v²] = 3 where 2, 2 and 1 are predicted of unrelated ones."""
    for f, doubt in ((jnp.add, 1.0), (jnp.subtract, 1.0), (jnp.multiply, 2.0)):
        row = output(lambda p, x, f=f: f(*ranked(p, x)), X, params=kernels(2))
        assert row.how == "assumed"
        assert doubt <= row.error_bound < doubt + 0.5
    slight = output(lambda p, x: 10 * ranked(p, x)[0] + 0.1 * ranked(p, x)[1], X, params=kernels(2))
    alone = output(lambda p, x: ranked(p, x)[0], X, params=kernels(1))
    assert slight.error_bound == pytest.approx(alone.error_bound + 0.02, abs=2e-3)  # 2 · 10 · .1 / 100


@pytest.mark.usefixtures("sorts_are_doubtful")
def test_what_is_read_again_is_as_doubtful_as_the_first_time():
    """Both of a sum and a difference rest on one cross-moment."""
    both = lambda u, v, *more: [sum(more, u + v), sum(more, u - v)]  # noqa: E731
    for f in (lambda p, x: both(*ranked(p, x)), lambda p, x: both(*ranked(p, x), x @ p[0])):
        one, other = vs.predict(f, X, params=kernels(2), backward=False).rows[:2]
        assert one.error_bound == pytest.approx(other.error_bound, rel=1e-3)
        assert one.error_bound > 0.5
        assert one.how == other.how == "assumed"


@pytest.mark.usefixtures("sorts_are_doubtful")
def test_doubts_of_unrelated_roots_do_not_cancel():
    """A numerator is as doubtful over a denominator that rises as it does."""

    def quotient(p, x, y):
        return jnp.sort(x @ p[0], -1) * jax.lax.rsqrt(jnp.sort(y @ p[1], -1) ** 2 + 1)

    alone = output(lambda p, x: jnp.sort(x @ p[0], -1), X, params=kernels(1))
    assert alone.error_bound > 0.15
    assert output(quotient, X, X, params=kernels(2)).error_bound > 1.2 * alone.error_bound


@pytest.mark.usefixtures("sorts_are_doubtful")
def test_doubt_grows_where_terms_cancel():
    """Of numbers with mean 5 and variance 1 an error of 15 % in E[x²] = 26 may be one of 390 % in what is left of them."""
    row = output(lambda p, x: (lambda y: y - y.mean(-1, keepdims=True))(jnp.sort(x @ p[0] + 5, -1)), X, params=kernels(1))
    assert row.error_bound > 3.5


def test_the_doubt_of_what_is_joined_is_shared_by_size():
    graph = Graph()
    doubtful, known = (leaf(graph, f"x{n}", [Axis(n)], 0.0, 1.0, odd=True) for n in (12, 4))
    doubtful.doubt = 0.3
    joined = graph.make(Concat, [labelled(np.repeat([0, 1], [12, 4]))], [doubtful.whole, known.whole], (0, (12, 4)))
    assert doubt_of(joined) == pytest.approx(0.3 * 12 / 16)


def test_an_array_given_twice_is_one_input():
    x = np.random.default_rng(0).normal(0.5, 1.0, (64, WIDTH)).astype(np.float32)
    for other in (x, x.copy()):
        row = output(lambda _, a, b: a - b + 1, x, other)
        assert row.second_moment == pytest.approx(1, rel=1e-6)
        assert output(lambda p, a, b: (a + b) @ p[0], x, other, params=kernels(1)).second_moment == pytest.approx(
            4 * np.mean(x**2), rel=1e-3
        )
    apart = jax.ShapeDtypeStruct(x.shape, x.dtype)  # two descriptions are two arrays
    assert output(lambda _, a, b: a - b, apart, apart).second_moment == pytest.approx(2)


def test_correlated_arrays_are_measured_together():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, WIDTH)).astype(np.float32)
    y = (x + 0.5 * rng.standard_normal((64, WIDTH)) + 0.25).astype(np.float32)
    f = lambda _, a, b: a - b  # noqa: E731
    assert output(f, x, y).second_moment == pytest.approx(np.mean((x - y) ** 2), rel=1e-4)
    g = lambda p, a, b: a @ p[0] - b @ p[0]  # noqa: E731
    assert output(g, x, y, params=kernels(1)).second_moment == pytest.approx(np.mean((x - y) ** 2), rel=1e-3)
    z = rng.standard_normal((64, WIDTH)).astype(np.float32)
    assert output(f, x, z).second_moment == pytest.approx(np.mean(x**2) + np.mean(z**2), rel=0.05)
    assert output(lambda _, a, b: a * b, x, y).second_moment == pytest.approx(np.mean((x * y) ** 2), rel=0.1)


def test_data_against_their_own_crop():
    """Of 33 windows the first is the crop itself: E[(Σ x²)²] = n² + 2n of n = 256, and n of the others."""

    def correlated(_, x):
        return jax.lax.conv_general_dilated(x, x[:, :, :32], (1,), [(0, 0)], dimension_numbers=("NCH", "OIH", "NCH"))

    row = output(correlated, jax.ShapeDtypeStruct((1, 8, 64), jnp.float32))
    expected = (256**2 + 2 * 256 + 32 * 256) / 33
    assert (row.how, row.second_moment) == ("sampled", pytest.approx(expected, rel=row.error_bound))


def padded(_, x):
    """64 zeros, 256 standard normals, 64 zeros, from a place that depends on the data."""
    start = jnp.argmax(x[0, :64]) * 5
    return jax.lax.dynamic_slice(jnp.pad(x, ((0, 0), (64, 64))), (0, start), (x.shape[0], 64))


def test_a_random_slice_is_a_mixture_of_its_places():
    """Of 321 starts, s and 320 − s hold s normals for s < 64, the others 64."""
    row = output(padded, jax.ShapeDtypeStruct((8, 256), jnp.float32))
    expected = (2 * sum(range(64)) + (321 - 128) * 64) / 321 / 64
    assert (row.how, row.second_moment) == ("sampled", pytest.approx(expected, rel=row.error_bound))
    plain = output(
        lambda _, x: jax.lax.dynamic_slice(x, (0, jnp.argmax(x[0])), (8, 64)), jax.ShapeDtypeStruct((8, 256), jnp.float32)
    )
    assert plain.second_moment == pytest.approx(1, rel=plain.error_bound)
    assert plain.error_bound < 0.15


def test_a_random_slice_of_known_numbers_is_not_their_beginning():
    table = jnp.arange(100.0)
    f = lambda _, x: x[0, :1] * 0 + jax.lax.dynamic_slice(table, (jnp.argmax(x[0]),), (1,))  # noqa: E731
    row = output(f, jax.ShapeDtypeStruct((8, 100), jnp.float32))
    assert row.second_moment == pytest.approx(float(jnp.mean(table**2)), rel=row.error_bound)


def test_classes_are_counted_before_they_are_written_down():
    with pytest.raises(ValueError, match="at most 256 classes of positions, not 300"):
        labelled(range(300))
    mixed = labelled(np.random.default_rng(0).integers(0, 6, size=4096))
    factors, _, types, _ = split_axis(mixed, (512, 8))
    assert [factor.size for factor in factors] == [512, 8]
    assert max(factor.classes for factor in factors) <= 2 * MOST_CLASSES
    assert types.shape == tuple(factor.types for factor in factors)
    blocks = labelled(np.arange(4096) // 8 % 6)
    factors, _, types, _ = split_axis(blocks, (512, 8))
    np.testing.assert_array_equal(types[:6, 0], np.arange(6))  # what factors can tell apart stays exact


def test_classes_of_both_are_kept_where_there_are_too_many():
    a, b = labelled(np.arange(60) // 12), labelled(np.arange(60) % 4)
    both = join(a, b)
    assert both.classes <= 2 * MOST_CLASSES
    for one in (a, b):  # it tells something of each
        assert class_shares(both, one).max(axis=1).mean() > 1.2 * max(one.counts) / one.size


def test_a_law_measured_on_independent_numbers_has_no_correlations():
    """2000 arrays, at 1 − (1 − 6e-5)(1 − 3 · 6e-7) each: more than two alarms with probability 3e-4. The seed is fixed."""
    axes = (Axis(4), Axis(6))
    laws = [measured_law(np.random.default_rng(seed).standard_normal((4, 6)), axes) for seed in range(2000)]
    assert sum(np.count_nonzero(law.second) > 1 for law in laws) <= 2
    shared = np.random.default_rng(0).standard_normal((64, 64)) + 0.5 * np.random.default_rng(1).standard_normal((1, 64))
    assert np.count_nonzero(measured_law(shared - shared.mean(), (Axis(64), Axis(64))).second) > 1


def test_a_measured_law_has_its_own_kurtosis():
    """Of signs every row has the same norm: outputs of a layer fluctuate as their inputs do, and no more."""
    signs = np.sign(np.random.default_rng(0).standard_normal((16, 16))) / 4
    normal = np.random.default_rng(0).standard_normal((16, 16)) / 4
    x = jax.ShapeDtypeStruct((512, 16), jnp.float32)
    one, other = (output(lambda p, x: x @ p["w"], x, params={"w": w.astype(np.float32)}) for w in (signs, normal))
    assert math.log(one.band[1] / one.band[0]) < 0.7 * math.log(other.band[1] / other.band[0])


def test_what_may_be_negative_is_no_variance():
    """max(relu(h)) less the square of 16 mean(h) is negative half of the time."""

    def less(p, x):
        h = x @ p[0]
        return jnp.max(jax.nn.relu(h), -1, keepdims=True) - jnp.square(16 * h.mean(-1, keepdims=True))

    graph_of = Interpreter().graph
    h = leaf(graph_of, "h", (Axis(8), Axis(4)), 0.0, 1.0, odd=True)
    squares = lambda node: apply(graph_of, "square", (), node.axes, [View(node, tuple(range(len(node.axes))))])  # noqa: E731
    mean = lambda node: mean_node(node, [1])  # noqa: E731
    view = lambda node: View(node, (0,))  # noqa: E731
    for plus, minus, positive in (
        (mean(squares(h)), squares(mean(h)), True),
        (mean(squares(affine(h, 2.0, 1.0))), squares(mean(affine(h, 2.0, 1.0))), True),
        (mean(squares(h)), squares(affine(mean(h), 3.0, 0.0)), False),
        (mean(squares(squares(h))), squares(mean(h)), False),
    ):
        difference = apply(graph_of, "sub", (), (Axis(8),), [view(plus), view(minus)])
        assert difference.positive == positive
    assert output(less, X, params=kernels(1)).second_moment > 0


def test_orthogonal_layers_keep_the_norm_of_what_they_are_given():
    """Thirty square ones hand on a mean square as it was; one that halves the width lets it fluctuate half as much."""

    class Deep(nn.Module):
        widths: tuple[int, ...]

        @nn.compact
        def __call__(self, x):
            for width in self.widths:
                x = nn.Dense(width, kernel_init=nn.initializers.orthogonal(), use_bias=False)(x)
            return x

    x = jax.ShapeDtypeStruct((16, 64), jnp.float32)
    deep, single, narrow = (vs.predict(Deep(w), x, backward=False).output for w in ((64,) * 30, (64,), (32,)))
    assert deep.typical == pytest.approx(single.typical, rel=1e-6)
    assert deep.band == pytest.approx(single.band, rel=1e-6)
    assert math.log(single.band[1] / single.band[0]) < math.log(narrow.band[1] / narrow.band[0])


def test_correlations_that_there_is_no_place_for_are_errors():
    with pytest.raises(ValueError, match=r"position_correlation=0\.5 is about axes between the first and the last"):
        vs.Moments(shape=(8, 4), position_correlation=0.5)
    given = {"w": vs.Moments(shape=(4, 4), sample_correlation=0.5)}
    with pytest.raises(ValueError, match="independent entries"):
        vs.predict(lambda p, x: x @ p["w"], jax.ShapeDtypeStruct((8, 4), jnp.float32), params=given)


@pytest.mark.parametrize("rule", ["weighted sums", "kinds of nodes"])
def test_norms_do_not_forget_covariances_in_doubt(rule, monkeypatch):
    """Without a rule for covariances of parts E[x²] of x less its mean and the norm's variance differ; a norm's rows have 1."""
    monkeypatch.setitem(STRATEGIES, rule, lambda a, b, frame: None)

    def normed(p, x):
        h = x @ p["w"]
        return jax.nn.standardize(h + jnp.roll(h, 1, -1), epsilon=0.0)

    row = output(normed, jax.ShapeDtypeStruct((8, 32), "float32"), params={"w": vs.Moments(0.0, 1 / 32, (32, 64))})
    assert 0.02 < abs(row.second_moment - 1) < row.error_bound < 0.2


def test_norms_forget_doubts_about_the_scale_of_the_whole_row_only():
    """Of two parts of a row one may be 1.5 times as large: the row's mean square over itself is 1, that part's is not."""
    graph = Graph()
    a, b = (leaf(graph, ("input", i), [Axis(8), Axis(16)], 0.0, 1.0, odd=True) for i in range(2))
    a.mark("assumed", 0.5)
    row = graph.make(Concat, [Axis(8), labelled([0] * 16 + [1] * 16)], [a.whole, b.whole], (1, (16, 16)))
    mean = mean_node(apply(graph, "integer_pow", (2,), row.axes, [row.whole]), [1])
    scale = View(apply(graph, "rsqrt", (), mean.axes, [mean.whole]), (0,))
    normed, part = (apply(graph, "mul", (), x.axes, [x.whole, scale]) for x in (row, a))
    assert doubt_of(normed) < 0.01
    assert 0.5 <= doubt_of(part) < 1.1
