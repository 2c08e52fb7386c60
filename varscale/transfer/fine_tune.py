"""Partial and discriminative fine-tuning: rules by path over optax's own partition."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from varscale.programs.patterns import Pattern
from varscale.programs.trees import open_tree
from varscale.transfer.rules import Rule, Rules, assign, checked, rule_of

if TYPE_CHECKING:
    import optax


class MultiplierState(NamedTuple):
    """How many updates were made: what schedules of multipliers are asked for."""

    count: Int[Array, ""]


def fine_tune(optimizer: "optax.GradientTransformation", rules: Rules) -> "optax.GradientTransformationExtraArgs":
    """An optimizer that trains every leaf at the rate its rule says, and frozen leaves not at all.

    Multipliers scale the optimizer's UPDATE, and so its learning rate (and with it the weight decay that adamw and the like
    include), not the gradient, which Adam would be blind to. All leaves that train share one instance of `optimizer`: clipping
    by global norm sees them together. A frozen leaf has no optimizer state, its gradient is never looked at (it may be NaN), it
    does not decay, and it stays as it is to the bit, −0.0 and NaN included (but for subnormal numbers, below 1.2e-38, which XLA
    flushes to zero when `optax.apply_updates` adds anything to them). A multiplier of 0, or a schedule that is at 0, leaves a
    leaf equally unchanged but keeps its state up to date.

    Args:
      optimizer: any optax optimizer.
      rules: from patterns over paths to "freeze", a multiplier (0 or more), or a schedule from step to multiplier. The first
        that matches counts; a leaf that no rule catches trains at the optimizer's own rate. See `head_only`, `layerwise_decay`
        and `gradual_unfreezing`, and `assign(rules, params)` for the table of what catches what.

    Returns:
      A transformation for any tree: linen params, an nnx.State (and so nnx.Optimizer), nested dicts. Works inside jit.

    Raises:
      ValueError: a rule says nothing that is allowed; at `init`, a rule catches no leaf.

    Example:
      `vs.transfer.fine_tune(optax.adamw(1e-3), {"head": 1.0, "**/bias": "freeze", "**": 0.1})`
    """
    import optax

    ordered = checked(rules)

    def labels(params: Any) -> Any:
        caught = assign(ordered, params).leaves
        return open_tree(params, "params").rebuild(["frozen" if leaf.rule == "freeze" else "trained" for leaf in caught])

    trained = optax.chain(optimizer, _multiply(ordered))
    return optax.with_extra_args_support(optax.partition({"trained": trained, "frozen": _hold()}, labels))


def _multiply(rules: Sequence[tuple[Pattern, Rule]]) -> "optax.GradientTransformation":
    """Scale every leaf's update by the multiplier of its rule."""
    import optax

    def init(params: Any) -> MultiplierState:
        del params
        return MultiplierState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MultiplierState]:
        del params
        tree = open_tree(updates, "updates")  # the frozen leaves are masked, and so are no leaves here
        scaled = [_scaled(leaf.value, _multiplier(rule_of(rules, leaf.path), state.count)) for leaf in tree.leaves]
        return tree.rebuild(scaled), MultiplierState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformation(init, update)


def _hold() -> "optax.GradientTransformation":
    """Updates that leave any parameter as it is, to the bit: x + (−0) is x for every x, where −0 + 0 would be +0."""
    import optax

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, _nothing(leaf)), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _multiplier(rule: Rule, count: Int[Array, ""]) -> Any:
    return rule(count) if callable(rule) else rule


def _scaled(update: jax.Array, multiplier: Any) -> jax.Array:
    if isinstance(multiplier, int | float):
        return (
            jnp.full_like(update, _nothing(update)) if multiplier == 0 else update if multiplier == 1 else update * multiplier
        )
    factor = jnp.asarray(multiplier)
    # Not 0 · update: a gradient that is not finite would come through, and −0 become +0.
    return jnp.where(factor == 0, jnp.full_like(update, _nothing(update)), update * factor.astype(update.dtype))


def _nothing(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return complex(-0.0, -0.0)
    return -0.0 if jnp.issubdtype(leaf.dtype, jnp.floating) else 0
