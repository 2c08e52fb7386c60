"""What nodes are made of, as numbers: equal for one array in two graphs, whatever else these hold.

Nodes are told apart by their ids, which depend on what was built before. Draws come from content instead: a model has the
same ones beside another model, and a layer keeps its own when another is inserted. Of factors only the signs count: under
another variance of its weights a model has the same draws, rescaled, and a prediction is a smooth function of the variances.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from varscale.theory.domain.axes import Axis
from varscale.theory.graph.expressions import Apply, Sum
from varscale.theory.graph.nodes import Node
from varscale.theory.graph.store import once_per_node


@once_per_node
def content(node: Node) -> int:
    """A hash, 64 bits, of a node's kind, axes and parameters, and of its arguments' content."""
    args = [(content(child), bind) for child, bind in node.args]
    if isinstance(node, Sum):  # whose terms are in the order in which they were built
        args, params = sorted(zip(args, np.sign(node.params).tolist(), strict=True)), ()
    elif isinstance(node, Apply) and node.params[0] == "affine":
        params = np.sign(node.params[1]).tolist()
    else:
        params = node.params
    return hashed(type(node).__name__, node.axes, params, args)


def hashed(*parts: Any) -> int:
    """A hash, 64 bits, of numbers, text, arrays, random keys and nodes, and of containers of these."""
    return int.from_bytes(hashlib.sha1(_written(parts).encode()).digest()[:8], "big")


def _written(x: Any) -> str:
    if isinstance(x, tuple | list | frozenset):
        return f"({','.join(map(_written, x))})"
    if isinstance(x, Mapping):
        return _written(sorted((str(key), _written(value)) for key, value in x.items()))
    if isinstance(x, Node):
        return f"node {content(x)}"
    if isinstance(x, Axis):
        return f"{x.size} {x.labels!r}"
    if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = np.asarray(jax.random.key_data(x))
    if isinstance(x, np.ndarray | jax.Array):
        return f"{x.shape} {x.dtype} {hashlib.sha1(np.ascontiguousarray(x).tobytes()).hexdigest()}"
    if callable(x):
        return getattr(x, "__qualname__", type(x).__qualname__)
    return repr(x)
