"""What an experiment is, what it is given and what it gives back.

To add an experiment, write one module in `experiments/`, named after what it shows:

    '''Too small a scale vanishes, too large a one saturates.'''      # the first line is its title

    REQUIRES = ("matplotlib", "sklearn")     # import names of what only the `dev` extra brings; marks an experiment
    ORDER = 1                                # its place in the list and the report

    @dataclass(frozen=True)
    class Settings(experiment.Settings):     # options of its own, which become options of the command line
        images: tuple[Path, Path] | None = None
        '''Two folders of images, one a class.'''

    def run(run: Run) -> Result:
        curves = run.part("curves", lambda: {"loss": train(run.key("curves"), run.seeds(quick=10, full=40))})
        figure = plots.lines(...)
        return Result(
            introduction=Introduction(data="...", net="...", inputs="...", notes=("CS231n 2017, lecture 6",)),
            claims=[Claim(...)], tables=[Table(...)], figures=[Figure("curves", "Loss by step.", figure)],
        )

It is found by its `REQUIRES`, its name is the module's with hyphens (`activation_statistics.py` is `activation-statistics`),
and `Settings` may be left out. `run` computes in PARTS: `run.part(name, compute)` is a dict of arrays that is stored as soon as
it is there, so that `--resume` redoes only the parts that are missing. All else (claims, tables, figures) follows from the
parts. Fixed expectations and tolerances are constants of the module, each with its source. A mistake of the user's (a bad path,
a bad value) is raised as `ExperimentError`, in one line. An experiment imports from `experiments.lab` and `experiments.nets`,
and from no other experiment.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from experiments.lab.storage import replaced

if TYPE_CHECKING:
    import jax
    import matplotlib.figure

    from experiments.lab.claims import Claim

T = TypeVar("T")


class ExperimentError(Exception):
    """A mistake that the user can mend, told in one line."""


@dataclass(frozen=True)
class Settings:
    """The options every experiment has."""

    quick: bool = False
    """Fewer seeds and smaller sweeps: for a first look."""
    seeds: int | None = None
    """How many seeds; by default as many as each claim needs."""
    seed: int = 0
    """The seed from which all others follow."""
    out: Path = Path("results")
    """The folder of the results; each experiment has a folder of its own name in it."""
    resume: bool = False
    """Redo only what is missing."""

    def __post_init__(self):
        if self.seeds is not None and self.seeds < 1:
            raise ExperimentError(f"--seeds is {self.seeds}; give 1 or more")
        if not 0 <= self.seed < 2**32:
            raise ExperimentError(f"--seed is {self.seed}; give 0 or more, below 2**32")

    @property
    def own_data(self) -> str:
        """The user's own data, in words; empty where the experiment's own are used."""
        return ""

    def fingerprint(self, *sources: str) -> str:
        """What results depend on: the options that change them, and the sources that made them."""
        options = {name: str(value) for name, value in asdict(self).items() if name not in ("out", "resume")}
        return hashlib.sha256(repr((sorted(options.items()), sources)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers; `note` says how to read it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture; `name` becomes the file's, `caption` says what is seen."""

    name: str
    caption: str
    picture: "matplotlib.figure.Figure"


@dataclass(frozen=True)
class Introduction:
    """What a reader must know before the claims.

    Attributes:
      data: what the nets are run or trained on.
      net: the nets: layers, widths, activations.
      inputs: how inputs are scaled, and how the nets are trained if they are.
      notes: the lecture notes and papers whose statements are checked, by name.
    """

    data: str
    net: str
    inputs: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """What an experiment found: `remarks` are paragraphs of Markdown for the reader, `data` is what JSON holds besides."""

    introduction: Introduction
    claims: "Sequence[Claim]"
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    remarks: Sequence[str] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


class Experiment(Protocol):
    """What the module of an experiment offers (its docstring is the title)."""

    REQUIRES: tuple[str, ...]
    ORDER: int

    def run(self, run: "Run", /) -> Result: ...


class Progress(Protocol):
    """Where a run says how far it is; `experiments.lab.progress` shows it."""

    def track(self, values: Iterable[T], label: str, total: int | None = None) -> Iterator[T]: ...

    def say(self, line: str) -> None: ...


class Quiet:
    """Progress that nobody watches."""

    def track(self, values: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        return iter(values)

    def say(self, line: str) -> None:
        pass


@dataclass(frozen=True)
class Run:
    """One run of one experiment.

    Attributes:
      settings: its options.
      store: the folder of its parts, if they are stored.
      progress: where it says how far it is.
      computed: names of the parts that were computed, as they are.
      reused: names of the parts that were found in the store.
      needed: the largest number of seeds that a claim needs, and that the user's `--seeds` fell short of, if one did.
    """

    settings: Any
    store: Path | None = None
    progress: Progress = field(default_factory=Quiet)
    computed: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    needed: list[int] = field(default_factory=list)

    @property
    def quick(self) -> bool:
        return self.settings.quick

    def seeds(self, *, quick: int, full: int) -> int:
        """How many seeds: the user's word, or else what the claim needs."""
        wanted = quick if self.quick else full
        if self.settings.seeds is not None and self.settings.seeds < wanted:
            self.needed[:] = [max([wanted, *self.needed])]
        return self.settings.seeds or wanted

    @property
    def exploratory(self) -> list[str]:
        """Why an inconclusive claim does not fail this run: data of the user's, or fewer seeds than the claims need."""
        own = [self.settings.own_data] if self.settings.own_data else []
        few = [f"--seeds {self.settings.seeds}, where the claims need up to {count}" for count in self.needed]
        return own + few

    def key(self, name: str) -> "jax.Array":
        """A key of its own for whatever is called `name`, the same in every run with the same `--seed`."""
        import jax

        return jax.random.fold_in(jax.random.key(self.settings.seed), zlib.crc32(name.encode()) & 0x7FFFFFFF)

    def keys(self, name: str, count: int) -> "jax.Array":
        """`count` keys, shape (count,)."""
        import jax

        return jax.random.split(self.key(name), count)

    def track(self, values: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Iterate with a progress bar."""
        return self.progress.track(values, label, total)

    def part(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """The arrays of one part: from the store where a resumed run has them, computed (and stored) otherwise."""
        file = None if self.store is None else self.store / f"{name}.npz"
        if file is not None and file.exists():
            try:
                with np.load(file, allow_pickle=False) as stored:
                    arrays = dict(stored)
                self.reused.append(name)
                return arrays
            except (OSError, ValueError, zipfile.BadZipFile):
                pass  # damaged from outside: computed anew below
        arrays = {key: np.asarray(value) for key, value in compute().items()}
        for key, value in arrays.items():
            if value.dtype.kind not in "biufcU":
                raise TypeError(
                    f"part {name!r}: array {key!r} has dtype {value.dtype}, which a .npz file cannot hold; convert it"
                )
        if file is not None:
            with replaced(file) as temporary, temporary.open("wb") as stream:
                np.savez(stream, allow_pickle=False, **arrays)
        self.computed.append(name)
        return arrays
