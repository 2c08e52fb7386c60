"""Every number at the top of a module of the room stands in one table, with what it changes and what it was set on."""

import ast
import pathlib
from collections.abc import Iterator

from varscale import theory

ROOM = pathlib.Path(theory.__file__).parent
TABLE = ROOM / "constants.md"
# Those that no derivation gives and that change a number or a bound. May only fall.
EMPIRICAL = 39


def holds_a_number(value: ast.expr) -> bool:
    return any(isinstance(n, ast.Constant) and isinstance(n.value, int | float) for n in ast.walk(value))


def constants() -> Iterator[tuple[str, str, str]]:
    """File, name and value of every constant that holds a number."""
    for path in sorted(ROOM.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                continue
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            names = [t.id for t in getattr(target, "elts", [target]) if isinstance(t, ast.Name)]
            value = ast.unparse(node.value)
            capital = bool(names) and all(name.strip("_").isupper() for name in names)
            if capital and holds_a_number(node.value) and len(value) < 60:
                yield str(path.relative_to(ROOM)), ", ".join(names), value


def rows() -> list[list[str]]:
    """The rows of the table: file, name, value, what it changes, what it is and what it was set on."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in line.strip("|").replace("\\|", "¦").split("|")] for line in lines]


def test_the_table_holds_every_constant_and_no_other():
    listed = {(file, name, value.replace("¦", "|")) for file, name, value, *_ in rows()}
    assert set(constants()) == listed, f"rows of {TABLE.name} and constants of the room that differ are shown"


def test_constants_that_are_not_derived_only_fall():
    kinds = [row[3] for row in rows()]
    assert set(kinds) <= {"bound", "number", "exact", "budget", "convention"}
    assert sum(kind in ("bound", "number") for kind in kinds) <= EMPIRICAL
