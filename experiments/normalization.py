"""Normalization layers do what their definitions say, and make a bad scale harmless; exploding gradients they do not cure."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float

import varscale as vs
from experiments.lab import data, plots
from experiments.lab.claims import Claim, Refuted, at_least, at_most, every, known, near, over_seeds
from experiments.lab.experiment import Figure, Introduction, Result, Run, Table
from experiments.lab.training import cross_entropy, fit, minibatches
from experiments.nets.normalization_formulas import CASES, formula_errors
from experiments.nets.stacks import Classifier, Tower, rescale

REQUIRES = ("matplotlib", "sklearn")
ORDER = 6

# Frameworks' ε = 1e-5 would itself end the insensitivity: at a thousandth of He's scale the first layer's variance is 2e-6.
EPSILON = 1e-10
NORMS: dict[str, Callable[[], Any] | None] = {
    "none": None,
    "batch norm": functools.partial(nn.BatchNorm, use_running_average=False, epsilon=EPSILON),
    "layer norm": functools.partial(nn.LayerNorm, epsilon=EPSILON),
    "RMS norm": functools.partial(nn.RMSNorm, epsilon=EPSILON),
}
SCALES = np.logspace(-3, 3, 7)  # of He's standard deviation
GUESS = math.log(10)
GROWTH = math.pi / (math.pi - 1)
ROUNDING = 1e-9  # float64, values up to some hundred


@dataclass(frozen=True)
class Sizes:
    """Of the nets: those that are trained, then those whose gradient is measured."""

    trained_depth: int = 5
    batch_trained: int = 32
    steps: int = 200
    rate: float = 0.1
    width: int = 256
    depth: int = 24
    batch: int = 256
    settled: int = 8  # layers, from either end, that are left out of the slope: the correlations settle there


SIZES = Sizes()


@functools.partial(jax.jit, static_argnames=("norm", "sizes"))
def train(keys, x, labels, scales, *, norm: str, sizes: Sizes) -> Float[Array, "scales seeds steps"]:
    """Losses of digit classifiers under plain gradient descent.

    Args:
      keys: a key a seed.
      x: inputs, shape (samples, features), of second moment 1.
      labels: shape (samples,).
      scales: the hidden weights' standard deviation, in units of He's, shape (scales,).
      norm: name in NORMS.
      sizes: of the net.
    """
    tower = Tower(x.shape[1], sizes.trained_depth, jax.nn.relu, kernel_init=vs.he_normal(), use_bias=True, norm=NORMS[norm])
    model = Classifier(tower, 10)

    def one(scale, key):
        key_weights, key_batches = jax.random.split(key)
        params = dict(model.init(key_weights, x[:2])["params"])
        params["stack"] = rescale(params["stack"], scale)
        optimizer = optax.sgd(sizes.rate)

        def loss(params, batch):
            logits: Any = model.apply({"params": params}, x[batch], mutable=["batch_stats"])[0]
            return cross_entropy(logits, labels[batch])

        return fit(loss, optimizer, params, minibatches(key_batches, len(x), sizes.batch_trained, sizes.steps))[1]

    return jax.vmap(lambda scale: jax.vmap(lambda key: one(scale, key))(keys))(scales)


@functools.partial(jax.jit, static_argnames=("norm", "sizes"))
def look(key, *, norm: str, sizes: Sizes) -> dict[str, Array]:
    """ln of the gradient's second moment at each layer, and the mean and variance that each activation is given.

    The worst deviation from mean 0 and variance 1 over the batch is taken over all features and layers.
    """
    key_weights, key_inputs, key_gradient = jax.random.split(key, 3)
    x = jax.random.normal(key_inputs, (sizes.batch, sizes.width))
    cotangent = jax.random.normal(key_gradient, x.shape)
    tower = Tower(sizes.width, sizes.depth, jax.nn.relu, kernel_init=vs.he_normal(), norm=NORMS[norm])
    variables = tower.init(key_weights, x)

    def output(perturbations):
        y, changed = tower.apply({**variables, "perturbations": perturbations}, x, mutable=["batch_stats", "intermediates"])
        return jnp.sum(y * cotangent), changed["intermediates"]["layers"]["preactivation"][0]

    gradients, given = jax.grad(output, has_aux=True)(variables["perturbations"])
    g = gradients["layers"]["preactivation"]
    return {
        "gradient": jnp.log(jnp.mean(jnp.square(g), axis=(1, 2))),
        "mean": jnp.max(jnp.abs(jnp.mean(given, axis=1))),
        "variance": jnp.max(jnp.abs(jnp.var(given, axis=1) - 1)),
    }


def run(run: Run, sizes: Sizes = SIZES, samples: data.Samples | None = None) -> Result:
    """Check the definitions, sweep the scale, and measure the gradient's growth."""

    def sweep():
        chosen = samples if samples is not None else data.digits()
        x = chosen.features - chosen.features.mean(axis=0)
        x = jnp.asarray(x / np.sqrt(np.mean(x**2)))
        keys = run.keys("sweep", run.seeds(quick=6, full=12))
        labels, scales = jnp.asarray(chosen.labels), jnp.asarray(SCALES, jnp.float32)
        norms = run.track(list(NORMS), "sweep of the scale")
        return {norm: np.moveaxis(train(keys, x, labels, scales, norm=norm, sizes=sizes), 1, 0) for norm in norms}

    def growth():
        keys = run.keys("growth", run.seeds(quick=6, full=20))
        drawn = {
            norm: [look(key, norm=norm, sizes=sizes) for key in keys] for norm in run.track(list(NORMS), "gradients by depth")
        }
        return {f"{norm} {name}": np.stack([d[name] for d in draws]) for norm, draws in drawn.items() for name in draws[0]}

    formulas = run.part("formulas", lambda: formula_errors(run.key("formulas")))
    losses, looks = run.part("sweep", sweep), run.part("growth", growth)
    final = {norm: _final(curves) for norm, curves in losses.items()}
    claims = [*formula_claims(formulas, looks), *sweep_claims(final), *growth_claims(looks, sizes)]
    introduction = Introduction(
        data="scikit-learn's 1797 handwritten digits (8x8 grey levels) for training; standard normal inputs elsewhere",
        net=f"{sizes.trained_depth} hidden ReLU layers of 64 units for training, {sizes.depth} of {sizes.width} for gradients;"
        " no, batch, layer or RMS normalization before each ReLU",
        inputs=f"of second moment 1; plain gradient descent, rate {sizes.rate:g}, {sizes.steps} steps",
        notes=("Ioffe and Szegedy 2015", "Ba et al. 2016", "Ulyanov et al. 2016", "Wu and He 2018", "Yang et al. 2019"),
    )
    return Result(
        introduction,
        claims,
        [formula_table(formulas), sweep_table(final)],
        [sweep_figure(final), growth_figure(looks, sizes)],
        remarks=[
            f"Every normalization here uses ε = {EPSILON}. The usual 1e-5 is not small beside the variance that weights of a"
            " thousandth of He's scale give (2e-6), and would bring the bad scale back in."
        ],
    )


