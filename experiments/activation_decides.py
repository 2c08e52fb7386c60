"""The activation decides the scale: He for ReLU, Xavier for tanh, the exact gain for any, and nothing for a deep sigmoid.

30 layers under four scales forward and backward, then 10 and 3 layers trained on handwritten digits.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np

import varscale as vs
from experiments.lab import data, plots
from experiments.lab.claims import Claim, Refuted, at_least, at_most, every, known, near, over_seeds
from experiments.lab.experiment import Figure, Introduction, Result, Run, Table
from experiments.lab.mean_field import propagate
from experiments.nets.activation_nets import (
    ACTIVATIONS,
    EXACT_GAINS,
    GUESS,
    SCHEMES,
    SIZES,
    Outcome,
    Sizes,
    all_losses,
    all_signals,
    settings,
)

REQUIRES = ("matplotlib", "sklearn")
ORDER = 5

PYTORCH = {"relu": "relu", "leaky relu": "leaky_relu", "tanh": "tanh", "sigmoid": "sigmoid", "selu": "selu"}
# One draw of 30 ReLU layers of 256 scatters by √(5·30/256) = .77 in ln of its second moment, about a mean that is .29 too low
# (Hanin and Nica 2018): ± .026 a layer and .010 too low. With 16 draws the 99 % interval is ± .019.
LAYER_TOLERANCE = 0.04


def run(run: Run, sizes: Sizes = SIZES, samples: data.Samples | None = None) -> Result:
    """Look at 30 layers under every scale, then train."""
    pairs = settings()
    trained = {
        "deep": [pair for pair in pairs if pair[1] != "exact" or pair[0] in ("gelu", "silu")],
        "shallow": [pair for pair in pairs if pair[0] in ("relu", "sigmoid") and pair[1] != "exact"],
    }

    def looked_at():
        keys = run.keys("signals", run.seeds(quick=24, full=60))
        return all_signals(run.track(keys, "30 layers", total=len(keys)), sizes)

    def training():
        chosen = samples if samples is not None else data.digits()
        keys = run.keys("training", run.seeds(quick=6, full=12))
        losses = {}
        for name, depth in (("deep", sizes.deep), ("shallow", sizes.shallow)):
            track = functools.partial(run.track, label=f"training {depth} layers")
            losses[name] = all_losses(keys, chosen, trained[name], track, depth=depth, sizes=sizes)
        return losses

    signal, loss = run.part("signals", looked_at), run.part("training", training)
    outcome = {name: Outcome.of(curves) for name, curves in loss.items()}
    gains = {name: (vs.gain(f), vs.gain(f, "derivative")) for name, f in ACTIVATIONS.items()}
    return Result(
        Introduction(
            data="standard normal inputs; for training, scikit-learn's 1797 handwritten digits (8x8 grey levels, 10 classes)",
            net=f"{sizes.depth} layers of {sizes.width} units under seven activations and four scales; for training,"
            f" {sizes.deep} and {sizes.shallow} layers of 64",
            inputs="of second moment 1; training by gradient descent with momentum 0.9, at the better of two learning rates",
            notes=(
                "Glorot and Bengio 2010",
                "He et al. 2015",
                "PyTorch's table of gains (torch.nn.init.calculate_gain)",
                "Qiu, Neural Networks and Deep Learning (NNDL), section 7.3",
            ),
        ),
        [*gain_claims(gains), *signal_claims(pairs, signal, sizes), *training_claims(trained, outcome)],
        [gain_table(gains), signal_table(pairs, signal), training_table(trained, outcome, sizes)],
        [signal_figure(pairs, signal, sizes), training_figure(trained, loss, outcome, sizes)],
    )


def gain_claims(gains) -> list[Claim]:
    """The numbers themselves."""
    return [
        every(
            "gains computed by quadrature are 1/√E[φ(z)²]",
            [
                (name, near(value, 1e-9, source="1/√E[φ(z)²] at 50 digits"), known(gains[name][0]))
                for name, value in EXACT_GAINS.items()
            ],
            unit="gain",
        ),
        Claim(
            "PyTorch's 5/3 makes a tanh net chaotic: χ = (5/3)²·E[φ'(√q z)²] at its fixed point q",
            near(1.210, 0.001, source="mean-field theory, Poole et al. 2016"),
            known(round(_pytorch_tanh_chi(), 4)),
            unit="χ, factor of the gradient's second moment a layer",
        ),
    ]


def _pytorch_tanh_chi() -> float:
    factors = jnp.asarray([vs.pytorch_gain("tanh") ** 2])
    return float(propagate((jnp.tanh,), jnp.zeros(1, jnp.int32), factors, jnp.ones(1), depth=200)[1][0, -1])


def signal_claims(pairs, signal: dict[str, np.ndarray], sizes: Sizes) -> list[Claim]:
    """Which scale keeps what, forward and backward."""
    place = {pair: number for number, pair in enumerate(pairs)}
    last = signal["forward"][:, :, -1]
    back = signal["backward"][:, :, 0] - signal["backward"][:, :, -1]
    # GELU's and SiLU's exact gain is an unstable point (below): near it, and under He's scale just beneath it, one draw says
    # little about the next.
    steady = [pair for pair in pairs if pair[0] not in ("gelu", "silu") or pair[1] == "Xavier"]

    def differences(measured, predicted, layers):
        return [
            (
                ", ".join(pair),
                near(0.0, LAYER_TOLERANCE, source="the law, layer by layer"),
                over_seeds((measured - predicted)[:, place[pair]] / layers),
            )
            for pair in steady
        ]

    def gradient(pair):
        return over_seeds(back[:, place[pair]] / (sizes.depth - 1))

    kept = [
        (a, near(0.0, 1.0, source="He et al. 2015, for any φ"), over_seeds(last[:, place[a, "exact"]]))
        for a in ("relu", "leaky relu", "tanh", "sigmoid", "selu")
    ]
    lost = [("relu", -math.log(2)), ("leaky relu", -math.log(2 / 1.0001))]
    return [
        every(
            "the second moment of every net grows by n·Var[w]·E[φ²]/q a layer",
            differences(last, signal["predicted_forward"][:, -1], sizes.depth),
            unit="ln a layer, measured less predicted",
        ),
        every(
            "the second moment of every net's gradient grows by n·Var[w]·E[φ'²] a layer",
            differences(back, signal["predicted_backward"].sum(axis=1), sizes.depth - 1),
            unit="ln a layer, measured less predicted",
        ),
        every(
            "the exact gain keeps the second moment through 30 layers, within a factor e",
            kept,
            unit="ln of the second moment after 30 layers",
        ),
        every(
            "the exact gain does not keep GELU's and SiLU's second moment through 30 layers",
            [
                (
                    a,
                    at_least(1.0, source="d ln E[φ(√q z)²]/d ln q > 1 at q = 1"),
                    over_seeds(np.abs(last[:, place[a, "exact"]])),
                )
                for a in ("gelu", "silu")
            ],
            unit="mean of |ln| of the second moment after 30 layers",
            refutes=Refuted(
                "with the exact gain any activation keeps the signal at any depth",
                "The exact gain makes second moment 1 a fixed point, but for GELU and SiLU not a stable one: a draw that is 1 %"
                " too large is amplified more than in proportion by the next layer. At infinite width it stays; at width 256"
                " it has left after 30 layers.",
                by="the derivation of He et al. 2015, taken for any activation",
            ),
        ),
        every(
            "Xavier loses half the second moment a layer under ReLU and leaky ReLU",
            [
                (
                    a,
                    near(value, LAYER_TOLERANCE, source="He et al. 2015, section 2.2"),
                    over_seeds(last[:, place[a, "Xavier"]] / sizes.depth),
                )
                for a, value in lost
            ],
            unit="ln of the second moment, a layer",
        ),
        every(
            "He keeps ReLU's and leaky ReLU's gradient",
            [
                (a, near(0.0, LAYER_TOLERANCE, source="He et al. 2015, eq. 14"), gradient((a, "He")))
                for a in ("relu", "leaky relu")
            ],
            unit="ln of the gradient's second moment, a layer",
        ),
        every(
            "keeping tanh's and SELU's second moment makes their gradient grow: no one scale keeps both",
            [(a, at_least(0.02, source="Poincaré: Var[φ] < E[φ'²]"), gradient((a, "exact"))) for a in ("tanh", "selu")],
            unit="ln of the gradient's second moment, a layer",
        ),
        every(
            "no scale keeps a sigmoid net's gradient: below e^−0.8 a layer, NNDL's logistic variant (16/n) being the best",
            [
                (scheme, at_most(-0.8, source="σ' ≤ 1/4, and a mean of 1/2"), gradient(("sigmoid", scheme)))
                for scheme in SCHEMES
            ],
            unit="ln of the gradient's second moment, a layer",
        ),
    ]


def training_claims(trained, outcome: dict[str, Outcome]) -> list[Claim]:
    """Which trains, and how fast."""

    def final(net, pair):
        return over_seeds(outcome[net].final[trained[net].index(pair)])

    def ratio(net, slow, fast):
        steps = outcome[net].steps
        return over_seeds(np.log(steps[trained[net].index(slow)] / steps[trained[net].index(fast)]))

    fitting = [(a, "He") for a in ("relu", "leaky relu")] + [(a, "Xavier") for a in ("tanh", "selu")]
    fitting += [(a, "exact") for a in ("gelu", "silu")]
    half = at_most(GUESS / 2, source="half of what guessing gives, ln 10")
    rectifiers = "Glorot et al. 2011, deep sparse rectifiers"
    return [
        every(
            "ten layers train where the scale fits the activation",
            [(", ".join(pair), half, final("deep", pair)) for pair in fitting],
            unit="final training loss, nats",
        ),
        every(
            "a sigmoid net of ten layers does not leave the start under Xavier or He",
            [
                (scheme, at_least(0.95 * GUESS, source="its gradients vanish"), final("deep", ("sigmoid", scheme)))
                for scheme in ("Xavier", "He")
            ],
            unit="final training loss, nats",
        ),
        every(
            "with three layers a sigmoid net trains too, as ReLU does",
            [(", ".join(pair), half, final("shallow", pair)) for pair in trained["shallow"]],
            unit="final training loss, nats",
        ),
        Claim(
            "with three layers ReLU under He is at half the guessing loss 4 times sooner than a sigmoid under Xavier",
            at_least(math.log(4), source=rectifiers),
            ratio("shallow", ("sigmoid", "Xavier"), ("relu", "He")),
            unit="ln of the ratio of steps",
        ),
        Claim(
            "three layers of sigmoid: NNDL's logistic variant is at half the guessing loss twice as soon as Xavier's scale",
            at_least(math.log(2), source="its slope at 0 is 1/4, so 16/n"),
            ratio("shallow", ("sigmoid", "Xavier"), ("sigmoid", "logistic")),
            unit="ln of the ratio of steps",
        ),
        Claim(
            "three layers: ReLU under He is there sooner than a sigmoid under NNDL's logistic variant",
            at_least(0.0, source=rectifiers),
            ratio("shallow", ("sigmoid", "logistic"), ("relu", "He")),
            unit="ln of the ratio of steps",
        ),
        Claim(
            "ten layers of ReLU: He is at half the guessing loss twice as soon as Xavier",
            at_least(math.log(2), source="He et al. 2015, figure 2"),
            ratio("deep", ("relu", "Xavier"), ("relu", "He")),
            unit="ln of the ratio of steps",
        ),
        Claim(
            "ten layers of tanh: He's scale is at half the guessing loss no later than Xavier's",
            at_most(0.0, source="each at its better rate"),
            ratio("deep", ("tanh", "He"), ("tanh", "Xavier")),
            unit="ln of the ratio of steps",
            refutes=Refuted(
                "Xavier's scale is the one for tanh",
                "Xavier matches tanh at the origin, where its slope is 1; everywhere else the slope is less, so the signal"
                " fades as 1/l. Twice the variance is nearer to what a tanh layer takes away, and trains sooner.",
                by="Glorot and Bengio 2010, and most lecture notes after it",
            ),
        ),
    ]


def gain_table(gains) -> Table:
    """Exact gains beside PyTorch's."""
    rows = []
    for name, (exact, derivative) in gains.items():
        torch = vs.pytorch_gain(PYTORCH[name]) if name in PYTORCH else None
        rows.append(
            (
                name,
                f"{exact:.4f}",
                f"{derivative:.4f}",
                "none" if torch is None else f"{torch:.4f}",
                "" if torch is None else f"x {(torch / exact) ** 2:.3f}",
            )
        )
    return Table(
        "Gains",
        ("activation", "keeps E[y²]", "keeps E[g²]", "PyTorch", "E[y²] by PyTorch's"),
        rows,
        "1/√E[φ(z)²] and 1/√E[φ'(z)²]; PyTorch's table is a convention: the last column is what it makes of 1.",
    )


