"""Rows: what modules, `jax.named_scope` blocks and equations put out, what of a gradient flows through it, and its report.

What a module puts out carries a mark (`faces.named`). A scope is read from the name stacks of its equations and puts out
what is used after it: the largest such array, the last of equals. Calls are entered, and so are loops over layers, whose rows
end in "@step"; loops over time are not.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from scipy import special

from varscale import _compat
from varscale.programs.faces import Program
from varscale.programs.marks import FIELD, MODULE, WITHIN
from varscale.programs.pieces import PIECE, live
from varscale.programs.scopes import is_floating, opened, whole_path
from varscale.report import How, Report, Row, Weight
from varscale.theory.domain.axes import average
from varscale.theory.domain.tables import NEXT_ORDER, independent
from varscale.theory.graph.expressions import as_affine
from varscale.theory.graph.layout import Value, axes_along
from varscale.theory.graph.nodes import Node
from varscale.theory.propagation.cotangents import cotangents
from varscale.theory.propagation.doubts import doubt_of, provenance
from varscale.theory.propagation.fluctuations import fluctuations
from varscale.theory.rules.elementwise import reads_masked
from varscale.theory.rules.registry import CALLS, Complex, Context, sub_jaxpr_of

_LOOPS = {"scan", "while"}
_SCALING = {"add", "sub", "mul", "div", "reshape", "broadcast_in_dim"}
_BAND, _BELOW = 2.5758, 0.005  # 99 % of a normal, and the share below them
_WIDEST_BAND = 25.0  # of ln(mean square): beyond that a draw can be anything, as error_bound says
# Set on the validation grid, not derived, both: of gradient independence itself, at width 256; of a band
# where first order finds no fluctuation at all, what second order and a norm's epsilon leave.
GRADIENT_BASE, _ROUNDING = 0.05, 4e-3
# A relative error of gradients, and the share of rows that may have it, beyond which the model is drawn.
_MUCH, _MANY = 0.1, 0.1
_UNBOUNDED = 1e50  # a mean square that only the large numbers which stand for infinities have


def is_mark(eqn: Any) -> bool:
    """Whether an equation says of an array that a module puts it out."""
    return eqn.primitive.name == "name" and str(eqn.params["name"]).startswith((MODULE, WITHIN))


def marked_row(eqn: Any, piece: str, steps: Sequence[int]) -> tuple[str, str]:
    """The path of the row that a mark tells of, and which array of it. The body of a scan returns (x, None), x alone."""
    where, field, arrays = eqn.params["name"].split(FIELD)
    return whole_path(where, piece), "" if steps and arrays == "1" else field


class Made(NamedTuple):
    """What a module, a scope or an equation put out in the walk."""

    call: str  # scope and, from the second time on, which call of it: "Dense_0#1"
    path: str  # the row's path: the call, and which steps of the loops around it
    kind: str  # "module", "scope", or the primitive of an equation
    value: Any  # what was made


@dataclasses.dataclass
class Rows:
    """What was made so far, in order."""

    scopes: bool  # whether `jax.named_scope` blocks have rows
    equations: Collection[str] | None  # primitives whose equations have rows of their own; None for all
    made: list[Made] = dataclasses.field(default_factory=list)  # the rows
    # How often each kind of row was met at each path, step by step
    counts: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    entered: int = 0  # how many jaxprs were entered

    def add(self, path: str, steps: Sequence[int], kind: str, value: Any, field: str = "") -> None:
        at = "".join(f"@{step}" for step in steps)
        count = self.counts[key := (kind, path + field + at)]
        self.counts[key] += 1
        call = path + (f"#{count}" if count else "")
        self.made.append(Made(call, call + at + field, kind, value))


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the walk is."""

    rows: Rows  # where rows are kept
    path: str = ""  # the scopes that the calls around it were made in
    loops: int = 0  # how many loops are around it
    piece: str = ""  # the path at which the piece that it is in is called

    def scope_of(self, eqn: Any) -> str:
        """The path of the module that an equation is in."""
        return opened(eqn, self.path, self.piece)[1]

    def within(self, eqn: Any) -> Place:
        """The place inside an equation."""
        path = self.scope_of(eqn)
        piece = path if eqn.params.get("name") == PIECE else self.piece
        return Place(self.rows, path, self.loops + (eqn.primitive.name in _LOOPS), piece)

    def note(self, eqn: Any, env: Mapping[Any, Any], steps: Sequence[int]) -> None:
        """A row for what a module puts out; where equations are asked for, one for each array that another computes."""
        name = eqn.primitive.name
        if is_mark(eqn):
            path, field = marked_row(eqn, self.piece, steps)
            self.rows.add(path, steps, "module", env[eqn.outvars[0]], field)
        elif self.rows.equations is None or name in self.rows.equations:
            path = "/".join(filter(None, [self.scope_of(eqn), name]))
            for j, var in enumerate(eqn.outvars):
                if is_floating(var):
                    self.rows.add(path, steps, name, env[var], f"[{j}]" if len(eqn.outvars) > 1 else "")


