"""Policy gradients: orthogonal layers, a small policy, a unit value."""

from __future__ import annotations

from varscale.initializers.initializer import checked_number
from varscale.initializers.structured import zeros
from varscale.programs.patterns import Pattern, idle, matches
from varscale.schemes.laws import orthogonal_over
from varscale.schemes.scheme import Choice, Scheme, Subject
from varscale.schemes.structure import Structure


def ppo(gain: float = 2**0.5, *, policy: float = 0.01, value: float = 1.0, value_head: Pattern | None = None) -> Scheme:
    """Orthogonal maps of gain √2; .01 for the policy's readout and 1 for the value's; biases 0.

    Args:
        gain: of every kernel but the readouts, finite and positive.
        policy: of the policy's readout.
        value: of the value's readout.
        value_head: a path pattern that names the value's readout; default: the one readout that has a single output.

    Raises:
        ValueError: a gain is not positive; when called: a model in which several readouts have a single output, or a pattern
            that names no readout.

    Source: Huang et al. 2022, "The 37 Implementation Details of Proximal Policy Optimization", detail 2.
    """
    gain = checked_number("gain", gain, above=0.0)
    policy, value = checked_number("policy", policy, above=0.0), checked_number("value", value, above=0.0)
    words = f"ppo(gain={gain:.6g}, policy={policy:g}, value={value:g})"

    def values(structure: Structure) -> list[str]:
        readouts = {p.path: p.main.fan_out for p in structure.uses if p.role == "readout" and p.main is not None}
        if value_head is not None:
            return [path for path in readouts if matches(value_head, path)]
        return [path for path, outputs in readouts.items() if outputs == 1]

    def check(structure: Structure) -> None:
        found = values(structure)
        if value_head is not None and idle([value_head], found):
            raise ValueError(f"{words}: value_head={value_head!r} names no readout of the model")
        if len(found) > 1 and value_head is None:
            raise ValueError(f"{words}: {', '.join(found)} have a single output each; say which is the value's: value_head=...")

    def rule(subject: Subject) -> Choice:
        use = subject.uses.main
        if use is not None and use.kind == "shift":
            return Choice(zeros, "0: a bias")
        if not subject.is_matrix or subject.is_table or use is None or not use.output_axes:
            return subject.kept()
        if subject.role == "readout":
            is_value = subject.uses.path in values(subject.structure)
            scale, why = (value, "the value's readout") if is_value else (policy, "the policy's readout")
        else:
            scale, why = gain, "a hidden map"
        return Choice(orthogonal_over(scale, use.reduction_axes, use.output_axes), why)

    return Scheme(words, rule, check=check)
