"""Attention's scores as rows: what enters a softmax, which is no module's output."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from varscale import _compat
from varscale.measuring.sites import REMAT, sub_jaxprs
from varscale.programs.calls import Call, Recorder, recorder
from varscale.programs.scopes import opened

ROW = "scores"  # of the module "attention" the row is "attention.scores"
_ENTERED = ("jit", "pjit", "closed_call", "scan", "cond", *REMAT)
# What leaves scores scores, up to a factor or a soft cap.
_KEPT = frozenset({"mul", "div", "tanh", "convert_element_type", "reshape", "transpose", "squeeze", "copy", "broadcast_in_dim"})
_KEPT |= {"expand_dims", "name", "sharding_constraint", "optimization_barrier"}
_MASKED = frozenset({"add", "sub", "select_n"})  # a mask's −10⁹ is no score: what was there before is measured


class _Known(NamedTuple):
    """What is known of an array.

    Attributes:
        data: whether it depends on the model's inputs.
        scores: where it is made of a product of two arrays that do, that product as it was before masks.
    """

    data: bool
    scores: Any = None


_CONSTANT = _Known(False)


def with_scores(function: Callable[[list[Any], list[Any]], Any]) -> Callable[[list[Any], list[Any]], Any]:
    """A function of (parameters, inputs), attention's scores in it given to the recorder as calls of a method "scores"."""

    @functools.wraps(function)
    def run(leaves: list[Any], arrays: list[Any]) -> Any:
        record = recorder()
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(leaves, arrays)
        if record is None or not _softmaxes(closed.jaxpr):
            return function(leaves, arrays)
        known = [_CONSTANT] * len(leaves) + [_Known(True)] * len(arrays)
        outputs, _ = _Scores(record).run(closed.jaxpr, closed.consts, [*leaves, *arrays], known, "")
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(shapes), outputs)

    return run


def _softmaxes(jaxpr: Any) -> bool:
    """Whether a maximum is taken in it: every softmax does."""
    return any(
        eqn.primitive.name == "reduce_max" or any(_softmaxes(_compat.sub_jaxpr(part)[0]) for part in _inside(eqn))
        for eqn in jaxpr.eqns
    )


def _inside(eqn: Any) -> list[Any]:
    return sub_jaxprs(eqn) or [eqn.params[key] for key in ("call_jaxpr", "fun_jaxpr") if key in eqn.params]


class _Scores:
    """Evaluates jaxprs anew, giving what enters a softmax to a recorder."""

    def __init__(self, record: Recorder):
        self.record = record

    def run(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], known: Sequence[_Known], path: str
    ) -> tuple[list[Any], list[_Known]]:
        """The outputs of a jaxpr, and what is known of them."""
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        told = dict(zip(jaxpr.invars, known, strict=True))

        def value(atom: Any) -> Any:
            return atom.val if _compat.is_literal(atom) else env[atom]

        def knowledge(atom: Any) -> _Known:
            return _CONSTANT if _compat.is_literal(atom) else told.get(atom, _CONSTANT)

        for eqn in jaxpr.eqns:
            values, given = [value(v) for v in eqn.invars], [knowledge(v) for v in eqn.invars]
            inside = opened(eqn, path)[1]
            if eqn.primitive.name in _ENTERED and any(_multiplies(_compat.sub_jaxpr(part)[0]) for part in sub_jaxprs(eqn)):
                outs, found = self._enter(eqn, values, given, inside)
            else:
                outs = _compat.evaluated(eqn, values)
                found = self._known(eqn, outs, given, inside)
            env.update(zip(eqn.outvars, outs, strict=True))
            told.update(zip(eqn.outvars, found, strict=True))
        return [value(v) for v in jaxpr.outvars], [knowledge(v) for v in jaxpr.outvars]

    def _known(self, eqn: Any, outs: Sequence[Any], given: Sequence[_Known], path: str) -> list[_Known]:
        """What is known of an equation's outputs; scores that enter a softmax are recorded."""
        name = eqn.primitive.name
        data = any(x.data for x in given)
        before = next((x.scores for x in given if x.scores is not None), None)
        if name == "dot_general" and all(x.data for x in given):
            return [_Known(True, outs[0])]
        if before is None:
            return [_Known(data)] * len(eqn.outvars)
        if name == "reduce_max" or any(_softmaxes(_compat.sub_jaxpr(part)[0]) for part in _inside(eqn)):
            self.record(Call(path, ROW, ROW), lambda: before)
            return [_Known(data)] * len(eqn.outvars)
        if name in _KEPT:
            return [_Known(data, outs[0])]
        return [_Known(data, before if name in _MASKED or _is_call(eqn) else None)] * len(eqn.outvars)

    def _branch(self, part: tuple[Any, list[Any]], known: Sequence[_Known], path: str, *args: Any) -> list[Any]:
        return self.run(part[0], part[1], args, known, path)[0]

    def _enter(self, eqn: Any, values: list[Any], given: list[_Known], path: str) -> tuple[Sequence[Any], Sequence[_Known]]:
        parts = [_compat.sub_jaxpr(part) for part in sub_jaxprs(eqn)]
        after = _Known(any(x.data for x in given))
        if eqn.primitive.name == "cond":
            branches = [functools.partial(self._branch, part, given[1:], path) for part in parts]
            return jax.lax.switch(values[0], branches, *values[1:]), [after] * len(eqn.outvars)
        jaxpr, consts = parts[0]
        if eqn.primitive.name != "scan":
            return self.run(jaxpr, consts, values, given, path)
        constants, first, streams = _compat.scan_operands(eqn.params, values)
        of_constants, of_first, of_streams = _compat.scan_operands(eqn.params, given)
        kinds = [*of_constants, *[_Known(True)] * len(of_first), *of_streams]

        def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            outs, _ = self.run(jaxpr, consts, [*constants, *carry, *x], kinds, path)
            return outs[: len(first)], outs[len(first) :]

        options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
        last, stacked = jax.lax.scan(body, first, streams, **options)
        return [*last, *stacked], [after] * len(eqn.outvars)


def _multiplies(jaxpr: Any) -> bool:
    """Whether scores may be made in it, or enter a softmax in it after they were made."""
    return any(
        eqn.primitive.name in ("dot_general", "reduce_max")
        or any(_multiplies(_compat.sub_jaxpr(part)[0]) for part in _inside(eqn))
        for eqn in jaxpr.eqns
    )


def _is_call(eqn: Any) -> bool:
    """Whether it is a call of a small function, such as `jnp.where`."""
    return bool(_inside(eqn)) and all(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars)
