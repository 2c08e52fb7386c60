"""The second half of `activation-statistics`: the law itself, on nets small enough to draw by the hundred.

A sigmoid net with too small weights is a linear map; n·Var[w] compounds through a deep linear net; and Xavier's point: which
variance keeps the output flat in fan-in, which the gradient flat in fan-out, and that no choice does both where they differ.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import special

import varscale as vs
from experiments.lab import plots
from experiments.lab.claims import Claim, Refuted, at_least, at_most, every, near, over_seeds
from experiments.lab.experiment import Figure, Run
from experiments.nets.stacks import Stack, rescale

GLOROT = "Glorot and Bengio 2010"
LAW = "the law, E[y²] = n·Var[w]·E[x²]"

SIGMOID_SCALES = np.logspace(-2, 1.5, 15)  # of the weights' standard deviation, in units of Xavier's 1/√n
GAINS = (0.5, 1.0, 2.0)  # n·Var[w] of the deep linear net


@dataclass(frozen=True)
class Sizes:
    """How large the small nets are."""

    sigmoid_width: int = 32
    sigmoid_depth: int = 3
    sigmoid_samples: int = 1000
    linear_width: int = 64
    linear_depth: int = 16
    fans: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    fixed: int = 256  # the other fan in a sweep


SIZES = Sizes()


@functools.partial(jax.jit, static_argnames=("sizes",))
def sigmoid_linearity(key, factors, *, sizes: Sizes) -> Float[Array, "laws factors"]:
    """Share of a sigmoid net's output variance that the best linear map of its input explains, for both laws and all scales.

    Call it with x64 enabled: at small scales the outputs differ from their mean in the seventh digit.
    """
    key_inputs, key_weights = jax.random.split(key)
    width = sizes.sigmoid_width
    x = jax.random.normal(key_inputs, (sizes.sigmoid_samples, width), jnp.float64)
    design = jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1)
    basis, _ = jnp.linalg.qr(design)

    def explained(unit, factor):
        y: Any = Stack((width,) * sizes.sigmoid_depth, jax.nn.sigmoid).apply({"params": rescale(unit, factor)}, x)
        centred = y - jnp.mean(y, axis=0, keepdims=True)
        return jnp.sum(jnp.square(basis.T @ centred)) / jnp.sum(jnp.square(centred))

    def one_law(init):
        unit = Stack((width,) * sizes.sigmoid_depth, jax.nn.sigmoid, kernel_init=init).init(key_weights, x)["params"]
        return jax.vmap(lambda factor: explained(unit, factor))(factors / math.sqrt(width))

    return jnp.stack([one_law(vs.normal(1.0)), one_law(vs.symmetric_uniform(math.sqrt(3)))])


@functools.partial(jax.jit, static_argnames=("sizes",))
def deep_linear(keys, gains, *, sizes: Sizes) -> Float[Array, "laws seeds gains depth"]:
    """Mean square of every layer of a deep linear net, over that of its input, for both laws."""
    width, depth = sizes.linear_width, sizes.linear_depth

    def one(init, key, gain):
        key_input, key_weights = jax.random.split(key)
        x = jax.random.normal(key_input, (width,))

        def layer(y, key):
            y = y @ (jnp.sqrt(gain / width) * init(key, (width, width)))
            return y, jnp.mean(jnp.square(y))

        return jax.lax.scan(layer, x, jax.random.split(key_weights, depth))[1] / jnp.mean(jnp.square(x))

    def one_law(init):
        return jax.vmap(lambda key: jax.vmap(lambda gain: one(init, key, gain))(gains))(keys)

    return jnp.stack([one_law(vs.normal(1.0)), one_law(vs.symmetric_uniform(math.sqrt(3)))])


@functools.partial(jax.jit, static_argnames=("width", "batch"))
def one_layer(key, fan_in, fan_out, *, width: int, batch: int = 32) -> Float[Array, "pairs 2"]:
    """Output variance and input gradient's variance of linear layers with unit weights, unit inputs and unit gradients.

    One kernel of the largest size serves all fans, and so does one program: inputs and gradients beyond a fan are zero, which
    is the same as weights that are not there.

    Args:
      key: of weights, inputs and gradients.
      fan_in: number of inputs of each layer, shape (pairs,).
      fan_out: number of outputs, shape (pairs,).
      width: the largest fan.
      batch: number of inputs.
    """
    key_inputs, key_weights, key_gradients = jax.random.split(key, 3)
    x, g = jax.random.normal(key_inputs, (batch, width)), jax.random.normal(key_gradients, (batch, width))
    dense = Stack((width,), lambda y: y, kernel_init=vs.normal(1.0))
    variables = {"params": dense.init(key_weights, x)["params"]}

    def output(x) -> Any:
        return dense.apply(variables, x)

    def one(fan_in, fan_out):
        into, out = (jnp.arange(width)[None] < fan for fan in (fan_in, fan_out))
        y, backward = jax.vjp(output, jnp.where(into, x, 0.0))
        (gradient,) = backward(jnp.where(out, g, 0.0))
        return jnp.stack([jnp.var(y, where=out), jnp.var(gradient, where=into)])

    return jax.vmap(one)(fan_in, fan_out)


def law_parts(run: Run, sizes: Sizes) -> dict[str, dict[str, np.ndarray]]:
    """Compute all three."""

    def sigmoid():
        with jax.enable_x64(True):
            keys = run.keys("sigmoid", run.seeds(quick=40, full=120))
            factors = jnp.asarray(SIGMOID_SCALES)
            drawn = [sigmoid_linearity(key, factors, sizes=sizes) for key in run.track(keys, "sigmoid nets", total=len(keys))]
            return {"explained": np.stack(drawn)}

    def linear():
        keys = run.keys("linear", run.seeds(quick=1000, full=3000))
        return {"square": deep_linear(keys, jnp.asarray(GAINS), sizes=sizes)}

    def fans():
        keys = run.keys("fans", run.seeds(quick=20, full=100))
        swept, fixed = jnp.asarray(sizes.fans), jnp.full(len(sizes.fans), sizes.fixed)
        into, out = jnp.concatenate([swept, fixed]), jnp.concatenate([fixed, swept])
        draw = functools.partial(one_layer, fan_in=into, fan_out=out, width=max(*sizes.fans, sizes.fixed))
        drawn = np.stack([draw(key) for key in run.track(keys, "fan-in and fan-out", total=len(keys))])
        return {"fan_in": drawn[:, : len(sizes.fans)], "fan_out": drawn[:, len(sizes.fans) :]}

    return {name: run.part(name, compute) for name, compute in (("sigmoid", sigmoid), ("linear", linear), ("fans", fans))}


def law_claims(parts: dict[str, dict[str, np.ndarray]], sizes: Sizes) -> list[Claim]:
    """What the three show."""
    explained = parts["sigmoid"]["explained"]  # (seeds, laws, scales)
    small, large = 0, len(SIGMOID_SCALES) - 1
    log_square = np.log(parts["linear"]["square"])  # (laws, seeds, gains, depth)
    square = parts["linear"]["square"]
    growth = [gain**sizes.linear_depth for gain in GAINS]
    fan_in, fan_out = parts["fans"]["fan_in"], parts["fans"]["fan_out"]  # (seeds, fans, [output, gradient])
    fans = np.asarray(sizes.fans)
    return [
        every(
            "a sigmoid net with weights a hundredth of Xavier's is a linear map",
            # The cubic term of the sigmoid is y³/48 beside y/4, so the nonlinear share is of the order (y²/12)², y² = 1e-4.
            [
                (law, at_least(0.999, source="Taylor series of the sigmoid"), over_seeds(explained[:, number, small]))
                for number, law in enumerate(("normal", "uniform"))
            ],
            unit="share of variance that a linear map explains",
        ),
        every(
            "a sigmoid net with weights thirty times Xavier's is not",
            [
                (law, at_most(0.7, source="the sigmoid becomes a step"), over_seeds(explained[:, number, large]))
                for number, law in enumerate(("normal", "uniform"))
            ],
            unit="share of variance that a linear map explains",
        ),
        every(
            "normal and uniform weights of the same variance make a sigmoid net equally linear at every scale",
            [
                (
                    f"scale {scale:.2g}",
                    near(0.0, 0.02, source=LAW),
                    over_seeds(explained[:, 0, number] - explained[:, 1, number]),
                )
                for number, scale in enumerate(SIGMOID_SCALES)
            ],
            unit="difference of shares",
        ),
        every(
            f"a linear net of {sizes.linear_depth} layers: E‖y‖²/‖x‖² is (n·Var[w])^L for n·Var[w] below, at and above 1",
            [
                (f"n·Var[w] = {gain}, {law}", near(1.0, 0.15, source=LAW), over_seeds(square[kind, :, number, -1] / whole))
                for number, (gain, whole) in enumerate(zip(GAINS, growth, strict=True))
                for kind, law in enumerate(("normal", "uniform"))
            ],
            unit="E‖y‖²/‖x‖² over (n·Var[w])^L",
        ),
        Claim(
            "n·Var[w] = 1 keeps the mean, yet a typical draw shrinks",
            near(sizes.linear_depth * log_chi_square(sizes.linear_width), 0.1, source="‖y‖²/‖x‖² is χ²ₙ/n a layer"),
            over_seeds(log_square[0, :, 1, -1]),
            unit="mean of ln ‖y‖²/‖x‖²",
            refutes=Refuted(
                "with n·Var[w] = 1 the signal neither grows nor shrinks",
                "True of the mean over draws. The logarithm of one draw has the mean −L/n and the variance 2L/n: a single deep"
                " and narrow net does shrink, because the mean is carried by a few large draws.",
                by="the usual derivation, as in CS231n and Glorot and Bengio 2010",
            ),
        ),
        Claim(
            "Var[w] = 1/fan_in keeps the output's variance flat in fan-in",
            near(0.0, 0.02, source=GLOROT + ", eq. 10"),
            over_seeds(_slopes(fans, fan_in[:, :, 0] / fans)),
            unit="slope of ln Var[y] on ln fan_in",
        ),
        Claim(
            "Var[w] = 1/fan_out keeps the gradient's variance flat in fan-out",
            near(0.0, 0.02, source=GLOROT + ", eq. 11"),
            over_seeds(_slopes(fans, fan_out[:, :, 1] / fans)),
            unit="slope of ln Var[g] on ln fan_out",
        ),
        Claim(
            "under a fixed variance the output's variance grows in proportion to fan-in",
            near(1.0, 0.02, source=LAW),
            over_seeds(_slopes(fans, fan_in[:, :, 0])),
            unit="slope of ln Var[y] on ln fan_in",
        ),
        every(
            f"Xavier's 2/(fan_in + fan_out) is a compromise: forward it gives 2·fan_in/(fan_in + {sizes.fixed})",
            [
                (f"fan_in {n}", near(1.0, 0.1, source=GLOROT + ", eq. 12"), over_seeds(fan_in[:, number, 0] / n))
                for number, n in enumerate(sizes.fans)
            ],
            unit="Var[y] over the expected one",
        ),
    ]


def law_figures(parts: dict[str, dict[str, np.ndarray]], sizes: Sizes) -> list[Figure]:
    """Their pictures."""
    linear, (axes,) = plots.figure(1, 2, height=3.3)
    explained = parts["sigmoid"]["explained"]
    scales = slice(None, None, 2)  # fewer points than were drawn, so that discs of both laws can be told apart
    for number, law in enumerate(("normal", "uniform")):
        draws, colour = explained[:, number, scales], plots.COLOURS[number]
        plots.band(axes[0], SIGMOID_SCALES[scales], draws, label=f"{law} weights", colour=colour, turn=(number, 2))
    axes[0].set(xscale="log", ylim=(0, 1.05), xlabel="weights' std, in units of 1/√n", ylabel="share of variance explained")
    axes[0].set_title("Sigmoid: small weights, linear net")
    axes[0].legend(loc="lower left")  # the curves start at the top
    layers = np.arange(1, sizes.linear_depth + 1)
    # Colours of their own, in the order of the gains: those of the left panel mean something else.
    for gain, draws, colour in zip(
        GAINS, np.moveaxis(parts["linear"]["square"][0], 1, 0), plots.shades(len(GAINS)), strict=True
    ):
        plots.band(axes[1], layers, draws, label=f"n·Var[w] = {gain}", colour=colour, log=True)
        law = {"label": "(n·Var[w])$^l$"} if gain == GAINS[-1] else {}
        axes[1].plot(layers, gain**layers, color=plots.INK, linewidth=1, linestyle=plots.DASHED, **law)
    plots.by_layer(axes[1], "layer l")
    axes[1].set(ylabel="E[y²] over E[x²]", title="n·Var[w] compounds")
    axes[1].set_ylim(1e-6, 1e11)  # the legend stands above the curves
    axes[1].legend(loc="upper left")

    xavier, (axes,) = plots.figure(1, 2, height=3.5)
    fans = np.asarray(sizes.fans)
    sides = (
        (parts["fans"]["fan_in"][:, :, 0], "fan_in", "output's variance"),
        (parts["fans"]["fan_out"][:, :, 1], "fan_out", "gradient's variance"),
    )
    for panel, (draws, fan, what) in zip(axes, sides, strict=True):
        other = "fan_out" if fan == "fan_in" else "fan_in"
        inverse = {fan: 1 / fans, other: np.full(len(fans), 1 / sizes.fixed)}
        laws = (
            ("1/fan_in", inverse["fan_in"]),
            ("1/fan_out", inverse["fan_out"]),
            ("2/(fan_in + fan_out)", 2 / (fans + sizes.fixed)),
            ("0.01", np.full(len(fans), 0.01)),
        )
        for (law, variance), colour in zip(laws, plots.COLOURS, strict=False):
            plots.band(panel, fans, draws * variance, label=law, colour=colour, log=True, turn=(0, 1))
        panel.set(xscale="log", xlabel=f"{fan} ({other} = {sizes.fixed})", ylabel=what)
        panel.set_xticks(fans, [str(n) for n in fans], minor=False)
        panel.minorticks_off()
    axes[0].set_title("Forward: 1/fan_in is flat")
    axes[1].set_title("Backward: 1/fan_out is flat")
    plots.legend(xavier, axes[0], columns=4, title="Var[w]")
    return [
        Figure(
            "linearity-and-depth",
            "Left: how much of a sigmoid net a linear map explains, by the scale of its weights. Right: n·Var[w] below, at and"
            " above 1 through a deep linear net; the shade is the 10 to 90 % range of draws.",
            linear,
        ),
        Figure(
            "xavier-point",
            "Xavier's point: which variance of the weights keeps the output flat in fan-in, and the gradient flat in fan-out.",
            xavier,
        ),
    ]


def log_chi_square(n: int) -> float:
    """E[ln(χ²ₙ/n)], about −1/n: what the logarithm of a squared norm loses in one layer of n units that keeps its mean."""
    return float(special.digamma(n / 2)) - math.log(n / 2)


def _slopes(fans: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Least-squares slope of ln draws on ln fans, one a seed."""
    x = np.log(fans)
    return np.log(draws) @ (x - x.mean()) / np.sum((x - x.mean()) ** 2)
