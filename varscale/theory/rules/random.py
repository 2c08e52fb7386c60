"""Random bits are leaves, uniform on the integers: the chains of arithmetic that make them normal are read like any other."""

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import special

from varscale.theory.domain.axes import Axis
from varscale.theory.graph.expressions import Apply, factors, form, roots
from varscale.theory.graph.layout import Value, full, renumbered, value
from varscale.theory.graph.nodes import Array, Leaf, Node, leaf
from varscale.theory.graph.normal_form import affine
from varscale.theory.graph.store import Fact
from varscale.theory.integrals.hermite_series import WEIGHTS, Z
from varscale.theory.propagation.marginals import evaluate
from varscale.theory.rules.registry import STACKED, Context, Opaque, rule

_NORMAL = 0.02  # from 3: what the grid leaves of a normal's kurtosis


@rule("random_bits", entrywise=True)
def random_bits(interpreter: Context, eqn: Any, *keys: Any) -> Value:
    """Uniform bits: the same for the same keys."""
    data = (jax.random.key_data(x.key) if isinstance(x, Opaque) else x for x in keys)
    marks = ((x.node, x.dims) if isinstance(x, Value) else np.asarray(x).tobytes() for x in data)
    shape, width = eqn.outvars[0].aval.shape, 8 * eqn.outvars[0].aval.dtype.itemsize
    largest = np.nextafter(2.0**width, 0.0) if width > 52 else 2.0**width - 1
    numbers = np.minimum(np.floor(special.ndtr(Z) * 2.0**width), largest).astype(f"u{width // 8}")
    mean, square = (float(WEIGHTS @ numbers.astype(float) ** k) for k in (1, 2))
    name = ("bits", *marks, tuple(shape), width)
    return interpreter.leaf(name, shape, mean, square, odd=False, transport=numbers)


class ParameterLaw(NamedTuple):
    """A parameter's mean, second moment and kurtosis E[w⁴]/E[w²]², and its values on the normal grid where it is not normal."""

    mean: float
    second_moment: float
    kurtosis: float
    values: bytes | None


_LAWS: Fact[Hashable, ParameterLaw] = Fact()  # by chain: kernels of one shape are drawn by one


def law(node: Node) -> ParameterLaw | None:
    """The law of an elementwise function of one random leaf; None for anything else."""

    def integrated() -> ParameterLaw:
        values = np.asarray(evaluate(node.whole, node.axes, {}).reshape(-1, len(Z))[0], float)
        mean, square, fourth = (float(WEIGHTS @ values**k) for k in (1, 2, 4))
        mean = 0.0 if abs(mean) < 1e-6 * math.sqrt(max(square, 1e-300)) else mean
        kurtosis = fourth / max(square**2, 1e-300)
        normal = mean == 0 and abs(kurtosis - 3) < _NORMAL
        return ParameterLaw(mean, square, kurtosis, None if normal else values.tobytes())

    own = roots(node)
    if len(own) != 1 or set(own[0].bind) != set(range(len(node.axes))):
        return None
    base = own[0].node
    while not isinstance(base, Apply) and len(base.args) == 1:
        base = base.argument
    if base.odd or not base.is_bits:
        return None
    return _LAWS.once(node.graph, (form(node), base.params[-1]), integrated)


def _scaled_law(node: Node) -> ParameterLaw | None:
    """The law of a weight over positive numbers made of many entries of it (a spectral norm), which are taken for constants."""
    parts = factors(node.whole)[1]
    drawn = [law(view.node) for view in parts if len(view.bind) == len(node.axes)]
    scales = [view for view in parts if not view.bind and view.node.positive]
    if len(drawn) != 1 or drawn[0] is None or len(scales) != len(parts) - 1:
        return None
    mean, square, kurtosis, values = drawn[0]
    ratio = math.sqrt(node.table.mean_square / max(square, 1e-300))
    scaled = None if values is None else (ratio * np.frombuffer(values)).tobytes()
    return ParameterLaw(ratio * mean, ratio**2 * square, kurtosis, scaled)


def as_weight(interpreter: Context, x: Value) -> Value:
    """A parameter drawn by a chain on random bits, as a leaf of that law, times known numbers in it; else what it was."""
    node, (scale, parts) = x.node, factors(x.node.whole)
    if known := [view for view in parts if isinstance(view.node, Array)]:
        drawn = [view.node for view in parts if view not in known]
        weight = as_weight(interpreter, Value(drawn[0], x.dims)).node if len(drawn) == 1 else node
        if not isinstance(weight, Leaf):
            return x
        made = Value(affine(weight, scale, 0.0), x.dims)
        for source, bind in known:
            dims = renumbered(x.dims, {b: k for k, b in enumerate(bind)})
            made = interpreter.elementwise("mul", made, Value(source, dims))
        return made
    found, *others = {law(part) or _scaled_law(part) for part in _drawn_slices(node)}
    if others or found is None:
        return x
    (mean, square, kurtosis, numbers), axes = found, [Axis(axis.size) for axis in node.axes]
    values = None if numbers is None else np.frombuffer(numbers)
    name = "weight", node
    made = leaf(interpreter.graph, name, axes, mean, square, odd=True, kurtosis=kurtosis, transport=values)
    return Value(made, x.dims)


def _drawn_slices(node: Node) -> list[Node]:
    """What scans, one in another, drew a slice a step."""
    return [x for part in STACKED.get(node.graph, node.id) or () for x in _drawn_slices(part.node)] or [node]


def is_weight(x: Any) -> bool:
    """Whether a parameter is a random leaf that no other parameter is made of."""
    return isinstance(x, Value) and isinstance(x.node, Leaf) and x.node.kind == "weight"


def redrawn(interpreter: Context, x: Value, *name: Any) -> Value:
    """An independent weight of the same law; `name` tells it from others."""
    own = x.node
    assert isinstance(own, Leaf)
    weight = interpreter.graph.make(Leaf, own.axes, (), ("weight", *name))
    weight.settle(own.table, odd=bool(own.odd), kurtosis=own.kurtosis, transport=own.transport)
    return Value(weight, x.dims)


@rule("qr", "householder_product")
def qr(interpreter: Context, eqn: Any, *xs: Value) -> list[Value]:
    """Haar: E[q²] = 1/m for an m × n factor. The triangle only lends its signs, which Haar measure does not feel: ones."""
    shape = eqn.outvars[0].aval.shape
    name = ("orthonormal", *((x.node, x.dims) for x in xs))
    q = interpreter.leaf(name, shape, 0.0, 1 / max(shape[-2:]), odd=True)
    return [q, *(full(interpreter.graph, 1.0, v.aval.shape) for v in eqn.outvars[1:])]


def input_leaf(interpreter: Context, name: str, shape: tuple[int, ...], table: Any, *, odd: bool) -> Value:
    """An input with a given table."""
    node = interpreter.graph.make(Leaf, table.axes, (), ("input", name))
    return value(node.settle(table, odd=odd, random=False), shape)
