"""`assert_variance`: does an initializer keep its claim?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from varscale.initializers.fans import Mode, compute_fans
from varscale.testing.claims import ALPHA, BETA, DETECTABLE_MEAN, DETECTABLE_RATIO, VarianceClaim
from varscale.testing.draws import Init, draw, key_of, same_twice
from varscale.testing.moments import Resolution
from varscale.testing.power import Underpowered, check_detectable, check_error_rates
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
    detectable_ratio: float = DETECTABLE_RATIO,
    detectable_mean: float = DETECTABLE_MEAN,
    alpha: float = ALPHA,
    beta: float = BETA,
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
        detectable_ratio: the variance ratio that must be detected, above 1.
        detectable_mean: the common mean that must be detected, in standard deviations.
        alpha: the false-alarm rate of all parts together.
        beta: the rate of misses at the detectable sizes.
        max_samples: how many weights may be drawn.
        key: source of the keys; by default it follows from the other arguments, so that a case has one verdict.

    Returns:
        The verdict, when it holds.

    Raises:
        AssertionError: the claim is refuted; `error.verdict` and the message say which part.
        Underpowered: `max_samples` cannot see what is asked.
        ValueError: an argument is outside its range.
        TypeError: `dtype` holds no fractions.
    """
    shape = _checked_shape(shape)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"dtype must be a floating-point or complex dtype, got {jnp.dtype(dtype).name}")
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    check_error_rates(alpha, beta)
    check_detectable("detectable_ratio", detectable_ratio, 1)
    check_detectable("detectable_mean", detectable_mean, 0)
    if claim is None:
        claim = _claim(shape, scale, mode, distribution, in_axis, out_axis, batch_axis)
    resolution = Resolution(alpha, beta, detectable_ratio, detectable_mean)
    key = key_of(claim, shape, np.dtype(dtype).name) if key is None else key
    contract = _contract(init, shape, dtype, key)
    if any(finding.log_p == -math.inf for finding in contract):
        return demand(Verdict(str(claim), math.nan, (0.0, math.inf), 0, math.inf, alpha, beta, contract))
    contractions = _contractions(len(shape), in_axis, out_axis, batch_axis)
    sizes = dict(detectable_ratio=detectable_ratio, detectable_mean=detectable_mean, alpha=alpha, beta=beta)
    needed = claim.samples(resolution, math.prod(shape), dtype)
    while True:
        if needed > max_samples:
            sizes_asked = f"a ratio of {detectable_ratio:g} and a mean of {detectable_mean:g} standard deviations"
            message = f"{needed} samples are needed to detect {sizes_asked}"
            raise Underpowered(
                f"{message} (alpha {alpha:g}, beta {beta:g}), max_samples is {max_samples}", allowed=max_samples, needed=needed
            )
        weights = draw(init, shape, dtype, key, max(2, -(-needed // math.prod(shape))))
        try:
            verdict = claim.check(weights, **sizes, contractions=contractions)
            break
        except Underpowered as shortage:
            # The law turned out to have heavier tails than the plan assumed: draw again, with a margin for the estimate
            # of its kurtosis.
            if weights.size < needed:
                raise
            needed = max(shortage.needed + shortage.needed // 4, 2 * needed)
    uses_key = not claim.deviation or any(not np.array_equal(weights[0], other) for other in weights[1:])
    parts = (*contract, equality("uses_key", uses_key, f"{len(weights)} keys{'' if uses_key else ' give the same weights'}"))
    return demand(verdict.and_also(parts))


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(int(length) for length in shape)
    if any(length < 1 for length in shape):
        raise ValueError(f"shape must have no empty or negative axis, for nothing can be claimed of no weights, got {shape}")
    return shape


def _claim(shape, scale, mode, distribution, in_axis, out_axis, batch_axis) -> VarianceClaim:
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale must be finite and not negative, got {scale!r}")
    if distribution == "orthogonal":
        if not isinstance(out_axis, int):
            raise ValueError(f"out_axis must be one axis for distribution 'orthogonal', got {out_axis!r}")
        columns = shape[out_axis]
        return VarianceClaim(scale / max(columns, math.prod(shape) // columns), orthogonal_axis=out_axis, independent=False)
    fans = compute_fans(shape, in_axis, out_axis, batch_axis)
    return VarianceClaim(scale / fans.of(mode), distribution=distribution)


def _contract(init: Init, shape: tuple[int, ...], dtype: DTypeLike, key: Key[Array, ""]) -> tuple[Finding, ...]:
    """What one key shows: shape, dtype, and the same weights when called again."""
    found, same = same_twice(init, shape, dtype, key)
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
