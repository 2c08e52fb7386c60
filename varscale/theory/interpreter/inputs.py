"""Numbers that are known, and inputs: arrays whose moments are measured, and descriptions of arrays.

Equations that read known numbers alone are computed, by jax or number by number, up to a size. Literal arrays fold into literal
arrays; what is computed from given inputs stays given: it depends on them. Given samples are in classes of nearly one scale: a
norm divides each by its own, and E[1/s²] is not 1/E[s²].
"""

import functools
import math
import operator
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from varscale import _compat
from varscale.programs import faces
from varscale.programs.faces import Inputs
from varscale.programs.pieces import is_key
from varscale.theory.domain.axes import MOST_CLASSES, Axes, Axis, axes_of, labelled
from varscale.theory.domain.tables import Moments, estimate, independent, table_over
from varscale.theory.graph import known_arrays as arrays
from varscale.theory.graph.known_arrays import all_known, entries, is_known_array
from varscale.theory.graph.layout import Value, full, value, without_entries
from varscale.theory.graph.nodes import Graph, Leaf, Node, View, array
from varscale.theory.graph.store import Fact, PredictionError
from varscale.theory.integrals.primitives import of_known
from varscale.theory.propagation.doubts import OUTSIDE
from varscale.theory.rules.axis import MOVES
from varscale.theory.rules.lookup import PADDED, is_mask, padded_shapes, unknown
from varscale.theory.rules.random import input_leaf
from varscale.theory.rules.registry import CALLS, ELEMENTWISE_OR_LAYOUT, Complex, Context, Opaque, parts

MODEL_SEED = 0  # laws do not depend on the seed
MOST_FOLDED = 1 << 26  # elements up to which known numbers are computed with rather than described
_MOST_EVALUATED = 1 << 22  # of which jax computes so many at a time
_ALIKE_SCALES = 0.02  # variance of ln s² in a class, which is the relative error of E[1/s²] there

# Equations that rules enter, whatever they read.
ENTERED = {"random_bits", "scan", "while", "cond", "region", *CALLS}
# Entries are moved, repeated or left out, of which classes and blocks tell more than one class for all would.
_MOVING = {*MOVES, "concatenate", "dynamic_slice", "gather", "pad", "split"}
_FOLDED: Fact[Hashable, Node | None] = Fact()  # known numbers computed by elementwise primitives


class TracedInputs:
    """The arrays and descriptions of arrays of a model's inputs; everything else is passed as it is."""

    def __init__(self, given: Inputs):
        """Read `arrays`, `join` that puts others in their places, and `structs`: shapes, of 32 bits unless x64 is on."""
        self.arrays, self.join = faces.split(given)
        canonical = functools.partial(jax.dtypes.canonicalize_dtype, allow_extended_dtype=True)
        self.structs = [jax.ShapeDtypeStruct(x.shape, canonical(x.dtype)) for x in self.arrays]

    def values(self, interpreter: Context) -> list[Any]:
        """Their values; given arrays may go together, and one that is given twice is one."""
        PADDED.put(interpreter.graph, None, padded_shapes(self.arrays))
        measured = [
            not isinstance(x, Moments | jax.ShapeDtypeStruct) and jnp.issubdtype(x.dtype, jnp.floating)
            for x in self.arrays
        ]
        made, leaves = [], list[Leaf]()
        for k, x in enumerate(self.arrays):
            alike = (j for j in range(k) if measured[j] and measured[k] and np.array_equal(self.arrays[j], x))
            made.append(input_value(interpreter, x, f"input {next(alike, k)}"))
            if measured[k] and isinstance(made[k].node, Leaf):
                leaves.append(made[k].node)
        every = functools.reduce(operator.or_, (leaf.deps for leaf in leaves), 0)
        for leaf in leaves:
            leaf.deps = every
        return made


