"""The walk that calibrates: moments are followed through a program, and each kernel it meets is given its variance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from varscale.initializers.distributions import DistributionName
from varscale.measuring.sites import sub_jaxprs
from varscale.schemes.plan import PlannedLeaf
from varscale.schemes.scheme import spread
from varscale.theory.domain.tables import independent
from varscale.theory.graph.layout import Value
from varscale.theory.graph.nodes import Leaf, Node
from varscale.theory.graph.normal_form import affine
from varscale.theory.graph.store import UNCOVERED, PredictionError
from varscale.theory.interpreter.interpreter import Interpreter
from varscale.theory.interpreter.predict import Walkable
from varscale.theory.interpreter.rows import Made, Rows, gradients_of, joined, of_one_draw
from varscale.theory.interpreter.rows import Place as Where
from varscale.theory.propagation.cotangents import cotangents
from varscale.theory.propagation.doubts import provenance
from varscale.theory.rules.random import as_weight, is_weight
from varscale.theory.rules.registry import live_equations
from varscale.usage import layouts
from varscale.usage.handlers import HANDLERS
from varscale.usage.notes import Use
from varscale.usage.parameters import named_leaves, parts_of
from varscale.usage.values import View
from varscale.usage.walk import Walk

Place = tuple[int, tuple[int, ...]]  # number of a use, steps of loops over layers
Direction = Literal["forward", "backward", "both"]
_TRIES = 30  # of a scale beside a bias
_CLOSE = 2e-7  # to the target, relative: float32 has no more


class Kernel(NamedTuple):
    """A use of a kernel, at the equation that multiplies by it.

    Attributes:
        path: of the kernel.
        use: what the program does with it there.
        number: of the use.
        is_tied: whether the kernel has other uses.
        layer_axis: axis over which a scan stacks its layers; None for a kernel of one layer.
        unit: 1/√fan_in of the leaf.
    """

    path: str
    use: Use
    number: int
    is_tied: bool
    layer_axis: int | None
    unit: float


class Set(NamedTuple):
    """What the walk found at one product.

    Attributes:
        kernel: of the product.
        steps: the layer, in a scan.
        scale: what the kernel's standard deviation must be multiplied by; for a tied kernel, what it was multiplied by.
        forward: the factor on its standard deviation that gives the product the target.
        backward: the factor that keeps the gradient; None for a kernel that reads the input.
        typical: the typical second moment of the product, scaled.
        reach: the factor by which 99 % of draws differ from it at most.
        is_exact: whether its moments follow without draws and approximations.
        row: the row that a prediction has for what it makes; None where that is no module's output.
    """

    kernel: Kernel
    steps: tuple[int, ...]
    scale: float
    forward: float
    backward: float | None
    typical: float
    reach: float
    is_exact: bool
    row: str | None = None

    @property
    def place(self) -> Place:
        """The use, and the layer."""
        return self.kernel.number, self.steps

    @property
    def name(self) -> str:
        """The kernel's path, and the layer in a stack."""
        return self.kernel.path + "".join(f"@{step}" for step in self.steps)


class Places(NamedTuple):
    """Where a program uses its parameters, by the `id`s of the equations around the use and its own.

    Attributes:
        kernels: of the chosen kernels.
        biases: of parameters that are added to something.
    """

    kernels: Mapping[tuple[int, ...], Kernel]
    biases: frozenset[tuple[int, ...]]


def places_of(walked: Walkable, chosen: Mapping[str, PlannedLeaf]) -> Places:
    """The uses of the chosen kernels and of biases."""
    names = named_leaves(walked.shapes)
    jaxpr = walked.forward.jaxpr
    jaxpr = jaxpr.replace(eqns=live_equations(jaxpr))  # others draw the weights that are given here
    walk = Walk(HANDLERS)
    views = [
        View(i, layouts.whole(v.aval.shape)) if names[i].learned else None
        for i, v in zip(walked.numbers, jaxpr.invars, strict=False)
    ]
    flows = [walk.input(v.aval.shape) for v in jaxpr.invars[len(views) :]]
    walk.run(jaxpr, [None] * len(jaxpr.constvars), [*views, *flows])
    counts: dict[int, int] = {}
    linear = [(n, use) for n, use in enumerate(walk.uses) if use.kind in ("linear", "convolution", "depthwise")]
    for _, use in linear:
        counts[use.parameter] = counts.get(use.parameter, 0) + 1
    found: dict[tuple[int, ...], Kernel] = {}
    for number, use in linear:
        path = names[use.parameter].path
        if path in chosen:
            layers = sorted(use.batch)
            tied = counts[use.parameter] > 1 or len(layers) > 1
            found[use.place] = Kernel(
                path, use, number, tied, layers[0] if layers and not tied else None, chosen[path].fan_in ** -0.5
            )
    return Places(found, frozenset(use.place for use in walk.uses if use.kind == "shift"))