def joined(made: Sequence[Made], captured: Mapping[str, Mapping[str, Any]]) -> Iterator[Made]:
    """Rows in execution order: what the walk made, and what it met no mark of (booleans, arrays of NumPy).

    `captured`: what the calls in the model's own trace returned, in execution order: call -> {row path: array}.
    """
    left = dict(captured)
    for m in (*made, Made("", "", "module", None)):  # the model itself comes last
        if m.kind != "module" or not captured.get(m.call):
            yield m
        while m.kind == "module" and m.call in left:
            call = next(iter(left))
            yield from (Made(call, path, "module", value) for path, value in left.pop(call).items())


@dataclasses.dataclass(eq=False)
class Tap:
    """A name of an array: the variable that an equation makes, or what a mark calls it afterwards."""

    parent: Tap | None = None  # its name before that
    # How many operands of equations that the model's outputs depend on are it, by this name or a later one
    readers: int = 0
    ends: int = 0  # how many of the model's own outputs are
    sources: Sequence[Tap] = ()  # what the equation that makes it reads
    scaled: Sequence[Tap] = ()  # the same, where that may do no more than scale, shift or lay out one of them

    def chain(self) -> list[Tap]:
        """Its names, from this one back to the first, which all that is the array goes through."""
        return [self, *(self.parent.chain() if self.parent else ())]

    def is_made_of(self, other: Tap) -> bool:
        """Whether an array is worked out from another, or is it."""
        waiting, seen = [self], set()
        while waiting and other not in seen:
            tap = waiting.pop()
            if tap not in seen:
                seen.add(tap)
                waiting += [x for source in tap.sources for x in source.chain()]
        return other in seen

    def reads_all(self, scaled: bool, others: Sequence[Tap] = ()) -> bool:
        """Whether nothing reads the array past this name, or another that is the same, and is not made from it.

        Where it is scaled nothing reads what it is a scaled copy of, either.
        """
        first = self.chain()[-1]
        behind = first.scaled if scaled else ()
        past = first.readers > self.readers or not all(x.is_made_of(first) for x in others)
        return not past and all(x.readers == 1 and x.reads_all(True) for x in behind)

    def share(self, whole: float, doubt: float) -> tuple[float, float]:
        """Gradient and doubt of this name, of those at the array; cotangents of the model's outputs are independent."""
        gradient = self.ends + (max(whole - self.chain()[-1].ends, 0.0) if self.readers else 0.0)
        return gradient, doubt * (whole / gradient if self.readers and gradient else gradient == whole)


def through(jaxpr: Any, rows: Sequence[str], own: int) -> dict[str, Tap]:
    """The names of the arrays that a marked pass returns, by row; the last `own` of them are the model's outputs."""
    ends = jaxpr.outvars[-own:]
    taps: dict[Any, Tap] = {}
    _tapped(live(jaxpr.replace(outvars=ends), jaxpr.eqns), taps)
    for atom in ends:
        for tap in _tap(taps, atom).chain():
            tap.ends += 1
    return {path: _tap(taps, atom) for path, atom in zip(rows, jaxpr.outvars, strict=True)}


