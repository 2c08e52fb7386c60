"""A report as text: tables that fit the terminal, folded rows, the first row that is not finite."""

import os
import pty
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_rows import INF, NAN, deep, measured, predicted

from varscale.report import FirstNonfinite, Report, Weight
from varscale.reporting.columns import row_columns
from varscale.reporting.folding import folded, one_each


@pytest.fixture
def report():
    return Report((predicted("a/b"), predicted("c", 2.0, "sampled"), predicted("", 4.0)))


class TestTable:
    def test_shares_sum_to_one_and_stand_under_the_table(self, report):
        assert sum(report.shares.values()) == pytest.approx(1)
        assert "33% sampled" in report.table(width=100)

    @given(
        st.lists(
            st.tuples(
                st.text("abé層/_0[]'", max_size=60),
                st.one_of(st.floats(), st.just(0.0)),
                st.one_of(st.none(), st.floats(1e-300, 1e300)),
                st.one_of(st.none(), st.floats(0, 1)),
            ),
            max_size=6,
        ),
        st.integers(40, 200),
    )
    def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(self, values, width):
        from rich.cells import cell_len

        rows = [
            measured(path, second, gradient=gradient, zero_share=share, nonfinite_share=share, custom={"own/l1": second})
            for path, second, gradient, share in values
        ]
        text = Report(tuple(rows)).table(width)
        assert max(map(cell_len, text.splitlines())) <= width
        for row in rows:
            assert any(f"{row.second_moment:.3g}" in line.split() for line in text.splitlines())
        body = "\n".join(line for line in text.splitlines() if "Not shown" not in line)
        assert "..." not in body
        assert "…" not in body

    @pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
    def test_columns_are_left_out_in_the_stated_order(self, width):
        """The order of the docstring; the columns that are shown are always its beginning."""
        full = measured(
            "layer",
            **dict.fromkeys(("sample_correlation", "position_correlation", "gradient", "largest_magnitude", "zero_share"), 0.1),
            **dict.fromkeys(("nonfinite_share", "overflow_share", "underflow_share", "dead_share", "saturated_share"), 0.1),
            **dict.fromkeys(("channel_mean_squared", "kurtosis", "gradient_nonfinite_share"), 0.1),
            dtype="float32",
            custom={"mine": 0.1},
        )
        stated = " ".join((Report.table.__doc__ or "").split("first: ")[1].split(". The last")[0].split())
        order = ["mine" if name == "own reducers" else name for name in stated.split(", ")]
        for row in (full, predicted("layer", sample_correlation=0.1, gradient=0.1, gradient_error_bound=0.1)):
            report = Report((row, measured("x", how="assumed")))
            missing = " ".join(report.table(width).split()).partition("Not shown at this width: ")[2].removesuffix(".")
            left_out = missing.split(", ") if missing else []
            present = [column.header for column in row_columns(one_each(report.rows))[1:]]
            assert set(present) <= set(order)
            present.sort(key=order.index)
            assert sorted(left_out) == sorted(present[len(present) - len(left_out) :])
            assert bool(left_out) == (width < max(map(len, report.table(500).splitlines())))

    def test_a_column_that_holds_nothing_is_not_shown(self, report):
        text = report.table(200)
        assert "sample" not in text.splitlines()[0] + text.splitlines()[1]
        assert "typical" in text
        assert "how" not in Report((measured("a"),)).table(200)
        assert "not" not in Report((measured("a", nonfinite_share=0.0),)).table(200)

    def test_color_changes_no_character(self):
        report = Report((measured("a", nonfinite_share=0.5), predicted("b", how="assumed"), measured("")))
        plain, colored = report.table(80), report.table(80, color=True)
        assert re.sub(r"\x1b\[\d+m", "", colored) == plain
        lines = [line for line in colored.splitlines() if "\x1b" in line]
        assert [line[:5] for line in lines[-2:]] == ["\x1b[31m", "\x1b[33m"]
        assert "1 rows hold a NaN or an infinity" in plain

    def test_brackets_of_paths_are_printed(self):
        """Rich would take "[k]" for a style."""
        assert "layer[k][0]" in Report((measured("layer[k][0]"),)).table()

    def test_width_below_forty_is_refused(self, report):
        with pytest.raises(ValueError, match="width must be at least 40 columns, not 39"):
            report.table(39)

    def test_notes_stand_under_the_table(self):
        note = "Gradients are None: the loss uses forward-mode differentiation, which the marks do not support."
        text = Report((measured("a"),), notes=(note,)).table(60)
        assert note in " ".join(text.split())
        assert max(map(len, text.splitlines())) <= 60

    def test_weights_have_a_table_of_their_own(self):
        weights = {"k": Weight("k", (2, 3), gradient=0.5, gradient_ratio=1e-3), "b": Weight("b", (3,), gradient=NAN)}
        text = Report((), weights).weight_table(60)
        assert "0.001" in text
        assert "nan" in text
        assert "fan in" not in text

    @pytest.mark.parametrize("color", [False, True])
    def test_in_a_real_terminal_of_eighty_columns(self, color, tmp_path):
        """A child process prints to a pseudo-terminal of 80 columns and asks it for its width."""
        (tmp_path / "report.json").write_text(deep(3, predicted).to_json())
        script = (
            "import sys; from varscale.report import Report;"
            f"print(Report.from_json(open(sys.argv[1]).read()).table(color={color}))"
        )
        parent, child = pty.openpty()
        import fcntl
        import struct
        import termios

        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "report.json")], stdout=child, stdin=child, env=environment
        )
        os.close(child)
        written = b""
        while True:
            try:
                part = os.read(parent, 65536)
            except OSError:  # the child closed its end
                break
            if not part:
                break
            written += part
        assert process.wait() == 0
        lines = re.sub(r"\x1b\[\d+m", "", written.decode()).splitlines()
        assert ("\x1b[1m" in written.decode()) == color
        assert len(lines) > 20
        assert 60 < max(map(len, lines)) <= 80
        assert any(line.startswith("blocks/2/mlp/down") and "3.4" in line.split() for line in lines)


