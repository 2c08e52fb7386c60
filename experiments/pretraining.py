"""Pretraining as initialization: with few labels a pretrained start beats a random one, and how it is fine-tuned matters.

Real digits stand somewhere on an empty canvas, so that there is something to learn before the labels: a digit is the same
digit everywhere. Nets are pretrained (a) on the labels of other classes, (b) by filling in masked pixels and (c) by contrast,
both without labels. A fourth start is He's. All are fine-tuned in four ways, on 5 to 50 labels a class.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import data, plots
from experiments.lab.claims import Claim, Measured, Refuted, at_least, at_most, between, every, over_seeds
from experiments.lab.claims import accuracy as mean_accuracy
from experiments.lab.experiment import Figure, Introduction, Result, Run, Table
from experiments.lab.objectives import placed
from experiments.lab.training import minibatches
from experiments.nets.digit_transfer import (
    BATCH,
    CANVAS,
    CLASSES,
    NETS,
    SIDE,
    STARTS,
    WAYS,
    fine_tune,
    pretrain,
    split,
    started,
)

REQUIRES = ("matplotlib", "sklearn")
ORDER = 9

CHUNK = 5  # seeds at once: one shape, and so one compilation, for tuning and for reporting
RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # every start and way is tuned over these, on seeds that are not reported
COMMON_RATE = 1e-3  # at which the training curves of all starts are compared
STEPS = 80  # of fine-tuning, whatever the number of labels
SNAPSHOTS = (5, 10, 20, 40, 80)  # steps after which the test accuracy is looked at
PRETRAINING_STEPS = {"supervised": 400, "masked": 600, "contrastive": 400}
ONE_RATE = "one rate"

BEFORE = "set after pilot runs, before this one; "
CHEN = "Chen et al. 2020, table 7: contrastive pretraining with few labels"
YOSINSKI = "Yosinski et al. 2014: features of other classes transfer"
ERHAN = "Erhan et al. 2010, section 6: pretraining regularizes"


def labels_a_class(quick: bool) -> tuple[int, ...]:
    """The numbers of labels that are tried."""
    return (5, 10, 50) if quick else (5, 10, 20, 50)


def run(run: Run) -> Result:
    """Pretrain, tune, fine-tune, compare."""
    counts, reported = labels_a_class(run.quick), run.seeds(quick=15, full=25)
    parts = run.part("fine-tuned", lambda: compute(run, counts, reported))
    accuracy = {name: parts["accuracy"][index].astype(np.float64) for index, name in enumerate(STARTS)}
    return Result(
        introduction=Introduction(
            data=f"scikit-learn's handwritten digits, {SIDE}x{SIDE} grey levels, each placed somewhere on an empty canvas of"
            f" {CANVAS}x{CANVAS}; 0 to 4 for pretraining with labels, 5 to 9 to be told apart",
            net="144 inputs, a body of three ReLU layers of 96 units, a linear head",
            inputs=f"in [0, 1]; {STEPS} steps of Adam, {counts[0]} to {counts[-1]} labels a class, {reported} seeds",
            notes=("Erhan et al. 2010", "Yosinski et al. 2014", "Chen et al. 2020 (SimCLR)", "Kumar et al. 2022"),
        ),
        claims=[*claims_of_starts(accuracy, counts), *claims_of_training(parts), *claims_of_ways(accuracy, counts)],
        tables=[accuracies(accuracy, counts), ranking(accuracy, counts), rates(parts, counts)],
        figures=[
            Figure(
                "labels",
                "Test accuracy by labels a class: every start, fine-tuned in its best way.",
                by_labels(accuracy, counts),
            ),
            Figure("curves", "Training loss by step at one rate for all, 10 labels a class.", curves(parts)),
        ],
        remarks=[
            "Pretraining sees a picture in a new place each time, fine-tuning in one place a seed. Test pictures are never seen"
            f" in pretraining. Each start and way is tuned over the same {len(RATES)} rates, on {CHUNK} seeds that are not"
            " reported.",
            f"Accounts of the transfer, one for every pretrained start (all seeds at once): {parts['account'][()]}",
        ],
    )


def compute(run: Run, counts: tuple[int, ...], reported: int) -> dict[str, Any]:
    """All that is trained: seeds 0 to 4 tune, the rest are reported.

    Returns:
      "accuracy" (starts, ways, counts, seeds); "rate" (starts, ways, counts); "loss" at the common rate, "one rate" and 10
      labels (starts, seeds, steps); "after", the accuracy after some steps of it (starts, snapshots, seeds); "account", text.
    """
    digits = data.digits()
    chunks = 1 + -(-reported // CHUNK)
    world = _World(digits, run.key("world"), counts, chunks)
    bodies, accounts = _pretrained(run, digits, world)
    shape = (len(STARTS), len(WAYS), len(counts))
    accuracy, chosen = np.zeros((*shape, (chunks - 1) * CHUNK), np.float32), np.zeros(shape, np.float32)
    loss = np.zeros((len(STARTS), (chunks - 1) * CHUNK, STEPS), np.float32)
    after = np.zeros((len(STARTS), len(SNAPSHOTS), (chunks - 1) * CHUNK), np.float32)
    for place in run.track(list(np.ndindex(shape)), "fine-tuning"):
        start, way, count = STARTS[place[0]], list(WAYS)[place[1]], counts[place[2]]
        tried = [float(np.mean(world.tuned(bodies[start], 0, count, rate, way)[1])) for rate in RATES]
        chosen[place] = RATES[int(np.argmax(tried))]
        results = [world.tuned(bodies[start], chunk, count, float(chosen[place]), way) for chunk in range(1, chunks)]
        accuracy[place] = np.concatenate([result[1] for result in results])
    for place in run.track(list(np.ndindex(len(STARTS), len(SNAPSHOTS))), "the way there"):
        start, last = STARTS[place[0]], SNAPSHOTS[place[1]]
        results = [world.tuned(bodies[start], chunk, 10, COMMON_RATE, ONE_RATE, last) for chunk in range(1, chunks)]
        after[place] = np.concatenate([result[1] for result in results])
        loss[place[0]] = np.concatenate([result[0] for result in results])  # the last time, after all steps
    return {
        "accuracy": accuracy[..., :reported],
        "rate": chosen,
        "loss": loss[:, :reported],
        "after": after[:, :, :reported],
        "account": np.array("; ".join(f"{start}: {account}" for start, account in accounts.items())),
    }


class _World:
    """What each seed sees: its pictures, its labels, its test set; in chunks of seeds."""

    def __init__(self, digits: data.Samples, key: jax.Array, counts: tuple[int, ...], chunks: int):
        seeds = chunks * CHUNK
        splits = [split(digits, seed, counts) for seed in range(seeds)]
        self.chunks = chunks
        self.labels = jnp.asarray(digits.labels % CLASSES)
        self.test = _even([test for _, _, test in splits])
        self.unlabelled = _even([unlabelled for _, unlabelled, _ in splits])
        places, order, self.heads = (jax.random.split(k, seeds) for k in jax.random.split(key, 3))
        pictures = jnp.asarray(digits.features)
        self.pictures = jax.jit(jax.vmap(lambda key: placed(key, pictures, SIDE, CANVAS)))(places)
        self.batches = {count: _batches(order, np.stack([rows[count] for rows, _, _ in splits])) for count in counts}

    def tuned(
        self, body: Any, chunk: int, count: int, rate: float, way: str, last: int = STEPS
    ) -> tuple[np.ndarray, np.ndarray]:
        """Losses (seeds, steps) and accuracies (seeds,) of one chunk of seeds."""
        part = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        params = jax.tree.map(lambda leaf: leaf[part], body)
        found = fine_tune(
            params,
            self.pictures[part],
            self.labels,
            self.batches[count][part],
            self.test[part],
            jnp.float32(rate),
            jnp.int32(last),
            way,
        )
        return np.asarray(found[0]), np.asarray(found[1])


def _pretrained(run: Run, digits: data.Samples, world: _World) -> tuple[dict[str, Any], dict[str, str]]:
    """The classifiers of all seeds by start, and the accounts of what was moved into them."""
    pictures = jnp.asarray(digits.features)
    others = np.flatnonzero(digits.labels < CLASSES)
    everywhere = np.broadcast_to(others, (len(world.unlabelled), len(others)))
    pools = {start: np.concatenate([everywhere, world.unlabelled], axis=1) for start in NETS} | {"supervised": everywhere}
    bodies: dict[str, Any] = {"random": started(world.heads, None)[0]}
    accounts = {}
    for start in run.track(list(NETS), "pretraining"):
        keys = run.keys(start, len(world.unlabelled))
        chunks = [
            pretrain(keys[part], pictures, world.labels, jnp.asarray(pools[start][part]), start, PRETRAINING_STEPS[start])[0]
            for part in (slice(chunk * CHUNK, (chunk + 1) * CHUNK) for chunk in range(world.chunks))
        ]
        body = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *chunks)
        bodies[start], account = started(world.heads, body)
        accounts[start] = str(account)
    return bodies, accounts


def _even(rows: Sequence[np.ndarray]) -> np.ndarray:
    """As many rows of each seed as the one with fewest has (the classes' halves are rounded alike: a few at most differ)."""
    return np.stack([each[: min(map(len, rows))] for each in rows])


def _batches(keys: jax.Array, rows: np.ndarray) -> jax.Array:
    """The labelled pictures of each step, shape (seeds, steps, batch)."""
    order = jax.vmap(lambda key: minibatches(key, rows.shape[1], BATCH, STEPS))(keys)
    return jnp.take_along_axis(jnp.asarray(rows)[:, None, :], order, axis=2)


def claims_of_starts(accuracy: dict[str, np.ndarray], counts: tuple[int, ...]) -> list[Claim]:
    """With 10 labels a class: pretrained starts against the random one, seed by seed; each with three rates tried."""
    ten, ways = counts.index(10), list(WAYS)
    small, one = ways.index("small rate for the body"), ways.index(ONE_RATE)
    random = accuracy["random"][one, ten]
    return [
        every(
            "with 10 labels a class a pretrained start beats He's",
            [
                (start, at_least(0.04, source=BEFORE + source), over_seeds(accuracy[start][small, ten] - random))
                for start, source in (("supervised", YOSINSKI), ("contrastive", CHEN))
            ],
            unit="difference of test accuracies by seed",
        ),
        Claim(
            "pretraining by filling in masked pixels hardly helps (fine-tuned at one rate for all layers)",
            at_most(0.05, source=BEFORE + "the smallest gain of the other two in a trial on other seeds was .08"),
            over_seeds(accuracy["masked"][one, ten] - random),
            unit="difference of test accuracies by seed",
            refutes=Refuted(
                "each pretrained start beats a random one at 10 labels a class",
                "To fill in pixels a net has to keep where the digit stands, and to tell digits apart it has to forget it:"
                " only the labels of other classes and the contrast of two places teach that.",
                by="a common reading of Erhan et al. 2010",
            ),
        ),
        Claim(
            "contrastive pretraining beats pretraining on the labels of other classes",
            at_least(0.02, source=BEFORE + "it saw the pictures of the very classes, without labels"),
            over_seeds(accuracy["contrastive"][small, ten] - accuracy["supervised"][small, ten]),
            unit="difference of test accuracies by seed",
        ),
    ]


def claims_of_training(parts: dict[str, np.ndarray]) -> list[Claim]:
    """At one rate, the same for all, and 10 labels a class: who converges faster, and what the training loss does not tell."""
    final = parts["loss"][:, :, -10:].astype(np.float64).mean(axis=-1)
    after = parts["after"].astype(np.float64)
    half, end = SNAPSHOTS.index(STEPS // 2), SNAPSHOTS.index(STEPS)
    better = [(start, STARTS.index(start)) for start in ("supervised", "contrastive")]
    return [
        every(
            "a pretrained start converges in fewer steps: after half of them it is past where random ends",
            [(start, at_least(0.0, source=ERHAN), over_seeds(after[place, half] - after[0, end])) for start, place in better],
            unit="difference of test accuracies by seed",
        ),
        every(
            "random and pretrained starts end with the same training loss",
            [(start, between(-0.15, 0.15, source=ERHAN), over_seeds(final[place] - final[0])) for start, place in better],
            unit="difference of training losses by seed, nats",
        ),
        every(
            "at that equal training loss the pretrained starts have the higher test accuracy",
            [(start, at_least(0.0, source=ERHAN), over_seeds(after[place, end] - after[0, end])) for start, place in better],
            unit="difference of test accuracies by seed",
        ),
    ]


def claims_of_ways(accuracy: dict[str, np.ndarray], counts: tuple[int, ...]) -> list[Claim]:
    """Few labels: hold the body still. Many: let it move."""
    ways = list(WAYS)
    head, one = ways.index("head only"), ways.index(ONE_RATE)
    return [
        Claim(
            "with 5 labels a class, training the head alone beats training everything (contrastive start)",
            at_least(0.03, source=BEFORE + "Kumar et al. 2022: fine-tuning distorts pretrained features"),
            over_seeds(accuracy["contrastive"][head, counts.index(5)] - accuracy["contrastive"][one, counts.index(5)]),
            unit="difference of test accuracies by seed",
        ),
        Claim(
            "with 50 labels a class it is the other way round (supervised start)",
            at_least(0.03, source=BEFORE + YOSINSKI + " less than those of the same classes"),
            over_seeds(accuracy["supervised"][one, counts.index(50)] - accuracy["supervised"][head, counts.index(50)]),
            unit="difference of test accuracies by seed",
        ),
        Claim(
            "on random features a trained head alone is worse than training everything (50 labels a class)",
            at_least(0.05, source=BEFORE + "features have to be learnt from somewhere"),
            over_seeds(accuracy["random"][one, counts.index(50)] - accuracy["random"][head, counts.index(50)]),
            unit="difference of test accuracies by seed",
        ),
    ]


def accuracies(accuracy: dict[str, np.ndarray], counts: tuple[int, ...]) -> Table:
    """Every start, way and number of labels."""
    rows = [
        [start, way, *(str(mean_accuracy(accuracy[start][place, column])) for column in range(len(counts)))]
        for start in STARTS
        for place, way in enumerate(WAYS)
    ]
    columns = ["start", "fine-tuned", *(f"{count} labels" for count in counts)]
    return Table("Test accuracy", columns, rows, "Mean over seeds with its 99 % interval; chance is 0.2.")


def ranking(accuracy: dict[str, np.ndarray], counts: tuple[int, ...]) -> Table:
    """All pairs of start and way with 10 labels a class, best first, each against the one before by seed."""
    ten = counts.index(10)
    runs = [(f"{start}, {way}", accuracy[start][place, ten]) for start in STARTS for place, way in enumerate(WAYS)]
    runs.sort(key=lambda item: -item[1].mean())
    rows: list[list[str | int | float]] = []
    for place, (name, values) in enumerate(runs):
        behind: Measured | str = over_seeds(values - runs[place - 1][1]) if place else ""
        rows.append([place + 1, name, str(mean_accuracy(values)), str(behind)])
    return Table("Ranking with 10 labels a class", ["", "start, way", "accuracy", "behind the one before"], rows, "By seed.")


def rates(parts: dict[str, np.ndarray], counts: tuple[int, ...]) -> Table:
    """What tuning chose."""
    rows = [
        [start, way, *(f"{parts['rate'][place, number, column]:g}" for column in range(len(counts)))]
        for place, start in enumerate(STARTS)
        for number, way in enumerate(WAYS)
    ]
    tried = ", ".join(f"{rate:g}" for rate in RATES)
    return Table(
        "Learning rates chosen", ["start", "fine-tuned", *(f"{count} labels" for count in counts)], rows, f"Of {tried}."
    )


def by_labels(accuracy: dict[str, np.ndarray], counts: tuple[int, ...]):
    """Accuracy by labels, every start in its best way, and the ways of the contrastive start."""
    picture, axes = plots.figure(1, 2, height=4.4, sharey=True)
    ten = counts.index(10)
    for place, (start, colour) in enumerate(zip(STARTS, plots.COLOURS, strict=False)):
        best = int(accuracy[start][:, ten].mean(axis=-1).argmax())
        label = f"{start} ({list(WAYS)[best]})"
        plots.band(axes[0, 0], counts, accuracy[start][best].T, label=label, colour=colour, turn=(place, len(STARTS)))
    for place, (way, colour) in enumerate(zip(WAYS, plots.COLOURS[4:], strict=False)):
        turn = (place, len(WAYS))
        plots.band(axes[0, 1], counts, accuracy["contrastive"][place].T, label=way, colour=colour, turn=turn)
    for axis, title in zip(axes[0], ("Starts, each in its best way", "Ways to fine-tune: contrastive"), strict=True):
        axis.set_xscale("log")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.set_xlabel("labels a class")
        axis.set_title(title)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=8.5)  # below, where no data lie
    axes[0, 0].set_ylabel("test accuracy")
    return picture


def curves(parts: dict[str, np.ndarray]):
    """Training loss and test accuracy by step."""
    picture, axes = plots.figure(1, 2, height=3.5)
    for place, (start, colour) in enumerate(zip(STARTS, plots.COLOURS, strict=False)):
        plots.band(axes[0, 0], np.arange(STEPS), parts["loss"][place], label=start, colour=colour)
        plots.band(axes[0, 1], SNAPSHOTS, parts["after"][place].T, label=start, colour=colour, turn=(place, len(STARTS)))
    axes[0, 0].set(xlabel="step", ylabel="training loss, nats", title=f"Training, rate {COMMON_RATE:g}", ylim=(0, None))
    plots.legend(picture, axes[0, 1], columns=4)
    axes[0, 1].set(xlabel="step", ylabel="test accuracy", title="Test")
    return picture