def _tap(taps: dict[Any, Tap], atom: Any) -> Tap:
    return Tap() if _compat.is_literal(atom) else taps.setdefault(atom, Tap())


def _tapped(eqns: Sequence[Any], taps: dict[Any, Tap]) -> None:
    for eqn in eqns:
        ins, name = [_tap(taps, v) for v in eqn.invars], eqn.primitive.name
        called = _compat.sub_jaxpr(sub_jaxpr_of(eqn))[0] if name in CALLS else None
        if is_mark(eqn):
            taps[eqn.outvars[0]] = Tap(ins[0])
        elif called is not None and len(called.invars) == len(ins):
            # A body may be called again: its variables are those of the call that is walked.
            own = dict(zip(called.invars, ins, strict=True))
            _tapped(called.eqns, own)
            taps.update(zip(eqn.outvars, [_tap(own, v) for v in called.outvars], strict=True))
        else:
            for x in ins:
                for tap in x.chain():
                    tap.readers += 1
            for tap in (_tap(taps, v) for v in eqn.outvars):
                tap.sources, tap.scaled = ins, ins if name in _SCALING else ()


def summarize(
    interpreter: Context, program: Program, made: Iterable[Made], weights: Mapping[str, Weight]
) -> Report:
    """The report of a walk, without gradients."""
    kinds = {m.path: m.kind for m in made if m.kind != "module"}
    rows = []
    for path, x in _arrays(interpreter, made).items():
        module = re.sub(r"(#\d+|@\d+|\[.*\]|\.\w+)+$", "", path)
        kind = kinds.get(path) or program.kinds.get(module, "array" if module else program.kind)
        rows.append(_row(path, kind, x))
    return Report(tuple(rows), dict(weights))


def with_gradients(report: Report, gradients: Mapping[str, tuple[float, float]]) -> Report:
    """The report with gradients, and bounds on their errors, by row, where it has none."""
    rows = [
        dataclasses.replace(row, gradient=gradients[row.path][0], gradient_error_bound=gradients[row.path][1])
        if row.gradient is None and row.path in gradients
        else row
        for row in report.rows
    ]
    return dataclasses.replace(report, rows=tuple(rows))


def _arrays(interpreter: Context, made: Iterable[Made]) -> dict[str, Value]:
    """By row the array, whose moments are known from here on; of complex numbers it is the modulus that is measured."""
    out = {}
    for m in made:
        x = m.value
        if isinstance(x, Complex):
            x = interpreter.elementwise("hypot", x.re, x.im)
        if isinstance(x, Value) and math.prod(x.shape) > 0:
            # A largest logit is none of a softmax's, so that its own row is no reason to draw the module.
            if m.kind in ("module", "scope") or not reads_masked(x.node):
                _ = x.node.table
            out[m.path] = x
    return out


def _row(path: str, kind: str, x: Value) -> Row:
    if reads_masked(x.node) or x.node.table.mean_square >= _UNBOUNDED:  # masks, which a softmax takes away
        moments = (math.nan, math.inf, math.inf, math.inf, (0.0, math.inf))
        return Row(path, kind, x.shape, *moments, how="assumed", error_bound=math.inf)
    mean = x.node.table.total_mean
    second, typical, (low, high) = of_one_draw(x.node)
    how, error_bound = provenance(x.node)
    # The middle of a band is in doubt, too: of what was drawn by two of the standard errors that bound it.
    reach = math.exp(min(doubt_of(x.node), 1.0) / (2 if how == "sampled" else 1))
    moments = (mean, second, max(second - mean**2, 0.0), typical, (low / reach, high * reach))
    across, along = (_correlation_along(x, dims) for dims in (x.dims[:-1][:1], x.dims[1:-1]))
    return Row(path, kind, x.shape, *moments, across, along, how=cast(How, how), error_bound=error_bound)


class OneDraw(NamedTuple):
    """The mean square of one initialization, over initializations."""

    mean: float
    median: float
    band: tuple[float, float]  # that 99 % of them lie in


