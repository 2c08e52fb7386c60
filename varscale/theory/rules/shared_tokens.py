"""Products of arrays that are uncorrelated and yet not independent: made of the same tokens, or by the same weights.

Given what both were made of, S, the entries of x that are multiplied with the tokens a and b have a covariance that S decides,
and so do those of y: E[x_a x_b | S] = E[x_a x_b] + (own part of x) o_ab, with one and the same overlap o (`overlaps`). Hence

    E[(Σ_a x_a y_a)²] = Σ_ab E[x_a x_b] E[y_a y_b] + Σ_{a≠b} V (own part of x) (own part of y),    V = E[o²].

That is kᵀv of linear attention, where S is the sequence and V one over its features, and (x W)(y W)ᵀ, where S is W and tokens
are its columns. It is of order n²V against n for the rest. What a token's own squared norm varies by, 2V, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from varscale.theory.axes import Axis, contract_axis
from varscale.theory.graph import View
from varscale.theory.moments import full_types
from varscale.theory.overlaps import Tokens, overlap_before, sources_of, tokens_of

# Set on models, not derived: overlaps are known to leading order in V, behind functions and attention to a quarter.
_OVERLAP_DOUBT = 0.15


class Gain(NamedTuple):
    """What a contraction gains, by type of its output; the share of it that is in doubt, and what it leaves out of the rest."""

    second: np.ndarray | float
    doubt: float = 0.0
    left_out: float = 0.0


def shared_tokens(node: Any) -> Gain:
    """What a contraction of two activations gains because they were made of the same tokens."""
    x, y = node.args
    if not x.node.deps & y.node.deps:
        return Gain(0.0)
    summed = range(len(node.axes), len(node.frame))
    sides = [tokens_of(v, summed, set(v.bind) - set(w.bind)) for v, w in ((x, y), (y, x))]
    if any(len(side.tokens) < len(summed) for side in sides):
        return Gain(0.0)
    overlap = overlap_before(*sides)
    if overlap <= 0:
        return Gain(0.0)
    frame, n = node.frame, node.width
    together = [k for k in x.bind if k in y.bind and k not in summed] if all(map(_by_sample, sides)) else []
    own = [_own_part(v, frame, summed, together) for v in (x, y)]
    gain = np.full([a.types for a in node.axes], n * n * overlap) * own[0] * own[1]
    agree = [a.agrees if k in together else np.ones(a.types, bool) for k, a in enumerate(node.axes)]
    gain[np.ix_(*agree)] *= 1 - 1 / n  # a token has no overlap with itself
    return Gain(gain, _OVERLAP_DOUBT, 2 * overlap)


def _by_sample(side: Tokens) -> bool:
    """Whether what the tokens were made of has axes beside theirs and its features': there are others in every sample."""
    from varscale.theory.rules.linear import Contract

    while True:
        sources, _ = sources_of(side)
        if len(sources) != 1:
            return False
        last, side = side, sources[0]
        if isinstance(last.node, Contract):
            return len(side.node.axes) > len(side.tokens) + len(side.features)


def _own_part(view: View, frame: Sequence[Axis], summed: Sequence[int], together: Sequence[int]) -> np.ndarray:
    """What an entry has of its own along the summed axes, by type of the others; where `together`, that of one sample."""
    second = full_types(view.second(frame), frame)
    same, every = second, second
    for k in reversed(summed):
        same, every = contract_axis(same, k, frame[k].same), contract_axis(every, k, frame[k].any_pair)
    n = math.prod(frame[k].size for k in summed)
    own = np.maximum(same - every, 0.0) * n / max(n - 1, 1)
    for k in together:
        own = np.expand_dims(contract_axis(own, k, frame[k].same), k)
    return own
