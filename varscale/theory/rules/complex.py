"""Complex numbers as pairs of real ones: every primitive is written for the parts, and those are predicted like any other."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from varscale.theory.domain.axes import Axis, labelled
from varscale.theory.graph.layout import Value, full, transpose, value
from varscale.theory.graph.nodes import Constant, Node, array
from varscale.theory.graph.store import Fact
from varscale.theory.integrals.primitives import FUNCTIONS, POSITIVE
from varscale.theory.rules.linear import contract
from varscale.theory.rules.registry import RULES, Complex, Context, map_parts, parts, rule

_MATRICES: Fact[Hashable, Node] = Fact()  # of transforms, by their numbers

# Functions of one complex number, each part of which is a real function of both parts.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "log": np.log,
    "log1p": np.log1p,
    "expm1": np.expm1,
    "sqrt": np.sqrt,
    "rsqrt": lambda z: 1 / np.sqrt(z),
    "integer_pow": lambda z, y: z**y,
    "pow": lambda z, y: z**y,
    "sign": lambda z: z / np.maximum(np.abs(z), 1e-300),
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "tanh": np.tanh,
    "logistic": lambda z: 1 / (1 + np.exp(-z)),
}


def _real_of(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda re, im, *extra: np.nan_to_num(np.real(f(re + 1j * im, *extra)), posinf=1e150, neginf=-1e150)


def _imaginary_of(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda re, im, *extra: np.nan_to_num(np.imag(f(re + 1j * im, *extra)), posinf=1e150, neginf=-1e150)


FUNCTIONS.update({f"real {name}": _real_of(f) for name, f in _FUNCTIONS.items()})
FUNCTIONS.update({f"imaginary {name}": _imaginary_of(f) for name, f in _FUNCTIONS.items()})
FUNCTIONS["hypot"] = np.hypot
POSITIVE.add("hypot")
_BILINEAR = {"dot_general", "conv_general_dilated"}


def modulus(interpreter: Context, x: Complex) -> Value:
    """|x|, whose second moment is that of x."""
    return interpreter.elementwise("hypot", x.re, x.im)


def _as_complex(interpreter: Context, x: Value | Complex) -> Complex:
    """A real value as a complex one."""
    return x if isinstance(x, Complex) else Complex(x, full(interpreter.graph, 0.0, x.shape))


def _bilinear(interpreter: Context, x: Complex, y: Complex, f: Callable[[Value, Value], Value]) -> Complex:
    """What is linear in each of two operands: four real ones of the same kind."""
    part = interpreter.elementwise
    re, im = part("sub", f(x.re, y.re), f(x.im, y.im)), part("add", f(x.re, y.im), f(x.im, y.re))
    return Complex(re, im)


def _multiplied(interpreter: Context, x: Complex, y: Complex) -> Complex:
    return _bilinear(interpreter, x, y, lambda a, b: interpreter.elementwise("mul", a, b))


def _divided(interpreter: Context, x: Complex, y: Complex) -> Complex:
    part = interpreter.elementwise
    if y.im.constant == 0:
        return map_parts(lambda v: part("div", v, y.re), x)
    known = interpreter.concrete(y)
    if known is not None and np.all(known != 0):  # what is divided may have been multiplied by the same numbers
        return _multiplied(interpreter, x, interpreter.known(1 / known))
    size = part("add", part("square", y.re), part("square", y.im))
    above = _multiplied(interpreter, x, Complex(y.re, part("neg", y.im)))
    return map_parts(lambda v: part("div", v, size), above)


def _exponential(interpreter: Context, x: Complex) -> Complex:
    part = interpreter.elementwise
    size = part("exp", x.re)
    return Complex(part("mul", size, part("cos", x.im)), part("mul", size, part("sin", x.im)))


@rule("complex operands")
def complex_operands(interpreter: Context, eqn: Any, *xs: Any) -> Any:
    """Any equation on complex numbers."""
    name, whole = eqn.primitive.name, [_as_complex(interpreter, x) for x in xs]
    if name == "convert_element_type":
        return whole[0] if eqn.params["new_dtype"].kind == "c" else whole[0].re
    if name == "abs":
        return modulus(interpreter, whole[0])
    if name in _TWO_SIDED:
        return _TWO_SIDED[name](interpreter, *whole)
    if name == "exp":
        return _exponential(interpreter, whole[0])
    if name == "conj":
        return Complex(whole[0].re, interpreter.elementwise("neg", whole[0].im))
    if name == "square":
        return _multiplied(interpreter, whole[0], whole[0])
    if name in _FUNCTIONS:
        extra = _exponent(eqn, *whole)
        pair = whole[0].re, whole[0].im
        return Complex(*(interpreter.elementwise(f"{side} {name}", *pair, extra=extra) for side in ("real", "imaginary")))
    if name not in RULES:
        raise NotImplementedError(f"{name} of complex numbers; write it with real ones")
    handler = RULES[name]
    if name in _BILINEAR:
        return _bilinear(interpreter, whole[0], whole[1], lambda a, b: handler(interpreter, eqn, a, b))
    # Everything else moves or adds numbers: it does to each part what it does to the whole.
    re, im = (handler(interpreter, eqn, *[parts(x)[k] if isinstance(x, Complex) else x for x in xs]) for k in (0, 1))
    if isinstance(re, list | tuple):
        return [Complex(a, b) for a, b in zip(re, im, strict=True)]
    return Complex(re, im)


def _exponent(eqn: Any, _: Complex, *exponent: Complex) -> tuple[Any, ...]:
    """The known exponent of a power; nothing for another function."""
    if not exponent:
        return (eqn.params["y"],) if "y" in eqn.params else ()
    re, im = exponent[0].re.constant, exponent[0].im.constant
    if re is None or im is None:
        raise NotImplementedError("a complex power with an exponent that is not one known number; use exp and log")
    return (complex(re, im),)


_TWO_SIDED = {"mul": _multiplied, "div": _divided}


@rule("complex")
def complex_(interpreter: Context, eqn: Any, re: Value, im: Value) -> Complex:
    return Complex(re, im)


@rule("real")
def real(interpreter: Context, eqn: Any, x: Complex) -> Value:
    return x.re


@rule("imag")
def imag(interpreter: Context, eqn: Any, x: Complex) -> Value:
    return x.im


def _matrix(interpreter: Context, numbers: np.ndarray) -> Value:
    """A transform's matrix from times to frequencies; the lowest frequency, which alone feels a mean, is a class of its own."""
    length, kept = numbers.shape
    known = np.ascontiguousarray(numbers.astype(float))
    if length == 1 or kept == 1:
        return interpreter.known(known)
    axes = (Axis(length), labelled(np.arange(kept) > 0))
    node = _MATRICES.once(interpreter.graph, (length, kept, known.tobytes()), lambda: array(interpreter.graph, known, axes))
    return full(interpreter.graph, node.params, known.shape) if isinstance(node, Constant) else value(node, known.shape)


