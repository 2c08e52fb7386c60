"""Zeros learn nothing, large weights learn late, He's and Xavier's learn: photographs, 5-5-1, plain gradient descent.

The program of I. Dabbura, "Coding neural network: parameters' initialization" (2018): input -> 5 -> 5 -> 1, cross-entropy,
gradient descent at rate .01. There it was one seed and tanh; here it is many seeds, both activations and held-out images.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import data, experiment, plots
from experiments.lab.claims import (
    Claim,
    Refuted,
    accuracy,
    at_least,
    at_most,
    every,
    exactly,
    known,
    near,
    over_seeds,
    share,
)
from experiments.lab.experiment import ExperimentError, Figure, Introduction, Result, Run, Table
from experiments.nets.photograph_net import (
    ACTIVATIONS,
    ITERATIONS,
    LAWS,
    Span,
    draw_all,
    errors,
    rows,
    seeds_of,
    train,
)
from experiments.nets.photograph_starts import DABBURA, DRAWS, LARGE, claims_of_start, start_part, table_of_start

REQUIRES = ("matplotlib", "skimage")
ORDER = 4

RATES = (1.0, 3.0, 10.0)  # times the learning rate: no rate should overturn a claim
HELD_OUT = 0.25
MINORITY = 0.25  # the share of the rarer class where the classes are made unequal
SCALED = ("He 2/n", "Xavier 1/n")
COLOURS = {law: plots.COLOURS[place] for law, place in zip(LAWS, (5, 1, 4, 6, 0, 2), strict=True)}

PILOTS = "set after pilot runs, before this one"


@dataclass(frozen=True)
class Settings(experiment.Settings):
    """The experiment's own options."""

    images: tuple[Path, Path] | None = None
    """Two folders of images, one a class; each image becomes 150x150x3."""
    images_a_class: int = 100
    """How many images to take of each folder."""
    learning_rate: float = 0.01
    """Of gradient descent."""

    @property
    def own_data(self) -> str:
        return "" if self.images is None else f"your images in {self.images[0]} and {self.images[1]}"

    def __post_init__(self):
        super().__post_init__()
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ExperimentError(f"--learning-rate is {self.learning_rate}; give a number above 0")


def photographs(settings: Settings) -> data.Samples:
    """The default photographs, or the user's."""
    if settings.images is None:
        return data.faces()
    return data.folders(*settings.images, most=settings.images_a_class, seed=settings.seed)


def train_part(
    run: Run, samples: data.Samples, out: np.ndarray, drawn: Callable[[], dict[str, Any]], rate: float, seeds: int
) -> dict[str, np.ndarray]:
    """Costs (runs, iterations), errors (runs,), and what became of zeros; the last two runs have unequal classes."""
    x, labels = samples.features[~out].T, samples.labels[~out].astype(np.float32)

    def compute():
        span = Span.of(x)
        nets = list(drawn().values())
        both = [params for params in nets for _ in ACTIVATIONS]
        params = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *both, nets[0], nets[0])
        relu = jnp.array([bool(relu) for _, relu, _ in rows(seeds)] + [False, True])
        rare = np.where(labels > 0, MINORITY, 1 - MINORITY) / np.where(labels > 0, labels.sum(), (1 - labels).sum())
        weights = np.tile(np.float32(1 / len(labels)), (len(relu), len(labels)))
        weights[-2:] = rare
        trained, costs = train(span.enter(params), relu, jnp.asarray(weights), rate, span.basis.T @ x, labels)
        whole = span.leave(trained, params)
        moved = [jnp.abs(trained[name]["kernel"][jnp.array([0, 1])]).max() for name in sorted(trained)]
        return {
            "cost": costs,
            "train": errors(whole, relu, x, labels),
            "held_out": errors(whole, relu, samples.features[out].T, samples.labels[out].astype(np.float32)),
            "zeros_moved": jnp.stack(moved).max(),
        }

    return run.part(f"rate-{rate:g}", compute)


def claims_of_zeros(part: dict[str, np.ndarray], labels: np.ndarray) -> list[Claim]:
    """Zeros know nothing but how often each class comes."""
    balance = float(np.mean(labels))
    zeros = [row for row, (law, _, _) in enumerate(rows(seeds_of(part))) if law == "zeros"]
    entropy = _entropy(balance)
    claims = [
        Claim(
            "zeros: no hidden weight ever moves, whatever the activation",
            exactly(0.0, source="both factors of every hidden gradient are zero"),
            known(float(part["zeros_moved"])),
            unit="largest |weight| after training",
        ),
        Claim(
            f"zeros: with one class {MINORITY:.0%} of the weight, the cost ends at the entropy, {_entropy(MINORITY):.4f}",
            near(_entropy(MINORITY), 1e-4, source="only the last bias learns: logistic regression on nothing"),
            known(float(part["cost"][-2:, -1].max())),
            unit="cross-entropy, nats",
        ),
    ]
    if balance == 0.5:
        claims.append(
            Claim(
                "zeros: the cost stays at ln 2 through all iterations",
                at_most(1e-6, source=f"{DABBURA}: 0.6931471805599453 from the 100th to the 1000th iteration"),
                known(float(np.abs(part["cost"][zeros] - math.log(2)).max())),
                unit="largest distance from ln 2, nats",
            )
        )
    else:
        claims.append(
            Claim(
                f"zeros: the cost ends at the entropy of the classes, {entropy:.4f}",
                near(entropy, 1e-3, source="only the last bias learns"),
                known(float(part["cost"][zeros, -1].max())),
                unit="cross-entropy, nats",
            )
        )
    return claims


