"""Does He help a graph convolutional net with ReLU, where everyone uses Xavier? Not at two layers; from eight on it does.

The nets of Kipf and Welling 2017 (16 hidden features, Adam, 200 epochs) on a real social graph, on the nearest neighbours of
real digits, and on a random graph of Cora's size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import varscale as vs
from experiments.lab import experiment, graphs, plots
from experiments.lab.claims import Claim, Refuted, at_least, at_most, every, near, over_seeds
from experiments.lab.experiment import Figure, Introduction, Result, Run, Table
from experiments.lab.graphs import Graph
from experiments.nets.graph_net import DEEPEST, EPOCHS, RATE, Nodes, draw, moments, train

REQUIRES = ("matplotlib", "sklearn", "networkx")
ORDER = 7

LAWS: dict[str, Any] = {"He": vs.he_uniform(), "Xavier": vs.glorot_uniform()}
COLOURS = dict(zip(LAWS, plots.COLOURS, strict=False))
WIDE = 128  # of the nets whose layers are measured: a draw's ln E[z²] scatters by √(5·layers/width)
EARLY = 40  # epochs over which the training loss is averaged: how fast a net converges
KIPF = "Kipf and Welling 2017, who use Glorot and Bengio's"
LAW = "E[z²] = n·Var[w]·tr(Â·E[hhᵀ]·Âᵀ)/nodes"


@dataclass(frozen=True)
class Settings(experiment.Settings):
    """The experiment's own options."""

    graph: Path | None = None
    """A graph of your own in place of the three: a .npz file, as numpy.savez(FILE, edges=..., features=..., labels=...)
    writes it. edges: integers, (edges, 2) or (2, edges), pairs of nodes counted from 0, each edge once or in both directions.
    features: numbers, (nodes, features). labels: integers from 0, or strings, (nodes,). Optional: train and test, truth values,
    (nodes,). The names edge_index, x and y are understood too."""

    @property
    def own_data(self) -> str:
        return "" if self.graph is None else f"your graph {self.graph}"


def relu_kernel(covariance: np.ndarray) -> np.ndarray:
    """E[relu(u)·relu(v)] for centred Gaussians of the given covariances (Cho and Saul 2009, degree 1)."""
    scale = np.sqrt(np.maximum(np.diag(covariance), 1e-30)).astype(covariance.dtype)
    cosine = np.clip(covariance / scale[:, None] / scale, -1, 1)
    angle = np.arccos(cosine)
    return scale[:, None] * scale * (np.sin(angle) + (np.pi - angle) * cosine) / (2 * np.pi)


def predicted_factors(graph: Graph) -> tuple[np.ndarray, float]:
    """What averaging over neighbours leaves of the second moment, layer by layer, at any width; and of unrelated features.

    With Φ the features' second moments between nodes, a layer leaves tr(ÂΦÂᵀ)/tr(Φ). The next layer's Φ follows by the kernel
    of ReLU. Where the features of different nodes are unrelated it is the mean of Σ_j Â_ij²; where they are equal, about 1.

    Returns:
      The factors, shape (DEEPEST,), and that of unrelated features.
    """
    adjacency = graph.normalized_adjacency().astype(np.float32)
    phi = graph.features @ graph.features.T
    factors = []
    for _ in range(DEEPEST):
        mixed = adjacency @ (adjacency @ phi).T
        factors.append(float(np.trace(mixed) / np.trace(phi)))
        mixed /= np.trace(mixed) / len(mixed)  # the scale does not matter to a kernel of degree 1
        phi = relu_kernel(mixed)
    return np.array(factors), float((adjacency * adjacency).sum() / len(phi))


def train_part(run: Run, name: str, graph: Graph, depths: tuple[int, ...], seeds: int) -> dict[str, np.ndarray]:
    """Training loss and test accuracy by epoch, shape (depths, laws, seeds, epochs)."""

    def compute():
        nodes = Nodes.of(graph)
        nets = [draw(run.keys("nets", seeds), law, nodes, graph.classes) for law in LAWS.values()]
        params = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *nets)
        found = [
            train(params, nodes, depth, RATE, classes=graph.classes, epochs=100 if run.quick else EPOCHS)
            for depth in run.track(depths, f"{graph.name}, by depth")
        ]
        shape = (len(depths), len(LAWS), seeds, -1)
        return {field: np.stack([pair[n] for pair in found]).reshape(shape) for n, field in enumerate(("loss", "accuracy"))}

    return run.part(f"{name}-training", compute)


def layers_part(run: Run, name: str, graph: Graph, seeds: int) -> dict[str, np.ndarray]:
    """E[z²] by layer of wide nets before training, (laws, seeds, layers), and the law's factors by layer."""

    def compute():
        nodes = Nodes.of(graph)
        nets = [draw(run.keys("wide", seeds), law, nodes, graph.classes, WIDE) for law in LAWS.values()]
        measured = [moments(params, nodes, classes=graph.classes, width=WIDE) for params in nets]
        factors, unrelated = predicted_factors(graph)
        return {"moments": np.stack(measured), "factors": factors, "unrelated": unrelated}

    return run.part(f"{name}-layers", compute)


