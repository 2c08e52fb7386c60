"""Findings about single parameters, from what the program does with them and the laws they are drawn from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from varscale import gaussian
from varscale.auditing.findings import WARNING_FACTOR, Finding, Level
from varscale.initializers.fans import Fans, Mode, compute_fans
from varscale.initializers.fixed import normal
from varscale.initializers.scaling import for_activation, lecun_normal, variance_scaling
from varscale.initializers.structured import orthogonal, zeros
from varscale.report import Report, Row, Weight
from varscale.usage.parameters import OneUse, ParameterUses

_ACTIVATIONS = {
    "relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu, "swish": jax.nn.silu, "tanh": jax.numpy.tanh,
    "sigmoid": jax.nn.sigmoid, "elu": jax.nn.elu, "selu": jax.nn.selu, "softplus": jax.nn.softplus, "mish": jax.nn.mish,
    "sin": jax.numpy.sin, "relu6": jax.nn.relu6,
}  # fmt: skip
_FAR = math.log(WARNING_FACTOR)
_SHAPE_LAWS = (1.0, 2.0, 1 / 3)  # variance times fan of lecun, he and PyTorch's uniform
_ALIVE = 0.01  # share of positive inputs below which a rectifier's units are called dead
_FEW_STEPS, _CHAOTIC = 4, 4.0  # steps of a loop over time; factor of the second moment in each
_PLACED = ("sin", "cos", "sigmoid", "logistic", "softplus", "exp", "hard_sigmoid")  # functions whose shift has a meaning
_BOUNDED = {"tanh": 2.0, "sigmoid": 4.0, "hard_tanh": 1.0, "erf": 1.5}  # beyond which the function is flat


@dataclasses.dataclass(frozen=True)
class Map:
    """A parameter used as a linear map, and the law it is drawn from."""

    parameter: ParameterUses
    use: OneUse
    weight: Weight

    @property
    def path(self) -> str:
        return self.parameter.path

    @property
    def module(self) -> str:
        return self.path.rpartition("/")[0]

    @property
    def plain(self) -> bool:
        """Whether it is read once, ends no residual branch, and no norm takes its scale away."""
        return self.parameter.times == len(self.parameter.uses) and self.use.ends is None and not self.use.normalised_after

    @property
    def second_moment(self) -> float:
        """E[w²]."""
        return (self.weight.variance or 0.0) + (self.weight.mean or 0.0) ** 2

    @property
    def scale(self) -> float | None:
        """Constant that the program multiplies it by, before, in or after the sum; None where the trace does not tell."""
        scales = (self.use.input_scale, self.use.kernel_scale, self.use.output_scale)
        return None if None in scales else math.prod(scale for scale in scales if scale is not None)

    @property
    def keeps(self) -> float:
        """s² · fan_in · E[w²] · E[φ(z)²]: the factor from one map's output to the next, at a unit second moment."""
        function, scale = _ACTIVATIONS.get(self.use.before), self.scale or 1.0
        kept = 1.0 if function is None else float(gaussian.second_moment(function))
        return scale**2 * self.use.fan_in * self.second_moment * kept


def maps(parameters: Sequence[ParameterUses], weights: Mapping[str, Weight]) -> list[Map]:
    """The random parameters that are linear maps."""
    found = []
    for parameter in parameters:
        use, weight = parameter.main, weights.get(parameter.path)
        if use is not None and weight is not None and weight.variance and use.reduction_axes and use.role != "embedding":
            found.append(Map(parameter, use, weight))
    return found


def readouts(parameters: Sequence[ParameterUses]) -> set[str]:
    """The modules whose kernels make the model's outputs."""
    return {p.path.rpartition("/")[0] for p in parameters if any(use.role == "readout" for use in p.uses)}


def output_scales(parameters: Sequence[ParameterUses]) -> dict[str, float]:
    """By module, the constant that the program multiplies the output of its kernel by, where it is known and not 1."""
    kernels = [(p.path.rpartition("/")[0], p.main) for p in parameters if p.main is not None and p.main.reduction_axes]
    return {module: use.output_scale for module, use in kernels if use.output_scale not in (None, 1.0)}


