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
from experiments.lab.claims import Claim, Refuted, at_least, at_most, between, every, exactly, known, near, over_seeds, share
from experiments.lab.experiment import ExperimentError, Figure, Result, Run, Table
from experiments.nets.photograph_net import (
    ACTIVATIONS,
    ITERATIONS,
    LAWS,
    WIDTHS,
    Span,
    draw_all,
    errors,
    predicted,
    start,
    train,
)
from varscale import gaussian

REQUIRES = ("matplotlib", "skimage")
ORDER = 4

RATES = (1.0, 3.0, 10.0)  # times the learning rate: no rate should overturn a claim
HELD_OUT = 0.25
MINORITY = 0.25  # the share of the rarer class where the classes are made unequal
LARGE, SCALED = ("normal ×10", "uniform ×10", "uniform ×17.3"), ("He 2/n", "Xavier 1/n")
COLOURS = {law: plots.COLOURS[place] for law, place in zip(LAWS, (5, 1, 4, 6, 0, 2), strict=True)}

PILOTS = "set after pilot runs, before this one"
DABBURA = "Dabbura 2018, cats and dogs"
LAW = "the law, E[y²] = n·Var[w]·E[x²]"
MOST_WEIGHTS = 30_000_000  # of one law's nets, which are held all at once
STARTS = 16  # images whose logits are looked at before training


@dataclass(frozen=True)
class Settings(experiment.Settings):
    """The experiment's own options."""

    images: tuple[Path, Path] | None = None
    """Two folders of images, one a class; each image becomes 150x150x3."""
    images_a_class: int = 100
    """How many images to take of each folder."""
    learning_rate: float = 0.01
    """Of gradient descent."""

    def __post_init__(self):
        super().__post_init__()
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ExperimentError(f"--learning-rate is {self.learning_rate}; give a number above 0")


def photographs(settings: Settings) -> data.Samples:
    """The default photographs, or the user's."""
    if settings.images is None:
        return data.faces()
    return data.folders(*settings.images, most=settings.images_a_class, seed=settings.seed)


def rows(seeds: int) -> list[tuple[str, int, int]]:
    """(law, relu, seed) of every run; zeros have no seeds."""
    return [(law, relu, seed) for law in LAWS for relu in (0, 1) for seed in range(1 if law == "zeros" else seeds)]


def start_part(run: Run, samples: data.Samples, drawn: Callable[[], dict[str, Any]]) -> dict[str, np.ndarray]:
    """Of every law but zeros and each activation, shape (laws, 2, draws): second moment, cost and death at the start."""
    chosen = np.linspace(0, len(samples) - 1, STARTS).astype(int)  # both classes alike: they come one after the other
    x, labels = samples.features[chosen].T, samples.labels[chosen].astype(np.float32)

    def compute():
        nets = [params for law, params in drawn().items() if law != "zeros"]
        found = [[start(params, relu, x, labels) for relu in (False, True)] for params in nets]
        names = ("second_moment", "cost", "dead")
        return {name: np.array([[pair[field] for pair in law] for law in found]) for field, name in enumerate(names)} | {
            "predicted": np.array([[predicted(law, relu, x) for relu in (False, True)] for law in LAWS if law != "zeros"])
        }

    return run.part("start", compute)


def train_part(
    run: Run, samples: data.Samples, out: np.ndarray, drawn: Callable[[], dict[str, Any]], rate: float, seeds: int
) -> dict[str, np.ndarray]:
    """Costs (runs, iterations), errors (runs,), and what became of zeros; the last two runs have unequal classes."""
    x, labels = samples.features[~out].T, samples.labels[~out].astype(np.float32)

    def compute():
        span = Span.of(x)
        nets = [jax.tree.map(lambda leaf: leaf[:seeds], params) for params in drawn().values()]
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
            "zeros: no hidden weight ever moves, whatever the activation (largest weight after training)",
            exactly(0.0, source="both factors of every hidden gradient are zero"),
            known(float(part["zeros_moved"])),
        ),
        Claim(
            f"zeros: with one class {MINORITY:.0%} of the weight, the cost ends at the entropy, {_entropy(MINORITY):.4f}",
            near(_entropy(MINORITY), 1e-4, source="only the last bias learns: logistic regression on nothing"),
            known(float(part["cost"][-2:, -1].max())),
        ),
    ]
    if balance == 0.5:
        claims.append(
            Claim(
                "zeros: the cost stays at ln 2 through all iterations (largest distance)",
                at_most(1e-6, source=f"{DABBURA}: 0.6931471805599453 from the 100th to the 1000th iteration"),
                known(float(np.abs(part["cost"][zeros] - math.log(2)).max())),
            )
        )
    else:
        claims.append(
            Claim(
                f"zeros: the cost ends at the entropy of the classes, {entropy:.4f}",
                near(entropy, 1e-3, source="only the last bias learns"),
                known(float(part["cost"][zeros, -1].max())),
            )
        )
    return claims


