"""Hash-consed lazy nodes: a model's tensors as random arrays that know what they depend on, and their moments when asked.

A node is an array over its axes; an argument of a node is a VIEW, a node and the place in the frame of each of its axes
(`bind`), so transposes, broadcasts and reshapes are no nodes at all. Two computations of the same thing are the same node.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from varscale.theory.axes import Axis, affordable, contract_axis, factor_classes, merge_types, split_axis
from varscale.theory.moments import Table, constant, estimate, independent, lift, put_together

if TYPE_CHECKING:
    from varscale.theory.spread import Spread

Pullback = Callable[[np.ndarray], np.ndarray]
_STRIDE = 16  # nodes, each of which may take a dozen calls
HOWS = ("exact", "quadrature", "sampled", "assumed")
UNKNOWN = 9.0  # doubt of what may be many times as large


class View(NamedTuple):
    """A node read over a frame: axis k of the node is axis bind[k] of the frame."""

    node: Node
    bind: tuple[int, ...]

    def within(self, outer: Sequence[int]) -> View:
        """The same view, its frame's axes being placed at `outer` in a wider frame."""
        return View(self.node, tuple(map(outer.__getitem__, self.bind)))

    def second(self, frame: Sequence[Axis]) -> np.ndarray:
        table = self.node.table
        return lift(table.second, self.node.axes, self.bind, frame, pairs=True)

    def mean(self, frame: Sequence[Axis]) -> np.ndarray:
        return lift(self.node.table.mean, self.node.axes, self.bind, frame, pairs=False)


class Marked:
    """What is worked out once: the worst way in which a step was taken, and how far off that may make it."""

    flagged: str | None = None
    doubt: float = 0.0


class Node(Marked):
    """One random array.

    A kind of node says how its moments follow from its arguments' (`compute`), and may say how a cotangent passes back
    (`pullback`). Which arguments' fluctuations between initializations it hands on is said in `spread.py`.

    Attributes:
        axes: its axes, each of size 2 or more.
        args: views of its arguments over its own frame (for a contraction: over a wider one).
        params: what else identifies it.
        deps: bits of the random leaves it depends on.
        odd: bits of the zero-mean leaves it is linear in: a product with anything free of one of them has mean zero.
        positive: whether it cannot be negative.
        shares: whether it is shares that add up to 1, positive but no norm's scale.
        gradient_doubt: relative error that its pullback may add.
        drawn: its values on the normal grid, where it was drawn and is not to be taken for Gaussian.
    """

    how: ClassVar[str] = "exact"
    shares: ClassVar[bool] = False
    gradient_doubt: float = 0.0
    drawn: np.ndarray | None = None

    def __init__(self, graph: Graph, id_: int, axes: tuple[Axis, ...], args: tuple[View, ...], params: Any):
        self.graph, self.id, self.axes, self.args, self.params = graph, id_, axes, args, params
        self.deps = 0
        for view in args:
            self.deps |= view.node.deps
        self.odd = 0
        self.positive = False
        self._table: Table | None = None
        self._spread: Spread | None = None
        self.prepare()

    def prepare(self) -> None:
        """Set `odd` and `positive`."""

    def compute(self) -> Table:
        raise NotImplementedError(type(self).__name__)

    def pullback(self, cotangent: np.ndarray) -> list[np.ndarray | None]:
        """Second moments, by type, of the cotangents of the arguments, given those of this node's."""
        raise NotImplementedError(type(self).__name__)

    def draws(self) -> np.ndarray | None:
        """Where it is known by draws, and so with an order in time: those, (replicates, positions evenly spread...)."""
        return None

    @property
    def table(self) -> Table:
        if self._table is None:
            if not self.graph.computing:
                for node in far_below(self, lambda n: n._table is not None):
                    _ = node.table
            self.graph.computing.append(self)
            try:
                self._table = self.compute()
            finally:
                self.graph.computing.pop()
        return self._table

    @functools.cached_property
    def frame_types(self) -> tuple[int, ...]:
        return tuple(axis.types for axis in self.axes)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {[a.size for a in self.axes]}>"


