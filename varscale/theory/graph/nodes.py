"""Hash-consed lazy nodes: a model's tensors as random arrays that know what they depend on, and their moments when asked.

A node is an array over its axes. Its arguments are read over one FRAME, a list of axes: the node's own where it is elementwise
or a sum, those and the contracted ones in a contraction, the argument's where entries are moved or averaged. An argument is a
VIEW, a node and the place in the frame of each of its axes (`bind`); along the frame's other axes it is constant. So transposes
and broadcasts are no nodes at all. Two computations of the same thing are the same node.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from functools import cached_property, reduce, singledispatch
from typing import Any, NamedTuple, TypeVar

import numpy as np

from varscale.theory.domain.axes import Axes, Axis
from varscale.theory.domain.tables import Table, independent, lift
from varscale.theory.graph.store import BackwardNotes, Fact, Flows, Marked, evaluated

Pullback = Callable[[np.ndarray], np.ndarray]
_IN_ORDER = tuple(range(64))  # places of axes that are read in their own order
UNKNOWN = 9.0  # by convention, the doubt of what may be many times as large


class View(NamedTuple):
    """A node read over a frame: axis k of the node is axis bind[k] of the frame."""

    node: Node
    bind: tuple[int, ...]

    def within(self, outer: Sequence[int] | Mapping[int, int]) -> View:
        """The same view, its frame's axes being placed at `outer` in a wider frame."""
        if outer == _IN_ORDER[: len(outer)]:
            return self  # and so no copy for each node of an elementwise tree
        return View(self.node, tuple(map(outer.__getitem__, self.bind)))

    def axes_at(self, places: Container[int]) -> tuple[int, ...]:
        """The axes of the node that are at these places of the frame."""
        return tuple(k for k, place in enumerate(self.bind) if place in places)

    def axes_beyond(self, other: View) -> tuple[int, ...]:
        """The axes of the node along which another view is constant: beside its mean, those that it was averaged over."""
        return tuple(k for k, place in enumerate(self.bind) if place not in other.bind)

    def over(self, array: np.ndarray, frame: Axes, *, pairs: bool) -> np.ndarray:
        """A class (with `pairs` a type) array of the node, read over the frame, 1 long where it is constant."""
        return lift(array, self.node.axes, self.bind, frame, pairs=pairs)

    def second(self, frame: Axes) -> np.ndarray:
        """E[x_i x_j] by type of a pair of places in the frame, (types or 1...)."""
        return self.over(self.node.table.second, frame, pairs=True)

    def mean(self, frame: Axes) -> np.ndarray:
        """E[x_i] by class of a place in the frame, (classes or 1...)."""
        return self.over(self.node.table.mean, frame, pairs=False)