def _times(interpreter: Context, x: Value, matrix: Value, d: int) -> Value:
    """x times a matrix along dimension d."""
    out = contract(interpreter, x, matrix, ((d,), (0,)), ((), ()))
    order = [k - (k > d) for k in range(len(x.dims))]
    order[d] = len(x.dims) - 1
    return transpose(out, order)


def _waves(times: int, frequencies: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of 2π k t / size, (times, frequencies)."""
    phase = 2 * math.pi * (np.outer(np.arange(times), frequencies) % size) / size
    return np.cos(phase), np.sin(phase)


def _transform(interpreter: Context, x: Complex, d: int, size: int, kept: int, inverse: bool) -> Complex:
    """The discrete Fourier transform along one dimension, its first `kept` frequencies."""
    cos, sin = _waves(x.shape[d], np.arange(kept), size)
    scale = 1 / size if inverse else 1.0
    c, s = (_matrix(interpreter, m) for m in (scale * cos, scale * (sin if inverse else -sin)))
    cc, ss, cs, sc = (_times(interpreter, part, m, d) for part, m in ((x.re, c), (x.im, s), (x.im, c), (x.re, s)))
    return Complex(interpreter.elementwise("sub", cc, ss), interpreter.elementwise("add", cs, sc))


def _real_inverse(interpreter: Context, x: Complex, d: int, size: int) -> Value:
    """The real signal whose spectrum, up to the middle, is x: every other frequency stands for two."""
    k = np.arange(x.shape[d])
    weight = np.where((k == 0) | (2 * k == size), 1.0, 2.0)[:, None] / size
    cos, sin = (m.T * weight for m in _waves(size, k, size))
    re, im = (_times(interpreter, part, interpreter.known(m), d) for part, m in ((x.re, cos), (x.im, sin)))
    return interpreter.elementwise("sub", re, im)


@rule("fft")
def fft(interpreter: Context, eqn: Any, x: Value | Complex) -> Value | Complex:
    """Products with known matrices, one a dimension."""
    kind = str(getattr(eqn.params["fft_type"], "name", eqn.params["fft_type"]))
    lengths = eqn.params["fft_lengths"]
    z = _as_complex(interpreter, x)
    dims = range(len(z.shape) - len(lengths), len(z.shape))
    for d, size in zip(dims, lengths, strict=True):
        if d == dims[-1] and kind == "RFFT":
            z = _transform(interpreter, z, d, size, size // 2 + 1, False)
        elif d != dims[-1] or kind != "IRFFT":
            z = _transform(interpreter, z, d, size, size, kind in ("IFFT", "IRFFT"))
    return _real_inverse(interpreter, z, dims[-1], lengths[-1]) if kind == "IRFFT" else z
