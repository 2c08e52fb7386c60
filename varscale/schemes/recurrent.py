"""Schemes of recurrences: LRU, S4D, Mamba, chrono.

What the program does with a pole, a step size or the bias of a gate does not tell them from other vectors, so these schemes
find them by path patterns, whose defaults are the names in the sources' own code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from varscale.initializers.combinators import scaled
from varscale.initializers.initializer import checked_number
from varscale.initializers.structured import constant, ones, zeros
from varscale.programs.patterns import Pattern, idle, matches, text
from varscale.schemes.joint_laws import LogOfUniform, LogUniform, Ring, Together
from varscale.schemes.scheme import Choice, Scheme, Subject, spread
from varscale.schemes.structure import Structure

Named = Mapping[Pattern, Callable[[Subject], Choice]]


def lru(
    r_min: float = 0.0,
    r_max: float = 1.0,
    max_phase: float = 2 * math.pi,
    *,
    decay: Pattern = "**/nu_log",
    phase: Pattern = "**/theta_log",
    normalizer: Pattern = "**/gamma_log",
    inputs: Pattern = "**/B_{re,im}",
    outputs: Pattern = "**/C_{re,im}",
) -> Scheme:
    """Eigenvalues uniform on a ring of the complex plane; the input normalised by √(1 − |λ|²) of the same eigenvalues.

    λ = exp(−exp(ν) + i exp(θ)), |λ|² uniform in [r_min², r_max²] and the phase in [0, max_phase]; B has standard deviation
    1/√(2 · inputs) a part, C 1/√(states). All other parameters keep their declared laws.

    Args:
        r_min: smallest modulus, ≥ 0.
        r_max: largest, at most 1.
        max_phase: largest phase, positive.
        decay: the pattern of ν, whose normaliser is the parameter beside it.
        phase: of θ.
        normalizer: of log γ.
        inputs: of the parts of B, of shape (states, inputs).
        outputs: of the parts of C, of shape (outputs, states).

    Raises:
        ValueError: a number is out of range; when called: the pattern of ν or θ matches nothing.

    Source: Orvieto et al. 2023, "Resurrecting Recurrent Neural Networks for Long Sequences", section 3.
    """
    words = f"lru(r_min={r_min:g}, r_max={r_max:g}, max_phase={max_phase:.5g})"
    Ring("", r_min, r_max)  # raises where they are no ring
    max_phase = checked_number("max_phase", max_phase, above=0.0)

    def ring(subject: Subject, of: str) -> Choice:
        law = Ring(subject.uses.path.rpartition("/")[0] + "/ring", r_min, r_max, of)  # pyright: ignore[reportArgumentType]
        return Choice(law, "|λ|² uniform on the ring" if of == "decay" else "log √(1 − |λ|²) of the same eigenvalues")

    named: Named = {
        decay: lambda s: ring(s, "decay"),
        normalizer: lambda s: ring(s, "normalizer"),
        phase: lambda s: Choice(LogOfUniform(0.0, max_phase), "the phase uniform"),
        inputs: lambda s: Choice(spread("normal", (2 * s.shape[-1]) ** -0.5), "1/√(2 · inputs)"),
        outputs: lambda s: Choice(spread("normal", s.shape[-1] ** -0.5), "1/√(states)"),
    }
    return _by_name(words, named, needs=(decay, phase))


def s4d(
    *,
    poles: str = "lin",
    step: tuple[float, float] = (0.001, 0.1),
    real: Pattern = "**/log_A_real",
    imaginary: Pattern = "**/A_imag",
    steps: Pattern = "**/log_dt",
    outputs: Pattern = "**/C",
    skip: Pattern = "**/D",
) -> Scheme:
    """Diagonal state spaces: poles −½ + i π n ("lin"), or those of HiPPO-LegS's diagonal part by its inverse law ("inv").

    "inv": −½ + i N/π (N/(2n + 1) − 1) for N = twice the states. Step sizes are log-uniform in `step`, C is normal of variance 1
    (½ a part), D normal.

    Args:
        poles: "lin" or "inv".
        step: smallest and largest step size.
        real: the pattern of log(−Re A), poles along its last axis.
        imaginary: of Im A.
        steps: of log Δ.
        outputs: of C, complex, or of real and imaginary parts along a last axis of 2.
        skip: of D.

    Raises:
        ValueError: `poles` or `step` is out of range; when called: the pattern of the poles or of the steps matches nothing.

    Source: Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models", section 4.
    """
    if poles not in ("lin", "inv"):
        raise ValueError(f"poles must be 'lin' or 'inv', not {poles!r}")
    words, law = f"s4d(poles={poles!r}, step={step})", LogUniform(*step)

    def imaginary_part(subject: Subject) -> Choice:
        n = np.arange(subject.shape[-1])
        size = 2 * len(n)
        found = math.pi * n if poles == "lin" else size / math.pi * (size / (2 * n + 1) - 1)
        return Choice(constant(found), "π n" if poles == "lin" else "N/π (N/(2n + 1) − 1)")

    def output(subject: Subject) -> Choice:
        return Choice(spread("normal", 0.5**0.5 if subject.shape[-1] == 2 else 1.0), "E|c|² = 1")

    named: Named = {
        real: lambda s: Choice(constant(math.log(0.5)), "Re A = −½"),
        imaginary: imaginary_part,
        steps: lambda s: Choice(law, "log-uniform step sizes"),
        outputs: output,
        skip: lambda s: Choice(spread("normal", 1.0), "unit normal"),
    }
    return _by_name(words, named, needs=(real, imaginary, steps))


def mamba(
    *,
    step: tuple[float, float] = (0.001, 0.1),
    floor: float = 1e-4,
    poles: Pattern = "**/A_log",
    step_kernel: Pattern = "**/dt_proj/kernel",
    step_bias: Pattern = "**/dt_proj/bias",
    skip: Pattern = "**/D",
) -> Scheme:
    """A = −(1, …, N) a channel; softplus of the step's bias log-uniform; its kernel uniform in ±1/√rank; D = 1.

    Kernels are as PyTorch's Linear has them, uniform in ±1/√fan_in, with what ends one of the L branches divided by √L; tables
    have .02 and biases 0, as in the authors' code.

    Args:
        step: smallest and largest step size.
        floor: below which a step size is cut.
        poles: the pattern of log(−A), the N states along its last axis.
        step_kernel: of the kernel that makes step sizes.
        step_bias: of its bias.
        skip: of D.

    Raises:
        ValueError: `step` is out of range; when called: the pattern of the poles or of the step's bias matches nothing.

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
            return Choice(zeros, "0: a bias")
        return subject.kept()

    named: Named = {
        poles: lambda s: Choice(constant(np.log(np.arange(1, s.shape[-1] + 1))), "A = −(1, …, N)"),
        step_bias: lambda s: Choice(law, "softplus of it log-uniform"),
        step_kernel: lambda s: Choice(spread("uniform", (3 * s.fan_in) ** -0.5), "±1/√rank"),
        skip: lambda s: Choice(ones, "1"),
    }
    return _by_name(f"mamba(step={step})", named, needs=(poles, step_bias), other=other)