def _final(losses: np.ndarray) -> np.ndarray:
    """Mean loss of the last 20 steps, (seeds, scales); a run that diverged counts as a loss of 10."""
    return np.minimum(np.nan_to_num(losses.astype(np.float64), nan=10.0, posinf=10.0), 10.0)[..., -20:].mean(axis=-1)


def formula_claims(formulas: dict[str, np.ndarray], looks: dict[str, np.ndarray]) -> list[Claim]:
    """The definitions."""
    exact = at_most(ROUNDING, source="the definitions; float64 rounding")
    return [
        every(
            "each normalization takes its statistics over exactly its axes, with ε, γ and β where they belong",
            [
                (f"{case.name} over {case.axes_in_words}", exact, known(error))
                for case, error in zip(CASES, formulas["modules"], strict=True)
            ],
            unit="largest difference from the formula",
        ),
        Claim(
            "over any other axes the result would differ visibly",
            at_least(0.05, source="a check of the check"),
            known(float(formulas["wrong"].min())),
            unit="smallest difference",
        ),
        Claim(
            "batch norm's running averages are m·old + (1 − m)·batch, of mean and biased variance, over five batches",
            exact,
            known(float(formulas["running"])),
            unit="largest relative difference",
        ),
        Claim(
            "at inference batch norm uses its running averages in place of the batch's",
            exact,
            known(float(formulas["inference"])),
            unit="largest difference",
        ),
        every(
            "between dense layer and activation, batch norm gives every ReLU inputs of mean 0 and variance 1 over the batch",
            # float32 over a batch of 256: 24 layers do not add up, each is normalized afresh.
            [
                (
                    what,
                    at_most(1e-3, source="Ioffe and Szegedy 2015, section 3.2"),
                    known(float(looks[f"batch norm {what}"].max())),
                )
                for what in ("mean", "variance")
            ],
            unit="largest |mean| and |variance − 1|",
        ),
    ]


