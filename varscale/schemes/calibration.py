"""`calibrate`: a plan under which what every kernel makes has a given typical second moment, by prediction alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from varscale.initializers.distributions import DistributionName
from varscale.initializers.distributions import distribution as checked_distribution
from varscale.initializers.initializer import checked_number
from varscale.initializers.structured import Constant
from varscale.programs import faces
from varscale.programs.patterns import Pattern, rows_caught
from varscale.schemes.calibrating_walk import Calibrating, Direction, Laws, Place, Set, places_of
from varscale.schemes.laws import graded
from varscale.schemes.plan import Plan, PlannedLeaf
from varscale.schemes.scheme import Choice, Scheme, Subject, spread
from varscale.theory.graph.store import UNCOVERED, PredictionError
from varscale.theory.interpreter.parameters import abstract
from varscale.theory.interpreter.predict import predict, walkable
from varscale.usage.parameters import ParameterUses

_DIRECTIONS = ("forward", "backward", "both")
_WALKS = 30  # over a model with tied kernels
_RESOLVED = 6e-8  # what float32 resolves of the logarithm of a tied kernel's standard deviation
_CHECKS = 10  # predictions under the plan, where parts of it are drawn or approximated
_OFF = 5e-7  # of the target, where corrections end
_TOLERANCE = 1e-6  # of the target, beyond which a plan's notes name the row
_WIDE = 4.0  # a factor that a single draw may be off before the plan warns
_FAR = 100.0  # a factor between second moments of gradients, ten in size, likewise; of signals where gradients are kept
_KERNELS = frozenset({"input", "hidden", "readout", "depthwise", "expert"})


def calibrate(
    model: Any,
    x: Any,
    *,
    target: float = 1.0,
    direction: Direction = "forward",
    rows: Pattern | Sequence[Pattern] = "**",
    distribution: DistributionName = "truncated_normal",
    params: Any = None,
    method: str | None = None,
) -> Plan:
    """A plan that gives each kernel the variance at which what it makes has the typical second moment `target`.

    Nothing is drawn and no data is needed: the moments of `vs.predict` are followed through the model once, and when the
    product of a kernel and its input is met, the kernel's variance is set. The input of a kernel is what the kernels before it
    make of theirs, so activations, residual streams that grow with depth, attention, norms, borders of convolutions and shared
    inputs are taken as they are. Afterwards `vs.predict(model, x, scheme=plan)` gives every such row `typical` = target. The
    TYPICAL second moment is that of most draws; where the activation's fixed point repels (gelu, silu), the mean over draws is
    ruled by rare networks.

    Kernels of layers that a scan stacks get a variance a layer. A kernel that is used in several places has one variance: the
    geometric mean of what it makes is the target. Kept as declared: biases, norms, tables that are looked up, kernels that are
    declared to be zero or another constant, and kernels that a loop over time uses at each step (`vs.lsuv` rescales these).
    Where the walk rests on draws or approximations, a prediction under the plan checks it and mends what is off. A model that
    `vs.predict` draws as a whole is calibrated by predictions alone, each kernel by the rows of its module, and forward only.

    Args:
        model: a linen module, an nnx factory `lambda rngs: Net(..., rngs=rngs)`, an nnx instance, or a plain function
            f(params, *args).
        x: one input or `vs.inputs(...)`, as `vs.predict` takes them: described (`jax.ShapeDtypeStruct`, `vs.Moments`) or
            arrays.
        target: the typical second moment; finite and positive.
        direction: "forward": as above. "backward": the variance at which the gradient that a kernel sends to the kernels
            before it has the second moment of the gradient that it gets; 1/fan_out for linear layers. Kernels that read the
            model's input have none before them and get the forward one. "both": the geometric mean of the two variances.
        rows: patterns of the kernels, by the path of the kernel or of a module that it is in. Others keep their declared laws.
        distribution: of the weights: "truncated_normal", "normal", "uniform" or "rademacher".
        params: for a plain function, as for `vs.predict`.
        method: the method to trace in place of `__call__`.

    Returns:
        Plan: its column `why` tells the forward and the backward standard deviation; its notes warn from the depth on where
        single draws differ from the target by more than a factor of 4.

    Raises:
        TypeError: the model or an input is of no known kind.
        ValueError: an argument is outside its range, the model cannot be predicted, has no kernels, or a pattern matches none;
            the direction is not "forward" and `vs.predict` draws the model as a whole.

    Example:
        >>> import flax.linen as nn, jax, varscale as vs
        >>> net = nn.Sequential([nn.Dense(256), nn.gelu, nn.Dense(256), nn.gelu, nn.Dense(10)])
        >>> x = jax.ShapeDtypeStruct((64, 784), "float32")
        >>> plan = vs.calibrate(net, x)
        >>> [round(row.typical, 6) for row in vs.predict(net, x, scheme=plan, backward=False).rows if "layers" in row.path]
        [1.0, 1.0, 1.0]
    """
    target = checked_number("target", target, above=0.0)
    if direction not in _DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(map(repr, _DIRECTIONS))}, not {direction!r}")
    checked_distribution(distribution)
    words = f"calibrate(target={target:g}, direction={direction!r})"
    base, kept = _unit_plan(words, model, x, rows, distribution, params, method)
    given, laws = faces.as_inputs(x), Laws(distribution)
    tied, corrections = _Tied(), dict[Place, float]()
    best: Plan | None = None
    least = math.inf
    for _ in range(_CHECKS):
        found, biased = [], {}
        for _ in range(_WALKS):
            interpreter = Calibrating(target, direction, tied.scales, laws, corrections)
            walked = walkable(interpreter, faces.program(model, method=method), given, params, base)
            interpreter.places = places_of(walked, {leaf.path: leaf for leaf in base if leaf.why == _CHOSEN})
            try:
                interpreter.follow(walked)
            except (PredictionError, *UNCOVERED) as error:
                if direction != "forward":
                    raise ValueError(
                        f"direction={direction!r} must follow gradients from kernel to kernel, and vs.predict "
                        f"draws this one as a whole ({error}): direction='forward' calibrates it by the rows of its modules"
                    ) from error
                return _by_predictions(base, kept, model, x, target, distribution, params, method)
            found, biased = interpreter.found, interpreter.biased
            missing = {leaf.path for leaf in base if leaf.why == _CHOSEN} - {one.kernel.path for one in found}
            if missing:  # the others are calibrated with these as they are
                leaves = tuple(kept[leaf.path] if leaf.path in missing else leaf for leaf in base)
                base = dataclasses.replace(base, leaves=leaves)
            elif tied.settled(found, target, corrections):
                break
        leaves = tuple(_planned(leaf, found, target, distribution) if leaf.why == _CHOSEN else leaf for leaf in base)
        notes = [*_warnings(found, biased), *_far(found, interpreter.gradients(), target, direction)]
        plan = dataclasses.replace(base, leaves=leaves, notes=(*base.notes, *notes))
        if direction != "forward" or all(one.is_exact for one in found):
            return plan
        report = predict(model, x, params=params, scheme=plan, backward=False, method=method)
        ratios = _ratios({row.path: row.typical for row in report.rows}, found, target, biased)
        off = max((abs(ratio - 1) for ratio in ratios.values()), default=0.0)
        if best is None or off < least:
            best, least = dataclasses.replace(plan, notes=(*plan.notes, *_missed(found, ratios))), off
        if off <= _OFF:
            break
        # What is right stays as it is, to the bit: choices that are drawn (the largest k) jump where their numbers hardly move.
        wrong = {place: ratio for place, ratio in ratios.items() if abs(ratio - 1) > _OFF / 2}
        corrections |= {place: corrections.get(place, 1.0) / ratio for place, ratio in wrong.items()}
    assert best is not None
    return best


def _ratios(
    typicals: Mapping[str, float | None], found: Sequence[Set], target: float, biased: Mapping[str, float]
) -> dict[Place, float]:
    """By how much each product's row, under the plan, is more than the target.

    Where the walk draws a part of the program, or doubts a number, the plan's own prediction may draw it otherwise. Of a tied
    kernel it is the geometric mean over its uses, if all of them have rows.
    """
    logs: dict[str, list[tuple[Place, float | None]]] = {}
    for one in found:
        typical = None if one.row is None else typicals.get(one.row)
        if one.kernel.path not in biased:
            group = one.kernel.path if one.kernel.is_tied else f"{one.kernel.path}@{one.place}"
            logs.setdefault(group, []).append((one.place, math.log(typical / target) if typical else None))
    ratios: dict[Place, float] = {}
    for group in logs.values():
        told = [log for _, log in group if log is not None]
        if len(told) == len(group):
            ratios |= {place: math.exp(sum(told) / len(told)) for place, _ in group}
    return ratios


def _by_predictions(
    base: Plan, kept: Mapping[str, PlannedLeaf], model: Any, x: Any, target: float, distribution: DistributionName,
    params: Any, method: str | None,
) -> Plan:  # fmt: skip
    """The plan of a model through which no walk leads: the scales at which predictions have the target, by Broyden's method.

    In logarithms a row is nearly linear in the scales: its own kernel's counts once, those before it once or not at all.
    """

    def planned(logs: Mapping[str, float]) -> Plan:
        laws = {path: spread(distribution, base[path].fan_in ** -0.5 * math.exp(log)) for path, log in logs.items()}
        leaves = (
            dataclasses.replace(leaf, law=laws[leaf.path], why=f"typical E[y²] = {target:g}, by predictions of the whole")
            if leaf.path in laws
            else kept.get(leaf.path, leaf)
            for leaf in base
        )
        return dataclasses.replace(base, leaves=tuple(leaves))

    def rows_of(plan: Plan) -> dict[str, list[Any]]:
        report = predict(model, x, params=params, scheme=plan, backward=False, method=method)
        rows: dict[str, list[Any]] = {}
        for row in report.rows:
            rows.setdefault(row.path.split("@")[0].split("#")[0], []).append(row)
        paths = [leaf.path for leaf in base]
        made = {path: rows.get(path.rpartition("/")[0], []) for path in kept if _alone(path, paths)}
        return {path: of for path, of in made.items() if of and all(row.typical and row.typical > 0 for row in of)}

    def off(rows: Mapping[str, list[Any]]) -> np.ndarray:
        """Half the logarithm of each kernel's rows over the target."""
        return np.array([0.5 * np.mean([math.log(row.typical / target) for row in rows[path]]) for path in paths])

    first = rows_of(planned(dict.fromkeys(kept, 0.0)))
    paths = list(first)
    if not paths:
        raise ValueError(
            "model is drawn as a whole, and no module of it has one kernel and a row: use vs.lsuv on drawn weights"
        )
    logs, answer, found, inverse = np.zeros(len(paths)), off(first), first, np.eye(len(paths))
    for _ in range(_WALKS):
        if np.max(np.abs(np.expm1(2 * answer))) <= _OFF:
            break
        step = -inverse @ answer
        logs = logs + step
        found = rows_of(planned(dict(zip(paths, logs, strict=True))))
        change, answer = off(found) - answer, off(found)
        inverse += np.outer(step - inverse @ change, step @ inverse) / (step @ inverse @ change)
    ratios = {path: math.exp(2 * log) for path, log in zip(paths, answer, strict=True)}
    reach = {path: max(max(row.band[1] / row.typical, row.typical / row.band[0]) for row in found[path]) for path in paths}
    plan = planned(dict(zip(paths, logs, strict=True)))
    return dataclasses.replace(plan, notes=(*plan.notes, *_wide(list(reach.items())), *_told_off(ratios)))


