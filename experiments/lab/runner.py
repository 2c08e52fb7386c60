"""Runs experiments and keeps their results: whole or not at all, and again only where something is missing."""

import contextlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from experiments.lab import origin, report
from experiments.lab.experiment import ExperimentError, Progress, Result, Run, Settings
from experiments.lab.registry import Entry, sources
from experiments.lab.storage import MARK, files_of, recover, replaced, replaced_folder

Record = dict[str, Any]  # what results.json holds


def run_one(entry: Entry, settings: Settings, progress: Progress) -> Record:
    """Run one experiment and write its results into `settings.out / entry.name`; a resumed run may find them there already.

    Raises:
      ExperimentError: a mistake of the user's: an extra that is missing, a folder that cannot be written, a bad option.
    """
    check_folder(settings.out)
    folder = settings.out / entry.name
    recover(folder)
    if folder.exists() and any(folder.iterdir()) and not files_of(folder):
        raise ExperimentError(f"{folder} exists and holds no results of ours; give another --out")
    fingerprint = _fingerprint(entry, settings)
    if settings.resume and (record := _stored(folder, fingerprint)) is not None:
        progress.say(f"{entry.name}: reused the results of {record['origin']['date']}; options and sources are the same")
        return record

    store = _store(entry, settings)
    for other in [] if not store.parent.exists() else list(store.parent.iterdir()):
        if other != store or not settings.resume:
            shutil.rmtree(other)
    start = time.perf_counter()
    run = Run(settings, store, progress)
    (result,) = [entry.load().run(run) for _ in progress.track((entry,), entry.name)]  # names what is under way
    if settings.resume:
        found = f"reused the parts {', '.join(run.reused)}" if run.reused else "found nothing to reuse"
        progress.say(f"{entry.name}: {found}; computed {', '.join(run.computed) or 'none'}")
    record = _write(folder, entry, settings, run, result, time.perf_counter() - start)
    shutil.rmtree(store.parent, ignore_errors=True)
    with contextlib.suppress(OSError):  # other experiments' parts may wait there
        store.parent.parent.rmdir()
    return record


def run_all(chosen: Sequence[Entry], settings: Settings, progress: Progress) -> list[Record]:
    """Run the experiments one after the other and write one report over all of them into `settings.out`."""
    missing = sorted({package for entry in chosen for package in entry.missing})
    if missing:
        raise ExperimentError(f"the experiments need {', '.join(missing)}: in the clone, pip install -e '.[dev]'")
    records = []
    for entry in progress.track(chosen, "all experiments"):
        records.append(run_one(entry, settings_of(entry, settings), progress))
        progress.say(f"{entry.name}: {report.tally(records[-1:])}, in {report.duration(records[-1]['seconds'])}")
        _forget_programs()
    title = "Experiments"
    text = report.markdown_of_all(title, records, origin.of(origin.command("all", settings)))
    for name, content in (("report.md", text), ("report.html", report.page(title, text, settings.out))):
        with replaced(settings.out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return records


def check_folder(folder: Path) -> None:
    """Find out before the work whether results can be written.

    Raises:
      ExperimentError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ExperimentError(f"cannot write to --out {folder}: {error.strerror or error}") from error


def kept(entry: Entry, settings: Settings) -> tuple[bool, list[str]]:
    """What a stopped run left of an experiment: whether its results are whole, and else the parts that are stored."""
    if _stored(settings.out / entry.name, _fingerprint(entry, settings)) is not None:
        return True, []
    return False, sorted(path.stem for path in _store(entry, settings).glob("*.npz"))


def settings_of(entry: Entry, settings: Settings) -> Settings:
    """The common options as the experiment's own Settings, whose further options keep their defaults."""
    own = getattr(entry.load(), "Settings", Settings)
    return own(**asdict(settings))


def _fingerprint(entry: Entry, settings: Settings) -> str:
    return settings.fingerprint(entry.name, *(path.read_text(encoding="utf-8") for path in sources(entry.path)))


def _store(entry: Entry, settings: Settings) -> Path:
    """The folder of the parts of an experiment that is under way."""
    return settings.out / ".parts" / entry.name / _fingerprint(entry, settings)


def _stored(folder: Path, fingerprint: str) -> Record | None:
    """The results in the folder, if they are whole and follow from the same settings and sources."""
    try:
        record = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = all((folder / name).exists() for name in files_of(folder))
    return record if whole and record.get("fingerprint") == fingerprint else None


def _write(folder: Path, entry: Entry, settings: Settings, run: Run, result: Result, seconds: float) -> Record:
    from experiments.lab import plots  # matplotlib takes its time, and a list needs none of it

    record: Record = {
        "name": entry.name,
        "title": entry.title,
        "settings": _options(settings),
        "origin": origin.of(origin.command(entry.name, settings)),
        "seconds": round(seconds, 1),
        "fingerprint": _fingerprint(entry, settings),
        "exploratory": run.exploratory,
        "introduction": asdict(result.introduction),
        "claims": [claim.to_record() for claim in result.claims],
        "remarks": list(result.remarks),
        "tables": [asdict(table) for table in result.tables],
        "figures": [{"file": f"{figure.name}.png", "caption": figure.caption} for figure in result.figures],
        "data": result.data,
    }
    record["files"] = [figure["file"] for figure in record["figures"]] + ["report.md", "report.html"]
    record = plain(record)
    with replaced_folder(folder) as temporary:
        for figure in result.figures:
            (temporary / f"{figure.name}.png").write_bytes(plots.png(figure.picture))
        text = report.markdown(record)
        (temporary / "report.md").write_text(text, encoding="utf-8")
        (temporary / "report.html").write_text(report.page(entry.title, text, temporary), encoding="utf-8")
        (temporary / MARK).write_text(json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False), encoding="utf-8")
    return record


def _options(settings: Settings) -> dict[str, Any]:
    """The options that change results, as JSON can hold them."""

    def held(value: Any) -> Any:
        return [held(each) for each in value] if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value

    options = {name: held(value) for name, value in asdict(settings).items() if name not in ("out", "resume")}
    return {name: value for name, value in options.items() if value is not None}


def plain(value: Any) -> Any:
    """The value as JSON can hold it: arrays become lists, what is not a finite number becomes null."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "__array__"):
        return plain(np.asarray(value).tolist())
    raise TypeError(f"results cannot hold {type(value).__name__} {value!r}")


def _forget_programs() -> None:
    """Compiled programs of one experiment are of no use to the next, and they add up."""
    import jax

    jax.clear_caches()
