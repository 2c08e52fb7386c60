"""Elementwise primitives: one entry each; what they compute is in `integrals.primitives`.

Complex numbers are pairs of real ones: moved, added and scaled part by part; all else is drawn.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from varscale.theory.graph.expressions import IDENTITIES, roots
from varscale.theory.graph.layout import Value, full
from varscale.theory.graph.nodes import Array, Leaf
from varscale.theory.integrals.primitives import FUNCTIONS, POSITIVE
from varscale.theory.rules.lookup import compared
from varscale.theory.rules.reductions import OneOfMany
from varscale.theory.rules.registry import RECOGNISERS, RULES, Complex, Context, map_parts, parts, rule
from varscale.theory.rules.sampled_regions import drawn_region

_OWN = {"affine", "convert", "bitcast", "integer_pow", "power", *IDENTITIES}
_NAMES = [name for name in FUNCTIONS if name not in _OWN]
_IDENTITIES = (
    "copy",
    "copy_p",
    "reduce_precision",
    "optimization_barrier",
    "sharding_constraint",
    "device_put",
)
_IDENTITIES += ("name", "pvary", "pcast", "mesh_cast", "reshard", "layout_constraint")


@rule(*_NAMES, "add_any", "square", entrywise=True)
def elementwise(interpreter: Context, eqn: Any, *xs: Value) -> Value:
    name = eqn.primitive.name
    for recognised in RECOGNISERS.get(name, ()):
        if (unit := recognised(interpreter, *xs)) is not None:
            return unit
    if len(xs) == 2 and (known := compared(interpreter, name, eqn.outvars[0].aval.shape, *xs)) is not None:
        return known
    return interpreter.elementwise(name, *xs)


@rule("integer_pow", entrywise=True)
def integer_pow(interpreter: Context, eqn: Any, x: Value) -> Value:
    return interpreter.elementwise("integer_pow", x, extra=(eqn.params["y"],))


@rule("convert_element_type", entrywise=True)
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


@rule("bitcast_convert_type", entrywise=True)
def bitcast(interpreter: Context, eqn: Any, x: Value) -> Value:
    return interpreter.elementwise("bitcast", x, extra=(str(eqn.params["new_dtype"]),))


@rule(*_IDENTITIES, entrywise=True)
def identity(interpreter: Context, eqn: Any, *xs: Value) -> list[Value]:
    return list(xs)


@rule("stop_gradient", entrywise=True)
def stop_gradient(interpreter: Context, eqn: Any, x: Any) -> Any:
    """The same forward.

    A maximum that softmax takes from its logits has no gradient anyway; what is made of weights alone is left as it is, since
    no row asks for the gradients of weights: a spectral norm is |Wᵀv|, whether it stops at v or not.
    """
    if isinstance(x, Complex):
        return map_parts(lambda part: stop_gradient(interpreter, eqn, part), x)
    if (
        not isinstance(x, Value)
        or isinstance(x.node, Leaf | Array)
        or not x.node.deps & x.node.graph.inputs
        or all(isinstance(r.node, OneOfMany) for r in roots(x.node))
    ):
        return x
    return interpreter.elementwise("stop_gradient", x)


# Equations that do to a complex number what they do to its parts, though they are functions of numbers.
_ELEMENTWISE = {"neg", "sub", "add", "add_any"}
# Those that are no elementwise functions and do to a complex number what they do to neither of its parts.
_MIXING = {"integer_pow", "square", "dot_general", "conv_general_dilated", "reduce_prod", "cumprod", "fft"}


FUNCTIONS["hypot"] = np.hypot
POSITIVE.add("hypot")


def modulus(interpreter: Context, x: Complex) -> Value:
    """|x|, whose second moment is that of x."""
    return interpreter.elementwise("hypot", x.re, x.im)


@rule("complex operands")
def complex_operands(interpreter: Context, eqn: Any, *xs: Any) -> Any:
    """An equation on complex numbers that acts on their parts alike; any other is drawn."""
    name, graph = eqn.primitive.name, interpreter.graph
    whole = [x if isinstance(x, Complex) else Complex(x, full(graph, 0.0, x.shape)) for x in xs]
    is_real = [x.im.constant == 0 for x in whole]
    if name == "convert_element_type":
        return whole[0] if eqn.params["new_dtype"].kind == "c" else whole[0].re
    if name == "abs":
        return modulus(interpreter, whole[0])
    if name == "conj":
        return Complex(whole[0].re, interpreter.elementwise("neg", whole[0].im))
    if name in ("mul", "div") and (is_real[1] or (name == "mul" and is_real[0])):
        x, y = whole if is_real[1] else whole[::-1]
        return map_parts(lambda part: interpreter.elementwise(name, part, y.re), x)
    moves = name in RULES and name not in FUNCTIONS and name not in _MIXING
    if not moves and name not in _ELEMENTWISE:
        return drawn_region(interpreter, eqn, xs, "it mixes the parts of complex numbers")
    re, im = (RULES[name](interpreter, eqn, *(parts(x)[k % len(parts(x))] for x in xs)) for k in (0, 1))
    if isinstance(re, list | tuple):
        return [Complex(a, b) for a, b in zip(re, im, strict=True)]
    return Complex(re, im)


@rule("fft")
def fft(interpreter: Context, eqn: Any, x: Value | Complex) -> list[Any]:
    return drawn_region(interpreter, eqn, (x,), "a transform")


@rule("complex")
def complex_(interpreter: Context, eqn: Any, re: Value, im: Value) -> Complex:
    return Complex(re, im)


@rule("real", "imag")
def real(interpreter: Context, eqn: Any, x: Complex) -> Value:
    return x.re if eqn.primitive.name == "real" else x.im
