"""Schemes of recurrences: LRU, S4D, Mamba, chrono.

Poles, step sizes and gates are recognised by what the program does with them; see `recurrences`. A path pattern that is given
overrides this, and where the program shows none, the names in the sources' own code count.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from varscale.initializers.combinators import scaled
from varscale.initializers.fixed import symmetric_uniform
from varscale.initializers.initializer import Initializer, checked_number
from varscale.initializers.structured import constant, ones, zeros
from varscale.programs.patterns import Pattern, matches, text
from varscale.schemes.joint_laws import LogOfUniform, LogUniform, Ring, Together
from varscale.schemes.laws import Law
from varscale.schemes.recurrence_values import Gate, Recurrences
from varscale.schemes.scheme import Choice, Scheme, Subject, spread
from varscale.schemes.structure import Structure


@dataclasses.dataclass(frozen=True)
class Part:
    """One kind of parameter of a recurrence.

    Attributes:
        what: it is, for errors.
        pattern: the user's; None for what the trace shows.
        source: the pattern of its name in the source's code.
        found: from what the trace shows to its paths, each with what is known of it.
        choose: from a parameter and what is known of it (None where a pattern found it) to its law.
        is_needed: whether there must be one.
    """

    what: str
    pattern: Pattern | None
    source: Pattern
    found: Callable[[Recurrences], Mapping[str, Any]]
    choose: Callable[[Subject, Any], Choice]
    is_needed: bool = False

    def known(self, structure: Structure) -> Mapping[str, Any]:
        """Its paths in a model, each with what is known of it."""
        if self not in structure.notes:
            seen = self.found(structure.recurrences) if self.pattern is None else {}
            pattern = self.source if self.pattern is None else self.pattern
            structure.notes[self] = seen or dict.fromkeys(p.path for p in structure.uses if matches(pattern, p.path))
        return structure.notes[self]


def lru(
    r_min: float = 0.0,
    r_max: float = 1.0,
    max_phase: float = 2 * math.pi,
    *,
    decay: Pattern | None = None,
    phase: Pattern | None = None,
    normalizer: Pattern | None = None,
    inputs: Pattern | None = None,
    outputs: Pattern | None = None,
) -> Scheme:
    """Eigenvalues uniform on a ring of the complex plane; the input normalised by √(1 − |λ|²) of the same eigenvalues.

    λ = exp(−exp(ν) + i exp(θ)), |λ|² uniform in [r_min², r_max²] and the phase in [0, max_phase]; B has standard deviation
    1/√(2 · inputs) a part, C 1/√(states). All other parameters keep their declared laws.

    Args:
        r_min: smallest modulus, ≥ 0.
        r_max: largest, at most 1.
        max_phase: largest phase, positive.
        decay: a pattern of ν, in place of what the program shows.
        phase: likewise of θ, which exp is applied to.
        normalizer: of log γ, beside its ν.
        inputs: of the parts of B, of shape (states, inputs).
        outputs: of the parts of C, of shape (outputs, states).

    Raises:
        ValueError: a number is out of range; when called: the model has no ν or no θ.

    Source: Orvieto et al. 2023, "Resurrecting Recurrent Neural Networks for Long Sequences", section 3.
    """
    words = f"lru(r_min={r_min:g}, r_max={r_max:g}, max_phase={max_phase:.5g})"
    Ring("", r_min, r_max)  # raises where they are no ring
    max_phase = checked_number("max_phase", max_phase, above=0.0)

    def ring(subject: Subject, of: Any, nu: str) -> Choice:
        beside = [path for path in parts[0].known(subject.structure) if _module(path) == _module(nu)]
        shared = nu if len(beside) > 1 else _module(nu)
        why = "|λ|² uniform on the ring" if of == "decay" else "log √(1 − |λ|²) of the same eigenvalues"
        return Choice(Ring(f"{shared}/ring", r_min, r_max, of), why)

    def normalizes(subject: Subject, nu: str | None) -> Choice:
        beside = [p for p in parts[0].known(subject.structure) if _module(p) == _module(subject.uses.path)]
        return ring(subject, "normalizer", nu or (beside[0] if beside else subject.uses.path))

    def turns(subject: Subject, is_log: bool | None) -> Choice:
        if is_log is False:  # of exp(iθ)
            return Choice(symmetric_uniform(max_phase), "the phase uniform, of either sign")
        return Choice(LogOfUniform(0.0, max_phase), "the phase uniform")

    parts = (
        Part("decay ν", decay, "**/nu_log", lambda r: dict.fromkeys(r.decay), lambda s, _: ring(s, "decay", s.uses.path), True),
        Part("phase θ", phase, "**/theta_log", lambda r: r.phase, turns, True),
        Part("normalizer", normalizer, "**/gamma_log", lambda r: r.normalizer, normalizes),
        Part(
            "inputs B", inputs, "**/B_{re,im}", lambda r: r.inputs,
            lambda s, terms: Choice(spread("normal", (2 * (terms or s.shape[-1])) ** -0.5), "1/√(2 · inputs)"),
        ),
        Part(
            "outputs C", outputs, "**/C_{re,im}", lambda r: r.outputs,
            lambda s, states: Choice(spread("normal", (states or s.shape[-1]) ** -0.5), "1/√(states)"),
        ),
    )  # fmt: skip
    return _of_parts(words, parts)


def s4d(
    *,
    poles: str = "lin",
    step: tuple[float, float] = (0.001, 0.1),
    real: Pattern | None = None,
    imaginary: Pattern | None = None,
    steps: Pattern | None = None,
    outputs: Pattern | None = None,
    skip: Pattern | None = None,
) -> Scheme:
    """Diagonal state spaces: poles −½ + i π n ("lin"), or those of HiPPO-LegS's diagonal part by its inverse law ("inv").

    "inv": −½ + i N/π (N/(2n + 1) − 1) for N = twice the states. Step sizes are log-uniform in `step`, C is normal of variance 1
    (½ a part), D normal.

    Args:
        poles: "lin" or "inv".
        step: smallest and largest step size.
        real: a pattern of log(−Re A), poles along its last axis, in place of what the program shows, which may be Re A itself.
        imaginary: likewise of Im A.
        steps: of log Δ.
        outputs: of C, complex, or of real and imaginary parts along a last axis of 2.
        skip: of D.

    Raises:
        ValueError: `poles` or `step` is out of range; when called: the model has no such poles or steps.

    Source: Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models", section 4.
    """
    if poles not in ("lin", "inv"):
        raise ValueError(f"poles must be 'lin' or 'inv', not {poles!r}")
    words, law = f"s4d(poles={poles!r}, step={step})", LogUniform(*step)

    def imaginary_part(subject: Subject, steps: tuple[int, ...] | None) -> Choice:
        # The poles of one step lie along an axis that the steps do not have, or have one entry on.
        alike = steps if steps is not None and len(steps) == len(subject.shape) else ()
        axis = next((k for k, n in enumerate(alike) if n == 1 < subject.shape[k]), -1)
        n = np.arange(subject.shape[axis])
        size = 2 * len(n)
        found = math.pi * n if poles == "lin" else size / math.pi * (size / (2 * n + 1) - 1)
        found = found.reshape(-1, *[1] * (len(subject.shape) - 1 - axis if axis >= 0 else 0))
        return Choice(constant(found), "π n" if poles == "lin" else "N/π (N/(2n + 1) − 1)")

    def output(subject: Subject, is_part: bool | None) -> Choice:
        halved = subject.shape[-1] == 2 if is_part is None else is_part
        return Choice(spread("normal", 0.5**0.5 if halved else 1.0), "E|c|² = 1")

    parts = (
        Part(
            "real parts of poles", real, "**/log_A_real", lambda r: r.real,
            lambda s, is_log: Choice(constant(-0.5 if is_log is False else math.log(0.5)), "Re A = −½"), True,
        ),
        Part("imaginary parts", imaginary, "**/A_imag", lambda r: r.imaginary, imaginary_part, True),
        Part(
            "steps", steps, "**/log_dt", lambda r: dict.fromkeys(r.steps),
            lambda s, _: Choice(law, "log-uniform step sizes"), True,
        ),
        Part("outputs C", outputs, "**/C", lambda r: r.weights, output),
        Part(
            "skip D", skip, "**/D", lambda r: dict.fromkeys(r.skip), lambda s, _: Choice(spread("normal", 1.0), "unit normal")
        ),
    )  # fmt: skip
    return _of_parts(words, parts)


def mamba(
    *,
    step: tuple[float, float] = (0.001, 0.1),
    floor: float = 1e-4,
    poles: Pattern | None = None,
    step_kernel: Pattern | None = None,
    step_bias: Pattern | None = None,
    skip: Pattern | None = None,
) -> Scheme:
    """A = −(1, …, N) a channel; softplus of the step's bias log-uniform; its kernel uniform in ±1/√rank; D = 1.

    Kernels are as PyTorch's Linear has them, uniform in ±1/√fan_in, with what ends one of the L branches divided by √L; tables
    have .02, biases of convolutions ±1/√fan_in and others 0, as in the authors' code. Where a pole is a number a head
    (Mamba-2), A is uniform in −[1, 16].

    Args:
        step: smallest and largest step size.
        floor: below which a step size is cut.
        poles: a pattern of log(−A), the N states along its last axis, in place of what the program shows.
        step_kernel: likewise of the kernel that makes step sizes.
        step_bias: of its bias.
        skip: of D.

    Raises:
        ValueError: `step` is out of range; when called: the model has no such poles or no bias of step sizes.

    Source: Gu & Dao 2023, "Mamba", section 3.6, and its code.
    """
    law = LogUniform(*step, "softplus", checked_number("floor", floor, at_least=0.0))

    def other(subject: Subject) -> Choice:
        if subject.is_table:
            return Choice(spread("normal", 0.02), "the plain standard deviation")
        if subject.is_matrix:
            std = subject.terms**-0.5 / math.sqrt(3)
            if not subject.ends or subject.branch is None:
                return Choice(spread("uniform", std), "PyTorch's Linear: ±1/√fan_in")
            count = subject.structure.additions(subject.branch.stream)
            return Choice(scaled(spread("uniform", std), count**-0.5), f"PyTorch's Linear ÷ √{count}, the branches")
        if subject.uses.main is not None and subject.main.kind == "shift":
            beside = (p for p in subject.whole if p.main is not None and _module(p.path) == _module(subject.uses.path))
            taps = next((p for p in beside if p.main and p.main.kind in ("convolution", "depthwise")), None)
            if taps is None:
                return Choice(zeros, "0: a bias")
            terms = dataclasses.replace(subject, uses=taps).terms
            return Choice(spread("uniform", (3 * terms) ** -0.5), "PyTorch's Conv1d: ±1/√fan_in")
        return subject.kept()

    def rates(subject: Subject, _: Any) -> Choice:
        biases = [subject.whole[path].shape for path in parts[1].known(subject.structure)]
        if subject.shape in biases:
            return Choice(LogOfUniform(1.0, 16.0), "A uniform in −[1, 16]: one a head")
        return Choice(constant(np.log(np.arange(1, subject.shape[-1] + 1))), "A = −(1, …, N)")

    parts = (
        Part("poles", poles, "**/A_log", lambda r: dict.fromkeys(r.poles), rates, True),
        Part(
            "bias of step sizes", step_bias, "**/dt_proj/bias", lambda r: dict.fromkeys(r.step_bias),
            lambda s, _: Choice(law, "softplus of it log-uniform"), True,
        ),
        Part(
            "kernel of step sizes", step_kernel, "**/dt_proj/kernel", lambda r: dict.fromkeys(r.step_kernel),
            lambda s, _: Choice(spread("uniform", (3 * s.fan_in) ** -0.5), "±1/√rank"),
        ),
        Part("skip D", skip, "**/D", lambda r: dict.fromkeys(r.skip), lambda s, _: Choice(ones, "1")),
    )  # fmt: skip
    return _of_parts(f"mamba(step={step})", parts, other=other)


def chrono(
    longest: float,
    *,
    forget: Pattern | None = None,
    remember: Pattern | None = None,
    packed: Pattern | None = None,
    gates: str = "ifgo",
) -> Scheme:
    """Biases of gates for dependences over up to `longest` steps: forget gate log U(1, longest − 1), input gate minus the same.

    All else keeps its declared laws, but that other gates that are packed in one bias with these get 0. A forget gate is a
    sigmoid that multiplies the state of a loop: of a GRU the update gate. A constant that the program adds to it is subtracted.

    Args:
        longest: the largest time of a dependence, above 2.
        forget: a pattern of the forget gate's bias, in place of what the program shows.
        remember: likewise of the input gate's bias, beside the forget gate's.
        packed: of biases that hold all gates.
        gates: the order of the gates in those that `packed` names; "ifgo" is flax's.

    Raises:
        ValueError: longest is not above 2; when called: the model has no such gate.

    Source: Tallec & Ollivier 2018, "Can recurrent neural networks warp time?", section 3.
    """
    longest = checked_number("longest", longest, above=2.0)

    def gate(subject: Subject, sign: int) -> Choice:
        cell = _module(_module(subject.uses.path))
        law = LogOfUniform(1.0, longest - 1, sign, f"{cell}/chrono")
        return Choice(law, "log U(1, longest − 1)" if sign > 0 else "minus the forget gate's")

    def all_gates(subject: Subject) -> Choice:
        laws = {name: LogOfUniform(1.0, longest - 1, sign) for name, sign in (("i", -1), ("f", 1))}
        return Choice(_packed([laws.get(g, zeros) for g in gates], subject.uses.path), "forget log U, input − log U")

    own = (
        ("forget gate", forget, "**/hf/bias"),
        ("input gate", remember, "**/hi/bias"),
        ("gates", packed, "**/dense_h/bias"),
    )
    choices = (lambda s, _: gate(s, 1), lambda s, _: gate(s, -1), lambda s, _: all_gates(s))
    parts = [
        Part(what, pattern, source, lambda r: {}, choose) for (what, pattern, source), choose in zip(own, choices, strict=True)
    ]
    named = [part for part in parts if part.pattern is not None]
    seen = Part("gate", None, re.compile("(?!)"), lambda r: _of_gates(r.gates, longest), lambda s, choice: choice)
    return _of_parts(f"chrono({longest:g})", named or [seen, *parts], needs_one="gate that multiplies the state of a loop")


def _of_gates(gates: Sequence[tuple[Gate, Gate | None]], longest: float) -> dict[str, Choice]:
    """The law of each bias that holds gates: one that is all of a leaf shares the key of its cell's forget gate."""
    found: dict[str, Choice] = {}
    packed: dict[str, list[Initializer]] = {}
    for forget, remember in gates:
        for gate, sign in ((forget, 1), *([] if remember is None else [(remember, -1)])):
            length = gate.stop - gate.start
            if length == gate.size:
                law = LogOfUniform(1.0, longest - 1, sign, f"{forget.path}/chrono", -gate.offset)
                found[gate.path] = Choice(law, "log U(1, longest − 1)" if sign > 0 else "minus the forget gate's")
            elif gate.size % length == 0 and gate.start % length == 0:
                own = LogOfUniform(1.0, longest - 1, sign, offset=-gate.offset)
                packed.setdefault(gate.path, [zeros] * (gate.size // length))[gate.start // length] = own
    told = "forget log U, input − log U"
    return {**found, **{path: Choice(_packed(laws, path), told) for path, laws in packed.items()}}


def _packed(laws: Sequence[Initializer], path: str) -> Law:
    """The law of a bias that holds several gates."""
    return Together(tuple(laws), len(laws), -1, f"{path}/chrono")


def _module(path: str) -> str:
    return path.rpartition("/")[0]


def _of_parts(
    words: str, parts: Sequence[Part], other: Callable[[Subject], Choice] = Subject.kept, needs_one: str = ""
) -> Scheme:
    """A scheme for models with recurrences.

    Args:
        words: its call.
        parts: what it has laws for; the first that a parameter is counts.
        other: what is chosen for all other parameters.
        needs_one: what a model must have one of, where any part will do.
    """

    def check(structure: Structure) -> None:
        known = {part.what: part.known(structure) for part in parts}
        lacking = [part for part in parts if part.is_needed and not known[part.what]]
        if not lacking and not (needs_one and not any(known.values())):
            return
        paths = [parameter.path for parameter in structure.uses]
        there = ", ".join(paths[:6]) + ", ..." * (len(paths) > 6)
        what = needs_one if needs_one else lacking[0].what
        names = " or ".join(text(p.source if p.pattern is None else p.pattern) for p in (lacking[:1] or parts[-3:]))
        raise ValueError(f"{words}: the program shows no {what}, and no parameter matches {names}; there are {there}")

    def rule(subject: Subject) -> Choice:
        for part in parts:
            known = part.known(subject.structure)
            if subject.uses.path in known:
                return part.choose(subject, known[subject.uses.path])
        return other(subject)

    return Scheme(words, rule, check=check)
