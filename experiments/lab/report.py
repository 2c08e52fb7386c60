"""What was found, for a reader: Markdown, the same as one HTML page that opens by itself, and the terminal."""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from experiments.lab.claims import LEVEL, number

Record = dict[str, Any]
SIGNS = {"holds": "✓", "does not hold": "✗", "inconclusive": "?"}
COLOURS = {"holds": "green", "does not hold": "red", "inconclusive": "yellow"}


def tally(records: Sequence[Record]) -> str:
    """How many claims hold, in words."""
    verdicts = [claim["verdict"] for record in records for claim in record["claims"]]
    words = {"does not hold": ("does not hold", "do not hold"), "inconclusive": ("inconclusive", "inconclusive")}
    counts = {verdict: verdicts.count(verdict) for verdict in words}
    failing = [f"{count} {words[verdict][count > 1]}" for verdict, count in counts.items() if count]
    return f"{verdicts.count('holds')} of {len(verdicts)} claims hold" + (f" ({', '.join(failing)})" if failing else "")


def succeeded(records: Sequence[Record]) -> bool:
    """Whether every claim holds, or is merely inconclusive where the user's own data or seeds leave it so."""
    return all(
        claim["verdict"] == "holds" or (claim["verdict"] == "inconclusive" and bool(record["exploratory"]))
        for record in records
        for claim in record["claims"]
    )


def markdown_of_all(title: str, records: Sequence[Record], origin: dict[str, Any]) -> str:
    """One report over several experiments, whose pictures lie in folders of their names.

    Args:
      title: of the report.
      records: of the experiments.
      origin: of the run (`experiments.lab.origin.of`).
    """
    rows = [
        (f"[{record['name']}](#{record['name']})", record["title"], tally([record]), duration(record["seconds"]))
        for record in records
    ]
    parts = [
        f"# {title}",
        f"**{tally(records)}**, in {duration(sum(record['seconds'] for record in records))}.",
        _origin(origin),
        "Each experiment ends in claims. A claim gives the value that its source leads one to expect, fixed before the run, and"
        f" the measured value with its {LEVEL:.0%} interval over seeds. It holds where the whole interval lies within what is"
        " expected.",
        _table(("experiment", "what it shows", "claims", "time"), rows),
        *(markdown(record, level=2, folder=f"{record['name']}/") for record in records),
    ]
    return "\n\n".join(parts) + "\n"


def markdown(record: Record, *, level: int = 1, folder: str = "") -> str:
    """The report of one experiment; its pictures lie in `folder`, relative to the report."""
    head, below = "#" * level, "#" * (level + 1)
    introduction = record["introduction"]
    parts = [
        # An anchor of its own: renderers make different ones of a heading with an apostrophe.
        f'<a id="{record["name"]}"></a>',
        f"{head} {record['title']}",
        f"`{record['name']}`: **{tally([record])}**, in {duration(record['seconds'])}.",
        _origin(record["origin"]),
        "\n".join(f"- **{name.capitalize()}:** {introduction[name]}" for name in ("data", "net", "inputs"))
        + f"\n- **Statements checked are from:** {'; '.join(introduction['notes'])}",
        *_exploratory(record),
        *record["remarks"],
    ]
    for figure in record["figures"]:
        parts.append(f"![{figure['caption']}]({folder}{figure['file']})")
        parts.append(f"*{figure['caption']}*")
    parts += [
        f"{below} Claims",
        _table(
            ("", "claim", "quantity, unit", "expected", f"measured [{LEVEL:.0%} interval]", "seeds", "source"),
            [
                (
                    f"{SIGNS[claim['verdict']]} {claim['verdict']}",
                    claim["sentence"] + (f" *To decide it: {claim['to_decide']}.*" if "to_decide" in claim else ""),
                    claim["unit"],
                    claim["expected"]["text"],
                    claim["measured"]["text"],
                    claim["measured"]["seeds"] or "",
                    claim["expected"]["source"],
                )
                for claim in record["claims"]
            ],
        ),
    ]
    refuted = [claim for claim in record["claims"] if "refutes" in claim]
    if refuted:
        parts.append(f"{below} Statements refuted")
        parts += [_refutation(claim) for claim in refuted]
    for table in record["tables"]:
        parts += [f"{below} {table['title']}", *([table["note"]] if table["note"] else [])]
        parts.append(_table(table["columns"], table["rows"]))
    return "\n\n".join(parts) + ("\n" if level == 1 else "")


def page(title: str, text: str, folder: Path) -> str:
    """The Markdown as an HTML page that carries its pictures, which lie in `folder`, inside."""
    body = MarkdownIt("commonmark").enable("table").render(text)
    body = re.sub(r'src="([^":]+\.png)"', lambda match: f'src="{_inlined(folder / match[1])}"', body)
    for verdict, sign in SIGNS.items():
        body = body.replace(f"<td>{sign} {verdict}</td>", f'<td class="{COLOURS[verdict]}">{sign}&nbsp;{verdict}</td>')
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    return PAGE.format(title=html.escape(title), style=STYLE, body=body)


