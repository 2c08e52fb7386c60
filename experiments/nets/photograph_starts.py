"""The photographs' nets before training: the law says how large the logits are, and so how high the first cost is."""

import functools
import math

import jax
import numpy as np
from jaxtyping import Array

from experiments.lab.claims import Claim, Refuted, between, every, near, over_seeds, share
from experiments.lab.data import Samples
from experiments.lab.experiment import Run, Table
from experiments.nets.photograph_net import ACTIVATIONS, LAWS, predictions, starts
from varscale import gaussian

DABBURA = "Dabbura 2018, cats and dogs"
LAW = "the law, E[y²] = n·Var[w]·E[x²]"
LARGE = ("normal ×10", "uniform ×10", "uniform ×17.3")
DRAWS = 4000  # nets of each law before training: ReLU's logits scatter by 3.3 of their mean, so 99 % intervals are ± .14
STARTS = 16  # images whose logits are looked at before training


def start_part(run: Run, samples: Samples, keys: Array) -> dict[str, np.ndarray]:
    """Of every law but zeros and each activation, shape (laws, 2, draws): second moment, cost and death at the start."""
    chosen = np.linspace(0, len(samples) - 1, STARTS).astype(int)  # both classes alike: they come one after the other
    x, labels = samples.features[chosen].T, samples.labels[chosen].astype(np.float32)
    track = functools.partial(run.track, label="nets before training")
    return run.part("start", lambda: starts(keys, x, labels, track) | {"predicted": predictions(x)})


def claims_of_start(part: dict[str, np.ndarray]) -> list[Claim]:
    """Before training, the law says how large the logits are, and so how high the cost is."""
    laws = [law for law in LAWS if law != "zeros"]
    ratio = part["second_moment"].astype(np.float64) / part["predicted"][..., None]
    normal, uniform, matched = (part["cost"][laws.index(law), 0].astype(np.float64) for law in LARGE)
    variance = float(part["predicted"][laws.index("normal ×10"), 0])
    cost = float(gaussian.mean(jax.nn.softplus, variance=variance))
    return [
        every(
            "at the start: the logits' second moment is the law's",
            [
                (f"{law}, {activation}", near(1.0, 0.2, source=LAW), over_seeds(ratio[row, column]))
                for row, law in enumerate(laws)
                for column, activation in enumerate(ACTIVATIONS)
            ],
            unit="second moment over the law's",
        ),
        Claim(
            f"normal ×10, tanh: the first cost is E[softplus(y)], y ~ N(0, {variance:.0f}) by the law",
            near(1.0, 0.1, source=LAW + "; saturated units are ±1"),
            over_seeds(normal / cost),
            unit="cost over the law's",
        ),
        Claim(
            "uniform ×10 is a third of normal ×10's variance: the first cost is 1/√3 of it (tanh)",
            near(1 / math.sqrt(3), 0.06, source=LAW),
            over_seeds(uniform / normal.mean()),
            unit="ratio of first costs",
            refutes=Refuted(
                "there is no big difference between normal and uniform numbers times 10",
                "A uniform number on ±10 has a third of the variance; see the next claim.",
                by=DABBURA,
            ),
        ),
        Claim(
            "of the same variance, uniform ×17.3 starts where normal ×10 does (tanh)",
            near(1.0, 0.1, source=LAW + ": the variance counts, not the distribution"),
            over_seeds(matched / normal.mean()),
            unit="ratio of first costs",
        ),
        Claim(
            "He, ReLU: some draws are dead at the start (all five units of a layer silent on every image)",
            between(1e-4, 1 - (1 - 2.0**-5) ** 2, source="each unit is silent with chance ≤ 1/2; two layers of five"),
            share(int(part["dead"][laws.index("He 2/n"), 1].sum()), part["dead"].shape[-1]),
            unit="share of draws",
        ),
    ]


def table_of_start(part: dict[str, np.ndarray]) -> Table:
    """Logits, cost and death before training, beside the law."""
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
