"""Structure: what changes places and sizes only. Slices, concatenations and paddings are maps on the classes of one axis."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from varscale.theory import layout
from varscale.theory.axes import MOST_CLASSES, Axis, apply_axis, labelled, pair_map, sliced
from varscale.theory.elementwise import Apply, Sum
from varscale.theory.graph import REBUILD, Array, Constant, Node, View, array, permute
from varscale.theory.interpreter import Interpreter, elementwise_or_layout, rule
from varscale.theory.layout import Atom, Value
from varscale.theory.moments import Table, lift


@rule("broadcast_in_dim")
def broadcast_in_dim(interpreter: Interpreter, eqn: Any, x: Value, *_: Value) -> Value:
    return layout.broadcast_in_dim(x, eqn.params["shape"], eqn.params["broadcast_dimensions"])


@rule("reshape", "squeeze", "expand_dims")
def reshape(interpreter: Interpreter, eqn: Any, x: Value, *_: Value) -> Value:
    if eqn.primitive.name == "squeeze":
        kept = [d for d in range(len(x.dims)) if d not in {k % len(x.dims) for k in eqn.params["dimensions"]}]
        return layout.transpose(x, kept)
    return layout.reshape(x, eqn.outvars[0].aval.shape)


@rule("transpose")
def transpose(interpreter: Interpreter, eqn: Any, x: Value) -> Value:
    return layout.transpose(x, eqn.params["permutation"])


@rule("rev")
def rev(interpreter: Interpreter, eqn: Any, x: Value) -> Value:
    """Reversal renumbers positions: the same random array unless its positions have classes."""
    for d in eqn.params["dimensions"]:
        x = take(x, d, x.shape[d] - 1, -1, -1)
    return x


class Take(Node):
    """A slice of one axis; `params` is (axis, start, stop, step). One position left drops the axis."""

    def prepare(self) -> None:
        self.odd, self.positive = self.args[0].node.odd, self.args[0].node.positive

    def compute(self) -> Table:
        k, *span = self.params
        table = self.args[0].node.table
        new, classes = sliced(table.axes[k], *span)
        mean, second = apply_axis(table.mean, k, classes), apply_axis(table.second, k, self.types_map(new, classes))
        if new is None:
            mean, second = mean.squeeze(k), second.squeeze(k)
        return Table(self.axes, mean, second)

    def types_map(self, new: Axis | None, classes: np.ndarray) -> np.ndarray:
        return pair_map(classes) if new is not None else pair_map(classes)[:1]

    def pullback(self, cotangent: np.ndarray) -> list[np.ndarray | None]:
        k, *span = self.params
        old = self.args[0].node.axes[k]
        new, classes = sliced(old, *span)
        share = np.zeros(old.classes)
        if new is None:
            share[classes[0].argmax()] = 1.0 / old.counts[classes[0].argmax()]
            matrix = np.concatenate([share, np.zeros(old.classes**2)])[:, None]
            return [apply_axis(np.expand_dims(cotangent, k), k, matrix)]
        counts = np.array([new.counts @ classes[:, c] for c in range(old.classes)])
        back = (classes * new.counts[:, None]).T / np.maximum(old.counts, 1e-300)[:, None]
        del counts
        return [apply_axis(cotangent, k, _spread_map(back, new, old))]

    def cross_with(self, a: View, b: View, frame: Sequence[Axis]) -> np.ndarray | None:
        """Two slices of things over one axis: positions that differ always differ; those that agree are their shift apart."""
        from varscale.theory.cross import cross

        other = b.node
        if not isinstance(other, Take) or other.params[0] != self.params[0] or a.bind != b.bind:
            return None
        k, *span = self.params
        x, y = a.node.args[0].node, other.args[0].node
        if x.axes != y.axes:
            return None
        identity = tuple(range(len(x.axes)))
        table = np.broadcast_to(cross(View(x, identity), View(y, identity), x.axes), [ax.types for ax in x.axes])
        old = x.axes[k]
        i = old.label_array[slice(*_slice(span))]
        j = old.label_array[slice(*_slice(other.params[1:]))]
        if len(i) != len(j):
            return None
        same_place = span == list(other.params[1:])
        c = old.classes
        if len(i) == 1:
            row = np.zeros((1, old.types))
            row[0, i[0] if same_place else c + i[0] * c + j[0]] = 1
            return lift(apply_axis(table, k, row).squeeze(k), self.axes, a.bind, frame, pairs=True)
        new = self.axes[k]
        matrix = np.zeros((new.types, old.types))
        labels = new.label_array
        np.add.at(matrix, (labels, i if same_place else c + i * c + j), 1.0)
        share_i, share_j = (np.zeros((new.classes, c)) for _ in range(2))
        np.add.at(share_i, (labels, i), 1.0)
        np.add.at(share_j, (labels, j), 1.0)
        matrix[new.classes :, c:] = np.einsum("ac,bd->abcd", share_i, share_j).reshape(new.classes**2, c * c)
        matrix /= np.maximum(matrix.sum(axis=1, keepdims=True), 1e-300)
        return lift(apply_axis(table, k, matrix), self.axes, a.bind, frame, pairs=True)


def _slice(span: Sequence[int]) -> tuple[int, int | None, int]:
    start, stop, step = span
    return start, (None if step < 0 and stop < 0 else stop), step


def _spread_map(back: np.ndarray, new: Axis, old: Axis) -> np.ndarray:
    """How cotangents of a part read over the whole, zero elsewhere: by the share of pairs of each type that lie in the part."""
    out = np.zeros((old.types, new.types))
    out[: old.classes, : new.classes] = back
    pairs = np.einsum("ac,bd->abcd", back * old.counts[:, None], back * old.counts[:, None])
    for a in range(old.classes):
        for c in range(new.classes):  # ordered pairs of one class leave out the diagonal
            pairs[a, a, c, c] *= max(1 - 1 / max(new.counts[c], 1), 0.0)
    total = old.pairs[old.classes :].reshape(old.classes, old.classes, 1, 1)
    out[old.classes :, new.classes :] = (pairs / np.maximum(total, 1.0)).reshape(old.classes**2, new.classes**2)
    return out


def take(x: Value, d: int, start: int, stop: int, step: int) -> Value:
    """x[start:stop:step] along dimension d (stop = −1 with a negative step means to the beginning)."""
    n = x.shape[d]
    positions = range(n)[slice(*_slice((start, stop, step)))]
    if len(positions) == n and step == 1:
        return x
    if not positions:
        return layout.full(x.node.graph, 0.0, [0 if k == d else m for k, m in enumerate(x.shape)])
    dim = x.dims[d]
    # A slice along the leading factor of a product, or of blocks of it, is a slice of that factor.
    if len(dim) > 1 and step == 1 and dim:
        inner = math.prod(a.size for a in dim[1:])
        if start % inner == 0 and stop % inner == 0:
            a, b = start // inner, stop // inner
            lead = take(Value(x.node, (*x.dims[:d], dim[:1], dim[1:], *x.dims[d + 1 :])), d, a, b, 1)
            return Value(lead.node, (*lead.dims[:d], (*lead.dims[d], *lead.dims[d + 1]), *lead.dims[d + 2 :]))
    x = layout.merged(x, d)
    (atom,) = x.dims[d] or (Atom(1, None),)
    if atom.axis is None:
        new: tuple[Atom, ...] = (Atom(len(positions), None),) if len(positions) > 1 else ()
        return Value(x.node, (*x.dims[:d], new, *x.dims[d + 1 :]))
    node = take_node(x.node, atom.axis, start, stop, step)
    return _resized(x, node, d, atom.axis, len(positions))


def _resized(x: Value, node: Node, d: int, k: int, size: int) -> Value:
    """`x` over `node`, in which axis k (dimension d) has another size; an axis of size 1 is gone."""
    if isinstance(node, Constant):
        dims = [tuple(Atom(a.size, None) for a in dim) for dim in x.dims]
        dims[d] = (Atom(size, None),) if size > 1 else ()
        return Value(node, tuple(dims))
    gone = size == 1
    dims = [tuple(a if a.axis is None or a.axis < k or not gone else Atom(a.size, a.axis - 1) for a in dim) for dim in x.dims]
    dims[d] = () if gone else (Atom(size, k),)
    return Value(node, tuple(dims))


def take_node(node: Node, k: int, start: int, stop: int, step: int) -> Node:
    """A slice of axis k, pushed through elementwise nodes to their roots."""
    graph, old = node.graph, node.axes[k]
    new, _ = sliced(old, *_slice((start, stop, step)))
    axes = (*node.axes[:k], *([new] if new is not None else []), *node.axes[k + 1 :])
    if isinstance(node, Array):
        index = [slice(None)] * len(node.axes)
        index[k] = slice(*_slice((start, stop, step)))
        numbers = node.values[tuple(index)]
        return array(graph, numbers.squeeze(k) if new is None else numbers, axes)
    if new is not None and new.size == old.size and old.labels is None:
        return node  # a permutation of interchangeable positions
    if type(node) in REBUILD and isinstance(node, Apply | Sum):
        args = []
        for child, bind in node.args:
            if k in bind:
                j = bind.index(k)
                child = take_node(child, j, start, stop, step)
                if new is None and not isinstance(child, Constant):
                    bind = (*bind[:j], *bind[j + 1 :])
                bind = () if isinstance(child, Constant) else bind
            args.append(View(child, tuple(b - (new is None and b > k) for b in bind)))
        return REBUILD[type(node)](node, axes, args)
    if isinstance(node, Concat) and step == 1 and node.params[0] == k:
        edges = np.cumsum([0, *node.params[1]])
        for i, view in enumerate(node.args):
            if edges[i] <= start and stop <= edges[i + 1]:
                child, bind = view
                if len(bind) == len(node.axes) or (len(bind) == len(axes) and k not in bind):
                    part = permute(child, [int(m) for m in np.argsort(bind)])
                    whole = k not in bind or stop - start == node.params[1][i]
                    return part if whole else take_node(part, k, start - int(edges[i]), stop - int(edges[i]), 1)
    return graph.make(Take, axes, [View(node, tuple(range(len(node.axes))))], (k, *_slice((start, stop, step))))


@rule("slice")
def slice_(interpreter: Interpreter, eqn: Any, x: Value) -> Value:
    p = eqn.params
    strides = p["strides"] or (1,) * len(x.dims)
    for d, (start, stop, step) in enumerate(zip(p["start_indices"], p["limit_indices"], strides, strict=True)):
        x = take(x, d, start, stop, step)
    return x


@rule("split")
def split(interpreter: Interpreter, eqn: Any, x: Value) -> list[Value]:
    edges = np.cumsum([0, *eqn.params["sizes"]])
    return [take(x, eqn.params["axis"], int(a), int(b), 1) for a, b in itertools.pairwise(edges)]


@rule("dynamic_slice")
def dynamic_slice(interpreter: Interpreter, eqn: Any, x: Value, *starts: Value) -> Value:
    """A start that is known is a slice; a random one picks positions that are as good as any."""
    for d, size in enumerate(eqn.params["slice_sizes"]):
        known = interpreter.concrete(starts[d]) if d < len(starts) else np.zeros(())
        start = 0 if known is None else int(np.clip(known, 0, x.shape[d] - size))
        x = take(x, d, start, start + size, 1)
    return x


class Concat(Node):
    """Arrays one after another along an axis, each part a class; `params` is (axis, sizes)."""

    def prepare(self) -> None:
        odd = -1
        for view in self.args:
            odd &= view.node.odd if not (isinstance(view.node, Constant) and view.node.params == 0) else -1
        self.odd = max(odd, 0)
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

    def compute(self) -> Table:
        from varscale.theory.cross import cross

        k, sizes = self.params
        whole = self.axes[k]
        mean = np.zeros([a.classes for a in self.axes])
        second = np.zeros([a.types for a in self.axes])
        parts = self.parts()
        for i, (view, frame, shares) in enumerate(parts):
            own = np.broadcast_to(view.mean(frame), [a.classes for a in frame])
            mean += apply_axis(own, k, shares)
            for j, (other, _, theirs) in enumerate(parts):
                if i == j:
                    table = np.broadcast_to(view.second(frame), [a.types for a in frame])
                    matrix = np.zeros((whole.types, frame[k].types))
                    matrix[: whole.classes, : frame[k].classes] = shares
                    # Of the pairs within a class of the whole, those within this part: n(n − 1) of N(N − 1).
                    matrix[whole.classes :, frame[k].classes :] = _pair_shares(
                        shares, shares, whole, frame[k].counts if sizes[i] > 1 else np.ones(1)
                    )
                    second += apply_axis(table, k, matrix)
                else:
                    table = self._between(view, other, parts[i][1], parts[j][1], cross)
                    matrix = _pair_shares(shares, theirs, whole, None)
                    second[(slice(None),) * k + (slice(whole.classes, None),)] += apply_axis(table, k, matrix)
        return Table(self.axes, mean, second)

    def _between(self, a: View, b: View, fa: tuple[Axis, ...], fb: tuple[Axis, ...], cross: Any) -> np.ndarray:
        """E[a_i b_j] over types of the other axes and class pairs of the two parts along this one."""
        k = self.params[0]
        ca, cb = fa[k].classes, fb[k].classes
        rest = [ax.types for ax in self.axes]
        if fa[k] == fb[k]:
            table = np.broadcast_to(cross(a, b, fa), [*rest[:k], fa[k].types, *rest[k + 1 :]])
            return np.take(table, range(ca, fa[k].types), axis=k)
        # Parts of different sizes: their positions never agree, so the product of class means on this axis and types elsewhere.
        frame = (*self.axes[:k], *self.axes[k + 1 :], fa[k], fb[k])
        last = len(frame) - 2
        place = lambda view, at: View(view.node, tuple(at if b == k else b - (b > k) for b in view.bind))  # noqa: E731
        table = np.broadcast_to(cross(place(a, last), place(b, last + 1), frame), [ax.types for ax in frame])
        table = table[..., fa[k].classes :, :].reshape(*table.shape[:-2], ca, ca, table.shape[-1])[..., :, 0, :]
        table = table[..., fb[k].classes :].reshape(*table.shape[:-1], cb, cb)[..., 0, :]
        return np.moveaxis(table.reshape(*table.shape[:-2], ca * cb), -1, k)

    def pullback(self, cotangent: np.ndarray) -> list[np.ndarray | None]:
        from varscale.theory.backward import sum_out

        out: list[np.ndarray | None] = []
        k, sizes = self.params
        whole = self.axes[k]
        for (view, frame, shares), n in zip(self.parts(), sizes, strict=True):
            if isinstance(view.node, Constant):
                out.append(None)
                continue
            axis = frame[k]
            back = (shares * whole.counts[:, None]).T
            back /= np.maximum(back.sum(axis=1, keepdims=True), 1e-300)
            part = apply_axis(cotangent, k, pair_map(back))
            if n == 1:
                part = np.take(part, [0], axis=k).squeeze(k)
                rest = (*frame[:k], *frame[k + 1 :])
                out.append(sum_out(part, rest, View(view.node, tuple(b - (b > k) for b in view.bind))))
            else:
                out.append(sum_out(part, (*frame[:k], axis, *frame[k + 1 :]), view))
        return out


def _pair_shares(a: np.ndarray, b: np.ndarray, whole: Axis, own: np.ndarray | None) -> np.ndarray:
    """Share of the pairs of each (class, class) of the whole that a part's (class, class) makes up, (C², ca·cb)."""
    counts = whole.counts
    pairs = np.einsum("ac,bd->abcd", a * counts[:, None], b * counts[:, None])
    if own is not None:
        for c in range(a.shape[1]):
            for x in range(whole.classes):
                n = a[x, c] * counts[x]
                pairs[x, x, c, c] = n * max(n - 1, 0.0)
    total = whole.pairs[whole.classes :].reshape(whole.classes, whole.classes, 1, 1)
    return (pairs / np.maximum(total, 1.0)).reshape(whole.classes**2, -1)


