"""Multipliers of learning rate, Adam's epsilon and weight decay, leaf by leaf, around any optax optimizer."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import optax

from varscale.programs.patterns import canonical
from varscale.programs.trees import open_tree
from varscale.reporting.layout import Column, terminal_width, text_table
from varscale.schemes.parametrization import KINDS, Kind, Scaling

if TYPE_CHECKING:
    from varscale.schemes.plan import Plan

# By the name of an optimizer's state: the kind of its updates, and the field that holds an array a parameter.
_STATES: Mapping[str, tuple[Kind, str]] = {
    "MuonState": ("muon", "mu"),
    "ScaleByAdamState": ("adam", "mu"),
    "ScaleByAmsgradState": ("adam", "mu"),
    "ScaleByBeliefState": ("adam", "mu"),
    "ScaleByAdanState": ("adam", "m"),
    "ScaleByAdemamixState": ("adam", "m2"),
    "ScaleBySimplifiedAdEMAMixState": ("adam", "m"),
    "ScaleByRmsState": ("adam", "nu"),
    "ScaleByRmsWithCountState": ("adam", "nu"),
    "ScaleByRStdDevState": ("adam", "nu"),
    "ScaleByRStdDevWithCountState": ("adam", "nu"),
    "ScaleByRssState": ("adam", "sum_of_squares"),
    "ScaleByLionState": ("lion", "mu"),
    "TraceState": ("sgd", "trace"),
}
_FIRST = ("muon", "lion", "adam", "sgd")  # where several states hold a parameter: momentum before Adam is part of Adam


class Scaled(optax.GradientTransformationExtraArgs):
    """An optax optimizer with multipliers leaf by leaf: an ordinary `optax.GradientTransformation`, and printable.

    Attributes:
        scalings: the multipliers, by path of the parameter.
        kind: the kind of optimizer that was given; None where it is read from the optimizer's state.
        decays: by path, the multiplier of the weight decay; empty where the optimizer's own decay is left as it is.
    """

    scalings: Mapping[str, Scaling]
    kind: Kind | None
    decays: Mapping[str, float]

    def table(self, width: int | None = None) -> str:
        """The multipliers as text that fits the terminal, a line a parameter.

        Args:
            width: columns of the terminal; None for the terminal's own, 80 where there is none.
        """
        paths = list(self.scalings)
        kinds: tuple[Kind, ...] = (self.kind,) if self.kind else ("adam", "sgd", "muon")
        rates = [
            Column(
                "learning rate" if self.kind else f"learning rate, {kind}",
                tuple(f"{self.scalings[path].learning_rate(kind):.4g}" for path in paths),
                i,
            )
            for i, kind in enumerate(kinds)
        ]
        epsilon = [Column("epsilon", tuple(f"{self.scalings[path].epsilon:.4g}" for path in paths), 3)]
        decay = [Column("weight decay", tuple(f"{self.decays[path]:.4g}" for path in paths), 4)] if self.decays else []
        columns = [Column("path", tuple(paths), is_left=True), *rates, *epsilon, *decay]
        return text_table(columns, terminal_width(width))[0]

    def __str__(self) -> str:
        return self.table()

    __repr__ = __str__


def scalings(plan: Plan) -> dict[str, Scaling]:
    """The multipliers of a plan, by path of the parameter."""
    return {
        leaf.path: Scaling(
            adam=leaf.multiplier("adam_learning_rate"),
            sgd=leaf.multiplier("sgd_learning_rate"),
            muon=leaf.multiplier("muon_learning_rate"),
            epsilon=leaf.multiplier("adam_epsilon"),
        )
        for leaf in plan.leaves
    }


def scaled(
    optimizer: optax.GradientTransformation | optax.MultiSteps, multipliers: Mapping[str, Scaling], *, kind: Kind | None = None
) -> Scaled:
    """An optax optimizer whose learning rates and epsilon are multiplied leaf by leaf.

    Updates are multiplied after the optimizer; a decay of the optimizer's own, such as that of `optax.adamw`, is part of them
    and is multiplied too (`adamw` here keeps it). Gradients are divided by epsilon's multiplier before Adam, which is the same
    as Adam with its epsilon multiplied: m·μ / (√(m²ν) + ε) = μ / (√ν + ε/m). What looks at the size of gradients, such as
    `optax.clip_by_global_norm`, must therefore stand outside: `optax.chain(optax.clip_by_global_norm(1.0), scaled(...))`.

    Args:
        optimizer: any optax optimizer, `optax.MultiSteps` too.
        multipliers: by path of the parameter.
        kind: "adam", "lion", "sgd" or "muon", of an optimizer whose state does not tell, such as SGD without momentum.

    Raises:
        TypeError: `optimizer` is no optax optimizer.
        ValueError: `kind` is unknown. At `init`: the optimizer's state does not tell its kind and `kind` is None, a parameter
            is not among `multipliers`, or something stands before Adam in its chain.

    >>> import jax, jax.numpy as jnp
    >>> tx = scaled(optax.adam(0.1), {"w": Scaling(adam=0.25, epsilon=0.25), "b": Scaling()})
    >>> params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    >>> with jax.numpy_dtype_promotion("standard"):  # which optax's Adam needs
    ...     updates, _ = tx.update(params, tx.init(params))
    >>> {name: round(float(u[0]), 4) for name, u in updates.items()}
    {'b': -0.1, 'w': -0.025}
    """
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    if not (isinstance(optimizer, tuple) and callable(getattr(optimizer, "update", None))):
        raise TypeError(f"optimizer must be an optax optimizer, not {optimizer!r}")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, not {kind!r}")
    inner = optax.with_extra_args_support(optimizer)
    given = {canonical(path): scaling for path, scaling in multipliers.items()}

    def before(tree: Any, kinds: Mapping[str, Kind]) -> Any:
        return _times(tree, lambda path: 1 / given[path].epsilon if kinds[path] == "adam" else 1.0)

    def init(params: Any) -> Any:
        state = inner.init(params)
        paths = _paths(params)
        _check_known(paths, given)
        kinds = kinds_of(state, paths, kind)
        if any(kinds[path] == "adam" and given[path].epsilon != 1 for path in paths):
            _check_adam_is_first(state)
        return state

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        kinds = kinds_of(state, _paths(updates), kind)
        updates, state = inner.update(before(updates, kinds), state, params, **extra)
        return _times(updates, lambda path: given[path].learning_rate(kinds[path])), state

    return _made(init, update, multipliers, kind, {})


def adamw(
    learning_rate: optax.ScalarOrSchedule, multipliers: Mapping[str, Scaling], *, weight_decay: float = 1e-4, **options: Any
) -> Scaled:
    """AdamW with learning rates, epsilon and decay multiplied leaf by leaf.

    Each parameter's decay is multiplied by the inverse of its learning rate's multiplier, so that the share that decays in a
    step, their product, is that of the base.

    Args:
        learning_rate: the base's.
        multipliers: by path of the parameter.
        weight_decay: the base's; it is multiplied by the learning rate, as in `optax.adamw`.
        **options: of `optax.adamw`: b1, b2, eps, eps_root, mu_dtype, nesterov, mask.
    """
    mask = options.pop("mask", None)
    # Added after the multipliers: the decay of a step is learning_rate · weight_decay for every parameter.
    whole = optax.chain(
        scaled(optax.scale_by_adam(**options), multipliers),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    decays = {path: x.weight_decay("adam") for path, x in multipliers.items()}
    return _made(whole.init, whole.update, multipliers, "adam", decays)


def _made(init: Callable[..., Any], update: Callable[..., Any], scalings: Any, kind: Any, decays: Any) -> Scaled:
    made = Scaled(init, update)
    made.scalings, made.kind, made.decays = dict(scalings), kind, decays
    return made


def _paths(tree: Any) -> list[str]:
    """Paths of the leaves, the collection "params" left out, in the order of `jax.tree.leaves`."""
    paths = open_tree(tree, "params").paths
    within = bool(paths) and all(path.startswith("params/") for path in paths)
    return [path.removeprefix("params/") if within else path for path in paths]


def _times(tree: Any, factor: Callable[[str], float]) -> Any:
    """Every leaf times the factor of its path."""
    leaves, structure = jax.tree_util.tree_flatten(tree)
    factors = [factor(path) for path in _paths(tree)]
    return jax.tree_util.tree_unflatten(structure, [x if f == 1 else x * f for x, f in zip(leaves, factors, strict=True)])


def _check_known(paths: Sequence[str], scalings: Mapping[str, Scaling]) -> None:
    unknown = [path for path in paths if path not in scalings]
    if unknown:
        raise ValueError(
            f"params: the plan has no parameter {unknown[0]!r} (it has {', '.join(list(scalings)[:4])}, ...); give the tree of "
            "parameters that the plan was made for"
        )


def kinds_of(state: Any, paths: Sequence[str], kind: Kind | None = None) -> dict[str, Kind]:
    """The kind of optimizer that each parameter is updated by, read from the types in the optimizer's state.

    Args:
        state: the state of an optax optimizer.
        paths: paths of the parameters.
        kind: of those whose kind the state does not tell.

    Raises:
        ValueError: the state does not tell, and `kind` is None.
    """
    found: dict[str, set[Kind]] = collections.defaultdict(set)
    for node in _known_states(state):
        of, field = _STATES[type(node).__name__]
        for path in _paths(getattr(node, field)):
            found[path].add(of)
    if kind is None:
        silent = [path for path in paths if path not in found]
        if silent:
            raise ValueError(
                f"kind must be given, one of {', '.join(map(repr, KINDS))}: the optimizer's state does not tell how "
                f"{silent[0]!r} is updated (that of SGD without momentum is empty)"
            )
        return {path: next(of for of in _FIRST if of in found[path]) for path in paths}
    return dict.fromkeys(paths, kind)


def _known_states(state: Any) -> list[Any]:
    leaves = jax.tree_util.tree_leaves(state, is_leaf=lambda node: type(node).__name__ in _STATES)
    return [node for node in leaves if type(node).__name__ in _STATES]


def _check_adam_is_first(state: Any) -> None:
    """Nothing may stand before Adam in a chain: it would see gradients that are scaled for epsilon."""
    for chain in _chains(state):
        holds = [any(_STATES[type(node).__name__][0] == "adam" for node in _known_states(part)) for part in chain]
        if any(holds) and not holds[0]:
            raise ValueError(
                "optimizer: something stands before Adam in its chain, such as optax.clip_by_global_norm, and would see "
                "gradients that are scaled for Adam's epsilon; put it outside: optax.chain(clip, plan.optimizer(adam))"
            )


def _chains(node: Any) -> Iterator[tuple[Any, ...]]:
    """The states of chains within a state: plain tuples."""
    if type(node) is tuple:
        yield node
    if type(node).__name__ in _STATES:
        return
    parts = node.values() if isinstance(node, Mapping) else node if isinstance(node, tuple | list) else ()
    for part in parts:
        yield from _chains(part)
