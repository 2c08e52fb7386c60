"""The laws of a model's parameters: read from its own init by interpreting it, measured on arrays, or given."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from scipy import special

from varscale.initialization.laws import laid
from varscale.initialization.laws import name as law_name
from varscale.theory.domain.axes import Axis
from varscale.theory.domain.tables import Moments, Table, estimate, independent
from varscale.theory.graph.expressions import roots
from varscale.theory.graph.layout import Value, full, value
from varscale.theory.graph.nodes import UNKNOWN, Leaf
from varscale.theory.interpreter.interpreter import Interpreter
from varscale.theory.interpreter.tracing import Trace, first_alike, output_recipes
from varscale.theory.rules.random import another, as_weight, is_weight
from varscale.theory.rules.registry import Complex, Opaque, map_parts, parts
from varscale.usage.parameters import named_leaves

_FACTORY_SEED = 0


def path_string(path: Any) -> str:
    """A parameter's path joined with "/", the collection "params" left out."""
    keys = [
        k for k in path if not (isinstance(k, jax.tree_util.GetAttrKey) and k.name == "value")
    ]  # of boxes
    parts = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in keys]
    return "/".join(parts[1:] if parts and parts[0] == "params" else parts)


def init_laws(interpreter: Interpreter, drawing: Trace, inputs: Sequence[Any]) -> list[Any]:
    """Leaf by leaf, values with the laws that parameters are drawn from; nothing is drawn."""
    jaxpr, outputs = drawing.jaxpr, drawing.jaxpr.outvars

    def interpreted(which: Sequence[int]) -> dict[int, Any]:
        part = jaxpr.replace(outvars=[outputs[i] for i in which])
        outs = interpreter.run(part, drawing.constants, inputs)
        nodes = {part.node.id: part.node for x in outs if not isinstance(x, Opaque) for part in parts(x)}
        count = collections.Counter(r.id for node in nodes.values() for r in {r.node for r in roots(node)})
        shared = {id_ for id_, n in count.items() if n > 1}  # leaves that several parameters are functions of

        def parameter(x: Any) -> Any:
            """One of them: a weight of its own, unless others are made from the same draws."""
            own = [] if isinstance(x, Opaque) else [r.node for r in roots(x.node) if r.node.id in shared]
            for made in own:
                if not isinstance(
                    made, Leaf
                ):  # a spectral norm's vector, which init has turned by the weights
                    made.flagged, made.doubt = "assumed", UNKNOWN
            return x if own or isinstance(x, Opaque) else as_weight(interpreter, x)

        return {i: map_parts(parameter, x) for i, x in zip(which, outs, strict=True)}

    recipes = output_recipes(jaxpr)
    first = first_alike(recipes)
    values = interpreted(sorted(set(first)))
    values |= interpreted(
        [i for i, j in enumerate(first) if i != j and recipes[i].keys and not is_weight(values[j])]
    )
    for i, j in enumerate(first):
        if i not in values:
            values[i] = another(interpreter, values[j], i) if recipes[i].keys else values[j]
    return [values[i] for i in range(len(outputs))]


def given_parameters(
    interpreter: Interpreter, params: Any, shapes: Any, declared: list[Any] | None
) -> tuple[Any, list[Any]]:
    """Parameters given as arrays, initializers, variances or `Moments`, in the structure of the model's own where it has one.

    Args:
        interpreter: what their nodes are made by.
        params: a tree of them.
        shapes: the shapes of the model's own parameters, as a tree; None for a plain function, which has none.
        declared: the laws that its own init draws these from, leaf by leaf: those of a collection that is not given.

    Returns:
        The shapes, as a tree, and the values, leaf by leaf.

    Raises:
        ValueError: the structure or a shape differs, or an array contains NaN.
        TypeError: a leaf is of no known kind.
    """
    if shapes is None:
        shapes = jax.tree_util.tree_map_with_path(_described, params, is_leaf=is_law)
    names = set(shapes) if isinstance(shapes, dict) else set()
    if "params" in names and not (hasattr(params, "keys") and "params" in set(params.keys())):
        params = {"params": params}
    missing = names - set(params.keys()) if names and hasattr(params, "keys") else set()
    flat_shapes, _ = jax.tree_util.tree_flatten_with_path(shapes)
    given = {path_string(p): x for p, x in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_law)[0]}
    expected = [path_string(p) for p, _ in flat_shapes]
    absent = [p for p in expected if p not in given and p.split("/")[0] not in missing]
    extra = [p for p in given if p not in expected]
    if absent or extra:
        raise ValueError(
            f"params must have the model's structure: missing {absent[:4]}, unexpected {extra[:4]}"
        )
    values = [
        _given_parameter(interpreter, given[path], path, struct) if path in given else own
        for path, (_, struct), own in zip(expected, flat_shapes, declared or expected, strict=True)
    ]
    return shapes, values


