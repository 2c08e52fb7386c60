"""Too small a scale vanishes, too large a one saturates, and Xavier's and He's keep the signal.

The nets of the lectures on initialization (CS231n, lecture 6; EECS 498, lecture 10), beside the values that these published.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import varscale as vs
from experiments.lab import plots
from experiments.lab.claims import Claim, Expected, Measured, at_least, at_most, every, near, over_seeds
from experiments.lab.experiment import Figure, Introduction, Result, Run, Table
from experiments.lab.published import CS231N, LIMIT, NARROW, WIDE, Shape, agreement
from experiments.nets.activation_laws import SIZES, Sizes, law_claims, law_figures, law_parts
from experiments.nets.stacks import Stack, activations, rescale
from varscale import gaussian
from varscale.measuring.statistics import LayerStatistics, measure

REQUIRES = ("matplotlib",)
ORDER = 1

BINS = 61  # odd: the value 0 is in the middle of a bin
ACTIVATIONS = (jnp.tanh, jax.nn.relu)

# ReLU of N(0, 1): mean 1/√2π, second moment 1/2. Kaiming's weights restore the second moment before each layer.
KAIMING_MEAN, KAIMING_STD = 1 / math.sqrt(math.pi), math.sqrt(1 - 1 / math.pi)
# ln of a draw's second moment is N(−β/2, β) with β = 5·6/4096 after six layers (Hanin and Nica 2018): .4 % too little on the
# whole, and ±4.3 % a draw in the standard deviation, ±5.3 % for the mean of eight with its 99 % interval. Xavier is at .18.
KAIMING_TOLERANCE = 0.1


@functools.partial(jax.jit, static_argnames=("width", "depth", "batch"))
def layer_statistics(key, uniform, stds, relus, *, width: int, depth: int, batch: int) -> LayerStatistics:
    """Draw one net and its inputs, and measure every layer under every setting.

    The weights are drawn once, with unit variance, and serve all settings: what differs is the scale alone. Standard deviation,
    activation and law are arguments, so there is one compiled program a shape.

    Args:
      key: of weights and inputs.
      uniform: whether the weights are uniform (of the same variance) in place of normal.
      stds: the weights' standard deviation, shape (settings,).
      relus: 1 for ReLU, 0 for tanh; shape (settings,).
      width: of every layer, the input's included.
      depth: number of layers.
      batch: number of inputs, standard normal.

    Returns:
      The statistics, each of shape (settings, depth).
    """
    key_inputs, key_weights = jax.random.split(key)
    x = jax.random.normal(key_inputs, (batch, width))

    def draw(init):
        return lambda: Stack((width,) * depth, jnp.tanh, kernel_init=init).init(key_weights, x)["params"]

    # The same key under both laws gives coupled weights (the same quantiles), so the two can be compared pair by pair.
    unit = jax.lax.cond(uniform, draw(vs.symmetric_uniform(math.sqrt(3))), draw(vs.normal(1.0)))

    def one(setting):
        std, relu = setting
        stack = Stack((width,) * depth, lambda y: jax.lax.switch(relu, ACTIVATIONS, y))
        layers = activations(stack, {"params": rescale(unit, std)}, x)
        low, high = jnp.where(relu == 1, 0.0, -1.0), jnp.where(relu == 1, 3.0, 1.0)
        measured = [measure(layer, low=low, high=high, bins=BINS) for layer in layers]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *measured)

    return jax.lax.map(one, (stds, relus))


def shape_part(run: Run, shape: Shape, seeds: int, *, uniform: bool = False) -> dict[str, np.ndarray]:
    """Statistics of shape (seeds, settings, layers), and the first seed's histograms, (settings, layers, bins)."""
    law = "uniform" if uniform else "normal"

    def compute():
        stds = jnp.asarray([net.std for net in shape.nets])
        relus = jnp.asarray([int(net.relu) for net in shape.nets])
        # Of the shape and the number alone, so that the two laws are paired by seed however many each is given.
        keys = [run.key(f"{shape.name} {number}") for number in range(seeds)]
        drawn = [
            jax.device_get(layer_statistics(key, uniform, stds, relus, width=shape.width, depth=shape.depth, batch=shape.batch))
            for key in run.track(keys, f"{shape.depth} layers of {shape.width}, {law} weights")
        ]
        fields = ("mean", "second_moment", "variance", "saturated", "zeros")
        return {name: np.stack([getattr(d, name) for d in drawn]) for name in fields} | {"histogram": drawn[0].histogram}

    return run.part(f"{shape.name}-{law}", compute)


