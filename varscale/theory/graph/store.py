"""What a graph knows besides its nodes: facts by key, each kind of them declared once at the top of the module that writes it.

A fact is written when it is first worked out and never changes, so what is asked before makes no difference to what is asked
after. What nodes of one backward pass tell one another is no fact: it lives as long as the pass (`BackwardNotes`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class HasStore(Protocol):
    """A graph, as far as facts are concerned."""

    store: dict[Any, dict[Any, Any]]


class Fact(Generic[K, V]):
    """One kind of fact, by key.

    >>> class Graph:
    ...     def __init__(self):
    ...         self.store = {}
    >>> SIZES, graph = Fact(), Graph()
    >>> SIZES.once(graph, "a", lambda: 3), SIZES.get(graph, "a"), SIZES.get(graph, "b")
    (3, 3, None)
    """

    def of(self, graph: HasStore) -> dict[K, V]:
        """All that one graph knows of this kind."""
        return graph.store.setdefault(self, {})

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


class OncePerNode(Generic[V]):
    """A function of a node, and of further hashable arguments, that is worked out once for each."""

    def __init__(self, work: Callable[..., V]):
        self.work, self.fact = work, Fact[Any, V]()
        functools.update_wrapper(self, work)

    def __call__(self, node: Any, *args: Hashable) -> V:
        known, key = self.fact.of(node.graph), (node.id, *args)
        if key not in known:
            known[key] = self.work(node, *args)
        return known[key]

    def knows(self, node: Any, *args: Hashable) -> bool:
        """Whether it has been worked out."""
        return (node.id, *args) in self.fact.of(node.graph)


def once_per_node(work: Callable[..., V]) -> OncePerNode[V]:
    """Decorate a function of a node (and hashable arguments) to be worked out once for each."""
    return OncePerNode(work)


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
        sent: by output of a loop, draws of the cotangents that other loops sent it.
        loops: the outputs of loops that the pass has been through.
        inside: what flows into outputs of regions inside these.
        doubts: by node, the relative error of its pullback, where that is not its kind's `gradient_doubt`.
    """

    values: dict[int, Any] = dataclasses.field(default_factory=dict)
    gains: dict[int, tuple[int, np.ndarray]] = dataclasses.field(default_factory=dict)
    sent: dict[int, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    loops: list[Any] = dataclasses.field(default_factory=list)
    inside: list[FlowInside] = dataclasses.field(default_factory=list)
    doubts: dict[int, float] = dataclasses.field(default_factory=dict)
