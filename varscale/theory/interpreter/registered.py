"""Every module that registers rules, or laws of kinds of nodes: imported for that, and read by nobody."""

from varscale.theory.propagation import (  # noqa: F401
    cross_axis_maps,
    products,
    pullbacks,
    sample_moments,
    second_moments,
    sums,
)
from varscale.theory.rules import (  # noqa: F401
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