def _alone(path: str, paths: Sequence[str]) -> bool:
    """Whether a kernel's module holds it, a bias at most and no modules: then the module's row is what the kernel makes."""
    module = path.rpartition("/")[0]
    beside = [other.removeprefix(f"{module}/") for other in paths if other.startswith(f"{module}/") and other != path]
    return bool(module) and beside in ([], ["bias"])


def _missed(found: Sequence[Set], ratios: Mapping[Place, float]) -> list[str]:
    """The products that corrections did not bring to the target: the model draws something that jumps with its scale."""
    return _told_off({one.row or one.kernel.path: ratios.get(one.place, 1.0) for one in found})


def _told_off(ratios: Mapping[str, float]) -> list[str]:
    """The rows whose typical second moment is not the target."""
    return [
        f"{row}: its typical second moment is {ratio:.7g} times the target by vs.predict. It follows from drawn numbers that "
        f"jump where this scale moves, and {_CHECKS} corrections did not settle it; vs.lsuv rescales drawn weights."
        for row, ratio in ratios.items()
        if abs(ratio - 1) > _TOLERANCE
    ]


_CHOSEN = "calibrated"


def _unit_plan(
    words: str, model: Any, x: Any, rows: Any, distribution: DistributionName, params: Any, method: str | None
) -> tuple[Plan, dict[str, PlannedLeaf]]:
    """The plan that gives the kernels that will be calibrated the variance 1/fan_in; and these as declared."""
    caught: list[set[str]] = []
    declared: dict[str, Any] = {}

    def rule(subject: Subject) -> Choice:
        if (kept := _kept(subject.uses)) is not None:
            return subject.kept(kept)
        if not caught:
            kernels = [other.path for other in subject.whole if _kept(other) is None]
            caught.append(set(rows_caught(rows, kernels, "rows")))
        if subject.uses.path not in caught[0]:
            return subject.kept("as declared: not among rows")
        if isinstance(subject.declared, Constant):
            return subject.kept("as declared: a constant")
        declared[subject.uses.path] = subject.declared
        return Choice(spread(distribution, subject.fan_in**-0.5), _CHOSEN)

    base = Scheme(words, rule)(model, x, params=abstract(params), method=method)
    if not any(leaf.why == _CHOSEN for leaf in base):
        raise ValueError("model has no kernel whose variance could be set: none multiplies an activation outside of a loop")
    why = "as declared: what it makes is zero, or predicted by draws of a whole; vs.lsuv rescales it"
    return base, {path: dataclasses.replace(base[path], law=law, why=why) for path, law in declared.items()}


