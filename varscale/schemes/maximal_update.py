"""Parametrizations under which the best learning rate does not depend on width or depth: μP, CompleteP, spectral."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from varscale.initializers.distributions import DistributionName
from varscale.initializers.distributions import distribution as checked_distribution
from varscale.initializers.initializer import checked_number
from varscale.schemes import parametrization
from varscale.schemes.growth import Grown, GrownLeaf
from varscale.schemes.parametrization import Scaling
from varscale.schemes.relative import Multipliers, Relative, checked_laws, in_words, named
from varscale.schemes.scheme import Choice, Scheme, Subject, spread


def mup(base: Any, *, table: Literal[3, 8] | None = None, laws: Any = "declared", attention: bool = True) -> Relative:
    """The maximal update parametrization: what trains best at the base's width does so at any.

    Axes that grow are found by comparing the traces of the model and of its base. Each parameter's law is the base's, its
    standard deviation × 1/√m for kernels between growing axes and × 1/m for readouts; `plan.optimizer(...)` multiplies learning
    rates and Adam's epsilon. In the form of table 3 an untied model is used as it is: what would be a multiplier of the program
    is part of a weight, attention's 1/d_head too: in the query's kernel, or half in that of query, key and value. In the form
    of table 8 the program must divide the readout's output by m and scale scores by 1/d_head; `plan.requirements` says whether
    it does. Where the program multiplies embeddings, positions or an input layer by another number than in the base, such as
    √d_model, their weights undo it; a table that is the readout too cannot, and the number of the base is required.

    Args:
        base: a narrower model of the same kind, such as `Net(width=64)` or an nnx factory; a mapping from fields of the linen
            module to their values in the base, {"width": 64}; from sizes of axes to those in the base, {1024: 64}; or from
            patterns of paths to shapes in the base.
        table: 3 or 8; by default 3, and 8 for a model that ties its readout to its embedding.
        laws: a scheme for the base, such as `vs.schemes.fan_in()`; by default the model's own laws.
        attention: whether scores are to be divided by d_head in place of √d_head; both agree at the base's head size.

    Raises:
        ValueError: `table` is neither 3 nor 8. When called: the base is not narrower, or a tied readout with table 3.
        TypeError: `laws` is no scheme.

    Source: Yang et al. 2022, "Tensor Programs V" (arXiv 2203.03466), tables 3 and 8.

    >>> import jax, varscale as vs
    >>> from flax import linen as nn
    >>> def net(width):
    ...     return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(10)])
    >>> plan = mup(net(64))(net(256), jax.ShapeDtypeStruct((1, 784), "float32"))
    >>> [(round(leaf.std, 6), leaf.multiplier("adam_learning_rate")) for leaf in plan if leaf.path.endswith("kernel")]
    [(0.035714, 1.0), (0.0625, 0.25), (0.03125, 0.25)]
    """
    if table not in (None, 3, 8):
        raise ValueError(f"table must be 3, 8 or None, not {table!r}")

    def form(both: Grown) -> Multipliers:
        tied = any(leaf.conflict is not None for leaf in both.leaves)
        return "program" if table == 8 or (table is None and tied) else "weights"

    def scaling(leaf: GrownLeaf, both: Grown) -> Scaling:
        return parametrization.mup(leaf.growth, table=8)

    words = f"mup(base={in_words(base)}" + (f", table={table})" if table else ")")
    return Relative(words, base, scaling, form, checked_laws(laws, "mup"), attention)


def completep(
    base: Any, *, alpha: float = 1.0, multipliers: Multipliers = "program", laws: Any = "declared", attention: bool = True
) -> Relative:
    """CompleteP: μP in width, and every residual branch × (L / L_base)^−α, so that learning rates hold over depth too.

    Kernels that end a branch have the standard deviation of the others; give the base a law without 1/√(2L).

    Args:
        base: as for `mup`; its depth may be smaller too, or its depth alone.
        alpha: α in [½, 1]; 1 is the one under which learning rates transfer.
        multipliers: "program": x + (L / L_base)^−α · branch is required in the program, and the readout's 1/m;
            "weights": both become part of the weights that end branches, and of the readout: a model is used as it is.
        laws: as for `mup`.
        attention: as for `mup`.

    Raises:
        ValueError: α is outside [½, 1], or `multipliers` is neither. When called: as for `mup`, a base that is deeper than the
            model, or a model without residual branches.
        TypeError: `laws` is no scheme.

    Source: Dey et al. 2025, "Don't be lazy: CompleteP enables compute-efficient deep transformers" (arXiv 2505.01618), table 1.
    """
    alpha = checked_number("alpha", alpha, above=0.0)
    if not 0.5 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0.5, 1], not {alpha}")
    if multipliers not in ("program", "weights"):
        raise ValueError(f"multipliers must be 'program' or 'weights', not {multipliers!r}")

    def form(both: Grown) -> Multipliers:
        if not both.uses.additions:
            raise ValueError(
                "completep is for models with residual branches, and the trace of this one has no residual addition"
            )
        if both.depth < 1:
            raise ValueError(
                f"completep: base must not be deeper than the model: the model has {both.uses.additions} residual additions, "
                f"{both.depth:.4g} times the base's"
            )
        return multipliers

    def scaling(leaf: GrownLeaf, both: Grown) -> Scaling:
        return parametrization.completep(leaf.growth, both.depth, alpha, leaf.place)

    words = f"completep(base={in_words(base)}, alpha={alpha:g}, multipliers={multipliers!r})"
    return Relative(words, base, scaling, form, checked_laws(laws, "completep"), attention, of_depth=True)


def spectral(*, distribution: DistributionName = "normal") -> Scheme:
    """Standard deviation min(1, √(fan_out / fan_in)) / √fan_in: every kernel's spectral norm is about √(fan_out / fan_in).

    It needs no base. `plan.optimizer` multiplies SGD's learning rate by fan_out / fan_in and Adam's by 1 / fan_in, so that the
    rate that is given is that of a layer of fan-in 1: for a width of 1000 it is a thousand times the usual one.

    Args:
        distribution: "normal", "truncated_normal", "uniform" or "rademacher".

    Raises:
        ValueError: `distribution` is unknown.

    Source: Yang, Simon and Bernstein 2023, "A spectral condition for feature learning" (arXiv 2310.17813), section 3.

    >>> import jax, varscale as vs
    >>> from flax import linen as nn
    >>> plan = spectral()(nn.Dense(64), jax.ShapeDtypeStruct((1, 256), "float32"))
    >>> plan["kernel"].std, plan["kernel"].multiplier("sgd_learning_rate")
    (0.03125, 0.25)
    """
    checked_distribution(distribution)

    def rule(subject: Subject) -> Choice:
        if not subject.is_matrix:
            return subject.kept()
        fan_in = 1.0 if subject.is_table else subject.main.fan_in
        std = parametrization.spectral_std(fan_in, subject.fan_out)
        growth = parametrization.Growth(fan_in, subject.fan_out)
        # Relative to a layer of fan-in 1; what its gradients are is not known.
        scaling = dataclasses.replace(parametrization.mup(growth, table=3), epsilon=1.0)
        return Choice(spread(distribution, std), "min(1, √(fan_out/fan_in)) / √fan_in", tuple(sorted(named(scaling).items())))

    return Scheme(f"spectral(distribution={distribution!r})", rule)