def claims_of_training(parts: dict[float, dict[str, np.ndarray]], rate: float, real: bool) -> list[Claim]:
    """Who learns; `real` says whether these are the default photographs, for which the numbers were fixed."""
    part = parts[rate]
    cost, train_error, held = (functools.partial(_runs, part, name) for name in ("cost", "train", "held_out"))
    claims = [
        every(
            "large weights end with more training error than He's or Xavier's, at every learning rate",
            [
                (f"{law}, {activation}, rate {other:g}", at_least(0.05, source=DABBURA), over_seeds(difference))
                for other, at_rate in parts.items()
                for law in LARGE
                for column, activation in enumerate(ACTIVATIONS)
                for difference in [
                    _runs(at_rate, "train", law, column)
                    - np.mean([_runs(at_rate, "train", scaled, column) for scaled in SCALED], axis=0)
                ]
            ],
            unit="difference of training errors",
        ),
        every(
            "large weights err more than He's or Xavier's on held-out images too",
            [
                (
                    f"{law}, {activation}",
                    at_least(0.05, source=DABBURA + ", who had no held-out images"),
                    over_seeds(held(law, column) - np.mean([held(scaled, column) for scaled in SCALED], axis=0)),
                )
                for law in LARGE
                for column, activation in enumerate(ACTIVATIONS)
            ],
            unit="difference of held-out errors",
        ),
    ]
    if not real:
        return claims
    claims += [
        Claim(
            "normal ×10, tanh: after 1000 iterations the cost is still above that of knowing nothing, ln 2",
            at_least(0.0, source=f"{DABBURA}: 1.0048"),
            over_seeds(np.log(cost("normal ×10", 0)[:, 999] / math.log(2))),
            unit="ln of the cost over ln 2",
        ),
        every(
            "tanh with He or Xavier: few errors on the training images after 3000 iterations",
            [(law, at_most(0.02, source=f"{DABBURA}: 1 %"), accuracy(train_error(law, 0))) for law in SCALED],
            unit="training error",
        ),
        every(
            "ReLU with He or Xavier: most draws end with 2 % training error at most",
            [
                (law, at_least(0.5, source=DABBURA), share(int((train_error(law, 1) <= 0.02).sum()), len(train_error(law, 1))))
                for law in SCALED
            ],
            unit="share of draws",
        ),
        every(
            "He with ReLU and Xavier with tanh generalize",
            [
                (f"{law}, {ACTIVATIONS[column]}", at_most(0.15, source=PILOTS), accuracy(held(law, column)))
                for law, column in zip(SCALED, (1, 0), strict=True)
            ],
            unit="held-out error",
        ),
        *claims_of_crossing(cost, held),
    ]
    return claims


def claims_of_crossing(cost: Callable, held: Callable) -> list[Claim]:
    """He for ReLU, Xavier for tanh: what crossing them costs."""
    gap = [np.log(cost("He 2/n", column)[:, 299] / cost("Xavier 1/n", column)[:, 299]) for column in (0, 1)]
    return [
        Claim(
            "ReLU: He learns faster than Xavier",
            at_most(-0.02, source="He et al. 2015"),
            over_seeds(gap[1]),
            unit="ln of the ratio of costs after 300 iterations",
        ),
        Claim(
            "tanh: He learns faster than Xavier here too",
            at_most(-0.02, source="measured: the larger start has the larger gradients"),
            over_seeds(gap[0]),
            unit="ln of the ratio of costs after 300 iterations",
            refutes=Refuted(
                "Xavier's 1/n is the best start for tanh",
                "Over two hidden layers it makes the logits, and with them the gradients, smaller than He's, and at 2/n tanh"
                " does not saturate yet.",
                by="Glorot and Bengio 2010, and most lecture notes after it",
            ),
        ),
        every(
            "crossing them changes the held-out error little",
            [
                (
                    activation,
                    near(0.0, 0.03, source="measured: a factor of 2 a layer is only 4 over two layers"),
                    over_seeds(held("He 2/n", column) - held("Xavier 1/n", column)),
                )
                for column, activation in enumerate(ACTIVATIONS)
            ],
            unit="difference of held-out errors, He − Xavier",
            refutes=Refuted(
                "each activation needs its own of the two at this depth",
                "Two hidden layers are too few for a factor of 2 a layer to vanish or explode; at 30 layers it decides.",
                by=DABBURA,
            ),
        ),
    ]