def published_claims(shape: Shape, part: dict[str, np.ndarray]) -> list[Claim]:
    """One claim a net and a quantity: every published layer is a draw like ours."""
    claims = []
    for position, net in enumerate(shape.nets):
        limit = at_most(LIMIT, source=f"{net.source}, and the spread of single draws")
        for quantity, published, draws in (
            ("std", net.published_std, np.sqrt(part["variance"])),
            ("mean", net.published_mean, part["mean"]),
        ):
            if published:
                cases = [
                    (
                        f"layer {layer + 1}, published {value:.6f}",
                        limit,
                        agreement(value, draws[:, position, layer], net.rounding),
                    )
                    for layer, value in enumerate(published)
                ]
                sentence = (
                    f"{shape.depth} layers of {shape.width}, {net.name}: the published {quantity} of every layer is a draw"
                    " like ours"
                )
                claims.append(every(sentence, cases, unit="distance in standard deviations of one draw"))
    return claims


def scale_claims(narrow: dict[str, np.ndarray], wide: dict[str, np.ndarray]) -> list[Claim]:
    """What the nets show: too small vanishes, too large saturates, ReLU needs twice the variance."""
    # tanh'(y) = 1 − tanh(y)²: the mean local gradient follows from the second moment.
    local = 1 - narrow["second_moment"]
    shrink = np.log(narrow["variance"][:, 0, 6] / narrow["variance"][:, 0, 2]) / 8
    std = np.sqrt(wide["variance"])
    return [
        Claim(
            "tanh, std 0.01: the signal vanishes, by ln(0.01·√500) a layer once it is small",
            # At std .0106 the cubic term of tanh still takes .0106² a layer of the standard deviation: below 2e-4.
            near(math.log(0.01 * math.sqrt(500)), 0.01, source="the law, E[y²] = n·Var[w]·E[x²]"),
            over_seeds(shrink),
            unit="ln of the standard deviation, a layer",
        ),
        every(
            "tanh, std 1.0: saturates, P(|tanh y| > .99) at every layer",
            _each_layer(
                narrow["saturated"][:, 1],
                [near(value, 0.005, source=CS231N + "; Gaussian y") for value in _saturated_shares(10)],
            ),
            unit="share of units",
        ),
        every(
            "tanh, std 1.0: the mean local gradient 1 − E[h²] is small at every layer",
            _each_layer(local[:, 1], [at_most(0.05, source=CS231N)] * local.shape[2]),
            unit="mean of tanh'",
        ),
        Claim(
            "tanh, Xavier: hardly any unit saturates in the first layer, P(|tanh z| > .99)",
            near(float(2 * stats.norm.sf(math.atanh(0.99))), 0.001, source=CS231N + "; Gaussian y"),
            over_seeds(narrow["saturated"][:, 2, 0]),
            unit="share of units",
        ),
        every(
            "tanh, Xavier: the mean local gradient stays large at every layer",
            _each_layer(local[:, 2], [at_least(0.5, source=CS231N)] * local.shape[2]),
            unit="mean of tanh'",
        ),
        every(
            "ReLU, Xavier, 4096 wide: std is √(1/2 − 1/2π)·2^(−(l−1)/2) at layer l, half the variance lost a layer",
            _each_layer(
                std[:, 3] / (KAIMING_STD * 2.0 ** (-(1 + np.arange(6)) / 2)),
                [near(1.0, KAIMING_TOLERANCE, source="He et al. 2015, section 2.2")] * 6,
            ),
            unit="std over the expected one",
        ),
        every(
            f"ReLU, Kaiming, 4096 wide: std stays at √(1 − 1/π) = {KAIMING_STD:.4f} at every layer",
            _each_layer(std[:, 4] / KAIMING_STD, [near(1.0, KAIMING_TOLERANCE, source="He et al. 2015, section 2.2")] * 6),
            unit="std over the expected one",
        ),
        every(
            f"ReLU, Kaiming, 4096 wide: the mean stays at 1/√π = {KAIMING_MEAN:.4f} at every layer",
            _each_layer(
                wide["mean"][:, 4] / KAIMING_MEAN, [near(1.0, KAIMING_TOLERANCE, source="He et al. 2015, section 2.2")] * 6
            ),
            unit="mean over the expected one",
        ),
    ]


