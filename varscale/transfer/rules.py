"""Which learning rate each leaf trains with: rules by path, the first that matches counts."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Array, Float, Int

from varscale.programs.patterns import Pattern, first_match, text
from varscale.programs.tables import shape_text, table_text
from varscale.programs.trees import open_tree

Schedule = Callable[[Int[Array, ""]], Float[Array, ""] | float]
Rule = Literal["freeze"] | float | Schedule
Rules = Mapping[Pattern, Rule] | Sequence[tuple[Pattern, Rule]]


@dataclass(frozen=True)
class UnfreezeAt:
    """A schedule of multipliers: 0 before a step, `multiplier` from it on. Steps count from 0."""

    step: int
    multiplier: float = 1.0

    def __call__(self, count: Int[Array, ""]) -> Float[Array, ""]:
        import jax.numpy as jnp

        return jnp.where(count >= self.step, jnp.float32(self.multiplier), jnp.float32(0))


@dataclass(frozen=True)
class Caught:
    """The rule that catches one leaf.

    Attributes:
      path: the leaf's.
      shape: the leaf's.
      pattern: the rule's, as written; "" where no rule catches the leaf, which then trains with the optimizer's own rate.
      rule: what it says.
      place: the rule's place in the list; -1 for none.
    """

    path: str
    shape: tuple[int, ...]
    pattern: str
    rule: Rule
    place: int


@dataclass(frozen=True)
class Assignment:
    """The rule of every leaf, in the tree's order."""

    leaves: tuple[Caught, ...]

    def __getitem__(self, path: str) -> Caught:
        return next(leaf for leaf in self.leaves if leaf.path == path)

    def table(self, width: int = 100) -> str:
        """All leaves, one a line, with the rule that catches each. `width` is in characters."""
        trained = sum(math.prod(leaf.shape) for leaf in self.leaves if leaf.rule != "freeze")
        total = sum(math.prod(leaf.shape) for leaf in self.leaves)
        rows = [(leaf.path, shape_text(leaf.shape), leaf.pattern or "(none)", describe(leaf.rule)) for leaf in self.leaves]
        return table_text(f"{trained:,} of {total:,} parameters train", ("leaf", "shape", "rule", "rate"), rows, width)

    def __str__(self) -> str:
        return self.table()


def assign(rules: Rules, params: Any) -> Assignment:
    """The rule that catches each leaf of `params`.

    Raises:
      ValueError: a rule catches no leaf (none at all, or none that earlier rules leave it), or says nothing that is allowed.
      TypeError: likewise, of a wrong type.
    """
    ordered = checked(rules)
    leaves = open_tree(params, "params").leaves
    found = [first_match(ordered, leaf.path) for leaf in leaves]
    caught = tuple(
        Caught(leaf.path, leaf.shape, "", 1.0, -1)
        if match is None
        else Caught(leaf.path, leaf.shape, text(ordered[match[0]][0]), match[1], match[0])
        for leaf, match in zip(leaves, found, strict=True)
    )
    used = {leaf.place for leaf in caught}
    if idle := [text(pattern) for place, (pattern, _) in enumerate(ordered) if place not in used]:
        shown = ", ".join(leaf.path for leaf in leaves[:4]) or "none"
        raise ValueError(
            f"rules: {', '.join(map(repr, idle))} catches no leaf that no earlier rule does; the leaves are {shown} ..."
        )
    return Assignment(caught)


def rule_of(rules: Sequence[tuple[Pattern, Rule]], path: str) -> Rule:
    """What the rules say of one leaf."""
    match = first_match(rules, path)
    return 1.0 if match is None else match[1]


def checked(rules: Rules) -> tuple[tuple[Pattern, Rule], ...]:
    """The rules in order.

    Raises:
      ValueError: there are none, or one says nothing that is allowed.
      TypeError: they are no mapping and no sequence of pairs.
    """
    if not isinstance(rules, Mapping) and (
        isinstance(rules, str) or not all(isinstance(r, tuple) and len(r) == 2 for r in rules)
    ):
        raise TypeError(f"rules is {rules!r}; give a mapping from pattern to rule, or a sequence of such pairs")
    ordered = tuple(rules.items() if isinstance(rules, Mapping) else rules)
    if not ordered:
        raise ValueError("rules is empty; without rules the optimizer itself does what you want")
    for pattern, rule in ordered:
        first_match([(pattern, None)], "")  # a malformed pattern is told now
        number = isinstance(rule, int | float) and not isinstance(rule, bool)
        if not (rule == "freeze" or callable(rule) or (number and math.isfinite(rule) and rule >= 0)):
            raise ValueError(
                f"rules[{text(pattern)!r}] is {rule!r}; give 'freeze', a multiplier of the learning rate (0 or more), "
                f"or a schedule from step to multiplier"
            )
    return ordered


def describe(rule: Rule) -> str:
    """The rule in a few characters."""
    if rule == "freeze":
        return "frozen"
    return f"schedule {getattr(rule, '__name__', rule)}" if callable(rule) else f"× {rule:g}"


def head_only(head: Pattern) -> dict[Pattern, Rule]:
    """Train what `head` catches and freeze the rest: linear probing, where the head is linear."""
    return {head: 1.0, "**": "freeze"}


def layerwise_decay(layers: Sequence[Pattern], decay: float, *, head: float = 1.0) -> dict[Pattern, Rule]:
    """Smaller rates the nearer to the input: the last of `layers` trains with `head`, each one before it with `decay` times
    less.

    Args:
      layers: patterns from the input to the output, such as ["embed", "blocks/0", "blocks/1", "head"]; several patterns of one
        depth as one with braces ("{norm,head}").
      decay: of the rate a layer, in (0, 1]; .65 to .8 is usual (Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT).
      head: the multiplier of the last.
    """
    if isinstance(layers, str) or not layers:
        raise ValueError(f"layers is {layers!r}; give patterns in order from the input to the output")
    if not 0 < decay <= 1:
        raise ValueError(f"decay is {decay}; give more than 0, at most 1")
    return {pattern: head * decay ** (len(layers) - 1 - depth) for depth, pattern in enumerate(layers)}


def gradual_unfreezing(layers: Sequence[Pattern], every: int, *, start: int = 0) -> dict[Pattern, Rule]:
    """Unfreeze from the output down: the last of `layers` at step `start`, one more every `every` steps (Howard and Ruder 2018,
    3.3).

    A layer's rate is 0 until then, and it does not change to the bit. The optimizer sees its gradients all the while, so that
    moments are warm when it starts; what no pattern catches trains from the first step.
    """
    if isinstance(layers, str) or not layers:
        raise ValueError(f"layers is {layers!r}; give patterns in order from the input to the output")
    if every < 1 or start < 0:
        raise ValueError(f"every is {every} and start {start}; give 1 or more steps, and 0 or more")
    return {pattern: UnfreezeAt(start + every * (len(layers) - 1 - depth)) for depth, pattern in enumerate(layers)}