def claims_of_layers(graphs_of: dict[str, Graph], layers: dict[str, dict[str, np.ndarray]]) -> list[Claim]:
    """The law with the adjacency's own factor."""
    first, slopes, halves = [], [], []
    for name, part in layers.items():
        log = np.log(part["moments"].astype(np.float64))[:, :, : DEEPEST - 1]
        features = graphs_of[name].features
        expected = 2 * float(np.mean(features.astype(np.float64) ** 2)) * part["factors"][0]
        first.append((name, near(1.0, 0.15, source=LAW), over_seeds(np.exp(log[0, :, 0]) / expected)))
        # A draw's ln E[z²] is 5/(2·width) a layer below that of the mean (Hanin and Nica 2018): −.02 at this width.
        rate = float(np.log(part["factors"][1 : DEEPEST - 1]).mean()) - 2.5 / WIDE
        slope = (log[:, :, -1] - log[:, :, 0]) / (DEEPEST - 2)
        slopes.append((name, near(rate, 0.08, source=LAW), over_seeds(slope[0])))
        halves.append((name, near(math.log(2), 0.02, source="2/n against 1/n a layer"), over_seeds(slope[0] - slope[1])))
    return [
        every("He: E[z²] of the first layer is the law's, with the adjacency's factor", first, unit="E[z²] over the law's"),
        every(
            f"He: ln of E[z²]'s factor a layer over {DEEPEST - 1} layers is the adjacency's own",
            slopes,
            unit="ln of E[z²], a layer",
        ),
        every("Xavier loses a factor 2 a layer besides", halves, unit="ln of He's factor over Xavier's, a layer"),
    ]


def claims_of_training(parts: dict[str, dict[str, np.ndarray]], depths: tuple[int, ...]) -> list[Claim]:
    """The answer, by depth."""
    deep = 8

    def gap(part, depth):
        accuracy = part["accuracy"][depths.index(depth), :, :, -1].astype(np.float64)
        return accuracy[0] - accuracy[1]

    def speed(part, depth):
        loss = part["loss"][depths.index(depth), :, :, :EARLY].astype(np.float64).mean(axis=-1)
        return np.log(loss[0] / loss[1])

    claims = [
        every(
            "two layers: He and Xavier reach the same accuracy",
            [(name, near(0.0, 0.04, source=KIPF), over_seeds(gap(part, 2))) for name, part in parts.items()],
            unit="difference of test accuracies",
            refutes=Refuted(
                "a ReLU net needs He's factor 2",
                "Over two layers the factor is lost once; Adam makes up for it in a few steps, and the adjacency costs more.",
                by="He et al. 2015, taken for every net with ReLU",
            ),
        ),
        every(
            f"{deep} layers: He converges faster over the first {EARLY} epochs",
            [
                (name, at_most(-0.03, source="Xavier's signal halves a layer"), over_seeds(speed(part, deep)))
                for name, part in parts.items()
            ],
            unit="ln of the ratio of mean training losses",
        ),
    ]
    if DEEPEST in depths:
        claims += [
            every(
                f"{DEEPEST} layers: He ends more accurate on every graph with enough test nodes to tell",
                [
                    (name, at_least(0.02, source="Xavier's signal is down by 2^-15"), over_seeds(gap(part, DEEPEST)))
                    for name, part in parts.items()
                    if name != "karate club"
                ],
                unit="difference of test accuracies",
                refutes=Refuted(
                    "Xavier serves a graph convolutional net at any depth",
                    "Its second moment is 2^-15 of He's by then.",
                    by="the usual practice after Kipf and Welling 2017",
                ),
            ),
        ]
    if "citation-like blocks" in parts:
        accuracy = parts["citation-like blocks"]["accuracy"][:, 0, :, -1].astype(np.float64)
        claims.append(
            Claim(
                f"He is no cure for depth: {deep} layers are less accurate than 2 on the citation-like graph",
                at_least(0.03, source=KIPF + "; appendix B: accuracy falls with depth"),
                over_seeds(accuracy[0] - accuracy[depths.index(deep)]),
                unit="difference of test accuracies",
            )
        )
    return claims


def chosen(settings: Settings) -> dict[str, Callable[[], Graph]]:
    """The graphs by name: three, or the user's."""
    if settings.graph is not None:
        path = settings.graph
        return {path.stem: lambda: graphs.load(path, seed=settings.seed)}
    return {
        "karate club": graphs.karate_club,
        "digits' neighbours": graphs.digits_neighbours,
        "citation-like blocks": graphs.citations,
    }


