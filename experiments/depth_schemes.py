"""Residual nets of 8 to 64 blocks explode without a scheme for depth; four schemes keep the signal, and train at one rate."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import varscale as vs
from experiments.lab import data, plots
from experiments.lab.claims import Claim, at_least, at_most, every, near, over_seeds
from experiments.lab.experiment import Figure, Introduction, Result, Run, Table
from experiments.lab.training import cross_entropy, fit, minibatches
from experiments.nets.residual_towers import Form, ResidualTower, drawn

REQUIRES = ("matplotlib", "sklearn")
ORDER = 12

GUESS = math.log(10)


@dataclass(frozen=True)
class Scheme:
    """A form of the block, and the laws of its weights.

    Attributes:
      form: of the block.
      laws: the scheme that gives the plan.
    """

    form: Form
    laws: Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """Of the nets and of their training."""

    width: int = 64
    depths: tuple[int, ...] = (8, 16, 32, 64)
    quick_depths: tuple[int, ...] = (8, 64)
    batch: int = 32
    steps: int = 120
    rate: float = 1e-3


SIZES = Sizes()


def _complete_p(model: Any, x: Any) -> vs.Plan:
    """CompleteP relative to the same net of the least depth, whose laws are He's: its learning rates do not depend on depth."""
    base = model.clone(depth=min(SIZES.depths[0], model.depth))
    return vs.schemes.completep(base=base, laws=vs.schemes.he()).at_any_width(model, x)


# GPT-2's .02 is for streams of 768; √(2/64) is as large beside a stream of 64.
SCHEMES = {
    "plain": Scheme("plain", vs.schemes.he),
    "GPT-2": Scheme("pre-norm", lambda: vs.schemes.gpt2(math.sqrt(2 / 64))),
    "DeepNorm": Scheme("deep-norm", vs.schemes.deepnorm),
    "Fixup": Scheme("fixup", vs.schemes.fixup),
    "CompleteP": Scheme("complete-p", lambda: _complete_p),
}
FOUR = [name for name in SCHEMES if name != "plain"]


@functools.partial(jax.jit, static_argnames=("name", "depth", "sizes"))
def look(keys, x, labels, *, name: str, depth: int, sizes: Sizes) -> dict[str, Float[Array, "seeds _"]]:
    """Signal and gradient by block at initialization, and the losses of a short training, seed by seed.

    Args:
      keys: a key a seed.
      x: inputs, shape (samples, features), of second moment 1.
      labels: shape (samples,).
      name: in SCHEMES.
      depth: number of blocks.
      sizes: of the net.
    """
    model = ResidualTower(SCHEMES[name].form, sizes.width, depth)
    plan = SCHEMES[name].laws()(model, jax.ShapeDtypeStruct((sizes.batch, x.shape[1]), x.dtype))
    zeros = {"blocks": {"stream": jnp.zeros((depth, sizes.batch, sizes.width))}}

    def one(key):
        key_weights, key_batches, key_gradient = jax.random.split(key, 3)
        params = drawn(plan, key_weights)
        cotangent = jax.random.normal(key_gradient, (sizes.batch, sizes.width))

        def weighted(perturbations):
            outputs: Any = model.apply({"params": params, "perturbations": perturbations}, x[: sizes.batch])
            _, squares, stream = outputs
            return jnp.sum(stream * cotangent), squares

        gradients, squares = jax.grad(weighted, has_aux=True)(zeros)
        back = jnp.mean(jnp.square(gradients["blocks"]["stream"]), axis=(1, 2))

        def loss(params, batch):
            outputs: Any = model.apply({"params": params}, x[batch])
            return cross_entropy(outputs[0], labels[batch])

        batches = minibatches(key_batches, len(x), sizes.batch, sizes.steps)
        losses = fit(loss, optax.adam(sizes.rate), params, batches)[1]
        return {"signal": jnp.log(squares), "gradient": jnp.log(back), "loss": losses}

    return jax.vmap(one)(keys)


def run(run: Run, sizes: Sizes = SIZES, samples: data.Samples | None = None) -> Result:
    """Look at every scheme at every depth."""
    depths = sizes.quick_depths if run.quick else sizes.depths

    def measure():
        chosen = samples if samples is not None else data.digits()
        x = chosen.features - chosen.features.mean(axis=0)
        x, labels = jnp.asarray(x / np.sqrt(np.mean(x**2))), jnp.asarray(chosen.labels)
        keys = run.keys("nets", run.seeds(quick=6, full=10))
        found = {}
        for name in run.track(list(SCHEMES), "schemes"):
            for depth in depths:
                looked = look(keys, x, labels, name=name, depth=depth, sizes=sizes)
                found |= {f"{name} {depth} {what}": values for what, values in looked.items()}
        return found

    found = run.part("nets", measure)
    final = {f"{name} {depth}": _final(found[f"{name} {depth} loss"]) for name in SCHEMES for depth in depths}
    introduction = Introduction(
        data="scikit-learn's 1797 handwritten digits (8x8 grey levels)",
        net=f"{depths[0]} to {depths[-1]} residual blocks of two dense layers, ReLU, on a stream of {sizes.width} units;"
        " plain and Fixup have no norms, GPT-2 and CompleteP one before the branch, DeepNorm one after the addition",
        inputs=f"of second moment 1; Adam, rate {sizes.rate:g}, {sizes.steps} steps",
        notes=(
            "Radford et al. 2019 (GPT-2)",
            "Wang et al. 2022 (DeepNorm)",
            "Zhang et al. 2019 (Fixup)",
            "Dey et al. 2025 (CompleteP)",
        ),
    )
    claims = [*signal_claims(found, depths), *training_claims(final, depths)]
    return Result(introduction, claims, [loss_table(final, depths)], [figure(found, final, depths)])


