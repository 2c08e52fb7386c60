"""What the reader of recurrences knows of an array: a term of parameters, a signal, or a number; and what it finds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from varscale import _compat

Atom = tuple[Any, ...]  # ("is", i), ("exp", i): a parameter and its exponential; others: (what, parameters)
_MOST_MONOMIALS, _MOST_ENTRIES = 16, 1 << 22
ENTRY = 1 << 32  # parameter · ENTRY + place on its last axis


@dataclasses.dataclass(frozen=True)
class Term:
    """What is computed from parameters alone.

    Attributes:
        monomials: it is their sum: a number times a product of atoms.
        entries: of a rearranged vector, which entry stands where; None where that is not known.
    """

    monomials: tuple[tuple[complex, frozenset[Atom]], ...]
    entries: np.ndarray | None = dataclasses.field(default=None, compare=False)

    @property
    def atoms(self) -> frozenset[Atom]:
        return frozenset(atom for _, atoms in self.monomials for atom in atoms)

    @property
    def parameters(self) -> frozenset[int]:
        return frozenset(i for atom in self.atoms for i in (atom[1] if isinstance(atom[1], frozenset) else atom[1:2]))

    def alone(self, what: str) -> int | None:
        """The parameter that is all of it, up to a number: "is" or "exp"."""
        if len(self.monomials) != 1 or len(self.monomials[0][1]) != 1:
            return None
        (atom,) = self.monomials[0][1]
        return atom[1] if atom[0] == what else None


@dataclasses.dataclass(frozen=True)
class Signal:
    """What depends on the inputs.

    Attributes:
        near: atoms and numbers of linear maps, ("map", k), that it was made with since the last linear map.
        made_by: the linear map whose output it is, up to biases; None for none.
        shifts: entries of the vectors that were added since; offset: the constant.
        state: whether it is the state of a loop.
        gate: entries of the biases under the sigmoid that it is; () for none.
        holds: of gate · state, the gate's; admits: of gate · something else. Of all three the offset is that under the sigmoid.
        step: of softplus(map + bias) the map and the bias; exped: of exp(map + bias).
        decay: of such a step times exp(a): the parameter a, and the step.
        scaled: the parameter that it was last multiplied by.
    """

    near: frozenset[Atom] = frozenset()
    made_by: int | None = None
    shifts: tuple[np.ndarray, ...] = dataclasses.field(default=(), compare=False)
    offset: float = 0.0
    state: bool = False
    gate: tuple[np.ndarray, ...] = dataclasses.field(default=(), compare=False)
    holds: tuple[np.ndarray, ...] = dataclasses.field(default=(), compare=False)
    admits: tuple[np.ndarray, ...] = dataclasses.field(default=(), compare=False)
    step: tuple[int | None, int | None] | None = None
    exped: tuple[int | None, int | None] | None = None
    decay: tuple[int, tuple[int | None, int | None]] | None = None
    scaled: int | None = None


Known = Term | Signal | complex | None  # a number; None: constants that are not one number


@dataclasses.dataclass(frozen=True)
class Map:
    """A linear map: the parameters that are its kernel, those whose exponentials are, how many terms it sums, what it reads."""

    kernel: frozenset[int]
    scales: frozenset[int]
    terms: int
    near: frozenset[Atom]


class Gate(NamedTuple):
    """The bias of a gate: the run from `start` to `stop` of a leaf's last axis, which is `size` long.

    `offset` is the constant that the program adds to it.
    """

    path: str
    start: int
    stop: int
    size: int
    offset: float


@dataclasses.dataclass
class Recurrences:
    """What the parameters of a program are in its recurrences, by their paths.

    Attributes:
        decay: ν of exp(−exp(ν)).
        phase: θ of exp(iθ) -> False, of exp(i exp(θ)) -> True.
        normalizer: log γ, whose exponential multiplies what drives a recurrence -> its ν.
        inputs: kernels before the recurrence of a ν -> how many terms they sum.
        outputs: kernels after it -> the number of its states.
        real: a of a state space: of −exp(a) -> True, of a itself -> False; imaginary: its b -> the shape of δ; steps: its δ.
        weights: what multiplies its exponentials, or its states -> whether it is the real or imaginary part of complex numbers.
        poles, step_kernel, step_bias: of a selective one.
        skip: what multiplies activations that are added to the output of either.
        gates: biases of forget gates and, as many or none, of the input gates beside them.
    """

    decay: set[str] = dataclasses.field(default_factory=set)
    phase: dict[str, bool] = dataclasses.field(default_factory=dict)
    normalizer: dict[str, str] = dataclasses.field(default_factory=dict)
    inputs: dict[str, int] = dataclasses.field(default_factory=dict)
    outputs: dict[str, int] = dataclasses.field(default_factory=dict)
    real: dict[str, bool] = dataclasses.field(default_factory=dict)
    imaginary: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    steps: set[str] = dataclasses.field(default_factory=set)
    weights: dict[str, bool] = dataclasses.field(default_factory=dict)
    poles: set[str] = dataclasses.field(default_factory=set)
    step_kernel: set[str] = dataclasses.field(default_factory=set)
    step_bias: set[str] = dataclasses.field(default_factory=set)
    skip: set[str] = dataclasses.field(default_factory=set)
    gates: list[tuple[Gate, Gate | None]] = dataclasses.field(default_factory=list)


def entries_of(i: int, shape: tuple[int, ...]) -> np.ndarray | None:
    size = math.prod(shape)
    return np.broadcast_to(i * ENTRY + np.arange(shape[-1]), shape) if shape and size <= _MOST_ENTRIES else None


def number(x: Any) -> complex | None:
    """The number that a constant is, or the first that is not zero of many."""
    if _compat.is_tracer(x) or not hasattr(x, "dtype") or not np.issubdtype(x.dtype, np.number) or np.size(x) > 4096:
        return complex(x) if isinstance(x, int | float | complex) else None
    numbers = np.ravel(np.asarray(x))
    nonzero = numbers[numbers != 0]
    return complex(nonzero[0]) if len(nonzero) else None


def step_of(x: Signal) -> tuple[int | None, int | None]:
    """Of a map plus a bias, both."""
    owners = {int(entries.flat[0]) // ENTRY for entries in x.shifts[-1:] if entries.size}
    return x.made_by, min(owners, default=None)


def is_softplus(eqn: Any) -> bool:
    jaxpr = _compat.sub_jaxpr(eqn.params["call_jaxpr"])[0]
    names = {inner.primitive.name for inner in jaxpr.eqns} | {str(inner.params.get("name", "")) for inner in jaxpr.eqns}
    return bool(names & {"logaddexp", "softplus"}) or {"exp", "log1p", "max"} <= names


def terms_of(eqn: Any) -> int:
    """Over how many terms a linear map sums."""
    if eqn.primitive.name == "dot_general":
        (axes, _), _ = eqn.params["dimension_numbers"]
        return math.prod(eqn.invars[0].aval.shape[k] for k in axes)
    shape, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
    return math.prod(shape[k] for k in spec[1:])


def few(x: Term) -> Term:
    if len(x.monomials) <= _MOST_MONOMIALS:
        return x
    return Term(((1, frozenset({("of", x.parameters)})),))


def rearranged(eqn: Any, a: np.ndarray) -> np.ndarray:
    """A rearrangement, of entries."""
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    if name == "transpose":
        return np.transpose(a, eqn.params["permutation"])
    if name == "slice":
        steps = eqn.params["strides"] or [1] * a.ndim
        bounds = zip(eqn.params["start_indices"], eqn.params["limit_indices"], steps, strict=True)
        return a[tuple(slice(*bound) for bound in bounds)]
    if name == "broadcast_in_dim":
        wide = [1] * len(shape)
        for k, n in zip(eqn.params["broadcast_dimensions"], a.shape, strict=True):
            wide[k] = n
        return np.broadcast_to(a.reshape(wide), shape)
    return a.reshape(shape)


def moved(x: Known, move: Callable[[np.ndarray], np.ndarray]) -> Known:
    """A value whose entries are rearranged."""

    def of(a: np.ndarray) -> np.ndarray:
        return move(a) if math.prod(a.shape) <= _MOST_ENTRIES else a

    if isinstance(x, Term):
        return dataclasses.replace(x, entries=None if x.entries is None else of(x.entries))
    if isinstance(x, Signal):
        parts = {name: tuple(map(of, getattr(x, name))) for name in ("shifts", "gate", "holds", "admits")}
        return dataclasses.replace(x, **parts)
    return x


def joined(ins: Sequence[Known], eqn: Any) -> Known:
    """Several values joined along an axis."""
    terms = [x for x in ins if isinstance(x, Term)]
    if len(terms) < len(ins):
        signals = [x for x in ins if isinstance(x, Signal)]
        if signals:
            return Signal(frozenset().union(*(x.near for x in signals), *(x.atoms for x in terms)))
    kept = [x.entries for x in terms if x.entries is not None]
    entries = np.concatenate(kept, eqn.params["dimension"]) if len(kept) == len(ins) else None
    same = {frozenset(x.monomials) for x in terms}
    if len(same) == 1:
        return Term(terms[0].monomials, entries)
    return Term(((1, frozenset({("of", frozenset().union(*(x.parameters for x in terms)))})),), entries)
