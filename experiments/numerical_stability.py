"""Products through depth vanish or explode: of sigmoid gradients, of Gaussian matrices, of a net's Jacobians.

The examples of Dive into Deep Learning, section 5.4 (numerical stability and initialization), with the slopes of theory.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

import varscale as vs
from experiments.lab import plots
from experiments.lab.claims import Claim, Refuted, at_least, at_most, every, known, near, over_seeds
from experiments.lab.experiment import Figure, Introduction, Result, Run, Table
from experiments.nets.depth_products import (
    ACTIVATIONS,
    SCALES,
    SIZES,
    Sizes,
    gradient_norms,
    matrix_products,
    predicted_slopes,
    sigmoid_products,
    vector_products,
)

REQUIRES = ("matplotlib",)
ORDER = 2

D2L = "Dive into Deep Learning, section 5.4"
STEPS = 100  # matrices in the product
SETTLED = 20  # the slope is read after this many, when the product has aligned with its leading direction

# Lyapunov exponents of products of Gaussian matrices: ½(ψ(n/2) + ln 2) for unit entries (Newman 1986). The mean of a slope over
# 80 steps scatters by ½√(ψ'(2)/80) = .045 a seed at width 4, so 4000 seeds give an interval of ± .002.
LYAPUNOV = {n: 0.5 * (float(special.digamma(n / 2)) + math.log(2)) for n in (4, 256)}
NARROW_TOLERANCE = 0.005
# At width 256 it is .0050 a seed; 60 seeds give ± .0018. The claim has to exclude −.135.
WIDE_TOLERANCE = 0.005

# The logarithm of a ReLU net's gradient norm has the mean −5/4n and the variance 5/4n a layer (Hanin and Nica 2018): at width
# 256 and over 15 layers, a slope ± .018 a seed and .005 too low. The slopes lie .35 (a factor 2 in variance) apart and more.
GRADIENT_TOLERANCE = 0.05


def run(run: Run, sizes: Sizes = SIZES) -> Result:
    """Multiply, and compare the slopes."""
    settings = [(activation, scale) for activation in ACTIVATIONS for scale in SCALES]

    def matrices():
        keys = run.keys("matrices", run.seeds(quick=4000, full=10000))
        wide = run.keys("wide matrices", run.seeds(quick=60, full=200))
        scaled = vs.variance_scaling(1.0, "fan_in", "normal")
        return {
            "unit": matrix_products(keys, init=vs.normal(1.0), width=4, steps=STEPS),
            "scaled": matrix_products(keys, init=scaled, width=4, steps=STEPS),
            "wide": vector_products(wide, init=scaled, width=256, steps=STEPS),
        }

    def sigmoid():
        return {"path": sigmoid_products(run.keys("sigmoid path", run.seeds(quick=2000, full=4000)))}

    stds = jnp.asarray([sizes.std(scale) for _, scale in settings])
    places = jnp.asarray([list(ACTIVATIONS).index(activation) for activation, _ in settings])

    def gradients():
        keys = run.keys("gradients", run.seeds(quick=16, full=60))
        drawn = [gradient_norms(key, stds, places, sizes=sizes) for key in run.track(keys, "gradients", total=len(keys))]
        return {"log_norm": np.stack(drawn)}

    products, path = run.part("matrices", matrices), run.part("sigmoid", sigmoid)["path"]
    norms = run.part("gradients", gradients)["log_norm"]
    slopes = (norms[:, :, 0] - norms[:, :, -1]) / (sizes.depth - 1)
    predicted = predicted_slopes(stds, places, sizes)
    table = Table(
        "Gradient norms by depth: mean of ln of the factor a layer, measured and predicted",
        ("activation", "weights", "measured", "predicted", f"over {sizes.depth - 1} layers"),
        [
            (
                activation,
                scale,
                float(slopes[:, n].mean()),
                predicted[n],
                f"x {math.exp(slopes[:, n].mean() * (sizes.depth - 1)):.1e}",
            )
            for n, (activation, scale) in enumerate(settings)
        ],
        "0 keeps the gradient. Predicted: ½ln(n·Var[w]·E[φ'(y)²]), with the second moments that the forward law gives.",
    )
    return Result(
        Introduction(
            data="none: matrices, paths and nets are drawn, nothing is trained",
            net=f"products of {STEPS} Gaussian matrices of width 4 and 256; {sizes.depth} layers of {sizes.width} units with"
            " sigmoid, tanh and ReLU",
            inputs=f"standard normal, {sizes.batch} samples a net, and standard normal gradients at the output",
            notes=(D2L, "Newman 1986 (Lyapunov exponents of Gaussian matrices)", "Glorot and Bengio 2010", "He et al. 2015"),
        ),
        [*sigmoid_claims(path), *product_claims(products), *gradient_claims(settings, slopes, predicted)],
        [table],
        [sigmoid_figure(path), product_figure(products), gradient_figure(settings, norms, sizes)],
    )


def sigmoid_claims(path: np.ndarray) -> list[Claim]:
    """Of the sigmoid's gradient, and of its product along a path."""
    slope = jax.grad(jax.nn.sigmoid)
    z, weights = np.polynomial.hermite_e.hermegauss(100)
    mean_log = float(np.sum(weights * (special.log_expit(z) + special.log_expit(-z))) / np.sqrt(2 * np.pi))
    largest = float(jnp.max(jax.vmap(slope)(jnp.linspace(-8.0, 8.0, 1601))))
    return [
        Claim(
            "the sigmoid's gradient is largest at 0, and there it is 1/4",
            near(0.25, 1e-6, source=D2L),
            known(largest),
            unit="σ'(x)",
        ),
        Claim(
            "at ±8 less than a thousandth of the sigmoid's gradient is left: e⁻⁸/(1 + e⁻⁸)²",
            near(math.exp(-8) / (1 + math.exp(-8)) ** 2, 1e-7, source=D2L),
            known(float(slope(8.0))),
            unit="σ'(x)",
        ),
        Claim(
            "through layers with standard normal pre-activations, ln of the product falls by E[ln σ'(z)] a layer",
            near(mean_log, 0.01, source="law of large numbers; Gauss-Hermite quadrature"),
            over_seeds(path[:, -1] / path.shape[1]),
            unit="ln a layer",
        ),
        Claim(
            "no path loses less than ln 4 a layer",
            at_most(-math.log(4) + 1e-6, source="σ' ≤ 1/4"),
            known(float(np.max(path / np.arange(1, path.shape[1] + 1)))),
            unit="ln a layer",
        ),
    ]