def chrono(
    longest: float,
    *,
    forget: Pattern = "**/hf/bias",
    remember: Pattern | None = "**/hi/bias",
    packed: Pattern = "**/dense_h/bias",
    gates: str = "ifgo",
) -> Scheme:
    """Biases of gates for dependences over up to `longest` steps: forget gate log U(1, longest − 1), input gate minus the same.

    All else keeps its declared laws. Cells whose gates are packed in one bias are found by `packed`.

    Args:
        longest: the largest time of a dependence, above 2.
        forget: the pattern of the forget gate's bias (of a GRU, "**/iz/bias": the gate that multiplies the old state).
        remember: of the input gate's bias, beside the forget gate's; None for a cell without.
        packed: of biases that hold all gates.
        gates: the order of the gates in those; "ifgo" is flax's.

    Raises:
        ValueError: longest is not above 2; when called: neither forget nor packed matches a parameter.

    Source: Tallec & Ollivier 2018, "Can recurrent neural networks warp time?", section 3.
    """
    longest = checked_number("longest", longest, above=2.0)

    def gate(subject: Subject, sign: int) -> LogOfUniform:
        cell = subject.uses.path.rpartition("/")[0].rpartition("/")[0]
        return LogOfUniform(1.0, longest - 1, sign, f"{cell}/chrono")

    def all_gates(subject: Subject) -> Choice:
        of = {"i": LogOfUniform(1.0, longest - 1, -1), "f": LogOfUniform(1.0, longest - 1, 1)}
        law = Together(tuple(of.get(g, zeros) for g in gates), len(gates), -1, f"{subject.uses.path}/chrono")
        return Choice(law, "forget log U, input − log U")

    named: dict[Pattern, Callable[[Subject], Choice]] = {forget: lambda s: Choice(gate(s, 1), "log U(1, longest − 1)")}
    if remember is not None:
        named[remember] = lambda s: Choice(gate(s, -1), "minus the forget gate's")
    named[packed] = all_gates
    return _by_name(f"chrono({longest:g})", named, needs=((forget, packed),))


def _by_name(
    words: str,
    named: Named,
    needs: tuple[Pattern | tuple[Pattern, ...], ...],
    other: Callable[[Subject], Choice] = Subject.kept,
) -> Scheme:
    """A scheme that finds some parameters by their paths.

    Args:
        words: its call.
        named: from patterns to what is chosen for the parameters that they name; the first that matches counts.
        needs: patterns that must match, or tuples of patterns of which one must.
        other: what is chosen for all other parameters.
    """

    def check(structure: Structure) -> None:
        paths = [parameter.path for parameter in structure.uses]
        for need in needs:
            several = need if isinstance(need, tuple) else (need,)
            if len(idle(several, paths)) == len(several):
                known = ", ".join(paths[:6]) + ", ..." * (len(paths) > 6)
                raise ValueError(f"{words}: no parameter matches {' or '.join(map(text, several))}; there are {known}")

    def rule(subject: Subject) -> Choice:
        path = subject.uses.path
        return next((choose(subject) for pattern, choose in named.items() if matches(pattern, path)), None) or other(subject)

    return Scheme(words, rule, check=check)
