"""Elementwise nodes: chains of primitives on their ROOTS (everything that is not elementwise), built in a normal form.

A whole chain (GELU is eight equations) is one function of its roots, evaluated on their quadrature nodes by the
primitives themselves; no table of activations is needed, and no intermediate step is taken for Gaussian.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cached_property, reduce
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from varscale.theory.domain.axes import Axes, Axis
from varscale.theory.graph.nodes import Constant, Leaf, Node, View, number
from varscale.theory.graph.store import Fact, once_per_node
from varscale.theory.integrals.primitives import POSITIVE

T = TypeVar("T")

# Forward; backward nothing passes the first, and what a custom rule says the second; rows are told apart.
IDENTITIES = ("stop_gradient", "own_gradient", "row")


class Apply(Node):
    """One elementwise primitive; `params` is (name, static parameters)."""

    how = "quadrature"
    entrywise = True

    @property
    def sources(self) -> Sequence[Node]:
        return [view.node for view in roots(self)]

    def prepare(self) -> None:
        (name, extra), nodes = self.params, [view.node for view in self.args]
        self.primitive, x, y, symmetric = name, nodes[0], nodes[-1], self.graph.symmetric
        self.is_square = self.params == ("integer_pow", (2,))
        match name:
            case "mul" | "div":
                self.odd = (x.odd & y.unseen) | (y.odd & x.unseen if name == "mul" else 0)
                self.even |= x.odd & y.odd & symmetric
                self.positive = x.positive and y.positive
            case "affine" | "stop_gradient" | "own_gradient" | "row":
                c, d = extra or (1.0, 0.0)
                self.odd, self.positive = x.odd * (d == 0), x.positive and c >= 0 and d >= 0
            case "abs" | "integer_pow" if name == "abs" or extra[0] % 2 == 0:
                self.even |= x.odd & symmetric
                self.positive = True
            case "add" | "min" | "select_n" | "integer_pow":
                self.positive = all(n.positive for n in nodes)
            case _:  # there is no root of what is negative
                self.positive = name in POSITIVE or (name == "max" and any(n.positive for n in nodes))


class Sum(Node):
    """A weighted sum of arrays with different roots; `params` are the weights. A root itself."""

    entrywise = True

    @cached_property
    def terms(self) -> list[tuple[float, View]]:
        return list(zip(self.params, self.args, strict=True))

    def prepare(self) -> None:
        pairs = itertools.permutations(self.terms, 2)
        self.is_centred = any(
            y.node.averages and alike(c, -d) and x.node.deps == y.node.deps for (c, x), (d, y) in pairs
        )
        self.odd = reduce(lambda bits, view: bits & view.node.odd, self.args, -1)
        self.positive = all(c >= 0 and x.node.positive for c, x in self.terms)

    @cached_property
    def centring(self) -> dict[int, int]:
        """Terms that another term takes the mean of away: index of the term to index of its mean."""
        pairs = itertools.permutations(enumerate(self.terms), 2)
        return {
            i: j
            for (j, (d, mean)), (i, (c, view)) in pairs
            if alike(d, -c) and is_mean_of(mean.node, view.node)
        }


@once_per_node
def is_mean_of(mean: Node, node: Node) -> bool:
    """Whether a node is the mean of another over some axes: of a sum the sum of means."""
    if mean.averages:  # a mean less the mean over more axes is centred too
        wider = node.averages and set(node.params) < set(mean.params)
        return mean.argument is (node.argument if wider else node)
    sums = isinstance(mean, Sum) and isinstance(node, Sum) and mean.params == node.params
    return sums and all(is_mean_of(m.node, x.node) for m, x in zip(mean.args, node.args, strict=True))


def swapped(second: np.ndarray, axes: Axes) -> np.ndarray:
    """E[y_i x_j] by type (1 long where it is constant), from E[x_i y_j]."""
    for k, axis in enumerate(axes):
        c = axis.classes
        if c > 1 and second.shape[k] > 1:
            second = np.take(second, [*range(c), *(c + np.arange(c * c).reshape(c, c).T.ravel())], axis=k)
    return second


def roots_of(*views: View) -> list[View]:
    """The roots of trees over one frame, as views over that frame, each once."""
    return list(dict.fromkeys(root.within(view.bind) for view in views for root in roots(view.node)))


@once_per_node
def roots(node: Node) -> tuple[View, ...]:
    """The roots of an elementwise tree, as views over its frame; a node that is not elementwise is its own root."""
    if not isinstance(node, Apply):
        return () if isinstance(node, Constant) else (node.whole,)
    return tuple(sorted(roots_of(*node.args), key=lambda view: (view.node.id, view.bind)))


@once_per_node
def trees(node: Node) -> tuple[View, ...]:
    """An elementwise tree and those in it, as views over its frame."""
    if not isinstance(node, Apply):
        return ()
    return tuple(dict.fromkeys([node.whole, *(x.within(v.bind) for v in node.args for x in trees(v.node))]))


_FORMS: Fact[Hashable, int] = Fact()  # the number of each form


@once_per_node
def form(node: Node) -> int:
    """A number that is equal for trees which are one function of their roots, these taken in the order of `roots`."""
    own = {(r.node.id, r.bind): i for i, r in enumerate(roots(node))}
    parts: list[Hashable] = []
    for child, bind in node.args if isinstance(node, Apply) else ():
        places = tuple(own[r.node.id, r.within(bind).bind] for r in roots(child))
        parts.append(child.params if isinstance(child, Constant) else (form(child), bind, places))
    known = _FORMS.of(node.graph)
    key = (node.params if isinstance(node, Apply) else None, node.axes, tuple(parts))
    return known.setdefault(key, len(known))


def alike(c: float, d: float) -> bool:
    """Whether two factors are one, but for rounding."""
    return math.isclose(c, d, rel_tol=1e-13)


class Mean(Node):
    """The mean over some axes; `params` is those axes. Gaussian, unless what it averages is positive (then lognormal)."""

    averages = True
    follows_shifts = True

    @property
    def reduced(self) -> tuple[int, ...]:
        return self.params


class Scaled(NamedTuple):
    """An array c x + d."""

    scale: float  # 0 of a number
    shift: float
    of: View  # x


def as_affine(view: View) -> Scaled:
    """What a view is a scaled and shifted copy of, in whatever order of axes."""
    c, d = 1.0, 0.0
    while view.node.primitive == "affine":
        scale, shift = view.node.params[1]
        c, d, view = c * scale, d + c * shift, view.node.args[0].within(view.bind)
    if isinstance(view.node, Constant):
        c, d = 0.0, d + c * view.node.params
    return Scaled(c, d, view)


def weighted_sum(view: View) -> tuple[list[tuple[float, View]], float]:
    """A view as a weighted sum of views over its frame, sums of sums written out, and a number."""
    c, offset, view = as_affine(view)
    if not isinstance(view.node, Sum):
        return [(c, view)] if c else [], offset
    out: list[tuple[float, View]] = []
    for weight, child in view.node.terms:
        inner, shift = weighted_sum(child.within(view.bind))
        out += [(c * weight * d, v) for d, v in inner]
        offset += c * weight * shift
    return out, offset


@once_per_node
def content(node: Node) -> int:
    """A hash, 64 bits, of a node's kind, axes and parameters, and of its arguments' content."""
    args = [(content(child), bind) for child, bind in node.args]
    if isinstance(node, Sum):  # whose terms are in the order in which they were built
        args, params = sorted(zip(args, np.sign(node.params).tolist(), strict=True)), ()
    elif node.primitive == "affine":
        params = np.sign(node.params[1]).tolist()
    elif isinstance(node, Leaf):
        params = tuple(part for part in node.params if not isinstance(part, float))  # a scale is none of it
    else:
        params = node.params
    return hashed(type(node).__name__, node.axes, params, args)


def hashed(*parts: Any) -> int:
    """A hash, 64 bits, of numbers, text, arrays, random keys and nodes, and of containers of these."""
    return int.from_bytes(hashlib.sha1(_written(parts).encode()).digest()[:8], "big")


def _written(x: Any) -> str:
    if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = np.asarray(jax.random.key_data(x))
    match x:
        case tuple() | list() | frozenset():
            return f"({','.join(map(_written, x))})"
        case Mapping():
            return _written(sorted((str(key), _written(value)) for key, value in x.items()))
        case Node():
            return f"node {content(x)}"
        case Axis():
            return f"{x.size} {x.labels!r}"
        case np.ndarray() | jax.Array():
            return f"{x.shape} {x.dtype} {hashlib.sha1(np.ascontiguousarray(x).tobytes()).hexdigest()}"
    return getattr(x, "__qualname__", type(x).__qualname__) if callable(x) else repr(x)


def inverse(view: View) -> View:
    """The view 1/x."""
    (node, bind), graph = view, view.node.graph
    args = [number(graph, 1.0).whole, node.whole]
    return View(graph.make(Apply, node.axes, args, ("div", ())), bind)


def factors(view: View) -> tuple[float, list[View]]:
    """A tree as a number times the factors of its products."""
    node, bind = view
    if not isinstance(node, Apply):
        return (node.params, []) if isinstance(node, Constant) else (1.0, [view])
    (name, extra), args = node.params, [child.within(bind) for child in node.args]
    match name:
        case "mul":
            (c, f), (d, g) = (factors(a) for a in args)
            return c * d, f + g
        case "affine" if extra[1] == 0:
            c, f = factors(args[0])
            return c * extra[0], f
        case "stop_gradient" | "own_gradient" | "row":
            return factors(args[0])
        case "div":
            c, f = factors(args[0])
            return c, [*f, inverse(args[1])]
    return 1.0, [view]


def connected(items: Iterable[T], joined: Callable[[T, T], object]) -> list[list[T]]:
    """Items in groups, so that no two of different groups are joined."""
    groups: list[list[T]] = []
    for item in items:
        mine = [group for group in groups if any(joined(item, other) for other in group)]
        groups = [g for g in groups if g not in mine] + [[*(x for g in mine for x in g), item]]
    return groups
