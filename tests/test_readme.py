"""The front README: what it says runs, what it links to is there, and it stays short. Its `>>>` examples are doctests."""

import pathlib
import re
import runpy

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)

FOLDERS = (ROOT, *(ROOT / "varscale").glob("*/"), ROOT / "experiments", *(ROOT / "experiments").glob("*/"))
DOCUMENTS = sorted(folder / "README.md" for folder in FOLDERS if (folder / "README.md").exists())


def test_it_stays_short():
    assert len(README.splitlines()) <= 130
    assert len(README.encode()) <= 9000
    assert max(len(line) for _, code in BLOCKS for line in code.splitlines()) <= 100


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8")):
        assert target.startswith("http") or (document.parent / target).exists(), target


def test_the_tests_to_paste_pass(tmp_path):
    """Blocks of Python without prompts are whole files of tests."""
    files = [code for language, code in BLOCKS if language == "python" and not code.startswith(">>>")]
    assert len(files) == 1
    path = tmp_path / "test_pasted.py"  # Hypothesis reads the source of what it runs
    path.write_text(files[0], encoding="utf-8")
    found = [function for name, function in runpy.run_path(str(path)).items() if name.startswith("test_")]
    assert len(found) == 2
    for function in found:
        function()


def test_the_two_commands_are_as_ci_reads_them():
    commands = [line for line in re.sub(r" *\\\n *", " ", README).splitlines() if line.startswith("python3 ")]
    setups, actions = zip(*(command.rsplit(" && ", 1) for command in commands), strict=True)
    assert len(set(setups)) == 1
    assert [action.split()[:3] for action in actions] == [
        [".venv/bin/python", "-m", name] for name in ("experiments", "pytest")
    ]


def test_commands_name_files_that_exist():
    for module in re.findall(r"python -m (experiments[\w.]*)", README):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for name in re.findall(r"^\| .* \| `([\w-]+)` \| \[", README, re.MULTILINE):
        assert (ROOT / "experiments" / f"{name.replace('-', '_')}.py").exists(), name
