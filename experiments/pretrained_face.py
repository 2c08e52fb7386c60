"""Real weights as a start: R-Net of MTCNN, grafted into flax, tells faces from the rest with a handful of labels.

The weights are those its authors trained (`experiments.nets.rnet`), the photographs scikit-image's. First the grafted network
must put out what the original does. Then it is fine-tuned with a fresh head on a few labelled photographs, and compared with
the same training from a random start.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from experiments.lab import data, plots
from experiments.lab.claims import Claim, at_least, at_most, every, exactly, known, over_seeds
from experiments.lab.claims import accuracy as mean_accuracy
from experiments.lab.experiment import Figure, Introduction, Result, Run, Table
from experiments.lab.objectives import supervised
from experiments.lab.training import fit
from experiments.nets.rnet import OUTPUTS, RNet, patterns, prepared, pretrained, probabilities
from varscale import transfer

REQUIRES = ("matplotlib", "skimage")
ORDER = 10

STEPS = 25
FEW = 2  # labels a class, of the claims
RATES = (1e-3, 3e-3)  # tried for every start and way, on seeds that are not reported
TUNING = 2  # seeds
WAYS: dict[str, tuple[str, dict[Any, Any]]] = {
    "random, one rate": ("random", {"**": 1.0}),
    "pretrained, head only": ("pretrained", dict(transfer.head_only("face"))),
    "pretrained, small rate for the body": ("pretrained", {"face": 1.0, "**": 0.1}),
    "pretrained, one rate": ("pretrained", {"**": 1.0}),
}
RANDOM = "random, one rate"
BEFORE = "set after pilot runs, before this one"


def run(run: Run) -> Result:
    """Compare with the original, then fine-tune."""
    counts, seeds = (FEW,) if run.quick else (1, FEW, 5, 10), run.seeds(quick=12, full=15)
    original = run.part("original", against_original)
    few = run.part("few labels", lambda: few_labels(run, counts, seeds))
    accuracy = few["accuracy"].astype(np.float64)
    rows = [
        [way, *(str(mean_accuracy(accuracy[place, column])) for column in range(len(counts)))] for place, way in enumerate(WAYS)
    ]
    return Result(
        introduction=Introduction(
            data="scikit-image's 100 photographs of faces and 100 of other things, 25x25 grey levels; 50 of each are held out",
            net="R-Net of MTCNN: three convolutions, a layer of 128, PReLU; 100,178 weights as their authors trained them",
            inputs=f"24x24 in three equal colours, −1 to 1; {STEPS} steps of Adam, {counts[0]} to {counts[-1]} labels a class",
            notes=("K. Zhang et al. 2016 (MTCNN)", "Yosinski et al. 2014 (transfer of features)"),
        ),
        claims=claims(original, accuracy, counts),
        tables=[
            Table(
                "Accuracy on held-out photographs", ["start, way", *(f"{n} labels a class" for n in counts)], rows, "By seed."
            )
        ],
        figures=[
            Figure(
                "labels",
                "Accuracy on held-out photographs by labels a class: a dot a seed, a bar their median.",
                picture(accuracy, counts),
            )
        ],
        remarks=[f"The account of the graft: {original['account'][()]}."],
    )


def claims(original: dict[str, np.ndarray], accuracy: np.ndarray, counts: tuple[int, ...]) -> list[Claim]:
    """The same numbers as the original; and what they are worth."""
    ways = list(WAYS)
    few = counts.index(FEW)
    return [
        every(
            "the grafted network puts out what the original does",
            [
                (name, at_most(1e-5, source="the package's own runtime, recorded"), known(float(original[name])))
                for name in ("faces/box", "faces/probabilities", "patterns/box", "patterns/probabilities")
            ],
            unit="largest difference",
        ),
        Claim(
            "the grafted network decides all 200 photographs as the original does",
            exactly(1.0, source="the package's own runtime, recorded"),
            known(float(original["agreement"])),
            unit="share of equal decisions",
        ),
        every(
            f"with {FEW} labels a class and a fresh head, the pretrained start beats a random one",
            [
                (way, at_least(0.02, source=BEFORE), over_seeds(accuracy[place, few] - accuracy[ways.index(RANDOM), few]))
                for place, way in enumerate(ways)
                if way != RANDOM
            ],
            unit="difference of accuracies by seed",
        ),
        Claim(
            f"a fresh head on the frozen body needs no more than {FEW} labels a class",
            at_least(0.9, source=BEFORE),
            mean_accuracy(accuracy[ways.index("pretrained, head only"), few]),
            unit="accuracy",
        ),
    ]


def against_original() -> dict[str, Any]:
    """Largest differences from the recorded outputs of the original."""
    model, account = pretrained(nnx.eval_shape(lambda: RNet(rngs=nnx.Rngs(0))), strict=True)
    recorded = transfer.load(OUTPUTS)
    found: dict[str, Any] = {"account": np.array(str(account))}
    for name, images in (("faces", prepared(data.faces().features)), ("patterns", patterns())):
        box, logits = jax.jit(lambda model, images: model(images))(model, images)
        outputs = {"box": np.asarray(box), "probabilities": np.asarray(probabilities(logits))}
        for output, values in outputs.items():
            found[f"{name}/{output}"] = np.array(np.abs(values - recorded[name][output]).max())
        if name == "faces":
            equal = outputs["probabilities"].argmax(axis=-1) == recorded[name]["probabilities"].argmax(axis=-1)
            found["agreement"] = np.array(equal.mean())
    return found


def few_labels(run: Run, counts: tuple[int, ...], seeds: int) -> dict[str, Any]:
    """Held-out accuracy by way, number of labels and seed; the rate of each is chosen on other seeds."""
    photographs = data.faces()
    images, labels = prepared(photographs.features), jnp.asarray(1 - photographs.labels)  # R-Net's class 1 is the face
    nets = {start: _states(run.keys("draw", TUNING + seeds), start) for start in ("random", "pretrained")}
    accuracy = np.zeros((len(WAYS), len(counts), seeds), np.float32)
    rate = np.zeros(accuracy.shape[:2], np.float32)
    for place in run.track(list(np.ndindex(len(WAYS), len(counts))), "fine-tuning"):
        start, rules = list(WAYS.values())[place[0]]
        rows, test = _splits(photographs.labels, counts[place[1]], TUNING + seeds)
        compiled = _compiled(nets[start][0], rules, images, labels)
        tuning, reported = (slice(TUNING), slice(TUNING, None))

        def measured(part: slice, rate: float, start=start, compiled=compiled, rows=rows, test=test) -> np.ndarray:
            params = jax.tree.map(lambda leaf: leaf[part], nets[start][1])
            return np.asarray(compiled(params, rows[part], test[part], jnp.float32(rate)))

        rate[place] = max(RATES, key=lambda each: float(measured(tuning, each).mean()))
        accuracy[place] = measured(reported, float(rate[place]))
    return {"accuracy": accuracy, "rate": rate}


def _states(keys: jax.Array, start: str) -> tuple[Any, Any]:
    """The network's graph and the parameters of all seeds: drawn, or grafted below a drawn head."""
    models = [RNet(rngs=nnx.Rngs(params=key)) for key in keys]
    if start == "pretrained":
        models = [pretrained(model, fresh=["face"], strict=True)[0] for model in models]
    graph = nnx.split(models[0])[0]
    return graph, jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(model, nnx.Param) for model in models))


