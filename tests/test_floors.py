"""The house: a room imports from the floors below it only, from jax's public modules only, and opens its doors quickly."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import varscale

ROOT = pathlib.Path(varscale.__file__).parent
# From the ground. A room's name is the first part of the module's path; `transfer` stands apart.
FLOOR = {
    "_compat": 0, "arguments": 0,
    "programs": 0, "reporting": 0, "gaussian": 1,
    "report": 1,
    "initializers": 2, "measuring": 2, "usage": 2,
    "initialization": 3,
    "theory": 4, "testing": 4,
    "schemes": 5,
    "auditing": 6,
    "cli": 7,
    "__main__": 8,
}  # fmt: skip
APART = {"transfer": {"initializers", "programs", "_compat"}}
READ_BY = {"transfer": {"auditing", "cli"}}  # who may import a room that stands apart


def imports(path):
    """Every module imported anywhere in a file, as a dotted name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module):
    parts = module.split(".")
    return parts[1] if parts[0] == "varscale" and len(parts) > 1 else None


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_from_below(path):
    home = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in imports(path):
        other = room(module)
        if other in (None, home) or other not in {*FLOOR, *APART}:
            continue
        if home in APART:
            assert other in APART[home], f"{home} imports {module}"
        else:
            assert other not in APART or home in READ_BY[other], f"{home} imports {module}"
            assert other in APART or FLOOR[other] < FLOOR[home] or other == "_compat", f"{home} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_public_jax(path):
    private = re.compile(r"jax\._src|^jax\.(interpreters|core)\b")
    assert not [module for module in imports(path) if private.search(module)]


def test_import_brings_in_nothing_heavy():
    """SciPy's special functions, optax, Orbax, Hypothesis and matplotlib wait until they are asked for."""
    script = (
        "import sys, jax, flax; before = set(sys.modules); import varscale; new = set(sys.modules) - before;"
        "print([m for m in new if m.split('.')[0] in ('optax', 'orbax', 'hypothesis', 'matplotlib', 'safetensors')"
        " or m == 'scipy.special'])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def test_the_public_face():
    names = ["predict", "mean_field", "critical", "Moments", "inputs", "Report"]
    names += ["transfer", "theory", "testing", "gaussian", "initializers"]
    assert set(names) <= set(dir(varscale))
    for name in names:
        assert getattr(varscale, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        varscale.nonsense  # noqa: B018