def signal_table(pairs, signal: dict[str, np.ndarray]) -> Table:
    """ln of the factor over all layers, measured and predicted."""
    forward, back = signal["forward"][:, :, -1], signal["backward"][:, :, 0] - signal["backward"][:, :, -1]
    rows = [
        (
            activation,
            scheme,
            f"{forward[:, n].mean():.2f}",
            f"{signal['predicted_forward'][n, -1]:.2f}",
            f"{back[:, n].mean():.2f}",
            f"{signal['predicted_backward'][n].sum():.2f}",
        )
        for n, (activation, scheme) in enumerate(pairs)
    ]
    return Table(
        "30 layers: ln of the second moment at the last, and of the gradient's at the first",
        ("activation", "scale", "forward", "law", "backward", "law"),
        rows,
        "0 keeps it, −0.69 halves it. Means over draws of nets of 256 units; a typical ReLU net is 0.3 below the law.",
    )


def training_table(trained, outcome: dict[str, Outcome], sizes: Sizes) -> Table:
    """Final loss and speed."""
    rows = []
    for name, depth in (("deep", sizes.deep), ("shallow", sizes.shallow)):
        for n, (activation, scheme) in enumerate(trained[name]):
            steps = float(np.median(outcome[name].steps[n]))
            reached = "never" if steps >= sizes.steps(depth) else f"{steps:.0f}"
            rate = sizes.rates[outcome[name].best[n]]
            rows.append((depth, activation, scheme, rate, f"{outcome[name].final[n].mean():.3f}", reached))
    return Table(
        "Training on handwritten digits",
        ("layers", "activation", "scale", "rate", "loss", "steps"),
        rows,
        f"Loss after {sizes.deep_steps} and {sizes.shallow_steps} steps, at the better rate of "
        f"{' and '.join(map(str, sizes.rates))}; steps to half of what guessing gives.",
    )


