"""`varscale.transfer.graft`: nothing is lost, nothing is guessed, and the account says what became of every leaf."""

import re

import flax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from varscale import transfer

KEYS = st.sampled_from(["body", "head", "kernel", "bias", "h", "0", "1", "scale"])
SHAPES = st.sampled_from([(), (1,), (3,), (2, 3), (3, 2), (2, 2), (0, 3), (1, 2, 2)])
ARRAYS = st.builds(
    lambda shape, dtype, fill: np.full(shape, fill, dtype),
    SHAPES,
    st.sampled_from([np.float32, np.float64, ml_dtypes.bfloat16, np.int32, np.bool_, np.complex64]),
    st.integers(0, 100),
)
TREES = st.recursive(ARRAYS, lambda inner: st.dictionaries(KEYS, inner, max_size=4), max_leaves=12).filter(
    lambda tree: isinstance(tree, dict)
)


def leaves(tree) -> dict[str, np.ndarray]:
    return {"/".join(k.key for k in keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def same(first, second) -> bool:
    equal = jax.tree.map(lambda a, b: a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), first, second)
    return jax.tree.structure(first) == jax.tree.structure(second) and all(jax.tree.leaves(equal))


@pytest.mark.filterwarnings("ignore:graft moved nothing")
@given(TREES, TREES)
def test_nothing_is_lost_and_graft_is_idempotent(params, pretrained):
    before = jax.tree.map(np.copy, params)
    new, account = transfer.graft(params, pretrained)
    again, second = transfer.graft(new, pretrained)
    assert same(again, new)
    assert second == account
    assert same(params, before), "the argument was changed"

    ours, theirs = leaves(params), leaves(pretrained)
    assert sorted([*account.moved, *account.kept, *account.mismatched]) == sorted(ours), "each leaf is counted once"
    used = [source for book in (account.moved, account.mismatched) for entry in book.values() for source in entry.sources]
    assert sorted([*used, *account.left_over]) == sorted(theirs)
    for path, leaf in leaves(new).items():
        assert leaf.dtype == ours[path].dtype
        assert leaf.shape == ours[path].shape
        if path in account.moved:
            np.testing.assert_array_equal(leaf, theirs[path].astype(leaf.dtype))
        else:
            assert leaf.tobytes() == ours[path].tobytes()
    for entry in account.mismatched.values():
        assert entry.why
        assert entry.shape == ours[entry.path].shape
        assert entry.source_shapes == (theirs[entry.path].shape,)


@given(TREES)
def test_a_tree_grafted_onto_itself_moves_whole_under_any_spelling_of_its_paths(tree):
    for spelling in (tree, leaves(tree), {path.replace("/", "."): leaf for path, leaf in leaves(tree).items()}):
        new, account = transfer.graft(tree, spelling, strict=True)
        assert same(new, tree)
        assert set(account.moved) == set(leaves(tree))


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, classes: int = 2):
        self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(3, classes, rngs=rngs)


def pytorch_net(classes: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {f"module.layers.{i}.{n}": s for i in (0, 1) for n, s in (("weight", (3, 3)), ("bias", (3,)))}
    shapes |= {f"module.bn.{n}": (3,) for n in ("weight", "bias", "running_mean", "running_var")}
    shapes |= {"module.fc.weight": (classes, 3), "module.fc.bias": (classes,), "module.bn.num_batches_tracked": ()}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


RENAME = [{"module": ""}, {"layers": "blocks", "bn": "norm", "fc": "head"}]


def test_an_nnx_model_from_a_state_dict():
    model, weights = Net(nnx.Rngs(0)), pytorch_net()
    new, account = transfer.graft(model, weights, rename=RENAME, layout="pytorch", strict=True)
    assert isinstance(new, Net)
    np.testing.assert_array_equal(new.blocks[1].kernel[...], weights["module.layers.1.weight"].T)
    np.testing.assert_array_equal(new.norm.mean[...], weights["module.bn.running_mean"])
    np.testing.assert_array_equal(new.norm.scale[...], weights["module.bn.weight"])
    assert not np.array_equal(model.head.kernel[...], new.head.kernel[...]), "the model itself is left alone"
    assert account.kept["dropout/rngs/key"].intended
    assert account.left_over["module/bn/num_batches_tracked"].intended
    state, _ = transfer.graft(nnx.state(model), weights, rename=RENAME, layout="pytorch", strict=True)
    assert isinstance(state, nnx.State)


def test_a_head_of_another_size_is_mismatched_or_asked_for():
    model, weights = Net(nnx.Rngs(0)), pytorch_net(classes=5)
    new, account = transfer.graft(model, weights, rename=RENAME, layout="pytorch")
    assert set(account.mismatched) == {"head/kernel", "head/bias"}
    assert account.mismatched["head/kernel"].source_shapes == ((5, 3),)
    np.testing.assert_array_equal(new.head.kernel[...], model.head.kernel[...])
    with pytest.raises(transfer.GraftError, match="strict") as raised:
        transfer.graft(model, weights, rename=RENAME, layout="pytorch", strict=True)
    assert raised.value.account is not None
    assert set(raised.value.account.mismatched) == {"head/kernel", "head/bias"}
    _, account = transfer.graft(model, weights, rename=RENAME, layout="pytorch", fresh=["head"], strict=True)
    assert account.kept["head/kernel"].intended


def test_linen_variables_find_their_collections_either_way():
    variables = {
        "params": {"bn": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}},
        "batch_stats": {"bn": {"mean": jnp.zeros(3), "var": jnp.ones(3)}},
    }
    flat = {f"bn.{n}": np.full(3, i, np.float32) for i, n in enumerate(("weight", "bias", "running_mean", "running_var"))}
    new, account = transfer.graft(flax.core.freeze(variables), flat, layout="pytorch", strict=True)
    assert isinstance(new, flax.core.FrozenDict)
    np.testing.assert_array_equal(new["batch_stats"]["bn"]["var"], 3.0)
    assert len(account.moved) == 4
    bare, _ = transfer.graft(variables["params"], new, rename={"batch_stats": None}, strict=True)
    np.testing.assert_array_equal(bare["bn"]["bias"], 1.0)


