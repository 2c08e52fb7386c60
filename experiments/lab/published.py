"""What lectures published of the activations in deep nets, and how far one draw may lie from another.

The values are those of the slides named in `source`: of one run of NumPy each, as printed.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from experiments.lab.claims import LEVEL, Measured

CS231N = "CS231n 2017, lecture 6"
EECS498 = "EECS 498, lecture 10"
# A published value is ONE draw. It agrees where it lies within this many standard deviations of a single draw from our mean
# (after its own rounding). Five nets of ten layers and three of six are 70 values: the chance that a correct one among
# them is this far out is below 70 · 6.3e-5 = .5 %.
LIMIT = 4.0


@dataclass(frozen=True)
class Net:
    """One setting of a published net: the weights' standard deviation and what was published, layer by layer."""

    name: str
    std: float
    relu: bool
    published_std: tuple[float, ...] = ()
    published_mean: tuple[float, ...] = ()
    rounding: float = 1e-6
    source: str = CS231N


@dataclass(frozen=True)
class Shape:
    """The nets that share one compiled program."""

    name: str
    width: int
    depth: int
    batch: int
    nets: tuple[Net, ...]


NARROW = Shape(
    "narrow",
    500,
    10,
    1000,
    (
        Net(
            "tanh, std 0.01",
            0.01,
            relu=False,
            published_std=(0.213081, 0.047551, 0.010630, 0.002378, 0.000532, 0.000119, 0.000026, 0.000006, 0.000001, 0.000000),
        ),
        Net(
            "tanh, std 1.0",
            1.0,
            relu=False,
            published_std=(0.981879, 0.981649, 0.981601, 0.981755, 0.981614, 0.981560, 0.981520, 0.981913, 0.981728, 0.981736),
        ),
        Net(
            "tanh, Xavier",
            1 / math.sqrt(500),
            relu=False,
            published_std=(0.627953, 0.486051, 0.407723, 0.357108, 0.320917, 0.292116, 0.273387, 0.254935, 0.239266, 0.228008),
        ),
        Net(
            "ReLU, Xavier",
            1 / math.sqrt(500),
            relu=True,
            published_std=(0.582273, 0.403795, 0.276912, 0.198685, 0.140299, 0.103280, 0.072748, 0.051572, 0.038583, 0.026076),
            published_mean=(0.398623, 0.272352, 0.186076, 0.136442, 0.099568, 0.072234, 0.049775, 0.035138, 0.025404, 0.018408),
        ),
        Net(
            "ReLU, He",
            math.sqrt(2 / 500),
            relu=True,
            published_std=(0.825232, 0.827835, 0.813855, 0.826902, 0.834092, 0.860035, 0.870610, 0.889348, 0.845357, 0.844523),
            published_mean=(0.562488, 0.553614, 0.545867, 0.565396, 0.547678, 0.587103, 0.596867, 0.623214, 0.567498, 0.552531),
        ),
    ),
)
WIDE = Shape(
    "wide",
    4096,
    6,
    16,
    (
        Net("tanh, std 0.01", 0.01, False, (0.492, 0.289, 0.179, 0.113, 0.072, 0.046), rounding=1e-3, source=EECS498),
        Net("tanh, std 0.05", 0.05, False, (0.872, 0.853, 0.850), rounding=1e-3, source=EECS498),
        Net("tanh, Xavier", 1 / 64, False, (0.626, 0.487, 0.410, 0.358, 0.323, 0.295), rounding=1e-3, source=EECS498),
        Net("ReLU, Xavier", 1 / 64, True, source=EECS498),
        Net("ReLU, Kaiming", math.sqrt(2) / 64, True, source=EECS498),
    ),
)


def agreement(published: float, draws: np.ndarray, rounding: float) -> Measured:
    """How far a published value lies from the mean of our draws, in standard deviations of a single draw.

    Its interval covers what `draws` leaves open of that mean (Student) and of that standard deviation (chi-square).

    Args:
      published: one draw, rounded.
      draws: our draws of the same thing, shape (seeds,).
      rounding: the unit of its last digit.
    """
    draws = np.asarray(draws, np.float64)
    count = draws.size
    if count < 2:
        return Measured(math.nan, -math.inf, math.inf, count)
    spread = max(float(draws.std(ddof=1)), 1e-12)
    distance = max(0.0, abs(published - float(draws.mean())) - rounding / 2) / spread
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) / math.sqrt(count)
    low, high = (math.sqrt(float(stats.chi2.ppf(p, count - 1)) / (count - 1)) for p in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Measured(distance, max(0.0, distance * low - half), distance * high + half, count)
