"""Values: a node and how a tensor's dimensions are made of its axes. Transposes, broadcasts and reshapes happen here alone."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache, partial, reduce
from typing import Any, NamedTuple

import numpy as np

from varscale.theory.domain.axes import MOST_CLASSES, Axes, Axis, affordable, grouped, join, replaced, rest
from varscale.theory.domain.axis_maps import split_axis
from varscale.theory.domain.tables import regrouped
from varscale.theory.graph.linear_nodes import Merge, Permute, Split
from varscale.theory.graph.nodes import Array, Constant, Graph, Node, View, array, number
from varscale.theory.graph.normal_form import broadcast, cut_inside


class Atom(NamedTuple):
    """A factor of a dimension: its size, and the node's axis it runs over (None where the value is constant along it)."""

    size: int
    axis: int | None


Dim = tuple[Atom, ...]


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor: dimension d is the row-major product of the atoms dims[d]; every axis of the node is some atom's."""

    node: Node
    dims: tuple[Dim, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(atom.size for atom in dim) for dim in self.dims)

    @property
    def constant(self) -> float | None:
        """The number that it equals everywhere, if it is one."""
        return self.node.params if isinstance(self.node, Constant) else None


def renumbered(dims: Sequence[Dim], place: Mapping[Any, int]) -> tuple[Dim, ...]:
    """Dimensions over axes of other numbers; along axes that are not in `place` the value is constant."""
    return tuple(tuple(Atom(n, place.get(k)) for n, k in dim) for dim in dims)


def axes_along(dims: Iterable[Dim]) -> list[int]:
    """The node's axes that dimensions run over, in their order."""
    return [atom.axis for dim in dims for atom in dim if atom.axis is not None]


def value(node: Node, shape: Sequence[int]) -> Value:
    """The tensor whose dimensions of other sizes than 1 are the node's axes in order; a constant has none."""
    axes = iter(range(len(node.axes)))
    return Value(node, tuple((Atom(n, next(axes, None)),) if n != 1 else () for n in shape))


def full(graph: Graph, number_: float, shape: Sequence[int]) -> Value:
    """A constant tensor."""
    return value(number(graph, number_), shape)


def without_entries(graph: Graph, eqn: Any, ins: list[Any]) -> list[Any] | None:
    """The outputs of an equation where arrays of size 0 decide them: there are none, or nothing is added; else None."""
    shapes = [getattr(v.aval, "shape", (1,)) for v in eqn.outvars]
    gone, name = any(not math.prod(getattr(v.aval, "shape", ())) for v in eqn.invars), eqn.primitive.name
    nothing = shapes and not any(map(math.prod, shapes))
    if nothing or (gone and name in ("dot_general", "conv_general_dilated")):
        return [full(graph, 0.0, shape) for shape in shapes]
    return [ins[0]] if gone and name.startswith(("scatter", "dynamic_update_slice")) else None


def split(node: Node, k: int, sizes: tuple[int, ...]) -> Node:
    """`node` with axis k as row-major factors of these sizes (each ≥ 2)."""
    graph = node.graph
    axes = affordable(replaced(node.axes, k, *split_axis(node.axes[k], sizes).axes))
    if (made := cut_inside(node, k, axes, lambda x, j: split(x, j, sizes))) is not None:
        back = partial(regrouped, axes=made.axes, out=node.axes, k=k, sizes=sizes, pairs=True)
        return graph.derive(node, made, back)
    return _rearranged(node, Split, Merge, axes, (k, sizes))


def _rearranged(node: Node, kind: type[Node], inverse: type[Node], axes: Axes, params: Any) -> Node:
    if isinstance(node, inverse) and node.params == params:
        return node.argument
    if isinstance(node, Array):
        return array(node.graph, node.values.reshape([a.size for a in axes]), axes)
    return node.graph.make(kind, axes, [node.whole], params)


