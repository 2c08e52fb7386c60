"""From the checkpoint's names to the model's: rules by pattern, functions, and layers renumbered."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from varscale.programs.patterns import Pattern, canonical, caught, first_match, substitute, text

Places = str | None | tuple[str, ...]
Stage = Mapping[Pattern, Places] | Callable[[str], Places]
Rename = Stage | Sequence[Stage]


@dataclass(frozen=True)
class Renumber:
    """Layers under other numbers: a stage of `rename`.

    Attributes:
      layers: a glob whose last "*" is the layer's number ("encoder/layers/*").
      numbers: the model's layer for each of the checkpoint's, several for one that is to be copied, None for one to be left
        out (so are those not named).

    Example:
      Every second layer, as DistilBERT was begun: `Renumber("layer/*", {0: 0, 2: 1, 4: 2, 6: 3, 8: 4, 10: 5})`.
    """

    layers: str
    numbers: Mapping[int, int | tuple[int, ...] | None]

    def __call__(self, path: str) -> Places:
        found = caught(self.layers, path)
        if found is None:
            return path
        wildcards, _ = found
        if not wildcards or not wildcards[-1].isdecimal():
            raise ValueError(f"{self}: {path!r} has no number in the place of the last '*' of layers")
        new = self.numbers.get(int(wildcards[-1]))
        numbers = () if new is None else (new,) if isinstance(new, int) else tuple(new)
        head, _, tail = self.layers.rpartition("*")
        places = tuple(substitute(self.layers, f"{head}{number}{tail}", path) for number in numbers)
        return tuple(place for place in places if place is not None) or None


@dataclass(frozen=True)
class Renamed:
    """Where one leaf goes: its new paths (none where a rule drops it), and the rules that sent it there."""

    places: tuple[str, ...]
    dropped_by: str = ""


class Renaming:
    """The stages of `rename`, and which of their rules were of use.

    Raises:
      TypeError: a stage or what it gives is of no kind allowed.
    """

    def __init__(self, rename: Rename | None):
        stages = () if rename is None else (rename,) if isinstance(rename, Mapping) or callable(rename) else tuple(rename)
        self._stages: list[tuple[list[tuple[Pattern, Places]], Callable[[str], Places] | None]] = []
        for stage in stages:
            if isinstance(stage, Mapping):
                self._stages.append((list(stage.items()), None))
            elif callable(stage):
                self._stages.append(([], stage))
            else:
                raise TypeError(f"rename: a stage is {stage!r}; give a mapping from pattern to path, or a function of a path")
        self._used: set[tuple[int, int]] = set()

    def __call__(self, path: str) -> Renamed:
        """Send one path through all stages; in each, the first rule that catches it counts."""
        places: list[str] = [path]
        reason = ""
        for number, (rules, function) in enumerate(self._stages):
            after: list[str] = []
            for place in places:
                if function is not None:
                    given, name = function(place), getattr(function, "__name__", str(function))
                elif (found := first_match(rules, place)) is not None:
                    self._used.add((number, found[0]))
                    given, name = _substituted(*rules[found[0]], place), text(rules[found[0]][0])
                else:
                    given, name = place, ""
                new = () if given is None else (given,) if isinstance(given, str) else given
                if not isinstance(new, tuple) or not all(isinstance(each, str) and each for each in new):
                    raise TypeError(
                        f"rename: {name} makes {given!r} of {place!r}; give a path, a tuple of paths, or None to drop it"
                    )
                reason = reason if new else f"dropped by the rule {name}"
                after.extend(new)
            places = [canonical(place) for place in after]
        return Renamed(tuple(dict.fromkeys(places)), "" if places else reason)

    @property
    def idle(self) -> tuple[str, ...]:
        """The rules that caught nothing."""
        everything = ((n, r, pattern) for n, (rules, _) in enumerate(self._stages) for r, (pattern, _) in enumerate(rules))
        return tuple(text(pattern) for n, r, pattern in everything if (n, r) not in self._used)


def _substituted(pattern: Pattern, new: Places, path: str) -> Places:
    if new is None or isinstance(new, str):
        return new if new is None else substitute(pattern, new, path)
    return tuple(place for each in new if (place := substitute(pattern, each, path)) is not None)