def show(console: Console, record: Record, folder: Path) -> None:
    """Print tables and claims, and where the rest is."""
    for table in record["tables"]:
        console.print(_shown_table(table))
    claims = Table(show_header=False, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    claims.add_column(no_wrap=True)
    claims.add_column(ratio=1)
    for claim in record["claims"]:
        claims.add_row(*_shown_claim(claim))
    console.print(claims)
    for line in _exploratory(record):
        console.print(Text(line, style="yellow"))
    console.print(Text(f"{record['name']}: {tally([record])}, in {duration(record['seconds'])}", style="bold"))
    console.print(Text(f"results in {folder} ({', '.join(record['files'])}, results.json)", style="dim"), soft_wrap=True)


def show_all(console: Console, records: Sequence[Record]) -> None:
    """Print the claims that do not hold, if there are any, and a table with one line an experiment."""
    for record in records:
        failing = [claim for claim in record["claims"] if claim["verdict"] != "holds"]
        if failing:
            claims = Table(title=Text(record["name"]), title_justify="left", show_header=False, box=None, pad_edge=False)
            claims.add_column(no_wrap=True)
            claims.add_column(ratio=1)
            for claim in failing:
                claims.add_row(*_shown_claim(claim))
            console.print(claims)
    table = Table(box=None, pad_edge=False, header_style="bold", show_footer=True, footer_style="bold")
    counts = [_counts(record) for record in records]
    total = [str(sum(column)) for column in zip(*counts, strict=True)]
    seconds = duration(sum(record["seconds"] for record in records))
    for name, footer in zip(("experiment", "claims", "hold", "refutations", "time"), ("all", *total, seconds), strict=True):
        table.add_column(name, footer=footer, justify="left" if name == "experiment" else "right", no_wrap=True)
    for record, row in zip(records, counts, strict=True):
        style = "" if row[0] == row[1] else "yellow" if succeeded([record]) else "red"
        table.add_row(record["name"], *map(str, row), duration(record["seconds"]), style=style)
    console.print(table)
    console.print(Text(tally(records), style="bold green" if succeeded(records) else "bold red"))


def _counts(record: Record) -> tuple[int, int, int]:
    """Of one experiment: claims, those that hold, and the statements that those refute."""
    holding = [claim for claim in record["claims"] if claim["verdict"] == "holds"]
    return len(record["claims"]), len(holding), sum("refutes" in claim for claim in holding)


def _shown_claim(claim: Record) -> tuple[Text, Group]:
    """The verdict, and the claim with its figures, what would decide it and what it refutes."""
    verdict, seeds = claim["verdict"], claim["measured"]["seeds"]
    over = f" ({seeds} seeds)" if seeds > 1 else ""
    detail = f"{claim['unit']}: expected {claim['expected']['text']}, measured {claim['measured']['text']}{over}"
    lines = [Text(claim["sentence"]), Text(detail, style="dim")]
    if "to_decide" in claim:
        lines.append(Text(f"to decide it: {claim['to_decide']}", style="yellow"))
    if "refutes" in claim:
        lines.append(Text(f"{_state(claim)}: “{claim['refutes']['statement']}” ({claim['refutes']['by']})", style="cyan"))
    return Text(f"{SIGNS[verdict]} {verdict}", style=COLOURS[verdict]), Group(*lines)


def _origin(origin: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    return f"Made by `{origin['command']}` on {origin['date']}, commit {origin['commit']} ({versions})."


def _exploratory(record: Record) -> list[str]:
    """Why inconclusive claims do not fail this run: a line where there are such."""
    if not record["exploratory"] or all(claim["verdict"] != "inconclusive" for claim in record["claims"]):
        return []
    return [f"A claim that is inconclusive does not fail this run: {'; '.join(record['exploratory'])}."]


def _shown_table(table: Record) -> Table:
    note = Text(table["note"]) if table["note"] else None
    shown = Table(title=Text(table["title"]), title_justify="left", caption=note, caption_justify="left")
    for column in range(len(table["columns"])):
        numeric = all(not isinstance(row[column], str) for row in table["rows"])
        shown.add_column(Text(table["columns"][column]), justify="right" if numeric else "left")
    for row in table["rows"]:
        shown.add_row(*(Text(_cell(value)) for value in row))
    return shown


def _refutation(claim: Record) -> str:
    refuted, measured = claim["refutes"], f"{claim['measured']['text']}, {claim['unit']}"
    return f"“{refuted['statement']}” ({refuted['by']}). **{_state(claim)}**: measured {measured}. {refuted['reason']}"


def _state(claim: Record) -> str:
    return {"holds": "Refuted", "does not hold": "Not refuted"}.get(claim["verdict"], "Refutation inconclusive")


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(value).replace("|", "\\|") for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "not a number"
    return number(value) if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """In words: 12 s, 3.4 min."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _inlined(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


STYLE = """
:root { color-scheme: light dark; --ink: #22272e; --paper: #fff; --faint: #e4e8ec; --soft: #5b6770; }
@media (prefers-color-scheme: dark) { :root { --ink: #dde3ea; --paper: #171b20; --faint: #313941; --soft: #98a3ad; } }
body { font: 16px/1.55 system-ui, "DejaVu Sans", sans-serif; color: var(--ink); background: var(--paper);
       max-width: 62rem; margin: 2rem auto 5rem; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; margin: 2.2em 0 .6em; } h1 { margin-top: 0; }
h2 { border-top: 1px solid var(--faint); padding-top: 1.4em; }
img { max-width: 100%; height: auto; display: block; margin: 1.5em auto .3em; border-radius: 4px; }
em { color: var(--soft); } code { font-size: .92em; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; margin: .6em 0 1.4em; }
th, td { text-align: left; vertical-align: top; padding: .35em .8em .35em 0; border-bottom: 1px solid var(--faint); }
th { color: var(--soft); font-weight: 600; }
.green { color: #1f8a54; } .red { color: #d0342c; font-weight: 600; } .yellow { color: #b57a00; font-weight: 600; }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
