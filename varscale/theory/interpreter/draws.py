"""Predicted rows beside networks that are drawn and measured: whether the prediction holds, on the model itself."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from varscale.measuring.draws import Network, measured_draws
from varscale.measuring.scoped import scoped
from varscale.programs import faces
from varscale.programs.pieces import is_key
from varscale.programs.program import Inputs, Program
from varscale.report import Report, Row
from varscale.theory.domain.axes import axes_of
from varscale.theory.domain.tables import Moments, gaussian
from varscale.theory.interpreter.parameters import is_function, is_law, laws_laid, leaves_by_path
from varscale.usage.table import uses

_DRAWS_SEED = 0
_STANDARD_ERRORS = 4.0  # a sound row is further off than its bound and these once in 16000 times
# Standard deviation of ln(mean square) above which draws that a sample does not hold rule the mean of e^x.
_RARE = 0.5
MOST_BYTES = 2**32  # of parameters and outputs


def beside_draws(
    report: Report, model: Any, given: Inputs, params: Any, count: int, method: str | None, scheme: Any = None
) -> Report:
    """The report with what `count` drawn networks measured in each row; a note instead where the model is too large.

    Arrays among the inputs are the same for every network; descriptions and laws are drawn anew.
    """
    size = sum(4 * math.prod(x.shape) for x in (*report.weights.values(), *report.rows))
    if size > MOST_BYTES:
        note = (
            f"No networks drawn: parameters and outputs take {size / 2**30:.1f} GiB, above "
            f"{MOST_BYTES / 2**30:.0f} GiB."
        )
        return dataclasses.replace(report, notes=(*report.notes, note))
    program = faces.program(model, method=method)
    if program.init is None and program.parameters is None:
        program = faces.program(scoped(model))
    sampler = _input_sampler(model, given, params, method)
    network = Network(program, _variables(program, params, scheme), sampler, method or "__call__")
    backward = any(row.gradient is not None for row in report.rows)
    measured = measured_draws(network, jax.random.key(_DRAWS_SEED), count, backward=backward)
    rows = tuple(_row_beside(row, measured[row.path]) if row.path in measured else row for row in report.rows)
    return dataclasses.replace(report, rows=rows)


def _row_beside(row: Row, numbers: Float[np.ndarray, "count statistics=3"]) -> Row:
    _, square, gradient = numbers.T
    new: dict[str, Any] = _agreement(square, row.second_moment, row.typical, row.error_bound)._asdict()
    if row.band is not None:
        low, high = row.band[0] * (1 - 1e-6), row.band[1] * (1 + 1e-6)
        new["draws_in_band"] = float(np.mean((square >= low) & (square <= high)))
    if row.gradient is not None and row.gradient_error_bound is not None and np.isfinite(gradient).all():
        # The typical gradient is not predicted apart: it is the mean less half the variance of its logarithm.
        found = _agreement(gradient, row.gradient, None, row.gradient_error_bound)
        names = "measured_gradient", "measured_gradient_error", "gradient_holds"
        new.update(zip(names, found, strict=True))
    return dataclasses.replace(row, **new)


class Agreement(NamedTuple):
    """What drawn networks say of a mean square that was predicted, as a row has it."""

    measured: float  # the mean over networks
    measured_error: float  # its standard error
    holds: bool  # whether the prediction is as near as its bound says


def _agreement(
    square: Float[np.ndarray, " count"], predicted: float, typical: float | None, bound: float
) -> Agreement:
    """The mean square that networks have, beside the predicted one.

    Where ln(mean square) varies by more than `_RARE`, what is compared is the typical value, exp E[ln ·].
    """
    mean, error = float(square.mean()), float(square.std(ddof=1) / math.sqrt(len(square)))
    if not math.isfinite(mean):
        return Agreement(mean, error, not math.isfinite(predicted))
    logs = np.log(square) if np.all(square > 0) and predicted > 0 else np.zeros(len(square))
    spread = float(logs.std(ddof=1))
    if spread <= _RARE:
        reach = bound * max(mean, predicted) + _STANDARD_ERRORS * error + 1e-6 * mean
        return Agreement(mean, error, bool(abs(predicted - mean) <= reach))
    expected = predicted * math.exp(-(spread**2) / 2) if typical is None else typical
    of_spread = spread**2 / math.sqrt(2 * len(square)) if typical is None else 0.0
    reach = math.log1p(bound) + _STANDARD_ERRORS * (spread / math.sqrt(len(square)) + of_spread)
    return Agreement(mean, error, abs(math.log(expected) - float(logs.mean())) <= reach)


def _variables(program: Program, params: Any, scheme: Any) -> Callable[[Any, Inputs], Any]:
    """Key and inputs -> the model's variables, from what `predict` was given for parameters, and the laws of a scheme."""
    start, function = program.init, params if is_function(params) else None
    by_tree = function is None and (params is not None or start is None)
    laws = leaves_by_path(params)
    if by_tree and all(isinstance(law, jax.Array | np.ndarray) for law in laws.values()):
        raise ValueError(
            "draws needs parameters that are drawn, not arrays, which are one draw: give the laws "
            "(of an nnx model the factory), or compare these arrays: "
            "vs.probe(model, params, x).compare(vs.predict(model, x))"
        )

    def init(key: Any, x: Inputs) -> Any:
        found = function(key) if function else start(key, x) if start is not None else params
        if by_tree:
            own = [laws.get(path, leaf) for path, leaf in leaves_by_path(found).items()]
            found = _drawn_by(found, own, jax.random.fold_in(key, 1))
        if scheme is not None:
            own = [leaf if law is None else law for law, leaf in laws_laid(scheme, found)]
            found = _drawn_by(found, own, jax.random.fold_in(key, 2))
        return found

    return init


