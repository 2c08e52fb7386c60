"""`assert_variance` on broken initializers, on good ones, and on the wrong questions.

Error rates of every call here: 1e-9 of false alarms, 1e-6 of misses at the sizes the verdict states. The key of a case
follows from the case, so every verdict below is the same in every run.
"""

import inspect
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from broken import BROKEN, SHAPE
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

import varscale as vs
from varscale import testing
from varscale.testing import Underpowered, VarianceClaim, assert_variance, strategies

jax_init = jax.nn.initializers


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_a_broken_initializer_is_caught_down_to_its_smallest_strength_and_passes_at_a_tenth_of_it(broken, record_property):
    for strength in (1.0, broken.smallest):
        with pytest.raises(AssertionError) as caught:
            assert_variance(broken.make(strength), broken.shape, **broken.claim)
        assert set(broken.part) & set(caught.value.verdict.failed), f"at strength {strength}: {caught.value}"
    print(f"{broken.name}: caught down to strength {broken.smallest} by {', '.join(caught.value.verdict.failed)}")
    record_property("smallest strength caught", broken.smallest)
    assert assert_variance(broken.make(broken.smallest / 10), broken.shape, **broken.claim).holds


def test_the_table_holds_at_least_fifteen_kinds_of_defect():
    assert len({broken.name for broken in BROKEN}) >= 15


@pytest.mark.parametrize(
    ("init", "claim"),
    [
        (vs.he_normal(), dict(scale=2.0, distribution="truncated_normal")),
        (vs.glorot_uniform(), dict(mode="fan_avg", distribution="uniform")),
        (vs.lecun_normal(), {}),
        (vs.variance_scaling(0.5, "fan_geo_avg", "rademacher"), dict(scale=0.5, mode="fan_geo_avg", distribution="rademacher")),
        (vs.variance_scaling(3.0, "fan_out", "normal"), dict(scale=3.0, mode="fan_out", distribution="normal")),
        (vs.normal(0.3), dict(claim=VarianceClaim(0.09, distribution="normal"))),
        (vs.truncated_normal(0.3), dict(claim=VarianceClaim(0.09, distribution="truncated_normal"))),
        (vs.symmetric_uniform(0.3), dict(claim=VarianceClaim(0.03, distribution="uniform", bound=0.3))),
        (vs.constant(0.25), dict(claim=VarianceClaim(0.0625, mean=0.25))),
        (vs.zeros, dict(scale=0.0)),
        (vs.ones, dict(claim=VarianceClaim(1.0, mean=1.0, bound=1.0))),
        (vs.orthogonal(1.5), dict(scale=2.25, distribution="orthogonal")),
        (vs.orthogonal(), {"claim": VarianceClaim(1 / 48, orthogonal_axis=0, independent=False)}),
        (vs.fused(vs.lecun_normal(), 3), dict(distribution="truncated_normal")),
        (vs.scaled(vs.lecun_normal(), 0.5), dict(scale=0.25, distribution="truncated_normal")),
        (jax_init.he_normal(), dict(scale=2.0, distribution="truncated_normal")),
        (jax_init.lecun_uniform(), dict(distribution="uniform")),
        (jax_init.orthogonal(), dict(distribution="orthogonal")),
        (lambda key, shape, dtype: jax.random.laplace(key, shape, dtype) / math.sqrt(2 * shape[0]), {}),
    ],
    # A function's repr holds its address, which differs between workers.
    ids=lambda value: repr(value)[:60] if not inspect.isfunction(value) else value.__qualname__,
)
def test_good_initializers_pass(init, claim):
    # A hundred QR decompositions a verdict: of small matrices.
    shape = (48, 24) if "orthogonal" in repr((init, claim)).replace("orthogonal_axis=None", "") else SHAPE
    verdict = assert_variance(init, shape, **claim)
    assert verdict.holds
    assert verdict.confidence_interval[0] <= 1 <= verdict.confidence_interval[1]
    assert verdict.detectable_ratio <= 1.1


