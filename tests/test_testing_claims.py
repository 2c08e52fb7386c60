"""Claims and verdicts: what is refused, what the unit of a test is, and how both read."""

import math

import numpy as np
import pytest

import varscale as vs
from varscale.testing import VarianceClaim, Verdict, assert_variance
from varscale.testing.verdict import PARTS


def test_bad_shapes_and_claims_are_named():
    with pytest.raises(ValueError, match="shape"):
        assert_variance(vs.lecun_normal(), (8, 0))
    for claim in (
        dict(second_moment=-1.0),
        dict(second_moment=1.0, mean=2.0),
        dict(second_moment=math.inf),
        dict(second_moment=1.0, bound=-1.0),
    ):
        with pytest.raises(ValueError, match=r"second_moment|bound"):
            VarianceClaim(**claim)
    with pytest.raises(ValueError, match="empty"):
        VarianceClaim(1.0).check(np.zeros((1, 0)))


def test_a_claim_of_dependent_weights_takes_the_draw_for_its_unit():
    """Rows of equal weights: each draw has 30 independent numbers, and the test counts draws, not weights."""
    generator = np.random.default_rng(1)
    weights = np.repeat(generator.standard_normal((2000, 30, 1)), 20, axis=2)
    claim = VarianceClaim(1.0, independent=False)
    assert claim.check(weights, detectable_mean=0.1).samples == 2000
    assert not VarianceClaim(1.0).check(weights, detectable_mean=0.1).holds
    assert not VarianceClaim(1.2, independent=False).check(weights, detectable_mean=0.1).holds


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        (VarianceClaim(0.09, distribution="normal"), "variance 0.09, normal"),
        (VarianceClaim(0.0625, mean=0.25), "constant 0.25"),
        (VarianceClaim(1.0, mean=0.6, bound=3.0), "variance 0.64, mean 0.6, at most 3 large"),
        (VarianceClaim(1 / 48, orthogonal_axis=0), "variance 0.0208333, orthogonal with columns along axis 0"),
    ],
)
def test_claims_read_as_sentences(claim, words):
    assert str(claim) == words


def test_a_verdict_reads_as_a_report():
    verdict = assert_variance(vs.lecun_normal(), (32, 16), distribution="truncated_normal")
    text = str(verdict)
    assert isinstance(verdict, Verdict)
    assert text.startswith("holds | variance 1/fan_in, fan_in 32, truncated_normal, in float32 (32, 16), ")
    for words in (
        "ratio",
        "interval",
        "samples",
        "false alarms 1e-09",
        "✓ second_moment",
        "✓ mean",
        "✓ paired_slices",
        "✓ distribution",
    ):
        assert words in text
    assert len(verdict.findings) <= PARTS
    assert len(set(finding.name for finding in verdict.findings)) == len(verdict.findings)
    assert 0 < verdict.p_value <= 1
