"""The coordinate check: flat under μP, and every planted error found, in linen and nnx."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import varscale as vs
from varscale.schemes.coordinate_table import CoordinateCheck, CoordinateRow, fit
from varscale.schemes.coordinates import _model

WIDTHS = [48, 192]
X = jax.random.normal(jax.random.key(1), (16, 8))
IDS = jax.random.randint(jax.random.key(2), (16, 6), 0, 30)


def mlp(width):
    return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(3)])


def short(width):
    return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(3)])


class Attention(nn.Module):
    """One attention over embedded tokens, and a readout."""

    width: int

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(30, self.width, embedding_init=nn.initializers.normal(1.0), name="embed")(ids)
        x = x + nn.MultiHeadDotProductAttention(num_heads=1, use_bias=False, name="attention")(x, x)
        return nn.Dense(30, name="head")(x)


def mup():
    return vs.schemes.mup(base=mlp(16))


def check(plan):
    return vs.coordinate_check(mlp, WIDTHS, plan, X, steps=3, draws=4)


@functools.cache
def flat():
    return check(mup())


def test_mup_is_flat():
    found = flat()
    assert found.findings == ()
    assert found.is_flat
    assert [row.path for row in found] == ["layers_0", "layers_2", "layers_4", ""]
    assert all(abs(row.change.exponent) < 0.2 for row in found)
    assert found["layers_4"].size_at(0).exponent == pytest.approx(-0.5, abs=0.2)  # a readout may shrink before training
    assert found.losses.shape == (2, 4, 4)
    assert found.losses[:, :, -1].mean() < found.losses[:, :, 0].mean()


def test_what_is_measured_is_what_probe_measures():
    plan = mup()(mlp(WIDTHS[0]), X)
    row = flat()["layers_2"]
    key = jax.random.split(jax.random.fold_in(jax.random.key(0), WIDTHS[0]), 4)[1]
    params = vs.initialize(mlp(WIDTHS[0]), key, X, scheme=plan)
    assert row.sizes[0, 1, 0] ** 2 == pytest.approx(vs.probe(mlp(WIDTHS[0]), params, X)["layers_2"].second_moment, rel=1e-5)
    assert row.changes[0, 1, 0] == 0


def test_the_standard_parametrization_is_not():
    found = check("declared")
    assert found["layers_2"].grows
    assert found["layers_4"].grows
    assert any("the readout's law or learning rate" in finding for finding in found.findings)
    assert not found.is_flat


def readout(edited):
    """The check of a net with one hidden layer, its plan edited: found after one step."""

    def plan(model, x, *, method=None):
        made = vs.schemes.mup(base=short(16))(model, x)
        return edited(made, made["layers_2/kernel"].multiplier("adam_learning_rate"))

    return vs.coordinate_check(short, WIDTHS, plan, X, steps=1, draws=4)


def test_a_wrong_readout_is_found():
    too_fast = readout(lambda plan, rate: plan.multiply("layers_2/kernel", adam_learning_rate=1.0))
    assert too_fast["layers_2"].update.exponent == pytest.approx(1, abs=0.3)
    assert "what the update of its kernel adds grows" in too_fast["layers_2"].finding
    assert too_fast["layers_0"].finding == ""
    twice = readout(
        lambda plan, rate: plan.multiply("layers_2/kernel", adam_learning_rate=rate**2).edit(
            {"layers_2/kernel": vs.normal(0.3 * rate**2)}
        )
    )
    assert twice["layers_2"].vanishes
    assert "adds after step 1 shrinks" in twice["layers_2"].finding


def test_a_zero_readout_is_no_error():
    found = readout(lambda plan, rate: plan.edit({"layers_2/kernel": vs.zeros}))
    assert not found["layers_2"].size_at(0).is_defined
    assert found.findings == ()


def test_a_missing_division_by_the_head_size_is_found_in_the_scores():
    def scores(attention):
        plan = vs.schemes.mup(base=Attention(16), attention=attention)
        rows = ["attention", "attention.scores", "attention/query"]
        return vs.coordinate_check(Attention, [24, 160], plan, IDS, steps=1, draws=4, rows=rows)

    right, wrong = scores(True), scores(False)
    assert right.findings == ()  # the query has the factor in its kernel, which is no error either
    assert right["attention.scores"].size_at(0).exponent == pytest.approx(-0.5, abs=0.2)
    assert wrong["attention.scores"].keeps_size
    assert "divide the products of queries and keys by d_head" in " ".join(wrong.findings)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(x.shape[-1], use_bias=False, name="dense")(x), None


class Scanned(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, use_bias=False, name="first")(x)
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return layers(name="layers")(x, None)[0]


def test_the_update_of_a_kernel_is_what_its_change_makes_of_the_present_input():
    found = vs.coordinate_check(Scanned, [4, 8], "declared", X, steps=2, draws=2)
    first, second = found["first"].updates, found["layers/dense@1"].updates
    assert first is not None
    assert second is not None
    np.testing.assert_allclose(first, found["first"].changes, rtol=1e-4)  # its input never changes
    assert second.shape == (2, 2, 3)
    assert np.all(second[:, :, 0] == 0)
    assert np.all(second[:, :, 1] < found["layers/dense@1"].changes[:, :, 1])
    assert found[""].updates is None


class GroupedAttention(nn.Module):
    """Two heads of keys and values, shared by queries whose number grows."""

    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(Grouped(name="attention")(nn.Dense(self.width, name="first")(x)))


class Grouped(nn.Module):
    @nn.compact
    def __call__(self, x):
        def heads(name, count):
            return nn.DenseGeneral((count, 8), use_bias=False, name=name)(x)

        count = x.shape[-1] // 8
        k, v = (jnp.repeat(heads(name, 2), count // 2, -2) for name in ("key", "value"))
        y = nn.dot_product_attention(heads("query", count), k, v)
        return x + nn.DenseGeneral(x.shape[-1], (-2, -1), use_bias=False, name="out")(y)


def test_values_of_fixed_size_and_what_they_make_may_shrink_at_first():
    """Keys and values of two heads are readouts of a stream that grows."""
    plan = vs.schemes.mup(base=GroupedAttention(16))
    x = jax.random.normal(jax.random.key(1), (4, 6, 8))
    found = vs.coordinate_check(GroupedAttention, [16, 144], plan, x, steps=1, draws=4)
    assert found["attention/value"].size_at(0).exponent == pytest.approx(-0.5, abs=0.15)
    made = found["attention/out"]
    assert made.size_at(0).shrinks
    assert made.finding == found["attention/value"].finding == ""
    assert "shrinks" in dataclasses.replace(made, follows_fixed=False).finding


class Tied(nn.Module):
    width: int

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(30, self.width, embedding_init=nn.initializers.normal(1.0), name="embed")
        return embed.attend(embed(ids)) * (16 / self.width)


class Untold(nn.Module):
    """The same without the multiplier."""

    width: int

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(30, self.width, embedding_init=nn.initializers.normal(1.0), name="embed")
        return embed.attend(embed(ids))


def test_a_tied_readout_is_told_with_the_multiplier_behind_it():
    found = vs.coordinate_check(Tied, [32, 128], vs.schemes.mup(base=Tied(16)), IDS, steps=1, draws=2)
    for what in ("sizes", "changes"):
        here, output = getattr(found["embed.attend"], what), getattr(found[""], what)
        np.testing.assert_allclose(here, output, rtol=1e-4)


def test_nnx_factories():
    class Net(nnx.Module):
        def __init__(self, width, rngs):
            self.first, self.norm = nnx.Linear(8, width, rngs=rngs), nnx.BatchNorm(width, rngs=rngs)
            self.head = nnx.Linear(width, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.norm(self.first(x))))

    plan = vs.schemes.mup(base=lambda rngs: Net(32, rngs))
    found = vs.coordinate_check(lambda width, rngs: Net(width, rngs), WIDTHS, plan, X, steps=1, draws=3)
    assert [row.path for row in found] == ["first", "norm", "head", ""]
    assert found.findings == ()
    assert _model(lambda width: lambda rngs: Net(width, rngs), 8)(nnx.Rngs(0)).first.kernel.shape == (8, 8)


def test_the_table_and_the_picture():
    pytest.importorskip("matplotlib")
    found = flat()
    assert "Every row is flat." in found.table(100)
    assert "(output)" in str(found)
    assert len(found.plot().axes) == 3
    assert found.to_records()[0]["widths"] == WIDTHS
    with pytest.raises(KeyError, match="no row has the path 'nothing'"):
        found["nothing"]


def test_a_fit_recovers_a_power_law_and_its_error_rate():
    rng = np.random.default_rng(0)
    widths = (64, 128, 256, 512)
    exponents = [fit(widths, np.array(widths)[:, None] ** 0.5 * np.exp(0.1 * rng.normal(size=(4, 4)))) for _ in range(400)]
    covered = sum(abs(f.exponent - 0.5) <= f.half_width for f in exponents)
    assert covered >= 384  # 99 %: fewer in one run of 1e5
    assert sum(f.exponent - 0.5 > f.margin for f in exponents) <= 14  # 1 % on one side
    assert fit(widths[:2], np.array([[1.0, 1.1], [1.0, 1.2]])).half_width > 3 * 0.1  # two degrees of freedom
    assert not fit(widths, np.zeros((4, 2))).is_defined


def rows_of_exponents(rng, exponents, noise):
    """Rows of a check at widths 16, 48 and 128, six draws and four steps, whose changes have these exponents."""
    widths = np.array([16.0, 48.0, 128.0])[:, None, None]
    values = [widths**exponent * np.exp(noise * rng.normal(size=(3, 6, 5))) for exponent in exponents]
    tests = len(values) * CoordinateRow("a", "Dense", (16, 48, 128), False, values[0], values[0]).own_tests
    flat_sizes = np.ones((3, 6, 5))
    return [CoordinateRow("a", "Dense", (16, 48, 128), False, flat_sizes, v, tests=tests) for v in values]


def test_all_rows_of_a_check_together_have_the_stated_error_rate_and_power():
    """The worst sound rows, of exponent .25: of 100 checks of 20 rows 1 may have a finding."""
    rng = np.random.default_rng(0)
    false = sum(any(row.finding for row in rows_of_exponents(rng, [0.25] * 20, 0.2)) for _ in range(100))
    assert false <= 7  # at 1 %: more in one run of 1e5
    assert all(row.finding or row.is_undecided for row in rows_of_exponents(rng, [0.5] * 20, 0.2))  # each but for .5 %
    assert all("grows" in row.finding for row in rows_of_exponents(rng, [1.0] * 20, 0.2))  # 8 standard errors above .25
    assert all("shrinks" in row.finding for row in rows_of_exponents(rng, [-1.0] * 20, 0.2))


def test_a_steep_row_that_chance_can_make_is_undecided():
    """As of the sound convolutional net whose readout's update went as width^+.28 ± .25."""
    scatter = np.exp(0.2 * np.array([1, -1] * 3))  # the same at every width
    values = np.array([16.0, 48.0, 128.0])[:, None, None] ** 0.28 * scatter[:, None] * np.ones(5)
    row = CoordinateRow("a", "Dense", (16, 48, 128), False, np.ones((3, 6, 5)), values, tests=8)
    assert row.change.exponent == pytest.approx(0.28)
    assert 0.1 < row.change.half_width < row.change.margin < 0.25
    assert row.finding == ""
    assert row.is_undecided