class TestFolding:
    def test_thirty_equal_blocks_are_one(self):
        text = deep().table(80, fold=True)
        body = [line.split() for line in text.splitlines()]
        assert len(body) < 15
        assert [line for line in body if "up" in line[0]] == [
            ["blocks/{0..29}/mlp/up", "Dense", "2×3", "0", "1.3..30.3", "1.3..30.3"]
        ]
        assert [line[0] for line in body if line[0] in ("embed", "head", "(model)")] == ["embed", "head", "(model)"]

    def test_the_run_that_covers_most_is_folded(self):
        """Dense_0 to Dense_2 repeat inside a block, and the blocks repeat."""
        rows = [measured(f"b{i}/Dense_{k}") for i in range(5) for k in range(3)]
        text = Report(tuple(rows)).table(fold=True)
        assert [line.split()[0] for line in text.splitlines() if "Dense" in line] == [f"b{{0..4}}/Dense_{k}" for k in range(3)]

    def test_other_shapes_and_kinds_are_not_folded(self):
        rows = [measured(f"l{i}", shape=(2, i)) for i in range(6)] + [measured(f"m{i}", kind=f"K{i}") for i in range(6)]
        assert Report(tuple(rows)).table(fold=True).count("..") == 0

    def test_a_fold_shows_what_is_not_finite(self):
        rows = [measured(f"l{i}", NAN if i == 3 else 1.0, nonfinite_share=0.1 * (i == 3)) for i in range(6)]
        text = Report(tuple(rows)).table(fold=True, color=True)
        assert "1..nan" in text
        assert "\x1b[31m" in text

    @given(st.lists(st.sampled_from(["a0", "a1", "b/0", "b/1", "c"]), max_size=30))
    def test_every_row_is_in_one_line(self, paths):
        rows = [measured(path) for path in paths]
        lines = folded(rows)
        assert sorted(map(id, rows)) == sorted(id(row) for line in lines for row in line.rows)

    def test_ten_thousand_rows_are_folded_quickly(self):
        rows = [measured(f"layers/{i}/{name}") for i in range(2500) for name in ("a", "b", "c", "d")]
        assert len(folded(rows)) == 4


class TestFirstNonfinite:
    def bad(self, path, share=0.1, second=NAN):
        return measured(path, second, nonfinite_share=share, largest_magnitude=INF, dtype="bfloat16")

    def good(self, path, gradient_share=None):
        fields = {"nonfinite_share": 0.0, "largest_magnitude": 3e38, "dtype": "bfloat16"}
        return measured(path, gradient_nonfinite_share=gradient_share, **fields)

    def test_nothing_is_found_where_all_is_finite(self):
        assert Report((self.good("a"), measured("b"))).first_nonfinite is None

    def test_a_mean_square_that_overflows_is_no_infinity(self):
        assert Report((self.bad("a", 0.0, INF),)).first_nonfinite is None

    def test_forward(self):
        rows = [*(self.good(f"l{i}") for i in range(15)), self.bad("x"), self.bad("y")]
        found = Report(tuple(rows)).first_nonfinite
        assert isinstance(found, FirstNonfinite)
        assert (found.path, found.direction) == ("x", "forward")
        assert [row.path for row in found.before] == [f"l{i}" for i in range(15)]
        text = found.table(80)
        assert "forward pass, x (Dense); 10% of the output is not finite" in text
        assert len(text.splitlines()) <= 24
        assert max(map(len, text.splitlines())) <= 80
        assert "l14" in text
        assert "(5 finite rows before)" in text
        assert "3e+38 in bfloat16" in text
        assert str(found) == found.table()

    def test_the_first_row_of_all(self):
        found = Report((self.bad("x"),)).first_nonfinite
        assert found is not None
        assert found.before == ()
        assert "No row precedes it" in str(found)

    def test_backward_runs_from_the_last_row(self):
        rows = [self.good("a", 1.0), self.good("b", 0.2), self.good("c", 0.0), self.good("", 0.0)]
        found = Report(tuple(rows)).first_nonfinite
        assert found is not None
        assert (found.path, found.direction) == ("b", "backward")
        assert [row.path for row in found.before] == ["", "c"]
        assert "20% of the gradient is not finite" in " ".join(str(found).split())

    def test_a_parameter_whose_gradient_alone_is_not_finite(self):
        weights = {"a/kernel": Weight("a/kernel", (3,), gradient=NAN, gradient_nonfinite_share=0.5)}
        found = Report((self.good("a", 0.0),), weights).first_nonfinite
        assert found is not None
        assert (found.path, found.direction) == ("a/kernel", "backward")
        assert "parameter a/kernel" in str(found)

    def test_parameters_that_are_not_finite_are_named(self):
        weights = {"x/kernel": Weight("x/kernel", (3,), nonfinite_share=0.5)}
        found = Report((self.good("a"), self.bad("x")), weights).first_nonfinite
        assert "Parameters that are not finite themselves: x/kernel." in str(found)

    def test_predicted_rows_are_judged_by_their_moments(self):
        found = Report((predicted("a"), predicted("b", INF))).first_nonfinite
        assert found is not None
        assert found.path == "b"