@dataclasses.dataclass(frozen=True)
class Mend:
    """What mends a finding.

    Attributes:
        line: the line to write.
        scheme: the same as laws by path; empty where it is no initializer.
    """

    line: str
    scheme: Mapping[str, Any]


def signal_mend(found: Sequence[Map], parameters: Sequence[ParameterUses], additions: int) -> Mend:
    """What keeps the signal: gains that fit, or residual branches that end smaller."""
    off = _gains_off(found)
    # A first layer has no activation to make up for; that a law is He's there does no harm.
    first = [m for m in found if m.use.reads_input and not m.use.before and m.plain and abs(math.log(m.keeps)) > _FAR]
    if off or first:
        lines, scheme = [], {m.path: for_activation(_ACTIVATIONS[m.use.before]) for m in off}
        if off:
            function = off[0].use.before
            lines.append(f"kernel_init=vs.for_activation({_name(function)})" + (f" after {function}" if len(off) > 1 else ""))
        if first:
            lines.append("kernel_init=vs.lecun_normal()" + " in the first layer" * bool(off))
        return Mend(", ".join(lines), scheme | {m.path: lecun_normal() for m in first})
    ends = [m for m in found if m.use.ends is not None]
    if ends and additions:
        # Whatever it was drawn from: of variance 1/(fan_in · additions) the branches together add as much as one does.
        scheme = {m.path: normal((m.use.fan_in * additions) ** -0.5) for m in ends}
        return Mend(f"what ends a branch: kernel_init=vs.scaled(vs.lecun_normal(), {additions}**-0.5)", scheme)
    # Laws that are none of independent numbers, such as orthogonal, have no variance to compare.
    others = {p.path: p.main.before for p in parameters if p.role == "hidden" and p.main and p.main.before in _ACTIVATIONS}
    if others and not additions:
        function = next(iter(others.values()))
        line = f"kernel_init=vs.for_activation({_name(function)}) after {function}"
        return Mend(line, {path: for_activation(_ACTIVATIONS[before]) for path, before in others.items()})
    return Mend("draw the layers by vs.calibrate(model, x), or add norms", {})


def _gains_off(found: Sequence[Map]) -> list[Map]:
    """The hidden maps, read once and outside of branches' ends, that do not give back what the activation takes away."""
    return [
        m
        for m in found
        if m.use.before in _ACTIVATIONS
        and m.use.role == "hidden"
        and m.plain
        and m.scale is not None
        and not 0.9 < m.keeps < 1.1
    ]


def check_fans(found: Sequence[Map]) -> Iterator[Finding]:
    """Laws whose variance follows the fan of the shape where the program uses another."""
    for m in found:
        shape = m.parameter.shape
        if len(shape) < 2:
            continue
        declared = compute_fans(shape)
        use_out = m.use.fan_out / max(1, len(m.use.parts))
        modes: tuple[tuple[Mode, float, float], ...] = (
            ("fan_in", declared.fan_in, m.use.fan_in),
            ("fan_avg", (declared.fan_in + declared.fan_out) / 2, (m.use.fan_in + use_out) / 2),
        )
        if any(_is_usual(m.second_moment * of_use) for _, _, of_use in modes):
            continue
        for mode, of_shape, of_use in modes:
            if not _is_usual(m.second_moment * of_shape) or math.isclose(of_shape, of_use, rel_tol=5e-3):
                continue
            ratio = of_use / of_shape
            told = f"its variance is that of {mode} {of_shape:.4g}, which its shape has; the program sums {of_use:.4g} terms: "
            told += f"what it puts out has {ratio:.3g} times the second moment that its law intends."
            fans = f"vs.Fans({m.use.fan_in:.6g}, {use_out:.6g})"
            scale = m.second_moment * of_shape
            law = variance_scaling(scale, mode, "normal", fans=Fans(m.use.fan_in, use_out))
            yield Finding(
                "VS104", _by_factor(ratio) if not m.use.normalised_after else "info", m.path, told, ratio,
                f'kernel_init=vs.variance_scaling({scale:.3g}, "{mode}", fans={fans})', {m.path: law},
            )  # fmt: skip
            break


def _is_usual(product: float) -> bool:
    """Whether variance times fan is that of a usual law."""
    return any(math.isclose(product, law, rel_tol=1e-3) for law in _SHAPE_LAWS)