def merge(node: Node, k: int, count: int) -> Node:
    """`node` with axes k, ..., k + count − 1 as one."""
    sizes = tuple(a.size for a in node.axes[k : k + count])
    axes = (*node.axes[:k], Axis(math.prod(sizes)), *node.axes[k + count :])
    return node if count == 1 else _rearranged(node, Merge, Split, axes, (k, sizes))


def permute(node: Node, order: Sequence[int]) -> Node:
    """`node` with its axes in another order, for the few rules that need a given one."""
    if tuple(order) == tuple(range(len(order))):
        return node
    axes = tuple(node.axes[k] for k in order)
    if isinstance(node, Array):
        return array(node.graph, node.values.transpose(order), axes)
    if isinstance(node, Permute):
        source, bind = node.args[0]
        return permute(source, [bind.index(k) for k in order])
    inverse = tuple(int(i) for i in np.argsort(order))
    return node.graph.make(Permute, axes, [View(node, inverse)], tuple(order))


def merged(x: Value, d: int) -> Value:
    """`x` with dimension d made of one atom at most."""
    real = axes_along([x.dims[d]])
    if len(x.dims[d]) <= 1:
        return x
    if 0 < len(real) < len(x.dims[d]):
        return merged(materialize(x, d), d)
    node, dims, others = x.node, x.dims, rest(x.node.axes, real)
    if real:
        node = merge(permute(node, others + real), len(others), len(real))
        dims = renumbered(dims, {k: i for i, k in enumerate(others)})
    dim = (Atom(x.shape[d], len(others) if real else None),)
    return Value(node, replaced(dims, d, dim))


def materialize(x: Value, d: int) -> Value:
    """Give the constant atoms of a dimension axes of their own (a broadcast node)."""
    new, places = [Axis(n) for n, k in x.dims[d] if k is None], itertools.count(len(x.node.axes))
    dim = tuple(Atom(n, next(places) if k is None else k) for n, k in x.dims[d])
    node = broadcast(x.node, (*x.node.axes, *new)) if new else x.node
    return Value(node, replaced(x.dims, d, dim))


def separated(x: Value) -> Value:
    """Every dimension one axis of its own, or of size 1."""
    return reduce(lambda x, d: merged(materialize(x, d), d), range(len(x.dims)), x)


def transpose(x: Value, order: Sequence[int]) -> Value:
    """Dimensions in another order."""
    return Value(x.node, tuple(x.dims[d] for d in order))


def broadcast_in_dim(x: Value, shape: Sequence[int], places: Sequence[int]) -> Value:
    """`lax.broadcast_in_dim`."""
    dims: list[Dim] = [(Atom(n, None),) if n != 1 else () for n in shape]
    for d, place in enumerate(places):
        if x.shape[d] == shape[place]:
            dims[place] = x.dims[d]
    return Value(x.node, tuple(dims))


def common_cuts(*shapes: Sequence[int]) -> list[int] | None:
    """The products of the leading sizes of all shapes of one array, in order; None where one does not divide the next."""
    cuts = sorted({1}.union(*(itertools.accumulate(sizes, operator.mul) for sizes in shapes)))
    return None if any(b % a for a, b in itertools.pairwise(cuts)) else cuts