def concatenate(graph: Any, xs: Sequence[Value], d: int, classes: bool = True) -> Value:
    """Values one after another along dimension d."""
    xs = [layout.merged(x, d) for x in xs]
    sizes = [x.shape[d] for x in xs]
    # The other dimensions must be factored alike: align them with this one taken out of the way.
    rest = [Value(x.node, (*x.dims[:d], (), *x.dims[d + 1 :], x.dims[d])) for x in xs]
    pieces: list[Value] = []
    for x in rest:
        pieces.append(Value(x.node, x.dims[:-1] + tuple(x.dims[-1] if y is x else () for y in rest)))
    pieces, frame, views, dims = layout.align(pieces)
    own = [next((atom.axis for atom in dims[len(xs[0].dims) + i]), None) for i in range(len(xs))]
    others = [k for k in range(len(frame)) if k not in own]
    place = {k: i + 1 for i, k in enumerate(others)}
    labels: list[int] = []
    offset = 0
    for k, n in zip(own, sizes, strict=True):
        axis = frame[k] if k is not None else None
        part = axis.label_array if axis is not None else np.zeros(n, int)
        labels += [offset + int(c) for c in part]
        offset += int(max(part)) + 1
    whole = labelled(labels)
    if whole.classes > 2 * MOST_CLASSES or not classes:
        whole = Axis(sum(sizes))
    binds = [View(v.node, tuple(0 if b == own[i] else place[b] for b in v.bind)) for i, v in enumerate(views)]
    node = graph.make(Concat, (whole, *(frame[k] for k in others)), binds, (0, tuple(sizes)))
    out = [tuple(a if a.axis is None else Atom(a.size, place[a.axis]) for a in dim) for dim in dims[: len(xs[0].dims)]]
    out[d] = (Atom(sum(sizes), 0),)
    for j in range(len(out)):  # a dimension along which every part is constant
        if not out[j] and xs[0].shape[j] > 1:
            out[j] = (Atom(xs[0].shape[j], None),)
    return Value(node, tuple(out))