def input_value(interpreter: Context, x: Any, name: str) -> Any:
    """An input as a value: known numbers, or a leaf with its law; ValueError where it contains NaN or infinities."""
    graph, shape = interpreter.graph, tuple(x.shape)
    axes = axes_of(shape)
    described = isinstance(x, jax.ShapeDtypeStruct)
    if math.prod(shape) == 0:
        raise ValueError(f"{name} has shape {shape}: it is empty")
    if isinstance(x, Moments):
        return input_leaf(interpreter, name, shape, table_over(axes, x.mean, x.second()), odd=False)
    if is_key(x):
        key = jax.random.key(MODEL_SEED)
        return Opaque(x if isinstance(x, jax.Array) else jax.random.split(key, shape) if shape else key)
    kind = np.dtype(x.dtype).kind
    if kind == "c":
        # Of one that is only described, two parts that have E|x|² = 1 between them.
        re, im = [Moments(0.0, 0.5, shape)] * 2 if described else (np.real(x), np.imag(x))
        re = input_value(interpreter, re, f"{name} (real part)")
        return Complex(re, input_value(interpreter, im, f"{name} (imaginary part)"))
    if described and kind in "biu":
        return full(graph, 1.0, shape) if kind == "b" else unknown(interpreter, name, shape)
    if described:
        return input_leaf(interpreter, name, shape, independent(0.0, 1.0, axes), odd=True)
    numbers = known_or_real(interpreter, x, name)
    if not isinstance(numbers, np.ndarray):
        return numbers
    if is_mask(graph, numbers):
        return interpreter.known(numbers)
    if numbers.ndim == 3 and min(shape) > 1:  # samples, places, features
        logs = np.log(np.mean(np.square(numbers), axis=-1) + 1e-300)
        scatter = np.var(logs - logs.mean(axis=1, keepdims=True))
        if scatter > _ALIKE_SCALES + 4 / shape[-1]:
            interpreter.regions.ask("", "given places that differ in scale")
    if len(shape) > 1 and shape[0] > 1:
        axes = (sample_axis(numbers), *axes[1:])
    numbers = np.squeeze(numbers)
    made = input_leaf(interpreter, name, shape, estimate(numbers, axes), odd=False)
    arrays.note_numbers(made.node, numbers)
    return made


def known_or_real(interpreter: Context, x: Any, name: str) -> Any:
    """The value of whole numbers, and of one number everywhere; other real numbers, which must be finite, in float64."""
    numbers = np.asarray(x)
    if numbers.dtype.kind in "iub":
        return interpreter.known(numbers)
    numbers = numbers.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} contains NaN or infinities")
    first = float(numbers.flat[0]) if numbers.size else 0.0
    return full(interpreter.graph, first, numbers.shape) if (numbers == first).all() else numbers