def laid_parameters(interpreter: Interpreter, shapes: Any, values: Sequence[Any], scheme: Any) -> list[Any]:
    """The parameters' values, leaf by leaf, where a scheme lays laws on some of them.

    Args:
        interpreter: what their nodes are made by.
        shapes: the shapes of the parameters, as a tree.
        values: their values without the scheme.
        scheme: what `varscale.initialization.laws.laid` takes.
    """
    structs = jax.tree_util.tree_leaves(shapes)
    named_structs = zip(named_leaves(shapes), structs, strict=True)
    hits = laid(
        scheme, [(name.path, tuple(s.shape), s.dtype, name.learned) for name, s in named_structs], "scheme"
    )
    found = list(values)
    first: dict[Any, Any] = {}
    for i, (hit, struct) in enumerate(zip(hits, structs, strict=True)):
        if hit is None:
            continue
        key = (law_name(hit.law), tuple(struct.shape), struct.dtype)
        if is_weight(first.get(key)):
            found[i] = another(interpreter, first[key], i)
            continue
        found[i] = first[key] = _laid_parameter(interpreter, hit.law, struct, i)
    return found


def _laid_parameter(interpreter: Interpreter, law: Any, struct: Any, number: int) -> Any:
    """A parameter under a law: a weight, or one times factors, such as those of layers that are stacked in it."""
    shape, dtype = tuple(struct.shape), struct.dtype
    if hasattr(law, "spread"):
        factors = jax.make_jaxpr(lambda w: w * jax.numpy.asarray(law.spread(shape), dtype))(struct)
        (out,) = interpreter.run(
            factors.jaxpr, factors.consts, [_laid_parameter(interpreter, law.init, struct, number)]
        )
        return out
    # A key of its own: what is drawn from one key is one and the same.
    traced = jax.make_jaxpr(lambda: law(jax.random.key(number), shape, dtype))()
    (out,) = interpreter.run(traced.jaxpr, traced.consts, [])
    return as_weight(interpreter, out)


def abstract(params: Any) -> Any:
    """The parameters of a plain function, given as `predict` takes them, as abstract arrays; None for None."""
    if is_function(params):
        return jax.eval_shape(params, jax.random.key(_FACTORY_SEED))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, Moments) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, Moments),
    )


def is_law(x: Any) -> bool:
    """Whether it is one leaf of a tree of parameters, though jax may not take it for one: `Moments`, an initializer."""
    return isinstance(x, Moments) or is_function(x)


def is_function(x: Any) -> bool:
    """Whether it is called rather than opened; a tree of arrays may be callable too, as an Equinox module is."""
    return callable(x) and not hasattr(x, "get_value") and jax.tree_util.all_leaves([x])


def _described(path: Any, x: Any) -> jax.ShapeDtypeStruct:
    """The shape of a plain function's parameter.

    Raises:
        TypeError: it does not tell.
    """
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return jax.ShapeDtypeStruct(x.shape, jax.numpy.dtype(x.dtype) if isinstance(x, Moments) else x.dtype)
    raise TypeError(
        f"params[{path_string(path)!r}] of a plain function must be an array or vs.Moments with a shape, not "
        f"{x!r}; or give params as a "
        "function of a key"
    )


