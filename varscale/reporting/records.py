"""Rows and weights as plain Python values and as JSON, and back."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from varscale.reporting.rows import Histogram, Row, Weight

T = TypeVar("T", Row, Weight)
NONFINITE = "nonfinite"  # the key under which a record says which of its nulls are NaN and infinities


def record(row: Row | Weight) -> dict[str, Any]:
    """The fields as a dict of plain Python values: numbers, texts, tuples and dicts."""
    return dataclasses.asdict(row)


def jsonable(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The dict with null for every number that JSON has not, and which number each was under "nonfinite".

    >>> jsonable({"mean": 1.0, "second_moment": float("inf")})
    {'mean': 1.0, 'second_moment': None, 'nonfinite': {'second_moment': 'inf'}}
    """
    lost: dict[str, str] = {}

    def plain(value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item, f"{path}/{key}" if path else str(key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item, f"{path}/{i}") for i, item in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            lost[path] = str(value)
            return None
        return value

    found = plain(fields, "")
    return {**found, NONFINITE: lost} if lost else found


def restored(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What `jsonable` was given: lists stay lists."""
    lost = fields.get(NONFINITE, {})

    def back(value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return {key: back(item, f"{path}/{key}" if path else str(key)) for key, item in value.items()}
        if isinstance(value, list):
            return [back(item, f"{path}/{i}") for i, item in enumerate(value)]
        return float(lost[path]) if value is None and path in lost else value

    return back({key: value for key, value in fields.items() if key != NONFINITE}, "")


def to_json(rows: tuple[Row, ...], weights: Mapping[str, Weight], notes: tuple[str, ...], **options: Any) -> str:
    """A report as JSON; see `Report.to_json`."""
    parts = {
        "rows": [jsonable(record(row)) for row in rows],
        "weights": [jsonable(record(weight)) for weight in weights.values()],
        "notes": list(notes),
    }
    return json.dumps(parts, **options)


def from_json(text: str | bytes) -> tuple[tuple[Row, ...], dict[str, Weight], tuple[str, ...]]:
    """Rows, weights and notes of a report written by `to_json`.

    Raises:
        ValueError: `text` is not the JSON of a report.
    """
    try:
        parts = json.loads(text)
        rows = tuple(_built(Row, fields) for fields in parts["rows"])
        weights = [_built(Weight, fields) for fields in parts["weights"]]
        notes = tuple(str(note) for note in parts.get("notes", ()))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        start = text[:60] if isinstance(text, str | bytes) else text
        raise ValueError(f"text must be the JSON that Report.to_json writes, not {start!r}: {error}") from error
    return rows, {weight.path: weight for weight in weights}, notes


def _built(kind: type[T], fields: Mapping[str, Any]) -> T:
    known = {field.name for field in dataclasses.fields(kind)}
    values = restored(fields)
    if unknown := values.keys() - known:
        raise ValueError(f"a {kind.__name__} has no field {', '.join(sorted(unknown))}")
    if (histogram := values.get("histogram")) is not None:
        values["histogram"] = Histogram(tuple(histogram["counts"]), tuple(histogram["edges"]))
    built: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return kind(**built)
