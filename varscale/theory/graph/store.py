"""What a graph knows besides its nodes, by what way it was worked out, and what goes wrong meanwhile.

FACTS are kept by key, each kind of them declared once at the top of the module that writes it. A fact is written when it is
first worked out and never changes, so what is asked before makes no difference to what is asked after. What nodes of one
backward pass tell one another is no fact: it lives as long as the pass (`BackwardNotes`).
"""

from __future__ import annotations

import dataclasses
import functools
import traceback
from collections.abc import Callable, Hashable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from varscale import _compat
from varscale.programs.scopes import opened

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class HasStore(Protocol):
    """A graph, as far as facts are concerned.

    Attributes:
        store: what is known.
        nested: how many evaluations are nested in one another on Python's stack.
    """

    store: dict[Any, dict[Any, Any]]
    nested: int


_NESTED = 24  # evaluations on Python's stack, beyond which they wait on an explicit one


class _Postponed(BaseException):
    """What is being worked out has to wait until something else is known."""

    def __init__(self, first: Callable[[], Any]):
        self.first = first


def evaluated(graph: HasStore, work: Callable[[], V]) -> V:
    """The result of `work`, which may ask for others in the same way, as many in one another as there are layers.

    Those nested a few deep just run. A deeper one is put off: what asked for it is given up, the one put off is worked out
    from an explicit stack, and then what asked for it starts anew, and finds it known.

    Args:
        graph: where it will be known.
        work: works it out and makes it known; it may be started several times, and so must be a function of what is known.
    """
    if graph.nested >= _NESTED:
        raise _Postponed(work)
    if graph.nested:
        graph.nested += 1
        try:
            return work()
        finally:
            graph.nested -= 1
    waiting: list[Callable[[], Any]] = [work]
    graph.nested = 1
    try:
        while True:
            try:
                result = waiting[-1]()
                waiting.pop()
                if not waiting:
                    return result
            except _Postponed as postponed:
                waiting.append(postponed.first)
    finally:
        graph.nested = 0


class Fact(Generic[K, V]):
    """One kind of fact, by key.

    >>> class Graph:
    ...     def __init__(self):
    ...         self.store, self.nested = {}, 0
    >>> SIZES, graph = Fact(), Graph()
    >>> SIZES.once(graph, "a", lambda: 3), SIZES.get(graph, "a"), SIZES.get(graph, "b")
    (3, 3, None)
    """

    def of(self, graph: HasStore) -> dict[K, V]:
        """All that one graph knows of this kind."""
        return graph.store[self] if self in graph.store else graph.store.setdefault(self, {})

    def get(self, graph: HasStore, key: K) -> V | None:
        """What is known, or None."""
        return self.of(graph).get(key)

    def put(self, graph: HasStore, key: K, value: V) -> V:
        """Note it."""
        self.of(graph)[key] = value
        return value

    def once(self, graph: HasStore, key: K, work: Callable[[], V]) -> V:
        """What is known, worked out if it is not."""
        known = self.of(graph)
        if key not in known:
            known[key] = work()
        return known[key]


def once_per_node(work: Callable[..., V]) -> Callable[..., V]:
    """Decorate a function of a node, and of further hashable arguments, to be worked out once for each."""
    fact = Fact[Any, V]()

    @functools.wraps(work)
    def known(node: Any, *args: Hashable) -> V:
        found, key = fact.of(node.graph), (node.id, *args)
        if key in found:
            return found[key]
        return evaluated(node.graph, lambda: fact.once(node.graph, key, lambda: work(node, *args)))

    return known


class FlowInside(NamedTuple):
    """What flows into an output of a region inside that: its second moments by type, and their relative error."""

    node: Any
    second: np.ndarray
    doubt: float


@dataclasses.dataclass
class BackwardNotes:
    """What nodes of one backward pass tell those that come later in it, which are the earlier nodes.

    Attributes:
        values: by softmax, the tokens that the values are made of which it weighs.
        gains: by product, the argument whose cotangent gains something, and what it gains by type.
        sent: by output of a region, draws of the cotangents that other regions sent it.
        regions: the outputs of regions that the pass has been through.
        inside: what flows into outputs of regions inside these.
        doubts: by node, the relative error of its pullback, where that is not its kind's `gradient_doubt`.
    """

    values: dict[int, Any] = dataclasses.field(default_factory=dict)
    gains: dict[int, tuple[int, np.ndarray]] = dataclasses.field(default_factory=dict)
    sent: dict[int, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    regions: list[Any] = dataclasses.field(default_factory=list)
    inside: list[FlowInside] = dataclasses.field(default_factory=list)
    doubts: dict[int, float] = dataclasses.field(default_factory=dict)


class PredictionError(ValueError):
    """A model that cannot be predicted; the message says why, where, and what to do.

    Attributes:
        equation: the equation that the rules do not cover; None of any other failure.
    """

    equation: Any = None


UNCOVERED = (
    NotImplementedError,
    RecursionError,
)  # what a rule raises that does not cover an equation: it may be drawn


def source(eqn: Any) -> str:
    """Where an equation was written: "model.py:12 (Block)", inside a piece the path in that."""
    path = opened(eqn)[1].removeprefix("/")
    return _compat.source_line(eqn) + (f" ({path})" if path else "")


def told(error: Exception) -> str:
    """What an error says."""
    return f"{type(error).__name__}: {error}"


def located(error: Exception, eqn: Any = None) -> PredictionError:
    """The error with the equation that it belongs to: its primitive, source line and module path.

    Moments are computed when they are asked for, which may be many equations later: then the equation is the one that made
    the innermost node which was being computed.

    Args:
        error: what was raised.
        eqn: the equation that was being interpreted; None where all were.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for name in ("self", "node"):
            node = frame.f_locals.get(name)
            if isinstance(node, Marked) and node.origin is not None:
                eqn = node.origin
    where = "" if eqn is None else f"primitive {eqn.primitive.name!r} at {source(eqn)}: "
    found = PredictionError(where + told(error))
    found.equation = eqn if isinstance(error, UNCOVERED) else None
    return found


HOWS = ("exact", "quadrature", "sampled", "assumed")  # from the best to the worst


class Marked:
    """What is worked out once, and marked while it is (`Graph.flag`).

    Attributes:
        flagged: the worst way, in the order of `HOWS`, in which a step of the working was taken; None where none was marked.
        doubt: a bound on the relative error that those steps may have made.
        origin: the equation that was being interpreted when it was made; None of what belongs to none.
    """

    flagged: str | None = None
    doubt: float = 0.0
    origin: Any = None

    def mark(self, how: str, doubt: float) -> None:
        """It rests on `how`, with this relative error at most."""
        self.flagged = max(self.flagged or "exact", how, key=HOWS.index)
        self.doubt = max(self.doubt, doubt)
