"""The one report: look-up, pictures, JSON, difference, comparison."""

import dataclasses
import json
import math
import re
import sys

import numpy as np
import pytest
from report_rows import INF, NAN, deep, measured, predicted

from varscale.report import Comparison, Histogram, Report, Weight


@pytest.fixture
def report():
    return Report((predicted("a/b"), predicted("c", 2.0, "sampled"), predicted("", 4.0)))


class TestLookUp:
    def test_rows_are_found_by_path_and_the_output_is_the_model(self, report):
        assert report["a/b"].second_moment == 1.0
        assert report.output.path == ""
        assert tuple(report) == report.rows
        with pytest.raises(KeyError, match="no row 'a/c' in this report of 3 rows; nearest: 'a/b'"):
            report["a/c"]

    def test_output_of_a_tuple_is_its_last_row(self):
        assert Report((predicted("a"), predicted("[0]"))).output.path == "[0]"

    def test_a_report_without_rows(self):
        empty = Report(())
        assert empty.table() == "path\n0 rows."
        assert empty.first_nonfinite is None
        assert Report.from_json(empty.to_json()) == empty
        with pytest.raises(ValueError, match="no rows, so it has no output"):
            _ = empty.output
        with pytest.raises(ValueError, match="without rows cannot be plotted"):
            empty.plot()

    def test_select_keeps_rows_and_weights_that_a_pattern_catches(self):
        weights = {path: Weight(path, (2,)) for path in ("blocks/1/norm/scale", "head/kernel")}
        report = dataclasses.replace(deep(3), weights=weights)
        found = report.select("blocks/1")
        assert [row.path for row in found.rows] == [row.path for row in report.rows if row.path.startswith("blocks/1")]
        assert list(found.weights) == ["blocks/1/norm/scale"]
        assert list(report.select("**/kernel").weights) == ["head/kernel"]
        assert [row.path for row in report.select([re.compile("^$"), "embed"]).rows] == ["embed", ""]
        with pytest.raises(ValueError, match="pattern='blocs/1' matches none of the 23 rows"):
            report.select("blocs/1")
        with pytest.raises(TypeError, match="pattern must be a pattern or a sequence"):
            report.select(3)  # pyright: ignore[reportArgumentType]

    def test_repr_is_short(self, report):
        assert repr(report) == "Report(3 rows: 67% exact, 33% sampled, 0 weights)"


class TestRecords:
    def full(self):
        row = measured(
            "a", INF, band=(0.0, INF), gradient=NAN, histogram=Histogram((1.0, 2.0), (-1.0, 0.0, 1.0)), custom={"l1/a": -INF}
        )
        weights = {"k": Weight("k", (2, 3), law="normal(std=0.1)", gradient=NAN, uses=2)}
        return Report((row, predicted("")), weights, ("A note.",))

    def test_what_json_gives_back_is_what_was_written(self):
        text = self.full().to_json(indent=1)
        json.loads(text, parse_constant=pytest.fail)
        back = Report.from_json(text)
        assert str(back) == str(self.full())
        assert back.to_json(indent=1) == text
        assert math.isnan(back["a"].gradient or 0.0)
        assert dataclasses.replace(back["a"], gradient=None) == dataclasses.replace(self.full()["a"], gradient=None)
        assert back.weights["k"].shape == (2, 3)

    def test_json_is_valid_and_replaces_what_is_not_finite(self):
        report = Report((predicted("a", NAN),))
        row = json.loads(report.to_json())["rows"][0]
        assert row["second_moment"] is None
        assert row["nonfinite"]["second_moment"] == "nan"

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"path": "a"}], "weights": []}', '{"rows": 3}', "nonsense"])
    def test_what_is_no_report_is_named(self, text):
        with pytest.raises(ValueError, match=r"text must be the JSON that Report.to_json writes"):
            Report.from_json(text)

    def test_an_unknown_field_is_named(self):
        text = self.full().to_json().replace('"kurtosis"', '"kurtosi"')
        with pytest.raises(ValueError, match="a Row has no field kurtosi"):
            Report.from_json(text)

    def test_records_are_plain(self):
        record = self.full().to_records()[0]
        assert record["path"] == "a"
        assert record["histogram"] == {"counts": (1.0, 2.0), "edges": (-1.0, 0.0, 1.0)}

    def test_a_row_is_hashable(self):
        assert len({self.full()["a"], predicted("")}) == 2

    def test_html_escapes_and_holds_all_columns(self):
        html = Report((measured("<b>", dtype="float32", nonfinite_share=0.5, custom={"l&1": 2.0}),))._repr_html_()
        assert "&lt;b&gt;" in html
        assert "l&amp;1" in html
        assert "float32" in html
        assert "color:#b3261e" in html
        assert "<b>" not in html

    def test_a_histogram_checks_its_edges(self):
        with pytest.raises(ValueError, match="edges must have one more element than counts, not 2 for 2 counts"):
            Histogram((1.0, 2.0), (0.0, 1.0))

    def test_diff_is_relative(self, report):
        other = Report((predicted("a/b", 1.5),))
        assert report.diff(other) == {"a/b": pytest.approx(0.5)}


