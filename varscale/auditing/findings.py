"""Findings: what an audit says, how it is shown, silenced and compared with an older one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from varscale.programs.patterns import matches_row
from varscale.report import Report
from varscale.reporting.layout import Style, terminal_width, wrapped

Level = Literal["error", "warning", "info"]
LEVELS: tuple[Level, ...] = get_args(Level)
_STYLES: dict[Level, Style] = {"error": "red", "warning": "yellow", "info": "plain"}
_CODES = {"red": "31", "yellow": "33", "plain": "0"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that an audit found.

    Attributes:
        code: its kind, "VS101" and so on; codes keep their meaning from version to version.
        level: "error", "warning" or "info", by consequence.
        path: the row or parameter it is about; "" for the whole model.
        message: what is wrong and what follows from it, in one or two sentences.
        figure: the number behind it, as the message names it.
        mend: the one line that mends it; "" where there is none.
        scheme: the same as laws, where it is one: paths of parameters to initializers, which
            `vs.initialize(model, key, x, scheme=finding.scheme)` draws by and `vs.audit(model, x, scheme=...)` audits.
    """

    code: str
    level: Level
    path: str
    message: str
    figure: float | None = None
    mend: str = ""
    scheme: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, not {self.level!r}")

    def __str__(self) -> str:
        figure = "" if self.figure is None else f" [{self.figure:.4g}]"
        return f"{self.code} {self.level} at {self.path or 'the model'}{figure}: {self.message}"


class AuditError(AssertionError):
    """An audit found something at the level it was told to raise on; `audit` holds all of it."""

    def __init__(self, audit: Audit, level: Level):
        super().__init__(f"the audit found {audit.counts()}\n{audit.table()}")
        self.audit = audit
        self.level = level


