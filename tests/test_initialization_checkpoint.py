"""Checkpoints written leaf by leaf: the bits of `initialize`, whatever kills the process in between."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from killed_checkpoints import KILLS, LIMIT, Net

import varscale as vs
from varscale.initialization import orbax_sessions

X = np.ones((2, 16), np.float32)
KEY = jax.random.key(0)


def write(path, limit=LIMIT, key=KEY, model=None):
    return vs.initialize_to_checkpoint(path, model or Net(), key, X, memory_limit=limit)


def assert_whole(path, expected=None):
    expected = vs.initialize(Net(), KEY, X) if expected is None else expected
    found = vs.transfer.load(path)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert not orbax_sessions.session(path).exists()
    assert not path.with_name(f"{path.name}.journal").exists()


def test_it_opens_with_both_apis_of_orbax_and_with_transfer(tmp_path):
    import orbax.checkpoint as v0
    import orbax.checkpoint.experimental.v1 as v1

    account = write(tmp_path / "net")
    assert account.of(how="elementwise")
    assert_whole(tmp_path / "net")
    expected = vs.initialize(Net(), KEY, X)
    jax.tree.map(np.testing.assert_array_equal, v1.load(str(tmp_path / "net")), expected)
    with v0.PyTreeCheckpointer() as checkpointer:
        jax.tree.map(np.testing.assert_array_equal, checkpointer.restore(tmp_path / "net" / "state"), expected)


def test_killed_at_any_moment_it_resumes_to_the_same_bits(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}
    script = Path(__file__).with_name("killed_checkpoints.py")
    told = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, env=environment, check=False)
    lines = told.stdout.splitlines()
    assert lines[0] == "whole ended 0", told.stderr
    assert lines[-1] == "last ended 0", told.stdout
    assert "raised" not in told.stdout, told.stdout
    # A child may be done before it is killed.
    assert sum("killed" in line for line in lines) >= KILLS // 2, told.stdout
    assert_whole(tmp_path / "whole")
    assert_whole(tmp_path / "killed")


def interrupted(monkeypatch, path, name, calls):
    """A call that ends when a step of the session is taken for the n-th time, after the step (negative: before it)."""
    step, count = getattr(orbax_sessions, name), 0

    def breaks(*args):
        nonlocal count
        count += 1
        if count == -calls:
            raise KeyboardInterrupt
        step(*args)
        if count == calls:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(orbax_sessions, name, breaks)
        with pytest.raises(KeyboardInterrupt):
            write(path)


@pytest.mark.parametrize("calls", [("save", 1), ("save", -3), ("finalize", -1), ("finalize", 1)], ids=str)
def test_a_part_that_the_journal_does_not_know_is_drawn_again(tmp_path, monkeypatch, calls):
    interrupted(monkeypatch, tmp_path / "net", *calls)
    write(tmp_path / "net", limit=2 * LIMIT)  # the batches need not be the same
    assert_whole(tmp_path / "net")


def test_what_is_on_the_disk_is_not_drawn_again(tmp_path, monkeypatch):
    interrupted(monkeypatch, tmp_path / "net", "save", -3)
    kept = orbax_sessions.parts(tmp_path / "net")
    assert len(kept) == 2
    with monkeypatch.context() as patch:
        saved = []
        save = orbax_sessions.save
        patch.setattr(orbax_sessions, "save", lambda path, leaves: (saved.extend(leaves), save(path, leaves)))
        write(tmp_path / "net")
    assert 0 < len(saved) < len(jax.tree.leaves(vs.initialize(Net(), KEY, X)))
    assert_whole(tmp_path / "net")


@pytest.mark.parametrize("damage", ["part", "file", "journal", "tail"])
def test_a_damaged_session_is_drawn_anew(tmp_path, monkeypatch, damage):
    path = tmp_path / "net"
    interrupted(monkeypatch, path, "save", -3)
    journal = tmp_path / "net.journal"
    part = orbax_sessions.session(path) / orbax_sessions.parts(path)[0]
    if damage == "part":
        shutil.rmtree(part)
    elif damage == "file":
        largest = max((file for file in part.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
        largest.write_bytes(b"\0" * largest.stat().st_size)
    elif damage == "journal":
        journal.write_text("?" + journal.read_text()[1:])
    else:
        journal.write_text(journal.read_text()[:-9])
    write(path)
    assert_whole(path)


def test_what_stands_in_the_way_is_left_alone(tmp_path, monkeypatch):
    path = tmp_path / "net"
    write(path)
    with pytest.raises(FileExistsError, match="net' exists"):
        write(path)
    assert_whole(path)
    interrupted(monkeypatch, tmp_path / "half", "save", 1)
    with pytest.raises(FileExistsError, match="another model, key or law"):
        write(tmp_path / "half", key=jax.random.key(1))
    write(tmp_path / "half")
    assert_whole(tmp_path / "half")


class Nothing(nn.Module):
    def __call__(self, x):
        return x


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"memory_limit is 100 bytes, and 'params/Dense_0/kernel' .* takes 1024"):
        write(tmp_path / "net", limit=100)
    for limit in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="memory_limit must be"):
            write(tmp_path / "net", limit=limit)
    with pytest.raises(FileNotFoundError, match="no folder"):
        write(tmp_path / "missing" / "net")
    with pytest.raises(ValueError, match="no variables"):
        write(tmp_path / "net", model=Nothing())
    assert not list(tmp_path.iterdir())


def test_an_nnx_factory(tmp_path):
    class Small(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)])

    vs.initialize_to_checkpoint(tmp_path / "net", Small, KEY, memory_limit=1000, dtype=jnp.bfloat16)
    found = vs.transfer.load(tmp_path / "net")
    model = vs.initialize(Small, KEY, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(found["layers"]["0"]["kernel"], model.layers[0].kernel[...])
    np.testing.assert_array_equal(found["layers"]["1"]["rngs"]["key"], jax.random.key_data(model.layers[1].rngs.key[...]))
