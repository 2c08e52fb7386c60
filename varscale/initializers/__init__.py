"""Initializers: pure functions (key, shape, dtype, out_sharding) -> weights, each a frozen, hashable value."""

from varscale.initializers.combinators import fused, masked, scaled
from varscale.initializers.conventions import (
    embedding,
    log_prior_bias,
    lstm_bias,
    prior_bias,
    pytorch_bias,
    pytorch_linear,
    siren,
    siren_first,
)
from varscale.initializers.fans import Fans, compute_fans, conv_fans, einsum_fans
from varscale.initializers.fixed import cut_normal, normal, symmetric_uniform, truncated_normal
from varscale.initializers.gains import gain, pytorch_gain
from varscale.initializers.initializer import Initializer
from varscale.initializers.scaling import (
    VarianceScaling,
    for_activation,
    glorot_normal,
    glorot_uniform,
    he_normal,
    he_uniform,
    kaiming_normal,
    kaiming_uniform,
    lecun_normal,
    lecun_uniform,
    variance_scaling,
    xavier_normal,
    xavier_uniform,
)
from varscale.initializers.structured import (
    constant,
    delta_orthogonal,
    dirac,
    identity,
    ones,
    orthogonal,
    sparse,
    zeros,
)

__all__ = [
    "Fans",
    "Initializer",
    "VarianceScaling",
    "compute_fans",
    "constant",
    "conv_fans",
    "cut_normal",
    "delta_orthogonal",
    "dirac",
    "einsum_fans",
    "embedding",
    "for_activation",
    "fused",
    "gain",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "identity",
    "kaiming_normal",
    "kaiming_uniform",
    "lecun_normal",
    "lecun_uniform",
    "log_prior_bias",
    "lstm_bias",
    "masked",
    "normal",
    "ones",
    "orthogonal",
    "prior_bias",
    "pytorch_bias",
    "pytorch_gain",
    "pytorch_linear",
    "scaled",
    "siren",
    "siren_first",
    "sparse",
    "symmetric_uniform",
    "truncated_normal",
    "variance_scaling",
    "xavier_normal",
    "xavier_uniform",
    "zeros",
]


def __getattr__(name: str) -> None:
    from varscale.initializers.names_elsewhere import advice

    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{advice(name, __all__)}")