def test_axis_metadata_is_kept():
    boxed = {"kernel": nn.Partitioned(jnp.zeros((2, 2)), names=("in", "out"))}
    new, account = transfer.graft(boxed, {"kernel": np.ones((2, 2), np.float32)}, strict=True)
    assert list(account.moved) == ["kernel"]
    assert isinstance(new["kernel"], nn.Partitioned)
    assert new["kernel"].names == ("in", "out")
    np.testing.assert_array_equal(new["kernel"].value, 1.0)


SQUARE = np.arange(4, dtype=np.float32).reshape(2, 2)


@pytest.mark.filterwarnings("ignore:graft moved nothing")
def test_a_square_kernel_by_another_name_is_never_moved_in_silence():
    params = {"fc": {"kernel": np.zeros((2, 2), np.float32)}}
    new, account = transfer.graft(params, {"fc": {"weight": SQUARE}}, rename={"**/weight": "**/kernel"}, missing="keep")
    assert "transposed" in account.mismatched["fc/kernel"].why
    assert not new["fc"]["kernel"].any()
    for layout, expected in (("pytorch", SQUARE.T), ("conv1d", SQUARE), ("flax", SQUARE)):
        new, _ = transfer.graft(
            params, {"fc": {"weight": SQUARE}}, rename={"**/weight": "**/kernel"}, layout=layout, strict=True
        )
        np.testing.assert_array_equal(new["fc"]["kernel"], expected)


def test_two_claims_to_one_place_and_two_places_for_one_are_refused():
    params = {"a": {"kernel": np.zeros((2, 2), np.float32)}}
    with pytest.raises(transfer.GraftError, match="both go to 'a/kernel'"):
        transfer.graft(params, {"a.kernel": SQUARE, "b.kernel": SQUARE}, rename={"b": "a"})
    either = {"a": {"kernel": np.zeros((2, 2), np.float32), "scale": np.zeros(2, np.float32)}}
    with pytest.raises(transfer.GraftError, match="may go to a/kernel or a/scale"):
        transfer.graft(either, {"a.weight": SQUARE}, layout="pytorch")
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        transfer.graft({"a.b": SQUARE, "a": {"b": SQUARE}}, {})


def test_what_rename_can_say():
    params = {f"block{i}": {"w": np.zeros(1, np.float32)} for i in range(3)}
    old = {f"h.{i}.w": np.full(1, i + 1, np.float32) for i in range(3)}

    def moved(rename, **options):
        new, account = transfer.graft(params, old, rename=rename, **options)
        return [float(new[f"block{i}"]["w"][0]) for i in range(3)], account

    assert moved({"h/*": "block*"})[0] == [1, 2, 3]
    assert moved({re.compile(r"^h/(\d)"): r"block\1"})[0] == [1, 2, 3]
    assert moved(lambda path: path.replace("h/", "block"))[0] == [1, 2, 3]
    values, account = moved({"h/1": None, "h/*": "block*"})
    assert values == [1, 0, 3]
    assert account.left_over["h/1/w"].intended
    assert moved([transfer.Renumber("h/*", {0: 2, 2: (0, 1)}), {"h/*": "block*"}])[0] == [3, 3, 1]
    assert moved({"h/0": ("block0", "block2"), "h/*": None})[0] == [1, 0, 1]
    _, account = moved({"h/*": "block*", "decoder": "x"})
    assert account.idle == ("decoder",)
    with pytest.raises(transfer.GraftError, match="decoder"):
        moved({"h/*": "block*", "decoder": "x"}, strict=True)
    with pytest.raises(ValueError, match="more wildcards"):
        moved({"h": "*"})
    with pytest.raises(TypeError, match="give a path"):
        moved(lambda path: 3)