def check_gains(found: Sequence[Map], *, moves: bool) -> Iterator[Finding]:
    """Variances that do not give back what the activation before them takes away.

    Args:
        found: the model's maps.
        moves: whether the signal of its layers was found to vanish or explode: then this is why.
    """
    by_function: dict[str, list[Map]] = {}
    for m in _gains_off(found):
        by_function.setdefault(m.use.before, []).append(m)
    for function, off in by_function.items():
        whole = math.exp(sum(math.log(m.keeps) for m in off))
        worst = off[0]
        level: Level = "warning" if moves and not 1 / WARNING_FACTOR < whole < WARNING_FACTOR else "info"
        told = f"after {function} it multiplies the second moment by {worst.keeps:.3g}"
        told += f" at a second moment of 1, as in {len(off) - 1} more" if len(off) > 1 else ""
        kept = float(gaussian.second_moment(_ACTIVATIONS[function]))
        told += f": {function} keeps {kept:.3g} of it, and fan_in · Var[w] is {worst.use.fan_in * worst.second_moment:.3g}"
        told += "." if worst.scale == 1 else f", which the program multiplies by {worst.scale or 1:.3g}²."
        yield Finding(
            "VS103", level, worst.path, told, worst.keeps, f"kernel_init=vs.for_activation({_name(function)})",
            {m.path: for_activation(_ACTIVATIONS[function]) for m in off},
        )  # fmt: skip


def rank_mend(parameters: Sequence[ParameterUses], weights: Mapping[str, Weight]) -> Mend:
    """What keeps samples apart: positions that are no larger than what they are added to, else norms and branches."""

    def squares(role: str) -> list[tuple[float, str]]:
        found = [(p.path, weights[p.path]) for p in parameters if p.role == role and p.path in weights]
        return sorted(((w.variance or 0.0) + (w.mean or 0.0) ** 2, path) for path, w in found if w.variance)

    positions, tables = squares("position"), squares("embedding")
    if positions and tables and positions[-1][0] > 30 * tables[-1][0] > 0:
        path, deviation = positions[-1][1], math.sqrt(tables[-1][0])
        return Mend(
            f"draw the positions {path!r} like the tokens: nn.initializers.normal({deviation:.3g})", {path: normal(deviation)}
        )
    return Mend("normalize (nn.LayerNorm), add residual branches, or use an activation whose slope at 0 is nearer 1", {})


def check_recurrence(found: Sequence[Map]) -> Iterator[Finding]:
    """Kernels that a loop over time applies to its own state, and that multiply it: the state saturates."""
    for m in found:
        gain = m.use.fan_in * m.second_moment
        if m.use.times < _FEW_STEPS or m.use.reads_input or m.use.normalised_after or gain <= _CHAOTIC:
            continue
        told = f"a loop applies it {m.use.times} times, each time with fan_in · Var[w] = {gain:.3g}: states saturate, and "
        told += f"gradients through time grow or vanish by up to {math.sqrt(gain):.3g} a step."
        yield Finding("VS103", "warning", m.path, told, gain, "recurrent_kernel_init=vs.orthogonal()", {m.path: orthogonal()})


def _name(function: str) -> str:
    return "jnp.tanh" if function == "tanh" else "jnp.sin" if function == "sin" else f"jax.nn.{function}"


def check_uses(parameters: Sequence[ParameterUses]) -> Iterator[Finding]:
    """Parameters that nothing reads.

    A vector or scalar among a thousand times as many numbers costs nothing, and is often read elsewhere: a mask token in
    masked training, a temperature in the loss.
    """
    numbers = sum(math.prod(p.shape) for p in parameters)
    for p in parameters:
        if p.uses:
            continue
        is_small = max(p.shape, default=1) == math.prod(p.shape) < numbers / 1000
        told = "the forward pass never reads it: it takes memory, and no gradient reaches it."
        yield Finding("VS116", "info" if is_small else "warning", p.path, told, None, "remove it, or read it in __call__")


