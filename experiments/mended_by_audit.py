"""A deep net that does not train; the line that an audit says; it trains."""

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
from experiments.lab.claims import Claim, at_least, at_most, exactly, known, near, over_seeds
from experiments.lab.experiment import Figure, Introduction, Result, Run, Table
from experiments.lab.training import cross_entropy, fit, minibatches
from experiments.nets.residual_towers import drawn
from experiments.nets.stacks import Classifier, Stack, activations

REQUIRES = ("matplotlib", "sklearn")
ORDER = 13

GUESS = math.log(10)
PIXELS = 64  # of a digit
# Of ln E[x²] a layer. A draw of 20 layers of 128 ReLU units has the standard deviation √(5 / (128 · 19)) = .045 about
# −5 / (2 · 128) = −.02 (moments of a layer's mean square to first order in 1/width); the two laws are ln 2 = .69 apart.
SLOPE = 0.15


@dataclass(frozen=True)
class Sizes:
    """Of the net and its training."""

    depth: int = 20
    width: int = 128
    batch: int = 64
    steps: int = 300
    rate: float = 0.03
    largest_gradient: float = 1.0  # norm to which a gradient is clipped: without it one draw in 24 explodes at this rate


SIZES = Sizes()


def net(kernel_init: Any, sizes: Sizes) -> Classifier:
    """The classifier: hidden layers of one initializer, and a linear layer that reads the classes off them."""
    return Classifier(stack(kernel_init, sizes), 10)


def stack(kernel_init: Any, sizes: Sizes) -> Stack:
    """The hidden layers."""
    return Stack((sizes.width,) * sizes.depth, jax.nn.relu, kernel_init=kernel_init, use_bias=True)


BEFORE = vs.lecun_normal()  # flax's default


def audited(kernel_init: Any, sizes: Sizes) -> vs.Audit:
    """What the audit says of the net: from its trace alone."""
    return vs.audit(net(kernel_init, sizes), jax.ShapeDtypeStruct((sizes.batch, PIXELS), "float32"))


def mended(audit: vs.Audit) -> tuple[str, Any]:
    """The line of the first finding that gives an initializer, and that initializer."""
    finding = next(finding for finding in audit.findings if finding.scheme)
    return finding.mend, next(iter(finding.scheme.values()))


@functools.partial(jax.jit, static_argnames=("kernel_init", "sizes", "plan"))
def look(keys, x, labels, *, kernel_init: Any, sizes: Sizes, plan: Any = None) -> dict[str, Float[Array, "seeds _"]]:
    """ln E[x²] of each layer's activations at initialization, and the losses of a training by clipped gradient descent.

    Args:
      keys: a key a seed.
      x: inputs, shape (samples, pixels), of second moment 1.
      labels: shape (samples,).
      kernel_init: of every hidden kernel.
      sizes: of the net.
      plan: draws the parameters in place of the net's own init.
    """
    model = net(kernel_init, sizes)

    def one(key):
        key_weights, key_batches = jax.random.split(key)
        params = drawn(plan, key_weights) if plan is not None else model.init(key_weights, x[:2])["params"]

        def loss(params, batch):
            logits: Any = model.apply({"params": params}, x[batch])
            return cross_entropy(logits, labels[batch])

        layers = activations(stack(kernel_init, sizes), {"params": params["stack"]}, x[: sizes.batch])
        batches = minibatches(key_batches, len(x), sizes.batch, sizes.steps)
        descent = optax.chain(optax.clip_by_global_norm(sizes.largest_gradient), optax.sgd(sizes.rate))
        losses = fit(loss, descent, params, batches)[1]
        return {"signal": jnp.log(jnp.stack([jnp.mean(jnp.square(y)) for y in layers])), "loss": losses}

    return jax.vmap(one)(keys)


