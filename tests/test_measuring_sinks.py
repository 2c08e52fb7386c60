"""Records of a training run: whole lines or none, TensorBoard, anything that takes (step, dict), and the picture."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import varscale as vs
from varscale.measuring.records import Records
from varscale.measuring.sinks import JsonLines, as_sink

NAN, INF = float("nan"), float("inf")
SCALARS = {"activation/second_moment/a": 1.5, "activation/second_moment/": INF, "gradient/second_moment/a": NAN}


class TestJsonLines:
    def test_what_is_read_is_what_was_written(self, tmp_path):
        path = tmp_path / "deep" / "run.jsonl"
        sink = as_sink(str(path))
        for step in (0, 100):
            sink(step, SCALARS)
        records = vs.Monitor.read(path)
        assert [record["step"] for record in records] == [0, 100]
        assert {key: value for key, value in records[0].items() if key not in ("step", "time")} == pytest.approx(
            SCALARS, nan_ok=True
        )
        assert abs(records[0]["time"] - time.time()) < 60
        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)

    def test_a_resumed_run_appends(self, tmp_path):
        for step in (0, 100):
            as_sink(tmp_path / "run.jsonl")(step, SCALARS)
        assert list(vs.Monitor.read(tmp_path / "run.jsonl").steps) == [0, 100]

    @pytest.mark.parametrize("left", [b"", b'{"step":200,"activa', b'{"step":200}', b"x" * 200_000])
    def test_what_a_killed_process_left_is_left_out_and_removed(self, tmp_path, left):
        path = tmp_path / "run.jsonl"
        JsonLines(path)(0, SCALARS)
        whole = path.read_bytes()
        path.write_bytes(whole + left)
        assert list(vs.Monitor.read(path).steps) == [0]
        JsonLines(path)(100, SCALARS)
        assert list(vs.Monitor.read(path).steps) == [0, 100]
        assert path.read_bytes().startswith(whole + b'{"step":100')

    def test_a_process_that_is_killed_loses_no_line(self, tmp_path):
        """A child writes lines of 100 kB, says which it has finished, and is killed with SIGKILL meanwhile."""
        path = tmp_path / "run.jsonl"
        script = (
            "import sys; from varscale.measuring.sinks import JsonLines; sink = JsonLines(sys.argv[1]);"
            "scalars = {f'activation/mean/{i}': float(i) for i in range(3000)}; step = 0\n"
            "while True:\n sink(step, scalars); print(step, flush=True); step += 1"
        )
        child = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(20):
            child.stdout.readline()
        os.kill(child.pid, signal.SIGKILL)
        finished = [19, *map(int, child.stdout.read().split("\n")[:-1])][-1]
        child.wait()
        records = vs.Monitor.read(path)
        assert list(records.steps) == list(range(len(records)))
        assert len(records) in (finished + 1, finished + 2)  # the last may have been written and not been told
        assert records[-1]["activation/mean/2999"] == 2999

    def test_a_full_disk_leaves_no_half_line(self, tmp_path, monkeypatch):
        sink = JsonLines(tmp_path / "run.jsonl")
        sink(0, SCALARS)
        whole = sink.path.read_bytes()
        write = os.write
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
        with pytest.raises(OSError, match="the disk is full; the record of step 1"):
            sink(1, SCALARS)
        assert sink.path.read_bytes() == whole

    def test_files_of_other_things_are_refused(self, tmp_path):
        path = tmp_path / "data.jsonl"
        path.write_text('{"text": "a data set"}\n')
        with pytest.raises(ValueError, match="line 1 is no record of a Monitor"):
            as_sink(path)
        assert path.read_text() == '{"text": "a data set"}\n'
        path.write_text('{"step": 1}\nnonsense\n')
        with pytest.raises(ValueError, match="line 2 is no record of a Monitor: b'nonsense"):
            vs.Monitor.read(path)
        with pytest.raises(FileNotFoundError):
            vs.Monitor.read(tmp_path / "none.jsonl")


class TestOtherSinks:
    def test_tensorboard(self, tmp_path):
        sink = as_sink(tmp_path / "runs")
        sink(3, {"activation/mean/a": 0.25, "activation/mean/": 1.0})
        (file,) = (tmp_path / "runs").iterdir()
        written, until = b"", time.monotonic() + 60
        while np.float32(0.25).tobytes() not in written and time.monotonic() < until:
            time.sleep(0.01)  # a thread of tensorboardX writes
            written = file.read_bytes()
        assert b"activation/mean/a" in written
        assert np.float32(0.25).tobytes() in written

    def test_a_summary_writer(self):
        class Writer:
            def __init__(self):
                self.found = []

            def add_scalar(self, tag, value, step):
                self.found.append((tag, value, step))

        writer = Writer()
        as_sink(writer)(3, {"activation/mean/": 1.0})
        assert writer.found == [("activation/mean", 1.0, 3)]

    def test_functions_and_clu(self):
        found = []

        class Clu:
            def write_scalars(self, step, scalars):
                found.append((step, scalars))

        as_sink(Clu())(1, SCALARS)
        as_sink(lambda step, scalars: found.append((step, scalars)))(2, SCALARS)
        assert found == [(1, SCALARS), (2, SCALARS)]
        assert found[0][1] is not SCALARS  # a sink may keep or change its dict

    def test_without_tensorboardx_the_extra_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
        with pytest.raises(ImportError, match=r"needs tensorboardX: pip install 'varscale\[tensorboard\]'"):
            as_sink(tmp_path)

    @pytest.mark.parametrize("given", [3, None, dict])
    def test_what_is_no_sink_is_named(self, given):
        with pytest.raises(TypeError, match="a sink must be a path, an object with write_scalars"):
            as_sink(given)

    def test_paths_of_no_known_kind_are_named(self, tmp_path):
        with pytest.raises(ValueError, match=r'a sink must be a path that ends in "\.jsonl", or a directory'):
            as_sink(tmp_path / "run.txt")
        with pytest.raises(TypeError, match=r"sinks must be a sequence of sinks, not 'run.jsonl'; give \['run.jsonl'\]"):
            vs.Monitor(lambda x: x, sinks="run.jsonl")


class TestRecords:
    @pytest.fixture
    def records(self):
        rng = np.random.default_rng(0)
        found = []
        for step in (0, 100, 200, 100):
            record = {"step": step, "time": 0.0, "optax/norm": float(rng.exponential())}
            for depth in range(6):
                record[f"activation/second_moment/l{depth}"] = float(10.0 ** rng.normal())
                record[f"activation/mean/l{depth}"] = float(rng.normal())
            found.append(record)
        found[1]["activation/second_moment/l0"] = NAN
        del found[2]["activation/mean/l5"]
        return Records(found)

    def test_values(self, records):
        assert list(records.steps) == [0, 100, 200, 100]
        np.testing.assert_array_equal(np.isnan(records.values("activation/mean/l5")), [False, False, True, False])
        assert repr(records) == "Records(4 of steps 0 to 100, 13 statistics)"
        assert isinstance(records[1:], Records)
        with pytest.raises(KeyError, match="no record has 'activation/mean/l9'"):
            records.values("activation/mean/l9")

    def test_plot_has_a_panel_for_each_statistic(self, records, tmp_path):
        import matplotlib.pyplot as plt

        figure = records.plot()
        panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}
        assert list(panels) == ["optax norm", "activation second moment", "activation mean"]
        image = panels["activation second moment"].collections[0].get_array()
        assert image.shape == (6, 3)  # a step that was written twice shows its last value
        assert not np.any(np.ma.getmaskarray(image))
        np.testing.assert_allclose(panels["optax norm"].lines[0].get_xdata(), [0, 100, 200])
        figure.savefig(tmp_path / "plot.png")
        records[:1].plot().canvas.draw()
        plt.close("all")