def _kept(parameter: ParameterUses) -> str | None:
    """Why a parameter keeps its declared law; None for a kernel."""
    uses = [use for use in parameter.uses if use.reduction_axes]
    if any(use.role == "embedding" for use in uses):
        return "as declared: a table that is looked up"
    if not uses or parameter.role not in _KERNELS:
        return "as declared"
    if any(use.normalised_kernel for use in uses):
        return "as declared: the program normalises it, so that its scale has no effect"
    if any(use.times > 1 for use in uses):
        return "as declared: used at each step of a loop; vs.lsuv rescales it"
    return None


class _Tied:
    """The scales of kernels with several uses, walk by walk, until the geometric mean of what they make is the target."""

    def __init__(self) -> None:
        self.scales: dict[str, float] = {}
        self._slopes: dict[str, float] = {}
        self._last: dict[str, tuple[float, float]] = {}

    def settled(self, found: Sequence[Set], target: float, corrections: Mapping[Place, float]) -> bool:
        """Whether they are right; sets the next ones."""
        by_path: dict[str, list[Set]] = {}
        for one in found:
            if one.kernel.is_tied:
                by_path.setdefault(one.kernel.path, []).append(one)
        done = True
        for path, sets in by_path.items():
            level = float(np.mean([0.5 * math.log(one.typical / (target * corrections.get(one.place, 1.0))) for one in sets]))
            scale = self.scales.get(path, sets[0].scale)
            first = path not in self.scales
            if first:  # in the first walk each use had a scale of its own
                self.scales[path], done = math.exp(float(np.mean([math.log(one.scale) for one in sets]))), False
                self._slopes[path] = 1.0
                continue
            if path in self._last and abs(math.log(scale) - self._last[path][0]) > 1e-12:
                step = math.log(scale) - self._last[path][0]
                self._slopes[path] = float(np.clip((level - self._last[path][1]) / step, 0.3, 1e4))
            self._last[path] = math.log(scale), level
            if abs(level) > _RESOLVED * min(self._slopes[path], 4.0):
                self.scales[path], done = scale * math.exp(-level / self._slopes[path]), False
        return done