@rule("concatenate")
def concatenate_rule(interpreter: Interpreter, eqn: Any, *xs: Value) -> Value:
    live = [x for x in xs if x.shape[eqn.params["dimension"]] > 0]
    return live[0] if len(live) == 1 else concatenate(interpreter.graph, live, eqn.params["dimension"])


@rule("pad")
def pad(interpreter: Interpreter, eqn: Any, x: Value, fill: Value) -> Value:
    """A concatenation with the fill; negative padding cuts; dilation interleaves, counted as one class."""
    for d, (low, high, inner) in enumerate(eqn.params["padding_config"]):
        n = x.shape[d]
        if inner and n > 1:
            added = (n - 1) * inner
            side = layout.full(interpreter.graph, fill.constant or 0.0, [added if k == d else m for k, m in enumerate(x.shape)])
            x = concatenate(interpreter.graph, [x, side], d, classes=False)
            n += added
        x = take(x, d, max(-low, 0), n - max(-high, 0), 1)
        parts = []
        for size in (max(low, 0), max(high, 0)):
            shape = [size if k == d else m for k, m in enumerate(x.shape)]
            parts.append(layout.broadcast_in_dim(fill, shape, ()) if size else None)
        parts = [p for p in (parts[0], x, parts[1]) if p is not None and p.shape[d] > 0]
        x = parts[0] if len(parts) == 1 else concatenate(interpreter.graph, parts, d)
    return x


@rule("iota")
def iota(interpreter: Interpreter, eqn: Any, *_: Value) -> Value:
    p = eqn.params
    numbers = interpreter.known(np.arange(p["shape"][p["dimension"]]))
    return layout.broadcast_in_dim(numbers, p["shape"], (p["dimension"],))


elementwise_or_layout("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "slice", "split", "iota", "rev")
