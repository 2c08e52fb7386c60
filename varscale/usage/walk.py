"""The walk over a jaxpr that notes every use of a parameter."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from varscale import _compat
from varscale.usage import layouts
from varscale.usage.branches import Residuals, scaled_by_its_own, summands
from varscale.usage.notes import Attended, Use
from varscale.usage.numbers import Numbers
from varscale.usage.places import Places
from varscale.usage.primitives import ACTIVATIONS, BINARY, HOMOGENEOUS, LINEAR, MASKS, REDUCTIONS, SAME, WINDOWS
from varscale.usage.values import NAMED_FUNCTIONS, Flow, Score, Source, Value, View, changed, times

Handler = Callable[["Walk", Any, list[Value]], Value | list[Value]]


class Walk:
    """Interprets a jaxpr over `Value`s.

    Args:
        handlers: what to do for a primitive, by its name, where it is none of the elementwise ones and reductions.
        skips: places of sums that are no residual additions, as an earlier walk found: see `Residuals.skips`.

    Attributes:
        uses: every use met so far.
        residuals: the residual additions met so far.
        attentions: every softmax over products, by the row of the products and the axes it runs over.
        numbers: what is known of the constants.
        places: the scopes around the equation that is walked.
        epsilons: by the scope of a root of a reduced value, such as a norm's variance, the constant added under it.
    """

    def __init__(self, handlers: Mapping[str, Handler], skips: Collection[Hashable] = ()) -> None:
        self._handlers = handlers
        self._skips = skips
        self.uses: list[Use] = []
        self.residuals = Residuals()
        self.attentions: dict[tuple[str | int, ...], Attended] = {}
        self.numbers = Numbers()
        self.epsilons: dict[str, float] = {}
        self.places = Places()
        self._anchors = 0
        self._path: list[int] = []  # the equations that the walk is inside of, which tell two calls of one jaxpr apart
        self._places: dict[tuple[Any, ...], int] = {}

    # -- values ---------------------------------------------------------------------------------------------------------

    def input(self, shape: Sequence[int], of: Sequence[Flow] = (), *, linear: bool = True, **changes: Any) -> Flow:
        """A new value that depends on others, with an anchor of its own; `linear`: whether it is a linear function of them."""
        self._anchors += 1
        ancestors = 1 << self._anchors
        for x in of:
            ancestors |= x.ancestors
            self.residuals.read(x)
        maps = max((x.maps for x in of), default=0)
        fields: dict[str, Any] = {
            "axes": layouts.added(shape),
            "depth": max((x.depth for x in of), default=0),
            "maps": maps,
            "embedded": any(x.embedded for x in of),
            "stream": next((x.stream for x in of if x.stream is not None), None),
            "root": self._anchors,
            "sources": frozenset().union(*(x.sources for x in of)),
        }
        made = Flow(self._anchors, ancestors, **(fields | changes))
        self.residuals.ways.made(made, of, maps=made.maps > maps, linear=linear)
        return made

    def note_all(self, use: Use, view: View) -> frozenset[Source]:
        """Note a use of a parameter and of those that are joined with it; what their output is made by."""
        owners = (view.parameter, *view.companions)
        return frozenset(Source(self.note(dataclasses.replace(use, parameter=p, roles={}, parts=set()))) for p in owners)

    def anchored(self, sources: Iterable[Source], x: Flow) -> None:
        """Note that the outputs of these uses are this value."""
        for source in sources:
            self.residuals.anchored(self.uses[source.use], x.anchor)

    def note(self, use: Use) -> int:
        """The number of a use. A loop's body is walked twice: the second pass finds what the first has noted."""
        place = (*self._path, use.parameter)
        if place not in self._places:
            self._places[place] = len(self.uses)
            use.place = place[:-1]
            self.uses.append(use)
            return self._places[place]
        known = self.uses[self._places[place]]
        known.before, known.raw = known.before | use.before, known.raw and use.raw
        known.reads |= use.reads
        return self._places[place]

    def close(self, x: Flow, *, read: bool = False) -> None:
        """Note what became of the outputs that a value consists of, where something new begins."""
        for source in x.sources:
            use = self.uses[source.use]
            use.read |= read
            use.normalised_after |= x.direct and x.normalised
            if x.direct:
                use.output_scale = x.scale
            if x.direct and not use.after:
                use.after = x.functions or frozenset({"norm"} if x.normalised else ())
                use.function_scale = x.function_scale
        for use, factor in () if x.functions else x.addends:
            self.uses[use].output_scale = times(x.scale, factor)

    # -- the walk -------------------------------------------------------------------------------------------------------

    def run(self, jaxpr: Any, consts: Sequence[Value], args: Sequence[Value]) -> list[Value]:
        """The outputs of a jaxpr."""
        env: dict[Any, Value] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

        def read(var: Any) -> Value:
            return None if _compat.is_literal(var) else env[var]

        for eqn in jaxpr.eqns:
            self._path.append(id(eqn))
            outs = self._equation(eqn, [read(v) for v in eqn.invars])
            self._path.pop()
            env.update(zip(eqn.outvars, outs, strict=True))
            if all(out is None for out in outs):
                self.numbers.note(eqn)
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, values: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        if all(v is None for v in values):
            return [None] * len(eqn.outvars)
        if name in self._handlers:
            found = self._handlers[name](self, eqn, values)
            return found if isinstance(found, list) else [found]
        if name in SAME:
            return list(values[: len(eqn.outvars)])
        if name in ACTIVATIONS:
            if name in ("rsqrt", "sqrt") and isinstance(values[0], Flow) and values[0].offset:
                self.epsilons[self.places.scope(eqn)] = values[0].offset
            return [self._function(name, values[0])]
        if name in BINARY:
            return [self._combined(name, eqn, values)]
        if name in REDUCTIONS or name in WINDOWS:
            return [self._reduced(eqn, values)] * len(eqn.outvars)
        if (inner := self._inner(eqn, values)) is not None:
            return inner
        return self._unknown(eqn, values)

    def _inner(self, eqn: Any, values: list[Value]) -> list[Value] | None:
        """The outputs of a call, if the equation is one."""
        for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if key not in eqn.params:
                continue
            jaxpr, consts = _compat.sub_jaxpr(eqn.params[key])
            if len(jaxpr.invars) != len(values):
                continue
            name = str(eqn.params.get("name", ""))
            only = [v for v in values if v is not None]
            if name in NAMED_FUNCTIONS and len(only) == 1:
                return [self._function(name, only[0])]
            if eqn.primitive.name == "custom_jvp_call" and len(only) == 1 and isinstance(only[0], Flow):
                called = {str(inner.params.get("name", "")) for inner in jaxpr.eqns} & NAMED_FUNCTIONS
                if called:
                    return [self._function(called.pop(), only[0])]
            self.numbers.enter(jaxpr.invars, eqn.invars)
            with self.places.inside(eqn):
                return self.run(jaxpr, [None] * len(consts), values)
        return None

    def numbered(self, eqn: Any) -> str:
        """The row that a prediction has for an equation."""
        return self.places.row(eqn, self._path)

    def _unknown(self, eqn: Any, values: list[Value]) -> list[Value]:
        """Outputs that depend on all operands, of an operation that the walk does not know."""
        flows = [v for v in values if isinstance(v, Flow)]
        views = [v for v in values if isinstance(v, View)]
        if not flows:
            kept = max(views, key=_entries)
            return [View(kept.parameter, layouts.added(v.aval.shape), kept.batch, kept.steps) for v in eqn.outvars]
        for view in views:
            self.note(Use(view.parameter, "other", steps=view.steps, batch=tuple(sorted(view.batch)), depth=flows[0].depth))
        return [self.input(v.aval.shape, flows, linear=eqn.primitive.name in LINEAR) for v in eqn.outvars]

    # -- elementwise ----------------------------------------------------------------------------------------------------

    def _function(self, name: str, x: Value) -> Value:
        if not isinstance(x, Flow):
            return x
        functions = x.functions | {name}
        if name in HOMOGENEOUS:
            return changed(x, functions=functions)
        inner = x.scale if x.functions <= HOMOGENEOUS else x.function_scale
        return changed(x, functions=functions, scale=1.0, function_scale=inner)

    def _combined(self, name: str, eqn: Any, values: list[Value]) -> Value:
        shape = eqn.outvars[0].aval.shape
        flows = [v for v in values if isinstance(v, Flow)]
        views = [v for v in values if isinstance(v, View)]
        if not flows:
            kept = max(views, key=_entries)
            for view in views:
                if view.parameter != kept.parameter:
                    self.note(Use(view.parameter, "factor", steps=view.steps, batch=tuple(sorted(view.batch))))
            own = kept.normalised or (name in ("mul", "div") and [v.parameter for v in views] == [kept.parameter] * 2)
            return changed(kept, scale=times(kept.scale, self._factor(name, eqn, values, kept)), normalised=own)
        x = flows[0]
        for y in flows[1:]:
            x = self._both(name, x, y, shape)
        for view in views:
            x = self.met(name, view, x)
        if name in ("add", "add_any") and len(flows) == 1 and not views and x.reduced:
            x = changed(x, offset=self._offset(eqn))
        if len(flows) == 1:
            wide = [v.aval.shape for v, value in zip(eqn.invars, values, strict=True) if value is flows[0]]
            axes = x.axes if wide and wide[0] == shape else layouts.added(shape)
            functions = x.functions
            if not views and name in ("max", "min", "clamp", "pow", "eq", "select_n"):
                if name in ("max", "clamp") and not x.reduced:
                    return self._function(name, changed(x, axes=axes))
                functions = x.functions | {name}
            scale = x.scale if views or x.reduced else times(x.scale, self._factor(name, eqn, values, flows[0]))
            return changed(x, axes=axes, functions=functions, scale=scale)
        return x

    def _offset(self, eqn: Any) -> float:
        """The positive number that an equation adds; 0 where it is not known."""
        return max([0.0, *(number for atom in eqn.invars if (number := self.numbers.of(atom)) is not None)])

    def _factor(self, name: str, eqn: Any, values: Sequence[Value], x: Value) -> float | None:
        """The constant that a value is multiplied by; 1 for a constant array, such as a mask; None for a number not known."""
        if name not in ("mul", "div") or len(values) != 2 or not any(v is None for v in values):
            return 1.0
        atom = eqn.invars[0 if values[0] is None else 1]
        number = self.numbers.of(atom)
        if number is None:
            return None if math.prod(atom.aval.shape) == 1 else 1.0
        if name == "mul":
            return number
        return 1 / number if values[0] is x and number else None

    def met(self, name: str, view: View, x: Flow) -> Flow:
        """Note that a parameter is added to, or multiplied with, an activation."""
        kind = {"add": "shift", "add_any": "shift", "sub": "shift", "mul": "scale", "div": "scale"}.get(name, "other")
        axes = layouts.of(view.axes, range(len(view.axes)))
        normalised = x.normalised or (x.reduced and bool(x.functions & {"rsqrt", "sqrt"}))
        is_place = kind == "shift" and self._is_place(view, x)
        sources = self.note_all(
            Use(
                view.parameter, "place" if is_place else kind, output=axes, batch=tuple(sorted(view.batch)), steps=view.steps,
                depth=x.depth, before=x.functions, raw=x.raw, normalised=normalised, input_scale=x.scale,
                kernel_scale=view.scale,
            ),
            view,
        )  # fmt: skip
        self.anchored(sources, x)
        if is_place:
            over = 1 / x.scale if x.scale else None
            return changed(x, addends=x.addends | {(source.use, over) for source in sources})
        if kind != "scale":
            return x
        if normalised and (x.reduced or not x.scaled):
            return changed(x, scaled=True)
        return changed(x, gates=x.gates | {view.parameter})

    def _is_place(self, view: View, x: Flow) -> bool:
        """Whether a parameter has numbers for places, to which a kernel gives none: a table of positions, and no bias."""
        wide = [k for k, atoms in enumerate(view.axes) if layouts.size([a for a in atoms if a.axis is not None]) > 1]
        if len(wide) + view.placed < 2 or x.normalised or any(self.uses[source.use].shared for source in x.sources):
            return False
        of_kernel = len(view.axes) == len(x.axes) and all(layouts.of(x.axes, (k,)) for k in wide)
        return x.maps == 0 or x.score is not None or (x.direct and not x.functions and not of_kernel)

    def _both(self, name: str, x: Flow, y: Flow, shape: Sequence[int]) -> Flow:
        """Two activations combined entry by entry."""
        union = x.ancestors | y.ancestors
        wide = x if layouts.size([a for atoms in x.axes for a in atoms]) >= math.prod(shape) else y
        sources = x.sources | y.sources
        if name in ("mul", "div") and (scaled := scaled_by_its_own(x, y)) is not None:
            return self.input(
                shape, (x, y), axes=wide.axes, sources=sources, normalised=True, depth=scaled.depth, direct=scaled.direct,
                scaled=(y if scaled is x else x).scaled,
            )  # fmt: skip
        if x.root == y.root or (x.reduced and x.ancestors & (1 << y.anchor)) or (y.reduced and y.ancestors & (1 << x.anchor)):
            functions = x.functions | y.functions | ({"mul"} if name == "mul" and (x.functions or y.functions) else set())
            if name == "mul" and x.sources.isdisjoint(y.sources):  # parts of one kernel's output
                self._gated(x, y)
            if name == "div" and "exp" in functions and (x.reduced != y.reduced):
                functions = functions | {"softmax"}
            return changed(
                wide, ancestors=union, sources=sources, functions=functions, reduced=x.reduced and y.reduced,
                score=x.score or y.score, maps=max(x.maps, y.maps), depth=max(x.depth, y.depth),
                scale=1.0 if functions else wide.scale,
                function_scale=next((z.function_scale for z in (x, y) if z.functions), 1.0),
            )  # fmt: skip
        self.close(x)
        self.close(y)
        place = tuple(self._path)
        is_sum = name in ("add", "add_any")
        in_time = any(self.uses[source.use].steps > 1 for source in min(x, y, key=_maps).sources)
        if is_sum and place not in self._skips and (found := summands(x, y, self.residuals.ways, in_time)) is not None:
            number, on = self.residuals.join(place, found)
            for source in (found.branch.mixed or found.branch.sources) - found.stream.sources:
                self.uses[source.use].ends = number
            made = self.input(shape, (x, y), axes=wide.axes, sources=sources, depth=number, stream=on)
            self.residuals.summed(place, found, made)
            return changed(made, added_to=found.stream.anchor)
        mixed = self._gated(x, y) if name == "mul" else frozenset()
        # A mask or a bias that is added to scores changes nothing of what they were multiplied by.
        scores = x if x.score is not None else y
        scale = scores.scale if scores.score is not None else 1.0
        holds = x.holds | y.holds | 1 << x.anchor | 1 << y.anchor
        addends = x.embeddings | y.embeddings if is_sum else frozenset()
        score = scores.score
        return self.input(
            shape, (x, y), linear=is_sum or name == "sub", axes=wide.axes, sources=sources, score=score, scale=scale,
            holds=holds, mixed=mixed, addends=addends,
        )  # fmt: skip

    def _gated(self, x: Flow, y: Flow) -> frozenset[Source]:
        """Note which kernel makes the gate of a gated layer, and which what is gated; the uses that tell the product's size.

        They are those of the side that no function bounds, or of the deeper side: what a layer made of a condition is a gate.
        """
        if x.direct and y.direct and bool(x.functions) != bool(y.functions):
            for side, role in ((x, "gate"), (y, "up")) if x.functions else ((y, "gate"), (x, "up")):
                for source in side.sources:
                    self.uses[source.use].roles.setdefault(source.part, set()).add(role)
        free = [side for side in (x, y) if not side.functions and not side.normalised]
        if len(free) == 2 and x.maps == y.maps:
            return frozenset()
        return max(free, key=_maps).mixed or max(free, key=_maps).sources if free else frozenset()

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """A pass whose uses are not kept."""
        kept, places, residuals = len(self.uses), dict(self._places), self.residuals.saved()
        yield
        del self.uses[kept:]
        self._places = places
        self.residuals.restored(residuals)

    # -- reductions -----------------------------------------------------------------------------------------------------

    def _reduced(self, eqn: Any, values: list[Value]) -> Value:
        shape = eqn.outvars[0].aval.shape
        x = next((v for v in values if isinstance(v, Flow)), None)
        if x is None:
            view = next(v for v in values if isinstance(v, View))
            axes = eqn.params.get("axes", ())
            kept = tuple(a for k, a in enumerate(view.axes) if k not in axes)
            return changed(view, axes=kept if len(kept) == len(shape) else layouts.added(shape))
        axes = eqn.params.get("axes", ())
        if eqn.primitive.name in WINDOWS:
            return changed(x, axes=x.axes, functions=x.functions)
        name = eqn.primitive.name
        if x.score is not None and (name == "reduce_max" or (name == "reduce_sum" and "exp" in x.functions)):
            keys = math.prod(eqn.invars[0].aval.shape[k] for k in axes)
            # Inside a bounded function too, whose slope at 0 is 1: c tanh(s / c).
            scale = times(x.scale, x.function_scale)
            self.attends(x.score, axes, scale, keys, linear=x.functions - {"exp"} <= MASKS)
        kept = tuple(a for k, a in enumerate(x.axes) if k not in axes)
        made = kept if len(kept) == len(shape) else layouts.added(shape)
        return changed(x, axes=made, reduced=True, score=None)

    def attends(self, score: Score, axes: Sequence[int], scale: float | None, keys: int, *, linear: bool) -> None:
        """Note who is query and who is key: a softmax runs over the keys' own axis.

        Args:
            score: the product that the softmax reads.
            axes: those it runs over.
            scale: the constant that the scores were multiplied by, those of their sides included.
            keys: how many entries it runs over.
            linear: whether nothing but constants and masks came between.
        """
        after = times(scale, 1 / score.before) if score.before and linear else None
        if score.right_axes.issuperset(axes):
            query, key = score.left, score.right
        elif score.left_axes.issuperset(axes):
            query, key = score.right, score.left
        else:
            return
        # The sum follows the maximum, or stands alone where no maximum is subtracted.
        self.attentions.setdefault((score.row, *axes), Attended(query, score.terms, scale, score.row, keys, after))
        for role, sources in (("query", query), ("key", key)):
            for source in sources:
                self.uses[source.use].roles.setdefault(source.part, set()).add(role)


def _entries(view: View) -> int:
    return math.prod(layouts.size(atoms) for atoms in view.axes)


def _maps(x: Flow) -> int:
    return x.maps