def product_claims(products: dict[str, np.ndarray]) -> list[Claim]:
    """Of the products of Gaussian matrices."""
    unit, scaled, wide = (_settled_slope(products[name]) for name in ("unit", "scaled", "wide"))
    newman = "Newman 1986: ½(ψ(n/2) + ln 2)"
    # E‖P‖² of the product of k scaled matrices is that of the identity. With heavier tails every step, so early: at 5 steps
    # the relative variance is below 1.5⁵ − 1, and 4000 seeds give ± .11.
    return [
        Claim(
            "100 4x4 matrices of unit normal entries: the log-norm grows by the Lyapunov exponent a step",
            near(LYAPUNOV[4], NARROW_TOLERANCE, source=newman),
            over_seeds(unit),
            unit="ln of the norm, a step",
        ),
        Claim(
            "with entries scaled by 1/√n the log-norm still falls at width 4, by ln 2 less the exponent",
            near(LYAPUNOV[4] - math.log(2), NARROW_TOLERANCE, source=newman),
            over_seeds(scaled),
            unit="ln of the norm, a step",
            refutes=Refuted(
                "entries scaled by 1/√n keep a product of matrices stable",
                "They keep the mean of the squared norm, which few large products carry. The logarithm of a typical product has"
                " the mean ½(ψ(n/2) − ln(n/2)) a step, about −1/2n: −.135 at width 4, a factor 10⁻⁶ after 100 steps, and −.002"
                " at width 256.",
                by="the usual reading of Dive into Deep Learning, section 5.4",
            ),
        ),
        Claim(
            "scaled by 1/√n, the mean of the squared norm is kept, here after 5 matrices",
            near(1.0, 0.2, source="E[W Wᵀ] = 1"),
            over_seeds(np.exp(2 * products["scaled"][:, 4])),
            unit="squared norm over the identity's",
        ),
        Claim(
            "at width 256 the scaled product neither grows nor decays: its slope is −1/2n",
            near(LYAPUNOV[256] - 0.5 * math.log(256), WIDE_TOLERANCE, source=newman),
            over_seeds(wide),
            unit="ln of the norm, a step",
        ),
    ]


def gradient_claims(settings, slopes: np.ndarray, predicted: list[float]) -> list[Claim]:
    """Of the gradients' norms, slopes of shape (seeds, settings)."""
    measured = {setting: over_seeds(slopes[:, number]) for number, setting in enumerate(settings)}
    law = "backward law, E[g_x²] = fan_out·Var[w]·E[φ'²]·E[g_y²]"
    return [
        every(
            "every net's gradient norm changes by ½ln(n·Var[w]·E[φ'²]) a layer",
            [
                (
                    f"{activation}, {scale}",
                    near(0.0, GRADIENT_TOLERANCE, source=law),
                    over_seeds(slopes[:, number] - predicted[number]),
                )
                for number, (activation, scale) in enumerate(settings)
            ],
            unit="ln a layer, measured less predicted",
        ),
        every(
            "weights of std 0.01 make gradients vanish under every activation: by a factor 5 a layer and more",
            [(a, at_most(-math.log(5), source=D2L), measured[a, "0.01"]) for a in ACTIVATIONS],
            unit="ln of the gradient's norm, a layer",
        ),
        every(
            "weights of std 1 make gradients explode under every activation, even the sigmoid",
            [(a, at_least(0.1, source=D2L), measured[a, "1.0"]) for a in ACTIVATIONS],
            unit="ln of the gradient's norm, a layer",
        ),
        every(
            "under a sigmoid gradients vanish by a factor 2 a layer and more with Xavier's and with He's scale too",
            [(scale, at_most(-math.log(2), source="E[σ'²] ≤ 1/16"), measured["sigmoid", scale]) for scale in ("Xavier", "He")],
            unit="ln of the gradient's norm, a layer",
        ),
        every(
            "He for ReLU and Xavier for tanh keep the gradient, within 15 % a layer",
            [
                (
                    f"{a}, {scale}",
                    near(0.0, math.log(1.15), source="Glorot and Bengio 2010; He et al. 2015"),
                    measured[a, scale],
                )
                for a, scale in (("relu", "He"), ("tanh", "Xavier"))
            ],
            unit="ln of the gradient's norm, a layer",
        ),
        Claim(
            "Xavier for ReLU halves the gradient's square a layer: −½ln 2",
            near(-0.5 * math.log(2), GRADIENT_TOLERANCE, source="He et al. 2015, section 2.2"),
            measured["relu", "Xavier"],
            unit="ln of the gradient's norm, a layer",
        ),
    ]