def _final(losses: np.ndarray) -> np.ndarray:
    """Mean loss of the last 20 steps, (seeds,); more than 10 counts as 10."""
    return np.minimum(np.nan_to_num(losses.astype(np.float64), nan=10.0, posinf=10.0), 10.0)[:, -20:].mean(axis=-1)


def _grown(found: dict[str, np.ndarray], name: str, depth: int, what: str) -> np.ndarray:
    """ln of the last block's second moment over the first's, or of the first's gradient over the last's."""
    values = found[f"{name} {depth} {what}"].astype(np.float64)
    return (values[:, -1] - values[:, 0]) * (1 if what == "signal" else -1)


def signal_claims(found: dict[str, np.ndarray], depths: tuple[int, ...]) -> list[Claim]:
    """Forward and backward at initialization."""
    low, high = depths[0], depths[-1]
    tripled = near(math.log(3), 0.1, source="He's law: a branch adds 2 E[x²], so x + f(x) has 3 E[x²]")
    return [
        every(
            "without a scheme each block multiplies signal and gradient by 3",
            [(what, tripled, over_seeds(_grown(found, "plain", high, what) / (high - 1))) for what in ("signal", "gradient")],
            unit="ln of the second moment, a block",
        ),
        every(
            f"under each scheme the signal grows as much in {high} blocks as in {low}",
            [
                (
                    name,
                    # Nearer to none than to that of branches whose scale does not depend on L, which add L in all.
                    near(0.0, math.log(high / low) / 2, source="what L branches add together does not depend on L"),
                    over_seeds(_grown(found, name, high, "signal") - _grown(found, name, low, "signal")),
                )
                for name in FOUR
            ],
            unit="ln of the stream's growth, deep less shallow",
        ),
        every(
            f"under each scheme the gradient of the first of {high} blocks is within a factor of 10 of the last's",
            [
                (name, near(0.0, math.log(10), source="the sources above"), over_seeds(_grown(found, name, high, "gradient")))
                for name in FOUR
            ],
            unit="ln of E[g²], first over last",
        ),
    ]


def training_claims(final: dict[str, np.ndarray], depths: tuple[int, ...]) -> list[Claim]:
    """A short training at one rate."""
    half = at_most(GUESS / 2, source="half of what guessing gives, ln 10")
    high = depths[-1]
    return [
        Claim(
            f"without a scheme {high} blocks do not train in these steps",
            at_least(GUESS / 2, source=f"logits of size 3^{high // 2}"),
            over_seeds(final[f"plain {high}"]),
            unit="training loss, nats",
        ),
        every(
            "under each scheme every depth trains at the same rate",
            [(f"{name}, {depth} blocks", half, over_seeds(final[f"{name} {depth}"])) for name in FOUR for depth in depths],
            unit="training loss, nats",
        ),
    ]


def loss_table(final: dict[str, np.ndarray], depths: tuple[int, ...]) -> Table:
    """Losses by depth."""
    rows = [(name, *(f"{final[f'{name} {depth}'].mean():.2f}" for depth in depths)) for name in SCHEMES]
    return Table(
        "Training loss",
        ("scheme", *(f"{depth} blocks" for depth in depths)),
        rows,
        "ln 10 = 2.30 is guessing; 10 stands for more.",
    )


def figure(found: dict[str, np.ndarray], final: dict[str, np.ndarray], depths: tuple[int, ...]) -> Figure:
    """Signal and gradient by block, loss by depth."""
    picture, ((signal, gradient, loss),) = plots.figure(1, 3, height=3.4)
    high = depths[-1]
    blocks = np.arange(1, high + 1)
    for place, (name, colour) in enumerate(zip(SCHEMES, plots.COLOURS, strict=False)):
        turn = (place, len(SCHEMES))
        forward = found[f"{name} {high} signal"].astype(np.float64)
        back = found[f"{name} {high} gradient"].astype(np.float64)
        plots.band(signal, blocks, np.exp(forward - forward[:, :1]), label=name, colour=colour, log=True, turn=turn)
        plots.band(gradient, blocks, np.exp(back - back[:, -1:]), label=name, colour=colour, log=True, turn=turn)
        plots.band(loss, depths, np.stack([final[f"{name} {d}"] for d in depths], 1), label=name, colour=colour, turn=turn)
    plots.by_layer(signal, "block")
    plots.by_layer(gradient, "block")
    signal.set(ylabel="E[x²] over the first block's", title="Signal")
    gradient.set(ylabel="E[g²] over the last block's", title="Gradient")
    loss.set(xlabel="blocks", ylabel="training loss, nats", title=f"After {SIZES.steps} steps", xscale="log")
    loss.set_xticks(depths, [str(depth) for depth in depths])
    loss.minorticks_off()
    plots.reference(loss, GUESS, "guessing")
    plots.legend(picture, loss, columns=6)
    return Figure(
        "signal-and-loss", f"Second moments of stream and gradient in nets of {high} blocks, and the loss by depth.", picture
    )
