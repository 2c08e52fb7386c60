"""What a Monitor recorded, by step, and its picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np
from jaxtyping import Float, Int

from varscale.reporting.training import Panel, training_plot

STEP, TIME = "step", "time"
_NOT_SCALARS = (STEP, TIME)


class Records(Sequence[dict[str, Any]]):
    """Records in the order they were written, each a dict: "step", "time" in seconds since 1970, and the statistics by key.

    Keys are "activation/second_moment/<path>", "gradient/second_moment/<path>" and so on for the other statistics, and
    "optax/<name>" for what optax's monitoring transformations measured.

    >>> records = Records([{"step": 0, "activation/mean/a": 1.0}, {"step": 100, "activation/mean/a": 2.0}])
    >>> records.steps, records.values("activation/mean/a")
    (array([  0, 100]), array([1., 2.]))
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()):
        """Hold the records."""
        self._records = [dict(record) for record in records]

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, place: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, place: slice) -> Records: ...

    def __getitem__(self, place: int | slice) -> dict[str, Any] | Records:
        return Records(self._records[place]) if isinstance(place, slice) else self._records[place]

    def __repr__(self) -> str:
        span = f" of steps {self._records[0][STEP]} to {self._records[-1][STEP]}" if self._records else ""
        return f"Records({len(self)}{span}, {len(self.keys)} statistics)"

    @property
    def steps(self) -> Int[np.ndarray, " n"]:
        """The step of each record."""
        return np.array([record[STEP] for record in self._records], int)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of all statistics, in the order of the rows."""
        return tuple(dict.fromkeys(key for record in self._records for key in record if key not in _NOT_SCALARS))

    def values(self, key: str) -> Float[np.ndarray, " n"]:
        """One statistic by record; NaN where a record has none.

        Raises:
            KeyError: no record has it.
        """
        if not any(key in record for record in self._records):
            raise KeyError(f"no record has {key!r}; the first keys are {', '.join(map(repr, self.keys[:3]))}")
        return np.array([record.get(key, np.nan) for record in self._records], float)

    def plot(self) -> Any:
        """Each statistic by step and depth, one panel each; what has no depth, such as a norm, as a line by step.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: there are no records.
        """
        panels: dict[str, list[tuple[str, str]]] = {}
        for key in self.keys:
            group, _, rest = key.partition("/")
            name, _, path = rest.partition("/")
            panels.setdefault(f"{group} {name}".replace("_", " "), []).append((key, path))
        last = {int(step): place for place, step in enumerate(self.steps)}  # a run that was resumed wrote some steps twice
        order = [last[step] for step in sorted(last)]
        return training_plot(
            self.steps[order],
            [
                Panel(title, tuple(path for _, path in keys), np.stack([self.values(key)[order] for key, _ in keys]))
                for title, keys in panels.items()
            ],
        )
