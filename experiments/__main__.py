"""The command line: `python -m experiments [NAME | all] [--quick] [--seeds N] [--seed S] [--out DIR] [--resume]`.

Exit status: 0 where every claim holds, 1 where one does not (or is inconclusive), 2 for a mistake in the command, 130 for
Ctrl-C. An inconclusive claim is no failure where the data are the user's own or `--seeds` is fewer than the claims need.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.lab import registry
from experiments.lab.experiment import ExperimentError, Settings
from experiments.lab.origin import PROGRAM

if TYPE_CHECKING:
    from experiments.lab.registry import Entry


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out the command and return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    console, errors = Console(), Console(stderr=True)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            _list(console)
            return 0
        name, *options = arguments
        if name == "all":
            return _run_all(console, errors, _parse(name, "Run every experiment and write one report.", Settings, options))
        entry = registry.find(name)
        settings = _parse(name, f"{entry.title}.", getattr(entry.load(), "Settings", Settings), options)
        return _run_one(console, errors, entry, settings)
    except ExperimentError as error:
        errors.print(Text(f"error: {error}", style="red"), soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print("stopped", style="yellow")
        return 130


def _list(console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("experiment", no_wrap=True, style="cyan")
    table.add_column("what it shows", ratio=1)
    for entry in registry.entries():
        shown = Text(entry.title)
        if entry.missing:
            shown.append(f"\nneeds {', '.join(entry.missing)}: in the clone, pip install -e '.[dev]'", style="yellow")
        table.add_row(entry.name, shown)
    console.print(table)
    console.print(Text(f"\n{PROGRAM} NAME   runs one\n{PROGRAM} all    runs all and writes one report"))
    console.print(Text("options: --quick, --seeds N, --seed S, --out DIR, --resume; NAME --help describes them"))


def _parse(name: str, description: str, settings: type[Settings], options: list[str]) -> Settings:
    try:
        import tyro
    except ImportError as error:
        raise ExperimentError("the command line needs tyro: in the clone, pip install -e '.[dev]'") from error
    return tyro.cli(
        settings, prog=f"{PROGRAM} {name}", description=description, args=options, config=(tyro.conf.FlagCreatePairsOff,)
    )


def _run_one(console: Console, errors: Console, entry: "Entry", settings: Settings) -> int:
    from experiments.lab import progress, report, runner

    try:
        with progress.shown(console if console.is_terminal else errors) as progress_shown:
            record = runner.run_one(entry, settings, progress_shown)
    except KeyboardInterrupt:
        return _stopped(errors, [entry], settings)
    report.show(console, record, settings.out / entry.name)
    return 0 if report.succeeded([record]) else 1


def _run_all(console: Console, errors: Console, settings: Settings) -> int:
    from experiments.lab import progress, report, runner

    entries = registry.entries()
    try:
        with progress.shown(console if console.is_terminal else errors) as progress_shown:
            records = runner.run_all(entries, settings, progress_shown)
    except KeyboardInterrupt:
        return _stopped(errors, entries, settings)
    report.show_all(console, records)
    console.print(Text(f"report in {settings.out / 'report.html'} and report.md", style="dim"), soft_wrap=True)
    return 0 if report.succeeded(records) else 1


def _stopped(errors: Console, entries: Sequence["Entry"], settings: Settings) -> int:
    """Say what a run that was stopped leaves behind."""
    from experiments.lab import runner

    finished, begun = [], []
    for entry in entries:
        whole, parts = runner.kept(entry, runner.settings_of(entry, settings) if len(entries) > 1 else settings)
        finished += [entry.name] if whole else []
        begun += [f"{', '.join(parts)} of {entry.name}"] if parts else []
    kept = [f"the results of {', '.join(finished)}"] if finished else []
    kept += [f"the parts {'; '.join(begun)}"] if begun else []
    told = f"kept in {settings.out}: {' and '.join(kept)}" if kept else "nothing was finished yet"
    errors.print(Text(f"stopped; {told}; the same command with --resume goes on from here", style="yellow"), soft_wrap=True)
    return 130


if __name__ == "__main__":
    sys.exit(main())
