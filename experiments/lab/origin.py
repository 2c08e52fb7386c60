"""Where results come from: the command, the date, the commit and the versions, as a report states them."""

import datetime
import importlib.metadata
import platform
import shlex
import subprocess
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from experiments.lab.experiment import Settings

PROGRAM = "python -m experiments"
PACKAGES = ("varscale", "jax", "flax", "optax", "numpy")


def command(name: str, settings: Settings) -> str:
    """The command line that gives these settings; `--resume` is left out, for it changes no result."""
    words = [PROGRAM, name]
    defaults = {field.name: field.default for field in fields(settings) if field.default is not MISSING}
    for option, value in asdict(settings).items():
        if option == "resume" or value is None or (option in defaults and value == defaults[option]):
            continue
        words.append(f"--{option.replace('_', '-')}")
        if value is not True:
            words += [shlex.quote(str(each)) for each in (value if isinstance(value, tuple) else (value,))]
    return " ".join(words)


def of(command: str) -> dict[str, Any]:
    """Command, date (UTC), commit of the sources and versions of the packages, as JSON can hold them."""
    now = datetime.datetime.now(datetime.UTC)
    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    return {"command": command, "date": f"{now:%Y-%m-%d %H:%M} UTC", "commit": _commit(), "versions": versions}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of this checkout, with "+ changes" where files differ from it; "unknown" outside of a checkout."""

    def git(*words: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=10", "HEAD")
        return commit + (" + changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