def claims_of_start(part: dict[str, np.ndarray]) -> list[Claim]:
    """Before training, the law says how large the logits are, and so how high the cost is."""
    laws = [law for law in LAWS if law != "zeros"]
    ratio = part["second_moment"].astype(np.float64) / part["predicted"][..., None]
    normal, uniform, matched = (part["cost"][laws.index(law), 0].astype(np.float64) for law in LARGE)
    variance = float(part["predicted"][laws.index("normal ×10"), 0])
    cost = float(gaussian.mean(jax.nn.softplus, variance=variance))
    return [
        every(
            "at the start: the logits' second moment over the law's prediction",
            [
                (f"{law}, {activation}", near(1.0, 0.2, source=LAW), over_seeds(ratio[row, column]))
                for row, law in enumerate(laws)
                for column, activation in enumerate(ACTIVATIONS)
            ],
        ),
        Claim(
            f"normal ×10, tanh: the first cost is E[softplus(y)], y ~ N(0, {variance:.0f}) by the law (ratio)",
            near(1.0, 0.1, source=LAW + "; saturated units are ±1"),
            over_seeds(normal / cost),
        ),
        Claim(
            "uniform ×10 is a third of normal ×10's variance: the first cost is 1/√3 of it (tanh)",
            near(1 / math.sqrt(3), 0.06, source=LAW),
            over_seeds(uniform / normal.mean()),
            refutes=Refuted(
                "there is no big difference between normal and uniform numbers times 10",
                "a uniform number on ±10 has a third of the variance; see the next claim",
            ),
        ),
        Claim(
            "of the same variance, uniform ×17.3 starts where normal ×10 does (ratio of first costs, tanh)",
            near(1.0, 0.1, source=LAW + ": the variance counts, not the distribution"),
            over_seeds(matched / normal.mean()),
        ),
        Claim(
            "He, ReLU: some draws are dead at the start (all five units of a layer silent on every image)",
            between(1e-4, 1 - (1 - 2.0**-5) ** 2, source="each unit is silent with chance ≤ 1/2; two layers of five"),
            share(int(part["dead"][laws.index("He 2/n"), 1].sum()), part["dead"].shape[-1]),
        ),
    ]


def claims_of_training(parts: dict[float, dict[str, np.ndarray]], rate: float, real: bool) -> list[Claim]:
    """Who learns; `real` says whether these are the default photographs, for which the numbers were fixed."""
    part = parts[rate]
    cost, train_error, held = (functools.partial(_runs, part, name) for name in ("cost", "train", "held_out"))
    claims = [
        every(
            "large weights end with more training error than He's or Xavier's, at every learning rate (difference)",
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
        ),
        every(
            "the same would apply to held-out images: large weights err more there too (difference)",
            [
                (
                    f"{law}, {activation}",
                    at_least(0.05, source=DABBURA + ", who had no held-out images"),
                    over_seeds(held(law, column) - np.mean([held(scaled, column) for scaled in SCALED], axis=0)),
                )
                for law in LARGE
                for column, activation in enumerate(ACTIVATIONS)
            ],
        ),
    ]
    if not real:
        return claims
    claims += [
        Claim(
            "normal ×10, tanh: after 1000 iterations the cost is still above that of knowing nothing, ln 2 (ln of the ratio)",
            at_least(0.0, source=f"{DABBURA}: 1.0048"),
            over_seeds(np.log(cost("normal ×10", 0)[:, 999] / math.log(2))),
        ),
        every(
            "tanh with He or Xavier: training error after 3000 iterations",
            [(law, at_most(0.02, source=f"{DABBURA}: 1 %"), over_seeds(train_error(law, 0))) for law in SCALED],
        ),
        every(
            "ReLU with He or Xavier: most draws end with 2 % training error at most (share)",
            [
                (law, at_least(0.5, source=DABBURA), share(int((train_error(law, 1) <= 0.02).sum()), len(train_error(law, 1))))
                for law in SCALED
            ],
        ),
        every(
            "He with ReLU and Xavier with tanh generalize: held-out error",
            [
                (f"{law}, {ACTIVATIONS[column]}", at_most(0.15, source=PILOTS), over_seeds(held(law, column)))
                for law, column in zip(SCALED, (1, 0), strict=True)
            ],
        ),
        *claims_of_crossing(cost, held),
    ]
    return claims


