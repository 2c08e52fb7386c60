"""Predicted rows beside networks that are drawn and measured: whether the prediction holds, on the model itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from varscale.initialization.laws import laid
from varscale.measuring.draws import Network, measured_draws
from varscale.measuring.scoped import scoped
from varscale.programs import faces
from varscale.programs.program import Inputs, Program
from varscale.report import Report, Row
from varscale.theory.domain.axes import Axis
from varscale.theory.domain.tables import Moments, gaussian
from varscale.theory.interpreter.parameters import is_function, path_string
from varscale.usage.parameters import named_leaves
from varscale.usage.table import uses

_DRAWS_SEED = 0
_STANDARD_ERRORS = (
    4.0  # standard errors: a sound row is further off than its bound and these once in 16000 times
)
# Standard deviation of ln(mean square) above which the mean of e^x is ruled by draws that a sample does not
# hold.
_RARE = 0.5
MOST_BYTES = 2**32  # of parameters and outputs


def beside_draws(
    report: Report, model: Any, given: Inputs, params: Any, count: int, method: str | None, scheme: Any = None
) -> Report:
    """The report with what `count` drawn networks measured in each row; a note instead where the model is too large.

    Args:
        report: the prediction.
        model: the model.
        given: its inputs: arrays are the same for every network, descriptions of arrays are drawn anew.
        params: as `predict` takes them: given arrays are the same for every network, laws are drawn anew.
        count: number of networks, 2 or more.
        method: the method to run in place of `__call__`.
        scheme: laws in place of the parameters' own, as `predict` takes them.

    Raises:
        ValueError: the parameters are arrays; whole numbers are described, not given, and no table says of which range.
    """
    size = sum(4 * math.prod(w.shape) for w in report.weights.values()) + sum(
        4 * math.prod(row.shape) for row in report.rows
    )
    if size > MOST_BYTES:
        note = (
            f"No networks drawn: parameters and outputs take {size / 2**30:.1f} GiB, above "
            f"{MOST_BYTES / 2**30:.0f} GiB."
        )
        return dataclasses.replace(report, notes=(*report.notes, note))
    program = faces.program(model, method=method)
    if program.init is None and program.parameters is None:
        program = faces.program(scoped(model))
    variables = _variables(program, params)
    if scheme is not None:
        variables = _laid(variables, scheme)
    network = Network(program, variables, _input_sampler(model, given, params, method), method or "__call__")
    backward = any(row.gradient is not None for row in report.rows)
    measured = measured_draws(network, jax.random.key(_DRAWS_SEED), count, backward=backward)
    rows = tuple(_row_beside(row, measured[row.path]) if row.path in measured else row for row in report.rows)
    return dataclasses.replace(report, rows=rows)


def _row_beside(row: Row, numbers: Float[np.ndarray, "count statistics=3"]) -> Row:
    """A predicted row with what was measured."""
    _, square, gradient = numbers.T
    second, error, holds = _agreement(square, row.second_moment, row.typical, row.error_bound)
    found = dataclasses.replace(
        row,
        measured=second,
        measured_error=error,
        holds=holds,
        draws_in_band=_share_in_band(square, row.band),
    )
    if row.gradient is None or row.gradient_error_bound is None or not np.all(np.isfinite(gradient)):
        return found
    # The typical gradient is not predicted apart: it is the mean less half the variance of its logarithm.
    second, error, holds = _agreement(gradient, row.gradient, None, row.gradient_error_bound)
    return dataclasses.replace(
        found, measured_gradient=second, measured_gradient_error=error, gradient_holds=holds
    )


def _agreement(
    square: Float[np.ndarray, " count"], predicted: float, typical: float | None, bound: float
) -> tuple[float, float, bool]:
    """Mean over networks of a mean square, its standard error, and whether the prediction is as near as its bound says.

    Where ln(mean square) varies by more than `_RARE`, what is compared is the typical value, exp E[ln ·].
    """
    mean, error = float(square.mean()), float(square.std(ddof=1) / math.sqrt(len(square)))
    if not math.isfinite(mean):
        return mean, error, not math.isfinite(predicted)
    if np.all(square > 0) and predicted > 0:
        logs = np.log(square)
        spread = float(logs.std(ddof=1))
        if spread > _RARE:
            expected = predicted * math.exp(-(spread**2) / 2) if typical is None else typical
            of_spread = spread**2 / math.sqrt(2 * len(square)) if typical is None else 0.0
            off = abs(math.log(expected) - float(logs.mean()))
            return (
                mean,
                error,
                off <= math.log1p(bound) + _STANDARD_ERRORS * (spread / math.sqrt(len(square)) + of_spread),
            )
    return (
        mean,
        error,
        bool(abs(predicted - mean) <= bound * max(mean, predicted) + _STANDARD_ERRORS * error + 1e-6 * mean),
    )


def _share_in_band(square: Float[np.ndarray, " count"], band: tuple[float, float] | None) -> float | None:
    return (
        None
        if band is None
        else float(np.mean((square >= band[0] * (1 - 1e-6)) & (square <= band[1] * (1 + 1e-6))))
    )


def _variables(program: Program, params: Any) -> Callable[[Any, Inputs], Any]:
    """Key and inputs -> the model's variables, from what `predict` was given for parameters.

    Raises:
        ValueError: they are given as arrays.
    """
    if params is None and program.init is not None:
        return program.init
    if callable(params) and is_function(params):
        return lambda key, x: params(key)
    if params is None or all(
        isinstance(law, jax.Array | np.ndarray)
        for law in jax.tree_util.tree_leaves(params, is_leaf=_is_one_law)
    ):
        raise ValueError(
            "draws needs parameters that are drawn, not arrays, which are one draw: give the laws "
            "(of an nnx model the "
            "factory), or compare these arrays: vs.probe(model, params, x).compare(vs.predict(model, x))"
        )

    def init(key: Any, x: Inputs) -> Any:
        declared = params if program.init is None else program.init(key, x)
        laws = {
            path_string(path): law
            for path, law in jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_one_law)[0]
        }
        flat, tree = jax.tree_util.tree_flatten_with_path(declared, is_leaf=_is_one_law)
        keys = jax.random.split(jax.random.fold_in(key, 1), max(len(flat), 1))
        drawn = [
            _drawn_leaf(laws.get(path_string(path), leaf), leaf, k)
            for (path, leaf), k in zip(flat, keys, strict=True)
        ]
        return jax.tree_util.tree_unflatten(tree, drawn)

    return init


def _laid(variables: Callable[[Any, Inputs], Any], scheme: Any) -> Callable[[Any, Inputs], Any]:
    """The model's variables, those drawn by the laws of a scheme that it lays laws on."""

    def init(key: Any, x: Inputs) -> Any:
        own = variables(key, x)
        leaves, tree = jax.tree_util.tree_flatten(own)
        named = zip(named_leaves(own), leaves, strict=True)
        hits = laid(
            scheme,
            [(name.path, tuple(leaf.shape), leaf.dtype, name.learned) for name, leaf in named],
            "scheme",
        )
        keys = jax.random.split(jax.random.fold_in(key, 2), max(len(leaves), 1))
        drawn = [
            leaf if hit is None else hit.law(k, leaf.shape, leaf.dtype)
            for hit, leaf, k in zip(hits, leaves, keys, strict=True)
        ]
        return jax.tree_util.tree_unflatten(tree, drawn)

    return init


