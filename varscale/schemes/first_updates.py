"""How large a first step an optimizer makes, leaf by leaf: it is part of the law."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
_SMALL = 1e-3  # size of gradients beside those of size 1: updates that differ by _SAME depend on it
_SAME = 0.01


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
        gradients: what `vs.probe(..., loss=...)` measured: the sizes of the gradients. They are needed where the first update
            depends on them, as that of SGD, Adagrad and RAdam does (RAdam divides by no second moment in its first steps).
            Adam, Lion and Muon do not need them: by default gradients have the size 1.
        params: a tree of the parameters, arrays or abstract arrays, for an optimizer that was given a tree of labels or masks;
            by default nested dicts, as linen has them.

    Returns:
        By path; infinity for a parameter that begins at zero, NaN for one whose law does not tell its size.

    Raises:
        ValueError: `gradients` is None and an update differs by 1 % or more between gradients of the sizes 1 and 1e-3, or
            lacks a parameter; and what `plan.optimizer` raises.

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
        names = [canonical(leaf.path) for leaf in order]

        def updates(gradients: Mapping[str, float], kinds: Mapping[str, Kind]) -> list[float]:
            """Root mean squares of the first updates; `kinds` says which leaves are whole."""
            found = [gradients[name] * _spread(leaf, kinds[name], axis=0) for name, leaf in zip(names, order, strict=True)]
            weights = [_weights(leaf, kinds[name]) for name, leaf in zip(names, order, strict=True)]
            step = jax.jit(lambda g, p: whole.update(g, whole.init(p), p)[0])
            made = jax.tree_util.tree_leaves(step(tree.rebuild(found), tree.rebuild(weights)))
            return [float(jnp.sqrt(jnp.mean(jnp.square(update)))) for update in made]

        if gradients is None:
            sizes = dict.fromkeys(names, 1.0)
            few: dict[str, Kind] = {name: "adam" for name in names}  # few entries tell it, under Muon too
            large, small = (updates(dict.fromkeys(names, size), few) for size in (1.0, _SMALL))
            _check_scale_free(order, large, small)
        else:
            sizes = _gradients(names, gradients)
        return {leaf.path: _relative(leaf, size) for leaf, size in zip(order, updates(sizes, kinds), strict=True)}


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


def _check_scale_free(leaves: Sequence[PlannedLeaf], large: Sequence[float], small: Sequence[float]) -> None:
    """Without gradients, updates must not depend on their size; those of zeros are infinite beside them in any case."""
    for leaf, one, other in zip(leaves, large, small, strict=True):
        if root_mean_square(leaf.law, leaf.shape) != 0 and abs(one - other) > _SAME * max(one, other):
            raise ValueError(
                f"gradients must be given: the first update of {leaf.path!r} depends on the size of its gradient, as those of "
                "SGD, Adagrad and RAdam do; give a report of vs.probe(model, params, x, loss=...)"
            )


def _gradients(paths: Sequence[str], gradients: Report) -> dict[str, float]:
    """Root mean squares of the gradients."""
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
