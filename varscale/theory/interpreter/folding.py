"""Known numbers: equations that read nothing else are computed, by jax or number by number, up to a size.

Literal arrays fold into literal arrays. What is computed from given inputs stays given: it depends on them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np

from varscale.theory.domain.axes import Axis
from varscale.theory.graph.expressions import hashed
from varscale.theory.graph.known_arrays import (
    all_given,
    computed,
    entries,
    is_known_array,
    note,
    numbers_over,
)
from varscale.theory.graph.layout import Value, value
from varscale.theory.graph.nodes import Array, Constant, Graph, Node, View, array
from varscale.theory.graph.store import Fact, PredictionError
from varscale.theory.integrals.primitives import of_known
from varscale.theory.propagation.doubts import OUTSIDE
from varscale.theory.rules.registry import CALLS, Complex, Opaque, parts

MOST_FOLDED = 1 << 26  # elements up to which known numbers are computed with rather than described
_MOST_EVALUATED = 1 << 22  # of which jax computes so many at a time

# Equations that rules enter, whatever they read.
ENTERED = {"random_bits", "scan", "while", "cond", "region", *CALLS}
_NEVER_FOLDED = ENTERED | {"rng_bit_generator"}
# Entries are moved, repeated or left out, of which classes and blocks tell more than one class for all would.
_MOVING = {
    "broadcast_in_dim", "concatenate", "dynamic_slice", "expand_dims", "gather", "pad", "reshape", "rev",
    "slice", "split", "squeeze", "tile", "transpose",
}  # fmt: skip


def known(graph: Graph, const: Any, sources: Sequence[Node] = ()) -> Any:
    """The value of known numbers, or of what was computed from given arrays: whole numbers are as good as literals.

    Raises:
        PredictionError: they contain NaN.
    """
    if hasattr(const, "dtype") and jax.numpy.issubdtype(const.dtype, jax.dtypes.prng_key):
        return Opaque(const)
    values = np.asarray(const)
    if values.dtype.kind == "c":
        return Complex(*(known(graph, part, sources) for part in (np.real(values), np.imag(values))))
    sizes = [n for n in values.shape if n != 1]
    if sources and values.dtype.kind not in "biu" and np.isfinite(values).all():
        return value(computed(graph, values.reshape(sizes), [*map(Axis, sizes)], sources), values.shape)
    # A scalar NaN is a literal of the code (jnp.var has one, in a branch not taken).
    if values.ndim and values.dtype.kind == "f" and np.isnan(values).any():
        raise PredictionError("an array of the model contains NaN")
    values = values if values.dtype.kind in "biu" else values.astype(np.float64)
    return value(array(graph, values.reshape(sizes)), values.shape)


def concrete(x: Any, dtype: Any = None) -> np.ndarray | None:
    """The numbers of a known value; None where it is random or too large."""
    if isinstance(x, Complex):
        re, im = concrete(x.re), concrete(x.im)
        return None if re is None or im is None else (re + 1j * im).astype(dtype or complex)
    if not isinstance(x, Value) or math.prod(x.shape) > MOST_FOLDED:
        return None
    if isinstance(x.node, Constant):
        return np.full(x.shape, x.node.params).astype(dtype or float)
    if not isinstance(x.node, Array):
        return None
    found = entries(x)
    return found.astype(dtype) if found is not None and dtype is not None else found


def folded(graph: Graph, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
    """The outputs of an equation whose inputs are all known; None where one is not, or where a rule says more."""
    name = eqn.primitive.name
    if name in _NEVER_FOLDED or sum(math.prod(v.aval.shape) for v in eqn.outvars) > _MOST_EVALUATED:
        return None
    if not ins and name not in ("iota", "random_seed"):
        return None
    if all(map(_is_literal, ins)):
        pairs = zip(ins, eqn.invars, strict=True)
        literal = [x.key if isinstance(x, Opaque) else concrete(x, v.aval.dtype) for x, v in pairs]
        return [known(graph, out) for out in _evaluated(eqn, literal)]
    if any(isinstance(x, Opaque) for x in ins):
        # A key derived from something random: one for equal derivations.
        derived = [x.key if isinstance(x, Opaque) else [(p.node, p.dims) for p in parts(x)] for x in ins]
        key = jax.random.key(hashed(name, eqn.params, derived) >> 33)
        shape = eqn.outvars[0].aval.shape
        return [Opaque(jax.random.split(key, shape) if shape else key)]
    sources = [part for x in ins for part in parts(x)]
    if not all_given(sources) or (name in _MOVING and len(sources) == len(ins)):
        return None
    with np.errstate(all="ignore"):
        numbers: Any = [[entries(part) for part in parts(x)] for x in ins]
        outs = _evaluated(eqn, [re + 1j * im[0] if im else re for re, *im in numbers])
    return [known(graph, out, [part.node for part in sources]) for out in outs]


def _is_literal(x: Any) -> bool:
    """Whether it is a random key, or numbers that are known and few enough."""
    return isinstance(x, Opaque) or (
        math.prod(x.shape) <= MOST_FOLDED and all(isinstance(p.node, Constant | Array) for p in parts(x))
    )


def note_moved(eqn: Any, ins: Sequence[Any], outs: Any) -> None:
    """Of an equation that only moves entries of given arrays, note how the numbers that it makes are worked out."""
    if eqn.primitive.name not in _MOVING or not all_given(ins):
        return
    sizes = [math.prod(v.aval.shape) for v in eqn.outvars]
    if max(sizes) > _MOST_EVALUATED or min(sizes) == 0:
        return
    for i, out in enumerate(outs if isinstance(outs, list | tuple) else [outs]):
        note(out, lambda i=i: np.asarray(_evaluated(eqn, [entries(x) for x in ins])[i], float))


def folded_elementwise(name: str, extra: Any, frame: Sequence[Axis], views: Sequence[View]) -> Node | None:
    """The node of an elementwise primitive of known numbers; None where one is not known, or has no value."""
    if not all(is_known_array(view.node) for view in views):
        return None
    graph, sizes = views[0].node.graph, [axis.size for axis in frame]

    def number_by_number() -> Node | None:
        literal = all(isinstance(view.node, Constant | Array) for view in views)
        if math.prod(sizes) > (MOST_FOLDED if literal else _MOST_EVALUATED):
            return None
        numbers = [
            np.asarray(view.node.params, np.float64)
            if isinstance(view.node, Constant)
            else numbers_over(view, frame)
            for view in views
        ]
        if not literal and name in OUTSIDE and np.any(OUTSIDE[name](*numbers)):
            return None  # a rule says so
        known_as, operands = ("mul", numbers * 2) if name == "square" else (name, numbers)
        with np.errstate(all="ignore"):
            out = of_known("add" if known_as == "add_any" else known_as, extra, operands)
        out = np.broadcast_to(out, sizes)
        if literal or out.dtype.kind in "biu":
            return array(graph, out, frame)
        return computed(graph, out, frame, [v.node for v in views]) if np.isfinite(out).all() else None

    return _FOLDED.once(graph, (name, extra, tuple(frame), tuple(views)), number_by_number)


def _evaluated(eqn: Any, known: Sequence[Any]) -> list[Any]:
    """What an equation makes of numbers or keys."""
    args = [
        x if hasattr(x, "_base_array") else jax.numpy.asarray(x, v.aval.dtype)
        for x, v in zip(known, eqn.invars, strict=True)
    ]
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        out = eqn.primitive.bind(*args, **eqn.params)
    return list(out) if eqn.primitive.multiple_results else [out]


_FOLDED: Fact[Hashable, Node | None] = Fact()  # known numbers computed by elementwise primitives