def test_what_is_not_known_well_enough_is_undecided():
    rng = np.random.default_rng(0)

    def row(exponent, noise, kind="Dense", **more):
        values = np.array([32, 64, 128])[:, None, None] ** exponent * np.exp(noise * rng.normal(size=(3, 4, 2)))
        return CoordinateRow("a", kind, (32, 64, 128), False, np.ones((3, 4, 2)), values, **more)

    assert [row(0.0, noise).is_undecided for noise in (0.01, 1.0)] == [False, True]
    assert not row(0.5, 0.01).is_undecided  # a finding
    assert row(0.0, 0.01, updates=np.exp(rng.normal(size=(3, 4, 2)))).is_undecided
    one_draw = CoordinateRow("a", "Dense", (32, 64), False, np.ones((2, 1, 2)), np.ones((2, 1, 2)))
    found = CoordinateCheck((32, 64), (one_draw,), np.ones((2, 1, 2)))
    assert not found.findings
    assert not found.is_flat
    assert "Undecided" in found.table(80)
    assert "flat." not in found.table(80).rpartition("\n")[2]


def test_scores_that_do_not_shrink_before_training_are_findings_where_heads_grow():
    def finding(size, grow):
        sizes = np.array([32.0, 128.0])[:, None, None] ** size * np.ones((2, 3, 2))
        return CoordinateRow("scores", "scores", (32, 128), False, sizes, np.ones((2, 3, 2)), heads_grow=grow).finding

    assert "divide the products" in finding(0.0, True)
    assert finding(0.0, False) == finding(-0.5, True) == ""