class Laws:
    """The laws of kernels, and what is left of their standard deviations in float32: errors add up over a thousand layers."""

    def __init__(self, distribution: DistributionName):
        self._distribution: DistributionName = distribution
        self._known: dict[float, Leaf] = {}

    def applied(self, kernel: Kernel, scale: float) -> float:
        """The scale, as float32 has it."""
        if kernel.layer_axis is not None:
            return float(np.float32(scale))
        stds = (self._read(std).table.mean_square ** 0.5 for std in (kernel.unit * scale, kernel.unit))
        return next(stds) / next(stds)

    def scaled(self, kernel: Kernel, weight: Value, scale: float) -> Value:
        """A kernel of variance 1/fan_in with another standard deviation: the leaf that a prediction of the plan has there."""
        node, law = weight.node, self._read(kernel.unit * scale)
        assert isinstance(node, Leaf)  # that is what a kernel is whose law the walk lays
        made = node.graph.make(Leaf, node.axes, (), (*node.params, float(scale)))
        table = independent(0.0, law.table.mean_square, node.axes)
        return Value(made.settle(table, odd=True, kurtosis=law.kurtosis, transport=law.transport), weight.dims)

    def _read(self, std: float) -> Leaf:
        """What `vs.predict` reads from the law."""
        if std not in self._known:
            law, interpreter = spread(self._distribution, std), Interpreter()
            traced = jax.make_jaxpr(lambda: law(jax.random.key(0), (2,), np.dtype(np.float32)))()
            (out,) = interpreter.run(traced.jaxpr, traced.consts, [])
            node = as_weight(interpreter, out).node
            assert isinstance(node, Leaf)
            self._known[std] = node
        return self._known[std]


