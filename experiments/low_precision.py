"""In bfloat16 the usual initializers are biased and wide ReLU layers see it; drawn in float32 and rounded once they are not."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import varscale as vs
from experiments.lab import data, plots
from experiments.lab.claims import Claim, at_least, at_most, between, every, known, near, over_seeds
from experiments.lab.experiment import Figure, Introduction, Result, Run, Table
from experiments.lab.training import cross_entropy, fit, minibatches
from experiments.nets.stacks import Classifier, Stack, activations

REQUIRES = ("matplotlib", "sklearn")
ORDER = 8

MEASURED = "measured with jax 0.10.2: 7 random bits a draw"
SIDES = ("jax.nn", "varscale")
LAWS = {
    ("normal", "jax.nn"): jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal"),
    ("normal", "varscale"): vs.variance_scaling(2.0, "fan_in", "normal"),
    ("truncated normal", "jax.nn"): jax.nn.initializers.he_normal(),
    ("truncated normal", "varscale"): vs.he_normal(),
    ("uniform", "jax.nn"): jax.nn.initializers.he_uniform(),
    ("uniform", "varscale"): vs.he_uniform(),
}
# Measured with jax 0.10.2: the mean in standard deviations, in bfloat16.
JAX_MEANS = {"normal": -0.012, "truncated normal": -0.018, "uniform": -0.013}
# 2²⁰ draws know the mean to .001 σ; ten of them to .0003. "Unbiased" is a third of the smallest bias above.
MEAN_TOLERANCE = 0.004
# A mean of −.018σ adds n·mean²·E[x]²/E[x²] = 4096·.018²/π = .42 to E[y²] over the law's. One draw of 512 outputs scatters by
# .03, forty give ± .013; the tolerance excludes both no bias and that of the plain normal (.19).
JAX_RATIO, RATIO_TOLERANCE, OUR_TOLERANCE = 1.42, 0.05, 0.03
OUTPUT_MEAN, OUTPUT_MEAN_TOLERANCE = -0.64, 0.1


@dataclass(frozen=True)
class Sizes:
    """Of what is drawn: weights to count, one wide layer, a deep net, and a net that is trained."""

    draws: tuple[int, int] = (4096, 256)
    wide: tuple[int, int] = (4096, 512)
    batch: int = 64
    deep_width: int = 1024
    depth: int = 12
    trained_width: int = 512
    trained_depth: int = 8
    steps: int = 40
    rate: float = 0.01


SIZES = Sizes()


@functools.partial(jax.jit, static_argnames=("law", "side", "shape", "dtype"))
def weight_statistics(key, *, law: str, side: str, shape: tuple[int, int], dtype: Any) -> Float[Array, "4"]:
    """Number of distinct values, mean and largest modulus in standard deviations, and E[w²] over the claim."""
    raw = LAWS[law, side](key, shape, dtype).astype(jnp.float32)
    w = raw / math.sqrt(2 / shape[0])
    ordered = jnp.sort(raw.ravel())
    distinct = 1 + jnp.sum((ordered[1:] != ordered[:-1]).astype(jnp.float32))
    return jnp.stack([distinct, jnp.mean(w), jnp.max(jnp.abs(w)), jnp.mean(jnp.square(w))])


@functools.partial(jax.jit, static_argnames=("side", "sizes"))
def wide_layer(key, *, side: str, sizes: Sizes) -> Float[Array, "2"]:
    """E[y²] over 2·E[x²], and the mean of y, for bfloat16 weights of he_normal on ReLU inputs of unit variance before ReLU."""
    key_weights, key_inputs = jax.random.split(key)
    x = jax.nn.relu(jax.random.normal(key_inputs, (sizes.batch, sizes.wide[0])))
    y = x @ LAWS["truncated normal", side](key_weights, sizes.wide, jnp.bfloat16).astype(jnp.float32)
    return jnp.stack([jnp.mean(jnp.square(y)) / (2 * jnp.mean(jnp.square(x))), jnp.mean(y)])


@functools.partial(jax.jit, static_argnames=("sizes",))
def deep_net(key, ours, *, sizes: Sizes) -> Float[Array, " depth"]:
    """ln of the second moment of each layer of a He ReLU net with bfloat16 weights, over the input's."""
    key_weights, key_inputs = jax.random.split(key)
    x = jax.nn.relu(jax.random.normal(key_inputs, (sizes.batch, sizes.deep_width))) * math.sqrt(2)
    widths = (sizes.deep_width,) * sizes.depth
    params = jax.lax.cond(
        ours, *(lambda init=init: Stack(widths, jax.nn.relu, init).init(key_weights, x)["params"] for init in _STARTS)
    )
    # After a ReLU the second moment is half the pre-activation's, which the claim says is 2·E[x²].
    layers = activations(Stack(widths, jax.nn.relu), {"params": params}, x)
    return jnp.log(jnp.stack([jnp.mean(jnp.square(layer)) for layer in layers]) / jnp.mean(jnp.square(x)))