def _given_parameter(interpreter: Interpreter, x: Any, path: str, struct: Any) -> Any:
    """One parameter, given."""
    shape = tuple(struct.shape)
    axes = tuple(Axis(n) for n in shape if n != 1)
    if jax.numpy.issubdtype(struct.dtype, jax.dtypes.prng_key):
        return Opaque(x if isinstance(x, jax.Array) else jax.random.key(_FACTORY_SEED))
    if isinstance(x, Moments):
        if (x.sample_correlation, x.position_correlation) != (None, None):
            raise ValueError(
                f"params[{path!r}] must have independent entries: correlations are an input's, not {x!r}'s"
            )
        return named(interpreter, path, shape, independent(x.mean, x.second_moment, axes))
    if isinstance(x, jax.ShapeDtypeStruct):
        raise TypeError(
            f"params[{path!r}] is a ShapeDtypeStruct, which has no law; give an array, an initializer "
            f"or a variance"
        )
    if callable(x):
        jaxpr = jax.make_jaxpr(lambda: x(jax.random.key(_FACTORY_SEED), shape, struct.dtype))()
        (out,) = interpreter.run(jaxpr.jaxpr, jaxpr.consts, [])
        return as_weight(interpreter, out)
    if isinstance(x, int | float) and not isinstance(x, bool):
        if not np.isfinite(x) or x < 0:
            raise ValueError(f"params[{path!r}] as a variance must be finite and not negative, not {x!r}")
        return (
            named(interpreter, path, shape, independent(0.0, float(x), axes))
            if x
            else full(interpreter.graph, 0.0, shape)
        )
    numbers = np.asarray(x)
    if numbers.shape != shape:
        raise ValueError(f"params[{path!r}] must have shape {shape}, not {numbers.shape}")
    if numbers.dtype.kind == "c":
        real = jax.ShapeDtypeStruct(shape, np.real(numbers).dtype)
        pair = {"real": np.real(numbers), "imag": np.imag(numbers)}
        return Complex(
            *(_given_parameter(interpreter, part, f"{path}.{name}", real) for name, part in pair.items())
        )
    if numbers.dtype.kind in "iub":
        return interpreter.known(numbers)
    numbers = numbers.astype(np.float64)
    if not np.all(np.isfinite(numbers)):
        raise ValueError(f"params[{path!r}] contains NaN or infinities")
    if numbers.size == 0 or np.all(numbers == numbers.flat[0]):
        return full(interpreter.graph, float(numbers.flat[0]) if numbers.size else 0.0, shape)
    kurtosis = float(np.mean(numbers**4) / np.mean(numbers**2) ** 2)
    return named(
        interpreter, path, shape, measured_law(numbers.reshape([a.size for a in axes]), axes), kurtosis
    )


# Chances that a mean, and each correlation, of independent entries is taken for real: four and five
# deviations of a normal.
_FALSE_MEAN, _FALSE_CORRELATION = 6e-5, 6e-7


def measured_law(numbers: np.ndarray, axes: tuple[Axis, ...]) -> Table:
    """The table of a real weight array; correlations and a mean within their own sampling error are no news, and are zero."""
    table = estimate(numbers, axes)
    square, error = table.mean_square, np.sqrt(numbers.var() / numbers.size)
    if abs(table.total_mean) > special.ndtri(1 - _FALSE_MEAN / 2) * error:
        return table
    for differ in itertools.product((0, 1), repeat=len(axes)):
        # The mean product over ordered pairs, each counted twice, has a standard error of q √(2/pairs). Sums
        # over all positions that differ, squared, once for each of those that agree: χ² with that many
        # degrees of freedom.
        if any(differ):
            agree = math.prod(axis.size for axis, apart in zip(axes, differ, strict=True) if not apart)
            pairs = math.prod(axis.pairs[apart] for axis, apart in zip(axes, differ, strict=True))
            limit = (special.chdtri(agree, _FALSE_CORRELATION) - agree) / math.sqrt(2 * agree)
            if abs(table.second[differ]) > limit * square * math.sqrt(2 / pairs):
                return table
    return independent(0.0, square, axes)


def named(
    interpreter: Interpreter, path: str, shape: tuple[int, ...], table: Table, kurtosis: float = 3.0
) -> Value:
    """A weight leaf with a table."""
    node = interpreter.graph.make(Leaf, table.axes, (), ("given", path))
    odd = bool(np.all(table.mean == 0) and np.count_nonzero(table.second) <= 1)
    node.settle(table, odd=odd, kurtosis=kurtosis)
    return value(node, shape)
