"""The best learning rate of a narrow net is that of a wide one under μP, and of a deep one under CompleteP; not otherwise.

Nets of several widths and depths are trained on digits and on text at many learning rates, with and without a plan of varscale.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import numpy as np

import varscale as vs
from experiments.lab import data, plots
from experiments.lab.claims import Claim, at_least, at_most, near, over_seeds
from experiments.lab.experiment import Figure, Introduction, Result, Run, Table
from experiments.nets.transfer_nets import Characters, Perceptron, Residual, Task, best_octave, characters, final_losses

REQUIRES = ("matplotlib", "sklearn")
ORDER = 14

MUP = "Yang et al. 2022 (arXiv 2203.03466), section 6"
COMPLETEP = "Dey et al. 2025 (arXiv 2505.01618), section 4"
# Octaves: how well a sweep at rates an octave apart knows the best rate of one net. It is told as the vertex of the parabola
# through the best rate and its neighbours. Where ln loss is a u²/2 + c u³/6 about its minimum and the best rate of the sweep is
# at u = g, the vertex is at (c/2) (g² − 1/3) / (a + c g). Where the loss rises twice as much in an octave to the right as in an
# octave to the left, c = a, that is off by 1/6 at most; where it hardly rises to the left at all, c = 3a, by 1/2.
RESOLUTION = 0.5
THREADS = 2  # sizes and parametrizations that train at a time: nets this small leave a second core idle


@dataclass(frozen=True)
class Sweep:
    """Nets of one kind over widths or depths.

    Attributes:
      name: of the part and the panel.
      axis: what grows: "width" or "blocks".
      make: the net of a size.
      sizes: in ascending order; the first is the base.
      scheme: the scheme, given the base.
      label: its name in the legend.
      task: what the nets are trained on.
      octaves: log₂ of the learning rates.
      standard: the exponent, in the size, of the best rate under the standard parametrization and Adam: −1 for the width (μP
        multiplies the rates of hidden layers by 1/width); −½ for the depth (each of L branches moves the output alike, beside
        a stream that L independent branches have made √L in size).
      source: who says that rates transfer under the scheme.
      seeds: that the claims need.
    """

    name: str
    axis: str
    make: Callable[[int], nn.Module]
    sizes: Sequence[int]
    scheme: Callable[[nn.Module], Any]
    label: str
    task: Task
    octaves: Sequence[float]
    standard: float
    source: str
    seeds: int = 12

    def losses(self, run: Run) -> dict[str, np.ndarray]:
        """Final losses, "scheme" and "plain", each of shape (sizes, seeds, rates)."""
        keys = run.keys(self.name, run.seeds(quick=self.seeds, full=self.seeds))
        base = self.scheme(self.make(self.sizes[0]))
        rates = [2.0**octave for octave in self.octaves]
        # The largest first: what is left at the end, when one thread has no more to do, is short.
        nets = [(size, scheme) for size in sorted(self.sizes, reverse=True) for scheme in (base, None)]
        pool = ThreadPoolExecutor(THREADS)
        try:
            trained = [pool.submit(final_losses(self.make(size), scheme, self.task, keys, rates)) for size, scheme in nets]
            found = [future.result() for future in run.track(trained, self.name)]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C waits for no more than what is running
        return {"scheme": np.stack(found[-2::-2]), "plain": np.stack(found[::-2])}

    def best(self, losses: np.ndarray) -> np.ndarray:
        """log₂ of the best learning rate, shape (sizes, seeds)."""
        return np.stack([best_octave(of_size, self.octaves) for of_size in losses])

    def slopes(self, losses: np.ndarray) -> np.ndarray:
        """Octaves of the best rate by doubling of the size, shape (seeds,): the line through all sizes."""
        doublings = np.log2(self.sizes) - np.mean(np.log2(self.sizes))
        return doublings @ self.best(losses) / (doublings @ doublings)

    def claims(self, losses: dict[str, np.ndarray]) -> list[Claim]:
        """How the best rate depends on the size, under the scheme and without.

        Under the scheme it is to be nearer to no dependence than to that of the standard parametrization, and there it is to
        fall by more than the sweep resolves.
        """
        small, large = self.sizes[0], self.sizes[-1]
        resolved = RESOLUTION / math.log2(large / small)
        scheme, plain = self.slopes(losses["scheme"]), self.slopes(losses["plain"])
        what, unit = f"{self.name}: from {self.axis} {small} to {large}", "octaves of the learning rate, a doubling"
        return [
            Claim(
                f"{what} the best learning rate stays under {self.label}",
                near(0.0, abs(self.standard) / 2, source=self.source),
                over_seeds(scheme),
                unit=unit,
            ),
            Claim(
                f"{what} the best learning rate falls under the standard parametrization",
                at_most(-resolved, source=self.source),
                over_seeds(plain),
                unit=unit,
            ),
            Claim(
                f"{what} it falls more than under {self.label}",
                at_least(0.0, source=self.source),
                over_seeds(scheme - plain),
                unit=unit,
            ),
        ]


def sweeps(run: Run, samples: data.Samples, text: str, *, steps: int = 100) -> list[Sweep]:
    """Digits and text over widths, digits over depth."""
    order = np.random.default_rng(0).permutation(len(samples))  # the digits are in the order of who wrote them
    digits = Task(samples.features[order] * 2 - 1, samples.labels[order], 128, steps, len(samples) // 3)
    windows, following, vocabulary = characters(text)
    widths = {"digits": (32, 64, 128, 256), "text": (32, 64, 128)}
    depths, slowest = (2, 8, 32), -9  # below the best rate of the largest net
    if not run.quick:
        slowest = -11
        widths, depths = {"digits": (64, 128, 256, 512, 1024), "text": (64, 128, 256, 512)}, (2, 4, 8, 16, 32, 64)
    return [
        Sweep(
            "digits", "width", Perceptron, widths["digits"], lambda base: vs.schemes.mup(base=base), "μP", digits,
            range(slowest, -2), -1.0, MUP,
        ),
        Sweep(
            "text", "width", lambda width: Characters(width, vocabulary), widths["text"],
            lambda base: vs.schemes.mup(base=base), "μP", Task(windows, following, 8, steps, len(windows) // 6),
            range(slowest - 1, -3), -1.0, MUP, seeds=5,
        ),
        Sweep(
            "depth", "blocks", Residual, depths, lambda base: vs.schemes.completep(base=base, multipliers="weights"),
            "CompleteP", digits, range(slowest, -2), -0.5, COMPLETEP, seeds=18,
        ),
    ]  # fmt: skip


def run(run: Run, samples: data.Samples | None = None, text: str | None = None, steps: int = 100) -> Result:
    """Train every net at every rate, and compare where the loss is least."""
    chosen = sweeps(run, data.digits() if samples is None else samples, data.prose() if text is None else text, steps=steps)
    losses = {sweep.name: run.part(sweep.name, lambda sweep=sweep: sweep.losses(run)) for sweep in chosen}
    return Result(
        Introduction(
            data="scikit-learn's 1797 handwritten digits; as text its own descriptions of data sets, character by character",
            net="a perceptron of two hidden layers; a decoder of one block with two heads; residual blocks of width 32",
            inputs="pixels in [−1, 1]; Adam at learning rates an octave apart that fall to zero over"
            f" {chosen[0].task.steps} steps; the loss is that on a third of the digits and a sixth of the text, held out",
            notes=("Yang et al. 2022 (Tensor Programs V)", "Dey et al. 2025 (CompleteP)"),
        ),
        [claim for sweep in chosen for claim in sweep.claims(losses[sweep.name])],
        [table(chosen, losses)],
        [figure(chosen, losses)],
        remarks=[
            "The plans are `vs.schemes.mup(base=...)` and `vs.schemes.completep(base=..., multipliers='weights')` on nets that"
            " know nothing of them; the base is the smallest net, and the optimizer `plan.optimizer(optax.adam(rate))`."
        ],
    )


def table(chosen: Sequence[Sweep], losses: dict[str, dict[str, np.ndarray]]) -> Table:
    """Best rate and loss of every net."""
    rows = []
    for sweep in chosen:
        for which, label in (("scheme", sweep.label), ("plain", "standard")):
            of = losses[sweep.name][which]
            for size, best, loss in zip(sweep.sizes, sweep.best(of), of, strict=True):
                least = math.exp(float(np.log(loss).mean(axis=0).min()))
                rows.append(
                    (sweep.name, label, f"{sweep.axis} {size}", f"2^{best.mean():.2f}", round(float(best.std()), 2), least)
                )
    return Table(
        "Best learning rates",
        ("data", "parametrization", "net", "best rate", "standard deviation over seeds, octaves", "least loss, nats"),
        rows,
        note="The best rate is the vertex of a parabola through ln loss at the best rate and its two neighbours, seed by seed.",
    )


def figure(chosen: Sequence[Sweep], losses: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Loss against learning rate, a curve a size: under the scheme the minima stand below each other."""
    picture, axes = plots.figure(2, len(chosen), height=5.2, sharex="col")
    for column, sweep in enumerate(chosen):
        for row, (which, label) in enumerate((("scheme", sweep.label), ("plain", "standard"))):
            panel = axes[row][column]
            for size, colour, of in zip(sweep.sizes, plots.shades(len(sweep.sizes)), losses[sweep.name][which], strict=True):
                plots.band(panel, sweep.octaves, of, label=str(size), colour=colour, log=True)
            panel.set_title(f"{sweep.name}, {label}")
            if row:
                panel.set_xlabel("log₂ of the learning rate")
        axes[0][column].legend(title=sweep.axis, fontsize=7, title_fontsize=8)
        axes[0][0].set_ylabel("loss, nats")
        axes[1][0].set_ylabel("loss, nats")
    caption = (
        "Final loss by learning rate. Above: under μP and CompleteP the best rate of every size is that of the smallest."
        " Below: under the standard parametrization it falls with width and depth, so that the small net's rate fails."
    )
    return Figure("learning-rate-transfer", caption, picture)
