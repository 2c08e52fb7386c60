"""What people look for on the first day, under the names they look for: conventions of other libraries and of papers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact, Key

from varscale.initializers.distributions import DistributionName, distribution
from varscale.initializers.fans import Axes, Fans, compute_fans, normalized_axes
from varscale.initializers.fixed import SymmetricUniform, symmetric_uniform
from varscale.initializers.initializer import Initializer, checked_number, settle
from varscale.initializers.sampling import OutSharding, placed
from varscale.initializers.scaling import VarianceScaling, he_uniform, variance_scaling
from varscale.initializers.structured import Constant, constant


def pytorch_linear(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), dtype: DTypeLike | None = None
) -> VarianceScaling:
    """The kernel of PyTorch's Linear and Conv by default: uniform in ±1/√fan_in, so E[y²] = E[x²]/3.

    PyTorch spells it `kaiming_uniform_(weight, a=math.sqrt(5))`. Arguments and errors: `variance_scaling`.

    >>> import jax
    >>> round(float(abs(pytorch_linear()(jax.random.key(0), (100, 256))).max()), 3)
    0.1
    """
    return he_uniform(in_axis, out_axis, batch_axis, dtype, negative_slope=math.sqrt(5))


def pytorch_bias(fan_in: float, dtype: DTypeLike | None = None) -> SymmetricUniform:
    """The bias of PyTorch's Linear and Conv by default: uniform in ±1/√fan_in, fan_in that of the kernel beside it.

    Raises:
        TypeError: fan_in is no number.
        ValueError: fan_in is not finite and positive.

    >>> pytorch_bias(fan_in=100)
    symmetric_uniform(bound=0.1)
    """
    return symmetric_uniform(1 / math.sqrt(checked_number("fan_in", fan_in, above=0.0)), dtype)


def embedding(
    second_moment: float = 1.0, distribution: DistributionName = "normal", dtype: DTypeLike | None = None
) -> VarianceScaling:
    """A table of embeddings (vocabulary, features) whose rows have the given second moment: a row is copied, so fan_in is 1.

    (flax's default gives 1/features, right for a table that is used as an output projection too.)

    Args:
        second_moment: E[y²] of what the lookup gives; .02² for GPT-2.
        distribution: as in `variance_scaling`.
        dtype: the default dtype of the weights.

    Raises:
        ValueError: second_moment is not finite and positive, or unknown distribution.

    >>> import jax
    >>> table = embedding()(jax.random.key(0), (1000, 64))
    >>> round(float((table**2).mean()), 1)
    1.0
    """
    moment = checked_number("second_moment", second_moment, above=0.0)
    return variance_scaling(moment, "fan_in", distribution, dtype=dtype, fans=Fans(1.0, 1.0))


@dataclasses.dataclass(frozen=True, repr=False)
class LstmBias(Initializer):
    """Zeros, but for the forget gate's block. Made by `lstm_bias`."""

    maker: ClassVar[str] = "lstm_bias"

    forget: float = 1.0
    gates: str = "ifgo"
    dtype: np.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, forget=checked_number("forget", self.forget))
        if not isinstance(self.gates, str) or self.gates.count("f") != 1:
            raise ValueError(f"gates must be a string with one letter a gate and one 'f', such as 'ifgo', not {self.gates!r}")

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if not shape or shape[-1] % len(self.gates):
            raise ValueError(f"shape must end in a multiple of {len(self.gates)} (gates {self.gates!r}), but is {shape}")

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        row = np.repeat([self.forget if gate == "f" else 0.0 for gate in self.gates], shape[-1] // len(self.gates))
        return placed(lambda _: jnp.broadcast_to(jnp.array(row, dtype), shape), key, out_sharding)


def lstm_bias(forget: float = 1.0, gates: str = "ifgo", dtype: DTypeLike | None = None) -> LstmBias:
    """The bias of an LSTM's packed gates: `forget` on the forget gate, so that a cell remembers at first, 0 on the others.

    Args:
        forget: the forget gate's bias.
        gates: the order of the blocks along the last axis; "ifgo" is flax's and PyTorch's.
        dtype: the default dtype of the bias.

    Raises:
        TypeError: forget is no number.
        ValueError: forget is not finite, gates has no single 'f'; when called: the gates do not divide the last axis.

    Source: Jozefowicz, Zaremba & Sutskever 2015, "An Empirical Exploration of Recurrent Network Architectures", section 5.

    >>> import jax
    >>> lstm_bias()(jax.random.key(0), (8,))
    Array([0., 0., 1., 1., 0., 0., 0., 0.], dtype=float32)
    """
    return LstmBias(forget, gates, dtype)  # pyright: ignore[reportArgumentType]


def log_prior_bias(prior: float | Sequence[float], dtype: DTypeLike | None = None) -> Constant:
    """The bias of a classifier's head with which it starts at the classes' frequencies, and not with a jump of the loss.

    Args:
        prior: one probability for a sigmoid head (RetinaNet's .01): its log-odds; or one a class for a softmax: their logs.
        dtype: the default dtype of the bias.

    Returns:
        A constant: one number, or one a class.

    Raises:
        TypeError: prior is not made of numbers.
        ValueError: a probability outside (0, 1), or classes that do not sum to 1.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", section 4.1.

    >>> log_prior_bias(0.5)
    constant(0.0)
    """
    if not isinstance(prior, (Sequence, np.ndarray)) or isinstance(prior, (str, bytes)):
        p = checked_number("prior", prior, above=0.0, below=1.0)
        return constant(math.log(p) - math.log1p(-p), dtype)
    classes = [checked_number("prior", p, above=0.0, below=1.0) for p in prior]
    if not math.isclose(math.fsum(classes), 1.0, rel_tol=1e-6):
        raise ValueError(f"prior must sum to 1 over the classes, but {prior!r} sums to {math.fsum(classes):g}")
    return constant(tuple(math.log(p) for p in classes), dtype)


prior_bias = log_prior_bias


def siren(
    omega: float = 30.0, in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), dtype: DTypeLike | None = None
) -> VarianceScaling:
    """The hidden layers of a SIREN, y = sin(ω W x): uniform in ±√(6/fan_in)/ω.

    Args:
        omega: the frequency ω by which the layer's output is multiplied before the sine.
        in_axis: as in `variance_scaling`.
        out_axis: as in `variance_scaling`.
        batch_axis: as in `variance_scaling`.
        dtype: as in `variance_scaling`.

    Raises:
        ValueError: omega is not finite and positive.

    Source: Sitzmann et al. 2020, "Implicit Neural Representations with Periodic Activation Functions", section 3.2.

    >>> import jax
    >>> round(float(abs(siren(30.0)(jax.random.key(0), (256, 256))).max() * 30), 3)  # √(6/256)
    0.153
    """
    frequency = checked_number("omega", omega, above=0.0)
    return variance_scaling(2.0 / frequency**2, "fan_in", "uniform", in_axis, out_axis, batch_axis, dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class SirenFirst(Initializer):
    """Uniform in ±1/fan_in. Made by `siren_first`."""

    maker: ClassVar[str] = "siren_first"

    in_axis: int | tuple[int, ...] = -2
    out_axis: int | tuple[int, ...] = -1
    batch_axis: int | tuple[int, ...] = ()
    dtype: np.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        axes = {name: normalized_axes(name, getattr(self, name)) for name in ("in_axis", "out_axis", "batch_axis")}
        settle(self, **axes)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        compute_fans(shape, self.in_axis, self.out_axis, self.batch_axis)

    def _draw(
        self, key: Key[Array, ""], shape: tuple[int, ...], dtype: np.dtype, out_sharding: OutSharding
    ) -> Inexact[Array, "*shape"]:
        fan_in = compute_fans(shape, self.in_axis, self.out_axis, self.batch_axis).fan_in
        return distribution("uniform").draw(key, shape, 1 / (3 * fan_in**2), dtype, out_sharding)


def siren_first(in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), dtype: DTypeLike | None = None) -> SirenFirst:
    """The first layer of a SIREN: uniform in ±1/fan_in, so that sin(ω W x) spans its periods on inputs in [−1, 1].

    Args:
        in_axis: as in `variance_scaling`.
        out_axis: as in `variance_scaling`.
        batch_axis: as in `variance_scaling`; 0 for many SIRENs stacked as (nets, in, out).
        dtype: the default dtype of the weights.

    Raises:
        TypeError: an axis is not made of integers, or dtype not floating or complex.
        ValueError: an axis is repeated; when called: the axes do not fit the shape.

    Source: Sitzmann et al. 2020, "Implicit Neural Representations with Periodic Activation Functions", section 3.2.

    >>> import jax
    >>> w = siren_first(batch_axis=0)(jax.random.key(0), (8, 2, 256))  # eight SIRENs of two coordinates
    >>> round(float(abs(w).max()), 2)
    0.5
    """
    return SirenFirst(in_axis, out_axis, batch_axis, dtype)  # pyright: ignore[reportArgumentType]
