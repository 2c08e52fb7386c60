"""What the numbers of parameters tell by themselves: equal streams, constants, NaN, low-precision draws, their law."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from varscale.auditing.findings import Finding

_PREFIX = 4096  # entries by which leaves are compared
_CHUNK = 1 << 22  # entries that are read at a time
_FEWEST = 32  # entries below which no stream is recognized


@dataclasses.dataclass(frozen=True)
class Summary:
    """What one pass over a leaf tells.

    Attributes:
        path: its path.
        shape: its shape.
        dtype: the name of its dtype.
        size: how many numbers.
        nonfinite: how many of them are NaN or infinite.
        mean: their mean.
        second_moment: their mean square.
        kurtosis: E[(w − E[w])⁴] / Var[w]².
        smallest: the smallest.
        largest: the largest.
        prefix: the first of them, flat, as float64.
        transposed: the same of a matrix's transpose; empty of others.
        distinct: how many different values among the first 65536.
        repeats: axes of size above 1 along which all slices are equal.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    nonfinite: int
    mean: float
    second_moment: float
    kurtosis: float
    smallest: float
    largest: float
    prefix: np.ndarray
    transposed: np.ndarray
    distinct: int
    repeats: tuple[int, ...]

    @property
    def variance(self) -> float:
        return max(0.0, self.second_moment - self.mean**2)

    @property
    def constant(self) -> bool:
        return self.smallest == self.largest

    @property
    def matrix(self) -> bool:
        """Whether it has two axes of more than one entry."""
        return sum(n > 1 for n in self.shape) > 1

    @property
    def random(self) -> bool:
        """Whether its first numbers look drawn: neither few values nor an order (a table of sines, 1 to N) in them.

        The number of runs above and below the median of n independent numbers has mean n/2 + 1 and variance about n/4
        (Wald and Wolfowitz 1940): six deviations are left once in 5e8.
        """
        n = len(self.prefix)
        if n < _FEWEST or self.nonfinite or self.repeats or len(np.unique(self.prefix)) < _FEWEST:
            return False
        above = self.prefix > np.median(self.prefix)
        runs = 1 + np.count_nonzero(above[1:] != above[:-1])
        return bool(abs(runs - n / 2 - 1) < 6 * math.sqrt(n) / 2)


def summary(path: str, leaf: Any) -> Summary:
    """One pass over a leaf, a chunk at a time."""
    array = np.asarray(leaf)
    flat = array.reshape(-1)
    size = flat.size
    moments = np.zeros(5)
    low, high = math.inf, -math.inf
    nonfinite = 0
    shift = 0.0
    for start in range(0, size, _CHUNK):
        chunk = _real(flat[start : start + _CHUNK])
        finite = np.isfinite(chunk)
        if not finite.all():
            nonfinite += int(chunk.size - np.count_nonzero(finite))
            chunk = chunk[finite]
        if not chunk.size:
            continue
        if start == 0:
            shift = float(chunk.mean())  # about which powers lose no digits
        low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
        centred = chunk - shift
        square = centred * centred
        moments += chunk.size, centred.sum(), square.sum(), (square * centred).sum(), (square * square).sum()
    count = max(moments[0], 1.0)
    first, second, third, fourth = moments[1:] / count
    variance = max(second - first**2, 0.0)
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    head = _real(flat[: 1 << 16])
    return Summary(
        path, tuple(array.shape), str(array.dtype), size, nonfinite, shift + first, variance + (shift + first) ** 2,
        central / variance**2 if variance > 0 else math.nan, low, high, head[:_PREFIX], _transposed(array),
        len(np.unique(head)), _repeats(array),
    )  # fmt: skip


