"""Claims, the runner, the registry, the report and the command line, with an experiment that takes no time."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.__main__ import main
from experiments.lab import plots, registry, report, runner, storage
from experiments.lab.claims import (
    Claim,
    Measured,
    Refuted,
    accuracy,
    at_least,
    at_most,
    between,
    every,
    exactly,
    known,
    near,
    number,
    over_seeds,
    share,
)
from experiments.lab.experiment import ExperimentError, Figure, Introduction, Quiet, Result, Run, Settings, Table


def claim(expected, measured) -> Claim:
    return Claim("", expected, measured, unit="")


class TestClaims:
    @given(st.floats(-5, 5), st.floats(0, 2), st.floats(0, 3))
    def test_verdict_follows_from_interval_and_band(self, value, half, tolerance):
        made = claim(near(0.0, tolerance, source=""), Measured(value, value - half, value + half, 3))
        inside = -tolerance <= value - half and value + half <= tolerance
        outside = value + half < -tolerance or value - half > tolerance
        assert made.verdict == ("holds" if inside else "does not hold" if outside else "inconclusive")

    def test_an_inequality_needs_the_whole_interval(self):
        assert claim(at_least(1.0, source=""), Measured(2.0, 1.1, 2.9, 5)).holds
        assert claim(at_least(1.0, source=""), Measured(2.0, 0.9, 3.1, 5)).verdict == "inconclusive"
        assert claim(at_most(1.0, source=""), Measured(2.0, 1.1, 2.9, 5)).verdict == "does not hold"
        assert claim(between(0.0, 1.0, source=""), known(1.0)).holds
        assert claim(exactly(0.0, source=""), known(1e-300)).verdict == "does not hold"

    def test_what_is_not_a_number_does_not_hold(self):
        assert claim(at_least(-math.inf, source=""), over_seeds([1.0, math.nan])).verdict == "does not hold"
        assert claim(at_least(0.0, source=""), over_seeds([1.0, math.inf])).verdict == "does not hold"

    def test_one_seed_is_inconclusive(self):
        assert claim(near(0.0, 100.0, source=""), over_seeds([0.0])).verdict == "inconclusive"

    def test_one_seed_has_no_interval_and_says_so(self):
        one = claim(near(0.0, 100.0, source=""), over_seeds([0.5]))
        assert str(one.measured) == "0.5 (one seed, no interval)"
        assert one.to_decide == "2 seeds or more would give an interval"

    def test_what_would_decide_a_claim_is_about_right(self):
        """As many seeds as are named give an interval that fits, at the same mean and spread; 40 % of them do not."""
        draws = np.array([0.0, 1.0, 2.0, 1.0]) + 0.2
        made = claim(at_least(1.0, source=""), over_seeds(draws))
        assert made.verdict == "inconclusive"
        count = int(made.to_decide.split()[1])
        assert count == 120  # (2.576·√(2/3)/.2)² = 111, rounded up to two digits
        assert claim(at_least(1.0, source=""), over_seeds(np.resize(draws, count))).holds
        assert not claim(at_least(1.0, source=""), over_seeds(np.resize(draws, 4 * (count // 10)))).holds
        assert claim(at_least(1.2, source=""), over_seeds(draws)).to_decide.startswith("no practical number")
        assert claim(at_least(0.0, source=""), known(1.0)).to_decide == ""

    def test_accuracies_end_at_one(self):
        values = [0.98, 1.0, 1.0]
        assert over_seeds(values).high > 1
        assert (accuracy(values).high, accuracy([0.7]).low, accuracy([0.7]).high) == (1.0, 0.0, 1.0)
        assert accuracy([0.01, 0.0]).low == 0.0

    def test_interval_is_students(self):
        draws = [1.0, 2.0, 4.0, 5.0]
        measured = over_seeds(draws)
        half = 5.840909 * float(np.std(draws, ddof=1)) / 2  # t at 99.5 %, 3 degrees of freedom
        np.testing.assert_allclose([measured.value, measured.low, measured.high], [3.0, 3.0 - half, 3.0 + half], rtol=1e-6)

    def test_share_is_clopper_and_pearsons(self):
        none, all_ = share(0, 20), share(20, 20)
        assert (none.low, all_.high) == (0.0, 1.0)
        np.testing.assert_allclose(all_.low, 0.005 ** (1 / 20), rtol=1e-9)  # in closed form where all succeed
        np.testing.assert_allclose(none.high, 1 - all_.low, rtol=1e-9)

    def test_every_shows_its_weakest_case(self):
        band = near(0.0, 1.0, source="")
        cases = [("a", band, known(0.0)), ("b", band, Measured(0.5, -2, 2, 3)), ("c", band, known(0.9))]
        assert every("all", cases, unit="").verdict == "inconclusive"
        assert "3: b" in every("all", cases, unit="").sentence
        assert "d" in every("all", [*cases, ("d", band, known(7.0))], unit="").sentence
        with pytest.raises(ValueError, match="no cases"):
            every("all", [], unit="")

    def test_numbers_are_short(self):
        assert [number(x) for x in (0.12345, -0.0, 1e-9, math.inf, math.nan)] == ["0.1235", "0", "1e−09", "∞", "not a number"]


@dataclass(frozen=True)
class Fake(registry.Entry):
    """An experiment of two parts, the second of which can be made to fail."""

    computed: list = None  # type: ignore[assignment]
    fail: bool = False
    holds: bool = True
    measured: Measured | None = None

    def load(self):
        def second():
            self.computed.append("second")
            if self.fail:
                raise KeyboardInterrupt
            return {"y": np.arange(3.0)}

        def run(run: Run) -> Result:
            x = run.part("first", lambda: self.computed.append("first") or {"x": np.ones(2)})["x"]
            y = run.part("second", second)["y"]
            picture, ((axes,),) = plots.figure(height=1.0)
            axes.plot(y)
            expected = near(1.0 if self.holds else 2.0, 0.5, source="a | pipe")
            refuted = Refuted("the opposite", "Because.", by="Notes 2020")
            return Result(
                Introduction("no data", "no net", "ones", ("Notes 2020",)),
                [Claim("x is [one]", expected, self.measured or known(x.mean()), unit="mean of x", refutes=refuted)],
                [Table("Rows [b]", ("name", "value"), [("a|b", 1.5), ("c", math.nan)])],
                [Figure("line", "A line.", picture)],
                data={"y": y, "bad": math.inf},
            )

        return SimpleNamespace(run=run, Settings=Settings)


def fake(**options) -> Fake:
    path = Path(__file__).parents[1] / "experiments" / "lab" / "claims.py"
    return Fake("fake-one", "A title", 1, (), path, computed=[], **options)


class Heard(Quiet):
    """Progress that keeps what is said."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


