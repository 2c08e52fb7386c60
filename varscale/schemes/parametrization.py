"""Multipliers of one parameter between a base model and a wider or deeper one, as pure functions of its fans.

Greg Yang et al., "Tensor Programs V" (arXiv 2203.03466), tables 3 and 8 and lemma J.1; Nolan Dey et al., "Don't be lazy:
CompleteP" (arXiv 2505.01618), table 1; Greg Yang, James B. Simon and Jeremy Bernstein, "A spectral condition for feature
learning" (arXiv 2310.17813), section 3.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

Kind = Literal["adam", "lion", "sgd", "muon"]
# Inside a residual branch; the map whose output is added to the stream, and its bias; elsewhere: embedding, last norm, readout.
Place = Literal["branch", "end of branch", "outside"]
KINDS: tuple[Kind, ...] = ("adam", "lion", "sgd", "muon")


@dataclasses.dataclass(frozen=True)
class Growth:
    """How many times wider than in the base a parameter is.

    Attributes:
        fan_in: ratio of the fan-in to the base's.
        fan_out: ratio of the fan-out to the base's.

    >>> Growth(4.0, 4.0).position, Growth(1.0, 4.0).position, Growth(4.0, 1.0).position, Growth().position
    ('hidden', 'input', 'readout', 'fixed')
    """

    fan_in: float = 1.0
    fan_out: float = 1.0

    @property
    def position(self) -> Literal["hidden", "input", "readout", "fixed"]:
        """Which of the paper's columns it is in: both fans grow, the output's alone, the input's alone, or neither.

        Biases, norm scales, embeddings and depthwise kernels have a fan-in that does not grow: the column "input".
        """
        if self.fan_in != 1:
            return "hidden" if self.fan_out != 1 else "readout"
        return "input" if self.fan_out != 1 else "fixed"


@dataclasses.dataclass(frozen=True)
class Scaling:
    """What a parameter's numbers are multiplied with, relative to the base model.

    Attributes:
        multiplier: in the program, of what the parameter makes.
        std: standard deviation at initialization.
        adam: learning rate under Adam, Lion and other optimizers that normalise each entry's update.
        sgd: learning rate under plain or momentum SGD.
        muon: learning rate under an optimizer that makes updates orthogonal.
        epsilon: Adam's epsilon: the size that the parameter's gradient has, relative to the base.
    """

    multiplier: float = 1.0
    std: float = 1.0
    adam: float = 1.0
    sgd: float = 1.0
    muon: float = 1.0
    epsilon: float = 1.0

    def learning_rate(self, kind: Kind) -> float:
        """The learning rate's multiplier under a kind of optimizer.

        Raises:
            ValueError: `kind` is none of them.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, not {kind!r}")
        return {"adam": self.adam, "lion": self.adam, "sgd": self.sgd, "muon": self.muon}[kind]

    def weight_decay(self, kind: Kind) -> float:
        """The multiplier of a weight decay that is multiplied by the learning rate, as `optax.adamw` has it.

        Their product, the share of the parameter that decays in a step, stays that of the base.
        """
        return 1 / self.learning_rate(kind)

    def moved(self, theta: float) -> Scaling:
        """The same training in another form (lemma J.1): the multiplier is θ times as large, the parameter 1/θ.

        Args:
            theta: θ.

        Raises:
            ValueError: θ is not positive.

        >>> readout = mup(Growth(4.0, 1.0), table=8)
        >>> readout.moved(4.0) == mup(Growth(4.0, 1.0), table=3)
        True
        """
        if not theta > 0:
            raise ValueError(f"theta must be positive, not {theta}")
        return Scaling(
            self.multiplier * theta, self.std / theta, self.adam / theta, self.sgd / theta**2, self.muon / theta,
            self.epsilon * theta,
        )  # fmt: skip

    def folded(self) -> Scaling:
        """The same training with no multiplier in the program: it is part of the parameter."""
        return dataclasses.replace(self.moved(1 / self.multiplier), multiplier=1.0)


def mup(growth: Growth, table: Literal[3, 8] = 3) -> Scaling:
    """The maximal update parametrization (arXiv 2203.03466).

    Args:
        growth: of the parameter's fans.
        table: 3: no multiplier in the program. 8: the readout's output is divided by its fan-in, and its entries have the
            variance and Adam's learning rate of the base, which is what a tied embedding needs.

    Raises:
        ValueError: `table` is neither.

    >>> mup(Growth(4.0, 4.0))  # a hidden kernel, 4 times as wide as the base's
    Scaling(multiplier=1.0, std=0.5, adam=0.25, sgd=1.0, muon=1.0, epsilon=0.25)
    >>> mup(Growth(4.0, 1.0)).std, mup(Growth(4.0, 1.0), table=8).multiplier
    (0.25, 0.25)
    """
    if table not in (3, 8):
        raise ValueError(f"table must be 3 or 8, not {table!r}")
    fan_in, fan_out = growth.fan_in, growth.fan_out
    # The gradient of what a layer of width n puts out is 1/n of the base's in each entry.
    if growth.position != "readout":
        return Scaling(
            std=fan_in**-0.5, adam=1 / fan_in, sgd=fan_out / fan_in, muon=math.sqrt(fan_out / fan_in), epsilon=1 / fan_out
        )
    with_multiplier = Scaling(1 / fan_in, adam=1.0, sgd=fan_in, muon=math.sqrt(fan_in), epsilon=1 / fan_in)
    return with_multiplier if table == 8 else with_multiplier.folded()


def completep(growth: Growth, depth: float, alpha: float, place: Place) -> Scaling:
    """CompleteP (arXiv 2505.01618, table 1): width as μP in the form of table 8, and residual branches × depth^−α.

    Args:
        growth: of the parameter's fans.
        depth: number of residual additions over the base's.
        alpha: α in [½, 1].
        place: where the parameter is.

    >>> completep(Growth(4.0, 4.0), 2.0, 1.0, "end of branch").multiplier
    0.5
    >>> completep(Growth(4.0, 4.0), 2.0, 1.0, "branch").epsilon  # 1 / (4 · 2)
    0.125
    """
    width = mup(growth, table=8)
    if place == "outside":
        return width
    inner = dataclasses.replace(
        width,
        adam=width.adam * depth ** (alpha - 1),
        sgd=width.sgd * depth ** (2 * alpha - 1),  # the gradient is depth^−α of the base's, and so is what the update does
        muon=width.muon * depth ** (alpha - 1),
        epsilon=width.epsilon * depth**-alpha,
    )
    return inner if place == "branch" else dataclasses.replace(inner, multiplier=inner.multiplier * depth**-alpha)


def spectral_std(fan_in: float, fan_out: float) -> float:
    """σ = min(1, √(fan_out / fan_in)) / √fan_in: the spectral norm √(fan_out / fan_in) (arXiv 2310.17813, eq. 18).

    Args:
        fan_in: terms summed into an output; 1 for an embedding.
        fan_out: outputs.

    >>> round(spectral_std(256, 256), 6), round(spectral_std(256, 16), 6)
    (0.0625, 0.015625)
    """
    return min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