@dataclasses.dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        findings: most important first.
        report: the predicted or measured table the findings refer to; None for parameters alone.
        notes: what a reader must know beside the findings, one sentence each.
        silenced: how many findings were left out by `ignore` or a baseline.
    """

    findings: tuple[Finding, ...]
    report: Report | None = None
    notes: tuple[str, ...] = ()
    silenced: int = 0

    def __len__(self) -> int:
        return len(self.findings)

    def __str__(self) -> str:
        return self.table()

    def counts(self) -> str:
        """How many findings of each level, in words."""
        found = Counter(finding.level for finding in self.findings)
        told = ", ".join(f"{found[level]} of level {level}" for level in LEVELS if found[level])
        silenced = f" ({self.silenced} silenced)" if self.silenced else ""
        return (told or "nothing") + silenced

    def at_least(self, level: Level) -> tuple[Finding, ...]:
        """The findings of this level and of more serious ones.

        Raises:
            ValueError: `level` is none of "error", "warning", "info".
        """
        if level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, not {level!r}")
        worst = LEVELS[: LEVELS.index(level) + 1]
        return tuple(finding for finding in self.findings if finding.level in worst)

    def raise_on(self, level: Level = "error") -> Audit:
        """The audit itself, where it found nothing of this level or worse.

        Raises:
            AuditError: it did; an AssertionError whose message is the table.
            ValueError: `level` is none of "error", "warning", "info".
        """
        if self.at_least(level):
            raise AuditError(self, level)
        return self

    def table(self, width: int | None = None, *, color: bool = False) -> str:
        """The findings as text that fits the terminal, each with the line that mends it.

        Args:
            width: columns of the terminal; None for the terminal's own, 80 where there is none.
            color: mark levels with ANSI escape sequences.

        Raises:
            ValueError: `width` is below 40.
        """
        width = terminal_width(width)
        lines = []
        for finding in self.findings:
            figure = "" if finding.figure is None else f"  [{finding.figure:.4g}]"
            head = f"{finding.code} {finding.level:8s}{finding.path or 'the model'}{figure}"
            style = _STYLES[finding.level]
            painted = f"\x1b[{_CODES[style]}m{head}\x1b[0m" if color and style != "plain" else head
            lines += [painted, *("  " + line for line in wrapped(finding.message, width - 2).splitlines())]
            if finding.mend:
                lines += ["  -> " + line.strip() for line in wrapped(finding.mend, width - 5).splitlines()]
        lines += [wrapped(note, width) for note in self.notes]
        return "\n".join([*lines, f"Found {self.counts()}."])

    def __rich__(self) -> Any:
        """The colored table for `rich.print`."""
        from rich.text import Text

        return Text.from_ansi(self.table(color=True))

    def to_json(self, **options: Any) -> str:
        """Findings, notes and counts as JSON; `read_baseline` reads it.

        Args:
            **options: passed on to `json.dumps`.
        """
        findings = [_record(finding) for finding in self.findings]
        return json.dumps({"findings": findings, "notes": self.notes, "silenced": self.silenced}, **options)

    def plot(self) -> Any:
        """The report's picture with the findings' places marked.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: there is no report to draw, as after `audit_parameters`.
        """
        if self.report is None:
            raise ValueError("this audit has no report to draw: it looked at parameters alone")
        figure = self.report.plot()
        paths = [row.path for row in self.report.rows]
        for axes in figure.axes[:1]:
            for finding in self.at_least("warning"):
                at = next((i for i, path in enumerate(paths) if path and f"{finding.path}/".startswith(f"{path}/")), None)
                if at is not None:
                    axes.axvline(at, color="tab:red" if finding.level == "error" else "tab:orange", lw=0.8, ls=":")
                    axes.annotate(finding.code, (at, 1), xycoords=("data", "axes fraction"), rotation=90, va="top", fontsize=7)
        return figure


def _record(finding: Finding) -> dict[str, Any]:
    """A finding as JSON takes it: without its laws, which are objects."""
    figure = finding.figure
    known = {name: value for name, value in vars(finding).items() if name != "scheme"}
    return known | {"figure": figure if figure is None or math.isfinite(figure) else str(figure)}


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings by level, then as they came; those of layers that are alike but for their number are one."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.code, finding.level, re.sub(r"\d+", "*", finding.path)), []).append(finding)
    joined = [
        dataclasses.replace(
            first, message=first.message + _others(rest), scheme={p: law for f in (first, *rest) for p, law in f.scheme.items()}
        )
        for first, *rest in groups.values()
    ]
    return tuple(sorted(joined, key=lambda finding: LEVELS.index(finding.level)))


def _others(rest: Sequence[Finding]) -> str:
    """Where else the same was found."""
    if not rest:
        return ""
    places = list(dict.fromkeys(finding.path for finding in rest if finding.path))
    if not places:
        return f" The same in {len(rest)} more places."
    return f" The same at {', '.join(places[:3])}" + (f" and {len(places) - 3} more." if len(places) > 3 else ".")


def silenced(findings: Sequence[Finding], ignore: Sequence[str]) -> tuple[tuple[Finding, ...], int]:
    """The findings that `ignore` leaves, and how many it silenced.

    Args:
        findings: all of them.
        ignore: codes ("VS104"), or codes with a glob over paths ("VS101:blocks/*/head").

    Raises:
        TypeError: `ignore` is one string.
        ValueError: an entry begins with no code.
    """
    if isinstance(ignore, str):
        raise TypeError(f"ignore must be a sequence of codes, such as ({ignore!r},), not the string {ignore!r}")
    rules = []
    for entry in ignore:
        code, _, pattern = str(entry).partition(":")
        if not (code.startswith("VS") and code[2:].isdigit()):
            raise ValueError(f'ignore must hold codes such as "VS104" or "VS101:blocks/*/head", not {entry!r}')
        rules.append((code, pattern))

    def is_silenced(finding: Finding) -> bool:
        return any(code == finding.code and (not pattern or matches_row(pattern, finding.path)) for code, pattern in rules)

    kept = tuple(finding for finding in findings if not is_silenced(finding))
    return kept, len(findings) - len(kept)


def read_baseline(file: str | os.PathLike[str]) -> frozenset[tuple[str, str]]:
    """The (code, path) of the findings in a file that `Audit.to_json` wrote.

    Raises:
        ValueError: the file holds no audit.
    """
    try:
        written = json.loads(pathlib.Path(file).read_text())
        return frozenset((finding["code"], finding["path"]) for finding in written["findings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"baseline {os.fspath(file)!r} is not the JSON of an audit: {error}") from error


def since(audit: Audit, baseline: frozenset[tuple[str, str]]) -> Audit:
    """The audit without what an older one already found."""
    new = tuple(finding for finding in audit.findings if (finding.code, finding.path) not in baseline)
    return dataclasses.replace(audit, findings=new, silenced=audit.silenced + len(audit.findings) - len(new))
