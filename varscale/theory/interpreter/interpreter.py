"""The walk over a jaxpr: an environment of values, a rule a primitive, errors that name the source line.

To teach it a primitive, register a rule: a function of the interpreter, the equation and its input values.

    import varscale as vs
    import numpy as np

    @vs.theory.rule("softsign")
    def softsign(interpreter, eqn, x):
        return interpreter.elementwise("softsign", x)

    vs.theory.FUNCTIONS["softsign"] = lambda x: x / (1 + np.abs(x))
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np

from varscale import _compat
from varscale.programs.scopes import opened
from varscale.theory.domain.axes import Axis
from varscale.theory.domain.tables import independent
from varscale.theory.graph.content import hashed
from varscale.theory.graph.failures import UNCOVERED, PredictionError, located, told
from varscale.theory.graph.known_arrays import all_given, computed, entries, is_known_array, note, numbers
from varscale.theory.graph.layout import Value, align, full, value, without_entries
from varscale.theory.graph.nodes import Array, Constant, Graph, Node, View, array, leaf
from varscale.theory.graph.normal_form import apply
from varscale.theory.graph.store import Fact
from varscale.theory.integrals.primitives import of_known
from varscale.theory.interpreter import registered  # noqa: F401  (rules, and laws of their nodes)
from varscale.theory.interpreter.regions import Regions, blocks, within
from varscale.theory.interpreter.rows import Place
from varscale.theory.propagation.doubts import has_values
from varscale.theory.rules.equations import live_equations, scans, used_variables
from varscale.theory.rules.random import input_leaf, is_weight
from varscale.theory.rules.registry import ELEMENTWISE_OR_LAYOUT, RULES, Complex, Opaque, Rule, parts
from varscale.theory.rules.sampled_regions import drawn_region, placeholder

_FOLDED: Fact[Hashable, Node | None] = Fact()  # known numbers computed by elementwise primitives

MOST_FOLDED = 1 << 26  # elements up to which known numbers are computed with rather than described
_DERIVATIVES = {"jvp", "transpose"}
_NUDGE = 1e-24  # variance: far below the epsilon of a norm, far above rounding of what is zero
_MOST_EVALUATED = 1 << 22  # of which jax computes so many at a time


class Interpreter:
    """Interprets jaxprs over one graph.

    Attributes:
        graph: the nodes built so far.
        place: where the walk is and where it keeps rows; None where it keeps none.
        entering: the equation that is being interpreted there.
        used: the variables that are read of the jaxpr that is being interpreted.
        nudged: whether tiny random numbers are added to what a module puts out where that is one known number, which nothing
            can be differentiated by.
        steps: which steps of loops over layers it is in.
        regions: the scopes that are drawn.
    """

    def __init__(self, graph: Graph | None = None):
        self.graph = graph or Graph()
        self.place: Place | None = None
        self.entering: Any = None
        self.used: frozenset[Any] = frozenset()
        self.nudged = False
        self.steps: list[int] = []
        self.regions = Regions()
        self._places: dict[Any, Place] = {}  # by equation

    def run(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], step: int | None = None
    ) -> list[Any]:
        """The outputs of a jaxpr, given values of its constants and inputs; `step` says which of a loop's it is."""
        if step is not None:
            self.steps.append(step)
            try:
                return self.run(jaxpr, consts, args)
            finally:
                self.steps.pop()
        env, outer = dict[Any, Any](), self.used
        self.used = used_variables(jaxpr)
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self.known(const)
        for var, arg in zip(jaxpr.invars, args, strict=True):
            env[var] = arg
        try:
            if self.place is not None:
                self._watched(live_equations(jaxpr), jaxpr.outvars, env)
            else:
                for eqn in live_equations(jaxpr):
                    self._step(eqn, env)
        finally:
            self.used = outer
        return [self.known(v.val) if _compat.is_literal(v) else env[v] for v in jaxpr.outvars]

    def _mark(self, eqns: Sequence[Any], place: Place) -> None:
        """Ask for regions of what no rule covers, seen from the equations: recurrences, and derivatives inside the model."""
        derived = [i for i, eqn in enumerate(eqns) if _DERIVATIVES & _compat.transforms(eqn)]
        for i, reason in (
            *((i, "a recurrence") for i in scans(eqns)),
            *((i, "a derivative") for i in derived),
        ):
            path = self._scope_of(place, eqns[i])
            if not any(within(path, scope) for scope in self.regions.drawn):
                self.regions.ask(path, reason)

    def _step(self, eqn: Any, env: dict[Any, Any]) -> None:
        ins = [self.known(v.val) if _compat.is_literal(v) else env[v] for v in eqn.invars]
        env.update(zip(eqn.outvars, self.equation(eqn, ins), strict=True))

    def _watched(self, eqns: Sequence[Any], outputs: Sequence[Any], env: dict[Any, Any]) -> None:
        """The equations in turn, keeping rows of what they make, except inside a loop that is not over layers."""
        outer, entered = self.place, self.entering
        assert outer is not None
        place = outer if entered is None else outer.within(entered)
        silent = place.loops != len(self.steps)
        place.rows.entered += not silent
        ends = {} if silent else place.ends(eqns, outputs)
        try:
            scopes = () if silent else self.regions.drawn
            if not silent:
                self._mark(eqns, place)
            kept = [var for ended in ends.values() for _, var in ended]
            for start, stop, eqn in blocks(
                eqns, outputs, place, scopes, kept, lambda v: is_weight(env.get(v))
            ):
                count = place.rows.entered
                self.place, self.entering = None if silent else place, eqn
                self._step(eqn, env)
                if self.nudged and eqn.primitive.name == "name":
                    env[eqn.outvars[0]] = self._nudge(env[eqn.outvars[0]])
                if not silent and count == place.rows.entered:
                    place.note(eqn, env, self.steps)
                for path, steps, field, var in eqn.params["rows"] if eqn.primitive.name == "region" else ():
                    place.rows.add(path, [*self.steps, *steps], "module", env[var], field)
                for i in range(start, stop):
                    for scope, var in ends.get(i, ()):
                        place.rows.add(scope.path, self.steps, "scope", env[var])
        finally:
            self.place, self.entering = outer, entered

    def ask(self, reason: str, *, whole: bool = False) -> bool:
        """Ask for a region of the module that the walk is in, or of the whole model; False where there is none to be had."""
        place = self.place
        return place is not None and self.regions.ask(
            "" if whole else self._scope_of(place, self.entering), reason
        )

    def ask_for(self, error: PredictionError) -> bool:
        """Ask for a region of the module in which moments could not be worked out; False where there is none to be had."""
        place = self._places.get(error.equation)
        return place is not None and self.regions.ask(self._scope_of(place, error.equation), str(error))

    def _scope_of(self, place: Place, eqn: Any) -> str:
        return opened(eqn, place.path, place.piece)[1]

    def refuse(self, scope: str, reason: str) -> None:
        """Say that a region cannot be drawn."""
        self.regions.refuse(scope, reason)

    def _nudge(self, x: Any) -> Any:
        if not isinstance(x, Value) or x.constant is None or math.prod(x.shape) <= 1:
            return x
        table = independent(0.0, _NUDGE, tuple(Axis(n) for n in x.shape if n != 1))
        return self.elementwise(
            "add", x, input_leaf(self, f"nudge {self.graph.leaves}", x.shape, table, odd=True)
        )

    def equation(self, eqn: Any, ins: list[Any]) -> list[Any]:
        """The outputs of one equation."""
        name, outer = eqn.primitive.name, self.graph.origin
        self.graph.origin = eqn
        if self.place is not None:
            self._places[eqn] = self.place
        try:
            if any(isinstance(x, Opaque) for x in ins) and name not in _KEYED:
                outs = self.fold(eqn, ins)
            else:
                outs = None if name in _KEYED else without_entries(self.graph, eqn, ins)
                if outs is None and name not in ELEMENTWISE_OR_LAYOUT:
                    outs = self.fold(eqn, ins)
                if outs is None:
                    outs = self._handler(eqn, ins)(self, eqn, *ins)
                    if name in _MOVING:
                        self._note_given(eqn, ins, outs)
        except (PredictionError, jax.errors.JAXTypeError):
            raise
        except Exception as error:
            if not isinstance(error, UNCOVERED) or not self.ask(told(error)):
                raise located(error, eqn) from error
            outs = [placeholder(self, v.aval) for v in eqn.outvars]
        finally:
            self.graph.origin = outer
        return list(outs) if isinstance(outs, list | tuple) else [outs]

    def _handler(self, eqn: Any, ins: Sequence[Any]) -> Rule:
        """The rule of an equation; of one with complex operands, the one for parts; where there is none, sampling."""
        name = eqn.primitive.name
        if name not in _WHOLE and (
            any(isinstance(x, Complex) for x in ins) or (name in RULES and _is_complex(eqn))
        ):
            return RULES["complex operands"]
        if name in RULES:
            return RULES[name]
        return unruled

    def known(self, const: Any) -> Any:
        """The value of a known array."""
        if hasattr(const, "dtype") and jax.numpy.issubdtype(const.dtype, jax.dtypes.prng_key):
            return Opaque(const)
        values = np.asarray(const)
        if values.dtype.kind == "c":
            return Complex(self.known(np.real(values)), self.known(np.imag(values)))
        if values.dtype.kind not in "biuf":
            values = values.astype(np.float64)
        # A scalar NaN is a literal of the code (jnp.var has one, in a branch not taken).
        if values.ndim and values.dtype.kind == "f" and np.isnan(values).any():
            raise PredictionError("an array of the model contains NaN")
        values = values.astype(np.float64) if values.dtype.kind == "f" else values
        shape = values.shape
        node = array(self.graph, values.reshape([n for n in shape if n != 1]))
        return full(self.graph, node.params, shape) if isinstance(node, Constant) else value(node, shape)

    def concrete(self, x: Any, dtype: Any = None) -> np.ndarray | None:
        """The numbers of a known value; None where it is random or too large."""
        if isinstance(x, Complex):
            re, im = self.concrete(x.re), self.concrete(x.im)
            return None if re is None or im is None else (re + 1j * im).astype(dtype or complex)
        if not isinstance(x, Value) or math.prod(x.shape) > MOST_FOLDED:
            return None
        if isinstance(x.node, Constant):
            return np.full(x.shape, x.node.params).astype(dtype or float)
        if not isinstance(x.node, Array):
            return None
        found = entries(x)
        return found.astype(dtype) if found is not None and dtype is not None else found

    def fold(self, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
        """Evaluate an equation whose inputs are all known; None where one is not."""
        if eqn.primitive.name in _NEVER_FOLDED or not all(
            isinstance(x, Opaque | Value | Complex) for x in ins
        ):
            return None
        if sum(math.prod(v.aval.shape) for v in eqn.outvars) > _MOST_EVALUATED:
            return None
        known: list[Any] = []
        for x, v in zip(ins, eqn.invars, strict=True):
            known.append(x.key if isinstance(x, Opaque) else self.concrete(x, v.aval.dtype))
            if known[-1] is None:
                return (
                    [self.unknown_key(eqn, ins)]
                    if any(isinstance(y, Opaque) for y in ins)
                    else self._fold_given(eqn, ins)
                )
        if not ins and eqn.primitive.name not in ("iota", "random_seed"):
            return None
        return [self.known(o) for o in _evaluated(eqn, known)]

    def _fold_given(self, eqn: Any, ins: Sequence[Any]) -> list[Any] | None:
        """Compute an equation all of whose inputs are given; None where one is not, or where real numbers are only moved."""
        if any(isinstance(x, Opaque) for x in ins):
            return None
        own = [part for x in ins for part in parts(x)]
        if not all_given(own) or (eqn.primitive.name in _MOVING and len(own) == len(ins)):
            return None
        with np.errstate(all="ignore"):
            outs = _evaluated(eqn, [_given_numbers(x) for x in ins])
        return [self._computed(np.asarray(o), [part.node for part in own]) for o in outs]

    def _computed(self, out: np.ndarray, sources: Sequence[Node]) -> Any:
        """The value of what was computed from given arrays: whole numbers are as good as literals."""
        if out.dtype.kind == "c":
            return Complex(self._computed(np.real(out), sources), self._computed(np.imag(out), sources))
        if out.dtype.kind in "biu" or not np.isfinite(out).all():
            return self.known(out)
        axes = [Axis(n) for n in out.shape if n != 1]
        node = computed(self.graph, out.reshape([a.size for a in axes]), axes, sources)
        return (
            full(self.graph, node.params, out.shape) if isinstance(node, Constant) else value(node, out.shape)
        )

    def _note_given(self, eqn: Any, ins: Sequence[Any], outs: Any) -> None:
        """Of an equation that moves entries of given arrays, how the numbers that it makes are worked out."""
        sizes = [math.prod(v.aval.shape) for v in eqn.outvars]
        if max(sizes) > _MOST_EVALUATED or min(sizes) == 0 or not all_given(ins):
            return
        for i, out in enumerate(outs if isinstance(outs, list | tuple) else [outs]):
            note(out, lambda i=i: np.asarray(_evaluated(eqn, [entries(x) for x in ins])[i], float))

    def unknown_key(self, eqn: Any, ins: Sequence[Any]) -> Opaque:
        """The key that stands for one derived from something random: one for equal derivations, and no other's."""
        derived = [x.key if isinstance(x, Opaque) else [(p.node, p.dims) for p in parts(x)] for x in ins]
        keys = jax.random.key(hashed(eqn.primitive.name, eqn.params, derived) >> 33)
        shape = eqn.outvars[0].aval.shape
        return Opaque(jax.random.split(keys, shape) if shape else keys)

    def elementwise(self, name: str, *xs: Value, extra: tuple[Any, ...] = ()) -> Value:
        """An elementwise primitive of values of one shape (sizes of 1 broadcast)."""
        _, frame, views, layout = align(xs)
        if all(is_known_array(v.node) for v in views):
            key = (name, extra, frame, tuple((v.node.id, v.bind) for v in views))
            folded = _FOLDED.once(self.graph, key, lambda: self._fold_elementwise(name, extra, frame, views))
            if folded is not None:
                return (
                    Value(folded, layout)
                    if folded.axes
                    else full(self.graph, folded.params, Value(folded, layout).shape)
                )
        node = apply(self.graph, name, extra, frame, views)
        if not node.axes:
            layout = tuple(tuple(a._replace(axis=None) for a in dim) for dim in layout)
        return Value(node, layout)

    def _fold_elementwise(
        self, name: str, extra: Any, frame: Sequence[Axis], views: Sequence[View]
    ) -> Node | None:
        literal = all(isinstance(v.node, Constant | Array) for v in views)
        if math.prod(a.size for a in frame) > (MOST_FOLDED if literal else _MOST_EVALUATED):
            return None
        known = []
        for node, bind in views:
            if isinstance(node, Constant):
                known.append(np.float64(node.params))
                continue
            order = sorted(range(len(bind)), key=lambda k, b=bind: b[k])
            shape = [1] * len(frame)
            for k in order:
                shape[bind[k]] = node.axes[k].size
            known.append(numbers(node).transpose(order).reshape(shape))  # pyright: ignore
        if not literal and not has_values(name, known):
            return None  # a rule says so
        with np.errstate(all="ignore"):
            if name == "square":
                name, known = "mul", known * 2
            out = np.broadcast_to(
                of_known("add" if name == "add_any" else name, extra, known), [a.size for a in frame]
            )
        if literal or out.dtype.kind in "biu":
            return array(self.graph, out, frame)
        return computed(self.graph, out, frame, [v.node for v in views]) if np.isfinite(out).all() else None

    def leaf(
        self, name: Any, shape: Sequence[int], mean: float, second_moment: float, *, odd: bool, **law: Any
    ) -> Value:
        """A new random tensor with independent entries."""
        axes = [Axis(int(n)) for n in shape if n != 1]
        return value(leaf(self.graph, name, axes, mean, second_moment, odd=odd, **law), shape)


def unruled(interpreter: Interpreter, eqn: Any, *xs: Any) -> list[Any]:
    """What stands in for a rule where there is none."""
    name = eqn.primitive.name
    return drawn_region(interpreter, eqn, xs, f'no rule covers it (to add one: @vs.theory.rule("{name}"))')


_KEYED = {
    "random_bits",
    "jit",
    "pjit",
    "scan",
    "while",
    "cond",
    "custom_jvp_call",
    "custom_vjp_call",
    "remat2",
    "closed_call",
    "checkpoint",
    "region",
}
_NEVER_FOLDED = _KEYED | {"rng_bit_generator"}
# Complex numbers pass through these as they are.
_WHOLE = (_KEYED - {"random_bits"}) | {
    "complex",
    "real",
    "imag",
    "fft",
    "stop_gradient",
    "copy",
    "copy_p",
    "device_put",
}


def _is_complex(eqn: Any) -> bool:
    """Whether a real value becomes a complex one."""
    return any(getattr(v.aval, "dtype", None) is not None and v.aval.dtype.kind == "c" for v in eqn.outvars)


# Entries are moved, repeated or left out, of which classes and blocks tell more than one class for all would.
_MOVING = {
    "broadcast_in_dim",
    "concatenate",
    "dynamic_slice",
    "expand_dims",
    "gather",
    "pad",
    "reshape",
    "rev",
    "slice",
    "split",
    "squeeze",
    "tile",
    "transpose",
}


def _given_numbers(x: Value | Complex) -> np.ndarray | None:
    """The numbers of a given value, complex ones of a complex one."""
    if isinstance(x, Value):
        return entries(x)
    re, im = entries(x.re), entries(x.im)
    return None if re is None or im is None else re + 1j * im


def _evaluated(eqn: Any, known: Sequence[Any]) -> list[Any]:
    """What an equation makes of numbers or keys."""
    args = [
        x if hasattr(x, "_base_array") else jax.numpy.asarray(x, v.aval.dtype)
        for x, v in zip(known, eqn.invars, strict=True)
    ]
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        out = eqn.primitive.bind(*args, **eqn.params)
    return list(out) if eqn.primitive.multiple_results else [out]
