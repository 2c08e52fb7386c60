"""What `learning-rate-transfer` computes, at sizes of a second: where a minimum is, and a sweep from end to end."""

import jax
import numpy as np
import pytest

import varscale as vs
from experiments.lab.data import prose, synthetic
from experiments.lab.experiment import Run, Settings
from experiments.learning_rate_transfer import Sweep
from experiments.nets.transfer_nets import SIZE, Perceptron, Task, best_octave, characters


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


def sweep(sizes, octaves, task=None, standard=-1.0):
    return Sweep(
        "digits", "width", Perceptron, sizes, lambda base: vs.schemes.mup(base=base), "μP", task, octaves, standard, "x"
    )


def test_a_sweep_trains_at_every_size_and_rate():
    samples = synthetic()
    task = Task(samples.features, samples.labels, 16, 20, 20)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = sweep((4, 8), (-12.0, -4.0, 9.0), task).losses(Run(Settings(quick=True, seeds=2)))
    assert found["scheme"].shape == found["plain"].shape == (2, 2, 3)
    slow, good, fast = found["plain"][1].mean(axis=0)
    assert good < slow < fast


@pytest.mark.parametrize(
    ("scheme", "plain", "verdicts"),
    [
        (0.2, -0.6, ["holds", "holds", "holds"]),
        (0.6, -0.6, ["does not hold", "holds", "holds"]),  # nearer to another law than to none
        (-0.2, -0.1, ["holds", "does not hold", "does not hold"]),  # less than three doublings at rates an octave apart resolve
    ],
)
def test_claims_are_about_the_slope_over_all_sizes(scheme, plain, verdicts):
    octaves, sizes = np.arange(-8.0, 0.0), (32, 64, 128, 256)

    def losses(slope):
        best = -4.0 + slope * np.log2(np.array(sizes) / 32)
        return np.exp((octaves - best[:, None, None] - np.array([[-1e-3], [1e-3]])) ** 2)

    made = sweep(sizes, octaves)
    claims = made.claims({"scheme": losses(scheme), "plain": losses(plain)})
    assert made.slopes(losses(plain)) == pytest.approx([plain] * 2)
    assert [claim.verdict for claim in claims] == verdicts
