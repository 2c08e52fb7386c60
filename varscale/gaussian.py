r"""Expectations of any callable under a Gaussian, N(m, v): the integrals behind every gain and every prediction.

How. The real line, in standard deviations, is cut into panels; on each the callable is read at 16 Gauss-Legendre nodes
and its Legendre coefficients say whether it is resolved there. Panels that are not are halved. A kink (ReLU's corner, a
jump) shows itself as a panel that no halving resolves: it becomes a cut of its own, and between cuts everything is
smooth. So nobody has to say where the kink is, and one set of nodes serves every moment of that callable.

Everything is computed in float64, whatever the x64 flag says and inside `jit` too. Relative accuracy: 1e-9 for callables
that compute in the precision they are given; one that closes over float32 arithmetic reaches 1e-6 only.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from varscale.arguments import real_number

Elementwise = Callable[[jax.Array], jax.Array]

_ORDER = 16
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(_ORDER)
# Row k gives the k-th Legendre coefficient of the interpolant from its values at the nodes.
_TO_LEGENDRE = ((2 * np.arange(_ORDER) + 1) / 2)[:, None] * np.polynomial.legendre.legvander(_NODES, _ORDER - 1).T * _WEIGHTS
# Half a standard deviation a panel where the mass lies; far tails for callables that grow like exp. The odd offset keeps
# the cuts off the round numbers at which kinks lie, so that a kink is always seen inside a panel.
_OFFSET = math.pi / 128
_CUTS = np.concatenate([np.linspace(-38, -12, 9)[:-1], np.linspace(-12, 12, 49), np.linspace(12, 38, 9)[1:]]) + _OFFSET
_BATCH = 64  # panels a call: one shape, so that jax compiles each primitive of the callable once
_ROWS = 128  # conditional means a call, likewise
_KINK_WIDTH = 2.0**-40
_TOLERANCE = 1e-12
_MOST_PANELS = 4096
_STEPS = (1e-8, 1e-11)  # in standard deviations; a cut finds a jump to about a tenth of the shorter


class Quadrature(NamedTuple):
    """A callable tabulated where its Gaussian integrals need it, in standard units z = (x − m)/√v.

    Attributes:
        cuts: ascending panel borders, shape (panels + 1,).
        z: nodes, shape (n,).
        weights: quadrature weights, the Gaussian density included, shape (n,); they sum to 1.
        values: f(m + √v·z), shape (n,).
    """

    cuts: Float[np.ndarray, " panels+1"]
    z: Float[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    """Concrete float64 evaluation, whatever surrounds the caller: x64 off, `jit`, strict promotion, NaN checks."""
    with (
        jax.ensure_compile_time_eval(),
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.debug_nans(False),
    ):
        yield


def name_of(f: Elementwise) -> str:
    """The name of a callable for an error: `silu`; `<lambda> (net.py:7)`; of an object its class."""
    name = getattr(f, "__name__", f"of type {type(f).__name__}")
    code = getattr(f, "__code__", None)
    return f"{name} ({code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno})" if code and name == "<lambda>" else name


def _evaluate(f: Elementwise, x: Float[np.ndarray, "*shape"]) -> tuple[Float[np.ndarray, "*shape"], float]:
    """f at every x, in float64, and the machine epsilon of what it returned."""
    with _float64():
        try:
            y = f(jnp.asarray(x))
        except jax.errors.JAXTypeError:
            raise
        except (TypeError, ValueError) as error:
            # A callable of one Python number (math.tanh, `max(x, 0.0)`) cannot take an array.
            y = _number_by_number(f, x, error)
        y = y if hasattr(y, "dtype") and hasattr(y, "shape") else np.asarray(y)
        if y.shape != x.shape:
            raise ValueError(f"activation {name_of(f)} must be elementwise; it maps shape {x.shape} to {y.shape}")
        if not (jnp.issubdtype(y.dtype, jnp.floating) or jnp.issubdtype(y.dtype, jnp.integer) or y.dtype == bool):
            raise TypeError(f"activation {name_of(f)} must return real numbers, not {y.dtype}")
        epsilon = float(jnp.finfo(y.dtype).eps) if jnp.issubdtype(y.dtype, jnp.floating) else 2.0**-52
        try:
            return np.asarray(y).astype(np.float64), epsilon
        except jax.errors.JAXTypeError as error:
            raise TypeError(f"activation {name_of(f)} must be concrete: it closes over a traced value") from error


def _number_by_number(f: Elementwise, x: Float[np.ndarray, "*shape"], on_array: Exception) -> Float[np.ndarray, "*shape"]:
    try:
        return np.vectorize(f, otypes=[float])(x)
    except (TypeError, ValueError, IndexError) as on_number:
        says = f"on an array of shape {x.shape} it raises {on_array!r}, on a number {on_number!r}"
        kind = TypeError if isinstance(on_number, TypeError) else ValueError
        raise kind(f"activation {name_of(f)} must be elementwise, a function of one real number: {says}") from on_number


@functools.lru_cache(maxsize=1024)
def _check_elementwise(f: Elementwise) -> None:
    """Raises ValueError where f(x) at one entry depends on the other entries or on the position."""
    # x is rearranged and half of its entries are replaced: an elementwise f is rearranged with it where they are kept.
    generator = np.random.default_rng(0)
    x, other = generator.standard_normal((2, _BATCH, _ORDER))
    order = generator.permutation(x.size)
    kept = generator.random(x.shape) < 0.5
    expected = _evaluate(f, x)[0].ravel()[order].reshape(x.shape)[kept]
    found = _evaluate(f, np.where(kept, x.ravel()[order].reshape(x.shape), other))[0][kept]
    size = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    if not np.allclose(found, expected, rtol=1e-4, atol=1e-6 * size, equal_nan=True):
        raise ValueError(
            f"activation {name_of(f)} must be elementwise, but its value at one entry depends on the other entries or on the "
            "position (as that of softmax, a normalization, cumsum or dropout does); vs.predict follows such functions"
        )


def _panel_nodes(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left + right)[:, None] / 2 + (right - left)[:, None] / 2 * _NODES


def _density(z: np.ndarray) -> np.ndarray:
    return np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def _resolve(f: Elementwise, mean: float, std: float, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Halve panels until each is resolved or too narrow: left borders, right borders, values (panels, order)."""
    done: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    left, right = cuts[:-1], cuts[1:]
    scale = 0.0
    while left.size:
        values = np.empty((left.size, _ORDER))
        epsilon = 0.0
        for start in range(0, left.size, _BATCH):
            z = _panel_nodes(left[start : start + _BATCH], right[start : start + _BATCH])
            padded = np.zeros((_BATCH, _ORDER))
            padded[: len(z)] = mean + std * z
            y, epsilon = _evaluate(f, padded)
            values[start : start + _BATCH] = y[: len(z)]
        z = _panel_nodes(left, right)
        mass = _density(z) @ _WEIGHTS * (right - left) / 2
        with np.errstate(invalid="ignore", over="ignore"):
            scale = max(scale, float(np.nansum(np.abs(values) @ _WEIGHTS / 2 * mass)))
            tail = np.abs(values @ _TO_LEGENDRE.T)[:, -3:].max(axis=1)
            unresolved = tail * mass > max(_TOLERANCE, epsilon) * scale
            # The callable's own rounding is not a kink: halving cannot improve on it.
            unresolved &= tail > 64 * epsilon * np.abs(values).max(axis=1)
        unresolved &= right - left > _KINK_WIDTH
        if 2 * unresolved.sum() > _MOST_PANELS:
            unresolved[:] = False
        done.append((left[~unresolved], right[~unresolved], values[~unresolved]))
        middle = (left[unresolved] + right[unresolved]) / 2
        left, right = np.concatenate([left[unresolved], middle]), np.concatenate([middle, right[unresolved]])
    left, right, values = (np.concatenate(parts) for parts in zip(*done, strict=True))
    order = np.argsort(left)
    return left[order], right[order], values[order]