def claims_of_crossing(cost: Callable, held: Callable) -> list[Claim]:
    """He for ReLU, Xavier for tanh: what crossing them costs."""
    gap = [np.log(cost("He 2/n", column)[:, 299] / cost("Xavier 1/n", column)[:, 299]) for column in (0, 1)]
    return [
        Claim(
            "ReLU: He learns faster than Xavier (ln of the ratio of their costs after 300 iterations, seed by seed)",
            at_most(-0.02, source="He et al. 2015"),
            over_seeds(gap[1]),
        ),
        Claim(
            "tanh: He learns faster than Xavier here too",
            at_most(-0.02, source="measured: the larger start has the larger gradients"),
            over_seeds(gap[0]),
            refutes=Refuted(
                "Xavier's 1/n is the best start for tanh",
                "over two hidden layers it makes the logits, and with them the gradients, smaller than He's, and at 2/n tanh "
                "does not saturate yet",
            ),
        ),
        every(
            "crossing them changes the held-out error little (He − Xavier)",
            [
                (
                    activation,
                    near(0.0, 0.03, source="measured: a factor of 2 a layer is only 4 over two layers"),
                    over_seeds(held("He 2/n", column) - held("Xavier 1/n", column)),
                )
                for column, activation in enumerate(ACTIVATIONS)
            ],
            refutes=Refuted(
                "each activation needs its own of the two at this depth",
                "two hidden layers are too few for a factor of 2 a layer to vanish or explode; at 30 layers it decides",
            ),
        ),
    ]


def run(run: Run) -> Result:
    """Draw, train, compare."""
    settings = run.settings
    samples = photographs(settings)
    out = data.held_out(samples.labels, HELD_OUT)
    seeds = run.seeds(quick=20, full=50)
    draws = max(seeds, min(4000, MOST_WEIGHTS // (samples.features.shape[1] * WIDTHS[0])))
    drawn = functools.cache(lambda: draw_all(run.keys("draws", draws), features=samples.features.shape[1]))
    begun = start_part(run, samples, drawn)
    rates = [settings.learning_rate * times for times in (RATES[:1] if run.quick else RATES)]
    parts = {rate: train_part(run, samples, out, drawn, rate, seeds) for rate in run.track(rates, "learning rates")}
    part = parts[rates[0]]
    train_labels = samples.labels[~out]
    return Result(
        claims=[
            *claims_of_zeros(part, train_labels),
            *claims_of_start(begun),
            *claims_of_training(parts, rates[0], settings.images is None),
        ],
        tables=[*(_table(rate, at_rate) for rate, at_rate in parts.items()), _table_of_start(begun)],
        figures=[
            Figure(
                "curves",
                f"Cost by iteration, rate {rates[0]:g}: median of the draws and their 10 to 90 % range.",
                _curves(part),
            ),
            Figure("errors", "Errors after training, one dot a draw; the bar is their mean.", _errors(part)),
        ],
        remarks=[
            f"{len(train_labels)} photographs to train on, {int(out.sum())} held out: "
            f"{samples.classes[0]} or {samples.classes[1]}, {samples.features.shape[1]} features in [0, 1]. "
            f"{seeds} seeds a setting; plain gradient descent, {ITERATIONS} iterations."
        ],
    )


def seeds_of(part: dict[str, np.ndarray]) -> int:
    """How many seeds a part was run with: two runs of zeros, two of unequal classes, the rest by law and activation."""
    return (len(part["cost"]) - 4) // (2 * (len(LAWS) - 1))


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


def _table_of_start(part: dict[str, np.ndarray]) -> Table:
    laws = [law for law in LAWS if law != "zeros"]
    entries = [
        (
            law,
            activation,
            f"{part['predicted'][row, column]:.4g}",
            f"{part['second_moment'][row, column].mean(dtype=np.float64):.4g}",
            f"{part['cost'][row, column].mean(dtype=np.float64):.4g}",
            f"{part['dead'][row, column].mean():.1%}",
        )
        for row, law in enumerate(laws)
        for column, activation in enumerate(ACTIVATIONS)
    ]
    columns = ("weights", "", "E[y²] by the law", "measured", "cost", "dead")
    return Table("Logits before training", columns, entries, f"{part['dead'].shape[-1]} draws, {STARTS} images.")


def _curves(part: dict[str, np.ndarray]):
    figure, axes = plots.figure(1, 2, height=3.6, sharey=True)
    steps = np.unique(np.geomspace(1, ITERATIONS, 200).astype(int))
    for column, (panel, activation) in enumerate(zip(axes[0], ACTIVATIONS, strict=True)):
        for law in LAWS:
            plots.band(panel, steps, _runs(part, "cost", law, column)[:, steps - 1], label=law, colour=COLOURS[law], log=True)
        panel.set(title=activation, xlabel="iteration", xscale="log")
        plots.reference(panel, math.log(2), "ln 2")
    axes[0, 0].set(ylabel="cross-entropy", ylim=(None, 1e5))
    axes[0, 0].legend(loc="upper right", ncols=2)
    return figure


def _errors(part: dict[str, np.ndarray]):
    figure, axes = plots.figure(1, 2, height=3.0, sharey=True)
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
    axes[0, 0].set_ylabel("training error ●   held-out error ▲")
    return figure
