"""Elementwise primitives in NumPy float64: what quadrature evaluates a model's own activation chains with."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from scipy import special

COMPARISONS = {name: getattr(operator, name) for name in ("gt", "lt", "ge", "le", "eq", "ne")}
_LOGICAL = {name: getattr(np, f"logical_{name}") for name in ("and", "or", "xor", "not")}
_SHIFTS = {"shift_left": np.left_shift, "shift_right_logical": np.right_shift}
BITWISE = {name: getattr(np, f"bitwise_{name}") for name in _LOGICAL} | _SHIFTS
BITWISE["shift_right_arithmetic"] = np.right_shift


def _on_bits(name: str) -> Callable[..., np.ndarray]:
    """A bitwise operation; of booleans, which are kept as 0 and 1, the logical one."""

    def f(*operands: Any) -> np.ndarray:
        xs = [np.asarray(x) for x in operands]
        whole = [x.dtype for x in xs if x.dtype.kind in "ui"]
        if name in _LOGICAL and not whole:
            return _LOGICAL[name](*xs).astype(float)
        for i, x in enumerate(xs):
            # Floats take the other's type; the upper half of 64 random bits is no signed number.
            if x.dtype.kind == "f":
                x = x.astype(np.uint64 if np.max(x, initial=0.0) >= 2.0**63 else np.int64)
                whole = whole or [x.dtype]
                xs[i] = x.astype(whole[0])
        return BITWISE[name](*xs)

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


def _guard(f: Callable[..., Any]) -> Callable[..., Any]:
    """Quadrature reaches 8 standard deviations out, where a function may overflow: a finite number instead."""

    def finite(*xs: Any) -> Any:
        out = f(*xs)
        return out if np.isfinite(out).all() else np.nan_to_num(out, nan=0.0, posinf=1e150, neginf=-1e150)

    return finite


# The same in NumPy.
_NUMPY = "add abs sign floor ceil round sin cos tan tanh atan atan2 asinh cbrt hypot nextafter"
_OVERFLOWING = "asin acos acosh atanh sinh cosh pow"
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(np, name) for name in _NUMPY.split()},
    **{name: _guard(getattr(np, name)) for name in _OVERFLOWING.split()},
    **{name: lambda x, y, f=f: f(x, y).astype(float) for name, f in COMPARISONS.items()},
    **{name: _on_bits(name) for name in BITWISE},
    **dict.fromkeys(("stop_gradient", "own_gradient", "row"), lambda x, *number: x),
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "square": np.square,
    "div": _guard(np.divide),
    "max": lambda x, y, tie=0.5: np.maximum(x, y),  # `tie`: what of a cotangent each of two equal numbers has
    "min": lambda x, y, tie=0.5: np.minimum(x, y),
    "neg": np.negative,
    "rem": _guard(np.fmod),
    "exp": lambda x: np.exp(np.minimum(x, 300.0)),
    "exp2": lambda x: np.exp2(np.minimum(x, 400.0)),
    "log": lambda x: np.log(np.maximum(x, 1e-300)),
    "log1p": lambda x: np.log1p(np.maximum(x, -1 + 1e-15)),
    "expm1": lambda x: np.expm1(np.minimum(x, 300.0)),
    "logistic": special.expit,
    "erf": special.erf,
    "erfc": special.erfc,
    "erf_inv": _guard(special.erfinv),
    "lgamma": _guard(special.gammaln),
    "digamma": _guard(special.digamma),
    "sqrt": lambda x: np.sqrt(np.maximum(x, 0.0)),
    "rsqrt": lambda x: 1 / np.sqrt(np.maximum(x, 1e-30)),
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    # Infinities stand for masked places: numbers large enough to do so, small enough to be squared.
    "select_n": lambda which, *cases: np.select(
        [np.asarray(which) == i for i in range(len(cases))], [np.clip(c, -1e30, 1e30) for c in cases]
    ),
    "is_finite": lambda x: np.isfinite(x).astype(float),
    "affine": lambda x, c, d: c * x + d,
    # Powers that activations and variances take go by multiplication: NumPy's own takes ten times as long.
    "integer_pow": _guard(lambda x, y: x * x if y == 2 else x * x * x if y == 3 else np.power(x, float(y))),
    "power": _guard(np.power),
    # √P(x is the largest, given it) of n normal numbers, m times, for all (n, m); up to a factor.
    "largest": lambda x, numbers: np.sqrt(sum(n * m * special.ndtr(x) ** (n - 1) for n, m in numbers)),
    "convert": _convert,
    "bitcast": _bitcast,
}

_NOT_NEGATIVE = "abs hypot exp exp2 logistic power sqrt rsqrt and or not is_finite"
POSITIVE = {*_NOT_NEGATIVE.split(), *COMPARISONS}
# Of central differences: a share of the argument, and the least argument it is a share of. A difference of
# differences divides their rounding, 1e-8 near 0, by its own step, which is therefore wider.
_FIRST_STEP, _SECOND_STEP = (1e-5, 1e-3), (1e-3, 1.0)


# Derivatives by argument k of what has kinks, there as JAX has them.
_AT_KINKS: dict[str, Callable[..., np.ndarray]] = {
    "abs": lambda k, x: np.where(x < 0, -1.0, 1.0),
    "clamp": lambda k, low, x, high: (low < x) & (x < high),
    "max": lambda k, x, y, tie=0.5: np.where(x == y, tie, (x > y) != k),
    "min": lambda k, x, y, tie=0.5: np.where(x == y, tie, (x < y) != k),
}


def function(name: str, extra: tuple[Any, ...]) -> Callable[..., np.ndarray]:
    """The NumPy function of a primitive; "∂k name" is ∂f/∂(argument k), by a central difference: to 1e-9 where f is smooth."""
    if not name.startswith("∂"):
        f = FUNCTIONS[name]
        return (lambda *xs: f(*xs, *extra)) if extra else f
    whole, k = function(name[2:], extra), int(name[1])
    if slope := _AT_KINKS.get(name[2:]):
        return lambda *xs: slope(k, *xs, *extra)
    share, least = _SECOND_STEP if name[2:].startswith("∂") else _FIRST_STEP

    def derivative(*xs: np.ndarray) -> np.ndarray:
        step = share * np.maximum(np.abs(xs[k]), least)
        up, down = ((*xs[:k], x, *xs[k + 1 :]) for x in (xs[k] + step, xs[k] - step))
        return (whole(*up) - whole(*down)) / (2 * step)

    return derivative


def of_known(name: str, extra: tuple[Any, ...], xs: Sequence[np.ndarray]) -> np.ndarray:
    """A primitive of known numbers. What is true or false stays boolean, an eighth as large, and is read as 0 and 1."""
    xs = list(map(np.asarray, xs))
    raw = COMPARISONS.get(name) or (_LOGICAL.get(name) if all(x.dtype == bool for x in xs) else None)
    if raw is not None:
        return raw(*xs)
    return np.asarray(function(name, extra)(*(x.astype(float) if x.dtype == bool else x for x in xs)))
