"""What a scheme is: a rule that gives every parameter of a model its law, from what the program does with it.

To add a scheme, write a function that returns `Scheme(call, rule)`. The rule is called once for each parameter with a `Subject`
and returns a `Choice`; it never reads names. `Subject.kept(why)` leaves a parameter to the model's own law.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from varscale.initialization.outline import outline
from varscale.initialization.tracing import trace
from varscale.initializers.combinators import fused, scaled
from varscale.initializers.distributions import DistributionName
from varscale.initializers.fans import Fans
from varscale.initializers.fixed import normal, symmetric_uniform, truncated_normal
from varscale.initializers.initializer import Initializer
from varscale.initializers.scaling import variance_scaling
from varscale.initializers.structured import constant
from varscale.schemes.laws import Declared, Law, graded, interleaved
from varscale.schemes.plan import Plan, PlannedLeaf, Requirement
from varscale.schemes.structure import Structure, packed_kernels, part_names
from varscale.usage.branches import Branch
from varscale.usage.parameters import OneUse, ParameterUses
from varscale.usage.table import Uses, uses

MATRICES = frozenset({"input", "hidden", "readout", "embedding", "depthwise", "expert"})


@dataclasses.dataclass(frozen=True)
class Choice:
    """A law, why, and the optimizer's multipliers that go with it: see `PlannedLeaf.multipliers`."""

    law: Law
    why: str
    multipliers: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a rule is told of one parameter.

    Attributes:
        uses: what the program does with it.
        whole: what the program does with all parameters.
        declared: its law by the model's own init: a constant where that fills in one number.
        structure: the residual streams of the model.
    """

    uses: ParameterUses
    whole: Uses
    declared: Initializer
    structure: Structure

    @property
    def shape(self) -> tuple[int, ...]:
        return self.uses.shape

    @property
    def role(self) -> str:
        return self.uses.role

    @property
    def main(self) -> OneUse:
        """The use that says what the parameter is."""
        assert self.uses.main is not None
        return self.uses.main

    @property
    def is_matrix(self) -> bool:
        """Whether it mixes or looks up: a kernel of a linear map or a convolution, or a table."""
        return self.uses.main is not None and bool(self.main.reduction_axes) and self.role in MATRICES

    @property
    def is_table(self) -> bool:
        """Whether its rows are looked up."""
        return self.role == "embedding"

    @property
    def is_tied(self) -> bool:
        """Whether it is a table that is a matrix too: the readout, as a rule. One that is looked up in two places is not."""
        return self.is_table and any(use.reduction_axes and use.kind != "lookup" for use in self.uses.uses)

    @property
    def fan_in(self) -> float:
        """Terms summed into an output; of a tied table those of its use as a readout, since a lookup sums nothing."""
        return max(use.fan_in for use in self.uses.uses if use.reduction_axes) if self.is_table else self.main.fan_in

    @property
    def terms(self) -> int:
        """Entries that one output sums, those on padding included: the fan-in of the kernel's shape."""
        return math.prod(self.shape[axis] for axis in self.main.reduction_axes)

    @property
    def reached(self) -> int:
        """Outputs times taps: the fan-out of a kernel's shape."""
        outputs = math.prod(self.shape[axis] for axis in self.main.output_axes)
        return outputs * (math.prod(self.shape[:-2]) if self.main.kind == "convolution" else 1)

    @property
    def width(self) -> float:
        """The width d of the stream that it reads, or, of a table or what ends a branch, that it writes."""
        if self.role == "position":
            return float(self.shape[-1])
        return self.fan_out if self.is_table or self.ends else self.fan_in

    @property
    def fan_out(self) -> float:
        """Terms summed into the gradient of an input; of packed kernels the mean over them."""
        return self.main.fan_out / len(packed_kernels(self.uses))

    @property
    def ends(self) -> bool:
        """Whether its output ends in a residual addition."""
        return self.uses.main is not None and self.main.ends is not None

    @property
    def branch(self) -> Branch | None:
        """The residual branch that it lies in."""
        return self.structure.branch(self.uses)

    @property
    def attends(self) -> bool:
        """Whether its branch is an attention."""
        return self.uses.main is not None and self.main.branch is not None and self.structure.attends(self.main.branch)

    @property
    def parts(self) -> tuple[frozenset[str], ...]:
        """What each part of its output is; see `part_names`."""
        return part_names(self.uses)

    @property
    def is_gated(self) -> bool:
        """Whether it makes what a gate multiplies, alone."""
        return self.parts == (frozenset({"up"}),)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The index, from 0, of its block: one a layer that is stacked in it, or one in all."""
        branch = self.branch
        if branch is None:
            return (0,)
        found = tuple(self.structure.block(branch.stream, number) for number in branch.numbers)
        return found if self.layer_axis is not None else found[:1]

    @property
    def layer_axis(self) -> int | None:
        """The axis along which the layers of a loop are stacked in it; None for none."""
        branch = self.branch
        if branch is None or not branch.loops or self.uses.main is None:
            return None
        return next((axis for axis in self.main.batch_axes if self.shape[axis] == len(branch.numbers)), None)

    def layered(self, init: Initializer, factors: Sequence[float]) -> Initializer:
        """The law times a factor for each of its `blocks`."""
        if len(set(factors)) == 1 or self.layer_axis is None:
            return init if factors[0] == 1 else scaled(init, factors[0])
        return graded(init, factors, self.layer_axis)

    def by_part(self, law: Callable[[frozenset[str], float], Initializer], *, equal: bool = True) -> Initializer:
        """The law of the whole leaf where kernels are packed in it: query, key and value, a gate and what it gates.

        Args:
            law: from what a kernel makes, and its own fan-out, to its law.
            equal: whether kernels of one law can be drawn as one: not where a law is of the whole matrix, as orthogonal is.
        """
        kernels = packed_kernels(self.uses)
        count = sum(n for _, n in kernels)
        laws = [law(names, self.main.fan_out * n / count) for names, n in kernels]
        if (equal and len(set(laws)) == 1) or len(laws) == 1 or self.main.packed is None:
            return laws[0]
        axis, run = self.main.packed
        if run == self.shape[axis]:
            return fused(laws, [run // count * n for _, n in kernels], axis)
        if not equal:
            return laws[0]
        unit = math.gcd(*(n for _, n in kernels))
        several = [one for one, (_, n) in zip(laws, kernels, strict=True) for _ in range(n // unit)]
        return interleaved(several, self.shape[axis] // run, axis)

    def kept(self, why: str = "as declared: the scheme says nothing of it") -> Choice:
        """The model's own law."""
        return Choice(self.declared, why)