def _saturated_shares(depth: int) -> list[float]:
    """P(|tanh y| > .99) by layer for y ~ N(0, 500 q), q the second moment of the layer before."""
    shares, q = [], 1.0
    for _ in range(depth):
        shares.append(float(2 * stats.norm.sf(math.atanh(0.99) / math.sqrt(500 * q))))
        q = gaussian.second_moment(jnp.tanh, variance=500 * q)
    return shares


def _each_layer(draws: np.ndarray, expected: list[Expected]) -> list[tuple[str, Expected, Measured]]:
    """Cases of `every`: draws of shape (seeds, layers) against one expectation a layer."""
    return [(f"layer {layer + 1}", one, over_seeds(draws[:, layer])) for layer, one in enumerate(expected)]


def run(run: Run, shapes: Sequence[Shape] = (NARROW, WIDE), sizes: Sizes = SIZES) -> Result:
    """Draw the published nets, compare, and show what the scale does."""
    small, large = shapes
    narrow = shape_part(run, small, run.seeds(quick=30, full=60))
    uniform = shape_part(run, small, run.seeds(quick=12, full=60), uniform=True)
    wide = shape_part(run, large, run.seeds(quick=12, full=20))
    laws = law_parts(run, sizes)
    claims = [
        *published_claims(small, narrow),
        *published_claims(large, wide),
        *scale_claims(narrow, wide),
        *uniform_claims(narrow, uniform),
        *law_claims(laws, sizes),
    ]
    tables = [comparison(small, narrow), comparison(large, wide)]
    figures = [histograms(small, narrow), histograms(large, wide), curves(small, narrow, uniform), *law_figures(laws, sizes)]
    data = {
        shape.name: {
            net.name: {"mean": part["mean"][:, number].mean(0), "std": np.sqrt(part["variance"][:, number]).mean(0)}
            for number, net in enumerate(shape.nets)
        }
        for shape, part in ((small, narrow), (large, wide))
    }
    introduction = Introduction(
        data="none: the nets are only looked at, never trained",
        net=f"{small.depth} layers of {small.width} units and {large.depth} of {large.width}, tanh and ReLU, without biases;"
        " small sigmoid and linear nets for the law itself",
        inputs=f"standard normal, {small.batch} and {large.batch} samples a net",
        notes=("CS231n 2017, lecture 6", "EECS 498, lecture 10", "Glorot and Bengio 2010", "He et al. 2015"),
    )
    return Result(introduction, claims, tables, figures, data=data)


def uniform_claims(normal: dict[str, np.ndarray], uniform: dict[str, np.ndarray]) -> list[Claim]:
    """Only the variance of the weights counts, not their law (draws are paired by seed)."""
    labels = ("std 0.01", "std 1.0", "Xavier")
    paired = len(uniform["variance"])
    ratio = 0.5 * np.log(uniform["variance"][:, :3] / normal["variance"][:paired, :3])
    cases = [
        (
            f"{label}, layer {layer + 1}",
            near(0.0, 0.02, source="the law knows the variance alone"),
            over_seeds(ratio[:, number, layer]),
        )
        for number, label in enumerate(labels)
        for layer in range(ratio.shape[2])
    ]
    share = uniform["saturated"][:, :3] - normal["saturated"][:paired, :3]
    shares = [
        (
            f"{label}, layer {layer + 1}",
            near(0.0, 0.01, source="the law knows the variance alone"),
            over_seeds(share[:, number, layer]),
        )
        for number, label in enumerate(labels)
        for layer in range(ratio.shape[2])
    ]
    return [
        every(
            "tanh: uniform weights of the same variance give the same std at every layer",
            cases,
            unit="ln of the ratio of standard deviations",
        ),
        every(
            "tanh: uniform weights of the same variance saturate the same share of units at every layer",
            shares,
            unit="difference of shares",
        ),
    ]


def comparison(shape: Shape, part: dict[str, np.ndarray]) -> Table:
    """Mean and std by layer beside the published std."""
    rows = []
    std = np.sqrt(part["variance"])
    for number, net in enumerate(shape.nets):
        for layer in range(shape.depth):
            draws = std[:, number, layer]
            row = [
                net.name if layer == 0 else "",
                layer + 1,
                f"{part['mean'][:, number, layer].mean():.6f}",
                f"{draws.mean():.6f}",
            ]
            published = net.published_std[layer] if layer < len(net.published_std) else None
            if published is None:
                rows.append([*row, "", ""])
            else:
                distance = agreement(published, draws, net.rounding)
                verdict = "agrees" if distance.high <= LIMIT else "open" if distance.low <= LIMIT else "NO"
                digits = 6 if net.rounding < 1e-5 else 3
                rows.append([*row, f"{published:.{digits}f}", verdict])
    return Table(
        f"{shape.depth} layers of {shape.width}, batch {shape.batch}: mean and standard deviation by layer",
        ("net", "layer", "mean", "std", "published", ""),
        rows,
        f"Means over {len(std)} draws. A published value is one draw; it agrees where it lies within {LIMIT:.0f} standard"
        " deviations of one; it is open where too few draws were made to tell.",
    )


