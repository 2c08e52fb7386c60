"""Findings about the loss at step 0: against knowing nothing, and against the frequencies of the labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varscale.auditing.findings import Finding
from varscale.initializers.conventions import prior_bias
from varscale.report import Report
from varscale.usage.parameters import ParameterUses

_EXCESS = 0.1  # nats above the entropy of the labels' frequencies from which a bias is worth its line


def cross_entropy(labels: Any) -> Any:
    """The mean cross-entropy of logits against labels, as a function of the logits; negative labels do not count."""
    wanted = jnp.asarray(labels)

    def loss(logits: Any) -> Any:
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        told = jnp.take_along_axis(log_p, jnp.maximum(wanted, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(wanted >= 0, told, 0)) / jnp.maximum(jnp.sum(wanted >= 0), 1)

    return loss


def checked_labels(labels: Any, report: Report) -> np.ndarray:
    """The labels, if they fit the model's output.

    Raises:
        ValueError: they are no whole numbers below the number of classes, in the shape of the output without its last axis.
    """
    found, shape = np.asarray(labels), report.output.shape
    if found.dtype.kind not in "iu" or found.shape != shape[:-1] or not found.size:
        raise ValueError(f"labels must be whole numbers of shape {shape[:-1]}, not {found.dtype} of shape {found.shape}")
    if found.max() >= shape[-1]:
        raise ValueError(f"labels must be below {shape[-1]}, the number of classes, but {found.max()} is among them")
    return found


def check_loss(value: float, report: Report) -> Iterator[Finding]:
    """A loss that is far above that of knowing nothing about as many classes as there are outputs."""
    classes = report.output.shape[-1] if report.output.shape else 1
    if classes > 1 and value > 1.5 * math.log(classes) + 0.5:
        told = f"the loss is {value:.4g} at step 0, where knowing nothing about {classes} classes gives ln {classes} = "
        told += f"{math.log(classes):.3g}: the first steps only unlearn the logits' scale."
        yield Finding("VS120", "warning", "", told, value, "draw the readout smaller: kernel_init=vs.zeros")


def check_prior(value: float, labels: np.ndarray, report: Report, parameters: Sequence[ParameterUses]) -> Iterator[Finding]:
    """A cross-entropy at step 0 that is above the entropy of the labels' frequencies, which a bias alone reaches."""
    classes = report.output.shape[-1]
    counts = np.bincount(labels[labels >= 0].reshape(-1), minlength=classes)
    frequencies = counts / counts.sum()
    entropy = float(-np.sum(frequencies[counts > 0] * np.log(frequencies[counts > 0])))
    if value < entropy + _EXCESS or value > 1.5 * math.log(classes) + 0.5:  # of which `check_loss` says the cause
        return
    paths = {p.path for p in parameters}
    biases = [f"{p.path.rpartition('/')[0]}/bias" for p in parameters if any(use.role == "readout" for use in p.uses)]
    bias = next((path for path in biases if path in paths), "")
    told = f"the loss is {value:.4g} at step 0, and the entropy of the labels' frequencies is {entropy:.4g}: the first steps "
    told += "only learn how frequent each class is, which a bias can hold from the start."
    smoothed = (counts + 1) / (counts.sum() + classes)
    law = prior_bias(tuple(map(float, smoothed / math.fsum(smoothed))))
    mend = "bias_init=vs.prior_bias(p), p the labels' frequencies"
    yield Finding("VS120", "info", bias, told, value - entropy, mend, {bias: law} if bias else {})