@functools.partial(jax.jit, static_argnames=("sizes",))
def train(key, ours, x, labels, *, sizes: Sizes) -> Float[Array, " steps"]:
    """Losses of a ReLU net whose weights start in bfloat16 and are trained in float32."""
    key_weights, key_batches = jax.random.split(key)
    widths = (sizes.trained_width,) * sizes.trained_depth

    def model(init):
        return Classifier(Stack(widths, jax.nn.relu, init, use_bias=True), 10)

    def loss(params, batch):
        logits: Any = model(_STARTS[0]).apply({"params": params}, x[batch])
        return cross_entropy(logits, labels[batch])

    params = jax.lax.cond(ours, *(lambda init=init: model(init).init(key_weights, x[:1])["params"] for init in _STARTS))
    batches = minibatches(key_batches, len(x), sizes.batch, sizes.steps)
    return fit(loss, optax.sgd(sizes.rate, momentum=0.9), params, batches)[1]


def _in_bfloat16(side: str):
    """he_normal drawn in bfloat16, as parameters of that precision are, and then held in the dtype that is asked for."""
    law = LAWS["truncated normal", side]
    return lambda key, shape, dtype=jnp.float32: law(key, shape, jnp.bfloat16).astype(dtype)


_STARTS = tuple(_in_bfloat16(side) for side in ("varscale", "jax.nn"))  # of `cond`: the first where `ours` is true


def run(run: Run, sizes: Sizes = SIZES, samples: data.Samples | None = None) -> Result:
    """Count, measure, stack and train, on both sides."""
    dtypes = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float8_e4m3fn": jnp.float8_e4m3fn}

    def weights():
        drawn = {}
        for law, side in run.track(list(LAWS), "weights"):
            keys = run.keys("weights", run.seeds(quick=6, full=20))
            for name, dtype in dtypes.items():
                few = keys if name == "bfloat16" else keys[:2]
                statistics = [weight_statistics(key, law=law, side=side, shape=sizes.draws, dtype=dtype) for key in few]
                drawn[f"{law} {side} {name}"] = np.stack(statistics)
        return drawn

    def layers():
        keys = run.keys("layers", run.seeds(quick=8, full=30))
        many = run.keys("wide layers", run.seeds(quick=40, full=100))
        wide = {f"wide {side}": np.stack([wide_layer(key, side=side, sizes=sizes) for key in many]) for side in SIDES}
        deep = {f"deep {side}": [] for side in SIDES}
        for key in run.track(keys, "deep nets", total=len(keys)):
            for side in SIDES:
                deep[f"deep {side}"].append(deep_net(key, side == "varscale", sizes=sizes))
        return wide | {name: np.stack(rows) for name, rows in deep.items()}

    def training():
        chosen = samples if samples is not None else data.digits()
        x = chosen.features - chosen.features.mean(axis=0)
        x, labels = jnp.asarray(x / np.sqrt(np.mean(x**2))), jnp.asarray(chosen.labels)
        keys = run.keys("training", run.seeds(quick=5, full=12))
        pairs = run.track([(key, side) for key in keys for side in SIDES], "training")
        losses = np.stack([train(key, side == "varscale", x, labels, sizes=sizes) for key, side in pairs])
        return {"losses": losses.reshape(len(keys), len(SIDES), sizes.steps)}

    drawn, looks, losses = run.part("weights", weights), run.part("layers", layers), run.part("training", training)["losses"]
    return Result(
        Introduction(
            data="weights, and standard normal inputs; for training, scikit-learn's 1797 handwritten digits",
            net=f"one layer of {sizes.wide[0]} inputs, {sizes.depth} ReLU layers of {sizes.deep_width}, and a classifier of"
            f" {sizes.trained_depth} layers of {sizes.trained_width}, with weights drawn in bfloat16, float16 or float8",
            inputs=f"of second moment 1; gradient descent with momentum 0.9, rate {sizes.rate:g}, {sizes.steps} steps",
            notes=("jax.nn.initializers, of jax 0.10.2", "He et al. 2015"),
        ),
        [*weight_claims(drawn), *layer_claims(looks, sizes), *training_claims(losses)],
        [weight_table(drawn, dtypes)],
        [layer_figure(looks, losses, sizes), weight_figure(run.key("picture"), sizes)],
    )


