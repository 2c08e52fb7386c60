"""Findings about the loss at step 0: against knowing nothing, and against the frequencies of the labels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varscale.auditing.findings import Finding
from varscale.initializers.conventions import prior_bias
from varscale.initializers.structured import constant
from varscale.report import Report
from varscale.usage.parameters import ParameterUses

_EXCESS = 0.1  # nats above the entropy of the labels' frequencies from which a bias is worth its line


@dataclasses.dataclass(frozen=True, eq=False)
class ClassLabels:
    """The class of each output, for a softmax; negative ones do not count.

    Attributes:
        values: whole numbers, in the shape of the output without its last axis.
        classes: how many there are.
    """

    values: np.ndarray
    classes: int

    @property
    def counts(self) -> np.ndarray:
        return np.bincount(self.values[self.values >= 0].reshape(-1), minlength=self.classes)

    @property
    def entropy(self) -> float:
        """Of the frequencies, in nats."""
        return _entropy(self.counts / self.counts.sum())

    @property
    def prior(self) -> Any:
        """The bias that holds the frequencies, no class being impossible."""
        smoothed = (self.counts + 1) / (self.counts.sum() + self.classes)
        return prior_bias(tuple(map(float, smoothed / math.fsum(smoothed))))

    def loss(self, logits: Any) -> Any:
        """The mean cross-entropy."""
        wanted = jnp.asarray(self.values)
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        told = jnp.take_along_axis(log_p, jnp.maximum(wanted, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(wanted >= 0, told, 0)) / jnp.maximum(jnp.sum(wanted >= 0), 1)


@dataclasses.dataclass(frozen=True, eq=False)
class BinaryLabels:
    """Whether each output is positive, for a sigmoid; negative ones do not count.

    Attributes:
        values: 0, 1 or negative, in the shape of the output.
    """

    values: np.ndarray
    classes = 2

    @property
    def frequencies(self) -> np.ndarray:
        """Of positives, by output."""
        flat = self.values.reshape(-1, self.values.shape[-1] if self.values.ndim > 1 else 1)
        return np.sum(flat == 1, axis=0) / np.maximum(np.sum(flat >= 0, axis=0), 1)

    @property
    def entropy(self) -> float:
        """Of the frequencies, in nats, averaged over outputs."""
        return float(np.mean([_entropy(np.array([p, 1 - p])) for p in self.frequencies]))

    @property
    def prior(self) -> Any:
        """The bias that holds the frequencies, none being certain."""
        n = self.values.size / len(self.frequencies)
        smoothed = (self.frequencies * n + 1) / (n + 2)
        return constant(tuple(map(float, np.log(smoothed / (1 - smoothed)))))

    def loss(self, logits: Any) -> Any:
        """The mean cross-entropy."""
        wanted = jnp.asarray(self.values)
        signed = jnp.where(wanted == 1, 1.0, -1.0) * logits.astype(jnp.float32).reshape(wanted.shape)
        return jnp.sum(jnp.where(wanted >= 0, jax.nn.softplus(-signed), 0)) / jnp.maximum(jnp.sum(wanted >= 0), 1)


Labels = ClassLabels | BinaryLabels


def checked_labels(labels: Any, report: Report) -> Labels:
    """The labels, if they fit the model's output: a class of each, or 0 and 1 in its own shape or for its one logit.

    Raises:
        ValueError: they are no whole numbers of such a shape, none counts, or one is no class.
    """
    found, shape = np.asarray(labels), report.output.shape
    binary = found.shape == shape or (shape[-1:] == (1,) and found.shape == shape[:-1])
    if found.dtype.kind not in "iub" or not (binary or found.shape == shape[:-1]) or not found.size:
        own = f"{shape[:-1]}, the class of each output, or {shape}, 0 and 1"
        raise ValueError(f"labels must be whole numbers of shape {own}, not {found.dtype} of shape {found.shape}")
    found = found.astype(np.int64)
    classes = 2 if binary else shape[-1]
    if found.max() >= classes:
        raise ValueError(f"labels must be below {classes}, the number of classes, but {found.max()} is among them")
    if found.max() < 0:
        raise ValueError("labels must be 0 or more somewhere: negative ones do not count")
    return BinaryLabels(found) if binary else ClassLabels(found, classes)


def check_loss(value: float, classes: int) -> Iterator[Finding]:
    """A loss that is far above that of knowing nothing about so many classes."""
    if classes > 1 and _is_far(value, classes):
        told = f"the loss is {value:.4g} at step 0, where knowing nothing about {classes} classes gives ln {classes} = "
        told += f"{math.log(classes):.3g}: the first steps only unlearn the logits' scale."
        yield Finding("VS120", "warning", "", told, value, "draw the readout smaller: kernel_init=vs.zeros")


def check_prior(value: float, labels: Labels, parameters: Sequence[ParameterUses]) -> Iterator[Finding]:
    """A cross-entropy at step 0 that is above the entropy of the labels' frequencies, which a bias alone reaches."""
    entropy = labels.entropy
    if value < entropy + _EXCESS or _is_far(value, labels.classes):  # of which `check_loss` says the cause
        return
    paths = {p.path for p in parameters}
    biases = [f"{p.path.rpartition('/')[0]}/bias" for p in parameters if any(use.role == "readout" for use in p.uses)]
    bias = next((path for path in biases if path in paths), "")
    told = f"the loss is {value:.4g} at step 0, and the entropy of the labels' frequencies is {entropy:.4g}: the first steps "
    told += "only learn how frequent each class is, which a bias can hold from the start."
    mend = "bias_init=vs.prior_bias(p), p the labels' frequencies"
    yield Finding("VS120", "info", bias, told, value - entropy, mend, {bias: labels.prior} if bias else {})


def _is_far(value: float, classes: int) -> bool:
    return value > 1.5 * math.log(classes) + 0.5


def _entropy(frequencies: np.ndarray) -> float:
    some = frequencies[frequencies > 0]
    return float(-np.sum(some * np.log(some)))
