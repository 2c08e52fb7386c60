"""Save and load: every dtype and tree round-trips, and what is damaged, pickled or not what was asked for is refused whole."""

import gzip
import io
import json
import os
import pickle
import shutil
import zipfile

import flax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from varscale import transfer

ML = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz")
ML += ("float8_e3m4", "float8_e8m0fnu", "float4_e2m1fn", "int4", "uint4", "int2", "uint2")
PLAIN = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
PLAIN += ("float16", "float32", "float64", "complex64", "complex128")
DTYPES = [np.dtype(getattr(ml_dtypes, name)) for name in ML] + [np.dtype(name) for name in PLAIN]


def ones(shape, dtype) -> np.ndarray:
    return np.ones(shape, np.float32).astype(dtype)


ARRAYS = st.builds(ones, st.sampled_from([(), (1,), (0, 3), (2, 3)]), st.sampled_from(DTYPES))
KEYS = st.one_of(st.sampled_from(["a", "b/c", "b", "c", "__metadata__", "x.y", ""]))
TREES = st.recursive(
    ARRAYS | st.none(),
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(st.integers(0, 12), inner, max_size=3),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
    ),
    max_leaves=8,
)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=TREES)
def test_safetensors_round_trip_any_tree_of_any_dtype(tmp_path, tree):
    transfer.save(tmp_path / "tree.safetensors", tree)
    assert_same(transfer.load(tmp_path / "tree.safetensors"), tree)
    assert os.listdir(tmp_path) == ["tree.safetensors"], "temporary files are gone"


def test_orbax_round_trips_every_dtype_and_replaces_what_was_there(tmp_path):
    tree = {"a": {dtype.name: ones((2, 3), dtype) for dtype in DTYPES}, "n": {0: ones((), np.float32), 10: [ones(2, bool)]}}
    transfer.save(tmp_path / "run", {"old": ones(2, np.float32)})
    transfer.save(tmp_path / "run", tree)
    assert_same(transfer.load(tmp_path / "run"), tree)
    assert os.listdir(tmp_path) == ["run"]


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs, param_dtype=jnp.bfloat16) for _ in range(2)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


@pytest.mark.parametrize("name", ["net.safetensors", "net"])
def test_linen_and_nnx_come_back_as_what_they_are(tmp_path, name):
    model = Net(nnx.Rngs(0))
    transfer.save(tmp_path / name, model)
    new, _ = transfer.graft(Net(nnx.Rngs(1)), transfer.load(tmp_path / name), strict=True)
    np.testing.assert_array_equal(new.layers[1].kernel[...], model.layers[1].kernel[...])
    state = transfer.load(tmp_path / name, like=nnx.state(model))
    assert isinstance(state, nnx.State)
    old, new = (jax.random.key_data(keys) for keys in (model.dropout.rngs.key[...], state["dropout"]["rngs"]["key"][...]))
    np.testing.assert_array_equal(old, new)
    frozen = flax.core.freeze({"params": {"Dense_0": {"kernel": jnp.ones((2, 2), jnp.bfloat16)}}})
    transfer.save(tmp_path / name, frozen)
    assert_same(transfer.load(tmp_path / name, like=frozen), jax.tree.map(np.asarray, frozen))


TREE = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": ones(3, ml_dtypes.bfloat16)}, "n": np.int32(3)}


def test_a_changed_bit_anywhere_in_the_file_is_noticed(tmp_path):
    path = tmp_path / "tree.safetensors"
    transfer.save(path, TREE)
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        with pytest.raises(transfer.CheckpointError):
            transfer.load(path)


