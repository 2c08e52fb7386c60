"""What an audit is: levels, what silences it, baselines, order, and its forms as text, JSON and picture."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import varscale as vs
from varscale.auditing import findings
from varscale.auditing.findings import Audit, AuditError, Finding, ordered, read_baseline, silenced, since

ROWS = jax.ShapeDtypeStruct((16, 64), jnp.float32)
VANISHING = nn.Sequential([f for _ in range(8) for f in (nn.Dense(64, kernel_init=nn.initializers.normal(0.01)), nn.relu)])


class TestTheResult:
    FINDINGS = (
        Finding("VS103", "info", "b/kernel", "small.", 0.5),
        Finding("VS101", "error", "blocks/3/head", "gone.", 1e-9, "mend()"),
    )

    def test_order_text_and_raising(self):
        audit = Audit(ordered(self.FINDINGS))
        assert [f.code for f in audit.findings] == ["VS101", "VS103"]
        assert str(audit.findings[0]) == "VS101 error at blocks/3/head [1e-09]: gone."
        assert "-> mend()" in audit.table(80)
        assert audit.table(80).endswith("Found 1 of level error, 1 of level info.")
        with pytest.raises(AuditError, match="VS101"):
            audit.raise_on("error")
        with pytest.raises(ValueError, match="level must be one of"):
            audit.raise_on("fatal")
        assert Audit(()).raise_on("info").table(80) == "Found nothing."
        with pytest.raises(ValueError, match="no report to draw"):
            audit.plot()

    def test_lines_fit_the_terminal(self):
        audit = vs.audit(VANISHING, ROWS)
        assert max(len(line) for line in audit.table(60).splitlines() if "->" not in line) <= 60

    @pytest.mark.parametrize("ignore", [["VS101"], ["VS101:blocks/*/head"], ["VS101:**"]])
    def test_ignore(self, ignore):
        left = silenced(self.FINDINGS, ignore)
        assert ([f.code for f in left.kept], left.count, left.notes) == (["VS103"], 1, ())

    def test_entries_that_silence_nothing_are_named(self):
        audit = vs.audit(nn.Dense(3), ROWS, ignore=["VS104:blok/*", "VS101"])
        assert audit.table().splitlines()[-2:] == ["Nothing to silence: VS104:blok/*, VS101.", "Found nothing."]
        assert vs.audit_parameters({}, ignore=["VS113"]).notes[1] == "Nothing to silence: VS113."

    def test_ignore_wants_codes(self):
        with pytest.raises(ValueError, match="ignore must hold codes"):
            silenced(self.FINDINGS, ["blocks"])
        with pytest.raises(ValueError, match="no code 'VS999'; codes go from VS101 to VS125"):
            silenced((), ["VS999"])
        with pytest.raises(ValueError, match="never closes it"):
            silenced((), ["VS104:{a"])
        with pytest.raises(TypeError, match="sequence of codes"):
            silenced(self.FINDINGS, "VS101")

    def test_a_baseline_lets_old_findings_pass(self, tmp_path):
        file = tmp_path / "old.json"
        file.write_text(Audit(self.FINDINGS[:1]).to_json())
        later = since(Audit(ordered(self.FINDINGS)), read_baseline(file))
        assert [f.code for f in later.findings] == ["VS101"]
        assert later.silenced == 1
        file.write_text("[]")
        with pytest.raises(ValueError, match="not the JSON of an audit"):
            read_baseline(file)

    def test_a_new_place_or_a_worse_level_is_new(self, tmp_path):
        """A finding that tells of several layers passes layer by layer."""
        alike = [Finding("VS104", "warning", f"blocks_{i}/kernel", "off.") for i in range(3)]
        file = tmp_path / "old.json"
        file.write_text(Audit(ordered(alike)).to_json())
        added = Finding("VS104", "warning", "blocks_3/kernel", "off.")
        later = since(Audit(ordered([*alike[1:], added])), read_baseline(file))
        assert ([f.path for f in later.findings], later.silenced) == (["blocks_3/kernel"], 2)
        worse = dataclasses.replace(alike[0], level="error")
        assert since(Audit((worse,)), read_baseline(file)).findings == (worse,)
        assert since(Audit((dataclasses.replace(worse, level="info"),)), read_baseline(file)).findings == ()

    def test_the_guide_lists_every_code(self):
        room = pathlib.Path(findings.__file__).parent
        listed = re.findall(r"^\| (VS\d+) \|", (room / "README.md").read_text(), re.MULTILINE)
        written = {code for file in room.glob("*.py") for code in re.findall(r'"(VS\d+)"', file.read_text())}
        assert tuple(listed) == findings.CODES
        assert written == set(findings.CODES)

    def test_json(self):
        written = json.loads(Audit(ordered(self.FINDINGS)).to_json())
        assert [f["code"] for f in written["findings"]] == ["VS101", "VS103"]

    def test_the_picture_marks_the_places(self):
        audit = vs.audit(VANISHING, ROWS)
        texts = [text.get_text() for axes in audit.plot().axes for text in axes.texts]
        assert "VS101" in texts

    def test_layers_that_are_alike_are_one_finding(self):
        alike = [Finding("VS104", "warning", f"blocks_{i}/kernel", "off.") for i in range(6)]
        (one,) = ordered(alike)
        assert one.path == "blocks_0/kernel"
        assert [f.path for f in one.alike] == [f.path for f in alike]
        assert ordered(ordered(alike)) == (one,)
        assert len(ordered([Finding("VS119", "info", "", "pixels."), Finding("VS119", "info", "", "constant columns.")])) == 2
        assert one.message.endswith("The same at blocks_1/kernel, blocks_2/kernel, blocks_3/kernel and 2 more.")
