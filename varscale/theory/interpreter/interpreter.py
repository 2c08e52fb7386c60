"""The walk over a jaxpr: an environment of values, a rule a primitive, errors that name the source line.

To teach it a primitive, register a rule (README.md): a function of the interpreter, the equation and its input values. An
elementwise one returns `interpreter.elementwise(name, x)`, of the function `vs.theory.FUNCTIONS[name]`.
"""

from collections.abc import Collection, Sequence
from functools import reduce
from typing import Any

import jax
import numpy as np

from varscale import _compat
from varscale.programs.pieces import environment, read
from varscale.programs.scopes import ends
from varscale.theory.domain.axes import axes_of
from varscale.theory.graph.expressions import Apply, roots_of
from varscale.theory.graph.known_arrays import is_known_array, scales_samples
from varscale.theory.graph.layout import Value, align, materialize, renumbered, value
from varscale.theory.graph.linear_nodes import feeds_itself
from varscale.theory.graph.nodes import UNKNOWN, Graph, leaf, number
from varscale.theory.graph.normal_form import apply
from varscale.theory.graph.store import UNCOVERED, PredictionError, located, told
from varscale.theory.interpreter.inputs import ENTERED, concrete, folded, folded_node, known, note_moved
from varscale.theory.interpreter.regions import Regions, blocks, within
from varscale.theory.interpreter.rows import Place, is_mark

# These register rules, and laws of kinds of nodes; so do those that others import.
from varscale.theory.propagation import pullbacks, second_moments, sums  # noqa: F401
from varscale.theory.rules import attention, axis, control, convolution, linear, softmax  # noqa: F401
from varscale.theory.rules.random import is_weight
from varscale.theory.rules.registry import RULES, Complex, Waits, live_equations, used_variables
from varscale.theory.rules.sampled_regions import drawn_region, placeholder

_DERIVATIVES = {"jvp", "transpose"}
_SCALING, _LINEAR = ("mul", "div", "select_n"), ("add", "add_any", "sub", "neg", "convert", "stop_gradient")