def _planned(leaf: PlannedLeaf, found: Sequence[Set], target: float, distribution: DistributionName) -> PlannedLeaf:
    """The leaf with its law."""
    mine = [one for one in found if one.kernel.path == leaf.path]
    unit = mine[0].kernel.unit
    if mine[0].kernel.layer_axis is None:
        law = spread(distribution, unit * mine[0].scale)
    else:
        scales = [one.scale for one in sorted(mine, key=lambda one: one.steps)]
        law = graded(spread(distribution, unit), scales, mine[0].kernel.layer_axis)
    return dataclasses.replace(leaf, law=law, why=_why(mine, unit, target))


def _why(mine: Sequence[Set], unit: float, target: float) -> str:
    """What a leaf's law was set for."""

    def told(factors: Sequence[float]) -> str:
        low, high = unit * min(factors), unit * max(factors)
        return f"{low:.4g}" if high - low <= 1e-9 * high else f"{low:.4g} to {high:.4g}"

    backward = [one.backward for one in mine if one.backward is not None]
    words = f"typical E[y²] = {target:g}" + (f" in the geometric mean of {len(mine)} uses" if mine[0].kernel.is_tied else "")
    if backward:
        words = f"forward std {told([one.forward for one in mine])}, backward std {told(backward)}"
    return words


