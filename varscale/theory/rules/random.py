"""Random bits are leaves, uniform on the integers: the chains of arithmetic that make them normal are read like any other."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import special

from varscale.theory.domain.axes import Axis
from varscale.theory.domain.tables import independent
from varscale.theory.graph.expressions import Apply, factors, roots
from varscale.theory.graph.layout import Atom, Value, full, value
from varscale.theory.graph.nodes import Array, Constant, Leaf, Node, View
from varscale.theory.graph.store import Fact
from varscale.theory.integrals.hermite_series import WEIGHTS, Z
from varscale.theory.propagation.marginals import evaluate
from varscale.theory.rules.registry import STACKED, Context, Opaque, elementwise_or_layout, rule


def _uniform_bits(width: int) -> np.ndarray:
    """Quantiles of uniform bits on the normal grid."""
    largest = np.nextafter(2.0**width, 0.0) if width > 52 else 2.0**width - 1
    return np.minimum(np.floor(special.ndtr(Z) * 2.0**width), largest).astype(f"u{width // 8}")


_NORMAL = 0.02  # from 3: what the grid leaves of a normal's kurtosis


@rule("random_bits")
def random_bits(interpreter: Context, eqn: Any, key: Any) -> Value:
    shape, width = eqn.outvars[0].aval.shape, eqn.params["bit_width"]
    return bits(interpreter, key, shape, width)


def bits(interpreter: Context, key: Any, shape: tuple[int, ...], width: int) -> Value:
    """Uniform bits: the same for the same key."""
    if isinstance(key, Opaque):
        name = ("bits", np.asarray(jax.random.key_data(key.key)).tobytes(), tuple(shape), width)
    else:
        name = ("bits", key.node, key.dims, tuple(shape), width)
    numbers = _uniform_bits(width)
    floats = numbers.astype(float)
    mean, square = float(WEIGHTS @ floats), float(WEIGHTS @ floats**2)
    return interpreter.leaf(name, shape, mean, square, odd=False, transport=numbers)


class ParameterLaw(NamedTuple):
    """A parameter's mean, second moment and kurtosis E[w⁴]/E[w²]², and its values on the normal grid where it is not normal."""

    mean: float
    second_moment: float
    kurtosis: float
    values: bytes | None


def law(node: Node) -> ParameterLaw | None:
    """The law of an elementwise function of one random leaf; None for anything else."""
    own = roots(node)
    if len(own) != 1:
        return None
    view, base = own[0], own[0].node
    while base.args and not isinstance(base, Apply) and len(base.args) == 1:
        base = base.args[0].node
    if not isinstance(base, Leaf) or base.odd or not base.is_bits:
        return None
    if set(view.bind) != set(range(len(node.axes))):
        return None

    def integrated() -> ParameterLaw:
        values = evaluate(View(node, tuple(range(len(node.axes)))), node.axes, {}).reshape(-1, len(Z))
        values = np.asarray(values[0], float)
        mean, square, fourth = (float(WEIGHTS @ values**k) for k in (1, 2, 4))
        if abs(mean) < 1e-6 * math.sqrt(max(square, 1e-300)):
            mean = 0.0
        kurtosis = fourth / max(square**2, 1e-300)
        normal = mean == 0 and abs(kurtosis - 3) < _NORMAL
        return ParameterLaw(mean, square, kurtosis, None if normal else values.tobytes())

    return _LAWS.once(node.graph, (_chain_of(node), base.params[-1]), integrated)


def _scaled_law(node: Node) -> ParameterLaw | None:
    """The law of a weight over positive numbers made of it, which many entries make (a spectral norm): taken for constants."""
    parts = factors(View(node, tuple(range(len(node.axes)))))[1]
    drawn = [
        found for view in parts if len(view.bind) == len(node.axes) and (found := law(view.node)) is not None
    ]
    scales = [view for view in parts if not view.bind and view.node.positive]
    if len(drawn) != 1 or len(scales) != len(parts) - 1:
        return None
    (own,), square = drawn, node.table.mean_square
    ratio = math.sqrt(square / max(own.second_moment, 1e-300))
    values = None if own.values is None else (ratio * np.frombuffer(own.values)).tobytes()
    return ParameterLaw(ratio * own.mean, square, own.kurtosis, values)


def _chain_of(node: Node) -> Hashable:
    """What an elementwise function of one leaf does, whatever the leaf."""
    if isinstance(node, Apply):
        return node.params, tuple(_chain_of(view.node) for view in node.args)
    return node.params if isinstance(node, Constant) else "leaf"