def signal_figure(pairs, signal: dict[str, np.ndarray], sizes: Sizes) -> Figure:
    """Forward above, backward below, a column a scale."""
    picture, axes = plots.figure(2, 3, height=5.8, sharex=True, sharey="row")
    layers = np.arange(1, sizes.depth + 1)
    for column, scheme in enumerate(SCHEMES[:3]):
        for place, (activation, colour) in enumerate(zip(ACTIVATIONS, plots.COLOURS, strict=False)):
            turn = (place, len(ACTIVATIONS))
            n = pairs.index((activation, scheme))
            back = signal["backward"][:, n] - signal["backward"][:, n, -1:]
            plots.band(
                axes[0, column], layers, signal["forward"][:, n] / math.log(10), label=activation, colour=colour, turn=turn
            )
            plots.band(axes[1, column], layers, back / math.log(10), label=activation, colour=colour, turn=turn)
        axes[0, column].set_title({"Xavier": "Xavier, 1/n", "He": "He, 2/n", "exact": "Exact gain"}[scheme])
        plots.by_layer(axes[1, column])
    n = pairs.index(("sigmoid", "logistic"))
    back = signal["backward"][:, n] - signal["backward"][:, n, -1:]
    logistic = {"color": plots.COLOURS[3], "linestyle": ":", "label": "sigmoid, 16/n"}
    axes[0, 2].plot(layers, np.median(signal["forward"][:, n], axis=0) / math.log(10), **logistic)
    axes[1, 2].plot(layers, np.median(back, axis=0) / math.log(10), **logistic)
    axes[0, 0].set_ylabel("log₁₀ E[y²]")
    axes[1, 0].set_ylabel("log₁₀ E[g²], relative")
    axes[0, 0].set_ylim(-10, 3)
    axes[1, 0].set_ylim(-20, 4)
    plots.legend(picture, axes[0, 2], columns=4)
    return Figure(
        "signal",
        "Second moment of the pre-activations (above) and of the gradient relative to the last layer's (below) through 30"
        " layers of 256 units; shades: 10 to 90 % of draws. Each curve has markers of its own, so that equal curves show.",
        picture,
    )