def of_one_draw(node: Node) -> OneDraw:
    """The law of a node's mean square over initializations."""
    spread = fluctuations(node)
    second = float(node.table.mean_square * (1 + spread.shift))
    variance = min(spread.variance, _WIDEST_BAND)
    skew = min(max(spread.skew, -(variance**1.5)), variance**1.5)
    typical = second * math.exp(-variance / 2 - skew / 6)
    down = reach = _BAND * math.sqrt(variance) + _ROUNDING
    lean = (_BAND**2 - 1) * skew / 6 / max(variance, 1e-300)  # Cornish and Fisher
    few = min(max(map(abs, spread.sources.values()), default=0.0) ** 2, variance)
    # The largest part may be one of few squares, a gamma variable: more of it is below.
    if few > 2 * NEXT_ORDER:
        shape = max(1 / few, 0.5)
        middle = special.digamma(shape) - math.log(shape)
        gamma = middle - math.log(special.gammaincinv(shape, _BELOW) / shape)
        typical *= math.exp(middle + few / 2)
        down = math.sqrt(reach**2 + max(gamma**2 - _BAND**2 * few, 0.0))
    return OneDraw(second, typical, (typical * math.exp(lean - down), typical * math.exp(lean + reach)))


def _correlation_along(x: Value, dims: Sequence[Any]) -> float | None:
    """E[x x'] / E[x²] for pairs that differ in position along `dims` and agree elsewhere; None where there are none."""
    table = x.node.table
    if table.mean_square == 0 or math.prod(a.size for dim in dims for a in dim) == 1:
        return None
    if not (axes := axes_along(dims)):
        return 1.0
    size = x.node.count(axes)
    # All pairs of positions, less those that agree.
    return (size * average(table.second, table.axes, axes) / table.mean_square - 1) / (size - 1)


def gradients_of(
    interpreter: Context, made: Iterable[Made], taps: Mapping[str, Tap]
) -> dict[str, tuple[float, float]]:
    """Gradients at rows, and bounds on their relative errors; asks for a region where many are in doubt.

    Rows whose array is read elsewhere, too, itself or what it is a scaled copy of, have one where they are nodes of their own.
    """
    arrays = _arrays(interpreter, made)
    copies = {k: math.prod(n for dim in x.dims for n, axis in dim if axis is None) for k, x in arrays.items()}
    outputs = [path for path in arrays if path[:1] in ("", "[")] or list(arrays)[-1:]
    ends = [(arrays[path].node, copies[path]) for path in outputs]
    seeds = [(node, independent(0.0, count, node.axes).second) for node, count in ends]
    read = {path: taps[path] for path in arrays.keys() & taps.keys() if taps[path].readers}
    held = collections.defaultdict(list)
    for path, tap in read.items():
        held[arrays[path]].append(tap.chain()[-1])
    parts = {
        path
        for path, tap in read.items()
        if (node := arrays[path].node).primitive != "row"
        and not tap.reads_all(as_affine(node.whole).of.node is not node, held[arrays[path]])
    }
    whole = [arrays[path].node for path in read.keys() - parts]
    found = cotangents(seeds, [x.node for x in arrays.values()], whole)
    near, useless = sum(x.lost > _MUCH for x in found.values()), sum(x.doubt > 1 for x in found.values())
    if near > _MANY * len(found) or useless > max(3 * _MANY * len(found), 4):
        interpreter.regions.ask("", "gradients in doubt")
    gradients = {}
    for path, x in arrays.items():
        if path not in parts and x.node.id in found:
            gradient, doubt, _ = found[x.node.id]
            # Of several outputs that are one array in other shapes, a change of one is none of the others.
            # Copies share it evenly, if independent; if all n are one, each has 1/n² of it rather than 1/n.
            shapes = {arrays[end].dims for end in outputs if arrays[end].node is x.node}
            doubt += max(len(shapes) - 1, 0) + copies[path] - 1
            gradient = gradient / copies[path]
            if (tap := taps.get(path)) and x.node.primitive != "row":
                gradient, doubt = tap.share(gradient, doubt)
            gradients[path] = float(gradient), float(GRADIENT_BASE + doubt)
    return gradients
