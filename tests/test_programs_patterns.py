"""Globs over the paths of rows: the matcher of parameters, with brackets literal."""

import re
import warnings

import pytest

from varscale.programs.patterns import matches, matches_row, rows_caught

PATHS = ["embed", "blocks/0/attn", "blocks/0[0]", "blocks/0[1]", "blocks/1@3", "blocks/1#2", "child.encode", "['k']", "[0]", ""]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**", PATHS),
        ("blocks/0", ["blocks/0/attn", "blocks/0[0]", "blocks/0[1]"]),
        ("blocks/*[1]", ["blocks/0[1]"]),
        ("blocks/0[?]", ["blocks/0[0]", "blocks/0[1]"]),
        ("blocks/[01]", None),
        ("**/attn", ["blocks/0/attn"]),
        ("**/1@*", ["blocks/1@3"]),
        ("**/1#2", ["blocks/1#2"]),
        ("child", ["child.encode"]),
        ("child.encode", ["child.encode"]),
        ("['k']", ["['k']"]),
        ("[0]", ["[0]"]),
        ("{embed,child}", ["embed", "child.encode"]),
        ("block", None),
        (re.compile("^$"), [""]),
        (re.compile(r"^blocks/\d\["), ["blocks/0[0]", "blocks/0[1]"]),
        (["embed", "**/attn"], ["embed", "blocks/0/attn"]),
    ],
    ids=str,
)
def test_rows_caught(pattern, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if expected is None:
            with pytest.raises(ValueError, match=r"rows='.*' matches none of the 10 rows: 'embed'"):
                rows_caught(pattern, PATHS, "rows")
        else:
            assert rows_caught(pattern, PATHS, "rows") == tuple(expected)


def test_every_path_without_wildcards_catches_itself():
    for path in PATHS[:-1]:
        assert matches_row(path, path)


def test_brackets_stay_sets_for_parameters():
    assert matches("blocks/[01]/w", "blocks/1/w")
    assert not matches("blocks/[!01]/w", "blocks/1/w")


def test_bad_patterns_are_named():
    with pytest.raises(TypeError, match="rows must be a pattern or a sequence of patterns, not 3"):
        rows_caught(3, PATHS, "rows")
    with pytest.raises(TypeError, match="a pattern is 3 of type int"):
        rows_caught([3], PATHS, "rows")
    with pytest.raises(ValueError, match=r"rows must hold at least one pattern, not \[\]"):
        rows_caught([], PATHS, "rows")
    with pytest.raises(ValueError, match="never closes"):
        rows_caught("{a", PATHS, "rows")
