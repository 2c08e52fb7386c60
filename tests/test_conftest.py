"""The suite's own settings: the quick subset, the devices, the strictness."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from conftest import QUICK, UNOPTIMIZED

ROOT = pathlib.Path(__file__).parent.parent


def test_the_quick_subset_is_marked_and_every_file_that_is_named_exists(request):
    assert request.node.get_closest_marker("quick") is not None, "this file is one of it"
    names = {path.name for folder in ("tests", "varscale") for path in (ROOT / folder).rglob("*")} | {"README.md"}
    for entry in QUICK | UNOPTIMIZED:
        file, _, function = entry.partition("::")
        assert file in names, "renamed or removed"
        assert not function or f"def {function}(" in next((ROOT / "tests").rglob(file)).read_text(), "renamed or removed"
    assert len(QUICK) >= 12


def test_promotions_are_refused_and_there_are_eight_devices():
    assert jax.device_count() == 8
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones(3) + jnp.ones((2, 3))
    with pytest.raises(ValueError, match="promotion"):
        jnp.ones(3, jnp.float32) + jnp.ones(3, jnp.int32)