def _compiled(graph: Any, rules: dict[Any, Any], images: Array, labels: Array) -> Callable[..., Array]:
    """Accuracy on `test` of nets fine-tuned on `rows`, one seed after the other: convolutions of many nets at once are slow."""

    def one(params: Any, rows: Int[Array, " few"], test: Int[Array, " rest"], rate: Float[Array, ""]) -> Array:
        def loss(params: Any, _: Array) -> Array:
            return supervised(nnx.merge(graph, params)(images[rows])[1], labels[rows])

        tuned, _ = fit(loss, transfer.fine_tune(optax.adam(rate), rules), params, jnp.arange(STEPS))
        guesses = jnp.argmax(nnx.merge(graph, tuned)(images[test])[1], axis=-1)
        return jnp.mean((guesses == labels[test]).astype(jnp.float32))

    @jax.jit
    def all_seeds(params: Any, rows: Array, test: Array, rate: Array) -> Array:
        return jax.lax.map(lambda each: one(each[0], each[1], each[2], rate), (params, rows, test))

    return all_seeds


def _splits(labels: np.ndarray, count: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` photographs of each class to train on and 50 of each to test on, by seed."""
    rng = np.random.default_rng(0)
    orders = [[rng.permutation(np.flatnonzero(labels == label)) for label in (0, 1)] for _ in range(seeds)]
    rows = np.stack([np.concatenate([order[:count] for order in pair]) for pair in orders])
    return rows, np.stack([np.concatenate([order[50:] for order in pair]) for pair in orders])


def picture(accuracy: np.ndarray, counts: tuple[int, ...]):
    """Every seed's accuracy, one row a start and way, one colour a number of labels."""
    figure, axes = plots.figure(1, 1, height=3.6)
    for column, (count, colour) in enumerate(zip(counts, plots.shades(len(counts)), strict=True)):
        height = np.arange(len(WAYS)) + (column - (len(counts) - 1) / 2) * 0.18
        rows = np.repeat(height, accuracy.shape[-1])
        axes[0, 0].plot(accuracy[:, column].ravel(), rows, "o", color=colour, alpha=0.35, markersize=5)
        label = f"{count} labels a class"
        axes[0, 0].plot(np.median(accuracy[:, column], axis=-1), height, "|", color=colour, markersize=11, mew=2.5, label=label)
    axes[0, 0].set_yticks(range(len(WAYS)), list(WAYS))
    axes[0, 0].invert_yaxis()
    axes[0, 0].set(xlabel="accuracy on held-out photographs", title="Faces and other photographs, R-Net")
    plots.legend(figure, axes[0, 0], columns=len(counts))
    return figure