def test_a_file_cut_off_or_gone_on_is_refused(tmp_path):
    path = tmp_path / "tree.safetensors"
    transfer.save(path, TREE)
    good = path.read_bytes()
    for length in (*range(0, len(good), 7), len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(transfer.CheckpointError):
            transfer.load(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(transfer.CheckpointError):
        transfer.load(path)


def test_a_damaged_orbax_checkpoint_is_refused_or_unharmed(tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    transfer.save(whole, TREE)
    refused = 0
    for path in sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file()):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        content = (run / path).read_bytes()
        (run / path).write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
        try:
            assert_same(transfer.load(run), TREE)  # files of Orbax's own that hold no numbers
        except transfer.CheckpointError:
            refused += 1
    assert refused >= 3


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def archive(name: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr(name, pickle.dumps(Malicious()))
    return content.getvalue()


def objects() -> bytes:
    content = io.BytesIO()
    np.save(content, np.array([Malicious()], object), allow_pickle=True)
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        *((pickle.dumps(Malicious(), protocol), "it is a pickle") for protocol in range(6)),
        (archive("archive/data.pkl"), "PyTorch file"),
        (archive("a.npy"), "zip archive"),
        (objects(), "numpy array of objects"),
        (gzip.compress(pickle.dumps(Malicious())), "compressed"),
        (b"\x04\x22\x4d\x18" + bytes(20), "compressed .lz4"),
        (b"\x89HDF\r\n\x1a\n" + bytes(20), "HDF5"),
        (b"", "empty"),
        (b"{}", "no index of safetensors files"),
        (bytes(100), "no whole safetensors"),
    ],
    # The bytes hold the time at which they were made, which differs between workers.
    ids=lambda value: value if isinstance(value, str) else "content",
)
def test_what_is_no_safetensors_file_is_told_by_its_content_and_never_executed(tmp_path, content, reason):
    for name in ("model.pt", "model.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(transfer.CheckpointError, match=reason):
            transfer.load(tmp_path / name)


def test_files_of_others_are_read_as_a_flat_dict(tmp_path):
    arrays = {"model.0.weight": ones((2, 3), np.float32), "model.0.bias": ones(2, np.float16)}
    safetensors.numpy.save_file(arrays, tmp_path / "x.bin", metadata={"format": "pt"})
    assert_same(transfer.load(tmp_path / "x.bin"), arrays)


@pytest.mark.parametrize("name", ["x.safetensors", "x"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, np.complex64])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, name, dtype):
    transfer.save(tmp_path / name, {"a": {"w": np.array([1, np.nan, np.inf]).astype(dtype)}, "b": ones(1, dtype)})
    with pytest.raises(transfer.CheckpointError, match=r"1 leaves hold NaN or infinity: a/w \(2\)"):
        transfer.load(tmp_path / name)
    assert np.isnan(transfer.load(tmp_path / name, allow_nonfinite=True)["a"]["w"].astype(np.complex64)[1])


def test_what_is_not_like_the_tree_asked_for_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    transfer.save(path, TREE)
    assert_same(transfer.load(path, like=TREE), TREE)
    shapes = {"a": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16), "extra": jax.ShapeDtypeStruct((1,), jnp.int8)}}
    with pytest.raises(transfer.CheckpointError) as raised:
        transfer.load(path, like=shapes)
    for part in (r"a/kernel is float32[2, 3], not bfloat16[2, 3]", "a/extra is missing", "n was not expected"):
        assert part in str(raised.value)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    transfer.save(path, TREE)
    with pytest.raises(TypeError, match="'b' is a str"):
        transfer.save(path, {"a": ones(2, np.float32), "b": "text"})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        transfer.save(path, {"a": ones(2, np.float32)})
    monkeypatch.undo()
    assert_same(transfer.load(path), TREE)
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize(
    ("name", "tree", "error", "match"),
    [
        ("x.pt", TREE, ValueError, "can hold a pickle"),
        ("x.msgpack", TREE, ValueError, "no format known"),
        ("nowhere/x.safetensors", TREE, FileNotFoundError, "there is no folder"),
        ("folder", TREE, FileExistsError, "no Orbax checkpoint"),
        ("x", {}, ValueError, "no empty trees"),
        ("x", {"a": ones((0, 2), np.float32)}, ValueError, "size 0"),
        ("x.safetensors", {"a": jax.ShapeDtypeStruct((1,), jnp.float32)}, TypeError, "no values to save"),
        ("x.safetensors", {"a": np.array([None])}, TypeError, "holds no numbers"),
        ("x.safetensors", {(1, 2): ones(1, np.float32)}, TypeError, "use str or int"),
    ],
)
def test_what_cannot_be_saved_says_why(tmp_path, name, tree, error, match):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("keep me")
    with pytest.raises(error, match=match):
        transfer.save(tmp_path / name, tree)
    assert (tmp_path / "folder" / "mine.txt").read_text() == "keep me"
    assert os.listdir(tmp_path) == ["folder"]


def test_nothing_there_and_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError):
        transfer.load(tmp_path / "nothing")
    with pytest.raises(transfer.CheckpointError, match="neither an Orbax checkpoint"):
        transfer.load(tmp_path)


INDEX = "model.safetensors.index.json"


def sharded(folder, shards: dict[str, dict[str, np.ndarray]], **weight_map: str):
    """Write shards and their index as Hugging Face does; `weight_map` overrides entries of the index."""
    for name, arrays in shards.items():
        safetensors.numpy.save_file(arrays, folder / name)
    named = {key: name for name, arrays in shards.items() for key in arrays} | weight_map
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": named}))
    return folder


ONE, TWO = ({f"layers.{i}.weight": np.full((2, 3), i, np.float32)} for i in (0, 1))


def test_shards_are_read_as_their_index_says(tmp_path):
    stale = {"layers.0.weight": np.zeros((9, 9), np.float32)}  # also in the second file; the index names the first
    sharded(tmp_path, {"a.safetensors": ONE, "b.safetensors": TWO | stale}, **{"layers.0.weight": "a.safetensors"})
    for path in (tmp_path, tmp_path / INDEX):
        assert_same(transfer.load(path), ONE | TWO)
    assert_same(transfer.load(tmp_path / "b.safetensors"), TWO | stale)


def test_a_folder_with_one_safetensors_file_is_that_file(tmp_path):
    transfer.save(tmp_path / "model.safetensors", TREE)
    (tmp_path / "config.json").write_text("{}")
    assert_same(transfer.load(tmp_path), TREE)
    transfer.save(tmp_path / "other.safetensors", TREE)
    with pytest.raises(transfer.CheckpointError, match="2 safetensors files without an index: model"):
        transfer.load(tmp_path)


def test_damaged_sharded_checkpoints_are_refused_whole(tmp_path):
    sharded(tmp_path, {"a.safetensors": ONE, "b.safetensors": TWO})

    def refused(match):
        for path in (tmp_path, tmp_path / INDEX):
            with pytest.raises(transfer.CheckpointError, match=match):
                transfer.load(path)

    (tmp_path / "b.safetensors").rename(tmp_path / "c.safetensors")
    refused(r"1 of the 2 files that it names are not there: b.safetensors")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:-3])
    refused("no whole safetensors file")
    (tmp_path / "b.safetensors").write_bytes(pickle.dumps({"a": 1}))
    refused("it is a pickle")
    sharded(tmp_path, {"a.safetensors": ONE}, missing="a.safetensors")
    refused("'a.safetensors' does not hold missing")
    for outside in ("../a.safetensors", "/etc/passwd", ""):
        sharded(tmp_path, {"a.safetensors": ONE}, bad=outside)
        refused("must stand beside the index")
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {'):
        (tmp_path / INDEX).write_text(text)
        refused("no index of safetensors files")
