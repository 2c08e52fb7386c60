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
from typing import Any, Literal, NamedTuple, get_args

from varscale.programs.patterns import matches_row
from varscale.report import Report
from varscale.reporting.layout import Style, terminal_width, wrapped

Level = Literal["error", "warning", "info"]
LEVELS: tuple[Level, ...] = get_args(Level)
_STYLES: dict[Level, Style] = {"error": "red", "warning": "yellow", "info": "plain"}
ERROR_FACTOR = 1e3  # of the second moment over the whole depth
WARNING_FACTOR = ERROR_FACTOR**0.5  # at twice the depth it is an error
CODES = tuple(f"VS{number}" for number in range(101, 126))  # README.md says what each is
_ESCAPES = {"red": "31", "yellow": "33", "plain": "0"}


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
        alike: where this one tells of several layers that are alike but for their number, the finding of each, the first too.
    """

    code: str
    level: Level
    path: str
    message: str
    figure: float | None = None
    mend: str = ""
    scheme: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    alike: tuple[Finding, ...] = dataclasses.field(default=(), compare=False, repr=False)

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
            painted = f"\x1b[{_ESCAPES[style]}m{head}\x1b[0m" if color and style != "plain" else head
            lines += [painted, *("  " + line for line in wrapped(finding.message, width - 2).splitlines())]
            if finding.mend:
                first, *rest = wrapped(finding.mend, width - 5).splitlines()
                lines += ["  -> " + first, *("     " + line for line in rest)]
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
    """A finding as JSON takes it: without its laws, which are objects; `alike` are the paths of those it tells of."""
    figure = finding.figure
    known = {name: value for name, value in vars(finding).items() if name != "scheme"}
    known["alike"] = [other.path for other in finding.alike]
    return known | {"figure": figure if figure is None or math.isfinite(figure) else str(figure)}


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings by level, then as they came; those of layers that are alike but for their number are one."""
    groups: dict[tuple[str, str, str, int], list[Finding]] = {}
    seen: Counter[tuple[str, str, str]] = Counter()
    for finding in single(findings):
        here = finding.code, finding.level, finding.path
        groups.setdefault((finding.code, finding.level, re.sub(r"\d+", "*", finding.path), seen[here]), []).append(finding)
        seen[here] += 1  # a second finding of one code and place says something else
    joined = [_joined(group) if len(group) > 1 else group[0] for group in groups.values()]
    return tuple(sorted(joined, key=lambda finding: LEVELS.index(finding.level)))


def single(findings: Iterable[Finding]) -> list[Finding]:
    """The findings one by one, those of layers that are alike too."""
    return [one for finding in findings for one in finding.alike or (finding,)]


def _joined(group: Sequence[Finding]) -> Finding:
    """One finding that tells of all of a group."""
    first, *rest = group
    laws = {path: law for finding in group for path, law in finding.scheme.items()}
    return dataclasses.replace(first, message=first.message + _others(rest), scheme=laws, alike=tuple(group))


def _others(rest: Sequence[Finding]) -> str:
    """Where else the same was found."""
    places = list(dict.fromkeys(finding.path for finding in rest if finding.path))
    return f" The same at {', '.join(places[:3])}" + (f" and {len(places) - 3} more." if len(places) > 3 else ".")


class Silenced(NamedTuple):
    """What `ignore` leaves.

    Attributes:
        kept: the findings that no entry names, one by one.
        count: how many were left out.
        idle: the entries that left out none.
    """

    kept: tuple[Finding, ...]
    count: int
    idle: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """One line about the entries that left out nothing: a path may be misspelled, or the finding be mended."""
        return (f"Nothing to silence: {', '.join(self.idle)}.",) if self.idle else ()


def silenced(findings: Iterable[Finding], ignore: Sequence[str]) -> Silenced:
    """The findings that `ignore` leaves.

    Args:
        findings: all of them.
        ignore: codes ("VS104"), or codes with a glob over paths ("VS101:blocks/*/head").

    Raises:
        TypeError: `ignore` is one string.
        ValueError: an entry begins with no code that there is, or its glob is none.
    """
    if isinstance(ignore, str):
        raise TypeError(f"ignore must be a sequence of codes, such as ({ignore!r},), not the string {ignore!r}")
    rules = []
    for entry in map(str, ignore):
        code, _, pattern = entry.partition(":")
        if not (code.startswith("VS") and code[2:].isdigit()):
            raise ValueError(f'ignore must hold codes such as "VS104" or "VS101:blocks/*/head", not {entry!r}')
        if code not in CODES:
            raise ValueError(f"ignore: there is no code {code!r}; codes go from {CODES[0]} to {CODES[-1]}")
        matches_row(pattern, "")  # a glob that is none is an error whatever was found
        rules.append((entry, code, pattern))
    used, kept, each = set(), [], single(findings)
    for finding in each:
        hits = [e for e, code, glob in rules if code == finding.code and (not glob or matches_row(glob, finding.path))]
        used.update(hits)
        if not hits:
            kept.append(finding)
    return Silenced(tuple(kept), len(each) - len(kept), tuple(dict.fromkeys(e for e, *_ in rules if e not in used)))


def read_baseline(file: str | os.PathLike[str]) -> dict[tuple[str, str], Level]:
    """The level by code and path of the findings in a file that `Audit.to_json` wrote.

    Raises:
        ValueError: the file holds no audit.
    """
    try:
        written = json.loads(pathlib.Path(file).read_text())["findings"]
        known = {(f["code"], path): f["level"] for f in written for path in f.get("alike") or [f["path"]]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"baseline {os.fspath(file)!r} is not the JSON of an audit: {error}") from error
    if wrong := next((level for level in known.values() if level not in LEVELS), None):
        raise ValueError(f"baseline {os.fspath(file)!r} is not the JSON of an audit: there is no level {wrong!r}")
    return known


def since(audit: Audit, baseline: Mapping[tuple[str, str], Level]) -> Audit:
    """The audit without what an older one already found; what has become more serious since is new."""

    def is_new(finding: Finding) -> bool:
        level = baseline.get((finding.code, finding.path))
        return level is None or LEVELS.index(finding.level) < LEVELS.index(level)

    each = single(audit.findings)
    new = [finding for finding in each if is_new(finding)]
    return dataclasses.replace(audit, findings=ordered(new), silenced=audit.silenced + len(each) - len(new))
