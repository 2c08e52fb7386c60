"""Plain functions with a row for every `jax.named_scope` block, as modules have one for every call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from varscale import _compat
from varscale.measuring.sites import sub_jaxprs
from varscale.programs.calls import Call, Recorder, recorder
from varscale.programs.pieces import REMAT
from varscale.programs.scopes import ends, opened

# Equations that are entered: what they mean to differentiation stays, which is not so of custom derivatives.
_ENTERED = ("jit", "pjit", "closed_call", "scan", "cond", *REMAT)


def scoped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its `jax.named_scope` blocks given to the recorder as calls of kind "scope"."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        record = recorder()
        if record is None:
            return function(*args, **kwargs)
        leaves, tree = jax.tree_util.tree_flatten((args, kwargs))
        places = [i for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")]

        def of_arrays(*arrays: Any) -> Any:
            full = list(leaves)
            for i, x in zip(places, arrays, strict=True):
                full[i] = x
            args, kwargs = jax.tree_util.tree_unflatten(tree, full)
            return function(*args, **kwargs)

        arrays = [leaves[i] for i in places]
        closed, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(*arrays)
        outputs = _Scopes(record).run(closed.jaxpr, closed.consts, arrays, "")
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(shapes), outputs)

    return run


class _Scopes:
    """Evaluates jaxprs anew, giving what each scope puts out to a recorder."""

    def __init__(self, record: Recorder):
        self.record = record

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], path: str) -> list[Any]:
        """The outputs of a jaxpr that is called in the scopes `path`."""
        env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))

        def value(atom: Any) -> Any:
            return atom.val if _compat.is_literal(atom) else env[atom]

        ended = ends(jaxpr.eqns, jaxpr.outvars, path)
        for i, eqn in enumerate(jaxpr.eqns):
            values = [value(v) for v in eqn.invars]
            inside = opened(eqn, path)[1]
            enter = eqn.primitive.name in _ENTERED and any(_has_scopes(part, inside) for part in sub_jaxprs(eqn))
            outs = self._enter(eqn, values, inside) if enter else _compat.evaluated(eqn, values)
            env.update(zip(eqn.outvars, outs, strict=True))
            for scope, var in ended.get(i, ()):
                env[var] = self.record(Call(scope.path, "__call__", "scope"), functools.partial(env.get, var))
        return [value(v) for v in jaxpr.outvars]

    def _body(self, jaxpr: Any, consts: Sequence[Any], path: str, *args: Any) -> list[Any]:
        return self.run(jaxpr, consts, args, path)

    def _enter(self, eqn: Any, values: list[Any], path: str) -> Sequence[Any]:
        parts = [_compat.sub_jaxpr(part) for part in sub_jaxprs(eqn)]
        bodies = [functools.partial(self._body, *part, path) for part in parts]
        params = eqn.params
        if eqn.primitive.name == "cond":
            return jax.lax.switch(values[0], bodies, *values[1:])
        if eqn.primitive.name in REMAT:
            kept = params["prevent_cse"]
            kept = kept if isinstance(kept, bool) else any(kept)
            return jax.checkpoint(bodies[0], prevent_cse=kept, policy=params["policy"])(*values)
        if eqn.primitive.name != "scan":
            return bodies[0](*values)
        constants, first, streams = _compat.scan_operands(params, values)

        def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            outs = bodies[0](*constants, *carry, *x)
            return outs[: len(first)], outs[len(first) :]

        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        last, stacked = jax.lax.scan(body, first, streams, **options)
        return [*last, *stacked]


def _has_scopes(part: Any, path: str) -> bool:
    jaxpr = _compat.sub_jaxpr(part)[0]
    return any(opened(eqn, path)[0] or any(_has_scopes(inner, path) for inner in sub_jaxprs(eqn)) for eqn in jaxpr.eqns)