def weight_claims(drawn: dict[str, np.ndarray]) -> list[Claim]:
    """Of the weights alone; columns are distinct values, mean, largest, second moment."""
    laws = tuple(JAX_MEANS)

    def column(law, side, number, dtype="bfloat16"):
        return drawn[f"{law} {side} {dtype}"][:, number]

    finite = [np.isfinite(drawn[f"{law} varscale {dtype}"]).all() for law in laws for dtype in ("float16", "float8_e4m3fn")]
    unusable = [
        not np.isfinite(row).all() or not row.any() for row in (column(law, "jax.nn", 3, "float8_e4m3fn") for law in laws)
    ]
    return [
        every(
            "jax.nn.initializers in bfloat16: 128 distinct values",
            [(law, near(128, 0.5, source=MEASURED), over_seeds(column(law, "jax.nn", 0))) for law in laws],
            unit="number of values",
        ),
        every(
            "varscale in bfloat16: at least 2000 distinct values",
            [
                (law, at_least(2000, source="float32 draws, rounded once"), over_seeds(column(law, "varscale", 0)))
                for law in laws
            ],
            unit="number of values",
        ),
        every(
            "jax.nn.initializers in bfloat16 have a mean",
            [
                (law, near(mean, MEAN_TOLERANCE, source=MEASURED), over_seeds(column(law, "jax.nn", 1)))
                for law, mean in JAX_MEANS.items()
            ],
            unit="mean, in standard deviations",
        ),
        every(
            "varscale's initializers in bfloat16 have none",
            [(law, near(0.0, MEAN_TOLERANCE, source="the promise"), over_seeds(column(law, "varscale", 1))) for law in laws],
            unit="mean, in standard deviations",
        ),
        Claim(
            "jax.nn's normal never goes beyond 2.89 standard deviations in bfloat16",
            near(2.89, 0.01, source=MEASURED),
            known(float(column("normal", "jax.nn", 2).max())),
            unit="largest |w|, in standard deviations",
        ),
        Claim(
            "varscale's normal has its tails in bfloat16",
            between(4.2, 6.5, source="P(max |z| of 2²⁰ outside) < 1e-4"),
            known(float(np.median(column("normal", "varscale", 2)))),
            unit="largest |w| of 2²⁰, in standard deviations",
        ),
        every(
            "varscale keeps E[w²] in bfloat16, float16 and float8",
            # The standard error of 2²⁰ draws is .0014 (κ = 3); rounding to float8's three bits adds 2⁻⁸/3 = .0013.
            [
                (
                    f"{law}, {dtype}",
                    near(1.0, 0.01, source="the promise"),
                    known(float(column(law, "varscale", 3, dtype).mean())),
                )
                for law in laws
                for dtype in ("bfloat16", "float16", "float8_e4m3fn")
            ],
            unit="E[w²] over the stated variance",
        ),
        Claim(
            "varscale is finite in float16 and float8",
            at_least(1.0, source="the promise"),
            known(float(all(finite))),
            unit="1 if all draws are finite",
        ),
        Claim(
            "jax.nn.initializers cannot be used in float8_e4m3fn: E[w²] is 0 or not finite",
            near(3, 0.5, source=MEASURED),
            known(sum(unusable)),
            unit="laws, of three",
        ),
    ]


def layer_claims(looks: dict[str, np.ndarray], sizes: Sizes) -> list[Claim]:
    """Of a wide layer and a deep net."""
    theirs, ours = looks["wide jax.nn"], looks["wide varscale"]
    return [
        Claim(
            f"jax.nn.he_normal in bfloat16 on {sizes.wide[0]} ReLU inputs: E[y²] is too large",
            near(JAX_RATIO, RATIO_TOLERANCE, source="the mean adds n·E[w]²·E[x]²"),
            over_seeds(theirs[:, 0]),
            unit="E[y²] over the law's",
        ),
        Claim(
            "jax.nn.he_normal in bfloat16: every output has the same mean",
            near(OUTPUT_MEAN, OUTPUT_MEAN_TOLERANCE, source=MEASURED),
            over_seeds(theirs[:, 1]),
            unit="mean of the outputs",
        ),
        Claim(
            "varscale's he_normal in bfloat16: E[y²] is the law's",
            near(1.0, OUR_TOLERANCE, source="the law"),
            over_seeds(ours[:, 0]),
            unit="E[y²] over the law's",
        ),
        Claim(
            "varscale's he_normal in bfloat16: the outputs have no common mean",
            near(0.0, 0.05, source="the law"),
            over_seeds(ours[:, 1]),
            unit="mean of the outputs",
        ),
        Claim(
            f"{sizes.depth} ReLU layers of {sizes.deep_width}: jax.nn's negative mean dims the signal",
            at_most(-0.2, source="a mean of −.018σ shifts y by −.3 of its deviation at this width"),
            over_seeds(looks["deep jax.nn"][:, -1] / sizes.depth),
            unit="ln of E[h²], a layer",
        ),
        Claim(
            f"{sizes.depth} ReLU layers of {sizes.deep_width}: varscale keeps the signal",
            # −β/2 = −5/2n a layer = −.002, and √(5/n·L)/L = ± .02 a draw.
            near(0.0, 0.04, source="the law; Hanin and Nica 2018"),
            over_seeds(looks["deep varscale"][:, -1] / sizes.depth),
            unit="ln of E[h²], a layer",
        ),
    ]