def _checked(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    number = real_number(name, value)
    if not (math.isfinite(number) and low <= number <= high):
        raise ValueError(f"{name} must be a finite number in [{low}, {high}], not {value!r}")
    return number


@functools.lru_cache(maxsize=1024)
def _tabulate(f: Elementwise, mean: float, variance: float) -> Quadrature:
    std = math.sqrt(variance)
    left, right, _ = _resolve(f, mean, std, _CUTS)
    narrow = right - left <= _KINK_WIDTH
    kinks = ((left + right) / 2)[narrow]
    if kinks.size:
        # Neighbouring slivers hold one kink.
        kinks = kinks[np.concatenate([[True], np.diff(kinks) > 8 * _KINK_WIDTH])]
    left, right, values = _resolve(f, mean, std, np.unique(np.concatenate([_CUTS, kinks])))
    z = _panel_nodes(left, right)
    weights = _density(z) * _WEIGHTS * ((right - left) / 2)[:, None]
    weights /= weights.sum()
    # Where the density is below 1e-250 even an overflowing callable carries no mass that a finite moment could have.
    if not np.isfinite(values[weights > 1e-250]).all():
        bad = mean + std * z[(weights > 1e-250) & ~np.isfinite(values)][0]
        raise ValueError(f"activation {name_of(f)} is not finite at x = {bad:.6g}, under N({mean:g}, {variance:g})")
    values = np.where(np.isfinite(values), values, 0.0)
    return Quadrature(np.append(left, right[-1]), z.ravel(), weights.ravel(), values.ravel())


def quadrature(f: Elementwise, mean: float = 0.0, variance: float = 1.0) -> Quadrature:
    """Tabulates f where integrals under N(mean, variance) need it; cached by f, mean and variance.

    Args:
        f: an elementwise callable of real numbers; kinks and jumps are found, not told.
        mean: the Gaussian's mean.
        variance: the Gaussian's variance, ≥ 0.

    Returns:
        Nodes, weights and values with Σ weights · values ≈ E[f(x)].

    Raises:
        TypeError: f is not callable, closes over a traced value or returns other than real numbers.
        ValueError: mean or variance is not finite, variance is negative, f is not elementwise or not finite.
    """
    if not callable(f):
        raise TypeError(f"activation must be a callable of one array, not {f!r}")
    mean, variance = _checked("mean", mean), _checked("variance", variance, low=0.0)
    try:
        hash(f)
    except TypeError:
        _check_elementwise.__wrapped__(f)
        return _tabulate.__wrapped__(f, mean, variance)
    _check_elementwise(f)
    return _tabulate(f, mean, variance)


def jumps(f: Elementwise, mean: float = 0.0, variance: float = 1.0) -> bool:
    """Whether f jumps where N(mean, variance) has mass: E[f'(x)²] is infinite then, whatever automatic differentiation says.

    Arguments and errors: `quadrature`.

    >>> import jax.numpy as jnp
    >>> jumps(jnp.sign), jumps(jnp.abs)
    (True, False)
    """
    q = quadrature(f, mean, variance)
    cuts = q.cuts[np.abs(q.cuts) < 8]
    std = math.sqrt(variance)
    # A step from one side of a cut to the other shrinks with its length, unless there is a jump between.
    far, near = (np.abs(np.diff(_in_batches(f, mean + std * (cuts[:, None] + np.array([-d, d]))))[:, 0]) for d in _STEPS)
    return bool(np.any((near > far / 2) & (near > 1e-5 * np.sqrt(q.weights @ q.values**2))))


def _in_batches(f: Elementwise, x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """f at every x, in arrays of the one shape that its primitives are compiled for."""
    size = _BATCH * _ORDER
    padded = np.resize(x, (-(-x.size // size), _BATCH, _ORDER))
    return np.concatenate([_evaluate(f, part)[0].ravel() for part in padded])[: x.size].reshape(x.shape)


def _integral(f: Elementwise, q: Quadrature, power: int) -> float:
    terms = q.weights * q.values**power
    slivers = np.repeat(np.diff(q.cuts) <= 2 * _KINK_WIDTH, _ORDER)
    # At a kink or a jump the slivers hold a share of about their width; at a pole they hold the integral.
    if np.abs(terms[slivers]).sum() > 1e-4 * np.abs(terms).sum():
        raise ValueError(f"E[f(x)^{power}] does not converge for activation {name_of(f)}: it has a pole")
    return float(terms.sum())


@functools.lru_cache(maxsize=1024)
def derivative(f: Elementwise) -> Elementwise:
    """The elementwise derivative f' by forward differentiation: x of any shape to f'(x) of the same shape."""

    def slope(x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        try:
            tangent = jax.jvp(f, (x,), (jnp.ones_like(x),))[1]
        except jax.errors.ConcretizationTypeError as error:
            raise TypeError(f"activation {name_of(f)} must be made of jax functions of arrays to be differentiated") from error
        return jnp.zeros(x.shape) if tangent.dtype == jax.dtypes.float0 else tangent  # of integers

    return slope


def mean(f: Elementwise, mean: float = 0.0, variance: float = 1.0) -> float:
    """E[f(x)] for x ~ N(mean, variance). Arguments and errors: `quadrature`.

    >>> import jax
    >>> round(mean(jax.nn.relu), 10)  # 1/√(2π)
    0.3989422804
    """
    return _integral(f, quadrature(f, mean, variance), power=1)


def second_moment(f: Elementwise, mean: float = 0.0, variance: float = 1.0) -> float:
    """E[f(x)²] for x ~ N(mean, variance). Arguments and errors: `quadrature`.

    >>> import jax
    >>> round(second_moment(jax.nn.relu, variance=4.0), 10)
    2.0
    """
    return _integral(f, quadrature(f, mean, variance), power=2)


def second_moment_slope(f: Elementwise, mean: float = 0.0, variance: float = 1.0) -> float:
    """d ln E[f(x)²] / d ln v for x ~ N(mean, v), at v = variance: ½ (E[f² z²] / E[f²] − 1). Arguments and errors: `quadrature`.

    With the gain of f layers keep E[y²] = 1, and a deviation ε from it grows or shrinks as slope^depth · ε.

    >>> import jax
    >>> [round(second_moment_slope(f), 3) for f in (jax.nn.tanh, jax.nn.relu, jax.nn.gelu)]
    [0.461, 1.0, 1.144]
    """
    q = quadrature(f, mean, variance)
    second = _integral(f, q, power=2)
    if not second > 0:
        raise ValueError(f"activation {name_of(f)} must not vanish under N({mean:g}, {variance:g}): E[f(x)²] is {second:g}")
    return float(q.weights @ (q.values * q.z) ** 2) / second / 2 - 0.5


def derivative_second_moment(f: Elementwise, mean: float = 0.0, variance: float = 1.0) -> float:
    """E[f'(x)²] for x ~ N(mean, variance), f' by automatic differentiation. Arguments and errors: `quadrature`.

    >>> import jax
    >>> round(derivative_second_moment(jax.nn.relu), 10)
    0.5
    """
    if not callable(f):
        raise TypeError(f"activation must be a callable of one array, not {f!r}")
    return second_moment(derivative(f), mean, variance)


def hermite_coefficients(
    f: Elementwise, degree: int, mean: float = 0.0, variance: float = 1.0
) -> Float[np.ndarray, " degree+1"]:
    """a_k = E[f(m + √v·z) h_k(z)], k = 0..degree, with the orthonormal Hermite polynomials h_k = He_k/√k!.

    Then E[f(x)²] = Σ a_k² and, at correlation ρ, E[f(x)f(y)] = Σ a_k² ρ^k (Mehler's formula; Daniely et al. 2016, "Toward
    Deeper Understanding of Neural Networks", section 4). Arguments and errors: `quadrature`; degree ≥ 0.

    >>> import jax
    >>> hermite_coefficients(lambda x: x**2, 3).round(9) + 0.0  # z² = h_0 + √2·h_2
    array([1.        , 0.        , 1.41421356, 0.        ])
    """
    if not isinstance(degree, int) or degree < 0:
        raise ValueError(f"degree must be an integer ≥ 0, not {degree!r}")
    q = quadrature(f, mean, variance)
    coefficients = np.empty(degree + 1)
    previous, current = np.zeros_like(q.z), np.ones_like(q.z)
    for k in range(degree + 1):
        coefficients[k] = q.weights @ (q.values * current)
        previous, current = current, (q.z * current - math.sqrt(k) * previous) / math.sqrt(k + 1)
    return coefficients


def pair(f: Elementwise, g: Elementwise, correlation: float, mean: float = 0.0, variance: float = 1.0) -> float:
    """E[f(x)g(y)] for x, y ~ N(mean, variance) with the given correlation (the dual activation, or pair kernel).

    By conditioning: y given x is Gaussian of standard deviation √(1 − ρ²); the inner integral is cut at g's own cuts, the
    outer one at f's and, finely, where g's cuts pass by. Arguments and errors: `quadrature`; correlation in [−1, 1].

    Source: Cho & Saul 2009, "Kernel Methods for Deep Learning", section 2, for the closed forms it reproduces.

    >>> import jax
    >>> round(pair(jax.nn.relu, jax.nn.relu, 0.0), 9)  # 1/(2π)
    0.159154943
    """
    rho = _checked("correlation", correlation, low=-1.0, high=1.0)
    on_f, on_g = quadrature(f, mean, variance), quadrature(g, mean, variance)
    mean, std = float(mean), math.sqrt(variance)
    if rho == 0.0:
        return float(on_f.weights @ on_f.values * (on_g.weights @ on_g.values))
    width = math.sqrt((1 - rho) * (1 + rho))
    mirrored = np.sort(math.copysign(1.0, rho) * on_g.cuts)
    if width < _KINK_WIDTH:
        outer_cuts = np.unique(np.concatenate([on_f.cuts, mirrored]))
    else:
        # E[g(y) | x] varies on the scale width/|ρ| around g's cuts, seen from x at cut/ρ.
        passing = (on_g.cuts[:, None] + width * np.linspace(-8, 8, 9)) / rho
        outer_cuts = np.unique(np.concatenate([on_f.cuts, passing.ravel()]))
    outer_cuts = outer_cuts[(outer_cuts > -12) & (outer_cuts < 12)]
    outer_cuts = np.concatenate([[-12.0], outer_cuts, [12.0]])
    left, right = outer_cuts[:-1], outer_cuts[1:]
    keep = right - left > 1e-13
    left, right = left[keep], right[keep]
    z = _panel_nodes(left, right).ravel()
    weights = (_density(_panel_nodes(left, right)) * _WEIGHTS * ((right - left) / 2)[:, None]).ravel()
    f_values = _in_batches(f, mean + std * z)
    if width < _KINK_WIDTH:
        inner = _in_batches(g, mean + std * math.copysign(1.0, rho) * z)
    else:
        parts = np.resize(z, (-(-z.size // _ROWS), _ROWS))  # of one shape
        inner = np.concatenate([_conditional_mean(g, on_g.cuts, mean, std, rho, width, part) for part in parts])[: z.size]
    return float(weights @ (f_values * inner))


def _conditional_mean(
    g: Elementwise, cuts: np.ndarray, mean: float, std: float, rho: float, width: float, z: np.ndarray
) -> np.ndarray:
    """E[g(mean + std·(ρ z + width·w))], w ~ N(0, 1), at every z."""
    base = np.linspace(-9, 9, 25)
    own = np.clip((cuts - rho * z[:, None]) / width, -9, 9)
    borders = np.sort(np.concatenate([np.broadcast_to(base, (z.size, base.size)), own], axis=1), axis=1)
    left, right = borders[:, :-1].ravel(), borders[:, 1:].ravel()
    w = _panel_nodes(left, right).reshape(z.size, -1)
    weights = (_WEIGHTS * ((right - left) / 2)[:, None]).reshape(z.size, -1) * _density(w)
    y, _ = _evaluate(g, mean + std * (rho * z[:, None] + width * w))
    return np.einsum("ij,ij->i", weights, y)
