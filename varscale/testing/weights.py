"""`assert_variance`: does an initializer keep its claim?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Key, Shaped

from varscale.initializers.fans import Mode
from varscale.testing.claims import VarianceClaim
from varscale.testing.draws import Init, checked_init, draw, key_of, same_twice_once
from varscale.testing.hints import KernelUse, mean_hints, variance_hints
from varscale.testing.laws import is_low_precision
from varscale.testing.moments import Resolution
from varscale.testing.power import Underpowered
from varscale.testing.profiles import FULL, QUICK, Profile, profile_of
from varscale.testing.verdict import Finding, Verdict, demand, equality

MAX_SAMPLES = 2**27


def assert_variance(
    init: Init,
    shape: Sequence[int],
    *,
    scale: float = 1.0,
    mode: Mode = "fan_in",
    distribution: str | None = None,
    in_axis: int | Sequence[int] = -2,
    out_axis: int | Sequence[int] = -1,
    batch_axis: int | Sequence[int] = (),
    dtype: DTypeLike = jnp.float32,
    claim: VarianceClaim | None = None,
    profile: Profile | str = FULL,
    detectable_ratio: float | None = None,
    detectable_mean: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    max_samples: int = MAX_SAMPLES,
    key: Key[Array, ""] | None = None,
) -> Verdict:
    """Asserts that an initializer draws independent weights of mean 0 and variance `scale / fan`.

    It draws as many kernels, each from its own key, as the error rates and the detectable sizes require, and tests: shape
    and dtype; that the same key gives the same weights and different keys different ones; that all are finite; second
    moment and mean; that the entries are independent and alike (output second moment on constant inputs, correlations at
    every lag and of every pair of slices, moments of every slice); and, of a named law, its bound, its distribution
    function and its extremes.

    Args:
        init: any `init(key, shape, dtype)`: of this library, of jax or flax, or your own.
        shape: of the kernel, without empty axes.
        scale: the variance times the fan.
        mode: the fan: `"fan_in"`, `"fan_out"`, `"fan_avg"` or `"fan_geo_avg"`.
        distribution: the law: `"normal"`, `"truncated_normal"`, `"uniform"`, `"rademacher"`; `"orthogonal"` for a matrix
            with columns along `out_axis` and orthogonal rows or columns of squared length `scale` (`mode` then does not
            matter); None for any symmetric law.
        in_axis: axis or axes of the inputs.
        out_axis: axis or axes of the outputs.
        batch_axis: axis or axes that count for neither.
        dtype: of the weights. Bits are counted: what the rounding to bfloat16, float16 or float8 adds to the variance is
            part of the claim.
        claim: a claim to test instead of `scale`, `mode` and `distribution`.
        profile: error rates and detectable sizes: "full" sees a variance off by 10 % and a mean of .012 standard
            deviations; "quick" 20 % and .1, in a fiftieth of the samples (the verdict says what it cannot see); or a
            `Profile` of your own.
        detectable_ratio: the variance ratio that must be detected, above 1, in place of the profile's.
        detectable_mean: the common mean that must be detected, in standard deviations, in place of the profile's.
        alpha: the false-alarm rate of all parts together, in place of the profile's.
        beta: the rate of misses at the detectable sizes, in place of the profile's.
        max_samples: how many weights may be drawn.
        key: source of the keys; by default it follows from the other arguments, so that a case has one verdict.

    Returns:
        The verdict, when it holds.

    Raises:
        AssertionError: the claim is refuted; `error.verdict` and the message say which part, and which usual mistake has
            this ratio.
        Underpowered: `max_samples` cannot see what is asked.
        ValueError: an argument is outside its range.
        TypeError: `dtype` holds no fractions, or `init` is no initializer, as `vs.he_normal` without parentheses.

    Example:
        >>> import varscale as vs
        >>> from varscale import testing
        >>> verdict = testing.assert_variance(vs.he_normal(), (3, 3, 16, 32), scale=2.0, profile="quick")
        >>> verdict.claim
        'variance 2/fan_in, fan_in 144, in float32 (3, 3, 16, 32), 2 draws'
        >>> try:  # variance 1/16: the window of 3 x 3 is forgotten
        ...     testing.assert_variance(vs.normal(0.25), (3, 3, 16, 32), profile="quick")
        ... except AssertionError as error:
        ...     print(error.verdict.hints[0])
        9 = 3·3: the receptive field is missing from the fan
    """
    __tracebackhide__ = True  # pytest shows the line of the test
    shape = _checked_shape(shape)
    init = checked_init(init)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"dtype must be a floating-point or complex dtype, got {jnp.dtype(dtype).name}")
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    chosen = profile_of(profile).but(detectable_ratio=detectable_ratio, detectable_mean=detectable_mean, alpha=alpha, beta=beta)
    use = None
    if claim is None:
        use = KernelUse(shape, scale, mode, in_axis, out_axis, batch_axis)
        claim = _claim(use, distribution)
    key = key_of(claim, shape, np.dtype(dtype).name) if key is None else key
    contract = _contract(init, shape, dtype, key)
    if any(finding.log_p == -math.inf for finding in contract):
        rates = chosen.alpha, chosen.beta
        return demand(Verdict(str(claim), math.nan, (0.0, math.inf), 0, math.inf, *rates, contract))
    weights, verdict = _measured(init, shape, dtype, claim, chosen, key, max_samples, (in_axis, out_axis, batch_axis))
    uses_key = not claim.deviation or any(not np.array_equal(weights[0], other) for other in weights[1:])
    parts = (*contract, equality("uses_key", uses_key, f"{len(weights)} keys{'' if uses_key else ' give the same weights'}"))
    verdict = verdict.and_also(parts)
    return demand(verdict if claim.orthogonal_axis is not None else _hinted(verdict, use, dtype))


def _measured(
    init: Init,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    claim: VarianceClaim,
    profile: Profile,
    key: Key[Array, ""],
    most: int,
    roles: tuple[int | Sequence[int], ...],
) -> tuple[Shaped[np.ndarray, "replicates *shape"], Verdict]:
    """Draws as many kernels as the profile needs, and the verdict on them.

    Raises:
        Underpowered: that is more than `most` weights.
    """
    __tracebackhide__ = True
    resolution = Resolution(profile.alpha, profile.beta, profile.detectable_ratio, profile.detectable_mean)
    needed = claim.samples(resolution, math.prod(shape), dtype)
    while True:
        if needed > most:
            shortage = resolution.shortage(most, claim.law(dtype)) if resolution.samples(claim.law(dtype)) > most else ""
            message = f"{needed} samples are needed, max_samples is {most}{': ' if shortage else ''}{shortage}"
            fewer = resolution.mean < QUICK.detectable_mean and claim.orthogonal_axis is None
            raise Underpowered(message + " (profile 'quick' needs fewer)" * fewer, allowed=most, needed=needed)
        weights = draw(init, shape, dtype, key, max(2, -(-needed // math.prod(shape))))
        try:
            return weights, claim.check(weights, profile=profile, contractions=_contractions(len(shape), *roles))
        except Underpowered as shortage:
            # The law turned out to have heavier tails than the plan assumed: draw again, with a margin for the estimate
            # of its kurtosis.
            if weights.size < needed:
                raise
            needed = max(shortage.needed + shortage.needed // 4, 2 * needed)


def _hinted(verdict: Verdict, use: KernelUse | None, dtype: DTypeLike) -> Verdict:
    """The verdict with what usually causes such a ratio or mean."""
    failed = verdict.failed
    hints = variance_hints(verdict.confidence_interval, use) if "second_moment" in failed else ()
    if "mean" in failed:
        hints += mean_hints(verdict.mean, verdict.ratio, jnp.dtype(dtype).name if is_low_precision(dtype) else None)
    return dataclasses.replace(verdict, hints=hints)


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(int(length) for length in shape)
    if any(length < 1 for length in shape):
        raise ValueError(f"shape must have no empty or negative axis, for nothing can be claimed of no weights, got {shape}")
    return shape


def _claim(use: KernelUse, distribution: str | None) -> VarianceClaim:
    scale = use.scale
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale must be finite and not negative, got {scale!r}")
    if distribution == "orthogonal":
        if not isinstance(use.out_axis, int):
            raise ValueError(f"out_axis must be one axis for distribution 'orthogonal', got {use.out_axis!r}")
        columns = use.shape[use.out_axis]
        larger = max(columns, math.prod(use.shape) // columns)
        words = f"orthogonal rows or columns of squared length {scale:g}, whichever are fewer"
        return VarianceClaim(scale / larger, orthogonal_axis=use.out_axis, independent=False, words=words)
    words = f"variance {scale:g}/{use.mode}, {use.mode} {use.fan:g}{f', {distribution}' if distribution else ''}"
    return VarianceClaim(scale / use.fan, distribution=distribution, words=words)


def _contract(init: Init, shape: tuple[int, ...], dtype: DTypeLike, key: Key[Array, ""]) -> tuple[Finding, ...]:
    """What one key shows: shape, dtype, and the same weights when called again."""
    found, same = same_twice_once(init, shape, dtype, key)
    says = f"{found.shape} in {found.dtype} returned, {shape} in {jnp.dtype(dtype).name} asked for"
    return (
        equality("signature", found.shape == shape and found.dtype == dtype, says),
        equality("deterministic", same, "the same key gives " + ("the same weights" if same else "different weights")),
    )


def _contractions(rank: int, in_axis, out_axis, batch_axis) -> tuple[tuple[int, ...], ...]:
    """The axes summed over forward and backward, in the coordinates of draws stacked along a leading axis."""
    ins, outs, batch = (
        {axis % rank for axis in ((axes,) if isinstance(axes, int) else axes) if -rank <= axis < rank}
        for axes in (in_axis, out_axis, batch_axis)
    )
    field = set(range(rank)) - ins - outs - batch
    return tuple(tuple(sorted(1 + axis for axis in group)) for group in (field | ins, field | outs) if group)