Rule = Callable[[Subject], Choice]
Requires = Callable[[Structure, Sequence[PlannedLeaf]], Sequence[Requirement]]


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A scheme with its arguments: call it with a model and its input to get a `Plan`.

    Attributes:
        call: how it was made, in words: "gpt2(stddev=0.02)".
        rule: the law of each parameter.
        check: raises ValueError where a model is none that the scheme is for; None for a scheme that is for any.
        requires: the numbers that the scheme needs in the program, each checked in the trace; None for none.
        notes: what holds for every plan of it.
    """

    call: str
    rule: Rule = dataclasses.field(repr=False)
    check: Callable[[Structure], None] | None = dataclasses.field(default=None, repr=False)
    requires: Requires | None = dataclasses.field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    def __call__(self, model: Any, x: Any, *, params: Any = None, method: str | None = None) -> Plan:
        """The law of every parameter of a model under this scheme.

        Args:
            model: a linen module, an nnx factory `lambda rngs: Net(..., rngs=rngs)`, an nnx instance, or a plain function
                f(params, *args).
            x: one input (array, `jax.ShapeDtypeStruct`, or a pytree of them), or `vs.inputs(...)`.
            params: the parameters of a plain function, as arrays or abstract arrays.
            method: the method to trace in place of `__call__`.

        Raises:
            TypeError: `model` is of no known kind.
            ValueError: the model does not trace on `x`, has no parameters, or lacks what the scheme is about.
        """
        found = uses(model, x, params=params, method=method)
        if not len(found):
            raise ValueError(f"{self.call} needs a model with parameters, and {model!r} has none")
        structure = Structure(found)
        if self.check is not None:
            self.check(structure)
        laws = declared_laws(model, x, method)
        leaves = []
        for parameter in found:
            subject = Subject(parameter, found, laws.get(parameter.path, Declared()), structure)
            choice = self.rule(subject)
            use = parameter.main
            fans = (1.0, 1.0) if use is None else (use.fan_in, subject.fan_out)
            told = (parameter.path, parameter.shape, parameter.role, *fans, choice.law, choice.why, choice.multipliers)
            leaves.append(PlannedLeaf(*told))
        requirements = tuple(self.requires(structure, leaves)) if self.requires is not None else ()
        return Plan(self.call, tuple(leaves), requirements, self.notes)


def declared_laws(model: Any, x: Any, method: str | None) -> dict[str, Initializer]:
    """What the model's own init does for each parameter: a constant where it fills in one number, else its operations.

    Empty for a model that holds its parameters already, or is given them: it no longer says what they were drawn from.
    """
    key = jax.random.key(0)
    try:
        plan = outline(trace(model, key, x, method), key)
    except (TypeError, ValueError):
        return {}
    found: dict[str, Initializer] = {}
    for leaf, task in zip(plan.trace.leaves, plan.tasks, strict=True):
        words = plan.account[leaf.path].law
        number = None if task.number is None else np.asarray(task.number)
        found[leaf.path.removeprefix("params/")] = Declared(words) if number is None else constant(number.item())
    return found


def checked_convention(convention: str | None, *known: str) -> None:
    """Raises ValueError for a convention that is not known."""
    if convention is not None and convention not in known:
        raise ValueError(f"convention must be None or {' or '.join(map(repr, known))}, not {convention!r}")


def spread(distribution: DistributionName, std: float) -> Initializer:
    """Weights of a distribution with this standard deviation, whatever the shape; zeros for 0."""
    if std == 0:
        return constant(0.0)
    if distribution == "normal":
        return normal(std)
    if distribution == "truncated_normal":
        return truncated_normal(std)
    if distribution == "uniform":
        return symmetric_uniform(std * 3**0.5)
    return variance_scaling(std**2, "fan_in", distribution, fans=Fans(1.0, 1.0))