def test_leaves_without_values():
    shapes = {"a": jax.ShapeDtypeStruct((2,), jnp.bfloat16), "b": jax.ShapeDtypeStruct((1,), jnp.float32)}
    new, _ = transfer.graft(shapes, {"a": np.ones(2, np.float32), "b": np.ones(1, np.float32)}, strict=True)
    assert new["a"].dtype == jnp.bfloat16
    with pytest.raises(transfer.GraftError, match="no values at 'b'"):
        transfer.graft(shapes, {"a": np.ones(2, np.float32)})
    with pytest.raises(TypeError, match="no numbers to move"):
        transfer.graft({"a": np.ones(2)}, {"a": shapes["a"]})


@pytest.mark.filterwarnings("ignore:graft moved nothing")
@pytest.mark.parametrize(
    ("old", "dtype", "why"),
    [
        (np.float32(1e6), jnp.float16, "overflow"),
        (np.int32(300), np.int8, "too large"),
        (np.int8(3), np.float32, "does not become"),
        (np.complex64(1j), np.float32, "does not become"),
        (np.float32(1e4), ml_dtypes.float8_e4m3fn, "overflow"),
    ],
)
def test_values_that_do_not_fit_the_dtype_are_not_moved(old, dtype, why):
    params = {"a": np.zeros((), dtype)}
    new, account = transfer.graft(params, {"a": old})
    assert why in account.mismatched["a"].why
    assert new["a"] == params["a"]


def test_values_that_are_not_finite_are_told_of():
    _, account = transfer.graft({"a": np.zeros(2, np.float32)}, {"a": np.array([np.nan, 1], np.float32)})
    assert "1 values are not finite" in account.moved["a"].why


def test_sharding_is_kept():
    mesh = jax.make_mesh((8,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    new, _ = transfer.graft({"a": jax.device_put(jnp.zeros(16), sharding)}, {"a": np.arange(16, dtype=np.float32)})
    assert new["a"].sharding == sharding
    np.testing.assert_array_equal(new["a"], np.arange(16))


def test_arguments_of_no_use_are_refused():
    params = {"a": np.zeros(2, np.float32)}
    with pytest.raises(ValueError, match="missing is 'drop'"):
        transfer.graft(params, {}, missing="drop")
    with pytest.raises(ValueError, match="fresh: haed catches no leaf"):
        transfer.graft(params, {}, fresh=["haed"])
    with pytest.raises(TypeError, match="give a sequence"):
        transfer.graft(params, {}, fresh="a")
    with pytest.raises(ValueError, match="resize: b catches no leaf"):
        transfer.graft(params, {}, resize={"b": transfer.Units()})
    for name, meant in {"torch": "pytorch", "PyTorch": "pytorch", "tf": "keras", "nnx": "flax", "kears": "keras"}.items():
        with pytest.raises(ValueError, match=rf"layout is '{name}' \(did you mean '{meant}'\?\); give one of flax, pytorch"):
            transfer.graft(params, {}, layout=name)
    with pytest.raises(TypeError, match="'b' is a str"):
        transfer.graft(params, {"b": "text"})
    with pytest.raises(transfer.GraftError, match="nothing was moved to"):
        transfer.graft(params, {}, missing="raise")


def test_moving_nothing_warns_and_empty_trees_are_fine():
    with pytest.warns(UserWarning, match="graft moved nothing"):
        _, account = transfer.graft({"Dense_0": {"kernel": SQUARE}}, {"dense_0": {"kernel": SQUARE}})
    assert "the nearest is 'Dense_0/kernel'" in account.left_over["dense_0/kernel"].why
    assert transfer.graft({}, {}, strict=True) == ({}, transfer.Account())


def test_the_table_names_every_leaf_both_shapes_and_the_reason():
    _, account = transfer.graft(Net(nnx.Rngs(0)), pytorch_net(classes=5), rename=RENAME, layout="pytorch")
    table = account.table(width=200)
    assert table.splitlines()[0].startswith("8 moved, 2 kept, 1 left over, 2 mismatched")
    for part in ("head/kernel", "module/fc/weight", "5×3", "OI to IO", "does not fit (3, 2)"):
        assert part in table
    assert max(map(len, account.table(width=80).splitlines())) <= 80
