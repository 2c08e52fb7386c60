"""Schemes for residual models without normalisation: Fixup, T-Fixup, ReZero, SkipInit and NF-ResNets."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp

from varscale.initializers.distributions import DistributionName
from varscale.initializers.fans import Mode
from varscale.initializers.gains import gain
from varscale.initializers.initializer import Initializer, checked_number
from varscale.initializers.structured import ones, zeros
from varscale.schemes.plan import PlannedLeaf, Requirement
from varscale.schemes.requirements import branch_scales, looked_up
from varscale.schemes.residuals import needs_additions, needs_gates
from varscale.schemes.scheme import Choice, Scheme, Subject, checked_convention, spread
from varscale.schemes.structure import Structure
from varscale.usage.parameters import OneUse
from varscale.usage.values import times

_TENTH = (("adam_learning_rate", 0.1), ("sgd_learning_rate", 0.1))
_NFNETS = {"relu": 1.7139588594436646, "gelu": 1.7015043497085571, "silu": 1.7881293296813965}
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu, "swish": jax.nn.silu, "elu": jax.nn.elu, "selu": jax.nn.selu,
    "leaky_relu": jax.nn.leaky_relu, "softplus": jax.nn.softplus, "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid,
    "mish": jax.nn.mish, "relu6": jax.nn.relu6,
}  # fmt: skip


def fixup(*, mode: Mode = "fan_in", distribution: DistributionName = "normal") -> Scheme:
    """He's law; in each of L residual branches of m layers the first m − 1 times L^(−1/(2m − 2)), the last 0; the readout 0.

    The model should own one scalar multiplier a branch, which starts at 1, and scalar biases; their learning rates are a tenth.
    A branch without a multiplier is listed in the plan's requirements.

    Args:
        mode: He's fan: "fan_in", or "fan_out", which the authors' code has.
        distribution: of the kernels.

    Raises:
        ValueError: unknown mode or distribution; when called: a model without residual additions.

    Source: Zhang, Dauphin & Ma 2019, "Fixup Initialization", section 3.
    """
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode must be 'fan_in' or 'fan_out', not {mode!r}")
    words = f"fixup(mode={mode!r}, distribution={distribution!r})"

    def rule(subject: Subject) -> Choice:
        if _is_gate(subject):
            return Choice(ones, "the branch's multiplier: 1, its learning rate a tenth", _TENTH)
        if subject.role == "vector" and _is_scalar(subject):
            return Choice(zeros, "a scalar bias: 0, its learning rate a tenth", _TENTH)
        if subject.role == "readout":
            return Choice(zeros, "0: the readout")
        if not subject.is_matrix or subject.is_table:
            return subject.kept()
        if subject.ends:
            return Choice(zeros, "0: the last layer of a branch")
        he = math.sqrt(2 / (subject.terms if mode == "fan_in" else subject.reached))
        branch = subject.branch
        if branch is None or branch.maps < 2:
            return Choice(spread(distribution, he), "He's law")
        count = subject.structure.additions(branch.stream)
        factor = count ** (-1 / (2 * branch.maps - 2))
        return Choice(spread(distribution, he * factor), f"He's law × {count}^(−1/{2 * branch.maps - 2})")

    def requires(structure: Structure, leaves: Sequence[PlannedLeaf]) -> Iterator[Requirement]:
        for i, branch in enumerate(structure.uses.branches):
            last = structure.last(i)
            where = last[0].path if last else ""
            status = "present" if branch.gates else "missing"
            mend = "multiply the branch by a scalar parameter that starts at 1"
            yield Requirement("multiplier of the branch", where, 1.0, None, status, mend)

    return Scheme(words, rule, check=needs_additions(words), requires=lambda s, leaves: tuple(requires(s, leaves)))


def _is_scalar(subject: Subject) -> bool:
    """Whether it is one number, or one a layer where a loop stacks them."""
    return math.prod(n for axis, n in enumerate(subject.shape) if axis not in subject.main.batch_axes) == 1


def t_fixup(*, distribution: DistributionName = "normal") -> Scheme:
    """Glorot's law, with feed-forward layers, values and output projections made small enough for a model without norms.

    They are multiplied by .67 N^−¼ in an encoder of N layers, and by (9M)^−¼ in a decoder of M. Tables have 1/√d, times
    (9N)^−¼ in an encoder and (9M)^−¼ in a decoder. For transformers without layer normalisation and without warm-up. One stack
    alone counts as an encoder.

    Args:
        distribution: of the kernels.

    Raises:
        ValueError: unknown distribution; when called: a model without residual additions.

    Source: Huang et al. 2020, "Improving Transformer Optimization Through Better Initialization", section 3.2.
    """
    words = f"t_fixup(distribution={distribution!r})"

    def factors(structure: Structure, stream: int) -> tuple[float, float]:
        """Of the kernels and of the table of a stream."""
        n = structure.blocks(stream)
        return ((9 * n) ** -0.25,) * 2 if structure.crossed(stream) else (0.67 * n**-0.25, (9 * n) ** -0.25)

    def rule(subject: Subject) -> Choice:
        if not subject.is_matrix:
            return subject.kept()
        stream = subject.main.stream if subject.branch is None else subject.branch.stream
        kernel, table = (1.0, 1.0) if stream is None else factors(subject.structure, stream)
        if subject.is_table:
            return Choice(spread("normal", subject.width**-0.5 * table), f"1/√d × {table:.4g}")
        if subject.branch is None:
            kernel = 1.0

        def law(names: frozenset[str], fan_out: float) -> Initializer:
            scores = names and names <= {"query", "key"}
            return spread(distribution, (1.0 if scores else kernel) * math.sqrt(2 / (subject.fan_in + fan_out)))

        made = subject.by_part(law)
        return Choice(made, "Glorot" if made == law(frozenset({"key"}), subject.fan_out) else f"Glorot × {kernel:.4g}")

    return Scheme(words, rule, check=needs_additions(words), requires=_without_norms)


def _without_norms(structure: Structure, leaves: Sequence[PlannedLeaf]) -> Sequence[Requirement]:
    """One line for every norm scale: the scheme is for models without."""
    return tuple(
        Requirement("norms in the model", leaf.path, 0.0, 1.0, "missing", "take the normalisation out")
        for leaf in leaves
        if leaf.role == "norm scale"
    )


def rezero() -> Scheme:
    """0 for the scalar that each residual branch is multiplied by; all else keeps its declared law.

    Raises:
        ValueError: when called: a model one of whose branches is multiplied by no parameter.

    Source: Bachlechner et al. 2020, "ReZero is All You Need", section 3.
    """
    return _gated("rezero()")


def skipinit() -> Scheme:
    """0 for the scalar at the end of each residual branch; all else keeps its declared law. ReZero, found independently.

    Raises:
        ValueError: when called: a model one of whose branches is multiplied by no parameter.

    Source: De & Smith 2020, "Batch Normalization Biases Residual Blocks Towards the Identity Function", section 4.
    """
    return _gated("skipinit()")


def _gated(words: str) -> Scheme:
    def rule(subject: Subject) -> Choice:
        return Choice(zeros, "0: each branch starts closed") if _is_gate(subject) else subject.kept()

    return Scheme(words, rule, check=needs_gates(words))


def nf_resnet(alpha: float = 0.2, *, distribution: DistributionName = "normal", convention: str | None = None) -> Scheme:
    """1/√fan_in, with the activation's gain γ where the program has none; each branch α · f(x · β), β = 1/√(expected variance).

    The expected variance is 1 at first and at a transition (a branch beside a map on its shortcut), and grows by α² a branch.
    The program must multiply each branch's input by β and its output by α: no initializer can.

    Args:
        alpha: by which a branch is multiplied, finite and positive.
        distribution: of the kernels.
        convention: None: γ by quadrature. "nfnets": DeepMind's table (1.7140 for relu, 1.7015 for gelu, 1.7881 for silu).

    Raises:
        ValueError: alpha is not positive, or convention unknown; when called: a model without residual additions, or with an
            activation of unknown name.

    Source: Brock, De & Smith 2021, "Characterizing signal propagation to close the performance gap in unnormalized ResNets",
    section 3.
    """
    alpha = checked_number("alpha", alpha, above=0.0)
    checked_convention(convention, "nfnets")
    words = f"nf_resnet(alpha={alpha:g}, distribution={distribution!r}, convention={convention!r})"

    def in_program(structure: Structure, use: OneUse) -> bool:
        """Whether the program multiplies what a kernel reads by γ; by β too, before the activation or after it, or not."""
        gamma, scale = _gain(use.before, convention), times(use.input_scale, use.before_scale)
        beta = _betas(structure, alpha)[use.branch] if use.branch is not None and use.position == 0 else 1.0
        return gamma == 1 or (scale is not None and any(math.isclose(scale, b * gamma, rel_tol=0.01) for b in (beta, 1.0)))

    def rule(subject: Subject) -> Choice:
        if _is_gate(subject):
            return Choice(zeros, "SkipInit: 0")
        if not subject.is_matrix or subject.is_table:
            return subject.kept()
        std, gamma = subject.terms**-0.5, _gain(subject.main.before, convention)
        if in_program(subject.structure, subject.main):
            return Choice(spread(distribution, std), "1/√fan_in; γ stands in the program" if gamma != 1 else "1/√fan_in")
        return Choice(spread(distribution, gamma * std), f"γ/√fan_in, γ = {gamma:.4g}")

    def requires(structure: Structure, leaves: Sequence[PlannedLeaf]) -> Iterator[Requirement]:
        yield from branch_scales(structure, lambda i: alpha)
        betas = _betas(structure, alpha)
        for parameter in structure.uses:
            use = parameter.main
            if use is None or use.branch is None or use.position != 0 or not use.reduction_axes:
                continue
            beta, gamma = betas[use.branch], _gain(use.before, convention)
            scale = times(use.input_scale, use.before_scale)
            if in_program(structure, use) and scale is not None:
                scale /= gamma
            mend = f"multiply the branch's input by {beta:.4g}"
            yield looked_up("branch input scale", parameter.path, beta, scale, 1.0, mend)

    check = needs_additions(words)
    return Scheme(words, rule, check=check, requires=lambda s, leaves: tuple(requires(s, leaves)))


def _betas(structure: Structure, alpha: float) -> list[float]:
    """1/√(expected variance) at the input of each branch."""
    found = structure.__dict__.setdefault("_betas", {})  # each kernel asks
    if alpha in found:
        return found[alpha]
    variances: dict[int, float] = {}
    betas = []
    for branch in structure.uses.branches:
        variance = variances.get(branch.stream, 1.0)
        betas.append(variance**-0.5)
        variances[branch.stream] = (1.0 if branch.shortcut else variance) + alpha**2
    return found.setdefault(alpha, betas)


@functools.cache
def _gain(name: str, convention: str | None) -> float:
    """γ of an activation: 1/√Var[f(z)].

    Raises:
        ValueError: the activation has no known name.
    """
    if name in ("", "norm"):
        return 1.0
    if convention == "nfnets" and name in _NFNETS:
        return _NFNETS[name]
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"the activation before a kernel must be one of {', '.join(_ACTIVATIONS)} to have a gain, not {name!r}"
        )
    return float(gain(_ACTIVATIONS[name], "variance"))


def _is_gate(subject: Subject) -> bool:
    """Whether a residual branch is multiplied by this parameter, after its last map."""
    return any(subject.uses.path in branch.gates for branch in subject.whole.branches)
