"""Values given for some leaves of a model, by the leaf that each is for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from varscale.programs.trees import Leaf, is_abstract, is_collections, open_tree


def given_values(given: Any, leaves: Sequence[Leaf]) -> dict[str, Any]:
    """The given values by the path of the leaf they are for.

    Raises:
        ValueError: a value has no leaf, or another shape than it.
    """
    if given is None:
        return {}
    known = {leaf.path: leaf for leaf in leaves}
    within = is_collections(tuple(known))
    found: dict[str, Any] = {}
    for leaf in open_tree(given, "given").leaves:
        if is_abstract(leaf.value):
            continue
        path = leaf.path if leaf.path in known or not within else f"params/{leaf.path}"
        if path not in known:
            close = ", ".join(list(known)[:4])
            raise ValueError(f"given: the model has no leaf {leaf.path!r} (it has {close}{', ...' if len(known) > 4 else ''})")
        if leaf.shape != known[path].shape:
            raise ValueError(f"given: {leaf.path!r} has shape {leaf.shape}, and the model's leaf {known[path].shape}")
        found[path] = leaf.value if hasattr(leaf.value, "dtype") else np.asarray(leaf.value)
    return found