@settings(max_examples=8)
@given(
    data=st.data(),
    scale=st.sampled_from((0.1, 2.0)),
    mode=strategies.modes(),
    law=strategies.distributions(),
    dtype=strategies.dtypes(),
)
def test_variance_scaling_passes_for_every_shape_role_of_axes_law_and_dtype(data, scale, mode, law, dtype):
    shape = data.draw(strategies.kernel_shapes(most=2**12))
    roles = data.draw(strategies.axes(shape))
    init = vs.variance_scaling(scale, mode, law, **roles)
    assert assert_variance(init, shape, scale=scale, mode=mode, distribution=law, dtype=dtype, **roles).holds


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.complex64])
def test_storage_dtypes_pass_with_and_without_a_law(dtype):
    for law in ("uniform", None):
        assert assert_variance(vs.lecun_uniform(), SHAPE, distribution=law, dtype=dtype).holds


def test_weights_below_the_smallest_subnormal_are_judged_by_the_rounded_law():
    """float8_e4m3fn at a standard deviation of 1.1e-3: most weights are 0, the others 2⁻⁹; the claim is still exact."""
    init, shape = vs.variance_scaling(0.02, "fan_in", "normal"), (16384, 8)
    verdict = assert_variance(init, shape, scale=0.02, distribution="normal", dtype=jnp.float8_e4m3fn)
    assert verdict.ratio != pytest.approx(1, abs=0.02)
    with pytest.raises(AssertionError, match="second_moment"):
        assert_variance(init, shape, scale=0.019, distribution="normal", dtype=jnp.float8_e4m3fn)


def test_what_jax_samples_in_bfloat16_is_refuted_by_its_mean():
    with pytest.raises(AssertionError) as caught:
        assert_variance(jax_init.he_normal(), SHAPE, scale=2.0, dtype=jnp.bfloat16)
    assert "mean" in caught.value.verdict.failed


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (1, 1, 1, 1)])
def test_tiny_kernels_are_drawn_often_enough(shape):
    verdict = assert_variance(vs.lecun_normal(), shape, distribution="truncated_normal")
    assert verdict.samples > 500_000
    with pytest.raises(AssertionError, match="second_moment"):
        assert_variance(vs.he_normal(), shape, distribution="truncated_normal")


def counting():
    calls = itertools.count()
    return lambda key, shape, dtype: vs.lecun_normal()(key, shape, dtype) * (1 + next(calls))


@pytest.mark.parametrize(
    ("init", "part"),
    [
        (counting(), "deterministic"),
        (lambda key, shape, dtype: jnp.asarray(np.random.standard_normal(shape) / 8, dtype), "deterministic"),  # noqa: NPY002
        (lambda key, shape, dtype: vs.lecun_normal()(key, shape[::-1], dtype), "signature"),
        (lambda key, shape, dtype: vs.lecun_normal()(key, shape, jnp.bfloat16), "signature"),
        (lambda key, shape, dtype: vs.lecun_normal()(jax.random.key(7), shape, dtype), "uses_key"),
        (vs.zeros, "second_moment"),
        (lambda key, shape, dtype: jnp.full(shape, jnp.inf, dtype), "finite"),
        (lambda key, shape, dtype: jax.random.cauchy(key, shape, dtype), "second_moment"),
    ],
)
def test_initializers_that_are_no_initializers_are_refuted(init, part):
    with pytest.raises(AssertionError) as caught:
        assert_variance(init, (64, 32))
    assert part in caught.value.verdict.failed


def test_an_initializer_that_jax_cannot_trace_is_called_key_by_key():
    def init(key, shape, dtype):
        seed = np.asarray(jax.random.key_data(key))
        return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) / math.sqrt(shape[0]), dtype)

    assert assert_variance(init, (256, 64), distribution="normal").holds
    with pytest.raises(AssertionError, match="second_moment"):
        assert_variance(init, (256, 64), scale=2.0)


@pytest.mark.parametrize(
    "init",
    [vs.lecun_normal(), vs.orthogonal(1.01), lambda key, shape, dtype: jnp.linalg.qr(jax.random.normal(key, shape, dtype))[0]],
    ids=["not orthogonal", "wrong gain", "not Haar: QR without its signs"],
)
def test_matrices_that_are_not_uniformly_orthogonal_are_refuted(init):
    with pytest.raises(AssertionError):
        assert_variance(init, (48, 32), distribution="orthogonal")


