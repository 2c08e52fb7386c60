"""Names of mapped axes that a model's collectives use: bound to an axis of one device where nothing else binds them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax

from varscale.programs.program import Inputs, Program

_UNBOUND = re.compile(r"unbound axis name: (\S+?)\.?(?:\s|$)")


def bound(program: Program) -> Program:
    """The program, which runs as on one device of the mapped axes that its model names.

    `flax.linen.BatchNorm(axis_name="batch")` averages over the devices of an axis that `jax.pmap` or `jax.shard_map` binds
    around the training step. A model alone is in no such step, and its statistics are those of one device.
    """
    names: list[str] = []  # found by the first pass that needs them
    runs = ("init", "apply", "run", "start")
    return dataclasses.replace(
        program, **{name: _on_one_device(f, names) for name in runs if (f := getattr(program, name)) is not None}
    )


def _on_one_device(f: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    @functools.wraps(f)
    def run(*args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return _within(names, lambda: f(*map(_anew, args), **kwargs)) if names else f(*args, **kwargs)
            except Exception as error:
                found = _UNBOUND.search(str(error))
                if found is None or found[1] in names:
                    raise
                names.append(found[1])

    return run


def _anew(arg: Any) -> Any:
    """A copy of the containers of an argument: the variables of nnx are assigned to in the trace that made them alone."""
    if isinstance(arg, Inputs):
        return Inputs(*map(_anew, (arg.args, dict(arg.kwargs))))
    return jax.tree_util.tree_map(lambda x: x, arg)


def _within(names: list[str], call: Callable[[], Any]) -> Any:
    """The result of a call inside axes of size 1 with these names; what is no array passes by."""
    if not names:
        return call()
    passing: list[tuple[Any, list[Any]]] = []

    def arrays() -> list[Any]:
        leaves, tree = jax.tree_util.tree_flatten(_within(names[1:], call))
        passing.append((tree, [None if isinstance(x, jax.Array) else x for x in leaves]))
        return [x for x in leaves if isinstance(x, jax.Array)]

    mapped = jax.vmap(arrays, in_axes=(), out_axes=None, axis_name=names[0], axis_size=1)
    found = iter(mapped())
    tree, leaves = passing[-1]
    return tree.unflatten([next(found) if x is None else x for x in leaves])