class Node(Marked):
    """One random array over `axes`, each of size 2 or more, made of `args` and of `params`, what else identifies it.

    A kind of node is data. How its moments follow from its arguments' (`second_moments`), how a cotangent passes back
    (`pullback`) and what it does to fluctuations (`propagated`) are functions that dispatch on the kind.

    Sets of random leaves are bits: `deps`, those that it depends on; `odd`, the zero-mean ones in which it is linear and the
    symmetric ones in which it is odd; `even`, those of `deps` in which it is even; `unseen`, all leaves in which it is even,
    with those that it does not depend on. E[a b] = 0 where a is odd in a leaf in which b is even. `positive`: it cannot be
    negative. `near` is the share of their variance that near places may have in common beyond what any two have: 1 where known
    numbers are in it, of overlapping windows the part of one that the next one reads. `depth` is the longest way to it from a
    leaf or known numbers.
    """

    primitive = ""  # of an elementwise node, its name
    is_square = False  # x² of one
    how = "exact"  # how good its rule is where nothing is marked, one of `HOWS`
    entrywise = False  # each entry is made of one entry of every argument: what moves entries moves theirs
    moves = False  # its entries are entries of its one argument, some perhaps left out
    averages = False  # the mean of its one argument over the axes `params`
    follows_shifts = False  # its derivatives along the axes `reduced` add up to 1
    collects = False  # entries, or weighted sums of entries, of its first argument, by known indices
    timed = False  # known by draws along time, which hold more than moments by type
    shares = False  # shares that add up to 1, positive but no norm's scale
    width: float | None = None  # terms in each sum of a linear map of two arguments, the second often weights
    reduced: tuple[int, ...] = ()  # the axes of its argument that it does not have
    is_centred = False  # a sum of an array and minus a mean of what that is made of
    is_variance = False  # mean(x²) − mean(x)², which no rounding makes negative here
    is_literal = False  # numbers that stand in the model
    is_input = False  # of the model; other leaves belong to one initialization
    is_bits = False  # random bits, which have no gradient
    is_drawn = False  # a leaf that varies between initializations, and no input
    gradient_doubt = 0.0  # relative error that its pullback may add
    drawn: np.ndarray | None = None  # its values on the normal grid, where it is not to be taken for Gaussian

    def __init__(self, graph: Graph, id_: int, axes: tuple[Axis, ...], args: tuple[View, ...], params: Any):
        self.graph, self.id, self.axes, self.args, self.params = graph, id_, axes, args, params
        self.deps = reduce(lambda bits, view: bits | view.node.deps, args, 0)
        self.even = reduce(lambda bits, view: bits & view.node.unseen, args, self.deps)
        # What moves, averages or reads entries of one array turns its sign with it.
        own = args[0].node if self.moves or self.averages or self.collects else None
        self.odd, self.positive = (0, False) if own is None else (own.odd, own.positive)
        self.near = max((view.node.near for view in args), default=0.0)
        self.depth = 1 + max((view.node.depth for view in args), default=0)
        self._table: Table | None = None
        self.prepare()

    def prepare(self) -> None:
        """Set `odd` and `positive`, where they are not those of its one argument."""

    @property
    def whole(self) -> View:
        return View(self, _IN_ORDER[: len(self.axes)])

    @property
    def argument(self) -> Node:
        """Its first argument, often the only one."""
        return self.args[0].node

    def count(self, axes: Iterable[int]) -> int:
        """How many positions it has along some of its axes together."""
        return math.prod(self.axes[k].size for k in axes)

    @property
    def sources(self) -> Sequence[Node]:
        """What its moments are made from: its arguments; of a tree of elementwise functions, its roots."""
        return [view.node for view in self.args]

    @property
    def unseen(self) -> int:
        return self.even | ~self.deps

    @property
    def table(self) -> Table:
        return self._table or evaluated(self.graph, self._computed)

    def _computed(self) -> Table:
        if self._table is None:
            self.graph.computing.append(self)
            try:
                self._table = second_moments(self)
            finally:
                self.graph.computing.pop()
        return self._table

    @cached_property
    def frame_types(self) -> tuple[int, ...]:
        return tuple(axis.types for axis in self.axes)


@singledispatch
def second_moments(node: Node) -> Table:
    """The moments of a kind of node from those of its arguments: what `Node.table` works out when it is first asked for."""
    raise NotImplementedError(type(node).__name__)


@singledispatch
def pullback(node: Node, cotangent: np.ndarray, notes: BackwardNotes) -> Flows:
    """Second moments, by type, of the cotangents of a node's arguments, given those of its own; None where none passes."""
    raise NotImplementedError(type(node).__name__)


@singledispatch
def cross_by_kind(node: Node, a: View, b: View, frame: Axes) -> np.ndarray | None:
    """E[a_i b_j] by type over a frame, broadcastable to it, of a view `a` of this node; None where its kind has no law."""
    return None


N = TypeVar("N", bound=Node)


class Rebuilt(NamedTuple):
    """A node made from the roots of another, whose cotangents are the other's, too."""

    node: Node
    back: Pullback
    doubt: float


