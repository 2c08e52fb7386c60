"""Where a function has no value, or its square no integral: what quadrature, which goes on with finite numbers, cannot see."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from varscale.theory.domain.axes import Axis
from varscale.theory.graph.expressions import Apply, roots_of
from varscale.theory.graph.factors import factors
from varscale.theory.graph.nodes import Array, Leaf, Node, View
from varscale.theory.graph.store import once_per_node
from varscale.theory.integrals.hermite_series import WEIGHTS
from varscale.theory.propagation.marginals import Environment, at_means, concentrated, evaluate, over_classes

UNBOUNDED = 1e9  # a doubt that stands for an infinite one, and can be multiplied by nothing
_NEGLIGIBLE = 1e-6  # weight of places without a value: beyond 4.9 standard deviations there may be some
_RESOLVED_GRID, _LOST = 0.05, 0.3  # relative differences between a grid and each third of it

_OUTSIDE: dict[str, Callable[..., Any]] = {
    "log": lambda x: x <= 0,
    "log1p": lambda x: x <= -1,
    "sqrt": lambda x: x < 0,
    "rsqrt": lambda x: x <= 0,
    "div": lambda x, y: y == 0,
    "power": lambda x: x < 0,
    "asin": lambda x: np.abs(x) > 1,
    "acos": lambda x: np.abs(x) > 1,
    "atanh": lambda x: np.abs(x) >= 1,
    "erf_inv": lambda x: np.abs(x) >= 1,
    "acosh": lambda x: x < 1,
}
_ALWAYS_DEFINED = {"gt", "lt", "ge", "le", "eq", "ne", "is_finite"}


def has_values(name: str, numbers: Sequence[np.ndarray]) -> bool:
    """Whether a function has a value at all of these."""
    outside = _OUTSIDE.get(name)
    return outside is None or not np.any(outside(*numbers))


def mark_undefined(node: Apply) -> None:
    """Flag a node whose functions have no values where they are asked for, or no finite mean square."""
    for own in _by_root(node).values():
        env: Environment = {}
        values, outside = np.ones(1), np.zeros(1, bool)
        for factor, held in own:
            env.update(at_means(held, node.axes))
            now = np.asarray(evaluate(factor, node.axes, env), float)
            # Where a choice makes another factor zero, what it did not choose needs no value.
            if outside.any():
                outside = outside & (now != 0)
            if _is_partial(factor.node):
                outside = outside | (_undefined(factor, node, env) & (values != 0))
            values = values * now
        weight = (
            float(np.max(np.broadcast_to(outside, (*outside.shape[:-1], len(WEIGHTS))) @ WEIGHTS))
            if outside.any()
            else 0.0
        )
        doubt = UNBOUNDED if weight > _NEGLIGIBLE else _unresolved(values, node.axes)
        if doubt:
            node.graph.flag("assumed" if doubt == UNBOUNDED else "quadrature", doubt)


def _by_root(node: Apply) -> dict[View | None, list[tuple[View, list[View]]]]:
    """Factors by the one root of theirs that fluctuates, each with those that do not."""
    out: dict[View | None, list[tuple[View, list[View]]]] = {}
    for factor in factors(View(node, tuple(range(len(node.axes)))))[1]:
        own = roots_of(factor)
        live = [r for r in own if not concentrated(r.node)]
        if len(live) > 1 or any(
            isinstance(r.node, Array) or (isinstance(r.node, Leaf) and r.node.is_bits) for r in own
        ):
            continue
        out.setdefault(live[0] if live else None, []).append((factor, [r for r in own if r not in live]))
    return out


@once_per_node
def _is_partial(node: Node) -> bool:
    """Whether a tree has functions that lack values somewhere."""
    if not isinstance(node, Apply) or node.params[0] in _ALWAYS_DEFINED:
        return False
    return node.params[0] in _OUTSIDE or any(_is_partial(child.node) for child in node.args)


def _undefined(view: View, node: Apply, env: Environment) -> Any:
    """Where a tree has no value: a choice has one where what is chosen has."""
    inner, bind = view
    if not isinstance(inner, Apply) or not _is_partial(inner) or view not in env:
        return np.zeros(1, bool)
    name = inner.params[0]
    args = [child.within(bind) for child in inner.args]
    below = [_undefined(a, node, env) for a in args]
    if name == "select_n":
        which = np.asarray(evaluate(args[0], node.axes, env))
        chosen = [np.logical_and(which == i, x) for i, x in enumerate(below[1:])]
        return np.logical_or.reduce(np.broadcast_arrays(below[0], *chosen))
    numbers = [np.asarray(evaluate(a, node.axes, env)) for a in args]
    if name == "mul":
        return (below[0] & (numbers[1] != 0)) | (below[1] & (numbers[0] != 0))
    if name in _OUTSIDE:
        below.append(_OUTSIDE[name](*numbers))
    return functools.reduce(np.logical_or, below)


def _unresolved(values: np.ndarray, axes: Sequence[Axis]) -> float:
    """Doubt of a mean square for which the thirds of the grid differ: the error of a jump is a third of that, a pole's all."""
    if values.shape[-1] != len(WEIGHTS):
        return 0.0
    terms = over_classes(np.square(values), axes) * WEIGHTS
    thirds = [3 * float(terms[i::3].sum()) for i in range(3)]
    apart = max(thirds) - min(thirds)
    whole = float(terms.sum())
    if apart <= 2 * _RESOLVED_GRID * whole:
        return 0.0
    return UNBOUNDED if apart > 2 * _LOST * whole else apart / 2 / 3 / whole