def far_below(node: Node, done: Callable[[Node], bool]) -> list[Node]:
    """What a node is made from, every so many steps, from the bottom up, as far as it is not done.

    All is asked for from the top down, and Python's stack is not deep enough for a thousand layers.
    """
    chain: list[Node] = []
    while node.args:
        node = max((view.node for view in node.args), key=lambda n: n.id)
        if done(node):
            break
        chain.append(node)
    return chain[::-1][::_STRIDE] if len(chain) > _STRIDE else []


N = TypeVar("N", bound=Node)
T = TypeVar("T")


class Graph:
    """The nodes of one prediction."""

    def __init__(self) -> None:
        self.nodes: dict[Hashable, Node] = {}
        self.count = 0
        self.leaves = 0
        self.computing: list[Marked] = []
        self.pairs: dict[Hashable, Any] = {}
        self.memo: dict[Hashable, Any] = {}
        self.derived: dict[int, list[tuple[Node, Pullback]]] = {}

    def derive(self, source: Node, node: Node, back: Pullback) -> Node:
        """Note that `node` was rebuilt from the roots of `source` (a part, a mean): its cotangents are the source's too."""
        known = self.derived.setdefault(source.id, [])
        if node is not source and all(other is not node for other, _ in known):
            known.append((node, back))
        return node

    def make(self, kind: type[N], axes: Sequence[Axis], args: Sequence[View] = (), params: Hashable = ()) -> N:
        """The node of this kind, arguments and parameters; the same one if it exists already."""
        key = (kind, tuple((v.node.id, v.bind) for v in args), params, tuple(axes))
        node = self.nodes.get(key)
        if node is None:
            node = self.nodes[key] = kind(self, self.count, tuple(axes), tuple(args), params)
            self.count += 1
        return node  # pyright: ignore[reportReturnType]

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is made from known numbers, which every layer makes again."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def fresh_leaf(self) -> int:
        """The bit of a new random leaf."""
        self.leaves += 1
        return 1 << self.leaves

    def flag(self, how: str, doubt: float) -> None:
        """Mark the node or pair that is being computed: it rests on `how`, with this relative error at most."""
        for node in self.computing[-1:]:
            node.flagged = max(node.flagged or "exact", how, key=HOWS.index)
            node.doubt = max(node.doubt, doubt)


class Constant(Node):
    """One number everywhere."""

    params: float

    def prepare(self) -> None:
        self.positive = self.params >= 0

    def compute(self) -> Table:
        return constant(self.params)


class Leaf(Node):
    """A random array with known moments: a weight, an input, random bits. `params` is its name."""

    @property
    def name(self) -> tuple[Any, ...]:
        return self.params if isinstance(self.params, tuple) else (self.params,)

    @property
    def is_bits(self) -> bool:
        """Whether it is random bits, which have no gradient."""
        return self.name[0] == "bits"

    def settle(
        self, table: Table, *, odd: bool, kurtosis: float = 3.0, transport: np.ndarray | None = None, random: bool = True
    ) -> Leaf:
        """Give the leaf its law.

        Args:
            table: its moments.
            odd: whether it is independent of everything else with mean zero (a weight is, real data are not).
            kurtosis: E[w⁴] / E[w²]².
            transport: its quantile function on the normal grid, where it is not Gaussian.
            random: whether it varies between initializations.
        """
        if self._table is None:
            self._table = table
            self.deps = self.graph.fresh_leaf()
            self.odd = self.deps if odd else 0
            self.kurtosis, self.transport, self.random = kurtosis, transport, random
        return self


class Array(Node):
    """Known numbers; `params` is (digest, index into the graph's store). Its table pools them by class."""

    @property
    def values(self) -> np.ndarray:
        return self.graph.memo["array", self.params]

    def prepare(self) -> None:
        self.positive = bool(self.values.size and np.min(self.values) >= 0)

    def compute(self) -> Table:
        return estimate(self.values, self.axes)

    def table_over(self, axes: Sequence[Axis]) -> Table:
        """Its table with finer classes."""
        if tuple(axes) == self.axes:
            return self.table
        key = ("estimate", self.id, tuple(axes))
        if key not in self.graph.memo:
            self.graph.memo[key] = estimate(self.values, axes)
        return self.graph.memo[key]