def sigmoid_figure(path: np.ndarray) -> Figure:
    """The sigmoid, its gradient, and the gradient's product."""
    picture, (axes,) = plots.figure(1, 2, height=3.0)
    x = np.linspace(-8, 8, 401)
    value = special.expit(x)
    axes[0].plot(x, value, label="σ(x)", color=plots.COLOURS[0])
    axes[0].plot(x, value * (1 - value), label="σ'(x)", color=plots.COLOURS[1])
    axes[0].set(xlabel="x", ylabel="value", title="The sigmoid and its gradient", xticks=range(-8, 9, 4))
    axes[0].legend(loc="upper left")
    layers = np.arange(1, path.shape[1] + 1)
    plots.band(axes[1], layers, np.exp(path.astype(np.float64)), label="z ~ N(0, 1)", colour=plots.COLOURS[1], log=True)
    axes[1].plot(
        layers, 4.0 ** -layers.astype(float), color=plots.INK, linestyle=plots.DASHED, linewidth=1, label="at best: $4^{-l}$"
    )
    axes[1].set(ylabel="product of l gradients", title="Its gradients multiply through depth")
    plots.by_layer(axes[1], "layer l")
    axes[1].legend(loc="upper right")
    return Figure("sigmoid", "The sigmoid is flat at both ends, so its gradient, 1/4 at best, vanishes through depth.", picture)


def product_figure(products: dict[str, np.ndarray]) -> Figure:
    """ln of the norms by step."""
    picture, (axes,) = plots.figure(1, 2, height=3.3)
    steps = np.arange(1, STEPS + 1)
    labels = {
        "unit": ("4x4, entries N(0, 1)", LYAPUNOV[4]),
        "scaled": ("4x4, entries N(0, 1/n)", LYAPUNOV[4] - math.log(2)),
        "wide": ("256x256, entries N(0, 1/n)", LYAPUNOV[256] - 0.5 * math.log(256)),
    }
    for panel, names in zip(axes, (("unit", "scaled", "wide"), ("scaled", "wide")), strict=True):
        for name in names:
            label, slope = labels[name]
            colour = plots.COLOURS[list(labels).index(name)]
            plots.band(
                panel, steps, products[name] / math.log(10), label=f"{label}: {slope:+.3f}".replace("-", "−"), colour=colour
            )
        panel.set(xlabel="matrices in the product", ylabel="log₁₀ of the norm")
    axes[0].set_title("The product of 100 Gaussian matrices")
    axes[1].set_title("1/√n is right on average only")
    plots.legend(picture, axes[0], columns=3, title="size and entries of the matrices: slope of ln of the norm in theory")
    return Figure(
        "matrix-products",
        "Norm of the product of 100 Gaussian matrices: middle and 10 to 90 % of the draws. Scaled by 1/√n it keeps its mean"
        " square at any width, but at width 4 a typical product decays.",
        picture,
    )


def gradient_figure(settings, norms: np.ndarray, sizes: Sizes) -> Figure:
    """Gradient norms by layer, a panel an activation."""
    picture, (axes,) = plots.figure(1, len(ACTIVATIONS), height=3.2, sharey=True)
    layers = np.arange(1, sizes.depth + 1)
    relative = (norms - norms[:, :, -1:]) / math.log(10)
    for activation, panel in zip(ACTIVATIONS, axes, strict=True):
        for scale, colour in zip(SCALES, plots.COLOURS, strict=False):
            label = f"std {scale}" if scale[0].isdigit() else scale
            plots.band(panel, layers, relative[:, settings.index((activation, scale))], label=label, colour=colour)
        panel.set_title(activation)
        plots.by_layer(panel)
    axes[0].set_ylabel("log₁₀ of the gradient's norm")
    plots.legend(picture, axes[0], columns=4, title="weights")
    return Figure(
        "gradient-norms",
        f"Norm of the gradient at each layer of {sizes.depth} layers of {sizes.width} units, relative to the last"
        " layer's, where it comes from.",
        picture,
    )


def _settled_slope(log_norms: np.ndarray) -> np.ndarray:
    """Growth a step once the first directions have died out; the log-norms' first column is one matrix."""
    return (log_norms[:, -1] - log_norms[:, SETTLED - 1]) / (log_norms.shape[1] - SETTLED)
