"""Any traced function with statistics of its module calls as further outputs: one transformation of its jaxpr."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from varscale import _compat
from varscale.measuring import reducers
from varscale.measuring.reducers import Reducer, Statistics
from varscale.measuring.sites import Place, Plan, Site, plan, sub_jaxprs
from varscale.programs.patterns import Pattern
from varscale.programs.pieces import REMAT
from varscale.programs.tape import Tape

Found = dict[Place, Statistics]


class Measured(NamedTuple):
    """What was measured at one row.

    Attributes:
        path: path of the row.
        kind: class name of the module.
        shape: shape of the array.
        dtype: name of its dtype.
        value: statistics of the array by name, as NumPy values.
        cotangent: statistics of its gradient; None where the program does not differentiate through it.
        averaged: whether they are means over the steps of a loop that is not over layers.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    value: Mapping[str, Any]
    cotangent: Mapping[str, Any] | None
    averaged: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Instrumented:
    """A function with statistics as a second output.

    Attributes:
        run: takes what the function takes; returns its output and the numbers, arrays that `read` understands. It is traceable:
            jit it, with donation and shardings as the function itself.
        plan: what is measured where.
        differentiated: numbers of the marks that the function differentiates through.
        gradients: whether cotangents are marked; not where the function uses forward-mode differentiation.
    """

    run: Callable[..., tuple[Any, Any]]
    plan: Plan
    differentiated: frozenset[int]
    gradients: bool

    def read(self, numbers: Any) -> tuple[Measured, ...]:
        """The measured rows in execution order, read back to the host.

        Args:
            numbers: second output of `run`.
        """
        return tuple(_rows(self, _unpacked(numbers)))


def instrument(
    f: Callable[..., Any],
    *args: Any,
    rows: Pattern | Sequence[Pattern] = "**",
    value: Reducer = reducers.fast,
    cotangent: Reducer = reducers.cotangent,
    weights: Sequence[bool] | None = None,
    method: str = "__call__",
) -> Instrumented:
    """The function with the statistics of every module call in it as a second output.

    Calls of linen modules are seen, and those of nnx modules inside `programs.nnx_calls.recorded`. The function may
    differentiate: the cotangents of what modules return are measured too. `f` is traced once, or twice where it uses
    forward-mode differentiation.

    Args:
        f: a function of pytrees of arrays that returns one.
        *args: its arguments, arrays or `jax.ShapeDtypeStruct`.
        rows: patterns of the rows that are measured, as `programs.patterns.matches_row` reads them.
        value: statistics of an array that a module returns, as a dict of arrays.
        cotangent: statistics of its gradient.
        weights: of each leaf of the arguments, whether it is a parameter: a scan over parameters is one over layers and has a
            row a step. By default a leaf is one where an output has its shape and dtype, as the new parameters of a training
            step have.
        method: method of the model that is the model's own output, in place of `__call__`.

    Raises:
        ValueError: a pattern matches no row.
        Exception: what `f` raises.
    """
    marks, closed, shapes = _traced(f, args, method)
    if weights is None:
        weights = _weights(jax.tree_util.tree_leaves(args), shapes)
    sites = plan(closed.jaxpr, marks.marks, weights, rows)
    walk = Replay(sites, value, cotangent)
    tree = jax.tree_util.tree_structure(shapes)

    def run(*args: Any) -> tuple[Any, Any]:
        outputs, found = walk.run(closed.jaxpr, closed.consts, jax.tree_util.tree_leaves(args))
        return jax.tree_util.tree_unflatten(tree, outputs), _packed(found)

    return Instrumented(run, sites, frozenset(marks.differentiated), marks.backward)


def _traced(f: Callable[..., Any], args: Sequence[Any], method: str) -> tuple[Tape, ClosedJaxpr, Any]:
    """The function's marks, its jaxpr and the shapes of its outputs."""
    for backward in (True, False):
        marks = Tape(method=method, backward=backward)
        try:
            with marks.recording():
                closed, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
        except (TypeError, NotImplementedError) as error:
            if not (backward and _compat.is_forward_mode_error(error)):
                raise
        else:
            if not (backward and _is_forward_mode(closed.jaxpr)):
                return marks, closed, shapes
    raise AssertionError("unreachable: without backward marks every error is raised")


