"""Zero maps that read zeros: which parameters a program multiplies with what is zero because of other parameters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from varscale import _compat

Causes = frozenset[int]
"""The parameters that make a value zero, and COMPUTED where it is none of them itself; empty where it is zero by itself."""
COMPUTED = -1

_ANY = {"dot_general", "conv_general_dilated", "mul", "and", "ragged_dot", "ragged_dot_general"}
_FIRST = {"div", "gather", "dynamic_slice", "reduce_precision", "rem", "sort"}
_ALL = {"add", "add_any", "sub", "concatenate", "max", "min", "pad", "dynamic_update_slice", "scatter-add", "scatter"}
_KEEPS = {
    "neg", "tanh", "sin", "abs", "sqrt", "cbrt", "sign", "square", "erf", "asinh", "atan", "expm1", "log1p", "floor", "round",
    "convert_element_type", "reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "slice", "rev", "split",
    "copy", "copy_p", "name", "stop_gradient", "optimization_barrier", "sharding_constraint", "pvary", "cumsum",
    "reduce_sum", "reduce_max", "reduce_min", "reduce_window_sum", "reduce_window_max", "integer_pow",
}  # fmt: skip


class ZeroWalk:
    """Follows through a jaxpr what is zero.

    Attributes:
        met: pairs of zeros that are multiplied, by what makes each zero.
    """

    def __init__(self) -> None:
        self.met: list[tuple[Causes, Causes]] = []

    def run(self, jaxpr: Any, args: Sequence[Causes | None]) -> list[Causes | None]:
        """Which outputs are zero, given which inputs are; None for what is not."""
        env: dict[Any, Causes | None] = dict(zip(jaxpr.invars, args, strict=True))

        def read(var: Any) -> Causes | None:
            if _compat.is_literal(var):
                return frozenset() if getattr(var.val, "shape", ()) == () and not var.val else None
            return env.get(var)

        for eqn in jaxpr.eqns:
            env.update(zip(eqn.outvars, self._equation(eqn, [read(v) for v in eqn.invars]), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, values: list[Causes | None]) -> list[Causes | None]:
        name, count = eqn.primitive.name, len(eqn.outvars)
        if all(v is None for v in values):
            return [None] * count
        zeros = [v for v in values if v is not None]
        if name in _ANY:
            if len(zeros) == 2 and zeros[0] and zeros[1] and not zeros[0] & zeros[1] - {COMPUTED}:
                self.met.append((zeros[0], zeros[1]))
            least = min(zeros, key=len)
            return [least | {COMPUTED} if least else least] * count
        if name in _KEEPS or name in _FIRST:
            return [values[0]] * count
        if name in _ALL or name in ("select_n", "clamp"):
            values = values[1:] if name == "select_n" else values[1:2] if name == "clamp" else values
            return [frozenset().union(*(v for v in values if v is not None)) if None not in values else None] * count
        for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if key in eqn.params and name not in ("scan", "while", "associative_scan"):
                jaxpr, _ = _compat.sub_jaxpr(eqn.params[key])
                if len(jaxpr.invars) == len(values):
                    return self.run(jaxpr, values)
        return [None] * count


def zeros_that_meet(jaxpr: Any, zero: Collection[int]) -> list[tuple[Causes, Causes]]:
    """Pairs of sets of parameters, zero all of them, whose products no gradient leaves: each side waits for the other.

    Args:
        jaxpr: a program whose first inputs are its variables.
        zero: the numbers of the variables that are zero.
    """
    walk = ZeroWalk()
    walk.run(jaxpr, [frozenset({i}) if i in zero else None for i in range(len(jaxpr.invars))])
    return walk.met
