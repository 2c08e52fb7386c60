"""Modules of nnx as programs: instances, and factories that make them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from varscale import _compat
from varscale.programs.assignments import quick_assignments
from varscale.programs.calls import recording
from varscale.programs.marks import Marking
from varscale.programs.nnx_calls import recorded
from varscale.programs.program import KEY_SEED, Inputs, Program, Tree


def instance_program(model: nnx.Module, method: str) -> Program:
    """The program of an nnx module with its parameters."""
    graph, state = nnx.split(model)
    return _program(type(model).__name__, None, lambda: graph, method, parameters=state)


def factory_program(factory: Callable[..., Any], method: str) -> Program:
    """The program of a function of `nnx.Rngs` that makes a module."""
    built: list[Any] = []

    def init(key: Any, x: Inputs | None) -> Tree:
        rngs = nnx.Rngs(key)
        with quick_assignments(rngs):
            model = factory(rngs)
        if not isinstance(model, nnx.Module):
            raise TypeError(f"an nnx factory must return an nnx.Module, not {model!r}")
        graph, state = nnx.split(model)
        built[:] = [graph]
        return state

    def graph() -> Any:
        if not built:
            jax.eval_shape(lambda key: init(key, None), jax.random.key(KEY_SEED))
        return built[0]

    return _program("model", init, graph, method)


def _program(kind: str, init: Any, graph: Callable[[], Any], method: str, parameters: Tree | None = None) -> Program:
    kinds: dict[str, str] = {}

    def run(state: Tree, x: Inputs, rngs: Any = None) -> Any:
        def merged() -> Any:
            # Of a copy: `nnx.merge` takes the variables of the state as they are, and a call writes into them.
            return nnx.merge(graph(), jax.tree.map(lambda leaf: leaf, state))

        def call(model: Any) -> Any:
            if rngs is not None:
                nnx.reseed(model, **_streams(model, rngs))
            return getattr(model, method)(*x.args, **x.kwargs)

        # Paths change the structure of blocks that are stacked; paths that compare equal do not, but may be mistaken for one
        # another. The last error is the model's own.
        for alike in (False, True):
            model = merged()
            try:
                with quick_assignments(model), recorded(model, alike=alike):
                    return call(model)
            except Exception as error:
                if _compat.is_forward_mode_error(error):
                    raise
        return call(merged())

    def apply(state: Tree, x: Inputs) -> tuple[Any, dict[str, Any]]:
        marking = Marking(method, kinds)
        with recording(marking.run):
            return run(state, x), marking.outputs

    def start(key: Any, x: Inputs) -> tuple[Tree, Any, dict[str, Any], bool]:
        assert init is not None
        state = init(key, x)
        return state, *apply(state, x), True

    return Program(kind, init, apply, run, start if init is not None else None, parameters, kinds, init is not None)


def _streams(model: Any, rngs: Any) -> dict[str, Any]:
    """Keys by stream; one key is split among the streams that the model has."""
    if isinstance(rngs, Mapping):
        return dict(rngs)
    names = sorted({x.tag for _, x in nnx.iter_graph(model) if isinstance(x, nnx.RngStream)})
    return {name: jax.random.fold_in(rngs, i) for i, name in enumerate(names)}