def _warnings(found: Sequence[Set], biased: Mapping[str, float]) -> list[str]:
    """Biases that are larger than the target, and from which product on single draws differ widely from it."""
    told = [
        f"{path}: the bias beside it has the second moment {own:.4g} already, so the product alone has the target."
        for path, own in biased.items()
    ]
    return told + _wide([(one.name, one.reach) for one in found])


def _wide(reach: Sequence[tuple[str, float]]) -> list[str]:
    """A warning from the kernel on, in order of depth, whose product differs widely from draw to draw."""
    wide = [(k, name) for k, (name, factor) in enumerate(reach) if factor > _WIDE]
    if not wide:
        return []
    k, name = wide[0]
    return [
        f"From {name} on (kernel {k + 1} of {len(reach)} in depth) the second moment of a single draw may differ from its "
        f"typical value by more than a factor {_WIDE:g} (up to {max(factor for _, factor in reach):.3g}): normalise, widen, or "
        "rescale the drawn weights on data with vs.lsuv."
    ]


def _far(found: Sequence[Set], gradients: Sequence[float | None], target: float, direction: Direction) -> list[str]:
    """Warnings of gradients that grow or shrink with depth, and of signals that do where these are not what is kept."""
    known = [(k, gradient) for k, gradient in enumerate(gradients) if gradient]
    back = [(k, gradient / known[-1][1]) for k, gradient in known][::-1]
    told = _from_on("gradients", "the last kernel's", "back", [(k, ratio) for k, ratio in back if ratio > _FAR], found)
    if direction == "forward":
        return told
    # Queries have smaller gradients than values by nature: nothing before has a larger one where they shrink.
    most = [(k, max(ratio for _, ratio in back[i:])) for i, (k, _) in enumerate(back)]
    told += _from_on("gradients", "the last kernel's", "back", [(k, ratio) for k, ratio in most if ratio < 1 / _FAR], found)
    signals = [(k, one.typical / target) for k, one in enumerate(found)]
    for far in ([(k, ratio) for k, ratio in signals if ratio > _FAR], [(k, ratio) for k, ratio in signals if ratio < 1 / _FAR]):
        told += _from_on("signals", "the target", "on", far, found)
    return told


def _from_on(what: str, beside: str, way: str, far: Sequence[tuple[int, float]], found: Sequence[Set]) -> list[str]:
    """A warning from the first of these kernels on, told by their numbers, at which second moments are far from others."""
    if not far:
        return []
    worst = max((ratio for _, ratio in far), key=lambda ratio: abs(math.log(ratio)))
    limit = f"more than {_FAR:g} times" if worst > 1 else f"less than 1/{_FAR:g} of"
    return [
        f"From {found[far[0][0]].name} {way} (kernel {far[0][0] + 1} of {len(found)} in depth) {what} have {limit} the second "
        f"moment of {beside} (at worst {worst:.3g} times): one variance does not keep both signals and gradients here. Use "
        "vs.schemes.critical, whose variances do where the activation allows it, residual branches, or norms."
    ]