def test_too_small_a_budget_is_said_and_never_passes():
    with pytest.raises(Underpowered, match=r"max_samples is 1000: a mean of 0.012 std asks.*'quick' needs fewer") as caught:
        assert_variance(vs.lecun_normal(), SHAPE, max_samples=1000)
    assert caught.value.needed > 500_000
    for init, claim in ((vs.lecun_normal(), {}), (vs.orthogonal(), dict(distribution="orthogonal"))):
        with pytest.raises(Underpowered, match="max_samples is 1000") as caught:
            assert_variance(init, (16, 16), max_samples=1000, profile="quick", **claim)
        assert "quick" not in str(caught.value)
    weights = np.random.default_rng(0).standard_normal((1, 40, 40))
    with pytest.raises(Underpowered, match="1600 samples") as caught:
        VarianceClaim(1.0, distribution="normal").check(weights)
    assert caught.value.needed == pytest.approx(912_000, rel=0.01)
    # What is wrong enough is refuted by any number of samples.
    assert not VarianceClaim(4.0, distribution="normal").check(weights).holds


@pytest.mark.parametrize(
    ("sizes", "binds", "not_binding"),
    [
        (dict(detectable_mean=0.012), "a mean of 0.012 std asks for 9", "a ratio of"),
        (dict(detectable_mean=1.0, detectable_ratio=1.01), "a ratio of 1.01 asks for", "a mean of 1"),
        (dict(detectable_ratio=1.01), "std asks for", "nothing"),
    ],
)
def test_a_shortage_says_which_size_binds_and_what_would_do(sizes, binds, not_binding):
    """What the message proposes does: the same draws pass with it."""
    claim, weights = VarianceClaim(1.0, distribution="normal"), np.random.default_rng(0).standard_normal((1, 200, 200))
    with pytest.raises(Underpowered) as caught:
        claim.check(weights, **sizes)
    words = str(caught.value)
    assert binds in words
    assert f"{not_binding} asks" not in words
    proposed = dict(pair.split("=") for pair in re.findall(r"detectable_\w+=[\d.]+", words))
    assert claim.check(weights, **sizes | {name: float(size) for name, size in proposed.items()}).holds


def test_the_quick_profile_sees_what_it_says_and_says_what_it_does_not():
    """False alarms 1e-6, misses 1e-3 at a ratio of 1.2 or a mean of .1: the same keys in every run."""
    for shape in ((1, 1), (3, 3, 16, 32), (64, 64)):
        verdict = assert_variance(vs.he_normal(), shape, scale=2.0, profile="quick")
        assert verdict.samples < 2e4
        assert verdict.detectable_ratio <= 1.2
        assert verdict.detectable_mean <= 0.1
        assert "cannot see: a variance off by less than 20 %" in str(verdict)
        for scale in (2.0 * 1.2, 2.0 / 1.2):
            with pytest.raises(AssertionError):
                assert_variance(vs.he_normal(), shape, scale=scale, profile=testing.QUICK)
    assert assert_variance(jax_init.he_normal(), SHAPE, scale=2.0, dtype=jnp.bfloat16, profile="quick").holds
    assert "cannot see" not in str(assert_variance(vs.he_normal(), (32, 16), scale=2.0))
    assert assert_variance(vs.he_normal(), (8, 8), scale=2.0, profile="quick", detectable_ratio=1.3).detectable_ratio <= 1.3
    with pytest.raises(ValueError, match="profile must be one of 'full', 'quick'"):
        assert_variance(vs.he_normal(), (8, 8), profile="fast")


CONV, BATCHED = (3, 3, 16, 32), dict(in_axis=1, out_axis=2, batch_axis=0)