def run(run: Run, sizes: Sizes = SIZES, samples: data.Samples | None = None) -> Result:
    """Audit, mend, audit again; train before and after."""
    before = audited(BEFORE, sizes)
    line, after_init = mended(before)
    after = audited(after_init, sizes)
    plan = vs.calibrate(net(BEFORE, sizes), jax.ShapeDtypeStruct((sizes.batch, PIXELS), "float32"))

    def measure():
        chosen = samples if samples is not None else data.digits()
        x = chosen.features - chosen.features.mean(axis=0)
        x, labels = jnp.asarray(x / np.sqrt(np.mean(x**2))), jnp.asarray(chosen.labels)
        # With 12, one draw that does not train decides no claim.
        keys, found = run.keys("nets", run.seeds(quick=12, full=20)), {}
        ways = {"before": {"kernel_init": BEFORE}, "after": {"kernel_init": after_init}}
        ways["calibrated"] = {"kernel_init": BEFORE, "plan": plan}
        for name in run.track(list(ways), "nets"):
            looked = look(keys, x, labels, sizes=sizes, **ways[name])
            found |= {f"{name} {what}": values for what, values in looked.items()}
        return found

    found = run.part("nets", measure)
    introduction = Introduction(
        data="scikit-learn's 1797 handwritten digits (8x8 grey levels)",
        net=f"{sizes.depth} hidden ReLU layers of {sizes.width} units, with flax's default initializer and with the audit's",
        inputs=f"of second moment 1; gradient clipped at {sizes.largest_gradient:g}, rate {sizes.rate:g}, {sizes.steps} steps",
        notes=("He et al. 2015",),
    )
    return Result(
        introduction,
        claims(found, before, after, sizes),
        [findings_table(before)],
        [figure(found, line, sizes)],
        remarks=[f"The line that the audit says, and that was applied: `{line}`."],
    )


def _final(losses: np.ndarray) -> np.ndarray:
    """Mean loss of the last 20 steps, (seeds,)."""
    return losses.astype(np.float64)[:, -20:].mean(axis=-1)


def claims(found: dict[str, np.ndarray], before: vs.Audit, after: vs.Audit, sizes: Sizes) -> list[Claim]:
    """What the audit says, and whether it is so."""
    half = at_most(GUESS / 2, source="half of what guessing gives, ln 10")
    unit = "ln of the signal's second moment, a layer"
    law = "He et al. 2015, section 2.2: fan_in · Var[w] / 2 a layer"
    slope = {
        name: (found[f"{name} signal"][:, -1] - found[f"{name} signal"][:, 0]) / (sizes.depth - 1)
        for name in ("before", "after")
    }
    errors = [sum(finding.level == "error" for finding in audit.findings) for audit in (before, after)]
    return [
        Claim("the audit finds errors before anything is run", at_least(1, source="the law"), known(errors[0]), unit="errors"),
        Claim("with its line it finds none", exactly(0, source="the law"), known(errors[1]), unit="errors"),
        Claim(
            "before, a layer halves the signal",
            near(-math.log(2), SLOPE, source=law),
            over_seeds(slope["before"]),
            unit="ln a layer",
        ),
        Claim("after, a layer keeps it", near(0.0, SLOPE, source=law), over_seeds(slope["after"]), unit=unit),
        Claim(
            "before, the net does not train",
            near(GUESS, 0.05, source="ln 10: guessing"),
            over_seeds(_final(found["before loss"])),
            unit="training loss, nats",
        ),
        Claim("after, it trains", half, over_seeds(_final(found["after loss"])), unit="training loss, nats"),
        Claim(
            "under the plan of vs.calibrate it trains too",
            half,
            over_seeds(_final(found["calibrated loss"])),
            unit="training loss, nats",
        ),
    ]


def findings_table(audit: vs.Audit) -> Table:
    """What the audit said."""
    rows = [(finding.code, finding.level, finding.path, finding.mend) for finding in audit.findings]
    return Table("The audit of the net as it was", ("code", "level", "at", "what mends it"), rows)


def figure(found: dict[str, np.ndarray], line: str, sizes: Sizes) -> Figure:
    """Before and after: signal by layer, loss by step."""
    picture, ((signal, loss),) = plots.figure(1, 2, height=3.2)
    named = {"before": "flax's default", "after": f"audit: {line}"}
    for (name, label), colour in zip(named.items(), plots.COLOURS, strict=False):
        layers, steps = np.arange(1, sizes.depth + 1), np.arange(1, sizes.steps + 1)
        values = np.exp(found[f"{name} signal"].astype(np.float64))
        plots.band(signal, layers, values, label=label, colour=colour, log=True)
        plots.band(loss, steps, found[f"{name} loss"], label=label, colour=colour)
    plots.by_layer(signal)
    signal.set(ylabel="E[x²] of the activations", title="Signal at initialization")
    loss.set(xlabel="step", ylabel="training loss, nats", title="Training", ylim=(0, None))
    plots.reference(loss, GUESS, "guessing")
    plots.legend(picture, loss, columns=3)
    caption = f"{sizes.depth} ReLU layers before and after the line that vs.audit says."
    return Figure("before-and-after", caption, picture)
