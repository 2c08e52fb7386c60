"""`assert_output_variance`: does a layer's output have the second moment that the law gives it?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Inexact, Key, PyTree

from varscale.programs.faces import Inputs, as_inputs, program
from varscale.testing.draws import key_of, map_keys
from varscale.testing.energies import LEAST, Outcome, mean_is_one
from varscale.testing.hints import output_hints
from varscale.testing.laws import known_law
from varscale.testing.power import Resolution, Underpowered, resolution, samples_for
from varscale.testing.profiles import FULL, Profile, profile_of
from varscale.testing.quadratic import QuadraticForm, quadratic_form
from varscale.testing.verdict import PARTS, Finding, Verdict, demand, equality


def assert_output_variance(
    layer: Any,
    x: Inexact[Array, "..."] | Inputs,
    *,
    scale: float = 1.0,
    expected: float | None = None,
    distribution: str | None = None,
    profile: Profile | str = FULL,
    detectable_ratio: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    max_replicates: int = 2**20,
    key: Key[Array, ""] | None = None,
) -> Verdict:
    """Asserts `E[y²] = n·Var[w]·E[x²]` of a layer on a given input, over fresh weights.

    Every replicate initializes the layer anew and takes the mean of `y²` over the whole output. With a named
    `distribution` and a layer that is linear in one random kernel, the law of that mean given the input is known
    (`varscale.testing.quadratic`) and the p-value exact for one example through a dense layer of normal weights, a proven
    bound for anything else; otherwise it is the log-ratio statistic in batches that must agree.

    Args:
        layer: a linen module; an nnx factory `lambda rngs: Layer(..., rngs=rngs)`; a pair `(init, apply)` called as
            `apply(init(key, x), x)`;
            or a function `f(key, x)`.
        x: the input, a batch of inputs, or `vs.inputs(...)`, whose first is then the `x` of the law. The test is
            conditional on it: it may be anything, a ReLU's output included.
        scale: the product `n·Var[w]` claimed, of the fan of use: 1 for LeCun's, 2 for He's.
        expected: `E[y²]` claimed, in place of `scale` times the mean of `x²`.
        distribution: the law of the kernel, or None.
        profile: error rates and detectable ratio: "full" sees E[y²] off by 10 %, "quick" by 20 %; or a `Profile`.
        detectable_ratio: the ratio of second moments that must be detected, above 1, in place of the profile's.
        alpha: the false-alarm rate, in place of the profile's.
        beta: the rate of misses at the detectable ratio, in place of the profile's.
        max_replicates: how many initializations may be made.
        key: source of the keys; by default it follows from the shape of `x` and the claim.

    Returns:
        The verdict, when it holds. `samples` counts replicates.

    Raises:
        AssertionError: the claim is refuted; `error.verdict` and the message say how.
        Underpowered: `max_replicates` cannot see what is asked.
        ValueError: an argument is outside its range.
        TypeError: `layer` is none of the four.

    Example:
        >>> import jax, varscale as vs
        >>> from flax import nnx
        >>> from varscale import testing
        >>> x = jax.nn.relu(jax.random.normal(jax.random.key(0), (2, 64)))
        >>> def layer(rngs):
        ...     return nnx.Linear(64, 32, kernel_init=vs.he_normal(), rngs=rngs)
        >>> testing.assert_output_variance(layer, x, scale=2.0, profile="quick").holds
        True
    """
    __tracebackhide__ = True  # pytest shows the line of the test
    chosen = profile_of(profile).but(detectable_ratio=detectable_ratio, alpha=alpha, beta=beta)
    alpha, beta, detectable_ratio = chosen.alpha, chosen.beta, chosen.detectable_ratio
    law = known_law(distribution)
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale must be finite and not negative, got {scale!r}")
    given = as_inputs(x)
    array = np.asarray(given.args[0])
    second_moment = float(np.mean(np.square(np.abs(array).astype(np.float64))))
    claimed = scale * second_moment if expected is None else float(expected)
    if not (math.isfinite(claimed) and claimed >= 0):
        raise ValueError(f"the claimed E[y²] must be finite and not negative, got {claimed!r} (mean of x² {second_moment!r})")
    key = key_of(array.shape, claimed, distribution) if key is None else key
    init, apply = as_functions(layer, given)
    experiment = _Experiment(init, apply, key, claimed, alpha / PARTS, beta, detectable_ratio, max_replicates)
    form = None if law is None or not claimed else quadratic_form(init, apply, key, gaussian=law.name == "normal")
    if not claimed:
        energies, finding, resolve = _zero(experiment)
    elif form is not None:
        energies, finding, resolve = _known(form, experiment)
    else:
        energies, finding, resolve = mean_is_one(experiment.energies, experiment.alpha, beta, detectable_ratio)
    infinite = int(np.sum(~np.isfinite(energies)))
    findings = (equality("finite", not infinite, f"{infinite} of {len(energies)} outputs are not finite"), finding)
    ratio = float(energies.mean()) if claimed else float(energies.max() and math.inf) or 1.0
    low, high, detectable = resolve(len(energies))
    interval = (ratio / high, ratio / low)
    words = f"E[y²] = {claimed:.6g} given x of shape {array.shape} with E[x²] = {second_moment:.6g}, by the "
    words += "law of this quadratic form in the weights" if form is not None else "scatter of replicates"
    verdict = Verdict(words, ratio, interval, len(energies), detectable, alpha, beta, findings)
    return demand(dataclasses.replace(verdict, hints=() if verdict.holds else output_hints(interval, array.shape)))


Init = Callable[[Key[Array, ""]], PyTree]
Apply = Callable[[PyTree], Inexact[Array, "..."]]


def as_functions(layer: Any, x: Inputs) -> tuple[Init, Apply]:
    """`key -> parameters` and `parameters -> output` on the input, for each kind of layer.

    Raises:
        TypeError: the layer is of no such kind.
    """
    if isinstance(layer, nnx.Module):
        name = type(layer).__name__
        raise TypeError(
            f"layer must be a factory `lambda rngs: {name}(..., rngs=rngs)`: an instance of {name} has its weights already"
        )
    if isinstance(layer, tuple) and len(layer) == 2 and all(callable(part) for part in layer):
        start, run = cast(tuple[Callable[..., PyTree], Callable[..., Inexact[Array, "..."]]], layer)
        return lambda key: start(key, *x.args, **x.kwargs), lambda parameters: run(parameters, *x.args, **x.kwargs)
    face = program(layer)
    if face.init is not None:
        return partial(_second, face.init, x), lambda parameters: face.apply(parameters, x)[0]
    # The key stands in the parameters' place: nothing is linear in it, so that no law of the output is deduced.
    function = cast(Callable[..., Any], layer)
    return lambda key: key, lambda key: function(key, *x.args, **x.kwargs)


def _second(function: Callable[[Any, Inputs], PyTree], x: Inputs, key: Key[Array, ""]) -> PyTree:
    return function(key, x)


@dataclass(frozen=True, eq=False)
class _Experiment:
    """Fresh initializations of a layer, and what is asked of their number."""

    init: Init
    apply: Apply
    key: Key[Array, ""]
    claimed: float
    alpha: float
    beta: float
    ratio: float
    most: int

    def energies(self, count: int) -> Float[np.ndarray, " replicates"]:
        """Mean of `y²` over the output, divided by the claim where that is not 0, of `count` replicates or a few more."""
        __tracebackhide__ = True
        if count > self.most:
            rates = f"(alpha {self.alpha * PARTS:g}, beta {self.beta:g})"
            message = f"{count} replicates are needed to detect a ratio of {self.ratio:g} {rates}"
            mend = f"pass a larger detectable_ratio, alpha or beta, profile='quick', or max_replicates={count}"
            raise Underpowered(f"{message}, max_replicates is {self.most}: {mend}", allowed=self.most, needed=count)

        sizes = jax.eval_shape(lambda key: (self.init(key), self.apply(self.init(key))), self.key)
        entries = sum(leaf.size for leaf in jax.tree.leaves(sizes))
        found = map_keys(self._energy, jax.random.fold_in(self.key, count), count, entries, together=min(count, LEAST))
        return np.asarray(found, np.float64) / (self.claimed or 1.0)

    def _energy(self, key: Key[Array, ""]) -> Float[Array, ""]:
        magnitude = jnp.abs(self.apply(self.init(key)))
        return jnp.mean(jnp.square(magnitude.astype(jnp.promote_types(jnp.float32, magnitude.dtype))))


def _zero(experiment: _Experiment) -> Outcome:
    energies = experiment.energies(2)
    return (
        energies,
        equality("second_moment", not energies.any(), f"E[y²] is {energies.max():.6g}"),
        lambda count: (1.0, 1.0, 1.0),
    )


def _known(form: QuadraticForm, experiment: _Experiment) -> Outcome:
    __tracebackhide__ = True

    def resolve(count: float) -> Resolution:
        return resolution(lambda ratio: form.log_tails(ratio, count), experiment.alpha, experiment.beta)

    energies = experiment.energies(samples_for(resolve, experiment.ratio, least=2))
    ratio = float(energies.mean())
    log_p = -math.inf if not ratio > 0 else min(0.0, math.log(2) + min(form.log_tails(ratio, len(energies))))
    says = f"E[y²] is {ratio:.6g} of the claim, {len(form.eigenvalues)} degrees of freedom a replicate"
    return energies, Finding("second_moment", log_p, says), resolve
