"""Elementwise primitives: one entry each; what they compute is in `integrals.primitives`."""

from __future__ import annotations

from typing import Any

from varscale.theory.graph.expressions import IDENTITIES, roots
from varscale.theory.graph.layout import Value
from varscale.theory.graph.nodes import Array, Leaf
from varscale.theory.integrals.primitives import FUNCTIONS
from varscale.theory.rules.integer_inputs import compared
from varscale.theory.rules.reductions import OneOfMany
from varscale.theory.rules.registry import (
    RECOGNISERS,
    Complex,
    Context,
    elementwise_or_layout,
    map_parts,
    rule,
)

_OWN = {"affine", "convert", "bitcast", "integer_pow", "power", *IDENTITIES}
_NAMES = [name for name in FUNCTIONS if name not in _OWN]
_IDENTITIES = (
    "copy",
    "copy_p",
    "reduce_precision",
    "optimization_barrier",
    "sharding_constraint",
    "device_put",
    "name",
    "pvary",
    "pcast",
    "mesh_cast",
    "reshard",
    "layout_constraint",
)


@rule(*_NAMES, "add_any", "square")
def elementwise(interpreter: Context, eqn: Any, *xs: Value) -> Value:
    name = eqn.primitive.name
    for recognised in RECOGNISERS.get(name, ()):
        if (unit := recognised(interpreter, *xs)) is not None:
            return unit
    if len(xs) == 2 and (known := compared(interpreter, name, eqn.outvars[0].aval.shape, *xs)) is not None:
        return known
    return interpreter.elementwise(name, *xs)


@rule("integer_pow")
def integer_pow(interpreter: Context, eqn: Any, x: Value) -> Value:
    return interpreter.elementwise("integer_pow", x, extra=(eqn.params["y"],))


@rule("convert_element_type")
def convert(interpreter: Context, eqn: Any, x: Value) -> Value:
    old, new = eqn.invars[0].aval.dtype, eqn.params["new_dtype"]
    if old.kind == new.kind == "u" and old != new:
        return interpreter.elementwise("convert", x, extra=(str(new),))
    kinds = {"b": 0, "i": 1, "u": 1, "f": 2, "V": 2, "c": 3}
    # Widening (bool to int to float) and rounding to a narrower float keep the numbers: moments in exact
    # arithmetic.
    if kinds.get(new.kind, 2) >= kinds.get(old.kind, 2) and not (old.kind == "u" and new.kind == "f"):
        return x
    return interpreter.elementwise("convert", x, extra=("f" if kinds.get(new.kind, 2) == 2 else new.kind,))


@rule("bitcast_convert_type")
def bitcast(interpreter: Context, eqn: Any, x: Value) -> Value:
    return interpreter.elementwise("bitcast", x, extra=(str(eqn.params["new_dtype"]),))


@rule(*_IDENTITIES)
def identity(interpreter: Context, eqn: Any, *xs: Value) -> list[Value]:
    return list(xs)


@rule("stop_gradient")
def stop_gradient(interpreter: Context, eqn: Any, x: Any) -> Any:
    """The same forward.

    A maximum that softmax takes from its logits has no gradient anyway; what is made of weights alone is left as it is, since
    no row asks for the gradients of weights: a spectral norm is |Wᵀv|, whether it stops at v or not.
    """
    return map_parts(lambda part: stopped(interpreter, part), x) if isinstance(x, Complex | Value) else x


def stopped(interpreter: Context, x: Value) -> Value:
    if (
        isinstance(x.node, Leaf | Array)
        or not x.node.deps & x.node.graph.inputs
        or all(isinstance(r.node, OneOfMany) for r in roots(x.node))
    ):
        return x
    return interpreter.elementwise("stop_gradient", x)


_OTHERS = (
    "stop_gradient",
    "add_any",
    "square",
    "integer_pow",
    "convert_element_type",
    "bitcast_convert_type",
)
elementwise_or_layout(*_NAMES, *_OTHERS, *_IDENTITIES)
