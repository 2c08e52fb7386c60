"""Normalization layers as their definitions say, in NumPy and float64: what flax's modules are checked against.

Batch norm: Ioffe and Szegedy 2015; layer norm: Ba et al. 2016; instance norm: Ulyanov et al. 2016; group norm: Wu and He
2018; RMS norm: Zhang and Sennrich 2019. Each subtracts a mean over its own axes, divides by √(variance + ε), then
applies γ and β.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

EPSILON = 1e-3  # large enough that a wrong place for it would show
MOMENTUM = 0.9
GROUPS = 3


@dataclass(frozen=True)
class Case:
    """One normalization: flax's module, and the axes over which the definition takes its statistics.

    Attributes:
      name: as people call it.
      module: makes flax's.
      shape: of the input, channels last.
      axes: over which mean and variance are taken.
      axes_in_words: the same, for the table.
      centred: whether the mean is subtracted.
    """

    name: str
    module: Callable[[], nn.Module]
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    axes_in_words: str
    centred: bool = True

    def direct(self, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
        """The definition, written out."""
        grouped = x.reshape(*x.shape[:-1], GROUPS, -1) if self.name == "group norm" else x
        mean = grouped.mean(axis=self.axes, keepdims=True) if self.centred else 0.0
        variance = np.mean((grouped - mean) ** 2, axis=self.axes, keepdims=True)
        return ((grouped - mean) / np.sqrt(variance + EPSILON)).reshape(x.shape) * gamma + beta


_OPTIONS: dict[str, Any] = {"epsilon": EPSILON, "param_dtype": jnp.float64}


def _batch_norm() -> nn.Module:
    return nn.BatchNorm(use_running_average=False, momentum=MOMENTUM, **_OPTIONS)


CASES = (
    Case("batch norm, dense", _batch_norm, (32, 6), (0,), "N"),
    Case("batch norm, convolution", _batch_norm, (8, 5, 4, 6), (0, 1, 2), "N, H, W"),
    Case("layer norm", lambda: nn.LayerNorm(**_OPTIONS), (32, 6), (1,), "D"),
    Case("instance norm", lambda: nn.InstanceNorm(**_OPTIONS), (8, 5, 4, 6), (1, 2), "H, W"),
    Case("group norm", lambda: nn.GroupNorm(num_groups=GROUPS, **_OPTIONS), (8, 5, 4, 6), (1, 2, 4), "H, W, D/G"),
    Case("RMS norm", lambda: nn.RMSNorm(**_OPTIONS), (32, 6), (1,), "D", centred=False),
)


def formula_errors(key: jax.Array) -> dict[str, np.ndarray]:
    """Largest difference of each module from its formula, and (relative) of batch norm's running averages, in float64."""
    with jax.enable_x64(True):
        wrong = wrong_axes(key)
        errors = {case.name: _error(case, number, key) for number, case in enumerate(CASES)}
        running, inference = _running_errors(key)
    return {
        "modules": np.array([errors[case.name] for case in CASES]),
        "running": np.array(running),
        "inference": np.array(inference),
        "wrong": wrong,
    }


def _inputs(key: jax.Array, shape: tuple[int, ...]) -> np.ndarray:
    """Far from standard in every direction, so that statistics over the wrong axes give something else."""
    x = np.asarray(jax.random.normal(key, shape, jnp.float64))
    offsets = np.add.outer(np.arange(shape[0]) * 0.3, np.arange(shape[-1]) * 0.7)
    return (x + offsets.reshape(shape[0], *(1,) * (len(shape) - 2), shape[-1])) * (1 + np.arange(shape[-1]))


def _error(case: Case, number: int, key: jax.Array) -> float:
    key = jax.random.fold_in(key, number)
    x = _inputs(key, case.shape)
    gamma, beta = (np.asarray(jax.random.normal(k, case.shape[-1:], jnp.float64)) for k in jax.random.split(key))
    beta = beta if case.centred else np.zeros_like(beta)  # RMS norm has no β
    params = {"scale": gamma, "bias": beta} if case.centred else {"scale": gamma}
    variables = case.module().init(key, x)
    y, _ = case.module().apply({**variables, "params": params}, x, mutable=["batch_stats"])
    return float(np.max(np.abs(np.asarray(y) - case.direct(x, gamma, beta))))


def _running_errors(key: jax.Array) -> tuple[float, float]:
    """Batch norm over five batches: its running averages, and what it puts out with them, against the formulas."""
    batches = [_inputs(jax.random.fold_in(key, number), (32, 6)) * (1 + number) for number in range(5)]
    variables: Any = _batch_norm().init(key, batches[0])
    mean, variance = np.zeros(6), np.ones(6)
    for x in batches:
        _, updated = _batch_norm().apply(variables, x, mutable=["batch_stats"])
        variables = {**variables, **updated}
        mean = MOMENTUM * mean + (1 - MOMENTUM) * x.mean(axis=0)
        variance = MOMENTUM * variance + (1 - MOMENTUM) * x.var(axis=0)
    stored = variables["batch_stats"]
    running = max(np.max(np.abs(stored["mean"] / mean - 1)), np.max(np.abs(stored["var"] / variance - 1)))
    y: Any = nn.BatchNorm(use_running_average=True, **_OPTIONS).apply(variables, batches[0])
    expected = (batches[0] - mean) / np.sqrt(variance + EPSILON)
    return float(running), float(np.max(np.abs(np.asarray(y) - expected)))


def wrong_axes(key: jax.Array) -> np.ndarray:
    """How far each definition is from itself over other axes: the smallest difference, so that agreement means something."""
    smallest = []
    for number, case in enumerate(CASES):
        x = _inputs(jax.random.fold_in(key, number), case.shape)
        gamma, beta = np.ones(case.shape[-1]), np.zeros(case.shape[-1])
        right = case.direct(x, gamma, beta)
        others = {other.axes for other in CASES if len(other.shape) == len(case.shape) and "group" not in other.name} - {
            case.axes
        }
        if case.name == "group norm":
            others = {(1, 2), (0, 1, 2)}
        smallest += [np.max(np.abs(replace(case, axes=axes).direct(x, gamma, beta) - right)) for axes in others]
    return np.array(smallest)