def sample_axis(numbers: Float[np.ndarray, "samples ..."]) -> Axis:
    """The first axis of given numbers, its positions in classes of samples whose mean squares are nearly one.

    Samples that are all zero, as paddings are, are a class of their own; of others there are as few classes, in equal
    steps of ln s², as keep its variance within them below `_ALIKE_SCALES`.
    """
    squares = np.mean(np.square(numbers, dtype=float).reshape(len(numbers), -1), axis=1)
    positive = squares > 0
    labels, logs = positive.astype(int), np.log(squares[positive])
    if len(logs) < 2:
        return Axis(len(numbers))
    # Beyond twice the variance of ln of a mean of n squares, 2/n.
    if logs.var() > _ALIKE_SCALES + 4 / (numbers.size // len(numbers)):
        level = (logs - logs.min()) / np.ptp(logs)
        for count in range(2, MOST_CLASSES + 1 - (not positive.all())):
            found = np.minimum(count * level, count - 1).astype(int)
            labels[positive] = 1 + found
            means = np.bincount(found, logs) / np.maximum(np.bincount(found), 1)
            if np.mean((logs - means[found]) ** 2) <= _ALIKE_SCALES:
                break
    return labelled(labels)


def known(graph: Graph, const: Any, sources: Sequence[Node] = ()) -> Any:
    """The value of known numbers, or of what was computed from given arrays: whole numbers are as good as literals."""
    if is_key(const):
        return Opaque(const)
    values = np.asarray(const)
    if values.dtype.kind == "c":
        return Complex(*(known(graph, part, sources) for part in (np.real(values), np.imag(values))))
    squeezed, shape, whole = np.squeeze(values), values.shape, values.dtype.kind in "biu"
    if sources and not whole and np.isfinite(values).all():
        return value(arrays.computed(graph, squeezed, axes_of(shape), sources), shape)
    # A scalar NaN is a literal of the code (jnp.var has one, in a branch not taken).
    if values.ndim and values.dtype.kind == "f" and np.isnan(values).any():
        raise PredictionError("an array of the model contains NaN")
    return value(array(graph, squeezed if whole else squeezed.astype(np.float64)), shape)


def concrete(x: Any, dtype: Any = None) -> np.ndarray | None:
    """The numbers of a known value; None where it is random or too large."""
    if isinstance(x, Complex):
        re, im = concrete(x.re), concrete(x.im)
        return None if re is None or im is None else (re + 1j * im).astype(dtype or complex)
    is_literal = isinstance(x, Value) and x.node.is_literal
    found = entries(x) if is_literal and math.prod(x.shape) <= MOST_FOLDED else None
    return found if found is None or dtype is None else found.astype(dtype)


def folded(graph: Graph, eqn: Any, ins: list[Any]) -> list[Any] | None:
    """The outputs of an equation of known inputs; None where one is not known, or where a rule says more."""
    name, keyed = eqn.primitive.name, any(isinstance(x, Opaque) for x in ins)
    if name in ENTERED:
        return None
    if not keyed and (outs := without_entries(graph, eqn, ins)) is not None:
        return outs
    if not ins or name == "rng_bit_generator" or (name in ELEMENTWISE_OR_LAYOUT and not keyed):
        return None
    if sum(math.prod(v.aval.shape) for v in eqn.outvars) > _MOST_EVALUATED:
        return None
    pairs = zip(ins, eqn.invars, strict=True)
    literal = [x.key if isinstance(x, Opaque) else concrete(x, v.aval.dtype) for x, v in pairs]
    if not any(x is None for x in literal):
        return [known(graph, out) for out in _evaluated(eqn, literal)]
    sources = [part for x in ins for part in parts(x)]
    if not all_known(sources) or (name in _MOVING and len(sources) == len(ins)):
        return None
    with np.errstate(all="ignore"):
        numbers: Any = [[entries(part) for part in parts(x)] for x in ins]
        outs = _evaluated(eqn, [re + 1j * im[0] if im else re for re, *im in numbers])
    return [known(graph, out, [part.node for part in sources]) for out in outs]


def note_moved(eqn: Any, ins: Sequence[Any], outs: Sequence[Any]) -> None:
    """Of an equation that only moves entries of given arrays, note how the numbers that it makes are worked out."""
    if eqn.primitive.name not in _MOVING or not all_known(ins):
        return
    sizes = [math.prod(v.aval.shape) for v in eqn.outvars]
    for i, out in enumerate(outs if 0 < min(sizes) <= max(sizes) <= _MOST_EVALUATED else ()):
        arrays.note_later(out, lambda i=i: np.asarray(_evaluated(eqn, [entries(x) for x in ins])[i], float))


def folded_node(name: str, extra: Any, frame: Axes, views: Sequence[View]) -> Node | None:
    """The node of an elementwise primitive of known numbers; None where one is not known, or has no value."""
    if not all(is_known_array(view.node) for view in views):
        return None
    graph, sizes = views[0].node.graph, [axis.size for axis in frame]

    def number_by_number() -> Node | None:
        literal = all(view.node.is_literal for view in views)
        if math.prod(sizes) > (MOST_FOLDED if literal else _MOST_EVALUATED):
            return None
        numbers = [arrays.numbers_over(view, frame) for view in views]
        if not literal and name in OUTSIDE and np.any(OUTSIDE[name](*numbers)):
            return None  # a rule says so
        with np.errstate(all="ignore"):
            out = of_known(name, extra, numbers)
        out = np.broadcast_to(out, sizes)
        if literal or out.dtype.kind in "biu":
            return array(graph, out, frame)
        return arrays.computed(graph, out, frame, [v.node for v in views]) if np.isfinite(out).all() else None

    return _FOLDED.once(graph, (name, extra, tuple(frame), tuple(views)), number_by_number)


def _evaluated(eqn: Any, known: Sequence[Any]) -> list[Any]:
    """What an equation makes of numbers or keys."""
    args = [x if is_key(x) else jnp.asarray(x, v.aval.dtype) for x, v in zip(known, eqn.invars, strict=True)]
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        return _compat.evaluated(eqn, args)
