"""Regions in a walk: the equations of a scope that no rule covers, put together as one equation that is drawn.

A rule that finds a value outside what it covers asks for a region (`Interpreter.ask`); the walk ends with placeholders, and
the next one takes all equations of that module for one. A scope is added once, so this ends.
"""

import dataclasses
import itertools
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from varscale import _compat
from varscale.programs.pieces import PIECE, environment, is_key, read
from varscale.programs.scopes import opened
from varscale.theory.interpreter.rows import is_mark, marked_row
from varscale.theory.rules.region_sizes import every_equation
from varscale.theory.rules.registry import sub_jaxpr_of

_PARTS = "/.[#"  # what may follow the path of a module in that of a part of it
_ENTERED = {"jit", "pjit", "remat2", "checkpoint", "closed_call"}  # calls whose modules have rows
_MOST_LAYERS = 64  # steps of a loop over layers that are written out


@dataclasses.dataclass
class Regions:
    """The scopes of a model that are drawn."""

    scopes: dict[str, str] = dataclasses.field(default_factory=dict)  # asked for: the reason by path
    drawn: tuple[str, ...] = ()  # those that were when the walk began
    refused: dict[str, str] = dataclasses.field(default_factory=dict)  # those that cannot be drawn
    walks: int = 0  # how many walks there were
    changed: bool = False  # whether one was asked for, or refused, since the walk began

    def ask(self, scope: str, reason: str) -> bool:
        """Add a scope; False where it cannot be drawn, or is."""
        if scope in self.refused or scope in self.drawn:
            return False
        self.scopes.setdefault(scope, reason)
        self.changed = True
        return True

    def refuse(self, scope: str, reason: str) -> None:
        """Take a scope away for good; where its outputs are the reason, the scope around it takes its place."""
        asked = self.scopes.pop(scope, reason)
        self.refused[scope], self.changed = reason, True
        if scope and reason.startswith("random"):
            self.ask(scope[: max(0, *(scope.rfind(c) for c in _PARTS))], asked)

    @property
    def note(self) -> tuple[str, ...]:
        """One sentence on what is drawn, and how often the model was walked for that; none where nothing is."""
        drawn = ", ".join(repr(scope) if scope else "the whole model" for scope in self.drawn)
        return (f"Drawn as regions: {drawn} ({self.walks} walks of the model).",) if drawn else ()

    def waits(self, path: str) -> bool:
        """Whether a path is of a scope that was asked for in this walk, so that nothing in it needs to be worked out."""
        return any(scope not in self.drawn and within(path, scope) for scope in self.scopes)

    def again(self) -> bool:
        """Begin the next walk, if there has to be one."""
        changed, self.changed, self.drawn = self.changed, False, tuple(self.scopes)
        self.walks += 1
        return changed


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """Equations of a jaxpr as one equation.

    `params`: the scope (`scope`), the jaxpr (`jaxpr`; after the operands it takes numbers that are added to its outputs where
    they are made, zeros: what flows back into them is the gradient there), which output each is added to (`nudged`), and the
    rows of modules inside it (`rows`: path, steps, field, variable).
    """

    invars: list[Any]
    outvars: list[Any]
    params: dict[str, Any]
    source_info: Any
    primitive = types.SimpleNamespace(name="region", multiple_results=True)


def blocks(
    eqns: Sequence[Any],
    outputs: Sequence[Any],
    place: Any,
    scopes: Collection[str],
    kept: Sequence[Any],
    is_parameter: Callable[[Any], bool],
) -> Iterator[tuple[range, Any]]:
    """The equations of a jaxpr with their places, those of a scope as one.

    `place`: where the walk is; `kept`: variables that have rows; `is_parameter`: whether one holds a parameter, once reached.
    """
    paths = [place.scope_of(eqn) for eqn in eqns] if scopes else []
    own = {scope: [i for i, path in enumerate(paths) if within(path, scope)] for scope in scopes}
    # What is between the first and the last reads of them or is read by them, or may as well be.
    spans = list[tuple[range, str]]()
    ends = ((places[0], places[-1], scope) for scope, places in own.items() if places)
    for first, last, scope in sorted(ends):
        if spans and first in spans[-1][0]:
            around, scope = spans.pop()
            first, last = around.start, max(last, around.stop - 1)
        spans.append((range(first, last + 1), scope))
    at, single = 0, [(range(i, i + 1), eqn) for i, eqn in enumerate(eqns)]
    for span, scope in spans:
        yield from single[at : span.start]
        at, inside = span.stop, [eqns[i] for i in span]
        keys = _keys(inside)
        yield from ((range(0), eqn) for eqn in keys)
        read = [v for i, eqn in enumerate(eqns) if i not in span for v in eqn.invars]
        read = {v for v in (*read, *outputs, *kept) if not _compat.is_literal(v)}
        yield span, as_one([e for e in inside if e not in keys], read, place.piece, scope, is_parameter)
    yield from single[at:]


def within(path: str, scope: str) -> bool:
    """Whether a path is a scope's, or that of a part of it."""
    return not scope or path == scope or (path.startswith(scope) and path[len(scope)] in _PARTS)


