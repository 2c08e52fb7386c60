"""Which experiments there are, found without importing them: a list should not wait for jax."""

import ast
import difflib
import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from experiments.lab.experiment import ExperimentError

FOLDER = Path(__file__).parents[1]  # of the experiments
PACKAGE = FOLDER.name
PACKAGES = {"sklearn": "scikit-learn", "skimage": "scikit-image"}  # import names that pip knows by another


@dataclass(frozen=True)
class Entry:
    """An experiment by what its source says of it."""

    name: str
    title: str
    order: int
    requires: tuple[str, ...]
    path: Path

    @property
    def missing(self) -> tuple[str, ...]:
        """The packages it needs that are not installed, under the names pip knows them by."""
        return tuple(PACKAGES.get(name, name) for name in self.requires if importlib.util.find_spec(name) is None)

    def load(self) -> ModuleType:
        """Import it.

        Raises:
          ExperimentError: a package that it needs is missing.
        """
        if self.missing:
            raise ExperimentError(f"{self.name} needs {', '.join(self.missing)}: in the clone, pip install -e '.[dev]'")
        return importlib.import_module(f"{PACKAGE}.{self.path.stem}")


def sources(path: Path) -> tuple[Path, ...]:
    """The module and every module of `experiments` that it imports, directly or not: what its results depend on."""
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        module = waiting.pop()
        if module in found or not module.exists():
            continue
        found.add(module)
        waiting += [FOLDER.joinpath(*name.split(".")[1:]).with_suffix(".py") for name in imports(module)]
    return tuple(sorted(found))


def imports(path: Path) -> set[str]:
    """The dotted names below `experiments` that a file imports: of modules, and of what it takes from them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.startswith(f"{PACKAGE}.")}


def entries(folder: Path = FOLDER) -> tuple[Entry, ...]:
    """All experiments of the folder, in their order."""
    found = (_read(path) for path in folder.glob("*.py"))
    return tuple(sorted((entry for entry in found if entry is not None), key=lambda entry: (entry.order, entry.name)))


def find(name: str, folder: Path = FOLDER) -> Entry:
    """The experiment called `name`.

    Raises:
      ExperimentError: there is none.
    """
    known = {entry.name: entry for entry in entries(folder)}
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, [*known, "all"], n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)} and all"
    raise ExperimentError(f"no experiment is called {name!r}; {hint}")


def _read(path: Path) -> Entry | None:
    """The entry of one module, or None where it is no experiment: its constants are read, not run."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in ("REQUIRES", "ORDER")
    }
    if "REQUIRES" not in constants:
        return None
    title = (ast.get_docstring(tree) or path.stem).splitlines()[0].rstrip(".")
    order = ast.literal_eval(constants["ORDER"]) if "ORDER" in constants else 1000
    return Entry(path.stem.replace("_", "-"), title, order, tuple(ast.literal_eval(constants["REQUIRES"])), path)
