"""Linear nodes: contractions, one of whose arguments is often weights; slices, concatenations and maps of one axis; lookups."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Hashable
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from varscale.theory.domain.axes import Axis, contract_axis
from varscale.theory.domain.axis_maps import AxisMap
from varscale.theory.domain.tables import full_types
from varscale.theory.graph.nodes import Constant, Leaf, Node, View
from varscale.theory.graph.reshapes import unmoved
from varscale.theory.graph.store import Fact


class Contract(Node):
    """Σ x·y over the last `len(params)` axes of a frame; `params` is those axes (the frame is this node's axes and them).

    For independent x and y second moments are exact: over the types t of the pairs of contracted indices (agreeing or not),

        E[(Σ_a x_ia y_aj) (Σ_b x_i'b y_bj')] = Σ_t (pairs of type t) M_x(i i', t) M_y(t, j j').

    As a sum over many terms it is taken for Gaussian.
    """

    def prepare(self) -> None:
        x, y = (v.node for v in self.args)
        own = weight_of(self)
        # A weight that was applied before is as good as fresh: what its earlier uses leave behind is of order
        # 1/width.
        self.odd = (x.odd & y.unseen) | (y.odd & x.unseen) | (own.odd if own else 0)
        self.positive = x.positive and y.positive

    @property
    def frame(self) -> tuple[Axis, ...]:
        """What its arguments are read over: its own axes, then the contracted ones."""
        return (*self.axes, *self.params)

    @property
    def width(self) -> int:
        """Terms in a sum."""
        return math.prod(a.size for a in self.params)

    def contract(self, second: np.ndarray) -> np.ndarray:
        """Sum a type array of the frame over the contracted axes."""
        frame = self.frame
        second = full_types(second, frame)
        for k in reversed(range(len(self.axes), len(frame))):
            second = contract_axis(second, k, frame[k].pairs)
        return second


def weight_of(node: Node) -> Leaf | None:
    """The random weight that a linear node applies, if it applies one; looking up, adding up and cutting are linear too."""
    while len(node.args) >= 1 and (node.moves or node.collects):
        node = node.args[0].node
    if node.width is None:
        return None
    for source in (unmoved(view.node) for view in node.args):
        if isinstance(source, Leaf) and source.odd and not source.is_input:
            return source
    return None


def feeds_itself(*factors: View) -> bool:
    """Whether one of two factors is what weights make of the other: of x (w·x), whose scale is one for all features."""
    for (x, _), (y, _) in (factors, factors[::-1]):
        seen: set[Node] = set()
        reached = [y] if x.deps and weight_of(y) is not None else []
        for node in reached:  # grows: each node once
            if node is x:
                return True
            reached += {v.node: None for v in node.args if v.node.depth >= x.depth and v.node not in seen}
            seen.update(v.node for v in node.args)
    return False


def applies_weights(node: Node) -> TypeGuard[Contract]:
    return isinstance(node, Contract) and weight_of(node) is not None


def operands(node: Contract) -> tuple[View, View]:
    """The weights of a product, and what they multiply."""
    x, y = node.args
    return (x, y) if weight_of(node) is unmoved(x.node) else (y, x)


class Take(Node):
    """A slice of one axis; `params` is (axis, start, stop, step). One position left drops the axis."""

    moves = True

    def prepare(self) -> None:
        self.odd, self.positive = self.args[0].node.odd, self.args[0].node.positive


class Concat(Node):
    """Arrays one after another along an axis, each part a class; `params` is (axis, sizes)."""

    def prepare(self) -> None:
        parts = [v.node for v in self.args if not (isinstance(v.node, Constant) and v.node.params == 0)]
        self.odd = max(functools.reduce(lambda bits, node: bits & node.odd, parts, -1), 0)
        self.positive = all(v.node.positive for v in self.args)

    def parts(self) -> list[tuple[View, tuple[Axis, ...], np.ndarray]]:
        """Each argument, its frame, and the share of each class of the whole that its classes take (whole, own)."""
        k, sizes = self.params
        out, start = [], 0
        whole = self.axes[k]
        for view, n in zip(self.args, sizes, strict=True):
            own = next((view.node.axes[j] for j, b in enumerate(view.bind) if b == k), None)
            axis = own or Axis(max(n, 2))
            shares = np.zeros((whole.classes, axis.classes))
            np.add.at(shares, (whole.label_array[start : start + n], axis.label_array[:n]), 1.0)
            out.append((view, (*self.axes[:k], axis, *self.axes[k + 1 :]), shares / whole.counts[:, None]))
            start += n
        return out


_MAPS: Fact[Hashable, AxisMap] = Fact()  # by a digest of the entries, and the axes


class AxisMapped(Node):
    """y_p = Σ_i A_pi x_i along one axis; `params` is (axis, key of the map)."""

    @property
    def axis_map(self) -> AxisMap:
        """A."""
        return _MAPS.of(self.graph)[self.params[1]]

    def prepare(self) -> None:
        x = self.args[0].node
        self.odd, self.positive = x.odd, x.positive and bool(np.all(self.axis_map.weights >= 0))


def mapped(node: Node, k: int, axis_map: AxisMap) -> AxisMapped:
    """A map of axis k of a node.

    Args:
        node: x.
        k: which of its axes the map is of, `axis_map.inner`.
        axis_map: A; its `out` is the axis of y, of size 2 or more.
    """
    entries = [np.ascontiguousarray(x) for x in (axis_map.rows, axis_map.columns, axis_map.weights)]
    digest = hashlib.sha1(b"".join(x.tobytes() for x in entries)).hexdigest()
    key = (digest, axis_map.out, axis_map.inner)
    _MAPS.put(node.graph, key, axis_map)
    axes = (*node.axes[:k], axis_map.out, *node.axes[k + 1 :])
    return node.graph.make(AxisMapped, axes, [View(node, tuple(range(len(axes))))], (k, key))


INDICES: Fact[Any, np.ndarray] = Fact()  # known indices by digest


class GatherParams(NamedTuple):
    """What is looked up where.

    Attributes:
        row_axes: the axes of the table along which rows are.
        index_axes: the axes of the output that are the indices'.
        rates: P(same row) over the types of the indices, flat; None: rows are as likely as one another.
        rows: how many rows there are.
        ids: the indices: the key of known ones in the store, or the node of unknown ones.
    """

    row_axes: tuple[int, ...]
    index_axes: tuple[int, ...]
    rates: Any
    rows: Any
    ids: Any


class Gather(Node):
    """Rows of a table by index; the frame of its view is this node's axes and then the rows' own."""

    params: GatherParams
    collects = True

    def prepare(self) -> None:
        """What indices are computed from decides, too: the nearest row is no row like others, and may turn with the table."""
        self.odd, self.positive = self.args[0].node.odd, self.args[0].node.positive
        picker = self.params.ids
        if isinstance(picker, Node):
            self.deps |= picker.deps
            self.odd &= picker.unseen
            self.even &= picker.unseen

    @property
    def known(self) -> np.ndarray | None:
        """The indices, flat, where they are known."""
        return INDICES.get(self.graph, self.params.ids)

    @property
    def line(self) -> np.ndarray | None:
        """The known indices where they run over one axis and pick along one."""
        return self.known if len(self.params.row_axes) == len(self.params.index_axes) == 1 else None

    @property
    def indexed(self) -> list[Axis]:
        """The axes of the indices."""
        return [self.axes[k] for k in self.params.index_axes]

    def rates(self) -> np.ndarray:
        """P(same row) over the types of the indices."""
        rates, rows = self.params.rates, self.params.rows
        if rates is not None:
            return np.array(rates).reshape([axis.types for axis in self.indexed])
        same = functools.reduce(np.logical_and.outer, [axis.agrees for axis in self.indexed], np.array(True))
        return np.where(same, 1.0, 1.0 / rows)
