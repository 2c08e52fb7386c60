"""Predictions are what they were: a change is a decision, written down with its reason (`golden.py`)."""

import golden
import jax
import pytest
import zoo

CHEAP = [name for name in golden.recorded() if not name.startswith("recurrent")]


@pytest.fixture(scope="module")
def models():
    return {name: (model, x) for name, model, x in golden.models()}


@pytest.mark.parametrize("name", CHEAP)
def test_prediction_is_what_it_was(models, name):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = golden.predicted(*models[name])
    assert not (changed := list(golden.differences(found, golden.recorded()[name]))), "\n".join(changed)


def test_the_record_is_complete(models):
    assert models.keys() == golden.recorded().keys()
    assert zoo.MODELS.keys() < models.keys()


def test_a_change_of_a_row_is_seen():
    rows = golden.recorded()["decoder"]
    path, (second, *rest) = next(iter(rows.items()))
    assert not list(golden.differences(rows, rows))
    assert len(list(golden.differences({**rows, path: [second * (1 + 1e-9), *rest]}, rows))) == 1
    assert len(list(golden.differences({**rows, "new": rows[path]}, rows))) == 1