class TestRunner:
    def test_writes_all_and_nothing_else(self, tmp_path):
        record = runner.run_one(fake(), Settings(out=tmp_path), Quiet())
        folder = tmp_path / "fake-one"
        assert sorted(p.name for p in folder.iterdir()) == ["line.png", "report.html", "report.md", "results.json"]
        stored = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
        assert stored == record
        assert stored["data"]["bad"] is None
        assert stored["claims"][0]["verdict"] == "holds"
        assert [p.name for p in tmp_path.iterdir()] == ["fake-one"]

    def test_interrupted_leaves_no_results_and_resumes_with_what_is_missing(self, tmp_path):
        entry = fake()
        with pytest.raises(KeyboardInterrupt):
            runner.run_one(replace(entry, fail=True), Settings(out=tmp_path), Quiet())
        assert not (tmp_path / "fake-one").exists()
        heard = Heard()
        runner.run_one(entry, Settings(out=tmp_path, resume=True), heard)
        assert entry.computed == ["first", "second", "second"]
        assert heard.lines == ["fake-one: reused the parts first; computed second"]
        runner.run_one(entry, Settings(out=tmp_path, resume=True), heard)
        assert len(entry.computed) == 3  # the results are there
        assert "fake-one: reused the results of 20" in heard.lines[1]
        runner.run_one(entry, Settings(out=tmp_path, resume=True, seed=1), heard)
        assert heard.lines[2] == "fake-one: found nothing to reuse; computed first, second"

    def test_other_options_and_a_missing_file_are_computed_anew(self, tmp_path):
        entry = fake()
        runner.run_one(entry, Settings(out=tmp_path), Quiet())
        runner.run_one(entry, Settings(out=tmp_path, seed=1, resume=True), Quiet())
        assert len(entry.computed) == 4
        (tmp_path / "fake-one" / "line.png").unlink()
        runner.run_one(entry, Settings(out=tmp_path, seed=1, resume=True), Quiet())
        assert len(entry.computed) == 6

    def test_a_damaged_part_is_computed_anew(self, tmp_path):
        entry = fake()
        with pytest.raises(KeyboardInterrupt):
            runner.run_one(replace(entry, fail=True), Settings(out=tmp_path), Quiet())
        (part,) = (tmp_path / ".parts").rglob("first.npz")
        part.write_bytes(part.read_bytes()[:20])
        runner.run_one(entry, Settings(out=tmp_path, resume=True), Quiet())
        assert entry.computed == ["first", "second", "first", "second"]

    def test_a_failed_rerun_keeps_the_old_results(self, tmp_path):
        entry = fake()
        before = runner.run_one(entry, Settings(out=tmp_path), Quiet())
        with pytest.raises(KeyboardInterrupt):
            runner.run_one(replace(entry, fail=True), Settings(out=tmp_path, seed=5), Quiet())
        assert json.loads((tmp_path / "fake-one" / "results.json").read_text()) == before

    def test_the_users_files_survive(self, tmp_path):
        runner.run_one(fake(), Settings(out=tmp_path), Quiet())
        (tmp_path / "fake-one" / "my-notes.txt").write_text("mine")
        runner.run_one(fake(), Settings(out=tmp_path), Quiet())
        assert (tmp_path / "fake-one" / "my-notes.txt").read_text() == "mine"

    def test_a_folder_that_is_not_ours_is_left_alone(self, tmp_path):
        (tmp_path / "fake-one").mkdir()
        (tmp_path / "fake-one" / "thesis.txt").write_text("mine")
        with pytest.raises(ExperimentError, match="holds no results of ours"):
            runner.run_one(fake(), Settings(out=tmp_path), Quiet())

    def test_all_writes_one_report(self, tmp_path):
        other = replace(fake(holds=False), name="fake-two", title="Another")
        records = runner.run_all([fake(), other], Settings(out=tmp_path), Quiet())
        assert report.tally(records) == "1 of 2 claims hold (1 does not hold)"
        assert not report.succeeded(records)
        text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
        assert "![A line.](fake-one/line.png)" in text
        assert page.count("data:image/png;base64,") == 2
        assert 'src="fake' not in page
        assert 'class="red">✗&nbsp;does not hold' in page
        assert "a | pipe" in page
        assert '<a id="fake-two"></a>' in page  # an anchor that no renderer makes otherwise
        assert '<a href="#fake-two">fake-two</a>' in page

    def test_a_report_says_where_it_comes_from_and_what_it_is_about(self, tmp_path):
        record = runner.run_one(fake(), Settings(out=tmp_path, quick=True), Quiet())
        text = (tmp_path / "fake-one" / "report.md").read_text()
        assert f"Made by `python -m experiments fake-one --quick --out {tmp_path}` on 20" in text
        assert f"commit {record['origin']['commit']}" in text
        assert all(f"{name} {version}" in text for name, version in record["origin"]["versions"].items())
        assert {"python", "varscale", "jax", "flax"} <= set(record["origin"]["versions"])
        introduction = (
            "**Data:** no data",
            "**Net:** no net",
            "**Inputs:** ones",
            "**Statements checked are from:** Notes 2020",
        )
        assert "\n".join(f"- {line}" for line in introduction) in text
        assert "| mean of x |" in text
        assert "“the opposite” (Notes 2020). **Refuted**: measured 1, mean of x. Because." in text

    def test_few_seeds_and_own_data_leave_a_claim_open_without_failing(self, tmp_path):
        open_claim = fake(measured=over_seeds([0.4, 1.2]))
        record = runner.run_one(open_claim, Settings(out=tmp_path), Quiet())
        assert record["claims"][0]["verdict"] == "inconclusive"
        assert not report.succeeded([record])
        assert record["claims"][0]["to_decide"].startswith("about ")

        @dataclass(frozen=True)
        class Own(Settings):
            @property
            def own_data(self):
                return "your images"

        assert Run(Own()).exploratory == ["your images"]
        assert report.succeeded([runner.run_one(open_claim, Own(out=tmp_path), Quiet())])
        assert not report.succeeded([runner.run_one(fake(holds=False), Own(out=tmp_path), Quiet())])  # refuted is refuted
        run = Run(Settings(seeds=3))
        assert (run.seeds(quick=2, full=3), run.exploratory) == (3, [])
        run.seeds(quick=2, full=9)
        assert run.exploratory == ["--seeds 3, where the claims need up to 9"]

    def test_results_hold_only_what_json_can(self):
        with pytest.raises(TypeError, match="results cannot hold"):
            runner.plain({"x": object()})


