"""Rows that are no module's output: attention's scores, and what the updates of kernels add to the outputs.

The second is (W − W₀) x at the present x: unlike the change of an output it holds no change of x, so that it tells the learning
rate of W alone.
"""

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

SCORES, UPDATE = "scores", "update"  # of the module "attention" the rows are "attention.scores" and "attention.update"
_KERNEL_PRODUCTS = ("dot_general", "conv_general_dilated")
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
        start: where it is made of parameters alone, its value before training.
    """

    data: bool
    scores: Any = None
    start: Any = None


_CONSTANT = _Known(False)


def with_extra_rows(
    function: Callable[[list[Any], list[Any]], Any],
) -> Callable[[list[Any], list[Any], list[Any]], Any]:
    """A function of (parameters, those before training, inputs) that gives these rows to the recorder as calls.

    Args:
        function: a function of (parameters, inputs).
    """

    @functools.wraps(function)
    def run(leaves: list[Any], start: list[Any], arrays: list[Any]) -> Any:
        record = recorder()
        if record is None:
            return function(leaves, arrays)
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(leaves, arrays)
        known = [_Known(False, start=x) for x in start] + [_Known(True)] * len(arrays)
        outputs, _ = _ExtraRows(record).run(closed.jaxpr, closed.consts, [*leaves, *arrays], known, "")
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


class _ExtraRows:
    """Evaluates jaxprs anew, giving what enters a softmax and what updates of kernels add to a recorder."""

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
                found = self._known(eqn, values, outs, given, inside)
            env.update(zip(eqn.outvars, outs, strict=True))
            told.update(zip(eqn.outvars, found, strict=True))
        return [value(v) for v in jaxpr.outvars], [knowledge(v) for v in jaxpr.outvars]

    def _known(self, eqn: Any, values: Sequence[Any], outs: Sequence[Any], given: Sequence[_Known], path: str) -> list[_Known]:
        """What is known of an equation's outputs; scores that enter a softmax and updates of kernels are recorded."""
        name = eqn.primitive.name
        data = any(x.data for x in given)
        if not data:
            if all(x.start is None for x in given):
                return [_CONSTANT] * len(eqn.outvars)
            before = [x if k.start is None else k.start for x, k in zip(values, given, strict=True)]
            return [_Known(False, start=x) for x in _compat.evaluated(eqn, before)]
        if name in _KERNEL_PRODUCTS and any(x.start is not None for x in given):
            operands = [x if k.start is None else x - k.start for x, k in zip(values, given, strict=True)]
            added = _compat.evaluated(eqn, jax.lax.stop_gradient(operands))
            self.record(Call(path, UPDATE, UPDATE), lambda: added[0])
        before = next((x.scores for x in given if x.scores is not None), None)
        if name == "dot_general" and all(x.data for x in given):
            return [_Known(True, outs[0])]
        if before is None:
            return [_Known(data)] * len(eqn.outvars)
        if name == "reduce_max" or any(_softmaxes(_compat.sub_jaxpr(part)[0]) for part in _inside(eqn)):
            self.record(Call(path, SCORES, SCORES), lambda: before)
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
        of_carry = [_Known(True)] * len(of_first)

        def body(carry: list[Any], x: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any]]:
            of_step = [known._replace(start=start) for known, start in zip(of_streams, x[1], strict=True)]
            outs, _ = self.run(jaxpr, consts, [*constants, *carry, *x[0]], [*of_constants, *of_carry, *of_step], path)
            return outs[: len(first)], outs[len(first) :]

        options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
        last, stacked = jax.lax.scan(body, first, (streams, [x.start for x in of_streams]), **options)
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