class Graph:
    """The nodes of one prediction, with the bits of leaves of which either sign is as likely and of the model's inputs."""

    def __init__(self) -> None:
        self.nodes: dict[Hashable, Node] = {}
        self.leaves = self.symmetric = self.inputs = self.nested = 0
        self.computing: list[Marked] = []
        self.store: dict[Any, dict[Any, Any]] = {}
        self.derived: dict[int, list[Rebuilt]] = {}
        self.origin: Any = None  # the equation that is being interpreted
        self.undrawn = (
            False  # a region that was asked for cannot be drawn: moments are kept, with their doubts
        )

    def derive(self, source: Node, node: Node, back: Pullback, doubt: float = 0.0) -> Node:
        """Note that `node` was rebuilt from the roots of `source`: its cotangents are the source's too, with some doubt."""
        known = self.derived.setdefault(source.id, [])
        if node is not source and all(other is not node for other, *_ in known):
            known.append(Rebuilt(node, back, doubt))
        return node

    def make(self, kind: type[N], axes: Axes, args: Sequence[View] = (), params: Hashable = ()) -> N:
        """The node of this kind, arguments and parameters; the same one if it exists already."""
        key = kind, args, params, axes = (kind, tuple(args), params, tuple(axes))
        node = self.nodes.get(key)
        if node is None:
            node = self.nodes[key] = kind(self, len(self.nodes), axes, args, params)
            node.origin = self.origin
        return node  # pyright: ignore[reportReturnType]

    def close(self) -> None:
        """Let go of the nodes, which hold it in turn: they are freed at once, and no collection has to look for them."""
        vars(self).clear()

    def flag(self, how: str, doubt: float) -> None:
        """Mark the node or pair that is being computed: it rests on `how`, with this relative error at most."""
        if self.computing:
            self.computing[-1].mark(how, doubt)


_NUMBERS: Fact[Hashable, np.ndarray] = Fact()  # of known arrays, by digest


class Constant(Node):
    """One number everywhere."""

    params: float
    is_literal = True

    def prepare(self) -> None:
        self.positive = self.params >= 0


@second_moments.register
def second_moments_of_constant(node: Constant) -> Table:
    return independent(node.params, node.params * node.params, ())


class Leaf(Node):
    """A random array with known moments: a weight, an input, random bits; `params` is its name, first its kind."""

    def prepare(self) -> None:
        self.kind = self.params[0]
        self.is_input, self.is_bits = self.kind == "input", self.kind == "bits"

    def settle(
        self,
        table: Table,
        *,
        odd: bool,
        kurtosis: float = 3.0,
        transport: np.ndarray | None = None,
        random: bool = True,
    ) -> Leaf:
        """Give the leaf its law: E[w⁴] / E[w²]², its quantile function on the normal grid where it is not Gaussian.

        `odd`: it is independent of everything else with mean zero; `random`: it varies between initializations.
        """
        if self._table is None:
            self._table = table
            self.graph.leaves += 1
            self.deps = 1 << self.graph.leaves
            self.odd = self.deps if odd else 0
            self.graph.inputs |= self.deps if self.is_input else 0
            if odd and (transport is None or np.allclose(transport, -transport[..., ::-1])):
                self.graph.symmetric |= self.deps
            self.kurtosis, self.transport, self.is_drawn = kurtosis, transport, random and not self.is_input
        return self


class Array(Node):
    """Known numbers `values` over its axes; `params` is their digest. Its table pools them by class."""

    is_literal = True

    def prepare(self) -> None:
        self.values = _NUMBERS.of(self.graph)[self.params]
        self.positive = bool(self.values.size and np.min(self.values) >= 0)
        self.near = 1.0

    def over(self, axes: Axes) -> Array:
        """The same numbers, over axes with other classes."""
        return self.graph.make(Array, axes, (), self.params)


def number(graph: Graph, value: float) -> Node:
    """The constant node of a number."""
    return graph.make(Constant, (), (), float(value))


def array(graph: Graph, values: np.ndarray, axes: Axes | None = None) -> Node:
    """The node of known numbers, its axes of size 1 already dropped; a constant if they are all equal."""
    if values.size == 1 or (values.size and (values == values.flat[0]).all()):
        return number(graph, float(values.flat[0]))
    values = np.ascontiguousarray(values)
    key = (hashlib.sha1(values.tobytes()).hexdigest(), values.shape, str(values.dtype))
    _NUMBERS.put(graph, key, values)
    return graph.make(Array, tuple(axes or (Axis(n) for n in values.shape)), (), key)


def leaf(
    graph: Graph, name: Hashable, axes: Axes, mean: float, second_moment: float, *, odd: bool, **law: Any
) -> Leaf:
    """A leaf with independent entries."""
    node = graph.make(Leaf, axes, (), name)
    return node.settle(independent(mean, second_moment, tuple(axes)), odd=odd and mean == 0, **law)