def test_killed_between_two_renames_the_old_results_come_back(tmp_path):
    path = tmp_path / "name"
    trash = tmp_path / ".name.abc.old"
    (trash / "name").mkdir(parents=True)
    (trash / "name" / "results.json").write_text('{"files": []}')
    (tmp_path / ".name.def.partial").mkdir()
    storage.recover(path)
    assert [p.name for p in tmp_path.iterdir()] == ["name"]
    assert storage.files_of(path) == ["results.json"]


class TestRegistry:
    def test_every_experiment_is_found_with_a_title_and_an_order(self):
        found = {entry.name: entry for entry in registry.entries()}
        assert {"activation-statistics", "numerical-stability", "activation-decides", "normalization", "low-precision"} <= set(
            found
        )
        assert all(entry.title and entry.order < 1000 for entry in found.values())
        assert len({entry.order for entry in found.values()}) == len(found)

    def test_results_depend_on_what_is_imported(self):
        names = {path.name for path in registry.sources(registry.find("activation-statistics").path)}
        assert {"activation_statistics.py", "activation_laws.py", "stacks.py", "published.py", "claims.py"} <= names
        assert "normalization.py" not in names

    def test_experiments_import_from_lab_and_nets_and_not_from_each_other(self):
        allowed = {"experiment": ("lab", "nets"), "nets": ("lab", "nets"), "lab": ("lab",)}
        names = {entry.path.stem for entry in registry.entries()}
        modules = [path for path in registry.FOLDER.rglob("*.py") if path.parent.name != "benchmarks"]
        assert {path.stem for path in modules if path.parent == registry.FOLDER} == names | {"__init__", "__main__"}
        for path in modules:
            if path.stem in ("__init__", "__main__"):
                continue
            home = "experiment" if path.parent == registry.FOLDER else path.parent.name
            assert {name.split(".")[1] for name in registry.imports(path)} <= set(allowed[home]), path

    def test_what_stands_in_the_folder(self):
        folders = {path.name for path in registry.FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__"}
        assert folders == {"benchmarks", "lab", "nets", "pictures", "weights"}

    def test_listing_imports_no_jax(self):
        code = (
            "import sys; from experiments.__main__ import main; main([]);"
            " sys.exit('jax' in sys.modules or 'matplotlib' in sys.modules)"
        )
        root = Path(__file__).parents[1]
        done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "activation-statistics" in done.stdout


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["activation-statistic"], "did you mean activation-statistics?"),
            (["xyz"], "no experiment is called 'xyz'"),
            (["numerical-stability", "--seeds", "0"], "--seeds is 0"),
            (["numerical-stability", "--seed", "-1"], "--seed is -1"),
            (["numerical-stability", "--out", "/proc/nowhere"], "cannot write to --out /proc/nowhere"),
            (["all", "--out", "/proc/nowhere"], "cannot write to --out /proc/nowhere"),
        ],
    )
    def test_mistakes_are_one_line_and_status_2(self, arguments, message, capsys):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

    def test_a_missing_package_is_named(self, monkeypatch, capsys):
        find_spec = registry.importlib.util.find_spec
        monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None if name == "sklearn" else find_spec(name))
        assert main(["normalization"]) == 2
        assert "needs scikit-learn: in the clone, pip install -e '.[dev]'" in capsys.readouterr().err
        assert main([]) == 0
        assert "scikit-learn" in capsys.readouterr().out

    def test_exit_status_says_whether_claims_hold(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(registry, "find", lambda name: fake())
        assert main(["fake-one", "--out", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert "✓ holds" in out
        assert "x is [one]" in out  # brackets are text, not markup
        assert "Rows [b]" in out
        monkeypatch.setattr(registry, "find", lambda name: fake(holds=False))
        assert main(["fake-one", "--out", str(tmp_path)]) == 1
        monkeypatch.setattr(registry, "find", lambda name: fake(fail=True))
        assert main(["fake-one", "--out", str(tmp_path / "stopped")]) == 130
        error = capsys.readouterr().err
        assert f"kept in {tmp_path / 'stopped'}: the parts first of fake-one; the same command with --resume" in error

    def test_all_ends_with_a_line_an_experiment(self, monkeypatch, tmp_path, capsys):
        entries = [fake(), replace(fake(holds=False), name="fake-two")]
        monkeypatch.setattr(registry, "entries", lambda: entries)
        monkeypatch.setenv("COLUMNS", "80")
        assert main(["all", "--out", str(tmp_path)]) == 1
        shown = capsys.readouterr()
        assert "fake-one: 1 of 1 claims hold, in 0 s" in shown.err  # as each is done
        lines = [" ".join(line.split()) for line in shown.out.splitlines()]
        assert "experiment claims hold refutations time" in lines
        assert {"fake-one 1 1 1 0 s", "fake-two 1 0 0 0 s", "all 2 1 1 0 s"} <= set(lines)
        assert "✗ does not hold x is [one]" in lines
        assert len(lines) < 20
        monkeypatch.setattr(registry, "entries", lambda: [fake(), replace(fake(fail=True), name="fake-two")])
        assert main(["all", "--out", str(tmp_path), "--seed", "2"]) == 130
        assert "the results of fake-one and the parts first of fake-two" in capsys.readouterr().err
