"""What a program does with each parameter: its role, the fans of its uses, what comes before and after it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx

from varscale.programs import faces
from varscale.programs.trees import is_box
from varscale.usage import layouts
from varscale.usage.branches import Branch
from varscale.usage.handlers import HANDLERS
from varscale.usage.notes import Attended, Use
from varscale.usage.numbers import constant
from varscale.usage.values import Flow, View, after_function
from varscale.usage.walk import Walk

Role = Literal[
    "input", "hidden", "readout", "embedding", "depthwise", "expert", "norm scale", "position", "vector", "unused"
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OneUse:
    """One place where a parameter is used.

    Attributes:
        role: what it is there.
        fan_in: terms summed into one output there: the law's n. 1 for a lookup, a scale or a shift.
        fan_out: terms summed into the gradient of one input.
        reduction_axes: axes of the parameter that are summed over.
        output_axes: axes of the parameter that reach the output.
        batch_axes: axes over which independent kernels are stacked: layers, experts, heads with kernels of their own.
        times: how often a loop over time repeats it.
        reads_input: whether what it reads is the model's own input, which no parameter has mixed or looked up.
        before: function applied to its input since the last linear map; "" for none, "norm" for a normalisation.
        after: function first applied to its output.
        normalised_after: whether its output is normalised before another kernel reads it.
        depth: residual additions before it.
        ends: number of the residual addition that its output ends in, counted from 1; None where it ends in none.
        parts: what the parts of its output are, where they are told apart: ("query", "key", "value"), ("gate", "up"); a number
            for a part of which nothing is known.
        kind: what the program does with it: "linear", "convolution", "depthwise", "lookup", "scale", "shift", "place" (added by
            position), "token" (joined with activations), "factor" (multiplied with a parameter) or "other".
        packed: where the parts lie: (axis of the parameter, length of a run that holds all parts once); None for one part.
        branch: place in `Uses.branches` of the residual branch it lies in; None for none.
        stream: the residual stream that it reads, or that its output begins; None for none.
        position: linear maps before it in its branch; 0 outside of branches.
        input_scale: constant that its input is multiplied by since the last map, sum or normalisation; None where the trace
            does not tell.
        kernel_scale: likewise the parameter itself.
        output_scale: likewise its output.
        function_scale: likewise its output inside `after`, where a constant does not pass through it: tanh(c y).
        before_scale: likewise its input inside `before`.
        normalised_kernel: whether it was divided by something made of itself before, so that its scale has no effect.
        layers: how many kernels a loop over layers takes from it, one at a time.
        part_sizes: entries of each part, of those that `packed` counts over its stride; () for one part.
    """

    role: Role
    fan_in: float
    fan_out: float
    reduction_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    batch_axes: tuple[int, ...]
    times: int
    reads_input: bool
    before: str
    after: str
    normalised_after: bool
    depth: int
    ends: int | None
    parts: tuple[str, ...]
    kind: str = "other"
    packed: tuple[int, int] | None = None
    branch: int | None = None
    stream: int | None = None
    position: int = 0
    input_scale: float | None = 1.0
    kernel_scale: float | None = 1.0
    output_scale: float | None = 1.0
    function_scale: float | None = 1.0
    before_scale: float | None = 1.0
    normalised_kernel: bool = False
    layers: int = 1
    part_sizes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class ParameterUses:
    """What a program does with one parameter.

    Attributes:
        path: its path, keys joined with "/".
        shape: its shape.
        uses: every place where it is used, in order of execution.
    """

    path: str
    shape: tuple[int, ...]
    uses: tuple[OneUse, ...]

    @property
    def main(self) -> OneUse | None:
        """The use that says what the parameter is: a lookup, else the linear map of the largest fan-in, else the first."""
        if not self.uses:
            return None
        return max(self.uses, key=lambda use: (use.role == "embedding", bool(use.reduction_axes), use.fan_in))

    @property
    def role(self) -> Role:
        """The role of the main use; "unused" where the program never reads the parameter."""
        return self.main.role if self.main else "unused"

    @property
    def times(self) -> int:
        """How often the program reads it."""
        return sum(use.times for use in self.uses)

    @property
    def tied(self) -> bool:
        """Whether it is used as a matrix or a table in more than one place."""
        return sum(bool(use.reduction_axes) for use in self.uses) > 1


@dataclasses.dataclass(frozen=True)
class Attention:
    """A softmax over products of queries and keys.

    Attributes:
        query: paths of the parameters that make the queries.
        terms: entries of a query, over which a score sums.
        scale: constant between that sum and the softmax, with those on queries and keys; None where the trace does not tell.
        row: the row of the products in a prediction with rows of "dot_general": "attn/dot_general".
        keys: over how many keys the softmax runs.
        after: the constant between the products and the softmax; None where the trace does not tell.
        output: path of the kernel that alone reads, with no function between, what this attention and others make by the kernel
            of the queries, where that makes the values too; "" for none.
    """

    query: tuple[str, ...]
    terms: int
    scale: float | None
    row: str
    keys: int
    after: float | None
    output: str = ""


class Found(NamedTuple):
    """What a walk over a program finds.

    Attributes:
        parameters: every parameter's uses.
        additions: residual additions on the longest way.
        branches: every residual branch, in the order of execution.
        attentions: every softmax over products.
        epsilons: by the scope of a norm, the constant under its root.
        jaxpr: the program, whose first inputs are its variables.
        names: the variables.
    """

    parameters: tuple[ParameterUses, ...]
    additions: int
    branches: tuple[Branch, ...]
    attentions: tuple[Attention, ...]
    epsilons: dict[str, float]
    jaxpr: Any
    names: list[Leaf]


class Leaf(NamedTuple):
    """One array of a model's variables.

    Attributes:
        path: its keys joined with "/", the collection "params" left out.
        learned: whether it is a parameter: of the collection "params", or an `nnx.Param`.
    """

    path: str
    learned: bool


def named_leaves(tree: Any) -> list[Leaf]:
    """The arrays of a tree of variables, in the order of `jax.tree.leaves`."""
    collections = set(tree) if isinstance(tree, Mapping) and "params" in tree else set()
    found = []
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)[0]:
        names = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in keys]
        learned = isinstance(node, nnx.Param) if isinstance(node, nnx.Variable) else not collections or names[0] == "params"
        path = "/".join(names[1:] if names[:1] == ["params"] and collections else names)
        found += [Leaf(path, learned)] * len(jax.tree_util.tree_leaves(node))
    return found


def walked(program: faces.Program, structs: Any, inputs: Sequence[Any], join: Callable[[list[Any]], faces.Inputs]) -> Found:
    """Every parameter's uses in a program, its residual branches and its attentions.

    Args:
        program: the model.
        structs: its variables, as a tree of abstract arrays.
        inputs: its inputs, as abstract arrays.
        join: makes the program's inputs of them.
    """
    leaves, tree = jax.tree_util.tree_flatten(structs)
    names = named_leaves(structs)

    def forward(values: list[Any], dynamic: list[Any]) -> Any:
        output, _ = program.apply(jax.tree_util.tree_unflatten(tree, values), join(dynamic))
        return [x for x in jax.tree_util.tree_leaves(output) if isinstance(x, jax.Array)]

    closed = jax.make_jaxpr(forward)(leaves, list(inputs))
    walk = _walk(
        closed.jaxpr, closed.consts, [leaf.shape if n.learned else None for leaf, n in zip(leaves, names, strict=True)]
    )
    learned = [
        (i, name.path, tuple(leaf.shape)) for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)) if name.learned
    ]
    paths = [name.path for name in names]
    additions, branches = walk.residuals.additions, _branches(walk, paths)
    uses = _uses(walk, learned)
    return Found(uses, additions, branches, _attentions(walk, paths), walk.epsilons, closed.jaxpr, names)


def uses_in(
    jaxpr: Any, constants: Sequence[Any], parameters: Sequence[tuple[str, tuple[int, ...]]]
) -> tuple[ParameterUses, ...]:
    """Every parameter's uses in a program that is traced already.

    Args:
        jaxpr: the program; its first inputs are the parameters, the others its inputs.
        constants: values of its constants.
        parameters: path and shape of each.
    """
    walk = _walk(jaxpr, constants, [shape for _, shape in parameters])
    return _uses(walk, [(i, path, tuple(shape)) for i, (path, shape) in enumerate(parameters)])


def _walk(
    jaxpr: Any, constants: Sequence[Any], shapes: Sequence[tuple[int, ...] | None], skips: Collection[Hashable] = ()
) -> Walk:
    """A walk over a program whose first inputs are variables: of parameters their shapes, None for others."""
    walk = Walk(HANDLERS, skips)
    views = [None if shape is None else View(i, layouts.whole(shape)) for i, shape in enumerate(shapes)]
    flows = [walk.input(var.aval.shape) for var in jaxpr.invars[len(shapes) :]]
    walk.numbers.bind(jaxpr.constvars, map(constant, constants))
    for out in walk.run(jaxpr, [None] * len(constants), [*views, *flows]):
        if isinstance(out, View):
            walk.note(Use(out.parameter, "other", batch=tuple(sorted(out.batch))))
        if isinstance(out, Flow):
            walk.close(out)
            for source in out.sources:
                walk.uses[source.use].reaches = True
    found = walk.residuals.skips.difference(skips)
    return _walk(jaxpr, constants, shapes, found.union(skips)) if found else walk


def _uses(walk: Walk, parameters: Sequence[tuple[int, str, tuple[int, ...]]]) -> tuple[ParameterUses, ...]:
    """What a walk noted of each parameter, given by number, path and shape."""
    shapes = {i: shape for i, _, shape in parameters}
    uses: dict[int, list[OneUse]] = {}
    for use in walk.uses:
        if use.parameter in shapes:
            uses.setdefault(use.parameter, []).append(_told(use, shapes[use.parameter]))
    return tuple(ParameterUses(path, shape, tuple(uses.get(i, ()))) for i, path, shape in parameters)


def _branches(walk: Walk, paths: Sequence[str]) -> tuple[Branch, ...]:
    return tuple(
        Branch(
            note.number, note.stream, note.maps, note.stream_scale, note.branch_scale,
            tuple(paths[i] for i in sorted(note.gates)), note.shortcut, note.loops,
        )
        for note in walk.residuals.notes
    )  # fmt: skip


def _attentions(walk: Walk, paths: Sequence[str]) -> tuple[Attention, ...]:
    readers: dict[int, list[Use]] = {}
    for use in walk.uses:
        for read in use.reads:
            readers.setdefault(read, []).append(use)

    def output(a: Attended) -> str:
        found = [reader for s in a.query for reader in readers.get(s.use, ())]
        linear = len(found) == 1 == len(found[0].reads) and not found[0].before and not found[0].normalised
        return paths[found[0].parameter] if linear else ""

    return tuple(
        Attention(
            tuple(sorted({paths[walk.uses[s.use].parameter] for s in a.query})),
            a.terms,
            a.scale,
            a.row,
            a.keys,
            a.after,
            output(a),
        )
        for a in walk.attentions.values()
    )


def _told(use: Use, shape: tuple[int, ...]) -> OneUse:
    """A use as it is reported."""
    scales = use.kind == "scale" and use.normalised
    before = "norm" if scales else after_function(use.before) or ("norm" if use.normalised else "")
    after = "norm" if use.after == {"norm"} else after_function(use.after)
    parts, sizes = parts_of(use)
    return OneUse(
        _role(use, shape), use.fan_in, use.fan_out, use.reduction, use.output, tuple(sorted({*use.batch, *use.shared})),
        use.steps, use.raw, before, after, use.normalised_after, use.depth, use.ends, parts,
        use.kind, _packed(use, sum(sizes)), use.branch, use.stream, use.position, use.input_scale, use.kernel_scale,
        use.output_scale, use.function_scale, use.before_scale, use.normalised_kernel,
        math.prod(shape[axis] for axis in use.batch), sizes,
    )  # fmt: skip


def _role(use: Use, shape: tuple[int, ...]) -> Role:
    """The role of one use."""
    if use.kind == "lookup":
        return "embedding"
    if use.kind == "depthwise":
        return "depthwise"
    if use.kind == "place":
        return "position"
    if use.kind == "scale" and use.normalised:
        return "norm scale"
    if use.kind == "factor":
        return "hidden" if sum(n > 1 for k, n in enumerate(shape) if k not in use.batch) > 1 else "vector"
    if use.kind not in ("linear", "convolution"):
        return "vector"
    if use.shared:
        return "expert"
    if use.reaches and not use.read and use.ends is None:
        return "readout"
    return "input" if use.raw else "hidden"


def _packed(use: Use, entries: int) -> tuple[int, int] | None:
    """(axis, length of a run that holds every part once) where an output is cut into parts, of so many entries together."""
    return (use.cut[0], use.cut[1] * entries) if entries and use.cut is not None else None


def parts_of(use: Use) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """What the parts of an output are, attention's query, key and value, or numbers; and how many entries each has."""
    if not use.parts:
        return tuple("+".join(sorted(roles)) for part, roles in use.roles.items() if part is None), ()
    length = max(of for _, _, of in use.parts)
    edges = sorted({0, length, *(edge for start, stop, of in use.parts if of == length for edge in (start, stop))})
    names = []
    for i, low in enumerate(edges[:-1]):
        inside = [roles for part, roles in use.roles.items() if part and part[2] == length and part[0] <= low < part[1]]
        names.append("+".join(sorted(set().union(*inside))) or str(i))
    return tuple(names), tuple(high - low for low, high in itertools.pairwise(edges))