class Interpreter:
    """Interprets jaxprs over one graph."""

    def __init__(self) -> None:
        self.graph = Graph()  # the nodes built so far
        self.place: Place | None = None  # where the walk is and keeps rows; None where it keeps none
        self.entering: Any = None  # the equation that is being interpreted there
        self.used: frozenset[Any] = frozenset()  # variables that are read of the jaxpr that is run
        self.tie = 0.5  # what of a cotangent each of two equal numbers has, of which one is the largest
        self.apart: Collection[str] = ()  # rows of modules whose arrays get nodes of their own
        self.steps: list[int] = []  # which steps of loops over layers it is in
        self.regions = Regions()  # the scopes that are drawn
        self._places: dict[Any, Place] = {}  # by equation

    def run(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], step: int | None = None
    ) -> list[Any]:
        """The outputs of a jaxpr, given values of its constants and inputs; `step` says which of a loop's it is."""
        env = environment(jaxpr, map(self.known, consts), args)
        place, outer = self.place, (self.used, self.place, self.entering, self.steps)
        if place is not None and self.entering is not None:
            place = place.within(self.entering)
        self.used = used_variables(jaxpr)
        self.steps = self.steps if step is None else [*self.steps, step]
        try:
            if place is not None and place.loops == len(self.steps):
                self._watched(jaxpr, env, place)
            else:  # inside a loop that is not over layers
                self.place = None
                for eqn in live_equations(jaxpr):
                    self._step(eqn, env)
        finally:
            self.used, self.place, self.entering, self.steps = outer
        return read(env, jaxpr.outvars, self.known)

    def _step(self, eqn: Any, env: dict[Any, Any]) -> None:
        try:
            outs = self.equation(eqn, read(env, eqn.invars, self.known))
        except Waits:
            outs = [placeholder(self, v.aval) for v in eqn.outvars]
        env.update(zip(eqn.outvars, outs, strict=True))

    def _watched(self, jaxpr: Any, env: dict[Any, Any], place: Place) -> None:
        """The equations in turn, keeping rows of what they make."""
        rows, regions, eqns, outputs = place.rows, self.regions, live_equations(jaxpr), jaxpr.outvars
        rows.entered += 1
        ended = ends(eqns, outputs, place.path, place.piece) if rows.scopes else {}
        for eqn in eqns:  # no rule covers derivatives inside the model
            path = place.scope_of(eqn) if _DERIVATIVES & _compat.transforms(eqn) else None
            if path is not None and not any(within(path, scope) for scope in regions.drawn):
                regions.ask(path, "a derivative")
        kept = [var for found in ended.values() for _, var in found]
        parts = blocks(eqns, outputs, place, regions.drawn, kept, lambda v: is_weight(env.get(v)))
        for places, eqn in parts:
            entered = rows.entered
            if regions.changed and regions.waits(place.scope_of(eqn)):  # the next walk draws it
                env.update((v, placeholder(self, v.aval)) for v in eqn.outvars)
                continue
            self.place, self.entering = place, eqn
            self._step(eqn, env)
            if entered == rows.entered:
                place.note(eqn, env, self.steps)
            if is_mark(eqn) and rows.made[-1].path in self.apart:
                env[eqn.outvars[0]] = x = self._named(env[eqn.outvars[0]])
                rows.made[-1] = rows.made[-1]._replace(value=x)
            for path, steps, field, var in eqn.params["rows"] if eqn.primitive.name == "region" else ():
                rows.add(path, [*self.steps, *steps], "module", env[var], field)
            for i in places:
                for scope, var in ended.get(i, ()):
                    rows.add(scope.path, self.steps, "scope", env[var])

    def ask(self, reason: str, *, whole: bool = False) -> None:
        """Have the next walk draw the module that this one is in, or the whole model; where it cannot, go on."""
        place = self.place
        if place is not None and self.regions.ask("" if whole else place.scope_of(self.entering), reason):
            raise Waits

    def ask_for(self, error: Exception) -> bool:
        """Ask for a region of the module in which moments could not be worked out; False where there is none to be had."""
        place = self._places.get(eqn := located(error).equation)
        return place is not None and self.regions.ask(place.scope_of(eqn), told(error))

    def _named(self, x: Any) -> Any:
        """The array of a row as a node of its own, equal to it, which alone is what reads the row."""
        if not isinstance(x, Value) or (x.constant is None and is_known_array(x.node)):
            return x
        x = reduce(materialize, range(len(x.dims)), x)
        views = x.node.whole, number(self.graph, len(self.graph.nodes)).whole  # a number of its own
        return Value(self.graph.make(Apply, x.node.axes, views, ("row", ())), x.dims)

    def equation(self, eqn: Any, ins: list[Any]) -> list[Any]:
        """The outputs of one equation."""
        name, outer = eqn.primitive.name, (self.graph.origin, self.tie)
        self.graph.origin = eqn
        if name == "custom_jvp_call":  # rectifiers have a derivative of their own at 0, which is 0
            self.tie = 0.0
        if self.place is not None:
            self._places[eqn] = self.place
        try:
            if (outs := folded(self.graph, eqn, ins)) is None:
                if name not in RULES:
                    raise NotImplementedError(f'no rule covers it (to add one: @vs.theory.rule("{name}"))')
                made_complex = any(np.iscomplexobj(v.aval) for v in eqn.outvars)
                mixed = made_complex or any(isinstance(x, Complex) for x in ins)
                outs = RULES["complex operands" if mixed and name not in _WHOLE else name](self, eqn, *ins)
                outs = list(outs) if isinstance(outs, list | tuple) else [outs]
                note_moved(eqn, ins, outs)
            return outs
        except (PredictionError, jax.errors.JAXTypeError):
            raise
        except UNCOVERED as error:
            return drawn_region(self, eqn, ins, str(error))
        except Exception as error:
            raise located(error, eqn) from error
        finally:
            self.graph.origin, self.tie = outer

    concrete = staticmethod(concrete)

    def known(self, const: Any) -> Any:
        """The value of a known array."""
        return known(self.graph, const)

    def elementwise(self, name: str, *xs: Value, extra: tuple[Any, ...] = ()) -> Value:
        """An elementwise primitive of values of one shape (sizes of 1 broadcast)."""
        frame, views, layout = align(xs)
        node = folded_node(name, extra, frame, views) or apply(self.graph, name, extra, frame, views)
        curved = name not in _SCALING + _LINEAR
        read = roots_of(*views) if curved else views
        drawn = name not in _LINEAR and scales_samples(read, frame, curved)
        drawn |= any(x.shares for x, _ in read if curved) or (name == "mul" and feeds_itself(*views))
        if drawn:
            self.ask("one scale of all features, or a function of softmax weights", whole=True)
            node.mark("assumed", UNKNOWN)
        return Value(node, layout if node.axes else renumbered(layout, {}))

    def leaf(self, name: Any, shape: Sequence[int], mean: float, second_moment: float, **law: Any) -> Value:
        """A new random tensor with independent entries."""
        return value(leaf(self.graph, name, axes_of(shape), mean, second_moment, **law), shape)


# Complex numbers pass through these as they are.
_WHOLE = (ENTERED - {"random_bits"}) | {"complex", "real", "imag"}
