"""Which statistics are asked for: by name, or a caller's own reducers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from varscale.measuring import reducers
from varscale.measuring.reducers import Reducer, Statistics

CUSTOM = "custom:"  # opens the names of what callers' own reducers return
Own = Callable[[Array], Any]
_NAMED: dict[tuple[str, str], Reducer] = {
    ("fast", "fast"): reducers.fast,
    ("fast", "tight"): reducers.tight,
    ("full", "fast"): reducers.full,
    ("full", "tight"): reducers.full,
}
_STATS, _MEMORY = ("fast", "full"), ("fast", "tight")


def chosen(stats: str | Own | Sequence[str | Own] | Mapping[str, Own], memory: str = "fast") -> Reducer:
    """The reducer that a caller's `stats` asks for.

    Args:
        stats: "fast" or "full"; a function of an array that returns a tree of scalars; a dict of such functions by name; or a
            sequence of these. Without a name "fast" is measured too.
        memory: "fast", or "tight" for one reduction that needs no memory of the array's size.

    Raises:
        ValueError: a name is unknown.
        TypeError: `stats` is of another kind.
    """
    if memory not in _MEMORY:
        raise ValueError(f"memory must be one of {', '.join(map(repr, _MEMORY))}, not {memory!r}")
    parts = [stats] if isinstance(stats, str | Mapping) or callable(stats) else stats
    if not isinstance(parts, Sequence):
        raise TypeError(f"stats must be a name, a function of an array, or a sequence or dict of these, not {stats!r}")
    level, own = "fast", dict[str, Own]()
    for part in parts:
        if isinstance(part, str):
            if part not in _STATS:
                raise ValueError(f"stats must be one of {', '.join(map(repr, _STATS))} or a function of an array, not {part!r}")
            level = part
        elif isinstance(part, Mapping) and all(map(callable, part.values())):
            own |= part
        elif callable(part):
            own[getattr(part, "__name__", type(part).__name__)] = part
        else:
            raise TypeError(f"stats must hold names and functions of an array, not {part!r}")
    named = _NAMED[level, memory]
    if not own:
        return named

    def reduce(x: Array) -> Statistics:
        return named(x) | {CUSTOM + name: _scalars(name, f(x)) for name, f in own.items()}

    return reduce


def _scalars(name: str, tree: Any) -> Any:
    found = jax.tree_util.tree_map(jnp.asarray, tree)
    for x in jax.tree_util.tree_leaves(found):
        if x.shape:
            raise ValueError(f"stats: {name} must return scalars, not an array of shape {x.shape}")
    return found


def custom(statistics: Mapping[str, Any]) -> dict[str, float]:
    """The results of callers' own reducers by name; "name['k']" where a reducer returns a tree."""
    return {
        key.removeprefix(CUSTOM) + jax.tree_util.keystr(path): float(x)
        for key, tree in statistics.items()
        if key.startswith(CUSTOM)
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
