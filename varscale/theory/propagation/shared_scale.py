r"""Factors that are averages of what they multiply: x·mean|x| is not x times a number.

A norm's own scale is one: mean(x²)·s(v)² at v = mean(x²) is an identity, whatever v is. Of any other average v of few numbers,
with S = s², first order in Var[v] has

    E[g² s(v)²] = S E[g²] + S′ Cov[g², v] + S″ E[g²] Var[v] / 2,

all at v = E[v], and likewise E[g s(v)]. Of two different entries, Cov[g_i g_j, v] is taken as that of independent ones.
Half the square of either term is what second order may add.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from varscale.theory.domain.axes import Axis
from varscale.theory.domain.tables import by_type, full_types, lift
from varscale.theory.graph.expressions import Apply, Mean, Sum, swapped
from varscale.theory.graph.nodes import UNKNOWN, Node, View
from varscale.theory.graph.normal_form import apply
from varscale.theory.propagation.cross_moments import cross, mean_product
from varscale.theory.propagation.expanded_sums import Variable, roots_of
from varscale.theory.propagation.marginals import CONCENTRATED, evaluate

_DERIVATIVE_STEP = 1e-3  # relative, of numerical derivatives
_NORM = 0.1  # how far from −1 the logarithmic derivative of a norm's squared scale may be: its epsilon

MeanAndSecond = tuple[np.ndarray, np.ndarray]


def varied(f: Sequence[View], scale: View, frame: Sequence[Axis], mean: np.ndarray, second: np.ndarray) -> MeanAndSecond:
    """What E[Πf_i] by class and E[Πf_i Πf_j] by type are, from what they are with the root `scale` at its mean."""
    table = scale.node.table
    if table.variance <= CONCENTRATED * table.total_mean**2:
        return mean, second
    key = (scale.node.id, scale.bind)
    of_scale = [x for x in f if set(roots_of([x])) == {key}]
    mixed = [x for x in f if key in roots_of([x]) and x not in of_scale]
    if mixed or not of_scale:
        if not _of_squares(scale.node):
            scale.node.graph.flag("assumed", min(table.variance / table.total_mean**2, UNKNOWN))
        return mean, second
    centre = scale.mean(frame)
    variance = lift(table.diagonal - table.mean**2, table.axes, scale.bind, frame, pairs=False)
    varies = variance > CONCENTRATED * centre**2
    s, slope, bend = _derivatives(of_scale, key, centre, frame)
    slope, bend = np.where(varies, slope, 0.0), np.where(varies, bend, 0.0)
    if _of_squares(scale.node) and np.all(np.abs(2 * slope * centre / s + 1)[varies] < _NORM):
        return mean, second
    return _first_order([x for x in f if x not in of_scale], scale, (s, slope, bend), frame, mean, second)


def _of_squares(node: Node) -> bool:
    """Whether it is a mean of squares, or a variance: what a norm divides by."""
    if isinstance(node, Sum):
        return node.is_variance
    squares = node.args[0].node if isinstance(node, Mean) else None
    return isinstance(squares, Apply) and squares.params == ("integer_pow", (2,))


def _derivatives(
    f: Sequence[View], key: Variable, mean: np.ndarray, frame: Sequence[Axis]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """s, s′ and s″ of a product of functions of one root at its mean, by class."""

    def at(value: np.ndarray) -> np.ndarray:
        out = np.ones((1,) * len(frame))
        for x in f:
            out = out * evaluate(x, frame, {key: value[..., None]})[..., 0]
        return out

    step = _DERIVATIVE_STEP * np.where(mean == 0, 1.0, np.abs(mean))
    low, here, high = at(mean - step), at(mean), at(mean + step)
    return here, (high - low) / (2 * step), (high - 2 * here + low) / step**2


def _first_order(
    g: Sequence[View],
    scale: View,
    s: tuple[np.ndarray, np.ndarray, np.ndarray],
    frame: Sequence[Axis],
    mean: np.ndarray,
    second: np.ndarray,
) -> MeanAndSecond:
    if not g:
        return mean, second
    value, slope, bend = s
    product = functools.reduce(lambda a, b: _applied_to("mul", (), [a, b], frame), g)
    square = _applied_to("integer_pow", (2,), [product], frame)
    own = tuple(slice(0, a.classes) for a in frame)

    def covariance(x: View, y: View) -> np.ndarray:
        return full_types(cross(x, y, frame) - mean_product(x, y, frame), frame)

    def at(x: np.ndarray, *, j: bool) -> np.ndarray:
        return by_type(x, frame, second=j)

    with_scale, squared_with_scale = covariance(product, scale), covariance(square, scale)[own]
    between = covariance(scale, scale)
    variance = between[own]
    mean = np.broadcast_to(mean, [a.classes for a in frame])
    own_mean = mean / value
    first = slope * with_scale[own], bend / 2 * own_mean * variance
    pairs = np.array(full_types(second, frame)) / (at(value, j=False) * at(value, j=True))
    here = with_scale[own]
    out = np.array(full_types(second, frame))
    for j in (False, True):
        # s(v_j) moves with g_j and with g_i: what either has in common with it.
        crossed = swapped(with_scale, frame) if not j else with_scale
        met = at(own_mean, j=not j) * at(here, j=j) + at(own_mean, j=j) * crossed
        out = out + at(slope, j=j) * at(value, j=not j) * met + pairs * at(value, j=not j) * at(bend * variance, j=j) / 2
    out = out + pairs * at(slope, j=False) * at(slope, j=True) * between
    # S = s²: S′ = 2ss′, S″ = 2s′² + 2ss″.
    terms = 2 * value * slope * squared_with_scale, pairs[own] * (slope**2 + value * bend) * variance
    base = np.broadcast_to(full_types(second, frame)[own], terms[0].shape)
    out[own] = base + terms[0] + terms[1]
    relative = [np.max(np.abs(t) / np.maximum(np.abs(base), 1e-300)) for t in terms]
    scale.node.graph.flag("quadrature", min(float(sum(r * r for r in relative)) / 2, UNKNOWN))
    return mean + first[0] + first[1], out


def _applied_to(name: str, extra: tuple[int, ...], xs: Sequence[View], frame: Sequence[Axis]) -> View:
    """An elementwise function of views over a frame, itself over that whole frame; a constant has no axes."""
    node = apply(xs[0].node.graph, name, extra, tuple(frame), xs)
    return View(node, tuple(range(len(node.axes))))