def _keys(eqns: Sequence[Any]) -> list[Any]:
    """The equations that make random keys of keys and numbers from outside: keys are known, and drawn from anew by the walk."""
    inside, found = {id(v) for eqn in eqns for v in eqn.outvars}, []
    for eqn in eqns:
        if all(is_key(v) for v in eqn.outvars) and inside.isdisjoint(map(id, eqn.invars)):
            found.append(eqn)
            inside.difference_update(map(id, eqn.outvars))
    return found


def as_one(
    eqns: Sequence[Any], read: set[Any], piece: str, scope: str, is_parameter: Callable[[Any], bool]
) -> Region:
    """Equations as one; `read`: variables that are read outside; `piece`: where the piece that they are part of is called."""
    made = {v for eqn in eqns for v in eqn.outvars}
    inputs = (v for eqn in eqns for v in eqn.invars if not _compat.is_literal(v) and v not in made)
    invars = list(dict.fromkeys(inputs))
    outvars = [v for eqn in eqns for v in eqn.outvars if v in read]
    structs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in invars]
    places, found = dict[int, int](), list[_Evaluation]()

    def outputs(operands: Sequence[Any], given: Iterable[Any]) -> list[Any]:
        """What is read outside, and what modules put out beside that."""
        env = dict(zip(invars, operands, strict=True))
        found.append(_Evaluation(iter(given), [env[v] for v in invars if is_parameter(v)]))
        found[-1].run(eqns, env, set(outvars), piece)
        out = [env[v] for v in outvars]
        out += {id(x): x for *_, x in found[-1].rows if not any(x is y for y in out)}.values()
        places.update((id(x), i) for i, x in reversed(list(enumerate(out))))
        return out

    jax.eval_shape(lambda operands: outputs(operands, itertools.repeat(0.0)), structs)
    wanted = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in found[0].nudged]
    jaxpr = jax.make_jaxpr(outputs)(structs, wanted)
    variables = [*outvars, *map(_Marked, jaxpr.out_avals[len(outvars) :])]
    rows = [(*row, variables[places[id(x)]]) for *row, x in found[1].rows]
    nudged = [places[id(x)] for x in found[1].nudged]
    params = {"scope": scope, "jaxpr": jaxpr, "nudged": nudged, "rows": rows}
    return Region(invars, variables, params, eqns[0].source_info)


@dataclasses.dataclass(frozen=True, eq=False)
class _Marked:
    """What a module inside a region puts out, and nothing outside reads."""

    aval: Any


@dataclasses.dataclass(eq=False)
class _Evaluation:
    given: Iterator[Any]  # what is added to outputs
    parameters: list[Any]  # the operands that are parameters
    nudged: list[Any] = dataclasses.field(default_factory=list)  # the arrays that it was added to, after that
    # Path, steps and field of what modules inside put out, and that
    rows: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)
    steps: tuple[int, ...] = ()  # which steps of loops over layers it is in

    def run(self, eqns: Sequence[Any], env: dict[Any, Any], outvars: set[Any], piece: str) -> None:
        """Evaluate equations in an environment; what is in `outvars` is added to."""
        for eqn in eqns:
            ins = read(env, eqn.invars)
            name, inner = eqn.primitive.name, sub_jaxpr_of(eqn)
            if name in _ENTERED and inner is not None:
                inner_piece = opened(eqn, "", piece)[1] if eqn.params.get("name") == PIECE else piece
                outs = self._called(inner, ins, inner_piece)
            elif name == "scan" and (made := self._layers(eqn.params, ins, piece)):
                outs = made
            elif is_mark(eqn):
                outs = [self._nudged(ins[0])]
                path, field = marked_row(eqn, piece, self.steps)
                self.rows.append((path, self.steps, field, outs[0]))
            else:
                outs = _compat.evaluated(eqn, ins)
            pairs = zip(eqn.outvars, outs, strict=True)
            env.update((v, self._nudged(x) if v in outvars else x) for v, x in pairs)

    def _called(self, jaxpr: Any, args: Sequence[Any], piece: str) -> list[Any]:
        jaxpr, consts = _compat.sub_jaxpr(jaxpr)
        env = environment(jaxpr, consts, args)
        self.run(jaxpr.eqns, env, set(), piece)
        return read(env, jaxpr.outvars)

    def _layers(self, params: dict[str, Any], ins: Sequence[Any], piece: str) -> list[Any]:
        """A scan over layers, which takes a parameter a step and has rows for its modules, step by step; [] of others."""
        fixed, carry, streams = _compat.scan_operands(params, ins)
        stacked = any(x is y for x in streams for y in self.parameters)
        marked = any(is_mark(eqn) for eqn, _ in every_equation(params["jaxpr"].jaxpr))
        if not stacked or params["length"] > _MOST_LAYERS or not marked:
            return []
        stacked, outer = list[list[Any]](), self.steps
        for step in range(params["length"])[:: -1 if params["reverse"] else 1]:
            self.steps = (*outer, step)
            outs = self._called(params["jaxpr"], [*fixed, *carry, *(x[step] for x in streams)], piece)
            carry = outs[: len(carry)]
            stacked.insert(0 if params["reverse"] else step, outs[len(carry) :])
        self.steps = outer
        return [*carry, *map(jnp.stack, zip(*stacked, strict=True))]

    def _nudged(self, x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating) or any(x is y for y in self.nudged):
            return x
        self.nudged.append(x + next(self.given))
        return self.nudged[-1]