def check_biases(
    parameters: Sequence[ParameterUses], weights: Mapping[str, Weight], report: Report, worst: Level | None
) -> Iterator[Finding]:
    """Biases that are drawn at random; by how much they raise the second moment of what they are added to.

    Those of layers that read the input place the units of a net of few coordinates, those before a sine are its phases, those
    of gates their time constants, and those of a readout no later layer sees: these are only told.

    Args:
        parameters: the model's.
        weights: their laws.
        report: the predicted rows.
        worst: the level at which the signal was found to change over the depth.
    """
    rows = {row.path: row for row in report.rows}
    siblings = {p.path.rpartition("/")[0]: p.main for p in parameters if p.main is not None and p.main.reduction_axes}
    raised: dict[str, float] = {}
    for p in parameters:
        module, _, name = p.path.rpartition("/")
        weight, row, beside = weights.get(p.path), rows.get(module), siblings.get(module)
        if p.role != "vector" or name not in ("bias", "b") or weight is None or not weight.variance:
            continue
        placing = beside is None or beside.reads_input or beside.role == "readout" or beside.after in _PLACED
        rest = 0.0 if row is None else row.second_moment - weight.variance
        raised[p.path] = 1.0 if row is None or placing or row.error_bound > 0.5 else 1 + weight.variance / max(rest, 1e-300)
    if not raised:
        return
    path = max(raised, key=lambda path: raised[path])
    more = f" and {len(raised) - 1} more" if len(raised) > 1 else ""
    told = f"{path}{more}: biases drawn at random add the same number to every sample, which makes samples alike; zeros are "
    told += "usual."
    level: Level = "info"
    if raised[path] >= 2:
        told += f" What it is added to has {raised[path]:.3g} times the second moment that it has without."
        level = worst or "warning"
    yield Finding(
        "VS117", level, path, told, raised[path] if raised[path] > 1 else float(len(raised)), "bias_init=vs.zeros",
        dict.fromkeys(raised, zeros),
    )  # fmt: skip


def check_units(parameters: Sequence[ParameterUses], report: Report) -> Iterator[Finding]:
    """Functions that are flat where most of their inputs are: dead units, saturated units."""
    rows = {row.path: row for row in report.rows}
    for p in parameters:
        use, row = p.main, rows.get(p.path.rpartition("/")[0])
        if use is None or not use.reduction_axes or use.role == "embedding" or row is None or not row.path:
            continue
        if row.error_bound > 0.5 or not 0 < row.second_moment < math.inf:
            continue
        if use.after in ("relu", "relu6", "relu squared"):
            yield from _dead(p.path, use, row)
            continue
        flat = _BOUNDED.get(use.after)
        if flat is None or use.function_scale is None:
            continue
        square = row.second_moment * use.function_scale**2
        if (share := math.erfc(flat / math.sqrt(2 * square))) > 0.5:
            told = f"{share:.0%} of what {use.after} reads from it lies beyond ±{flat:g}, where the function is flat: "
            told += f"gradients through it are small (E[x²] is {square:.3g})."
            line, law = "kernel_init=vs.lecun_normal()", lecun_normal()
            if use.before in _ACTIVATIONS:
                line = f"kernel_init=vs.for_activation({_name(use.before)})"
                law = for_activation(_ACTIVATIONS[use.before])
            if use.function_scale != 1:
                scale = 1 / use.function_scale**2
                line, law = f"kernel_init=vs.variance_scaling({scale:.4g})", variance_scaling(scale)
            yield Finding("VS106", "warning", p.path, told, share, line, {p.path: law})


def _dead(path: str, use: OneUse, row: Row) -> Iterator[Finding]:
    """A finding where hardly any input of a rectifier is positive."""
    share = 0.5 * math.erfc(-row.mean / math.sqrt(2 * row.variance)) if row.variance else float(row.mean > 0)
    if share < _ALIVE:
        told = f"only {share:.2g} of what {use.after} reads from it is positive (mean {row.mean:.3g}, deviation "
        told += f"{math.sqrt(row.variance):.3g}): the other units are dead, they put out 0 and get no gradient."
        bias = f"{path.rpartition('/')[0]}/bias"
        yield Finding("VS106", "warning", path, told, share, "bias_init=vs.zeros", {bias: zeros})


def _by_factor(ratio: float) -> Level:
    """The level of a cause, by how far it moves a row's second moment."""
    return "warning" if not 0.5 < ratio < 2 else "info"
