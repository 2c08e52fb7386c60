"""Rows of reports for tests."""

from varscale.report import How, Report, Row

NAN, INF = float("nan"), float("inf")


def predicted(path, second=1.0, how: How = "exact", **fields):
    band = fields.pop("band", (0.9 * second, 1.1 * second))
    return Row(path, "Dense", (2, 3), 0.0, second, second, second, band, how=how, **fields)


def measured(path, second=1.0, **fields):
    return Row(path, fields.pop("kind", "Dense"), fields.pop("shape", (2, 3)), 0.0, second, second, **fields)


def deep(blocks=30, make=measured):
    """Rows of a net of equal blocks."""
    inside = ("norm", "attention/query", "attention", "mlp/up", "mlp/down", "")
    rows = [make(f"blocks/{i}/{name}".rstrip("/"), 1.0 + i + k / 10) for i in range(blocks) for k, name in enumerate(inside)]
    return Report((make("embed"), *rows, make("head"), make("")))