def run(run: Run) -> Result:
    """Measure the layers, train at every depth, compare."""
    seeds = run.seeds(quick=10, full=48)
    depths = (2, 8) if run.quick else (2, 4, 8, DEEPEST)
    graphs_of = {name: make() for name, make in chosen(run.settings).items()}
    slugs = {name: f"graph-{number}" for number, name in enumerate(graphs_of)}
    layers = {name: layers_part(run, slugs[name], graph, max(seeds, 20)) for name, graph in graphs_of.items()}
    parts = {name: train_part(run, slugs[name], graph, depths, seeds) for name, graph in graphs_of.items()}
    sizes = (f"{name}: {len(graph.labels)} nodes, {len(graph.edges)} edges" for name, graph in graphs_of.items())
    return Result(
        introduction=Introduction(
            data="; ".join(sizes),
            net=f"graph convolutions of 16 hidden features and ReLU, {', '.join(map(str, depths))} layers; {WIDE} features"
            " where layers are measured",
            inputs=f"node features as they are; Adam at rate {RATE:g}, {100 if run.quick else EPOCHS} epochs, {seeds} seeds",
            notes=("Kipf and Welling 2017", "He et al. 2015"),
        ),
        claims=[*claims_of_layers(graphs_of, layers), *claims_of_training(parts, depths)],
        tables=[_answers(parts, depths), _factors(layers)],
        figures=[
            Figure(
                "depth",
                "Test accuracy at the end, by depth: median of the draws and their 10 to 90 % range.",
                _depth(parts, depths),
            ),
            Figure("layers", f"E[z²] by layer before training, width {WIDE}; dashed: the law's.", _layers(graphs_of, layers)),
        ],
        remarks=[
            "Does He help where everyone uses Xavier? The table answers by graph and depth: nothing at two layers; with depth "
            "it learns faster, most where the net is deepest; and depth itself costs accuracy whatever the start.",
            "Why: averaging over neighbours leaves little of the second moment while the nodes' features are "
            "unrelated (the mean of Σ Â²), and all of it once they are alike. He keeps the rest; Xavier halves it a layer.",
        ],
    )


def _answers(parts: dict[str, dict[str, np.ndarray]], depths: tuple[int, ...]) -> Table:
    entries = []
    for name, part in parts.items():
        for row, depth in enumerate(depths):
            accuracy = part["accuracy"][row, :, :, -1].astype(np.float64)
            loss = part["loss"][row, :, :, :EARLY].astype(np.float64).mean(axis=(1, 2))
            means = [f"{mean:.1%} ± {deviation:.1%}" for mean, deviation in zip(accuracy.mean(1), accuracy.std(1), strict=True)]
            entries.append((name, depth, *means, *(f"{value:.3f}" for value in loss)))
    columns = ("graph", "depth", "He", "Xavier", "loss, He", "Xavier")
    return Table(
        "Accuracy", columns, entries, f"Test accuracy (± over draws) and mean training loss of the first {EARLY} epochs."
    )


def _factors(layers: dict[str, dict[str, np.ndarray]]) -> Table:
    shown = (0, 1, 3, 7, 14)
    rows = [
        (name, f"{float(part['unrelated']):.3f}", *(f"{part['factors'][layer]:.3f}" for layer in shown))
        for name, part in layers.items()
    ]
    columns = ("graph", "unrelated", *(f"layer {layer + 1}" for layer in shown))
    return Table("What the adjacency leaves of the second moment", columns, rows, "By the law; `unrelated`: the mean of Σ Â².")


def _depth(parts: dict[str, dict[str, np.ndarray]], depths: tuple[int, ...]):
    figure, axes = plots.figure(1, len(parts), height=3.2, sharey=True)
    for panel, (name, part) in zip(axes[0], parts.items(), strict=True):
        for row, law in enumerate(LAWS):
            accuracies = part["accuracy"][:, row, :, -1].T
            plots.band(panel, depths, accuracies, label=law, colour=COLOURS[law], turn=(row, len(LAWS)))
        panel.set(title=name, xlabel="layers", xticks=depths)
    axes[0, 0].set_ylabel("test accuracy")
    plots.legend(figure, axes[0, 0], columns=2)
    return figure


def _layers(graphs_of: dict[str, Graph], layers: dict[str, dict[str, np.ndarray]]):
    figure, axes = plots.figure(1, len(layers), height=3.2)
    numbers = np.arange(1, DEEPEST)
    for panel, (name, part) in zip(axes[0], layers.items(), strict=True):
        law = 2 * np.mean(graphs_of[name].features ** 2) * np.cumprod(part["factors"])[: DEEPEST - 1]
        for row, label in enumerate(LAWS):
            plots.band(panel, numbers, part["moments"][row][:, : DEEPEST - 1], label=label, colour=COLOURS[label], log=True)
        panel.plot(numbers, law, color=plots.INK, linewidth=1, linestyle=plots.DASHED, label="the law for He")
        panel.set(title=name, xlabel="layer", ylabel="E[z²]")
    plots.legend(figure, axes[0, 0], columns=3)
    return figure
