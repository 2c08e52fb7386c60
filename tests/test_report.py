"""The one table: look-up, text, JSON, difference."""

import json

import pytest

from varscale.report import Report, Row


def _row(path, second=1.0, how="exact"):
    return Row(path, "Dense", (2, 3), 0.0, second, second, second, (0.9, 1.1), how=how)


@pytest.fixture
def report():
    return Report((_row("a/b"), _row("c", 2.0, "sampled"), _row("", 4.0)))


def test_rows_are_found_by_path_and_the_output_is_the_model(report):
    assert report["a/b"].second_moment == 1.0
    assert report.output.path == ""
    with pytest.raises(KeyError, match="'a/b'"):
        report["a/c"]


def test_output_of_a_tuple_is_its_last_row():
    assert Report((_row("a"), _row("[0]"))).output.path == "[0]"


def test_shares_sum_to_one_and_stand_under_the_table(report):
    assert sum(report.shares.values()) == pytest.approx(1)
    text = report.table(width=100)
    assert "33% sampled" in text
    assert max(map(len, text.splitlines())) <= 100


def test_json_is_valid_and_replaces_what_is_not_finite():
    report = Report((_row("a", float("nan")),))
    assert json.loads(report.to_json())["rows"][0]["second_moment"] is None


def test_diff_is_relative(report):
    other = Report((_row("a/b", 1.5),))
    assert report.diff(other) == {"a/b": pytest.approx(0.5)}