def histograms(shape: Shape, part: dict[str, np.ndarray]) -> Figure:
    """What the lecture shows: a histogram a layer, a column a net."""
    picture, axes = plots.figure(1, len(shape.nets), height=0.9 + 0.26 * shape.depth + 0.5)
    for number, (net, panel) in enumerate(zip(shape.nets, axes[0], strict=True)):
        edges = np.linspace(0.0, 3.0, BINS + 1) if net.relu else np.linspace(-1.0, 1.0, BINS + 1)
        labels = [str(layer + 1) for layer in range(shape.depth)] if number == 0 else [""] * shape.depth
        counts = part["histogram"][number]
        if net.relu:  # half of all entries are zero: that spike is cut off, or nothing else would be seen
            counts = np.minimum(counts, 1.3 * np.maximum(counts[:, 1:].max(axis=1, keepdims=True), 1))
        plots.ridges(panel, edges, counts, labels)
        panel.set_title(net.name, fontsize=9.5)
        panel.set_xlabel("activation")
    axes[0, 0].set_ylabel("layer")
    return Figure(
        f"histograms-{shape.name}",
        f"Histograms of the activations of {shape.depth} layers of {shape.width} units, the first layer on top."
        " ReLU's zeros, half of all, are cut off.",
        picture,
    )


def curves(shape: Shape, normal: dict[str, np.ndarray], uniform: dict[str, np.ndarray]) -> Figure:
    """Mean, standard deviation, saturation and local gradient by layer."""
    picture, axes = plots.figure(2, 2, height=6.2)
    layers = np.arange(1, shape.depth + 1)
    published, drawn = {"marker": "o", "markersize": 5, "markerfacecolor": "white"}, {"marker": "x", "markersize": 6}
    turns = ((0, 3), (1, 3), (2, 3), (0, 2), (1, 2))  # the means of the first three are all 0
    for number, (net, colour, turn) in enumerate(zip(shape.nets, plots.COLOURS, turns, strict=False)):
        std = np.sqrt(normal["variance"][:, number])
        plots.band(axes[0, 0], layers, normal["mean"][:, number], label=net.name, colour=colour, turn=turn)
        plots.band(axes[0, 1], layers, std, label=net.name, colour=colour, log=True)
        axes[0, 1].plot(layers, net.published_std, color=colour, linestyle="", **published)
        if not net.relu:
            local = [1 - part["second_moment"][:, number] for part in (normal, uniform)]
            saturated = [part["saturated"][:, number] for part in (normal, uniform)]
            for panel, (of_normal, of_uniform) in zip(axes[1], (saturated, local), strict=True):
                plots.band(panel, layers, of_normal, label=net.name, colour=colour, turn=turn)
                panel.plot(layers, of_uniform.mean(axis=0), color=plots.INK, linestyle="", **drawn)
    axes[0, 0].plot([], [], color=plots.INK, linestyle="", label="published", **published)
    axes[0, 0].plot([], [], color=plots.INK, linestyle="", label="uniform weights", **drawn)
    axes[0, 0].set(title="Mean", ylabel="mean of the activations")
    axes[0, 1].set(title="Standard deviation", ylabel="std of the activations", ylim=(1e-7, 3))
    axes[1, 0].set(title="Saturation (tanh only)", ylabel="share with |tanh| > .99")
    axes[1, 1].set(title="Local gradient (tanh only)", ylabel="mean of 1 − tanh²")
    plots.legend(picture, axes[0, 0], columns=4)
    for panel in axes.flat:
        plots.by_layer(panel)
    for panel in axes[1]:
        panel.set_ylim(-0.03, 1.05)
    return Figure(
        "curves",
        f"{shape.depth} layers of {shape.width}: mean, standard deviation, saturation and local gradient by layer."
        " Lines: normal weights, with 10 to 90 % of the draws shaded. Circles: the published values of one draw. Crosses:"
        " uniform weights of the same variance. Discs shrink from net to net, so that equal values show.",
        picture,
    )