def test_readouts_that_keep_their_size_before_training():
    """As under the variance 1/fan_in; where draws do not tell that from 1/fan_in², they are not called flat."""
    rng = np.random.default_rng(0)

    def row(size, noise):
        sizes = np.array([32.0, 128.0])[:, None, None] ** size * np.exp(noise * rng.normal(size=(2, 3, 2)))
        return CoordinateRow("head", "Dense", (32, 128), True, sizes, np.ones((2, 3, 2)), is_readout=True)

    assert "a variance of 1/fan_in² gives width^-0.50; the readout's law" in row(0.0, 1e-6).finding
    assert row(-0.5, 1e-6).finding == ""
    assert not row(-0.5, 1e-6).is_undecided
    assert row(0.0, 0.5).is_undecided
    found = readout(lambda plan, rate: plan.edit({"layers_2/kernel": vs.normal(plan["layers_2/kernel"].fan_in ** -0.5)}))
    assert found["layers_2"].is_readout
    assert found["layers_2"].finding or found["layers_2"].is_undecided


def test_a_size_that_grows_after_training_alone_is_no_finding():
    """A readout shrinks before training and its change is flat: their sum seems to grow at small widths."""
    sizes = np.stack([np.array([[0.5], [0.25]]), np.array([[0.6], [0.9]])], axis=-1)
    row = CoordinateRow("head", "Dense", (32, 128), True, np.repeat(sizes, 3, 1), np.ones((2, 3, 2)), is_readout=True)
    assert row.size_at(-1).grows
    assert row.finding == ""