def training_claims(losses: np.ndarray) -> list[Claim]:
    """Of the short training run; losses of shape (seeds, sides, steps)."""
    early = losses[:, :, 10:25].mean(axis=2)
    return [
        Claim(
            "the same net, data and rate: started by varscale it learns sooner",
            at_least(0.1, source="a signal that is not dimmed has gradients that are not"),
            over_seeds(early[:, 0] - early[:, 1]),
            unit="loss of steps 10 to 25, jax.nn's less varscale's, nats",
        ),
        every(
            "both come to learn in the end",
            [
                (
                    side,
                    at_most(math.log(10) / 2, source="half of what guessing gives"),
                    over_seeds(losses[:, n, -10:].mean(axis=1)),
                )
                for n, side in enumerate(SIDES)
            ],
            unit="loss of the last ten steps, nats",
        ),
    ]


def weight_table(drawn: dict[str, np.ndarray], dtypes) -> Table:
    """All that was counted."""
    rows = []
    for dtype in dtypes:
        for law, side in LAWS:
            distinct, mean, largest, second = drawn[f"{law} {side} {dtype}"].mean(axis=0)
            rows.append((dtype, law, side, f"{distinct:.0f}", f"{mean:+.4f}", f"{largest:.2f}", f"{second:.3f}"))
    return Table(
        "Weights in low precision",
        ("dtype", "law", "library", "values", "mean/σ", "max/σ", "E[w²]"),
        rows,
        "E[w²] over the claim; in float8 jax.nn gives zeros or infinities.",
    )


def layer_figure(looks: dict[str, np.ndarray], losses: np.ndarray, sizes: Sizes) -> Figure:
    """Drift by layer, and the training run."""
    picture, (axes,) = plots.figure(1, 2, height=3.5)
    for number, (side, colour) in enumerate(zip(SIDES, (plots.COLOURS[1], plots.COLOURS[0]), strict=True)):
        plots.band(axes[0], np.arange(1, sizes.depth + 1), np.exp(looks[f"deep {side}"]), label=side, colour=colour, log=True)
        plots.band(axes[1], np.arange(sizes.steps), losses[:, number], label=side, colour=colour)
    plots.reference(axes[0], 1.0, "the law: 1 at every layer")
    plots.by_layer(axes[0])
    axes[0].set_ylabel("E[h²] over the input's")
    axes[0].set_title("he_normal in bfloat16, ReLU")
    axes[1].set(xlabel="step", ylabel="training loss, nats", ylim=(0, None))
    axes[1].set_title(f"Training {sizes.trained_depth} such layers on digits")
    plots.legend(picture, axes[0], columns=3)
    return Figure(
        "drift",
        f"Left: second moment through {sizes.depth} ReLU layers of {sizes.deep_width} units. Right: a short training run from"
        " each start.",
        picture,
    )


def weight_figure(key, sizes: Sizes) -> Figure:
    """Histograms of what is drawn in bfloat16."""
    picture, (axes,) = plots.figure(1, 2, height=2.8, sharey=True)
    edges = np.linspace(-5, 5, 501)
    for panel, side in zip(axes, SIDES, strict=True):
        w = np.asarray(LAWS["normal", side](key, sizes.draws, jnp.bfloat16).astype(jnp.float32)) / math.sqrt(2 / sizes.draws[0])
        counts, _ = np.histogram(w, edges)
        panel.stairs(np.maximum(counts / w.size, 1e-7), edges, fill=True, color=plots.COLOURS[0 if side == "varscale" else 1])
        panel.set_yscale("log")
        panel.set_ylim(1e-6, 1)
        panel.set_title(f"{side}: normal in bfloat16")
        panel.set_xlabel("weight, in standard deviations")
    axes[0].set_ylabel("share of the weights in a bin")
    return Figure(
        "weights",
        "What a normal initializer draws in bfloat16, in bins of a fiftieth of the standard deviation: jax.nn's 128 values"
        " without tails, and varscale's.",
        picture,
    )