class Split(Node):
    """One axis as row-major factors; `params` is (axis, sizes). Classes of the whole are theirs, if not too many."""

    def prepare(self) -> None:
        self.odd, self.positive = self.args[0].node.odd, self.args[0].node.positive

    def _factored(self) -> tuple[int, tuple[Axis, ...], np.ndarray]:
        k, sizes = self.params
        return (k, *split_axis(self.args[0].node.axes[k], sizes))

    def _finest(self) -> tuple[Axis, ...]:
        """Its axes with all classes of the whole."""
        k, factors, _ = self._factored()
        whole = self.args[0].node.axes
        return (*whole[:k], *factors, *whole[k + 1 :])

    def reindex(self, second: np.ndarray) -> np.ndarray:
        """A type array of the whole, read over the factors."""
        k, _, types = self._factored()
        return lift(np.take(second, types, axis=k), self._finest(), range(len(self.axes)), self.axes, pairs=True)

    def compute(self) -> Table:
        k, factors, _ = self._factored()
        table = self.args[0].node.table
        whole, classes = table.axes[k], factor_classes(table.axes[k], factors)
        read = classes[np.ix_(*[f.label_array for f in factors])].ravel()
        strangers = float(np.mean(read != whole.label_array))
        if strangers > 0:  # positions of other classes, which factors with few classes cannot tell apart
            squares = table.diagonal
            self.graph.flag("assumed", min(strangers * float(np.ptp(squares)) / max(table.mean_square, 1e-300), UNKNOWN))
        mean = lift(np.take(table.mean, classes, axis=k), self._finest(), range(len(self.axes)), self.axes, pairs=False)
        return Table(self.axes, mean, self.reindex(table.second))

    def pullback(self, cotangent: np.ndarray) -> list[np.ndarray | None]:
        return [put_together(cotangent, self.axes, self.args[0].node.axes, *self.params)]


class Merge(Node):
    """Adjacent axes as one, row-major; `params` is (first axis, how many)."""

    def prepare(self) -> None:
        self.odd, self.positive = self.args[0].node.odd, self.args[0].node.positive

    def reindex(self, second: np.ndarray) -> np.ndarray:
        k, count = self.params
        return merge_types(second, k, self.args[0].node.axes[k : k + count], self.axes[k])

    def compute(self) -> Table:
        k, count = self.params
        table = self.args[0].node.table
        mean = table.mean
        for axis in table.axes[k : k + count]:
            mean = contract_axis(mean, k, axis.counts / axis.size)
        return Table(self.axes, np.expand_dims(mean, k), self.reindex(table.second))

    def pullback(self, cotangent: np.ndarray) -> list[np.ndarray | None]:
        k, count = self.params
        factors = self.args[0].node.axes[k : k + count]
        _, types = split_axis(self.axes[k], tuple(f.size for f in factors))
        out = np.take(cotangent, types, axis=k)
        for i, factor in enumerate(factors):
            if factor.classes > 1:
                out = np.take(out, np.where(np.arange(factor.types) < factor.classes, 0, 1), axis=k + i)
        return [out]


def number(graph: Graph, value: float) -> Node:
    """The constant node of a number."""
    return graph.make(Constant, (), (), float(value))


def array(graph: Graph, values: np.ndarray, axes: Sequence[Axis] | None = None) -> Node:
    """The node of known numbers, its axes of size 1 already dropped; a constant if they are all equal."""
    import hashlib

    if values.size == 1 or (values.size and (values == values.flat[0]).all()):
        return number(graph, float(values.flat[0]))
    values = np.ascontiguousarray(values)
    key = (hashlib.sha1(values.tobytes()).hexdigest(), values.shape, str(values.dtype))
    graph.memo["array", key] = values
    return graph.make(Array, tuple(axes or (Axis(n) for n in values.shape)), (), key)


def leaf(
    graph: Graph, name: Hashable, axes: Sequence[Axis], mean: float, second_moment: float, *, odd: bool, **law: Any
) -> Leaf:
    """A leaf with independent entries."""
    node = graph.make(Leaf, axes, (), name)
    return node.settle(independent(mean, second_moment, tuple(axes)), odd=odd and mean == 0, **law)