def _is_one_law(x: Any) -> bool:
    return isinstance(x, Moments) or is_function(x)


def _drawn_leaf(law: Any, leaf: Any, key: Any) -> Any:
    """One parameter, from an array, an initializer, a variance or moments."""
    if isinstance(law, Moments):
        return law.mean + math.sqrt(law.second_moment - law.mean**2) * jax.random.normal(
            key, law.shape, law.dtype
        )
    if callable(law):
        return law(key, leaf.shape, leaf.dtype)
    if isinstance(law, int | float) and not isinstance(law, bool) and not isinstance(leaf, int | float):
        return math.sqrt(law) * jax.random.normal(key, leaf.shape, leaf.dtype)
    return jnp.asarray(law)


def _input_sampler(model: Any, given: Inputs, params: Any, method: str | None) -> Callable[[Any], Inputs]:
    """Key -> inputs: arrays as given, descriptions of arrays as `predict` reads them.

    Raises:
        ValueError: whole numbers are described, not given, and no table says of which range.
    """
    leaves, tree = jax.tree_util.tree_flatten(
        (given.args, dict(given.kwargs)), is_leaf=lambda x: isinstance(x, Moments)
    )
    described = [i for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct | Moments)]
    whole = [i for i in described if jnp.issubdtype(leaves[i].dtype, jnp.integer)]
    count = _vocabulary(model, given, params, method, len(whole)) if whole else 0

    def sample(key: Any) -> Inputs:
        found = list(leaves)
        for i, k in zip(described, jax.random.split(key, max(len(described), 1)), strict=False):
            found[i] = (
                jax.random.randint(k, leaves[i].shape, 0, count, leaves[i].dtype)
                if i in whole
                else _drawn_input(leaves[i], k)
            )
        return Inputs(*jax.tree_util.tree_unflatten(tree, found))

    return sample


def _vocabulary(model: Any, given: Inputs, params: Any, method: str | None, count: int) -> int:
    """Number of rows of the table in which ids are looked up.

    Raises:
        ValueError: no table, or several inputs of whole numbers: one of them may hold lengths or positions.
    """
    tables = []
    if count == 1:
        own = None if params is None or is_function(params) else params
        tables = [p.shape[0] for p in uses(model, given, params=own, method=method) if p.role == "embedding"]
    if not tables:
        raise ValueError(
            "draws needs inputs of whole numbers as arrays: from a ShapeDtypeStruct their range is not known"
        )
    return min(tables)


def _drawn_input(x: Any, key: Any) -> Any:
    """An input of real numbers, drawn by its description: independent standard normals, or of these moments."""
    if isinstance(x, Moments):
        axes = tuple(Axis(n) for n in x.shape if n != 1)
        second = x.second()[tuple(slice(None) if n != 1 else 0 for n in x.shape)]
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
        about_mean = gaussian(second - x.mean**2, axes, [np.arange(axis.size) for axis in axes], 1, rng)[0]
        return jnp.asarray(x.mean + about_mean.reshape(x.shape), x.dtype)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.split(key, x.shape) if x.shape else key
    if x.dtype == jnp.bool_:
        return jnp.ones(x.shape, x.dtype)
    return jax.random.normal(key, x.shape, x.dtype)
