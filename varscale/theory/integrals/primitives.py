"""Elementwise primitives in NumPy float64: what quadrature evaluates a model's own activation chains with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from scipy import special

_TINY = 1e-300


def _like(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two operands of a bitwise operation: the one that is a plain number takes the other's integer type."""
    if x.dtype.kind == "f":  # the upper half of 64 random bits is no signed number
        x = x.astype(np.uint64 if np.max(x, initial=0.0) >= 2.0**63 else np.int64)
        x = x.astype(y.dtype) if y.dtype.kind in "ui" else x
    return x, y.astype(x.dtype) if y.dtype.kind == "f" else y


COMPARISONS = {
    "gt": np.greater,
    "lt": np.less,
    "ge": np.greater_equal,
    "le": np.less_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
_LOGICAL = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}
BITWISE = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.bitwise_not,
    "shift_right_logical": np.right_shift,
    "shift_right_arithmetic": np.right_shift,
    "shift_left": np.left_shift,
}


def _on_bits(name: str) -> Callable[..., np.ndarray]:
    """A bitwise operation; of booleans, which are kept as 0 and 1, the logical one."""

    def f(*operands: Any) -> np.ndarray:
        xs = [np.asarray(x) for x in operands]
        if name in _LOGICAL and not any(x.dtype.kind in "ui" for x in xs):
            return _LOGICAL[name](*xs).astype(float)
        return BITWISE[name](*(_like(*xs) if len(xs) == 2 else xs))

    return f


def _convert(x: np.ndarray, kind: str) -> np.ndarray:
    x = np.asarray(x)
    if kind in "iu":
        return x if x.dtype.kind in "iu" else np.trunc(x)
    return (x != 0).astype(float) if kind == "b" else x.astype(kind if kind.startswith("uint") else float)


def _bitcast(x: np.ndarray, dtype: str) -> np.ndarray:
    target = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x = np.asarray(x)
    if x.dtype.kind == "f" or x.dtype.itemsize != target.itemsize:
        # Its sign bit, say; bits that were averaged over classes come as wider integers.
        x = x.astype(f"{'f' if x.dtype.kind == 'f' else 'u'}{target.itemsize}")
    out = np.ascontiguousarray(x).view(target).reshape(x.shape)
    return out if target.kind in "iu" else out.astype(float)


# A difference of differences divides their rounding, 1e-8 near 0, by its own step, which is therefore wider.
_FIRST_STEP, _SECOND_STEP = (1e-5, 1e-3), (1e-3, 1.0)


def partial(
    f: Callable[..., np.ndarray], k: int, step: tuple[float, float] = _FIRST_STEP
) -> Callable[..., np.ndarray]:
    """∂f/∂(argument k), by a central difference in float64 (relative error 1e-9 where f is smooth, exact beside a corner).

    Args:
        f: a function.
        k: which argument.
        step: its share of the argument, and the least argument it is a share of.
    """
    share, least = step

    def derivative(*xs: np.ndarray) -> np.ndarray:
        step = share * np.maximum(np.abs(xs[k]), least)
        up, down = list(xs), list(xs)
        up[k], down[k] = xs[k] + step, xs[k] - step
        return (f(*up) - f(*down)) / (2 * step)

    return derivative


def _guard(f: Callable[..., Any]) -> Callable[..., Any]:
    """Quadrature reaches 8 standard deviations out, where a function may overflow: a finite number instead."""

    def finite(*xs: Any) -> Any:
        out = f(*xs)
        return out if np.isfinite(out).all() else np.nan_to_num(out, nan=0.0, posinf=1e150, neginf=-1e150)

    return finite


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "stop_gradient": lambda x: x,
    "own_gradient": lambda x: x,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _guard(np.divide),
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "exp": lambda x: np.exp(np.minimum(x, 300.0)),
    "exp2": lambda x: np.exp2(np.minimum(x, 400.0)),
    "log": lambda x: np.log(np.maximum(x, _TINY)),
    "log1p": lambda x: np.log1p(np.maximum(x, -1 + 1e-15)),
    "expm1": lambda x: np.expm1(np.minimum(x, 300.0)),
    "tanh": np.tanh,
    "logistic": special.expit,
    "erf": special.erf,
    "erfc": special.erfc,
    "erf_inv": _guard(special.erfinv),
    "lgamma": _guard(special.gammaln),
    "digamma": _guard(special.digamma),
    "sqrt": lambda x: np.sqrt(np.maximum(x, 0.0)),
    "rsqrt": lambda x: 1 / np.sqrt(np.maximum(x, 1e-30)),
    "cbrt": np.cbrt,
    "abs": np.abs,
    "sign": np.sign,
    "floor": np.floor,
    "ceil": np.ceil,
    "round": np.round,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "asin": _guard(np.arcsin),
    "acos": _guard(np.arccos),
    "atan": np.arctan,
    "atan2": np.arctan2,
    "sinh": _guard(np.sinh),
    "cosh": _guard(np.cosh),
    "asinh": np.arcsinh,
    "acosh": _guard(np.arccosh),
    "atanh": _guard(np.arctanh),
    "pow": _guard(np.power),
    "rem": _guard(np.fmod),
    "nextafter": np.nextafter,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    # Infinities stand for masked places: numbers large enough to do so, small enough to be squared.
    "select_n": lambda which, *cases: np.select(
        [np.asarray(which) == i for i in range(len(cases))], [np.clip(c, -1e30, 1e30) for c in cases]
    ),
    **{name: lambda x, y, f=f: f(x, y).astype(float) for name, f in COMPARISONS.items()},
    **{name: _on_bits(name) for name in BITWISE},
    "is_finite": lambda x: np.isfinite(x).astype(float),
    "affine": lambda x, c, d: c * x + d,
    # Powers that activations and variances take go by multiplication: NumPy's own takes ten times as long.
    "integer_pow": _guard(lambda x, y: x * x if y == 2 else x * x * x if y == 3 else np.power(x, float(y))),
    "power": _guard(np.power),
    "convert": _convert,
    "bitcast": _bitcast,
}

_NOT_NEGATIVE = {"abs", "exp", "exp2", "logistic", "power", "sqrt", "rsqrt", "and", "or", "not", "is_finite"}
POSITIVE = _NOT_NEGATIVE | COMPARISONS.keys()


def function(name: str, extra: tuple[Any, ...]) -> Callable[..., np.ndarray]:
    """The NumPy function of an elementwise node: a primitive with its static parameters, or "∂k name", its derivative."""
    if name.startswith("∂"):
        step = _SECOND_STEP if name[2:].startswith("∂") else _FIRST_STEP
        return partial(function(name[2:], extra), int(name[1]), step)
    f = FUNCTIONS[name]
    return (lambda *xs: f(*xs, *extra)) if extra else f


def of_known(name: str, extra: tuple[Any, ...], xs: Sequence[np.ndarray]) -> np.ndarray:
    """A primitive of known numbers. What is true or false stays boolean, an eighth as large, and is read as 0 and 1."""
    boolean = [np.asarray(x).dtype == bool for x in xs]
    raw = COMPARISONS.get(name) or (_LOGICAL.get(name) if all(boolean) else None)
    if raw is not None:
        return raw(*xs)
    numbers = [np.asarray(x, float) if b else x for x, b in zip(xs, boolean, strict=True)]
    return np.asarray(function(name, extra)(*numbers))
