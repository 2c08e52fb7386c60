"""What became of every leaf: the account that `graft` gives, and raises when it is told to be strict."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from varscale.programs.tables import shape_text, table_text


@dataclass(frozen=True)
class Entry:
    """One leaf's fate.

    Attributes:
      path: the leaf's own path: in `params` for moved, kept and mismatched leaves, in `pretrained` for those left over.
      shape: its shape there.
      sources: the pretrained leaves behind it (several where they were joined), as they are called in `pretrained`.
      source_shapes: their shapes.
      why: what was done to it, or why nothing was.
      intended: whether the caller asked for this by name (a rule that drops it, a pattern that keeps it fresh).
    """

    path: str
    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    source_shapes: tuple[tuple[int, ...], ...] = ()
    why: str = ""
    intended: bool = False


@dataclass(frozen=True)
class Account:
    """What became of every leaf of both trees.

    Each is a mapping from path to `Entry`, in the order of its tree. Nothing is lost on either side:

    * every leaf of `params` is in exactly one of `moved`, `kept` and `mismatched`, so that their sizes add up;
    * every leaf of `pretrained` is a source in `moved` or in `mismatched`, or it is in `left_over`; in only one of the three
      unless it was split, where parts may meet different fates (`left_over` then names the part).

    Attributes:
      moved: leaves of `params` that now hold pretrained numbers.
      kept: leaves of `params` that hold what they held, for nothing was found for them or the caller asked for it.
      left_over: leaves of `pretrained` that found no place.
      mismatched: leaves of `params` whose pretrained counterpart was found but does not fit; they hold what they held too.
      idle: rename rules that caught nothing.
    """

    moved: Mapping[str, Entry] = field(default_factory=dict)
    kept: Mapping[str, Entry] = field(default_factory=dict)
    left_over: Mapping[str, Entry] = field(default_factory=dict)
    mismatched: Mapping[str, Entry] = field(default_factory=dict)
    idle: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether everything moved that the caller did not exempt by name, and every rule was of use."""
        unasked = (*self.kept.values(), *self.left_over.values(), *self.mismatched.values())
        return not self.idle and all(entry.intended for entry in unasked)

    def __str__(self) -> str:
        counts = ", ".join(f"{len(getattr(self, name))} {name.replace('_', ' ')}" for name in _PARTS)
        return counts + (f"; rules that caught nothing: {', '.join(self.idle)}" if self.idle else "")

    def table(self, width: int = 120) -> str:
        """All leaves, one a line, those that need a look first. `width` is in characters."""
        rows = []
        for name in ("mismatched", "left_over", "kept", "moved"):
            for entry in getattr(self, name).values():
                own = ("", "") if name == "left_over" else (entry.path, shape_text(entry.shape))
                sources = "\n".join(entry.sources), "\n".join(map(shape_text, entry.source_shapes))
                rows.append((name.replace("_", " "), *own, *sources, entry.why))
        return table_text(str(self), ("fate", "leaf", "shape", "pretrained", "its shape", "why"), rows, width)


class GraftError(ValueError):
    """Weights that cannot be moved as asked; `account` says what would have become of every leaf, where it got that far."""

    def __init__(self, message: str, account: Account | None = None):
        super().__init__(message if account is None else f"{message}\n{account.table()}")
        self.account = account


_PARTS = ("moved", "kept", "left_over", "mismatched")