def _is_forward_mode(jaxpr: Any) -> bool:
    """Whether a mark was differentiated in forward mode: inside a loop that fails only when the program is lowered."""
    return any(
        _compat.is_forward_mode_equation(eqn) or any(_is_forward_mode(_compat.sub_jaxpr(part)[0]) for part in sub_jaxprs(eqn))
        for eqn in jaxpr.eqns
    )


def _rows(instrumented: Instrumented, numbers: Mapping[Place, Statistics]) -> Iterator[Measured]:
    """The rows in execution order: those of scanned layers step by step."""
    plan = instrumented.plan
    cotangents = {(site.number, site.call): place for place, site in plan.sites.items() if site.backward}
    rows: list[tuple[tuple[int, ...], Measured]] = []
    for place, site in plan.sites.items():
        if site.backward or place not in numbers:
            continue
        back = cotangents.get((site.number, site.call))
        for steps in np.ndindex(*site.layers):
            value = _at(numbers[place], steps)
            if not value.pop("ran", 1):
                continue
            gradient = None
            if back is not None:
                gradient = _at(numbers[back], steps[: len(plan.sites[back].layers)])
            elif site.number in instrumented.differentiated:
                gradient = {"second_moment": np.float32(0), "nonfinite_share": np.float32(0)}  # the loss does not depend on it
            if site.row(steps) not in plan.rows:
                continue
            row = Measured(site.row(steps), site.mark.kind, site.shape, site.dtype, value, gradient, site.averaged)
            rows.append((in_order(plan, place, steps), row))
    yield from (row for _, row in sorted(rows, key=lambda row: row[0]))


def _at(statistics: Statistics, steps: tuple[int, ...]) -> Statistics:
    return {name: jax.tree_util.tree_map(lambda x: x[steps], x) for name, x in statistics.items()}


def in_order(plan: Plan, place: Place, steps: Sequence[int]) -> tuple[int, ...]:
    """The place, with the step after each scan over layers that it is in."""
    left = iter(steps)
    order: list[int] = []
    for i, number in enumerate(place):
        order.append(number)
        if place[: i + 1] in plan.layers:
            order.append(next(left))
    return tuple(order)


def _weights(leaves: Sequence[Any], outputs: Any) -> list[bool]:
    """Which leaves have the shape and dtype of an output."""
    returned = {(tuple(x.shape), x.dtype) for x in jax.tree_util.tree_leaves(outputs)}
    return [(np.shape(x), getattr(x, "dtype", None)) in returned for x in leaves]


