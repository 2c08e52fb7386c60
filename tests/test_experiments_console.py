"""What a run shows while it is under way, and the command that a report names."""

import io
import time
from pathlib import Path

from rich.console import Console

from experiments.lab import origin, progress
from experiments.zero_large_xavier_he import Settings as Photographs


class TestProgress:
    def test_without_a_terminal_there_are_lines(self):
        stream = io.StringIO()
        with progress.shown(Console(file=stream, width=80), every=0.01) as shown:
            for _ in shown.track(["a", "b"], "outer"):
                for number in shown.track(range(3), "inner"):
                    while number == 1 and "inner 1/3" not in stream.getvalue():
                        time.sleep(0.01)
            shown.say("done")
        assert "s: outer 0/2, inner 1/3" in stream.getvalue()
        assert "done\n" in stream.getvalue()

    def test_on_a_terminal_there_are_bars_and_what_is_said_stays(self):
        stream = io.StringIO()
        with progress.shown(Console(file=stream, force_terminal=True, width=80)) as shown:
            assert list(shown.track(iter("ab"), "letters", total=2)) == ["a", "b"]
            shown.say("done")
        assert "done" in stream.getvalue()


def test_a_command_is_what_the_user_would_type():
    settings = Photographs(quick=True, images=(Path("a b"), Path("c")), learning_rate=0.1, resume=True)
    words = "--quick --images 'a b' c --learning-rate 0.1"
    assert origin.command("zero-large-xavier-he", settings) == f"python -m experiments zero-large-xavier-he {words}"
