"""Complex numbers as pairs of real ones: moved, added and scaled part by part; all else is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from varscale.theory.graph.layout import Value, full
from varscale.theory.integrals.primitives import FUNCTIONS, POSITIVE
from varscale.theory.rules.registry import RULES, Complex, Context, map_parts, parts, rule
from varscale.theory.rules.sampled_regions import drawn_region

_ELEMENTWISE = {"neg", "sub", "add", "add_any"}


FUNCTIONS["hypot"] = np.hypot
POSITIVE.add("hypot")


def modulus(interpreter: Context, x: Complex) -> Value:
    """|x|, whose second moment is that of x."""
    return interpreter.elementwise("hypot", x.re, x.im)


def _as_complex(interpreter: Context, x: Value | Complex) -> Complex:
    """A real value as a complex one."""
    return x if isinstance(x, Complex) else Complex(x, full(interpreter.graph, 0.0, x.shape))


def _is_real(x: Any) -> bool:
    return not isinstance(x, Complex) or x.im.constant == 0


@rule("complex operands")
def complex_operands(interpreter: Context, eqn: Any, *xs: Any) -> Any:
    """An equation on complex numbers that acts on their parts alike; any other is drawn."""
    name, whole = eqn.primitive.name, [_as_complex(interpreter, x) for x in xs]
    if name == "convert_element_type":
        return whole[0] if eqn.params["new_dtype"].kind == "c" else whole[0].re
    if name == "abs":
        return modulus(interpreter, whole[0])
    if name == "conj":
        return Complex(whole[0].re, interpreter.elementwise("neg", whole[0].im))
    if name in ("mul", "div") and any(map(_is_real, whole[name == "div" :])):
        x, y = whole if _is_real(whole[1]) else whole[::-1]
        return map_parts(lambda part: interpreter.elementwise(name, part, y.re), x)
    moves = name in RULES and name not in FUNCTIONS and name not in _MIXING
    if not moves and name not in _ELEMENTWISE:
        return drawn_region(interpreter, eqn, xs, "it mixes the parts of complex numbers")
    handler = RULES[name]
    re, im = (
        handler(interpreter, eqn, *[parts(x)[k] if isinstance(x, Complex) else x for x in xs]) for k in (0, 1)
    )
    if isinstance(re, list | tuple):
        return [Complex(a, b) for a, b in zip(re, im, strict=True)]
    return Complex(re, im)


# Equations that are no elementwise functions and do to a complex number what they do to neither of its parts.
_MIXING = {"integer_pow", "square", "dot_general", "conv_general_dilated", "reduce_prod", "cumprod", "fft"}


@rule("fft")
def fft(interpreter: Context, eqn: Any, x: Value | Complex) -> list[Any]:
    return drawn_region(interpreter, eqn, (x,), "a transform")


@rule("complex")
def complex_(interpreter: Context, eqn: Any, re: Value, im: Value) -> Complex:
    return Complex(re, im)


@rule("real")
def real(interpreter: Context, eqn: Any, x: Complex) -> Value:
    return x.re


@rule("imag")
def imag(interpreter: Context, eqn: Any, x: Complex) -> Value:
    return x.im