def sweep_claims(final: dict[str, np.ndarray]) -> list[Claim]:
    """Insensitivity to the scale."""
    half = at_most(GUESS / 2, source="half of what guessing gives, ln 10")

    def final_loss(norm, place):
        return over_seeds(final[norm][:, place])

    bad = [number for number, scale in enumerate(SCALES) if not 0.1 < scale < 10]
    return [
        every(
            "without normalization a scale a factor 10 or more from He's is not trained in these steps",
            [
                (
                    f"scale {SCALES[number]:g}",
                    at_least(GUESS / 2, source="(scale²)^L, the law"),
                    over_seeds(final["none"][:, number]),
                )
                for number in bad
            ],
            unit="final training loss, nats",
        ),
        Claim(
            "without normalization He's own scale trains",
            half,
            over_seeds(final["none"][:, len(SCALES) // 2]),
            unit="final training loss, nats",
        ),
        every(
            "with batch norm every scale over six decades trains",
            [(f"scale {scale:g}", half, final_loss("batch norm", n)) for n, scale in enumerate(SCALES)],
            unit="final training loss, nats",
        ),
        every(
            "with layer norm and RMS norm every scale from a tenth of He's to a thousand times it trains",
            [
                (f"{norm}, scale {scale:g}", half, final_loss(norm, n))
                for norm in ("layer norm", "RMS norm")
                for n, scale in enumerate(SCALES)
                if scale > 0.05
            ],
            unit="final training loss, nats",
        ),
        every(
            "with layer norm and RMS norm a hundredth of He's scale and less does not train",
            [
                (
                    f"{norm}, scale {scale:g}",
                    at_least(GUESS / 2, source="a step is rate/scale² of the weights"),
                    final_loss(norm, n),
                )
                for norm in ("layer norm", "RMS norm")
                for n, scale in enumerate(SCALES)
                if scale < 0.05
            ],
            unit="final training loss, nats",
            refutes=Refuted(
                "any normalization layer makes the scale of the weights irrelevant",
                "It does forward. Backward, the gradient is divided by the scale, so plain gradient descent moves the weights"
                " by rate/scale² of their size: 10⁴ and more at the first step, along one direction. What is left of the"
                " samples is then nearly the same for all. Batch norm subtracts just that common part; layer and RMS norm do"
                " not.",
                by="a common reading of Ba et al. 2016, section 5 (invariance to the weights' scale)",
            ),
        ),
    ]


def growth_claims(looks: dict[str, np.ndarray], sizes: Sizes) -> list[Claim]:
    """What batch norm does not cure."""
    slopes = {norm: _slopes(looks[f"{norm} gradient"], sizes) for norm in NORMS}
    yang = "Yang et al. 2019, a mean field theory of batch normalization: π/(π − 1)"
    return [
        Claim(
            "batch norm and ReLU: the gradient's second moment grows by about π/(π − 1) a layer towards the input",
            near(GROWTH, 0.1, source=yang),
            over_seeds(np.exp(slopes["batch norm"])),
            unit="factor of the gradient's second moment a layer",
            refutes=Refuted(
                "batch norm prevents exploding gradients",
                "It fixes the forward signal. Backward, a ReLU layer after batch norm passes on π/(π − 1) of the squared"
                " gradient, whatever the scale: a factor 10⁴ in 24 layers, and worse with depth.",
                by="a common reading of Ioffe and Szegedy 2015, section 3.3",
            ),
        ),
        Claim(
            "without batch norm, under He, the gradient is kept",
            near(1.0, 0.1, source="He et al. 2015, eq. 14"),
            over_seeds(np.exp(slopes["none"])),
            unit="factor of the gradient's second moment a layer",
        ),
    ]


def _slopes(gradients: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Growth of ln E[g²] a layer towards the input, between the layers left out at either end."""
    inner = gradients[:, sizes.settled : sizes.depth - sizes.settled]
    return (inner[:, 0] - inner[:, -1]) / (inner.shape[1] - 1)


def formula_table(formulas: dict[str, np.ndarray]) -> Table:
    """The axes of each."""
    rows = [
        (case.name, "x".join(map(str, case.shape)), case.axes_in_words, f"{error:.0e}")
        for case, error in zip(CASES, formulas["modules"], strict=True)
    ]
    return Table(
        "Definitions",
        ("normalization", "input", "statistics over", "largest difference"),
        rows,
        "flax's modules against the formulas, in float64.",
    )


def sweep_table(final: dict[str, np.ndarray]) -> Table:
    """Final loss by scale."""
    rows = [(norm, *(f"{value:.2f}" for value in losses.mean(axis=0))) for norm, losses in final.items()]
    return Table(
        "Training loss by the scale of the weights (in units of He's)",
        ("normalization", *(f"{scale:g}" for scale in SCALES)),
        rows,
        "ln 10 = 2.30 is guessing; 10 stands for a run that diverged.",
    )


def sweep_figure(final: dict[str, np.ndarray]) -> Figure:
    """The picture of insensitivity."""
    picture, ((axes,),) = plots.figure(height=3.6)
    for place, ((norm, losses), colour) in enumerate(zip(final.items(), plots.COLOURS, strict=False)):
        plots.band(axes, SCALES, losses, label=norm, colour=colour, log=True, turn=(place, len(final)))
    axes.set(xscale="log", xlabel="standard deviation of the weights, in units of He's", ylabel="training loss, nats")
    axes.set_title("Normalization forgives a bad scale")
    axes.set_yticks([0.1, 1, 10], ["0.1", "1", "diverged"])
    plots.reference(axes, GUESS, "ln 10: guessing")
    plots.legend(picture, axes, columns=5)
    return Figure(
        "scale-sweep", "Loss on digits after plain gradient descent at one rate, by the scale of the weights.", picture
    )


def growth_figure(looks: dict[str, np.ndarray], sizes: Sizes) -> Figure:
    """Gradients by layer."""
    picture, ((axes,),) = plots.figure(height=3.5)
    layers = np.arange(1, sizes.depth + 1)
    for place, (norm, colour) in enumerate(zip(NORMS, plots.COLOURS, strict=False)):
        relative = looks[f"{norm} gradient"] - looks[f"{norm} gradient"][:, -1:]
        plots.band(axes, layers, np.exp(relative), label=norm, colour=colour, log=True, turn=(place, len(NORMS)))
    middle = np.exp(np.median(looks["batch norm gradient"] - looks["batch norm gradient"][:, -1:], axis=0))
    axes.plot(
        layers,
        middle[-1] * GROWTH ** (sizes.depth - layers),
        color=plots.INK,
        linewidth=1,
        linestyle=plots.DASHED,
        label="π/(π − 1) a layer",
    )
    plots.by_layer(axes, "layer (the gradient comes from the right)")
    axes.set_ylabel("E[g²] over the last layer's")
    axes.set_title("Batch norm with ReLU: gradients explode at any scale")
    plots.legend(picture, axes, columns=5)
    return Figure(
        "gradient-growth",
        f"Second moment of the gradient at each of {sizes.depth} ReLU layers of {sizes.width} units.",
        picture,
    )