def run(run: Run) -> Result:
    """Draw, train, compare."""
    settings = run.settings
    samples = photographs(settings)
    out = data.held_out(samples.labels, HELD_OUT)
    seeds = run.seeds(quick=20, full=50)
    keys = run.keys("draws", max(seeds, DRAWS))
    drawn = functools.cache(lambda: draw_all(keys[:seeds], features=samples.features.shape[1]))
    begun = start_part(run, samples, keys)
    rates = [settings.learning_rate * times for times in (RATES[:1] if run.quick else RATES)]
    parts = {rate: train_part(run, samples, out, drawn, rate, seeds) for rate in run.track(rates, "learning rates")}
    part = parts[rates[0]]
    train_labels = samples.labels[~out]
    kind = "scikit-image's Labeled Faces in the Wild subset" if settings.images is None else "your folders"
    return Result(
        introduction=Introduction(
            data=f"{len(train_labels)} photographs to train on, {int(out.sum())} held out: {' or '.join(samples.classes)}"
            f" ({kind})",
            net=f"{samples.features.shape[1]} inputs, 5 and 5 hidden units (tanh or ReLU), 1 output, without biases",
            inputs=f"pixels in [0, 1]; plain gradient descent, rate {rates[0]:g}, {ITERATIONS} iterations, {seeds} seeds",
            notes=(
                "Dabbura 2018, Coding neural network: parameters' initialization",
                "He et al. 2015",
                "Glorot and Bengio 2010",
            ),
        ),
        claims=[
            *claims_of_zeros(part, train_labels),
            *claims_of_start(begun),
            *claims_of_training(parts, rates[0], settings.images is None),
        ],
        tables=[*(_table(rate, at_rate) for rate, at_rate in parts.items()), table_of_start(begun)],
        figures=[
            Figure(
                "curves",
                f"Cost by iteration, rate {rates[0]:g}: median of the draws and their 10 to 90 % range.",
                _curves(part),
            ),
            Figure("errors", "Errors after training, one dot a draw; the bar is their mean.", _errors(part)),
        ],
    )


def _runs(part: dict[str, np.ndarray], name: str, law: str, relu: int) -> np.ndarray:
    wanted = [row for row, key in enumerate(rows(seeds_of(part))) if key[:2] == (law, relu)]
    return part[name][wanted].astype(np.float64)


def _entropy(share: float) -> float:
    return -(share * math.log(share) + (1 - share) * math.log(1 - share))


def _table(rate: float, part: dict[str, np.ndarray]) -> Table:
    entries = []
    for column, activation in enumerate(ACTIVATIONS):
        for law in LAWS:
            cost = np.median(_runs(part, "cost", law, column), axis=0)
            ends = [_runs(part, name, law, column).mean() for name in ("train", "held_out")]
            costs = [f"{cost[iteration]:.3g}" for iteration in (0, 99, 999, -1)]
            entries.append((activation, law, *costs, *(f"{error:.1%}" for error in ends)))
    columns = ("", "weights", "cost", "100", "1000", "3000", "train", "held out")
    note = f"Medians of the cost at the start and after 100, 1000 and {ITERATIONS} iterations; means of the errors at the end."
    return Table(f"Learning rate {rate:g}", columns, entries, note)


def _curves(part: dict[str, np.ndarray]):
    figure, axes = plots.figure(1, 2, height=4.0, sharey=True)
    steps = np.unique(np.geomspace(1, ITERATIONS, 200).astype(int))
    for column, (panel, activation) in enumerate(zip(axes[0], ACTIVATIONS, strict=True)):
        for place, law in enumerate(LAWS):
            costs, turn = _runs(part, "cost", law, column)[:, steps - 1], (place, len(LAWS))
            plots.band(panel, steps, costs, label=law, colour=COLOURS[law], log=True, turn=turn)
        panel.set(title=activation, xlabel="iteration", xscale="log")
        plots.reference(panel, math.log(2), "ln 2: knowing nothing")
    axes[0, 0].set_ylabel("cross-entropy, nats")
    plots.legend(figure, axes[0, 0], columns=4)
    return figure


def _errors(part: dict[str, np.ndarray]):
    figure, axes = plots.figure(1, 2, height=3.3, sharey=True)
    rng = np.random.default_rng(0)
    for column, (panel, activation) in enumerate(zip(axes[0], ACTIVATIONS, strict=True)):
        for place, law in enumerate(LAWS):
            for side, (name, marker) in enumerate((("train", "o"), ("held_out", "^"))):
                values = _runs(part, name, law, column)
                x = place + 0.36 * side - 0.18
                jitter = rng.uniform(-0.1, 0.1, len(values))
                panel.scatter(x + jitter, values, s=9, marker=marker, color=COLOURS[law], alpha=0.5, linewidth=0)
                panel.hlines(values.mean(), x - 0.16, x + 0.16, color=COLOURS[law], linewidth=2)
        panel.set_xticks(range(len(LAWS)), [law.replace(" ", "\n", 1) for law in LAWS])
        panel.set_title(activation)
    axes[0, 0].set_ylabel("error rate")
    for label, marker in (("training images", "o"), ("held-out images", "^")):
        axes[0, 0].plot([], [], marker, color=plots.INK, label=label)
    plots.legend(figure, axes[0, 0], columns=2)
    return figure