# Structure that only elementwise nodes and sums let through: they register here how they are rebuilt over new arguments.
REBUILD: dict[type[Node], Callable[[Node, Sequence[Axis], Sequence[View]], Node]] = {}
# What else lets cuts of an axis through: the node, the axis and the cut, which its argument takes in its place.
INSIDE: dict[type[Node], Callable[[Node, int, Callable[[Node, int], Node]], Node]] = {}


def split(node: Node, k: int, sizes: tuple[int, ...]) -> Node:
    """`node` with axis k as row-major factors of these sizes (each ≥ 2)."""
    graph = node.graph
    factors, _ = split_axis(node.axes[k], sizes)
    axes = affordable((*node.axes[:k], *factors, *node.axes[k + 1 :]))
    if type(node) in REBUILD:
        shift = len(sizes) - 1
        args = []
        for child, bind in node.args:
            if k in bind:
                j = bind.index(k)
                child = split(child, j, sizes)
                bind = (*bind[:j], *range(k, k + shift + 1), *bind[j + 1 :])
                keep = range(j, j + shift + 1)
            else:
                keep = range(0)
            args.append(View(child, tuple(b if i in keep or b < k else b + shift for i, b in enumerate(bind))))
        rebuilt = REBUILD[type(node)](node, axes, args)
        return graph.derive(node, rebuilt, lambda g: put_together(g, rebuilt.axes, node.axes, k, sizes))
    if type(node) in INSIDE:
        inside = INSIDE[type(node)](node, k, lambda x, j: split(x, j, sizes))
        return graph.derive(node, inside, lambda g: put_together(g, inside.axes, node.axes, k, sizes))
    if isinstance(node, Merge) and node.params[0] == k:
        source = node.args[0].node
        if tuple(a.size for a in source.axes[k : k + node.params[1]]) == sizes:
            return source
    if isinstance(node, Array):
        return graph.once(("split", node.id, axes), lambda: array(graph, node.values.reshape([a.size for a in axes]), axes))
    return graph.make(Split, axes, [View(node, tuple(range(len(node.axes))))], (k, sizes))


def merge(node: Node, k: int, count: int) -> Node:
    """`node` with axes k, ..., k + count − 1 as one."""
    if count == 1:
        return node
    graph, factors = node.graph, node.axes[k : k + count]
    if isinstance(node, Split) and node.params[0] == k and tuple(a.size for a in factors) == node.params[1]:
        return node.args[0].node
    size = int(np.prod([a.size for a in factors]))
    whole = Axis(size)
    axes = (*node.axes[:k], whole, *node.axes[k + count :])
    if isinstance(node, Array):
        return graph.once(("merge", node.id, axes), lambda: array(graph, node.values.reshape([a.size for a in axes]), axes))
    return graph.make(Merge, axes, [View(node, tuple(range(len(node.axes))))], (k, count))


def permute(node: Node, order: Sequence[int]) -> Node:
    """`node` with its axes in another order, for the few rules that need a given one."""
    if tuple(order) == tuple(range(len(order))):
        return node
    inverse = tuple(int(i) for i in np.argsort(order))
    axes = tuple(node.axes[k] for k in order)
    if isinstance(node, Array):
        return node.graph.once(
            ("permute", node.id, tuple(order)), lambda: array(node.graph, node.values.transpose(order), axes)
        )
    if isinstance(node, Permute):
        source, bind = node.args[0]
        return permute(source, [bind.index(k) for k in order])
    return node.graph.make(Permute, axes, [View(node, inverse)], tuple(order))


class Permute(Node):
    """Axes in another order; `params` is the order."""

    def prepare(self) -> None:
        self.odd, self.positive = self.args[0].node.odd, self.args[0].node.positive

    def compute(self) -> Table:
        table = self.args[0].node.table
        return Table(self.axes, table.mean.transpose(self.params), table.second.transpose(self.params))

    def pullback(self, cotangent: np.ndarray) -> list[np.ndarray | None]:
        return [cotangent.transpose(np.argsort(self.params))]
