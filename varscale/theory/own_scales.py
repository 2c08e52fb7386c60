r"""What goes by an average of itself: response normalisation, gates that are means of what they gate.

Of f(x_i, v) with v a mean of g(x) over few places, x_i among them, v is random, and x_i is no stranger to it. Of what is seen
of x_i given v only the mean of g is known, E[g(x_i) | v] = v, and by regression on it

    E[φ(x_i) | v] = E[φ] + Cov(φ, g)/Var(g) · (v − E[v]),

which is exact for φ = g: so E[x_i² v] = E[v²] for v = mean x². Where g is the square of a Gaussian x itself more is known: see
`spheres`, to which this leaves it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from varscale.theory.elementwise import Apply, roots
from varscale.theory.graph import Node, View
from varscale.theory.hermite import WEIGHTS
from varscale.theory.narrow import held_square
from varscale.theory.quadrature import CONCENTRATED, Environment, concentrated, evaluate, marginal
from varscale.theory.responses import averaged_by, companions, power_of
from varscale.theory.scales import mean_squares

_FREE = 0.1  # power of a root's mean square up to which an average does not go by it: one of what was normalised


class OwnScale(NamedTuple):
    """A scale of a root: itself, what it is the mean of on the root's normal grid, and its relative variance."""

    scale: View
    averaged: np.ndarray
    variance: float


def own_scale_shift(node: Apply) -> tuple[float, float]:
    """How the second moment of a function of a root and of averages of it differs from that at the averages' means.

    Returns:
        The relative shift, that of a gamma law of the average, and what is in doubt: what a lognormal one would differ by.
    """
    shift, doubt = 0.0, 0.0
    for main, *scales in companions(node).values():
        own = [found for s in scales if (found := _own(s, main)) is not None and found.variance > CONCENTRATED]
        if not own:
            continue
        widest = max(own, key=lambda found: found.variance)
        together = [s for s in scales if s.bind == widest.scale.bind]
        gamma, lognormal = (_ratio(node, main, widest, together, lognormal=law) for law in (False, True))
        shift, doubt = shift + gamma - 1, doubt + abs(gamma - lognormal)
    return shift, doubt


def is_direct(scale: Node, main: Node) -> bool:
    """Whether a scale is the mean square of a root itself, or the variance of what the root is less its mean."""
    squares = averaged_by(scale)
    if not isinstance(squares, Apply) or squares.params != ("integer_pow", (2,)):
        return False
    inner = squares.args[0].node
    while isinstance(inner, Apply) and inner.params[0] == "affine":
        inner = inner.args[0].node
    return inner is main or (main.is_centred and any(inner is view.node for view in main.args))


def _own(scale: View, main: View) -> OwnScale | None:
    """A scale, if it is an average of a function of a root, over axes of the root's, and of that root alone."""
    inner = averaged_by(scale.node)
    if inner is None or not set(scale.bind) < set(main.bind) or is_direct(scale.node, main.node):
        return None
    live = [r for r in roots(inner) if not concentrated(r.node)]
    if [r.node for r in live] != [main.node]:
        return None
    env: Environment = {(r.node.id, r.bind): r.mean(inner.axes)[..., None] for r in roots(inner) if r not in live}
    values = np.asarray(evaluate(View(inner, tuple(range(len(inner.axes)))), inner.axes, env), float)
    own = marginal(scale.node)
    variance = float(np.mean(own.deviation**2) / max(np.mean(own.mean**2), 1e-300))
    return OwnScale(scale, values.reshape(-1, values.shape[-1]).mean(axis=0), variance) if values.shape[-1] > 1 else None


def _ratio(node: Apply, main: View, own: OwnScale, together: list[View], *, lognormal: bool) -> float:
    """E[f²] over that with the scales at their means."""
    g = own.averaged
    mean = float(g @ WEIGHTS)
    tilt = (g - mean) * mean / max(float((g - mean) ** 2 @ WEIGHTS), 1e-300)
    powers = {s: power_of(s.node, main.node) for s in together}
    power = powers[own.scale]

    def square(ratio: float) -> np.ndarray:
        rates = {s: p / power if abs(power) > _FREE else float(s == own.scale) for s, p in powers.items()}
        varied = {(s.node.id, s.bind): s.mean(node.axes)[..., None] * ratio**p for s, p in rates.items()}
        return held_square(node, main, varied)

    nodes, shares = mean_squares(own.variance, lognormal=lognormal)
    whole = sum(w * float(square(r) * (1 + tilt * (r - 1)) @ WEIGHTS) for r, w in zip(nodes, shares, strict=True))
    return whole / max(float(square(1.0) @ WEIGHTS), 1e-300)
