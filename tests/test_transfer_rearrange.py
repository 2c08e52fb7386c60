"""Surgery on checkpoints: every operation against its inverse, and what it says where it does not apply."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from varscale import transfer
from varscale.programs.patterns import canonical, matches, substitute


def pieces(**arrays) -> list[transfer.Piece]:
    return [transfer.Piece(name.replace("__", "/"), np.asarray(value), (name,)) for name, value in arrays.items()]


def numbers(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@given(groups=st.integers(1, 3), parts=st.integers(2, 3), size=st.integers(1, 3), axis=st.sampled_from([0, 1, -1]))
def test_join_undoes_split(groups, parts, size, axis):
    length = groups * parts * size
    packed = numbers(length, length)
    names = tuple("abc"[:parts])
    apart = transfer.Split("net/qkv", names, axis=axis, groups=groups)(pieces(net__qkv__weight=packed))
    assert [piece.path for piece in apart] == [f"net/{name}/weight" for name in names]
    (joined,) = transfer.Join("net", names, "qkv", axis=axis, groups=groups)(apart)
    assert joined.path == "net/qkv/weight"
    np.testing.assert_array_equal(joined.value, packed)


def test_parts_of_unequal_sizes():
    apart = transfer.Split("qkv", ("q", "k", "v"), sizes=(4, 1, 1))(pieces(qkv=numbers(6, 2)))
    assert [piece.value.shape for piece in apart] == [(4, 2), (1, 2), (1, 2)]
    with pytest.raises(ValueError, match="length 6, which is not 1 x 3 parts of"):
        transfer.Split("qkv", ("q", "k", "v"), sizes=(4, 1, 2))(pieces(qkv=numbers(6, 2)))


@given(layers=st.integers(1, 12))
def test_unstack_undoes_stack(layers):
    loose = pieces(**{f"h__{i}__w": numbers(2, 3) + i for i in reversed(range(layers))})
    (stacked,) = transfer.Stack("h/*", "h")(loose)
    np.testing.assert_array_equal(stacked.value[:, 0, 0], np.arange(layers))
    assert stacked.sources == tuple(f"h__{i}__w" for i in range(layers)), "layer 10 comes after layer 9"
    apart = transfer.Unstack("h", "h/*")([stacked])
    assert {piece.path: piece.value[0, 0] for piece in apart} == {f"h/{i}/w": i for i in range(layers)}


def test_unstacked_layers_reach_a_list_of_modules():
    params = {f"block_{i}": {"kernel": np.zeros((2, 2), np.float32)} for i in range(3)}
    new, account = transfer.graft(
        params, {"blocks": {"kernel": numbers(3, 2, 2)}}, rearrange=transfer.Unstack("blocks", "block_*"), strict=True
    )
    np.testing.assert_array_equal(new["block_2"]["kernel"], numbers(3, 2, 2)[2])
    assert account.moved["block_1/kernel"].sources == ("blocks/kernel",)


def test_a_part_that_finds_no_place_is_told_of():
    params = {"q": np.zeros((2, 2), np.float32)}
    _, account = transfer.graft(params, {"qk": numbers(4, 2)}, rearrange=transfer.Split("qk", ("q", "k")))
    assert account.moved["q"].sources == ("qk",)
    assert "the part k" in account.left_over["qk"].why


@pytest.mark.parametrize(
    ("operation", "match"),
    [
        (transfer.Split("nothing", ("a", "b")), "catches nothing"),
        (transfer.Split("w", ("a", "b", "c")), "not 1 x 3 equal parts"),
        (transfer.Split("w", ("a", "b"), axis=2), "no axis 2"),
        (transfer.Join("", ("w", "missing"), "x"), "w only, not w, missing"),
        (transfer.Join("", ("w", "b"), "x"), "do not fit together"),
        (transfer.Stack("w", "x"), "no number in the place"),
        (transfer.Stack("l/*", "l"), "numbered from 0 without a gap"),
        (transfer.Unstack("w", "w"), "must have a '*'"),
        (transfer.Unstack("s", "s/*"), "is a scalar"),
        (transfer.Permute("w", 0, (2, 3), (1, 0)), "has length 4, not 6"),
        (transfer.Permute("w", 0, (2, 2), (1, 1)), "each axis of shape"),
        (transfer.Transpose("w", (0, 1, 2)), "each of its axes once"),
    ],
)
def test_operations_that_do_not_apply_say_so(operation, match):
    with pytest.raises(ValueError, match=match):
        operation(pieces(w=numbers(4, 2), b=numbers(3, 3), s=1.0, l__1=numbers(2), l__3=numbers(2)))


def test_apply_is_any_function_of_an_array():
    _, account = transfer.graft(
        {"scale": np.zeros(2)},
        {"scale": np.ones(2)},
        rearrange=transfer.Apply("scale", lambda w: w + 1, "1 added"),
        strict=True,
    )
    assert account.moved["scale"].why == "1 added"


@pytest.mark.parametrize(
    ("glob", "path", "caught"),
    [
        ("head", "head/kernel", True),
        ("head", "header/kernel", False),
        ("*", "anything/below", True),
        ("*/bias", "a/bias", True),
        ("*/bias", "a/b/bias", False),
        ("**/bias", "a/b/bias", True),
        ("**/bias", "bias", True),
        ("a/**/b", "a/b", True),
        ("a/**/b", "a/x/y/b/c", True),
        ("blocks.[0-2]", "blocks/1/w", True),
        ("blocks/[!0-2]", "blocks/1/w", False),
        ("{q,k}_proj", "k_proj", True),
        ("a?c", "abc", True),
        ("", "everything", True),
        ("a+b", "a+b", True),
        ("a+b", "aab", False),
    ],
)
def test_globs(glob, path, caught):
    assert matches(glob, path) == caught


@given(st.lists(st.sampled_from(["a", "b", "h0", "kernel"]), min_size=1, max_size=5).map("/".join))
def test_a_glob_put_in_its_own_place_changes_nothing(path):
    for glob in ("**", "*/**", "**/kernel", "h*", "**/a/**", path):
        assert substitute(glob, glob, path) in (None, path)
    assert canonical(path.replace("/", ".")) == path


def test_a_glob_that_is_no_glob():
    with pytest.raises(ValueError, match="never closes it"):
        matches("a[0", "a")
    with pytest.raises(TypeError, match="give a glob"):
        transfer.graft({"a": np.zeros(1)}, {"a": np.zeros(1)}, rename={3: "b"})
