"""Every module that registers rules, or laws of kinds of nodes: imported for that, and read by nobody."""

from varscale.theory.propagation import (  # noqa: F401
    conditional_samples,
    cross_means,
    cross_slices,
    elementwise_moments,
    pullbacks,
    second_moments,
)
from varscale.theory.rules import (  # noqa: F401
    associative_scan,
    axis,
    complex,
    concatenation,
    control,
    convolution,
    elementwise,
    linear,
    lookup,
    pooling,
    random,
    reductions,
    segments,
    spatial_correlation,
)
