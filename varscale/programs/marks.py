"""Marks in a jaxpr that say which module's method made what: a scope around the method, and a name on what it returns."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from varscale.programs.calls import Call, Running

MODULE = "module:"  # opens the name of a scope, or of an output, that says its module's whole path, whoever calls it
WITHIN = "within:"  # opens one that says the path inside the piece that it is part of
FIELD = "|"  # separates that path, which array of the output it is, and how many there are


class Marking:
    """A recorder of calls that marks them, forward, and keeps what they return.

    Attributes:
        kinds: path of a module -> its class name.
        running: the calls that run now.
        calls: path of a row -> number of calls.
        outputs: path of a call -> what it returned; "path#1" where the module is called again. Only of the calls in the trace
            that the recorder was made in: what an inner one made is known nowhere else.
    """

    def __init__(self, method: str, kinds: dict[str, str], mark: str = MODULE):
        """A recorder of one trace.

        Args:
            method: the method of the model that is run in place of `__call__`.
            kinds: where class names are kept.
            mark: MODULE, or WITHIN for the trace of a piece.
        """
        self.kinds = kinds
        self.calls: collections.Counter[str] = collections.Counter()
        self.outputs: dict[str, Any] = collections.OrderedDict()  # whose order jax keeps, where it sorts a plain one
        self._method = method
        self._mark = mark
        self.running = Running()
        self._trace = _trace()

    def run(self, call: Call, function: Callable[[], Any]) -> Any:
        """The output of a module call, its arrays marked."""
        self.kinds.setdefault(call.path, call.kind)
        row = call.row(self._method)
        where = self._mark + row
        with self.running.entered(call) as own:
            if not own:
                return function()
            with jax.named_scope(where):
                output = function()
                if not call.has_row:
                    return output
                output = map_arrays(
                    lambda x, field, arrays: checkpoint_name(x, FIELD.join((where, field, str(arrays)))), output
                )
        again = self.calls[row]
        self.calls[row] += 1
        if _trace() == self._trace:
            self.outputs[f"{row}#{again}" if again else row] = output
        return output

    def add(self, path: str, inside: Marking) -> None:
        """Count the calls inside a piece that is called at a path."""
        for row, calls in inside.calls.items():
            self.calls[path + row if row[:1] in ("", ".") else f"{path}/{row}"] += calls
        for module, kind in inside.kinds.items():
            self.kinds.setdefault(f"{path}/{module}" if module else path, kind)


def _trace() -> Any:
    return jax.extend.core.get_opaque_trace_state(convention="nnx")


def map_arrays(f: Callable[[jax.Array, str, int], jax.Array], output: Any) -> Any:
    """The output with `f(array, field, number of arrays)` in place of its arrays of numbers."""
    # A module that a method hands out stays the one it is.
    leaves, tree = jax.tree_util.tree_flatten_with_path(output, is_leaf=lambda x: isinstance(x, nnx.Module | nnx.Variable))
    is_array = [isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.number) for _, leaf in leaves]
    marked = [
        f(leaf, field_path(keys), sum(is_array)) if array else leaf
        for (keys, leaf), array in zip(leaves, is_array, strict=True)
    ]
    return jax.tree_util.tree_unflatten(tree, marked)


def field_path(keys: Any) -> str:
    """Where in an output an array is: "" for the output itself, "[0]", "['k']"."""
    return jax.tree_util.keystr(tuple(_plain(key) for key in keys))


def _plain(key: Any) -> Any:
    """A field of a dataclass as its name, a place in some other container as its number."""
    if isinstance(key, jax.tree_util.GetAttrKey):
        return jax.tree_util.DictKey(key.name)
    return jax.tree_util.SequenceKey(key.key) if isinstance(key, jax.tree_util.FlattenedIndexKey) else key