@pytest.mark.parametrize(
    ("init", "shape", "claim", "hint"),
    [
        (vs.normal(16**-0.5), CONV, {}, "9 = 3·3: the receptive field is missing"),
        (vs.normal((9 * 144) ** -0.5), CONV, {}, "1/9 = 1/(3·3): the receptive field is counted twice"),
        (vs.truncated_normal(0.87962566 / 8), (64, 48), {}, "0.774: the truncation's constant"),
        (vs.normal(1 / 8 / 0.87962566), (64, 48), {}, "1.292: divided by the truncation's constant"),
        (vs.he_normal(), (64, 48), {}, "2: twice the claim, as He's"),
        (vs.lecun_normal(), (64, 48), dict(scale=2.0), "1/2: half the claim, as LeCun's"),
        (vs.variance_scaling(1.0, "fan_out"), (64, 48), {}, "divided by fan_out (48), not by fan_in (64)"),
        (vs.glorot_normal(), (256, 48), {}, "divided by fan_avg (152), not by fan_in (256)"),
        (vs.normal((8 * 64) ** -0.5), (8, 64, 48), BATCHED, "1/8: the batch axis 0 of 8 is counted into the fan"),
        (vs.normal((8 * 64) ** -0.5), (8, 64, 48), {}, ""),
        (vs.normal(1 / 64), (64, 48), {}, "0.0156: the variance is used as standard deviation"),
        (vs.normal(64**-0.25), (64, 48), {}, "8: the square root is taken twice"),
        (vs.normal(1.0), (64, 48), {}, "64: the weights have variance 1"),
        (vs.normal(8.0), (64, 48), {}, "4096: the fraction is upside down"),
        (vs.symmetric_uniform(1 / 8), (64, 48), {}, "1/3: uniform in ±σ"),
        (vs.normal((3 / 64) ** 0.5), (64, 48), {}, "3: a uniform law's bound"),
        (vs.normal((1.5925 / 64) ** 0.5), (64, 48), dict(scale=1.5925**2), "1/√2.536: the gain 1.593 multiplies the variance"),
        (jax_init.uniform(0.2), (64, 48), {}, "uniform on one side of 0"),
    ],
)
def test_usual_mistakes_are_named(init, shape, claim, hint):
    if not hint:  # What is no mistake gets no hint.
        assert assert_variance(init, shape, profile="quick", **claim).hints == ()
        return
    with pytest.raises(AssertionError) as caught:
        assert_variance(init, shape, profile="quick", **claim)
    assert any(found.startswith(hint) for found in caught.value.verdict.hints), caught.value.verdict.hints
    assert f"hint: {hint}" in str(caught.value)


def test_a_mean_of_weights_sampled_in_bfloat16_is_explained():
    with pytest.raises(AssertionError) as caught:
        assert_variance(jax_init.he_normal(), SHAPE, scale=2.0, dtype=jnp.bfloat16)
    assert caught.value.verdict.hints == ("sampled in bfloat16, whose few values have a mean: draw in float32 and round once",)


@pytest.mark.parametrize(
    ("init", "words"),
    [
        (vs.he_normal, r"write vs.he_normal\(\)"),
        (vs.kaiming_uniform, r"write vs.he_uniform\(\)"),
        (vs.orthogonal, r"write vs.orthogonal\(\)"),
        (jax_init.he_normal, r"it makes one; write he_normal\(\)"),
        (vs.VarianceScaling, "not the class VarianceScaling"),
        ("he_normal", "not 'he_normal'"),
    ],
)
def test_what_makes_an_initializer_is_told_from_one(init, words):
    with pytest.raises(TypeError, match=words):
        assert_variance(init, (8, 8))


def test_tracebacks_show_the_test_alone():
    """pytest leaves out frames that hold `__tracebackhide__`: of the library, all."""
    calls = (
        lambda: assert_variance(vs.he_normal(), (8, 8), profile="quick"),
        lambda: assert_variance(vs.he_normal(), (8, 8), max_samples=10),
        lambda: assert_variance(vs.he_normal, (8, 8)),
        lambda: VarianceClaim(1.0).check(np.random.default_rng(0).standard_normal((1, 40, 40))),
        lambda: testing.assert_output_variance(lambda key, x: x, jnp.ones((2, 3)), scale=2.0),
        lambda: testing.assert_output_variance(lambda key, x: x * jax.random.normal(key), jnp.ones(3), max_replicates=2),
    )
    for call in calls:
        with pytest.raises((AssertionError, Underpowered, TypeError)) as caught:
            call()
        frames = [frame for frame in caught.traceback if "varscale" in str(frame.path)]
        own = [frame for frame in frames if "varscale/testing" in str(frame.path)]
        assert own
        assert all("__tracebackhide__" in frame.locals for frame in own), [frame.name for frame in own]