def as_weight(interpreter: Context, x: Value) -> Value:
    """A parameter drawn by a chain on random bits, as a leaf with the law of that chain."""
    stacked = STACKED.get(interpreter.graph, (x.node.id, x.dims))
    if stacked is not None and len({law(step.node) for step in stacked}) == 1:
        # Drawn by a scan, a slice a step, from one law.
        one = as_weight(interpreter, stacked[0])
        if isinstance(one.node, Leaf):
            return _stacked_weight(interpreter, one, x)
    if (graded := _graded_weight(interpreter, x)) is not None:
        return graded
    found = law(x.node) or _scaled_law(x.node)
    if found is None or isinstance(x.node, Constant | Array):
        return x
    mean, square, kurtosis, values = found
    weight = interpreter.graph.make(Leaf, x.node.axes, (), ("weight", x.node))
    weight.settle(
        independent(mean, square, weight.axes), odd=mean == 0, kurtosis=kurtosis, transport=_quantiles(values)
    )
    return Value(weight, x.dims)


def _graded_weight(interpreter: Context, x: Value) -> Value | None:
    """Draws of one law times known numbers, one a layer, say: a weight times these."""
    scale, parts = factors(View(x.node, tuple(range(len(x.node.axes)))))
    known = [view for view in parts if isinstance(view.node, Array)]
    drawn = [view for view in parts if not isinstance(view.node, Array)]
    if not known or len(drawn) != 1 or drawn[0].bind != tuple(range(len(x.node.axes))):
        return None
    weight = as_weight(interpreter, Value(drawn[0].node, x.dims))
    if not isinstance(weight.node, Leaf):
        return None
    made = interpreter.elementwise("mul", weight, full(x.node.graph, scale, [1] * len(x.dims)))
    for view in known:
        place = {b: k for k, b in enumerate(view.bind)}
        dims = tuple(tuple(Atom(a.size, place[a.axis]) for a in dim if a.axis in place) for dim in x.dims)
        made = interpreter.elementwise("mul", made, Value(view.node, dims))
    return made


def _quantiles(values: bytes | None) -> np.ndarray | None:
    return None if values is None else np.frombuffer(values)


def _stacked_weight(interpreter: Context, one: Value, x: Value) -> Value:
    """Independent copies of a weight along a first dimension."""
    assert isinstance(one.node, Leaf)
    axes = (Axis(x.shape[0]), *one.node.axes)
    weight = interpreter.graph.make(Leaf, axes, (), ("weight", x.node))
    table = independent(one.node.table.total_mean, one.node.table.mean_square, axes)
    weight.settle(table, odd=bool(one.node.odd), kurtosis=one.node.kurtosis, transport=one.node.transport)
    shifted = tuple(
        tuple(a if a.axis is None else a._replace(axis=a.axis + 1) for a in dim) for dim in one.dims
    )
    return Value(weight, ((Atom(x.shape[0], 0),), *shifted))


def is_weight(x: Any) -> bool:
    """Whether a parameter is a random leaf that no other parameter is made of."""
    return isinstance(x, Value) and isinstance(x.node, Leaf) and x.node.name[0] == "weight"


def another(interpreter: Context, x: Value, number: int) -> Value:
    """An independent weight of the same law; `number` tells it from others."""
    source = x.node
    assert isinstance(source, Leaf)
    weight = interpreter.graph.make(Leaf, source.axes, (), ("weight", source, number))
    weight.settle(source.table, odd=bool(source.odd), kurtosis=source.kurtosis, transport=source.transport)
    return Value(weight, x.dims)


@rule("qr", "householder_product")
def qr(interpreter: Context, eqn: Any, *xs: Value) -> list[Value]:
    """Haar: E[q²] = 1/m for an m × n factor. The triangle only lends its signs, which Haar measure does not feel: ones."""
    shape = eqn.outvars[0].aval.shape
    name = ("orthonormal", *((x.node, x.dims) for x in xs))
    q = interpreter.leaf(name, shape, 0.0, 1.0 / max(shape[-2:]), odd=True)
    return [q, *(full(interpreter.graph, 1.0, v.aval.shape) for v in eqn.outvars[1:])]


def input_leaf(interpreter: Context, name: str, shape: tuple[int, ...], table: Any, *, odd: bool) -> Value:
    """An input with a given table."""
    node = interpreter.graph.make(Leaf, table.axes, (), ("input", name))
    node.settle(table, odd=odd, random=False)
    return value(node, shape)


elementwise_or_layout("random_bits")


_LAWS: Fact[Hashable, ParameterLaw] = Fact()  # by chain: kernels of one fan-in are drawn by one
