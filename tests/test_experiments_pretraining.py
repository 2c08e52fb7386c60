"""The three objectives of pretraining, and what the pretraining experiments are built from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from experiments.lab import data, objectives
from experiments.nets import rnet
from experiments.nets.digit_transfer import CANVAS, CLASSES, NETS, SIDE, WAYS, random_start, split, started
from varscale import transfer


def test_nt_xent_is_its_definition_pair_by_pair(key):
    first, second = (jax.random.normal(k, (4, 3)) for k in jax.random.split(key))
    views = np.concatenate([first, second]).astype(np.float64)
    views /= np.linalg.norm(views, axis=1, keepdims=True)
    losses = []
    for i in range(8):
        weights = [np.exp(views[i] @ views[k] / 0.5) for k in range(8) if k != i]
        losses.append(-np.log(np.exp(views[i] @ views[(i + 4) % 8] / 0.5) / sum(weights)))
    np.testing.assert_allclose(objectives.nt_xent(first, second, 0.5), np.mean(losses), rtol=1e-5)
    aligned = objectives.nt_xent(jnp.eye(4), jnp.eye(4), 0.01)
    assert float(aligned) < 1e-6, "views that agree and differ from all others cost nothing"


def test_reconstruction_counts_hidden_pixels_only(key):
    images = jax.random.uniform(key, (5, 20))
    seen, hidden = objectives.masked(key, images, 0.5)
    np.testing.assert_array_equal(seen[hidden], 0)
    np.testing.assert_array_equal(seen[~hidden], images[~hidden])
    wrong_elsewhere = jnp.where(hidden, images, 100.0)
    assert float(objectives.reconstruction(wrong_elsewhere, images, hidden)) == 0
    np.testing.assert_allclose(objectives.reconstruction(images + 2, images, hidden), 4, rtol=1e-5)
    assert float(objectives.reconstruction(images, images, jnp.zeros_like(hidden))) == 0, "nothing hidden, nothing to divide by"


@given(seed=st.integers(0, 2**31 - 1))
def test_a_placed_picture_is_whole_and_somewhere(seed):
    images = np.random.default_rng(seed).uniform(0.1, 1, (6, SIDE * SIDE)).astype(np.float32)
    found = np.asarray(objectives.placed(jax.random.key(seed), images, SIDE, CANVAS)).reshape(-1, CANVAS, CANVAS)
    for canvas, image in zip(found, images, strict=True):
        rows, columns = np.nonzero(canvas.any(axis=1))[0], np.nonzero(canvas.any(axis=0))[0]
        inside = canvas[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        np.testing.assert_array_equal(inside.ravel(), image)


def test_splits_share_nothing_between_labels_and_test():
    digits = data.Samples(np.zeros((200, 64), np.float32), np.arange(200, dtype=np.int32) % 10, tuple("0123456789"), (8, 8))
    labelled, unlabelled, test = split(digits, 0, (2, 5))
    assert set(labelled[2]) < set(labelled[5]) <= set(unlabelled)
    assert not set(unlabelled) & set(test)
    assert digits.labels[np.concatenate([unlabelled, test])].min() == CLASSES
    assert [int((digits.labels[labelled[5]] == digit).sum()) for digit in range(5, 10)] == [5] * 5


def test_a_started_classifier_has_the_body_and_a_head_of_its_own(key):
    keys = jax.random.split(key, 2)
    pretrained = jax.vmap(lambda key: NETS["contrastive"].init(key, jnp.zeros((1, CANVAS * CANVAS)))["params"])(keys)
    params, account = started(keys, pretrained)
    assert account is not None
    assert account.complete
    np.testing.assert_array_equal(params["body"]["dense_2"]["kernel"], pretrained["body"]["dense_2"]["kernel"])
    np.testing.assert_array_equal(params["head"]["kernel"], jax.vmap(random_start)(keys)["head"]["kernel"])
    for way, rules in WAYS.items():
        if rules is not None:
            rate = transfer.assign(rules, params)["body/dense_0/kernel"].rule
            assert rate == (0.1 if way.startswith("small") else "freeze")


@pytest.fixture(scope="module")
def grafted():
    return rnet.pretrained(nnx.eval_shape(lambda: rnet.RNet(rngs=nnx.Rngs(0))), strict=True)


@jax.jit
def outputs(model):
    box, logits = model(rnet.patterns())
    return box, rnet.probabilities(logits)


def test_the_grafted_rnet_puts_out_what_the_original_does(grafted):
    model, account = grafted
    assert len(account.moved) == 16
    recorded = transfer.load(rnet.OUTPUTS)["patterns"]
    box, probabilities = outputs(model)
    np.testing.assert_allclose(box, recorded["box"], atol=1e-5)
    np.testing.assert_allclose(probabilities, recorded["probabilities"], atol=1e-5)


def test_without_its_permutation_it_would_not(grafted):
    """The test above has the power to see a wrong layout: rows and columns exchanged give another network."""
    model, _ = grafted
    wrong, _ = transfer.graft(
        model, transfer.load(rnet.WEIGHTS), layout="keras", rename={"fc5-1": "box", "fc5-2": "face"}, strict=True
    )
    assert np.abs(np.asarray(outputs(wrong)[0] - outputs(model)[0])).max() > 1e-3