def split_at(x: Value, d: int, cuts: Sequence[int]) -> Value:
    """Dimension d factored so that these are the products of its leading atoms; those of its atoms are among them."""
    for place, (start, stop) in enumerate(itertools.pairwise(cuts)):
        (size, k), node, dims = x.dims[d][place], x.node, x.dims
        if (sizes := (stop // start, size * start // stop))[1] == 1:
            continue
        if k is not None:
            node = split(node, k, sizes)
            dims = renumbered(dims, {j: j + (j > k) for j in range(len(x.node.axes))})
        new = (Atom(n, None if k is None else k + i) for i, n in enumerate(sizes))
        dim = replaced(dims[d], place, *new)
        x = Value(node, replaced(dims, d, dim))
    return x


def reshape(x: Value, shape: Sequence[int]) -> Value:
    """Row-major reshape: regroup the atoms, splitting and where need be merging them."""
    shape = tuple(shape)
    if shape == x.shape:
        return x
    if x.constant is not None:
        return full(x.node.graph, x.constant, shape)
    flat = Value(x.node, (tuple(a for dim in x.dims for a in dim),))
    cuts = common_cuts([a.size for a in flat.dims[0]], shape)
    if cuts is None:  # no factor of one is one of the other: all atoms become one
        return reshape(merged(materialize(flat, 0), 0), shape)
    flat = split_at(flat, 0, cuts)
    ends = [cuts.index(n) for n in (1, *np.cumprod(shape))]
    return Value(flat.node, tuple(flat.dims[0][a:b] for a, b in itertools.pairwise(ends)))


class Aligned(NamedTuple):
    """The axes of a frame, a view over it of each of several tensors, and the layout of what is made of them."""

    axes: Axes
    views: list[View]
    dims: tuple[Dim, ...]


def align(values: Sequence[Value]) -> Aligned:
    """Read tensors of one shape (dimensions of size 1 broadcast) over one frame."""
    rank = max(len(x.dims) for x in values)
    xs = [Value(x.node, ((),) * (rank - len(x.dims)) + x.dims) for x in values]
    xs = [_classed(x, xs) for x in xs]
    for d in range(rank):  # of all tensors that are not of size 1 there, the atoms have the same sizes
        sizes = {tuple([n for n, _ in x.dims[d]]) for x in xs if x.dims[d]}
        if len(sizes) > 1:
            cuts = common_cuts(*sizes)
            xs = [(merged(x, d) if cuts is None else split_at(x, d, cuts)) if x.dims[d] else x for x in xs]
    found, binds = _framed(tuple((x.dims, x.node.axes) for x in xs))
    nodes = [x.node for x in xs]
    for i, (node, bind) in enumerate(zip(nodes, binds, strict=True)):
        if isinstance(node, Array):  # it takes the classes of the frame, so that what it says of each is kept
            nodes[i] = node.over([found.axes[k] for k in bind])
    return found._replace(views=list(map(View, nodes, binds)))


@lru_cache(maxsize=4096)
def _framed(operands: tuple[tuple[tuple[Dim, ...], Axes], ...]) -> tuple[Aligned, Sequence[Any]]:
    """Tensors whose dimensions are factored alike over one frame, but for their views, and the places of each one's axes."""
    frame: list[Axis] = []
    binds: list[dict[int, int]] = [{} for _ in operands]
    layout: list[Dim] = []
    for d in range(len(operands[0][0])):
        atoms: list[Atom] = []
        for place, atom in enumerate(max((dims[d] for dims, _ in operands), key=len)):
            mine = ((i, dims[d][place].axis) for i, (dims, _) in enumerate(operands) if dims[d])
            real = [(i, k) for i, k in mine if k is not None]
            atoms.append(Atom(atom.size, len(frame) if real else None))
            for i, k in real:
                binds[i][k] = len(frame)
            if real:
                frame.append(reduce(join, [operands[i][1][k] for i, k in real]))
        layout.append(tuple(atoms))
    places = [tuple(bind[k] for k in range(len(bind))) for bind in binds]
    return Aligned(affordable(tuple(frame)), [], tuple(layout)), places


def _classed(x: Value, beside: Sequence[Value]) -> Value:
    """Known numbers along one axis tell its positions apart: a class a number where few, near ones where others have it."""
    if not isinstance(x.node, Array) or len(x.node.axes) != 1 or x.node.axes[0].labels is not None:
        return x
    numbers, others = x.node.values, [y.dims for y in beside if not y.node.is_literal]
    along = any(
        all(axes_along([dim]) for dim in pair) for dims in others for pair in zip(x.dims, dims, strict=True)
    )
    few = len(np.unique(numbers)) <= min(2 * MOST_CLASSES, len(numbers) - 1)
    if few or (along and numbers.dtype.kind == "f"):
        return Value(x.node.over([grouped(numbers[:, None] * 1.0, 2 * MOST_CLASSES)]), x.dims)
    return x
