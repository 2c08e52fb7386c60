"""The way of last resort: a primitive without a rule is run on Gaussian arrays with the right moments, and flagged."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from varscale.theory.domain.axes import Axis, pool, refine
from varscale.theory.domain.random_arrays import gaussian
from varscale.theory.domain.tables import Table, estimate
from varscale.theory.graph.expressions import roots
from varscale.theory.graph.failures import PredictionError, source
from varscale.theory.graph.layout import Value, value
from varscale.theory.graph.nodes import UNKNOWN, Array, Node, View, pullback, second_moments
from varscale.theory.graph.store import BackwardNotes, Fact
from varscale.theory.integrals.hermite_series import Z
from varscale.theory.propagation.marginals import concentrated, evaluate, marginal
from varscale.theory.propagation.pullbacks import mean_square
from varscale.theory.rules.registry import Context

_MOST_DRAWN = 2_000_000  # elements drawn for one node
_KEEPS_SIGNS = {"sort", "top_k", "cumsum", "cumprod", "cummax", "cummin", "gather", "reduce_prod"}


def draw(
    node: Node,
    sizes: Sequence[int],
    replicates: int,
    rng: np.random.Generator,
    latents: Callable[[View], np.ndarray] | None = None,
) -> np.ndarray:
    """Arrays with a node's law at other sizes: its roots are drawn, its tree is evaluated. (replicates, *sizes)

    The scale of a norm is a number here, as it is in quadrature: what it normalises is Gaussian given it, x = √v·z, so that
    x/√v is z whatever v is, and x/√(E v) with x drawn alone has the law of z. E[1/v] of v drawn apart would be left over.

    Args:
        node: the node.
        sizes: how many positions of each of its axes.
        replicates: how many arrays.
        rng: where random numbers come from.
        latents: draws the normals behind a root, (replicates, its sizes...); by default any two positions are alike.
    """
    env: dict[Any, np.ndarray] = {}
    every = roots(node)
    held = {r for r in every if concentrated(r.node) and any(r.node.deps & o.node.deps for o in every if o != r)}
    # Trees are evaluated over a frame with the replicates last, as quadrature points are.
    for root in every:
        own = [sizes[b] for b in root.bind]
        if root in held:
            drawn = np.full((replicates, *own), root.node.table.total_mean)
        elif isinstance(root.node, Array):
            numbers = np.asarray(root.node.values, float)[tuple(slice(0, n) for n in own)]
            drawn = np.repeat(numbers[None], replicates, 0)
        else:
            law = marginal(root.node)
            if latents is None:
                plain = [Axis(axis.size) for axis in root.node.axes]
                rho = pool(law.correlation, root.node.axes)
                normals = gaussian(rho, plain, [np.arange(n) for n in own], replicates, rng)
            else:
                normals = latents(root)
            line = np.asarray(law.values, float)
            for axis in root.node.axes:
                line = np.tensordot(axis.counts / axis.size, line, axes=(0, 0))
            drawn = np.interp(normals, Z, line)
        shape = [1] * len(sizes)
        for k, b in enumerate(root.bind):
            shape[b] = own[k]
        order = sorted(range(len(root.bind)), key=lambda k, b=root.bind: b[k])
        drawn = drawn.transpose([0, *(k + 1 for k in order)]).reshape(replicates, *shape)
        env[root] = np.moveaxis(drawn, 0, -1)
    out = evaluate(View(node, tuple(range(len(node.axes)))), node.axes, env)
    return np.moveaxis(np.broadcast_to(out, (*sizes, replicates)), -1, 0)


def sample_map(
    nodes: Sequence[Node],
    whole: Sequence[set[int]],
    axes: Sequence[Axis],
    f: Callable[..., np.ndarray],
    small: int = 2,
) -> Table:
    """Moments of f of some nodes, their axes in `whole` kept at full size and the others reduced to `small`."""
    sizes = [
        [a.size if k in keep else min(a.size, small) for k, a in enumerate(n.axes)]
        for n, keep in zip(nodes, whole, strict=True)
    ]
    replicates = int(np.clip(_MOST_DRAWN / max(sum(math.prod(s) for s in sizes), 1), 16, 20_000))
    rng = np.random.default_rng(0)
    out = f(*[draw(n, s, replicates, rng) for n, s in zip(nodes, sizes, strict=True)])
    return pooled_estimate(out, axes)


def pooled_estimate(samples: np.ndarray, axes: Sequence[Axis]) -> Table:
    """A table with one class an axis, from replicates (first axis) at reduced sizes."""
    reduced = [Axis(n) for n in samples.shape[1:]]
    keep = [k for k, a in enumerate(reduced) if a.size > 1]
    squeezed = samples.reshape(len(samples), *[reduced[k].size for k in keep])
    live = [reduced[k] for k in keep]
    # The replicates are one more axis, of which only "the same" is wanted.
    table = estimate(squeezed, [Axis(len(samples)), *live])
    second, mean = table.second[0], table.mean.reshape([1] * len(live))
    for k in range(len(axes)):
        if k not in keep:
            second = np.repeat(np.expand_dims(second, k), 2, axis=k)
            mean = np.expand_dims(mean, k)
    mean = np.broadcast_to(mean, [a.classes for a in axes])
    return Table(tuple(axes), np.array(mean), refine(second, axes))


# Set on the validation grid, not derived, both: of moments from Gaussian draws of operands; of positions, which may be read.
_DRAWS_DOUBT, _POSITION_DOUBT = 0.15, 0.5


class _Equation(NamedTuple):
    """An equation without a rule, the values that it reads, and which of its outputs a node is."""

    eqn: Any
    values: Sequence[Any]
    which: int


_EQUATIONS: Fact[Hashable, _Equation] = Fact()
_OUTPUTS: Fact[Hashable, tuple[list[np.ndarray], float]] = Fact()


class Sampled(Node):
    """One output of a primitive that has no rule; `params` is (name, which output, key into the graph's store)."""

    how = "sampled"
    gradient_doubt = 1.0  # nothing is known of it

    def prepare(self) -> None:
        """What is picked from positive numbers, put in order or added up is positive."""
        self.positive = self.params[0] in _KEEPS_SIGNS and all(v.node.positive for v in self.args)


@second_moments.register(Sampled)
def second_moments_of_sampled(node: Sampled) -> Table:
    eqn, values, which = _EQUATIONS.of(node.graph)[node.params]
    outs, undefined = _run(node.graph, eqn, values, node.params)
    if _is_position(node):
        # What is done with a position depends on which it is: its own values, not a normal's.
        node.graph.flag("assumed", _POSITION_DOUBT)
        line = np.sort(outs[which].ravel())
        node.drawn = line[np.minimum((special.ndtr(Z) * len(line)).astype(int), len(line) - 1)]
    else:
        node.graph.flag("sampled", _DRAWS_DOUBT)
    if undefined > 0:
        node.graph.flag("assumed", UNKNOWN)  # Gaussian draws are none of what it is defined on (a factorization, say)
    return pooled_estimate(outs[which].reshape(len(outs[which]), *[a.size for a in node.axes]), node.axes)


def _is_position(node: Sampled) -> bool:
    eqn, _, which = _EQUATIONS.of(node.graph)[node.params]
    return eqn.outvars[which].aval.dtype.kind in "iu"


@pullback.register(Sampled)
def pullback_of_sampled(node: Sampled, cotangent: np.ndarray, notes: BackwardNotes) -> list[np.ndarray | None]:
    """As if every entry that comes out were one of those that went in (a sort): more is not known, and it is flagged."""
    if _is_position(node):
        return [None] * len(node.args)
    whole = float(mean_square(np.broadcast_to(cotangent, node.frame_types), node.axes)) * math.prod(a.size for a in node.axes)
    out: list[np.ndarray | None] = []
    for (child, _), var in zip(node.args, _EQUATIONS.of(node.graph)[node.params].eqn.invars, strict=True):
        back = np.zeros(child.frame_types)
        back[tuple(slice(0, a.classes) for a in child.axes)] = whole / math.prod(a.size for a in child.axes)
        out.append(None if var.aval.dtype.kind in "iub" else back)
    return out


def _run(graph: Any, eqn: Any, values: Sequence[Value], params: Any) -> tuple[list[np.ndarray], float]:
    """The primitive on a few draws of its inputs at their own shapes, and the share of draws that gave no number."""
    return _OUTPUTS.once(graph, (params[0], params[2]), lambda: _sampled_outputs(eqn, values))


def _sampled_outputs(eqn: Any, values: Sequence[Value]) -> tuple[list[np.ndarray], float]:
    rng = np.random.default_rng(0)
    elements = sum(math.prod(v.shape) for v in values) + sum(math.prod(v.aval.shape) for v in eqn.outvars)
    replicates = int(np.clip(_MOST_DRAWN / max(elements, 1), 4, 400))
    draws = []
    for v, var in zip(values, eqn.invars, strict=True):
        numbers = draw(v.node, [a.size for a in v.node.axes], replicates, rng)
        atoms = [a for dim in v.dims for a in dim]
        order = [0, *(a.axis + 1 for a in atoms if a.axis is not None)]
        numbers = numbers.transpose(order).reshape(replicates, *[a.size if a.axis is not None else 1 for a in atoms])
        numbers = np.broadcast_to(numbers, (replicates, *[a.size for a in atoms])).reshape(replicates, *v.shape)
        draws.append(numbers.astype(var.aval.dtype))
    rows: list[list[np.ndarray]] = []
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        for r in range(replicates):
            try:
                out = eqn.primitive.bind(*[jnp.asarray(d[r]) for d in draws], **eqn.params)
            except Exception as error:
                raise PredictionError(_no_rule(eqn, "it cannot be run to sample it")) from error
            outs = out if eqn.primitive.multiple_results else [out]
            # An empty maximum is infinite; what comes after never reads it.
            rows.append([np.nan_to_num(np.asarray(o, float), nan=np.nan, posinf=0.0, neginf=0.0) for o in outs])
    stacked = [np.stack([row[i] for row in rows]) for i in range(len(rows[0]))]
    undefined = max(float(np.mean(np.isnan(o))) for o in stacked)
    # Where nothing is known of a number, it is as large as what went in.
    scale = max((v.node.table.mean_square for v in values), default=1.0) ** 0.5
    return [np.where(np.isnan(o), scale, o) for o in stacked], undefined


def _no_rule(eqn: Any, why: str) -> str:
    name = eqn.primitive.name
    return (
        f"no rule for primitive {name!r} at {source(eqn)}, and {why}; "
        f'register one: @vs.theory.rule("{name}") def _(interpreter, eqn, *values): ...'
    )


def sampled(interpreter: Context, eqn: Any, *xs: Any) -> list[Value]:
    """Values that are sampled when asked for; an error where even that cannot be done."""
    name = eqn.primitive.name
    elements = sum(math.prod(x.shape) for x in xs if isinstance(x, Value)) + sum(math.prod(v.aval.shape) for v in eqn.outvars)
    inner = not name.startswith("scatter") and any(hasattr(p, "eqns") or hasattr(p, "jaxpr") for p in eqn.params.values())
    if inner or elements > _MOST_DRAWN or not all(isinstance(x, Value) for x in xs):
        raise PredictionError(_no_rule(eqn, "it is too large to sample"))
    graph = interpreter.graph
    graph.count += 1
    mark = graph.count
    outs = []
    for i, var in enumerate(eqn.outvars):
        axes = [Axis(n) for n in var.aval.shape if n != 1]
        views = [View(x.node, ()) for x in xs]
        _EQUATIONS.put(graph, (name, i, mark), _Equation(eqn, xs, i))
        outs.append(value(graph.make(Sampled, axes, views, (name, i, mark)), var.aval.shape))
    return outs
