"""Every module that registers rules, or laws of kinds of nodes: imported for that, and read by nobody."""

# ruff: noqa: F401

from varscale.theory.propagation import cross_axis_maps, pullbacks, sample_moments, second_moments, sums
from varscale.theory.rules import (
    attention,
    axis,
    concatenation,
    control,
    convolution,
    elementwise,
    linear,
    log_sum_exp,
    lookup,
    pooling,
    random,
    reductions,
    softmax_recognition,
)
