"""Facts that a graph keeps beside its nodes, evaluation of any depth, marks of how a result was obtained, and errors.

A FACT is kept by key in `graph.store`; its kind is declared at the top of the module that writes it. It is written once and
never changes, so that the order of questions makes no difference. `BackwardNotes` live as long as one backward pass.
"""

import functools
import traceback
from collections.abc import Callable, Hashable
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from varscale import _compat
from varscale.programs.scopes import opened

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
Flows = list[np.ndarray | None]  # by argument, second moments of what flows back; None where nothing does

_NESTED = 24  # evaluations on Python's stack, beyond which they wait on an explicit one


class _Postponed(BaseException):
    """Postpones a computation until the one that is its argument is done."""


def evaluated(graph: Any, work: Callable[[], V]) -> V:
    """The result of `work`, which may ask for others in the same way, nested as deep as the model.

    Below a depth they are worked out from an explicit stack, and what asked for them starts anew: `work` may run several times.
    """
    if graph.nested >= _NESTED:
        raise _Postponed(work)
    waiting: list[Callable[[], Any]] = [work]
    graph.nested += 1
    try:
        while True:
            try:
                result = waiting[-1]()
                waiting.pop()
                if not waiting:
                    return result
            except _Postponed as postponed:
                if graph.nested > 1:
                    raise
                waiting.append(postponed.args[0])
    finally:
        graph.nested -= 1


class Fact(Generic[K, V]):
    """One kind of fact, by key.

    >>> class Graph:
    ...     def __init__(self):
    ...         self.store, self.nested = {}, 0
    >>> SIZES, graph = Fact(), Graph()
    >>> SIZES.once(graph, "a", lambda: 3), SIZES.get(graph, "a"), SIZES.get(graph, "b")
    (3, 3, None)
    """

    def of(self, graph: Any) -> dict[K, V]:
        """All that one graph knows of this kind."""
        return graph.store.setdefault(self, {})

    def get(self, graph: Any, key: K) -> V | None:
        """What is known, or None."""
        return self.of(graph).get(key)

    def put(self, graph: Any, key: K, value: V) -> V:
        """Note it."""
        self.of(graph)[key] = value
        return value

    def once(self, graph: Any, key: K, work: Callable[[], V]) -> V:
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
        if key not in found:
            evaluated(node.graph, lambda: found.setdefault(key, work(node, *args)))
        return found[key]

    return known


class FlowInside(NamedTuple):
    """What flows into an output of a region inside that: its second moments by type, and their relative error."""

    node: Any
    second: np.ndarray
    doubt: float


class BackwardNotes:
    """What nodes of one backward pass tell those that come later in it, which are the earlier nodes."""

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}  # by softmax, the tokens behind the values that it weighs
        # By product of queries and keys, which argument's cotangent gains, and how much by type.
        self.gains: dict[int, tuple[int, np.ndarray]] = {}
        # By output of a region, draws of the cotangents that other regions sent it, and their second moments.
        self.sent: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.regions: list[Any] = []  # outputs of regions that the pass has been through
        self.inside: list[FlowInside] = []  # what flows into outputs of regions inside those
        self.given: dict[int, np.ndarray] = {}  # by output of the model, what flows into it from outside
        self.doubts: dict[int, float] = {}  # by node, of its pullback, where not its kind's `gradient_doubt`


class PredictionError(ValueError):
    """A model that cannot be predicted; the message says why, where, and what to do."""

    equation: Any = None  # that the rules do not cover; None of any other failure


UNCOVERED = (NotImplementedError, RecursionError)  # from rules that do not cover an equation: it may be drawn


def source(eqn: Any) -> str:
    """Where an equation was written: "model.py:12 (Block)", inside a piece the path in that."""
    path = opened(eqn)[1].removeprefix("/")
    return _compat.source_line(eqn) + (f" ({path})" if path else "")


def told(error: Exception) -> str:
    """What an error says."""
    return f"{type(error).__name__}: {error}"


def located(error: Exception, eqn: Any = None) -> PredictionError:
    """The error with the primitive, source line and path of its equation.

    That is the one that made the innermost node which was being computed; else the one that was being interpreted.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for node in map(frame.f_locals.get, ("self", "node")):
            if isinstance(node, Marked) and node.origin is not None:
                eqn = node.origin
    where = "" if eqn is None else f"primitive {eqn.primitive.name!r} at {source(eqn)}: "
    found = PredictionError(where + told(error))
    found.equation = eqn if isinstance(error, UNCOVERED) else None
    return found


HOWS = ("exact", "quadrature", "sampled", "assumed")  # from the best to the worst


class Marked:
    """What is worked out once, and marked while it is (`Graph.flag`)."""

    flagged: str | None = None  # the worst way in which a step of the working was taken (`HOWS`), if any
    doubt = 0.0  # a bound on the relative error that those steps may have made
    origin: Any = None  # the equation that was being interpreted when it was made

    def mark(self, how: str, doubt: float) -> None:
        """It rests on `how`, with this relative error at most."""
        self.flagged = max(self.flagged or "exact", how, key=HOWS.index)
        self.doubt = max(self.doubt, doubt)