class Replay:
    """Evaluates jaxprs anew, reducing the arrays at the sites of a plan.

    A subclass may do more at a site than measure (`at_site`).
    """

    def __init__(self, sites: Plan, value: Reducer, cotangent: Reducer):
        self.plan = sites
        self.value = value
        self.cotangent = cotangent
        self._parts: dict[Place, list[_Part]] = {}

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], place: Place = ()) -> tuple[list[Any], Found]:
        """The outputs of a jaxpr, and what was measured on the way."""
        env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))
        found: Found = {}

        def value(atom: Any) -> Any:
            return atom.val if _compat.is_literal(atom) else env[atom]

        if place not in self._parts:
            self._parts[place] = list(_parts(jaxpr, self.plan, place))
        for part in self._parts[place]:
            values = [value(v) for v in part.inputs]
            if part.eqn is None:
                outs = jaxpr_as_fun(part.jaxpr)(*values)  # pyright: ignore[reportArgumentType]
            elif part.place in self.plan.sites:
                outs, found[part.place] = self.at_site(part.place, part.eqn, values)
            else:
                outs, inside = self._enter(part.eqn, values, part.place)
                found |= inside
            env.update(zip(part.outputs, outs, strict=True))
        return [value(v) for v in jaxpr.outvars], found

    def at_site(self, place: Place, eqn: Any, values: list[Any]) -> tuple[Sequence[Any], Statistics]:
        """The outputs of the equation at a site, given its inputs, and the statistics of what it makes."""
        return values, self._reduced(self.plan.sites[place], values[0])

    def _reduced(self, site: Site, x: Any) -> Statistics:
        statistics = (self.cotangent if site.backward else self.value)(jax.lax.stop_gradient(x))
        return {**statistics, "ran": jnp.float32(1)} if site.conditional else statistics

    def _enter(self, eqn: Any, values: list[Any], place: Place) -> tuple[Sequence[Any], Found]:
        name = eqn.primitive.name
        if name == "scan":
            return self._scan(eqn, values, place)
        if name == "while":
            return self._while(eqn, values, place)
        if name == "cond":
            return self._cond(eqn, values, place)
        if name == "shard_map":
            return self._shard_map(eqn, values, place)
        jaxpr, consts = _compat.sub_jaxpr(sub_jaxprs(eqn)[0])
        if name in REMAT and eqn.params.get("differentiated"):
            values = _compat.remat_barrier(eqn.params, values)
        return self.run(jaxpr, consts, values, (*place, 0))

    def _scan(self, eqn: Any, values: list[Any], place: Place) -> tuple[Sequence[Any], Found]:
        params = eqn.params
        constants, first, streams = _compat.scan_operands(params, values)
        jaxpr, literals = _compat.sub_jaxpr(params["jaxpr"])

        def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], tuple[list[Any], Found]]:
            outs, found = self.run(jaxpr, literals, [*constants, *carry, *x], (*place, 0))
            return outs[: len(first)], (outs[len(first) :], found)

        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        last, (stacked, found) = jax.lax.scan(body, first, streams, **options)
        sites = self.plan.sites
        over_layers = {at: len(sites[at].layers) > 0 and not sites[at].averaged for at in found}
        return [*last, *stacked], {at: x if over_layers[at] else reducers.combined(x) for at, x in found.items()}

    def _while(self, eqn: Any, values: list[Any], place: Place) -> tuple[Sequence[Any], Found]:
        """What is measured is the last step."""
        params = eqn.params
        a, b = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        test = jaxpr_as_fun(params["cond_jaxpr"])
        jaxpr, literals = _compat.sub_jaxpr(params["body_jaxpr"])

        def body(state: tuple[list[Any], Found]) -> tuple[list[Any], Found]:
            return self.run(jaxpr, literals, [*values[a:b], *state[0]], (*place, 0))

        nothing = _nothing(jax.eval_shape(lambda x: body((x, {}))[1], values[b:]))
        return jax.lax.while_loop(lambda state: test(*values[:a], *state[0])[0], body, (values[b:], nothing))

    def _cond(self, eqn: Any, values: list[Any], place: Place) -> tuple[Sequence[Any], Found]:
        branches = [_compat.sub_jaxpr(branch) for branch in eqn.params["branches"]]

        def taken(k: int) -> Callable[..., tuple[list[Any], Found]]:
            jaxpr, literals = branches[k]
            return lambda *operands: self.run(jaxpr, literals, operands, (*place, k))

        shapes = [jax.eval_shape(taken(k), *values[1:])[1] for k in range(len(branches))]
        nothing: Found = _nothing({at: x for found in shapes for at, x in found.items()})

        def branch(k: int) -> Callable[..., tuple[list[Any], Found]]:
            def run(*operands: Any) -> tuple[list[Any], Found]:
                outs, found = taken(k)(*operands)
                return outs, {**nothing, **found}

            return run

        return jax.lax.switch(values[0], [branch(k) for k in range(len(branches))], *values[1:])

    def _shard_map(self, eqn: Any, values: list[Any], place: Place) -> tuple[Sequence[Any], Found]:
        params = eqn.params
        jaxpr, literals = _compat.sub_jaxpr(params["jaxpr"])
        axes = _compat.manual_axes(params)

        def shard(*operands: Any) -> tuple[list[Any], Found]:
            outs, found = self.run(jaxpr, literals, operands, (*place, 0))
            return outs, jax.tree.map(lambda x: x[None], found)

        specs = (list(params["out_specs"]), jax.sharding.PartitionSpec(axes))
        outs, found = jax.shard_map(
            shard,
            mesh=params["mesh"],
            in_specs=tuple(params["in_specs"]),
            out_specs=specs,
            axis_names=set(axes),
            check_vma=False,
        )(*values)
        return outs, {at: reducers.combined(x) for at, x in found.items()}