def _transposed(array: np.ndarray) -> np.ndarray:
    """The first numbers of a matrix's transpose."""
    if array.ndim != 2 or 0 in array.shape:
        return np.empty(0)
    return _real(array.T[: -(-_PREFIX // array.shape[0])].reshape(-1)[:_PREFIX])


def _real(x: np.ndarray) -> np.ndarray:
    """The numbers as float64; of complex ones the real part."""
    return np.real(x).astype(np.float64)


def _repeats(array: np.ndarray) -> tuple[int, ...]:
    """Axes along which every slice equals the first."""
    found = []
    for axis, n in enumerate(array.shape):
        if n > 1:
            first, second = np.take(array, [0], axis), np.take(array, [1], axis)
            if np.array_equal(first, second) and all(np.array_equal(first, np.take(array, [i], axis)) for i in range(2, n)):
                found.append(axis)
    return tuple(found)


def check_finite(leaves: Sequence[Summary]) -> Iterator[Finding]:
    """NaN and infinities."""
    for leaf in leaves:
        if leaf.nonfinite:
            share = leaf.nonfinite / leaf.size
            yield Finding(
                "VS121", "error", leaf.path, f"{leaf.nonfinite} of its {leaf.size} numbers ({share:.2g}) are NaN or infinite: "
                "every output that reads them is too.", share,
            )  # fmt: skip


def check_constants(leaves: Sequence[Summary]) -> Iterator[Finding]:
    """Matrices all of whose numbers, or columns, are equal."""
    for leaf in leaves:
        name = leaf.path.rsplit("/", 1)[-1].lower()
        if not leaf.matrix or not leaf.size or name not in _KERNELS or (leaf.constant and leaf.smallest == 0):
            continue
        mend = f'vs.reinitialize(params, {{"{leaf.path}": vs.lecun_normal()}}, key)'
        if leaf.constant:
            told = f"all its numbers are {leaf.smallest:.4g}: its units compute the same, get the same gradient and "
            yield Finding("VS105", "error", leaf.path, told + "stay equal.", leaf.smallest, mend)
        elif leaf.repeats:
            axis = leaf.repeats[-1]
            told = f"its {leaf.shape[axis]} slices along axis {axis} are equal: what they make stays equal in training."
            yield Finding("VS105", "error", leaf.path, told, float(axis), mend)


_KERNELS = {"kernel", "weight", "embedding", "w", "recurrent_kernel", "input_embedding"}


def check_precision(leaves: Sequence[Summary]) -> Iterator[Finding]:
    """Draws that were made in bfloat16 or float16 and so take few values.

    A native draw in bfloat16 goes through a uniform number of 7 random bits, one in float16 of 10: 128 and 1024 values. Of n
    numbers drawn in float32 and rounded, over a thousand are different where n is 4096.
    """
    for leaf in leaves:
        if leaf.size < 4096 or not leaf.random:
            continue
        for bits, name in ((7, "bfloat16"), (10, "float16")):
            if 0.75 * 2**bits < leaf.distinct <= 2**bits + 2 and leaf.size >= 16 * 2**bits:
                shift = leaf.mean / math.sqrt(leaf.variance) if leaf.variance else 0.0
                yield Finding(
                    "VS115", "warning", leaf.path, f"it takes {leaf.distinct} values: it was drawn in {name}, whose draws lack "
                    f"tails and have a mean of {shift:+.3f} standard deviations; over n inputs that mean counts √n times.",
                    float(leaf.distinct), "draw it in float32 and round once: varscale's initializers do, "
                    'vs.he_normal()(key, shape, "bfloat16")',
                )  # fmt: skip


def check_streams(leaves: Sequence[Summary]) -> Iterator[Finding]:
    """Leaves made from the same random numbers: equal, proportional, or both monotone in them.

    Which of the first n numbers lie above their median is the same for all of these, and for two independent leaves with
    probability 2/C(n, n/2). A pair that agrees in it must also have a correlation above .999 over the prefix they share, for
    independent numbers less likely than (1 − .999²)^(n/2 − 1) < 1e-40; or, from 128 numbers on, one above .9 (< 1e-45).
    """
    first: dict[tuple[int, bytes], Summary] = {}
    for leaf in (leaf for leaf in leaves if leaf.random):
        ways = [line for line in (leaf.prefix, leaf.transposed) if len(line)]
        others = [(other, line) for line in ways if (other := _first(first, line)) is not None]
        for key in _signs(leaf.prefix):
            first.setdefault(key, leaf)
        if found := next(filter(None, (_related(other, leaf, line) for other, line in others)), None):
            yield found


def _signs(prefix: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """Which of the first n numbers lie above their median, for several n."""
    for n in (length for length in (256, 128, 64, 32) if length <= len(prefix)):
        above = prefix[:n] > np.median(prefix[:n])
        yield n, np.packbits(above if above[0] else ~above).tobytes()


def _first(known: Mapping[tuple[int, bytes], Summary], prefix: np.ndarray) -> Summary | None:
    """The first leaf whose numbers begin alike."""
    return next((known[key] for key in _signs(prefix) if key in known), None)


def _related(one: Summary, other: Summary, numbers: np.ndarray) -> Finding | None:
    """The finding about two leaves of the same stream, if they are.

    Args:
        one: the first of them.
        other: the second.
        numbers: the second's first numbers, of itself or of its transpose.
    """
    n = min(len(one.prefix), len(numbers))
    a, b = one.prefix[:n], numbers[:n]
    correlation = float(np.corrcoef(a, b)[0, 1])
    ratio = float(a @ b / (a @ a))
    name, shape = repr(one.path), other.shape
    if numbers is not other.prefix:
        name, shape = f"{name}, transposed", shape[::-1]
    if abs(correlation) > 0.999:
        equal = bool(np.array_equal(a, b))
        alike = "equal to" if equal else f"{ratio:.4g} times"
        told = f"its numbers are {alike} those of {name}: both were drawn from one key (or are one weight stored twice)."
        told += " A readout that repeats its embedding gives each input token a logit of its own."
        figure = 1.0 if equal else ratio
    elif n >= 128 and abs(correlation) > 0.9:
        told = f"its numbers and those of {name} have a correlation of {correlation:.3f}: both were drawn from one key."
        figure = correlation
    else:
        return None
    level = "warning" if figure == 1.0 and one.shape == shape else "error"
    return Finding(
        "VS113", level, other.path, told, figure, "give each its own key: jax.random.split(key), or self.make_rng in linen"
    )


_USUAL: tuple[tuple[str, Any], ...] = (
    ("normal(.02)", lambda i, o: 0.02),
    ("normal(.01)", lambda i, o: 0.01),
    ("normal(1)", lambda i, o: 1.0),
    ("lecun: 1/√fan_in", lambda i, o: i**-0.5),
    ("he: √(2/fan_in)", lambda i, o: (2 / i) ** 0.5),
    ("glorot: √(2/(fan_in + fan_out))", lambda i, o: (2 / (i + o)) ** 0.5),
    ("small: √(2/(5·fan_in))", lambda i, o: (2 / (5 * i)) ** 0.5),
    ("PyTorch's Linear: uniform ±1/√fan_in", lambda i, o: (3 * i) ** -0.5),
    ("1/√features of an embedding", lambda i, o: o**-0.5),
)


def usual_laws(leaf: Summary) -> tuple[str, ...]:
    """The usual laws whose standard deviation a matrix has, to within five of its own sampling errors.

    The fans are those of flax's layout, (..., in, out), and of PyTorch's, (out, in, ...).
    """
    if not leaf.matrix or not leaf.random or not leaf.variance:
        return ()
    deviation = math.sqrt(leaf.variance)
    error = math.sqrt(max(leaf.kurtosis - 1, 0.1) / leaf.size) / 2
    receptive = math.prod(leaf.shape[:-2]), math.prod(leaf.shape[2:])
    fans = {
        (receptive[0] * leaf.shape[-2], receptive[0] * leaf.shape[-1]),
        (receptive[1] * leaf.shape[1], receptive[1] * leaf.shape[0]),
    }
    found = []
    for name, law in _USUAL:
        if any(abs(math.log(deviation / law(*fan))) < 5 * error for fan in fans):
            found.append(name)
    return tuple(found)


def check_usual(leaves: Sequence[Summary]) -> Iterator[Finding]:
    """Which of the usual laws the matrices have."""
    groups: dict[tuple[str, ...], list[Summary]] = {}
    for leaf in leaves:
        if leaf.matrix and leaf.random:
            groups.setdefault(usual_laws(leaf), []).append(leaf)
    for laws, members in groups.items():
        deviations = [math.sqrt(leaf.variance) for leaf in members]
        spread = f"{min(deviations):.3g}" if len(members) == 1 else f"{min(deviations):.3g} to {max(deviations):.3g}"
        whom = members[0].path if len(members) == 1 else f"{members[0].path} and {len(members) - 1} more"
        which = " or ".join(laws) if laws else "none of the usual laws"
        yield Finding("VS122", "info", members[0].path, f"{whom}: std {spread}: {which}.", max(deviations))