def _drawn_by(variables: Any, laws: Sequence[Any], key: Any) -> Any:
    """Variables drawn anew, leaf by leaf: from an array, an initializer, a variance or moments."""
    leaves, tree = jax.tree_util.tree_flatten(variables, is_leaf=is_law)

    def drawn(law: Any, leaf: Any, key: Any) -> Any:
        if isinstance(law, int | float) and not isinstance(law, bool) and hasattr(leaf, "shape"):
            law = Moments(0.0, law, leaf.shape, leaf.dtype)
        if isinstance(law, Moments):
            deviation = math.sqrt(law.second_moment - law.mean**2)
            return law.mean + deviation * jax.random.normal(key, law.shape, law.dtype)
        return law(key, leaf.shape, leaf.dtype) if callable(law) else jnp.asarray(law)

    keys = jax.random.split(key, len(leaves))
    return jax.tree_util.tree_unflatten(tree, list(map(drawn, laws, leaves, keys)))


def _input_sampler(model: Any, given: Inputs, params: Any, method: str | None) -> Callable[[Any], Inputs]:
    """Key -> inputs: arrays as given, descriptions of arrays as `predict` reads them."""
    arrays, join = faces.split(given)
    described = [i for i, x in enumerate(arrays) if isinstance(x, jax.ShapeDtypeStruct | Moments)]
    whole = sum(jnp.issubdtype(arrays[i].dtype, jnp.integer) for i in described)
    tables: list[int] = []  # rows of those that ids are looked up in; one of several inputs may hold lengths
    if whole == 1:
        own = None if params is None or is_function(params) else params
        found = uses(model, given, params=own, method=method)
        tables = [p.shape[0] for p in found if p.role == "embedding"]
    if whole and not tables:
        raise ValueError("draws needs inputs of whole numbers as arrays: a ShapeDtypeStruct tells no range")

    def sample(key: Any) -> Inputs:
        keys = dict(zip(described, jax.random.split(key, len(described)), strict=False))
        return join([_drawn_input(x, keys[i], tables) if i in keys else x for i, x in enumerate(arrays)])

    return sample


def _drawn_input(x: Any, key: Any, tables: Sequence[int]) -> Any:
    """An input, drawn by its description: independent standard normals, numbers of these moments, rows of tables."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jax.random.randint(key, x.shape, 0, min(tables), x.dtype)
    if isinstance(x, Moments):
        axes = axes_of(x.shape)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
        positions = [np.arange(axis.size) for axis in axes]
        about_mean = gaussian(x.second() - x.mean**2, axes, positions, 1, rng)
        return jnp.asarray(x.mean + about_mean.reshape(x.shape), x.dtype)
    if is_key(x):
        return jax.random.split(key, x.shape) if x.shape else key
    return jnp.ones(x.shape, bool) if x.dtype == jnp.bool_ else jax.random.normal(key, x.shape, x.dtype)