def training_figure(trained, loss: dict[str, np.ndarray], outcome: dict[str, Outcome], sizes: Sizes) -> Figure:
    """Loss curves of the telling settings."""
    picture, (axes,) = plots.figure(1, 2, height=3.5, sharey=True)
    shown = [
        ("relu", "He"),
        ("relu", "Xavier"),
        ("tanh", "Xavier"),
        ("gelu", "exact"),
        ("sigmoid", "Xavier"),
        ("sigmoid", "logistic"),
    ]
    for panel, name, depth in zip(axes, ("deep", "shallow"), (sizes.deep, sizes.shallow), strict=True):
        for pair, colour in zip(shown, plots.COLOURS, strict=False):
            if pair not in trained[name]:
                continue
            n = trained[name].index(pair)
            curves = np.minimum(np.nan_to_num(loss[name][n, outcome[name].best[n]], nan=10.0, posinf=10.0), 10.0)
            smooth = np.lib.stride_tricks.sliding_window_view(curves, 10, axis=-1).mean(axis=-1)
            plots.band(panel, np.arange(10, sizes.steps(depth) + 1), smooth, label=", ".join(pair), colour=colour)
        plots.reference(panel, GUESS, "ln 10: guessing")
        panel.set_title(f"{depth} hidden layers")
        panel.set_xlabel("step")
        panel.set_ylim(0, 2.7)
    axes[0].set_ylabel("training loss, nats")
    plots.legend(picture, axes[0], columns=4)
    return Figure("training", "Training on handwritten digits, each setting at the better of two learning rates.", picture)
