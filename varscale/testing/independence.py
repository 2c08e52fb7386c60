"""Are the entries of a kernel independent and alike? Tests that assume no law, only what the claim itself says.

If the weights are independent and symmetric about zero then, given their magnitudes, their signs are fair coins; and if
they are identically distributed then every slice of the kernel is a sample without replacement from all of it. Both give
bounds that hold for any law at any sample size (`varscale.testing.tails`), so none of these tests has to know or estimate
one.

Every function takes standardized weights of shape `(replicates, *kernel shape)` in float64.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from scipy import fft

from varscale.testing.tails import log_bernstein, log_symmetric_squares, log_symmetric_sum
from varscale.testing.verdict import Finding

Weights = Float[np.ndarray, "replicates *shape"]

_PAIRED_SLICES, _PAIRED_ENTRIES = 192, 2048
_COLLISION_SAMPLE, _COLLISION_RATE = 2**15, 2.0**-20


def output_second_moment(weights: Weights, contractions: tuple[tuple[int, ...], ...]) -> Finding:
    """`E[y²]` for the constant input, over every axis alone and over the axes a layer contracts.

    On the constant input, as on any input of nonzero mean such as a ReLU's, a mean or a correlation common to the entries
    of a sum adds up (maths: the second term of the law). Given the magnitudes, `(Σw)²/Σw²` has expectation 1.
    """
    axes = {(axis,) for axis in range(weights.ndim)} | {tuple(sorted(group)) for group in contractions}
    worst, tested, off = (0.0, "no axis to sum over"), 0, False
    for group in sorted(axes):
        if math.prod(weights.shape[axis] for axis in group) < 2:
            continue
        tested += 1
        sums, squares = weights.sum(axis=group) ** 2, np.square(weights).sum(axis=group)
        present = squares > 0
        count = int(present.sum())
        if not count:
            continue
        ratio = float(np.mean(sums[present] / squares[present]))
        log_p = min(0.0, math.log(2) + min(log_symmetric_squares(ratio, count)))
        if log_p <= worst[0]:
            says = f"E[y²] is {ratio:.4g} of the claim on constant inputs, {count} sums over {_axis_names(group)}"
            worst, off = (log_p, says), not 0.5 <= ratio <= 2
    return Finding("output_second_moment", min(0.0, worst[0] + math.log(max(tested, 1))), worst[1], off)


def autocorrelation(weights: Weights) -> Finding:
    """Correlation of the kernel with itself shifted, at every shift in memory order, and of each draw with the later
    draws.
    """
    flat = weights.reshape(len(weights), -1)
    worst, lags = (0.0, "one entry, no lag"), 0
    for rows, what in ((flat, "entries {} apart"), (flat.T, "keys {} apart")):
        count, length = rows.shape
        if length < 2:
            continue
        lags += length - 1
        scores = np.abs(_lagged(rows) / np.sqrt(np.maximum(_lagged(np.square(rows)), 1e-9 * count)))
        lag = int(np.argmax(scores[1:])) + 1
        log_p = float(log_symmetric_sum(scores[lag]))
        worst = min(worst, (log_p, f"{what.format(lag)} correlate by {scores[lag]:.3g} standard errors"))
    return Finding("autocorrelation", min(0.0, worst[0] + math.log(max(lags, 1))), worst[1])


def _lagged(rows: Float[np.ndarray, "count length"]) -> Float[np.ndarray, " length"]:
    length = rows.shape[1]
    size = int(fft.next_fast_len(2 * length, real=True))  # pyright: ignore[reportArgumentType]
    power = np.zeros(size // 2 + 1)
    for start in range(0, len(rows), step := max(1, 2**21 // size)):
        power += np.square(np.abs(np.asarray(fft.rfft(rows[start : start + step], size)))).sum(axis=0)
    return np.asarray(fft.irfft(power, size))[:length]


def paired_slices(weights: Weights) -> Finding:
    """Correlation of any two slices along any axis (two rows, two columns, two taps, two keys), in a bounded sample of
    them.
    """
    worst, pairs = (0.0, "no two slices"), 0
    generator = np.random.default_rng(0)
    for axis in range(weights.ndim):
        length = weights.shape[axis]
        if length < 2:
            continue
        chosen = np.sort(generator.permutation(length)[:_PAIRED_SLICES])
        slices = np.moveaxis(weights, axis, 0)
        if (entries := math.prod(slices.shape[1:])) > _PAIRED_ENTRIES:
            sample = np.sort(generator.permutation(entries)[:_PAIRED_ENTRIES])
            slices = slices[(chosen[:, None], *np.unravel_index(sample, slices.shape[1:]))]
        else:
            slices = slices[chosen].reshape(len(chosen), -1)
        squares = np.square(slices)
        products, scale = np.abs(slices @ slices.T), np.sqrt(squares @ squares.T)
        np.fill_diagonal(products, 0.0)
        scores = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
        pairs += len(chosen) * (len(chosen) - 1) // 2
        first, second = np.unravel_index(int(np.argmax(scores)), scores.shape)
        score = float(scores[first, second])
        says = f"slices {chosen[first]} and {chosen[second]} of {_axis_names((axis,))} correlate by {score:.3g} standard errors"
        worst = min(worst, (float(log_symmetric_sum(score)), says))
    return Finding("paired_slices", min(0.0, worst[0] + math.log(max(pairs, 1))), worst[1])


def homogeneity(weights: Weights) -> tuple[Finding, Finding]:
    """Second moment and mean of every slice along every axis, over all draws together and in each draw alone."""
    squares = np.square(weights)
    center, variance = float(squares.mean()), float(squares.var())
    up, down = float(squares.max()) - center, center - float(squares.min())
    worst_square, worst_mean = (0.0, "one slice"), (0.0, "one slice")
    slices, off = 0, False
    for kept in _slicings(weights.shape):
        rest = tuple(axis for axis in range(weights.ndim) if axis not in kept)
        count = math.prod(weights.shape[axis] for axis in rest)
        means, sums, norms = squares.mean(axis=rest), weights.sum(axis=rest), np.sqrt(squares.sum(axis=rest))
        slices += means.size
        # Rounding of the sums themselves is not a deviation: entries of one magnitude have no variance to hide it in.
        deviation = np.where(np.abs(means - center) <= 1e-6 * center, 0.0, means - center)
        log_p = np.minimum(
            log_bernstein(np.maximum(deviation, 0), count, variance, up),
            log_bernstein(np.maximum(-deviation, 0), count, variance, down),
        )
        index = np.unravel_index(int(np.argmin(log_p)), log_p.shape)
        if log_p[index] <= worst_square[0]:
            says = (
                f"second moment {means[index]:.4g} (kernel {center:.4g}) in slice {_index_names(kept, index)}, {count} weights"
            )
            worst_square, off = (float(log_p[index]), says), not center / 2 <= means[index] <= 2 * center
        scores = np.abs(np.divide(sums, norms, out=np.zeros_like(sums), where=norms > 0))
        index = np.unravel_index(int(np.argmax(scores)), scores.shape)
        says = f"mean {scores[index]:.3g} standard errors from 0 in slice {_index_names(kept, index)}"
        worst_mean = min(worst_mean, (float(log_symmetric_sum(scores[index])), says))
    # Both tails of a second moment; the mean's bound has both already.
    correction = math.log(max(slices, 1))
    return (
        Finding("slice_second_moments", min(0.0, worst_square[0] + correction + math.log(2)), worst_square[1], off),
        Finding("slice_means", min(0.0, worst_mean[0] + correction), worst_mean[1]),
    )


def _slicings(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Axes to keep: each axis alone, and each kernel axis together with the draw, where more than one slice results."""
    alone = [(axis,) for axis in range(len(shape)) if shape[axis] > 1]
    return alone + [(0, axis) for axis in range(1, len(shape)) if shape[axis] > 1 and shape[0] > 1]


def collisions(weights: Weights) -> Finding:
    """Equal values among weights of a continuous law, kept with 24 bits or more.

    A generator of at least 20 random bits gives a weight the value of one of the `i` before it with probability `i·2⁻²⁰`
    at most, so that the number of such weights is below a sum of independent Bernoulli variables, and Chernoff's bound
    for that sum applies.
    """
    values = weights.reshape(-1)
    values = values[:: max(1, values.size // _COLLISION_SAMPLE)][:_COLLISION_SAMPLE]
    repeated = values.size - np.unique(values).size
    expected = values.size * (values.size - 1) / 2 * _COLLISION_RATE
    log_p = 0.0 if repeated <= expected else -(repeated * math.log(repeated / expected) - repeated + expected)
    return Finding("collisions", log_p, f"{repeated} of {values.size} weights repeat the value of another")


def _axis_names(group: tuple[int, ...]) -> str:
    return " and ".join("the keys" if axis == 0 else f"axis {axis - 1}" for axis in group)


def _index_names(kept: tuple[int, ...], index: tuple[np.intp, ...]) -> str:
    return ", ".join(
        f"key {position}" if axis == 0 else f"{position} of axis {axis - 1}" for axis, position in zip(kept, index, strict=True)
    )
