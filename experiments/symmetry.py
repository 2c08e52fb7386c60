"""Equal hidden units stay equal: a constant start is fine for logistic regression and fatal for hidden layers.

Two hidden layers on handwritten digits, every start trained by gradient descent and by Adam, in full batches and minibatches.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import varscale as vs
from experiments.lab import data, plots
from experiments.lab.claims import Claim, Refuted, accuracy, at_least, at_most, every, exactly, known, over_seeds
from experiments.lab.experiment import Figure, Introduction, Result, Run, Table
from experiments.lab.training import cross_entropy, minibatches
from experiments.nets.tied_units import ACTIVATIONS, OPTIMIZERS, Setting, nearly_constant, start, test, train

REQUIRES = ("matplotlib", "sklearn")
ORDER = 3

CONSTANT, NOISE = 0.1, 3e-8  # a constant, and a difference of about its last bit
BATCH, CHUNK = 64, 300
STARTS: dict[str, Any] = {
    "constant": vs.constant(CONSTANT),
    "constant, full batch": vs.constant(CONSTANT),
    "zeros": vs.zeros,
    "constant, dropout": vs.constant(CONSTANT),
    "constant and its last bit": nearly_constant(CONSTANT, NOISE),
    "random": vs.glorot_uniform(),
}
NAMES = tuple(activation.__name__ for activation in ACTIVATIONS)
TIED = ("constant", "constant, full batch", "zeros")
COLOURS = dict(zip(STARTS, plots.COLOURS, strict=False))

RUMELHART = "Rumelhart, Hinton and Williams 1986: equal weights get equal changes"
BOTTOM = 1e-10  # where pictures draw 0, and say so on the axis
REGULARIZATION = 1e-2
SOLVER_STEPS, DESCENT_STEPS, DESCENT_RATE = 150, 1000, 0.5


def rows(seeds: int) -> list[tuple[str, int, int]]:
    """(start, activation, seed) of every run."""
    return [(name, activation, seed) for name in STARTS for activation in range(len(ACTIVATIONS)) for seed in range(seeds)]


def train_part(run: Run, optimizer: str, digits, out, seeds: int):
    """Of each run: the spreads of its units by step (runs, steps), loss by step, accuracy and the nearest units at the end."""
    x, labels = jnp.asarray(digits.features[~out]), jnp.asarray(digits.labels[~out])

    def compute():
        runs = rows(seeds)
        keys = [run.key(f"seed {seed}") for _, _, seed in runs]
        params = [start(key, STARTS[name], x.shape[1]) for key, (name, _, _) in zip(keys, runs, strict=True)]
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        states = jax.vmap(OPTIMIZERS[optimizer].init)(params)
        setting = Setting(
            jnp.array([activation for _, activation, _ in runs]), jnp.array(["dropout" in name for name, _, _ in runs])
        )
        full = jnp.tile(jnp.arange(BATCH), (CHUNK, 1))
        found = []
        for chunk in run.track(range(2 if run.quick else 10), optimizer):
            mini = [minibatches(run.key(f"order {chunk} {seed}"), len(x), BATCH, CHUNK) for seed in range(seeds)]
            orders = jnp.stack([full if "full" in name else mini[seed] for name, _, seed in runs])
            dropped = jax.random.split(run.key(f"dropout {chunk}"), (len(runs), CHUNK))
            arguments = (params, states, setting, orders, dropped, x, labels)
            params, states, losses, spreads = train(*arguments, optimizer=optimizer)
            found.append(jax.device_get((losses, *spreads)))
        accuracy, nearest = test(params, setting, jnp.asarray(digits.features[out]), jnp.asarray(digits.labels[out]))
        moved = [jnp.abs(params[f"dense_{layer}"]["kernel"]).max(axis=(1, 2)) for layer in range(2)]
        fields = ("loss", "weights", "forward", "backward")
        series = {field: np.concatenate([piece[n] for piece in found], axis=1) for n, field in enumerate(fields)}
        return series | {"accuracy": accuracy, "nearest": nearest, "kernel": jnp.stack(moved).max(axis=0)}

    return run.part(optimizer.replace(" ", "-"), compute)


def logistic_loss(params, x, labels):
    """Multinomial logistic regression: cross-entropy and a penalty on all weights, strictly convex."""
    penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
    return cross_entropy(x @ params["kernel"] + params["bias"][None], labels) + REGULARIZATION / 2 * penalty


@jax.jit
def solve(params, x, labels):
    """L-BFGS from one start: the loss at each step and at the end."""
    loss = functools.partial(logistic_loss, x=x, labels=labels)
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        params, state = carry
        value, gradient = value_and_grad(params, state=state)
        updates, state = solver.update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
        return (optax.apply_updates(params, updates), state), value

    (params, _), losses = jax.lax.scan(step, (params, solver.init(params)), None, length=SOLVER_STEPS)
    return params, jnp.append(losses, loss(params))


@jax.jit
def descend(params, x, labels):
    """Plain gradient descent from one start: the loss at each step."""

    def step(params, _):
        value, gradient = jax.value_and_grad(logistic_loss)(params, x, labels)
        return jax.tree.map(lambda leaf, slope: leaf - DESCENT_RATE * slope, params, gradient), value

    return jax.lax.scan(step, params, None, length=DESCENT_STEPS)


def logistic_part(run: Run, digits, out, seeds: int):
    """Losses of logistic regression from zeros, ones and random starts, (starts, steps), and what becomes of the weights."""

    def compute():
        with jax.enable_x64(True):
            x, labels = jnp.asarray(digits.features, jnp.float64), jnp.asarray(digits.labels)
            shape = (x.shape[1], len(digits.classes))
            inits = [vs.zeros, vs.ones] + [vs.normal(1.0)] * seeds
            keys = jax.random.split(run.key("logistic"), len(inits))
            kernels = [init(key, shape, jnp.float64) for init, key in zip(inits, keys, strict=True)]
            starts = [{"kernel": kernel, "bias": jnp.zeros(shape[1], jnp.float64)} for kernel in kernels]
            solved = [solve(params, x[~out], labels[~out]) for params in run.track(starts, "logistic regression")]
            descended, losses = descend(starts[0], x[~out], labels[~out])
            said = jnp.argmax(x[out] @ descended["kernel"] + descended["bias"], axis=-1)
            return {
                "loss": jnp.stack([losses for _, losses in solved]),
                "kernel": jnp.stack([params["kernel"] for params, _ in solved]),
                "descent": losses,
                "accuracy": jnp.mean(said == labels[out]),
            }

    return run.part("logistic", compute)


def claims_of_tied(parts: dict[str, dict[str, np.ndarray]], seeds: int) -> list[Claim]:
    """Equal units stay equal to the bit, and are one unit."""
    pick = functools.partial(_pick, parts, seeds)
    settings = [(o, name, a) for o in OPTIMIZERS for name in TIED for a in range(len(NAMES))]
    claims = [
        every(
            f"equal units stay equal to the bit at every step: {what}",
            [
                (
                    f"{optimizer}, {name}, {NAMES[a]}",
                    exactly(0.0, source=RUMELHART),
                    known(pick(optimizer, field, name, a).max()),
                )
                for optimizer, name, a in settings
            ],
            unit="largest difference between units",
        )
        for field, what in (("forward", "outputs, forward"), ("backward", "gradients, backward"), ("weights", "weights"))
    ]
    claims += [
        every(
            "zeros: with tanh and ReLU the hidden kernels stay exactly zero",
            [
                (
                    f"{o}, {NAMES[a]}",
                    exactly(0.0, source="both factors of their gradients are zero"),
                    known(pick(o, "kernel", "zeros", a).max()),
                )
                for o in OPTIMIZERS
                for a in (0, 1)
            ],
            unit="largest |weight|",
        ),
        every(
            "a constant start is a net one unit wide",
            [
                (
                    f"{o}, {name}, {NAMES[a]}",
                    at_most(0.6, source="set after pilot runs, before this one"),
                    accuracy(pick(o, "accuracy", name, a)),
                )
                for o, name, a in settings
            ],
            unit="held-out accuracy",
        ),
    ]
    return claims


def claims_of_broken(parts: dict[str, dict[str, np.ndarray]], seeds: int) -> list[Claim]:
    """What makes units differ: chance in the start, chance in training, and rounding."""
    pick = functools.partial(_pick, parts, seeds)
    random = [(a, pick("Adam", "accuracy", "random", a)) for a in range(len(NAMES))]
    apart = pick("gradient descent", "weights", "constant and its last bit", NAMES.index("relu"))
    return [
        every(
            "a random start: no two units are equal at the end",
            [
                (
                    f"{o}, {NAMES[a]}",
                    at_least(math.log(1e-3), source=RUMELHART),
                    over_seeds(np.log(pick(o, "nearest", "random", a))),
                )
                for o in OPTIMIZERS
                for a in range(len(NAMES))
            ],
            unit="ln of the distance of the nearest two units",
        ),
        every(
            "a random start learns (Adam)",
            [
                (NAMES[a], at_least(0.75, source="set after pilot runs, before this one"), accuracy(values))
                for a, values in random
            ],
            unit="held-out accuracy",
        ),
        every(
            "dropout breaks the symmetry of a constant start within 10 steps",
            [
                (
                    f"{o}, {NAMES[a]}",
                    at_least(-4.0, source="units that are dropped apart get different gradients"),
                    over_seeds(np.log10(np.maximum(pick(o, "weights", "constant, dropout", a)[:, 9], 1e-12))),
                )
                for o in OPTIMIZERS
                for a in range(len(NAMES))
            ],
            unit="log10 of the difference between units",
        ),
        Claim(
            "dropout makes a constant start learn (Adam, tanh), against the net whose units stay equal",
            at_least(0.1, source="set after pilot runs, before this one"),
            over_seeds(pick("Adam", "accuracy", "constant, dropout", 0) - pick("Adam", "accuracy", "constant", 0)),
            unit="difference of held-out accuracies",
        ),
        Claim(
            "a difference in the last bit of the start grows (gradient descent, ReLU)",
            at_least(0.7, source="measured: equal units are an unstable balance"),
            over_seeds(np.log10(apart[:, -1] / apart[:, 0])),
            unit="log10 of the growth",
            refutes=Refuted(
                "gradient descent never breaks the symmetry",
                "true of exact sums only; a matrix library rounds one unit's sums unlike the next one's, and training "
                "multiplies the difference until the units part",
                by="Dive into Deep Learning, section 5.4",
            ),
        ),
    ]


def claims_of_logistic(part: dict[str, np.ndarray]) -> list[Claim]:
    """The convex case: every start ends at the same place."""
    ends, best = part["loss"][:, -1], part["loss"].min()
    kernels = part["kernel"]
    return [
        Claim(
            f"logistic regression: zeros, ones and {len(ends) - 2} random starts end at the same loss",
            at_most(1e-6, source="a strictly convex loss has one minimum"),
            known(ends.max() - ends.min()),
            unit="largest difference of losses, nats",
        ),
        Claim(
            "logistic regression: and at the same weights",
            at_most(1e-2, source="λ/2·‖Δ‖² ≤ the difference in loss"),
            known(np.abs(kernels - kernels[0]).max()),
            unit="largest difference of weights",
        ),
        Claim(
            "logistic regression: zeros are fine, plain gradient descent comes as close",
            at_most(0.02, source="convexity"),
            known(part["descent"][-1] - best),
            unit="loss over the minimum, nats",
        ),
        Claim(
            "logistic regression from zeros classifies",
            at_least(0.85, source="set after pilot runs, before this one"),
            known(float(part["accuracy"])),
            unit="held-out accuracy",
        ),
    ]


def run(run: Run) -> Result:
    """Train every start, and the convex case beside it."""
    digits = data.digits()
    out = data.held_out(digits.labels, 0.2)
    seeds = run.seeds(quick=4, full=10)
    parts = {optimizer: train_part(run, optimizer, digits, out, seeds) for optimizer in OPTIMIZERS}
    logistic = logistic_part(run, digits, out, 2 if run.quick else 8)
    steps = parts["Adam"]["loss"].shape[1]
    return Result(
        introduction=Introduction(
            data="scikit-learn's 1797 handwritten digits, 8x8 grey levels, 10 classes; a fifth of each class is held out",
            net="64 inputs, two hidden layers of 10 units (tanh, ReLU or sigmoid), 10 classes; beside it logistic regression",
            inputs=f"grey levels in [0, 1]; {steps} steps of gradient descent or Adam on {BATCH} digits, {seeds} seeds",
            notes=("Rumelhart, Hinton and Williams 1986", "Dive into Deep Learning, section 5.4 (breaking the symmetry)"),
        ),
        claims=[*claims_of_tied(parts, seeds), *claims_of_broken(parts, seeds), *claims_of_logistic(logistic)],
        tables=[_table(parts, seeds)],
        figures=[
            Figure(
                "units",
                "Largest difference between hidden units, by step; the axis is logarithmic but for 0, which is drawn below it.",
                _units(parts, seeds),
            ),
            Figure(
                "convex",
                "Logistic regression from zeros, ones and random weights: loss above the minimum (below 1e-16 drawn as 1e-16).",
                _convex(logistic),
            ),
        ],
        remarks=[
            "Sums are taken in the same order for every unit: a matrix library may round one unit's sums unlike the next one's,"
            " and then equal units are equal to rounding only."
        ],
    )


def _pick(parts, seeds: int, part: str, field: str, name: str, activation: int) -> np.ndarray:
    chosen = [row for row, key in enumerate(rows(seeds)) if key[:2] == (name, activation)]
    return parts[part][field][chosen].astype(np.float64)


def _table(parts, seeds: int) -> Table:
    entries = []
    for optimizer in parts:
        for name in STARTS:
            apart = np.median(_pick(parts, seeds, optimizer, "weights", name, 0)[:, -1])
            accuracies = [_pick(parts, seeds, optimizer, "accuracy", name, a).mean() for a in range(len(NAMES))]
            entries.append((optimizer, name, f"{apart:.2g}", *(f"{accuracy:.1%}" for accuracy in accuracies)))
    note = "Median difference of units at the end (tanh); held-out accuracy by activation."
    return Table("Starts", ("optimizer", "start", "apart", *NAMES), entries, note)


def _units(parts, seeds: int):
    figure, axes = plots.figure(1, 2, height=3.8, sharey=True)
    for panel, (optimizer, activation) in zip(axes[0], (("gradient descent", 1), ("Adam", 0)), strict=True):
        for name in [name for name in STARTS if name not in TIED[1:]]:
            apart = np.maximum(_pick(parts, seeds, optimizer, "weights", name, activation), BOTTOM)
            label = "constant or zeros: equal to the bit" if name == "constant" else name
            plots.band(panel, np.arange(1, apart.shape[1] + 1), apart, label=label, colour=COLOURS[name], log=True)
        panel.set(title=f"{optimizer}, {NAMES[activation]}", xlabel="step")
    powers = range(-8, 1, 2)  # of ten; a logarithmic axis has no zero, so that 0 has a place of its own below
    axes[0, 0].set_yticks([BOTTOM, *(10.0**power for power in powers)], ["0", *(f"$10^{{{power}}}$" for power in powers)])
    axes[0, 0].set_ylabel("largest difference between units")
    plots.legend(figure, axes[0, 0], columns=2)
    return figure


def _convex(part: dict[str, np.ndarray]):
    figure, axes = plots.figure(1, 1, height=2.8)
    gap = np.maximum(part["loss"] - part["loss"].min(), 1e-16)
    for row, values in enumerate(gap):
        label = ("zeros", "ones", "random", *[None] * len(gap))[row]
        axes[0, 0].semilogy(values, label=label, color=plots.COLOURS[min(row, 2)])
    axes[0, 0].set(xlabel="step of L-BFGS", ylabel="loss above the minimum, nats")
    axes[0, 0].legend(loc="upper right")
    return figure