def test_what_the_program_lacks_is_a_finding():
    found = vs.coordinate_check(Untold, [32, 64], vs.schemes.mup(base=Untold(16)), IDS, steps=1, draws=2)
    assert any(finding.startswith("missing: readout multiplier") for finding in found.findings)
    assert not found.is_flat


def test_rows_that_are_not_finite_are_findings():
    sizes = np.ones((2, 2, 2))
    sizes[1, 0, 1] = np.nan
    row = CoordinateRow("a", "Dense", (1, 2), False, sizes, sizes)
    assert row.finding == "a: not finite at some width"


BAD = [
    (lambda: vs.coordinate_check(mlp, [64], "declared", X), ValueError, "widths must be two or more"),
    (lambda: vs.coordinate_check(mlp, WIDTHS, "declared", X, steps=0), ValueError, "steps must be an integer of 1 or more"),
    (lambda: vs.coordinate_check(mlp(3), WIDTHS, "declared", X), TypeError, "factory must"),
    (lambda: vs.coordinate_check(mlp, WIDTHS, 3, X), TypeError, "plan must be a scheme"),
    (lambda: vs.coordinate_check(mlp, WIDTHS, {64: None}, X), ValueError, "has none for 48"),
    (lambda: vs.coordinate_check(mlp, WIDTHS, mup()(mlp(64), X), X), TypeError, "one plan fits one width"),
    (lambda: vs.coordinate_check(mlp, WIDTHS, "declared", jax.ShapeDtypeStruct((2, 8), "float32")), ValueError, "hold arrays"),
    (lambda: vs.coordinate_check(mlp, [8, 64], mup(), X), ValueError, "base must be narrower"),
    (
        lambda: vs.coordinate_check(lambda n: nnx.Linear(8, n, rngs=nnx.Rngs(0)), WIDTHS, "declared", X),
        TypeError,
        "factory must return an nnx factory",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_errors_say_what_to_give(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