def _nothing(shapes: Any) -> Any:
    """The statistics of what did not run."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


class _Part(NamedTuple):
    """A run of equations that are evaluated as they are, or one equation that is measured or entered.

    Attributes:
        inputs: the variables and literals it takes.
        outputs: the variables it makes.
        place: of one equation, its place.
        eqn: the one equation.
        jaxpr: of a run of equations, these as a jaxpr.
    """

    inputs: Sequence[Any]
    outputs: Sequence[Any]
    place: Place = ()
    eqn: Any = None
    jaxpr: ClosedJaxpr | None = None


def _parts(jaxpr: Any, sites: Plan, place: Place) -> Any:
    """The equations of a jaxpr in order, those that are neither measured nor entered together."""
    last: dict[Any, int] = collections.defaultdict(lambda: -1)
    for i, eqn in enumerate(jaxpr.eqns):
        last.update((v, i) for v in eqn.invars if not _compat.is_literal(v))
    last.update((v, len(jaxpr.eqns)) for v in jaxpr.outvars if not _compat.is_literal(v))
    start = 0
    for i, eqn in enumerate(jaxpr.eqns):
        at = (*place, i)
        if at in sites.sites or at in sites.entered:
            if start < i:
                yield _plain(jaxpr, start, i, last)
            yield _Part(eqn.invars, eqn.outvars, at, eqn)
            start = i + 1
    if start < len(jaxpr.eqns):
        yield _plain(jaxpr, start, len(jaxpr.eqns), last)


def _plain(jaxpr: Any, start: int, stop: int, last: Mapping[Any, int]) -> _Part:
    """Some equations of a jaxpr as one of their own."""
    eqns = jaxpr.eqns[start:stop]
    made = {v for eqn in eqns for v in eqn.outvars}
    inputs = list(dict.fromkeys(v for eqn in eqns for v in eqn.invars if not _compat.is_literal(v) and v not in made))
    outputs = [v for eqn in eqns for v in eqn.outvars if last[v] >= stop]
    part = _compat.replaced(jaxpr, constvars=[], invars=inputs, outvars=outputs, eqns=eqns)
    return _Part(inputs, outputs, jaxpr=ClosedJaxpr(part, []))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Numbers:
    """All statistics in one array, which is read back at once.

    Attributes:
        flat: the statistics.
        layout: by place and name, the structure of a statistic and the shape of each array in it.
    """

    flat: Any
    layout: tuple[tuple[Place, str, Any, tuple[tuple[int, ...], ...]], ...] = dataclasses.field(metadata={"static": True})


def _packed(found: Found) -> _Numbers:
    layout, arrays = [], []
    for place, statistics in found.items():
        for name, x in statistics.items():
            leaves, tree = jax.tree_util.tree_flatten(jax.tree.map(jnp.asarray, x))
            layout.append((place, name, tree, tuple(leaf.shape for leaf in leaves)))
            arrays += leaves
    dtype = jnp.float64 if any(leaf.dtype == jnp.float64 for leaf in arrays) else jnp.float32
    flat = [leaf.ravel().astype(dtype) for leaf in arrays]
    return _Numbers(jnp.concatenate(flat) if flat else jnp.zeros(0), tuple(layout))


def _unpacked(numbers: _Numbers) -> dict[Place, Statistics]:
    flat, start = np.asarray(numbers.flat), 0
    found: dict[Place, Statistics] = collections.defaultdict(dict)
    for place, name, tree, shapes in numbers.layout:
        leaves = []
        for shape in shapes:
            size = int(np.prod(shape, dtype=int))
            leaves.append(flat[start : start + size].reshape(shape))
            start += size
        found[place][name] = jax.tree_util.tree_unflatten(tree, leaves)
    return found