class TestCompare:
    def test_each_row_is_inside_its_band_or_outside(self):
        ours = Report((measured("a", 1.05), measured("b", 1.15), measured("c", 1.3), measured("only"), measured("", NAN)))
        theirs = Report((predicted("a"), predicted("b", error_bound=0.1), predicted("c"), predicted("other"), predicted("")))
        found = ours.compare(theirs)
        assert isinstance(found, Comparison)
        assert [row.inside for row in found.rows] == [True, True, False, False]
        assert [row.path for row in found.outside] == ["c", ""]
        assert (found.only_measured, found.only_predicted) == (("only",), ("other",))
        assert found["b"].band == pytest.approx((0.81, 1.21))
        assert "OUTSIDE" in str(found)
        assert "2 of 4 rows inside" in str(found)
        assert repr(found) == "Comparison(4 rows, 2 outside)"
        assert max(map(len, found.table(60).splitlines())) <= 60
        assert found.to_records()[0]["measured"] == 1.05
        assert "<table>" in found._repr_html_()
        with pytest.raises(KeyError, match="no row 'zzz' is in both"):
            found["zzz"]

    def test_gradients_are_compared_up_to_the_scale_at_the_output(self):
        shape = (100, 100)
        ours = [measured("a", gradient=0.02), measured("b", gradient=0.5), measured("", gradient=0.01, shape=shape)]
        theirs = [
            predicted(path, gradient=g, gradient_error_bound=0.05, band=(0.95, 1.05))
            for path, g in zip("ab", (2.0, 3.0), strict=True)
        ]
        theirs.append(
            dataclasses.replace(predicted("", gradient=1.0, gradient_error_bound=0.05), shape=shape, band=(0.95, 1.05))
        )
        found = Report(tuple(ours)).compare(Report(tuple(theirs)))
        assert found.gradient_scale == pytest.approx(0.01)
        assert [row.gradient_inside for row in found.rows] == [True, False, True]
        assert found["a"].predicted_gradient == pytest.approx(0.02)
        assert "Backward: 2 of 3." in str(found)
        assert [row.path for row in found.outside] == ["b"]

    def test_an_unbounded_band_holds_everything(self):
        ours = Report((measured("a", 1e30, gradient=1.0), measured("", gradient=1.0)))
        theirs = Report(
            (predicted("a", INF, band=(0.0, INF), error_bound=INF, gradient=1.0), predicted("", gradient=1.0, band=(0.0, INF)))
        )
        assert ours.compare(theirs).outside == ()

    def test_bad_reports_are_named(self, report):
        ours = Report((measured("a/b"),))
        with pytest.raises(ValueError, match="predicted must be a report with bands"):
            ours.compare(ours)
        with pytest.raises(ValueError, match=r"measured\.compare\(predicted\)"):
            report.compare(report)
        with pytest.raises(ValueError, match="paths in common with this report; it has 'a/b', this one 'z'"):
            Report((measured("z"),)).compare(report)
        with pytest.raises(TypeError, match="predicted must be a Report, not dict"):
            ours.compare({})  # pyright: ignore[reportArgumentType]


class TestPlot:
    """What the panels hold. The pictures themselves were opened and looked at."""

    @pytest.fixture(autouse=True)
    def _closed(self):
        yield
        import matplotlib.pyplot as plt

        plt.close("all")

    def histogram(self):
        counts, edges = np.histogram(np.random.default_rng(0).normal(size=100), 8)
        return Histogram(tuple(map(float, counts)), tuple(map(float, edges)))

    def test_predicted(self, tmp_path):
        rows = [predicted(f"l{i}", 2.0**i, gradient=0.5**i, gradient_error_bound=0.1) for i in range(5)]
        figure = Report(tuple(rows)).plot()
        forward, backward = figure.axes
        assert forward.get_yscale() == backward.get_yscale() == "log"
        assert list(forward.lines[0].get_ydata()) == [2.0**i for i in range(5)]
        assert len(forward.collections) == len(backward.collections) == 1
        assert [label.get_text() for label in backward.get_xticklabels()] == [f"l{i}" for i in range(5)]
        figure.savefig(tmp_path / "plot.png")

    def test_measured_with_zeros_nans_and_histograms(self):
        rows = [measured(f"l{i}", y, histogram=self.histogram()) for i, y in enumerate((1.0, 0.0, NAN, INF, 1e-20))]
        figure = Report(tuple(rows)).plot()
        forward, below = figure.axes
        points = np.asarray(forward.lines[0].get_ydata())
        np.testing.assert_array_equal(np.isfinite(points), [True, False, False, False, True])
        assert [text.get_text() for text in forward.texts] == ["not finite"] * 2
        assert forward.lines[1].get_marker() == "v"
        assert len(below.collections) == 2
        figure.canvas.draw()

    def test_compared(self):
        ours = Report(tuple(measured(f"l{i}", 1.1, gradient=1.0, kind=f"K{i}") for i in range(9)))
        theirs = Report(tuple(predicted(f"l{i}", gradient=2.0) for i in range(8)))
        figure = ours.compare(theirs).plot()
        assert len(figure.axes) == 2
        assert len(figure.axes[0].lines) == 1 + 9
        np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), 1.0)
        figure.canvas.draw()

    def test_a_thousand_rows_have_labels_that_can_be_read(self):
        figure = deep(170).plot()
        assert len(figure.axes[0].get_xticks()) <= 48
        assert figure.get_size_inches()[0] <= 16

    def test_without_matplotlib_the_extra_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r"pip install 'varscale\[plot\]'"):
            deep(1).plot()
