"""Gradients at outputs that are arrays which others read, too: each is that of its own readers, as it is measured."""

import jax
import pytest
from flax import linen as nn

import varscale as vs

X = jax.random.normal(jax.random.key(0), (64, 12))


class Block(nn.Module):
    """A residual branch whose activations are kept beside what the next block reads."""

    @nn.compact
    def __call__(self, x):
        kept = {"branch": nn.Dense(32)(nn.relu(nn.Dense(64)(nn.LayerNorm()(x))))}
        x = kept["sum"] = x + nn.Dropout(0.1, deterministic=True)(kept["branch"])
        return x, kept


class Net(nn.Module):
    """A net that returns its activations."""

    @nn.compact
    def __call__(self, x):
        x, first = Block()(nn.Dense(32)(x))
        x, second = Block()(x)
        x = nn.LayerNorm()(x)
        unread = nn.Dense(8, name="unread")(x)
        self.sow("intermediates", "kept", unread)
        return nn.Dense(10)(x), (first, second), x


class Skipped(nn.Module):
    """A module that hands on its input, which is read past it."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32)(x)
        return nn.Dense(8)(x + nn.relu(nn.Dropout(0.1, deterministic=True)(x)))


def test_each_output_has_the_gradient_of_its_own_readers():
    report = vs.predict(Net(), X, draws=16)
    assert [row.path for row in report.rows if row.gradient_holds is False] == []
    gradients = {row.path: row.gradient for row in report.rows}
    kept = [path for path in gradients if "['sum']" in path or "['branch']" in path or path in ("[0]", "[2]")]
    assert {path: gradients[path] for path in kept} == dict.fromkeys(kept, 1.0)
    assert len(kept) == 10
    assert gradients["Block_0/Dropout_0"] == pytest.approx(gradients["Block_0[0]"] + 1, rel=1e-6)
    assert gradients["unread"] is None


def test_what_is_read_past_an_output_is_no_gradient_of_it():
    report = vs.predict(Skipped(), X)
    assert report["Dropout_0"].gradient_error_bound > 0.5
    assert report["Dense_0"].gradient_error_bound < 0.5


class TwoReaders(nn.Module):
    """Two branches, each behind a norm of its own, as in blocks whose attention and feed-forward part run side by side."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32, name="stem")(x)
        one = nn.Dense(32, name="small", kernel_init=vs.normal(0.01))(nn.LayerNorm(name="norm_1")(x))
        scaled = nn.LayerNorm(name="norm_2")(x)
        return x + one + nn.Dense(32, name="large")(nn.LayerNorm(name="after")(scaled))


def test_a_cotangent_that_two_equal_arrays_share_is_in_doubt():
    report = vs.predict(TwoReaders(), jax.ShapeDtypeStruct((8, 32), "float32"))
    # norm_1's cotangent is 1e-4 · 32 of the output's, norm_2's about 1: as one array both have the sum.
    assert report["norm_1"].gradient_error_bound > 1
    assert report["norm_2"].gradient_error_bound > 1
    assert report["after"].gradient_error_bound < 0.2
