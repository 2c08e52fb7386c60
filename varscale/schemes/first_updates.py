"""How large a first step an optimizer makes, leaf by leaf: it is part of the law."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import special

from varscale.programs.patterns import canonical
from varscale.programs.trees import is_collections, open_tree
from varscale.report import Report
from varscale.schemes.description import root_mean_square
from varscale.schemes.optimizers import kinds_of, scaled, scalings
from varscale.schemes.parametrization import Kind

if TYPE_CHECKING:
    from varscale.schemes.plan import Plan, PlannedLeaf

_POINTS = 16  # quantiles of gradients, and of weights


def first_updates(
    plan: Plan,
    optimizer: optax.GradientTransformation,
    *,
    kind: Kind | None = None,
    gradients: Report | None = None,
    params: Any = None,
) -> dict[str, float]:
    """The expected size of each parameter's first update over the parameter's own, both as root mean squares.

    The optimizer is run once, with the plan's multipliers, on weights of the plan's sizes and on normal gradients independent
    of them: on 256 of each where it treats each entry alone, and on whole arrays under Muon, as if their gradients had full
    rank. What depends on all parameters together, such as a clip by the global norm, is not seen.

    Args:
        plan: whose laws and multipliers are taken.
        optimizer: an optax optimizer with its learning rate; it is wrapped by `plan.optimizer`, unless it is already.
        kind: as in `plan.optimizer`.
        gradients: what `vs.probe(..., loss=...)` measured: the sizes of the gradients, which the update of SGD is proportional
            to. Adam, Lion and Muon do not need them: by default gradients have the size 1, with no epsilon in sight.
        params: a tree of the parameters, arrays or abstract arrays, for an optimizer that was given a tree of labels or masks;
            by default nested dicts, as linen has them.

    Returns:
        By path; infinity for a parameter that begins at zero, NaN for one whose law does not tell its size.

    Raises:
        ValueError: `gradients` is None and the update depends on their size, or lacks a parameter; and what `plan.optimizer`
            raises.

    >>> import varscale as vs
    >>> from flax import linen as nn
    >>> plan = vs.schemes.fan_in()(nn.Dense(64, use_bias=False), jax.ShapeDtypeStruct((1, 256), "float32"))
    >>> {path: round(size, 4) for path, size in plan.first_updates(optax.adam(0.01)).items()}  # .01 / (1/16)
    {'kernel': 0.16}
    """
    whole = optimizer if hasattr(optimizer, "scalings") else scaled(optimizer, scalings(plan), kind=kind)
    leaves = {canonical(leaf.path): leaf for leaf in plan.leaves}
    tree = open_tree(_nested(leaves) if params is None else params, "params")
    within = is_collections(tree.paths)
    order = [leaves[path.removeprefix("params/") if within else path] for path in tree.paths]

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as optax has it
        shapes = tree.rebuild([jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in order])
        kinds = kinds_of(jax.eval_shape(whole.init, shapes), list(leaves), getattr(whole, "kind", None))
        sizes = _gradients(list(leaves), kinds, gradients)
        given = [sizes[path] * _spread(leaf, kinds[path], axis=0) for leaf in order for path in [canonical(leaf.path)]]
        weights = [_weights(leaf, kinds[canonical(leaf.path)]) for leaf in order]
        updates, _ = jax.jit(lambda g, p: whole.update(g, whole.init(p), p))(tree.rebuild(given), tree.rebuild(weights))
    found = zip(order, jax.tree_util.tree_leaves(updates), strict=True)
    return {leaf.path: _relative(leaf, float(jnp.sqrt(jnp.mean(jnp.square(u))))) for leaf, u in found}


def _nested(leaves: Mapping[str, PlannedLeaf]) -> dict[str, Any]:
    """The leaves' shapes as nested dicts."""
    found: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *keys, last = path.split("/")
        node = found
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
    return found


def _relative(leaf: PlannedLeaf, update: float) -> float:
    size = root_mean_square(leaf.law, leaf.shape)
    if size is None:
        return math.nan
    return update / size if size else math.inf if update else 0.0


def _gradients(paths: list[str], kinds: Mapping[str, Kind], gradients: Report | None) -> dict[str, float]:
    """Root mean squares of the gradients."""
    if gradients is None:
        needy = [path for path in paths if kinds[path] == "sgd"]
        if needy:
            raise ValueError(
                f"gradients must be given for SGD, whose update of {needy[0]!r} is proportional to its gradient: a report of "
                "vs.probe(model, params, x, loss=...)"
            )
        return dict.fromkeys(paths, 1.0)
    missing = [path for path in paths if path not in gradients.weights or gradients.weights[path].gradient is None]
    if missing:
        raise ValueError(f"gradients must hold the gradient of {missing[0]!r}: give a report of vs.probe(..., loss=...)")
    return {path: math.sqrt(gradients.weights[path].gradient or 0.0) for path in paths}


def _shape(leaf: PlannedLeaf, kind: Kind) -> tuple[int, ...]:
    """The shape on which the optimizer is run: the leaf's where the update depends on it, else few entries in as many axes."""
    if kind == "muon" or not leaf.shape:
        return leaf.shape
    return (_POINTS**2, *[1] * (len(leaf.shape) - 1))


def _spread(leaf: PlannedLeaf, kind: Kind, axis: int) -> jax.Array:
    """Normal numbers of mean square 1: quantiles, those of axis 0 independent of those of axis 1."""
    shape = _shape(leaf, kind)
    if kind == "muon":
        return jax.random.normal(jax.random.key(axis), shape)
    if not shape:
        return jnp.ones(())
    quantiles = special.ndtri((np.arange(_POINTS) + 0.5) / _POINTS)
    quantiles /= np.sqrt(np.mean(quantiles**2))
    square = np.broadcast_to(quantiles.reshape(-1, 1) if axis == 0 else quantiles, (_POINTS, _POINTS))
    return jnp.asarray(square.reshape(shape), jnp.float32)


def _weights(leaf: PlannedLeaf, kind: Kind) -> jax.Array:
    """Weights of the size that the leaf's law gives them; zeros where it does not tell."""
    return (root_mean_square(leaf.law, leaf.shape) or 0.0) * _spread(leaf, kind, axis=1)
