"""What `learning-rate-transfer` computes, at sizes of a second: where a minimum is, and a sweep from end to end."""

import jax
import numpy as np
import pytest

import varscale as vs
from experiments.lab.data import prose, synthetic
from experiments.lab.experiment import Run, Settings
from experiments.learning_rate_transfer import Sweep
from experiments.nets.transfer_nets import SIZE, Perceptron, Task, best_octave, characters, final_losses


def test_the_best_rate_is_the_vertex_of_the_parabola():
    octaves = np.arange(-8.0, -1.0)
    losses = np.exp((octaves - np.array([[-4.3], [-5.0]])) ** 2)
    np.testing.assert_allclose(best_octave(losses, octaves), [-4.3, -5.0])
    assert best_octave(np.exp(octaves)[None], octaves) == pytest.approx([-8.0])  # at the end of the sweep


def test_characters_are_windows_and_what_follows():
    ids, following, count = characters("abcd" * 10)
    assert (ids.shape, count) == ((2, SIZE), 4)
    np.testing.assert_array_equal(ids.ravel()[1:], following.ravel()[:-1])


def test_the_text_is_there():
    assert len(prose()) > 40_000


def test_a_sweep_trains_and_its_claims_compare_the_ends():
    samples = synthetic()
    task = Task(samples.features, samples.labels, 16, 20, 20)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        losses = final_losses(Perceptron(8), None, task, jax.random.split(jax.random.key(0), 2), [2.0**-12, 2.0**-4, 2.0**9])
        assert losses.shape == (2, 3)
        assert losses[:, 1].mean() < losses[:, 0].mean() < losses[:, 2].mean()
        sweep = Sweep(
            "digits",
            "width",
            Perceptron,
            (4, 8),
            lambda base: vs.schemes.mup(base=base),
            "μP",
            task,
            np.arange(-7.0, -3.0),
            "x",
        )
        found = sweep.losses(Run(Settings(quick=True, seeds=2)))
    assert found["scheme"].shape == found["plain"].shape == (2, 2, 4)
    claims = sweep.claims(found)
    assert [claim.unit for claim in claims] == ["octaves of the learning rate"] * 3
    assert claims[0].measured.seeds == 2
