"""Constants of a program that are one number everywhere: scale factors, as the walk over a jaxpr sees them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from varscale import _compat

_SAME = {"convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "copy", "stop_gradient", "transpose"}
_ONE: dict[str, Callable[[float], float]] = {
    "sqrt": math.sqrt, "rsqrt": lambda x: 1 / math.sqrt(x), "neg": lambda x: -x, "exp": math.exp, "log": math.log,
    "square": lambda x: x * x, "abs": abs, "floor": math.floor, "round": round, "sign": lambda x: math.copysign(x != 0, x),
}  # fmt: skip
_TWO: dict[str, Callable[[float, float], float]] = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "div": lambda x, y: x / y,
    "pow": lambda x, y: x**y, "max": max, "min": min,
}  # fmt: skip


class Numbers:
    """The numbers behind the constants of a jaxpr, by variable, as far as a few primitives of arithmetic tell."""

    def __init__(self) -> None:
        self._known: dict[Any, float] = {}

    def of(self, atom: Any) -> float | None:
        """The number that an operand is everywhere; None where it is not known."""
        return constant(atom.val) if _compat.is_literal(atom) else self._known.get(atom)

    def bind(self, names: Iterable[Any], values: Iterable[float | None]) -> None:
        """Give variables their numbers; those without one lose what they had from an earlier call of the same jaxpr."""
        for name, value in zip(names, values, strict=False):
            if _compat.is_literal(name):
                continue
            if value is None:
                self._known.pop(name, None)
            else:
                self._known[name] = value

    def enter(self, inner: Sequence[Any], operands: Sequence[Any]) -> None:
        """Give the arguments of an inner jaxpr the numbers of the operands that it is called with."""
        self.bind(inner, [self.of(atom) for atom in operands])

    def note(self, eqn: Any) -> None:
        """Compute the outputs of an equation all of whose operands are constants."""
        for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if key in eqn.params:
                jaxpr, consts = _compat.sub_jaxpr(eqn.params[key])
                if len(jaxpr.invars) == len(eqn.invars):
                    self.bind(jaxpr.constvars, map(constant, consts))
                    self.enter(jaxpr.invars, eqn.invars)
                    for inner in jaxpr.eqns:
                        self.note(inner)
                    self.enter(eqn.outvars, jaxpr.outvars)
                    return
        self.bind(eqn.outvars, [self._computed(eqn)])

    def _computed(self, eqn: Any) -> float | None:
        values = [self.of(atom) for atom in eqn.invars]
        if not values or any(value is None for value in values):
            return None
        name, known = eqn.primitive.name, [value for value in values if value is not None]
        try:
            if name in _SAME:
                return known[0]
            if name == "integer_pow":
                return known[0] ** eqn.params["y"]
            if name in _ONE:
                return float(_ONE[name](known[0]))
            if name in _TWO:
                return float(_TWO[name](*known))
        except (ValueError, ZeroDivisionError, OverflowError):
            return None
        return None


def constant(value: Any) -> float | None:
    """The number that an array of one entry holds; None for any other."""
    if np.size(value) != 1 or _compat.is_tracer(value):
        return None
    kind = np.dtype(getattr(value, "dtype", None) or np.asarray(value).dtype)
    return float(np.asarray(value).reshape(())) if kind.kind in "fiu" or kind.name == "bfloat16" else None
