r"""Sums of few terms whose variance a norm has fixed: a depthwise convolution behind a batch norm.

Given its weights, such a sum y = Σ w_k x_k keeps some of the shape of its terms: its excess kurtosis is theirs times
Σ w⁴/(Σ w²)², about κ_w/(n + κ_w − 1) over n terms of weights of kurtosis κ_w. That takes the terms x_k for independent of each
other and of one law: neighbours of a picture are alike, and their sum keeps more of their shape. To first order in it (the
Gram-Charlier series of type A), with the Hermite coefficients a_k of f²,

    E[f(y)²] = a_0 + excess · a_4 / √24.

Where no norm divides, or one over the units themselves, y is Gaussian given x, and the fluctuations of its scale (`spread`)
tell all of this.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from varscale.theory.graph.convolutions import Conv
from varscale.theory.graph.expressions import Apply, roots
from varscale.theory.graph.factors import factors
from varscale.theory.graph.linear_nodes import Contract
from varscale.theory.graph.nodes import Leaf, Node, View
from varscale.theory.integrals.hermite_series import HERMITE, WEIGHTS
from varscale.theory.propagation.marginals import Environment, concentrated, evaluate, over_classes
from varscale.theory.propagation.scale_responses import companions

_FEW = 64  # terms; the excess of more is below a twentieth of theirs


def shape_shift(node: Apply) -> tuple[float, float]:
    """How a function of normalised narrow sums differs from that of Gaussian ones, for which they are taken.

    Returns:
        The relative shift of its second moment, and what is in doubt. That is half as much again for the next
        orders (set on the validation grid, not derived); all of it behind a norm over units that read different inputs (a layer
        norm of depthwise sums), where one order of the expansion is not enough.
    """
    shift, doubt = 0.0, 0.0
    for main, *scales in companions(node).values():
        narrow = _centred_of(main)
        units = _own_units(narrow)
        if not scales or not units:
            continue
        if all(units <= set(scale.bind) for scale in scales):
            found = _excess(narrow.node) * _response(node, main)
            shift, doubt = shift + found, doubt + abs(found) / 2
        elif _reads_apart(narrow.node):
            doubt += abs(_excess(narrow.node) * _response(node, main))
    return shift, doubt


def _reads_apart(node: Node) -> bool:
    """Whether every unit has an input of its own."""
    return isinstance(node, Conv) and node.params[0] > 1


def _centred_of(view: View) -> View:
    """What an array less its own mean is made from."""
    node = view.node
    if node.is_centred:
        shares = [c * c * term.node.table.mean_square for c, term in zip(node.params, node.args, strict=True)]
        return node.args[int(np.argmax(shares))].within(view.bind)
    return view


def _few_weighted_terms(node: Node) -> tuple[View, View, float] | None:
    """The input and the weights of a sum of few terms, and how many they are."""
    if not isinstance(node, Conv | Contract) or node.width > _FEW:
        return None
    return next(
        (
            (x, w, float(node.width))
            for x, w in (node.args, node.args[::-1])
            if isinstance(w.node, Leaf) and not w.node.is_input
        ),
        None,
    )


def _own_units(main: View) -> set[int]:
    """The places, in a tree's frame, of the axis of units: along it every sum has weights of its own."""
    found = _few_weighted_terms(main.node)
    if found is None:
        return set()
    if isinstance(main.node, Conv):
        channels = main.node.params[4][1]
        return set() if channels is None else {main.bind[channels]}
    x, w, _ = found
    return {main.bind[k] for k in range(len(main.node.axes)) if k in w.bind and k not in x.bind}


def _excess(node: Node) -> float:
    """Excess kurtosis of a narrow sum, its weights given."""
    found = _few_weighted_terms(node)
    if found is None:
        return 0.0
    x, weights, terms = found
    own = getattr(weights.node, "kurtosis", 3.0)
    return (kurtosis(x.node) - 3) * own / (terms + own - 1)


@functools.singledispatch
def kurtosis(node: Node) -> float:
    """E[(x − m)⁴] / Var[x]²; a sum's is Gaussian."""
    return 3.0


@kurtosis.register(Apply)
def kurtosis_of_apply(node: Apply) -> float:
    view = View(node, tuple(range(len(node.axes))))
    own = roots(node)
    live = [r for r in own if not concentrated(r.node)]
    if len(live) != 1:
        return 3.0
    env: Environment = {(r.node.id, r.bind): r.mean(node.axes)[..., None] for r in own if r not in live}
    values = np.asarray(evaluate(view, node.axes, env), float)
    if values.shape[-1] != len(WEIGHTS):
        return 3.0
    values = values - (values @ WEIGHTS)[..., None]
    fourth, square = (float(over_classes(values**k, node.axes) @ WEIGHTS) for k in (4, 2))
    return fourth / max(square, 1e-300) ** 2


def _response(node: Apply, main: View) -> float:
    """a_4 / (√24 a_0) of the square of all factors that read a root, its norm's scale held."""
    a = held_square(node, main, {}) @ HERMITE
    return float(a[4] / (math.sqrt(24) * a[0])) if a[0] > 0 else 0.0


def held_square(node: Apply, main: View, given: Environment) -> np.ndarray:
    """The square of all factors that read a root on the normal grid, the other roots held, classes pooled."""
    product = np.ones(len(WEIGHTS))
    for factor in factors(View(node, tuple(range(len(node.axes)))))[1]:
        own = [r.within(factor.bind) for r in roots(factor.node)]
        if main not in own:
            continue
        env: Environment = {(r.node.id, r.bind): r.mean(node.axes)[..., None] for r in own if r != main}
        values = np.square(np.asarray(evaluate(factor, node.axes, {**env, **given}), float))
        product = product * over_classes(values, node.axes)
    return product
