"""What the walk knows of an array: a rearranged parameter, something computed from the inputs, or a constant."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from varscale.usage.layouts import Axes

Part = tuple[int, int, int]  # first entry, the one after the last, and how many there are in all


@dataclasses.dataclass(frozen=True)
class View:
    """A parameter, rearranged, scaled, or made of it alone.

    Attributes:
        parameter: its number.
        axes: which of its axes each axis holds.
        batch: axes that a loop over layers took away: one layer's slice is used at a time.
        steps: how often a loop uses what it is given: 1 outside of loops over time.
        companions: parameters of the same shape that are joined with it, and so used as it is.
        region: (axis, start, stop) of each axis of which it is a slice; None where it is not known which entries it holds.
        scale: the constant that it was multiplied by; None where it is not known.
        normalised: whether it was divided by something made of itself, so that its scale has no effect.
        placed: how many of its axes are known positions at which its rows were looked up.
    """

    parameter: int
    axes: Axes
    batch: frozenset[int] = frozenset()
    steps: int = 1
    companions: tuple[int, ...] = ()
    region: tuple[tuple[int, int, int], ...] | None = ()
    scale: float | None = 1.0
    normalised: bool = False
    placed: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """The output of a use of a parameter, or a part of it."""

    use: int
    part: Part | None = None


@dataclasses.dataclass(frozen=True)
class Score:
    """A product of two activations of which a softmax may follow: what its sides were made by, and their own axes.

    Attributes:
        left: what made the left side.
        right: what made the right side.
        left_axes: axes of the product that the left side has alone.
        right_axes: likewise the right side.
        terms: how many terms each entry sums.
        row: the product's row in a prediction: its scope and primitive, "#1" and so on for the second and later ones there.
        before: the constant that its sides were multiplied by; None where it is not known.
    """

    left: frozenset[Source]
    right: frozenset[Source]
    left_axes: frozenset[int]
    right_axes: frozenset[int]
    terms: int = 1
    row: str = ""
    before: float | None = 1.0

    @property
    def pairs(self) -> bool:
        """Whether each side has axes of its own: a score of every query and every key."""
        return bool(self.left_axes and self.right_axes)

    def moved(self, to: Mapping[int, Iterable[int]]) -> Score:
        """The score after its axes went to others: of each of them which; what is not among them is gone."""
        left, right = (
            frozenset(new for axis in axes for new in to.get(axis, ())) for axes in (self.left_axes, self.right_axes)
        )
        return dataclasses.replace(self, left_axes=left - right, right_axes=right - left)


@dataclasses.dataclass(frozen=True)
class Flow:
    """An array that depends on the model's inputs.

    Attributes:
        anchor: the number of the linear map, addition or normalisation whose output this is, up to functions of one argument.
        ancestors: the anchors it depends on, as bits.
        axes: which axes of the last kernel's output its axes hold.
        sources: the uses it depends on with no other linear map between.
        functions: the elementwise primitives applied since `root`.
        root: where its elementwise chain begins.
        depth: residual additions on the way from the inputs.
        maps: linear maps on the longest way from the inputs.
        embedded: whether it was looked up in a table.
        reduced: whether it is a mean, a sum or a maximum over an axis.
        normalised: whether it was divided by its own scale.
        direct: whether no other value has joined since the last linear map.
        score: where it is a product of two activations.
        scale: the constant that it was multiplied by since its anchor, outside of functions; None where it is not known.
        function_scale: likewise inside the first function that a constant does not pass through.
        mixed: of a product of two activations, the uses that made a side no function was applied to: experts weighted by gates.
        gates: parameters that it was multiplied by since its anchor, but for those of normalisations.
        stream: the residual stream that it was computed from; None before the first addition.
        added_to: of the sum of a stream and a branch, the anchor of the stream; 0 for none.
        offset: the constant that was added to it since it was reduced.
        scaled: whether a parameter has scaled it, or what it was divided by, since it was normalised.
        spread: whether it was repeated along an axis since its anchor.
        holds: the anchors, as bits, of what it was multiplied with or summed of by other activations since the last linear map.
        addends: of a sum of embeddings, the uses that made them, and the constant that each was multiplied by over `scale`.
    """

    anchor: int
    ancestors: int
    axes: Axes
    sources: frozenset[Source] = frozenset()
    functions: frozenset[str] = frozenset()
    root: int = 0
    depth: int = 0
    maps: int = 0
    embedded: bool = False
    reduced: bool = False
    normalised: bool = False
    direct: bool = False
    score: Score | None = None
    scale: float | None = 1.0
    function_scale: float | None = 1.0
    mixed: frozenset[Source] = frozenset()
    gates: frozenset[int] = frozenset()
    stream: int | None = None
    added_to: int = 0
    offset: float = 0.0
    scaled: bool = False
    spread: bool = False
    holds: int = 0
    addends: frozenset[tuple[int, float | None]] = frozenset()

    @property
    def size(self) -> int:
        """How many entries it has."""
        return math.prod(atom.size for atoms in self.axes for atom in atoms)

    @property
    def raw(self) -> bool:
        """Whether no parameter has mixed or looked up its features yet."""
        return self.maps == 0 and not self.embedded

    @property
    def embeddings(self) -> frozenset[tuple[int, float | None]]:
        """The uses that made the embeddings it is a sum of, and the constant that each was multiplied by."""
        if self.maps or self.functions:
            return frozenset()
        own = frozenset((source.use, 1.0) for source in self.sources if self.direct)
        return frozenset((use, times(self.scale, factor)) for use, factor in own | self.addends)


Value = View | Flow | None  # None: a constant
Known = TypeVar("Known", bound=View | Flow)


def times(scale: float | None, number: float | None) -> float | None:
    """A product of two factors of which either may be unknown."""
    return None if scale is None or number is None or not math.isfinite(number) else scale * number


def changed(x: Known, **fields: Any) -> Known:
    """A copy with other fields. A walk makes thousands; `dataclasses.replace` sets each of two dozen fields one by one."""
    made = object.__new__(type(x))
    made.__dict__.update(vars(x), **fields)
    return made


def after_function(names: Iterable[str]) -> str:
    """The usual name of an elementwise function made of these primitives; "" for none.

    >>> after_function({"erf", "mul"}), after_function({"logistic", "mul"})
    ('gelu', 'silu')
    """
    found = set(names)
    named = found & (NAMED_FUNCTIONS | {"softmax"})
    if named:
        return "+".join(sorted(named))
    gated = "mul" in found
    for sign, alone, product in _SIGNS:
        if sign <= found:
            return product if gated else alone
    return ""


# Functions of jax.nn that keep their name in a jaxpr.
NAMED_FUNCTIONS = frozenset(
    {
        "relu", "relu6", "silu", "swish", "selu", "elu", "celu", "gelu", "mish", "softplus", "leaky_relu", "hard_tanh",
        "hard_sigmoid", "hard_silu", "hard_swish", "squareplus", "sigmoid", "log_sigmoid", "soft_sign",
    }
)  # fmt: skip
_SIGNS: tuple[tuple[frozenset[str], str, str], ...] = (
    (frozenset({"erf"}), "erf", "gelu"),
    (frozenset({"erfc"}), "erfc", "gelu"),
    (frozenset({"tanh", "integer_pow"}), "tanh", "gelu"),
    (frozenset({"logistic"}), "sigmoid", "silu"),
    (frozenset({"tanh"}), "tanh", "tanh gate"),
    (frozenset({"max", "square"}), "relu squared", "relu squared"),
    (frozenset({"max"}), "relu", "relu"),
    (frozenset({"sin"}), "sin", "sin"),
    (frozenset({"cos"}), "cos", "cos"),
    (frozenset({"log1p"}), "softplus", "mish"),
    (frozenset({"exp"}), "exp", "exp"),
    (frozenset({"clamp"}), "clip", "clip"),
    (frozenset({"abs"}), "abs", "abs"),
    (frozenset({"square"}), "square", "square"),
    (frozenset({"integer_pow"}), "power", "power"),
    (frozenset({"sign"}), "sign", "sign"),
)