def test_too_few_numbers_to_tell_are_not_ticked():
    """One output of 2 inputs: E[y²] is far from the claim by chance, and the report says so."""
    open_ones = 0
    for seed in range(20):
        weights = np.random.default_rng(seed).standard_normal((2, 300, 1))
        verdict = VarianceClaim(1.0).check(weights, alpha=1e-2, beta=0.1, detectable_ratio=4.0, detectable_mean=0.5)
        part = next(finding for finding in verdict.findings if finding.name == "output_second_moment")
        ratio = float(re.search(r"E\[y²\] is ([\d.e-]+)", part.says).group(1))
        if "output_second_moment" in verdict.failed:
            continue
        assert part.open == (not 0.5 <= ratio <= 2)
        assert ("○ output_second_moment" in str(verdict)) == part.open
        assert ("too few numbers to tell" in str(verdict)) == any(finding.open for finding in verdict.findings)
        open_ones += part.open
    assert open_ones > 5


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (dict(scale=-1.0), ValueError, "scale"),
        (dict(scale=math.nan), ValueError, "scale"),
        (dict(mode="fan"), ValueError, "mode"),
        (dict(distribution="cauchy"), ValueError, "distribution"),
        (dict(dtype=jnp.int32), TypeError, "dtype"),
        (dict(detectable_ratio=1.0), ValueError, "detectable_ratio"),
        (dict(detectable_mean=0.0), ValueError, "detectable_mean"),
        (dict(alpha=0.0), ValueError, "alpha"),
        (dict(beta=0.7), ValueError, "beta"),
        (dict(in_axis=5), ValueError, "in_axis"),
    ],
)
def test_bad_arguments_are_named(arguments, error, match):
    with pytest.raises(error, match=match):
        assert_variance(vs.lecun_normal(), (8, 8), **arguments)


def test_the_same_case_has_the_same_verdict_and_another_key_another():
    first, again = (assert_variance(vs.lecun_normal(), (32, 16)) for _ in range(2))
    assert first == again
    assert assert_variance(vs.lecun_normal(), (32, 16), key=jax.random.key(3)).ratio != first.ratio


@pytest.mark.parametrize("law", ["normal", "truncated_normal", "uniform", None])
def test_the_false_alarm_rate_of_every_part_of_a_claim(law):
    """1500 claims on 4 draws of 24x16 weights: at 1e-2 and 1e-3 no part, and not the whole, alarms more often than its
    level allows.

    Each count is compared with the quantile that a binomial count exceeds with probability 1e-9; the heavy-tailed 1/8
    slack of the log-ratio statistic is none of it, since its law here is normal.
    """
    generator = np.random.default_rng(5)
    p_values: dict[str, list[float]] = {}
    claim = VarianceClaim(1.0, distribution=law)
    for _ in range(1500):
        if law == "uniform":
            weights = generator.uniform(-math.sqrt(3), math.sqrt(3), (4, 24, 16))
        elif law == "truncated_normal":
            low, high = special.ndtr((-2, 2))
            weights = special.ndtri(generator.uniform(low, high, (4, 24, 16))) / 0.87962566103423978
        else:
            weights = generator.standard_normal((4, 24, 16))
        verdict = claim.check(
            weights, alpha=1e-2, beta=0.1, detectable_ratio=2.0, detectable_mean=0.5, contractions=((1,), (2,))
        )
        for finding in verdict.findings:
            p_values.setdefault(finding.name, []).append(math.exp(finding.log_p))
        p_values.setdefault("the whole", []).append(verdict.p_value)
    for name, found in p_values.items():
        for level in (1e-2, 1e-3):
            count, allowed = int(np.sum(np.asarray(found) <= level)), stats.binom.isf(1e-9, len(found), level)
            assert count <= allowed, f"{name}: {count} of {len(found)} at {level:g}, {allowed:g} allowed"