class Calibrating(Interpreter):
    """Follows moments through a program and multiplies what each kernel makes by the factor that gives it the target.

    Attributes:
        places: where kernels multiply and biases are added.
        found: what was found there, in order.
        biased: kernels beside whose bias no scale gives the sum the target -> the second moment of the bias.
    """

    def __init__(
        self,
        target: float,
        direction: Direction,
        tied: Mapping[str, float],
        laws: Laws,
        corrections: Mapping[Place, float],
    ):
        super().__init__()
        self._laws, self._corrections = laws, corrections
        self._at = Where(Rows(scopes=False, equations=()))
        self._rows: list[Made] = []
        self.places = Places({}, frozenset())
        self.found: list[Set] = []
        self.biased: dict[str, float] = {}
        self._target, self._direction, self._tied = target, direction, tied
        self._around: list[int] = []
        self._made: list[int] = []  # what was found at each product
        self._alike: dict[int, list[int]] = {}  # products of one kernel with one array are one node
        self._products: dict[int, Node] = {}
        self._bare: dict[int, tuple[int, Value]] = {}

    def equation(self, eqn: Any, ins: list[Any]) -> list[Any]:
        self._around.append(id(eqn))
        outer = self._at
        if sub_jaxprs(eqn):
            self._at = outer.within(eqn)
        try:
            outs = super().equation(eqn, ins)
            place = tuple(self._around)
        finally:
            self._around.pop()
            self._at = outer
        if eqn.primitive.name == "name" and outer.loops == len(self.steps):
            outer.note(eqn, dict(zip(eqn.outvars, outs, strict=True)), self.steps)
        if place in self.places.biases and isinstance(outs[0], Value):
            return [self._with_bias(ins, outs[0])]
        kernel = self.places.kernels.get(place)
        if kernel is None or not isinstance(outs[0], Value):
            return outs
        x, weight = ins[1 - kernel.use.operand], ins[kernel.use.operand]

        def made(scale: float) -> Value:
            """The product with a kernel of this scale, where that is a leaf: a scale beside it would be another node."""
            if kernel.layer_axis is not None or not is_weight(weight):
                return Value(affine(outs[0].node, self._laws.applied(kernel, scale), 0.0), outs[0].dims)
            again = list(ins)
            again[kernel.use.operand] = self._laws.scaled(kernel, weight, scale)
            return super(Calibrating, self).equation(eqn, again)[0]

        return [self._scaled(kernel, outs[0], x if isinstance(x, Value) else None, made)]

    def follow(self, walked: Walkable) -> None:
        """Walk the program; of products that modules put out, note the rows as a prediction names them."""
        self._at = Where(Rows(scopes=False, equations=()))  # laws were read before
        captured = walked.captured(self)
        self._rows = list(joined(self._at.rows.made, captured))
        for row in self._rows:
            out, path = row.value, row.path
            at, _ = self._bare.get(out.node.id, (None, out)) if isinstance(out, Value) else (None, out)
            for k in [] if at is None else self._alike[self._made[at]]:
                if self.found[k].row is None:  # the modules around it come later
                    self.found[k] = self.found[k]._replace(row=path)

    def gradients(self) -> list[float | None]:
        """Second moment of the gradient at each product, for one of 1 at the model's output; None where it is not known."""
        try:
            by_row = gradients_of(self, self._rows, {})
        except (PredictionError, *UNCOVERED):
            by_row = {}
        return [None if one.row not in by_row else by_row[one.row][0] for one in self.found]

    def _goal(self, kernel: Kernel, steps: tuple[int, ...]) -> float:
        """The second moment that a product is to have here, so that a prediction finds the target."""
        return self._target * self._corrections.get((kernel.number, steps), 1.0)

    def _scaled(self, kernel: Kernel, out: Value, x: Value | None, scaled: Callable[[float], Value]) -> Value:
        """The product, with the kernel's standard deviation set; `scaled` makes it, from the factor."""
        second, typical, (low, high) = of_one_draw(out.node)
        if not math.isfinite(second) or not typical > 0:
            return out
        is_exact = provenance(out.node)[0] == "exact"
        reach = max(high / typical, typical / low if low > 0 else math.inf)
        steps = tuple(self.steps) if kernel.layer_axis is not None else ()
        forward = math.sqrt(self._goal(kernel, steps) / typical)
        backward = None if self._direction == "forward" or x is None else self._backward(kernel, x)
        if backward is None or self._direction == "forward":
            scale = forward
        else:
            scale = backward if self._direction == "backward" else math.sqrt(forward * backward)
        if kernel.is_tied:
            scale = self._tied.get(kernel.path, scale)
        applied = self._laws.applied(kernel, scale)
        self.found.append(Set(kernel, steps, scale, forward, backward, applied**2 * typical, reach, is_exact))
        made = scaled(scale)
        self._made.append(made.node.id)
        self._alike.setdefault(made.node.id, []).append(len(self.found) - 1)
        self._products[kernel.number] = made.node
        self._bare[made.node.id] = len(self.found) - 1, out
        return made

    def _with_bias(self, ins: list[Any], out: Value) -> Value:
        """A sum; of a product and a bias that is not zero, with the kernel's standard deviation set anew."""
        for one, other in (ins, ins[::-1]):
            if not (isinstance(one, Value) and isinstance(other, Value)) or one.node.id not in self._bare:
                continue
            at, product = self._bare[one.node.id]
            if one.dims != product.dims:  # reshaped: what is added, such as a table of positions, is no bias of the layer
                continue
            made = self.found[at]
            if other.constant == 0:
                self._bare.setdefault(out.node.id, (at, out))
            if other.constant == 0 or made.kernel.is_tied or self._direction != "forward":
                continue
            scale, bare, goal = made.scale, out, self._goal(made.kernel, made.steps)
            for _ in range(_TRIES):
                applied = self._laws.applied(made.kernel, scale)
                scaled = Value(affine(product.node, applied, 0.0), product.dims)
                out = self.elementwise("add", scaled, other)
                typical = of_one_draw(out.node)[1]
                own = typical - applied**2 * goal / made.forward**2
                if abs(typical / goal - 1) < _CLOSE:
                    break
                if own >= goal:  # no scale does it: the product alone has the target
                    self.biased[made.kernel.path] = own
                    return bare
                scale = made.forward * math.sqrt(1 - own / goal)
            self.found[at] = made._replace(scale=scale, forward=scale)
            self._bare[out.node.id] = at, product
            self._products[made.kernel.number] = out.node
            return out
        return out

    def _backward(self, kernel: Kernel, x: Value) -> float | None:
        """The factor on the standard deviation 1/√fan_in that keeps the gradient from a product to those before it."""
        # In a later step of a loop: what was made since this kernel's last product. What came before is reached through it.
        since = self._products[kernel.number].id if kernel.number in self._products else 0
        before = [made for n in kernel.use.reads if (made := self._products.get(n)) is not None and made.id >= since]
        if not before:
            return None
        ones = np.zeros(x.node.frame_types)
        ones[tuple(slice(0, axis.classes) for axis in x.node.axes)] = 1.0
        passed = [gradient for gradient, *_ in cotangents([(x.node, ones)], before).values()]
        if not passed or not max(passed) > 0:
            return None
        fan_out = kernel.use.fan_out / max(1, len(parts_of(kernel.use)[1]))
        return math.sqrt(kernel.use.fan_in / (fan_out * max(passed)))
