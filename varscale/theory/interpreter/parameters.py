"""The laws of a model's parameters: read from its own init by interpreting it, measured on arrays, or given.

Outputs of an init that the same equations compute from keys of their own are alike; the first of them is interpreted.
"""

import collections
import functools
import itertools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import special

from varscale import _compat
from varscale.initialization.laws import laid
from varscale.initialization.laws import name as law_name
from varscale.programs.pieces import PIECE, is_key
from varscale.report import Weight
from varscale.theory.domain.axes import Axes, axes_of
from varscale.theory.domain.tables import Moments, Table, estimate, independent
from varscale.theory.graph.expressions import roots
from varscale.theory.graph.layout import Value, full, value
from varscale.theory.graph.nodes import UNKNOWN, Leaf
from varscale.theory.interpreter.inputs import MODEL_SEED, known_or_real
from varscale.theory.interpreter.interpreter import Interpreter
from varscale.theory.rules.random import as_weight, is_weight, redrawn
from varscale.theory.rules.registry import Complex, Opaque, live_equations, map_parts, parts
from varscale.usage.parameters import ParameterUses, named_leaves

# E[w⁴]/E[w²]² of the laws that are told by name: a normal one, one truncated at ±2 deviations, a uniform one.
_KURTOSIS = {"normal": 3.0, "truncated normal": 2.3655, "uniform": 1.8}
_MAPS = ("linear", "convolution", "depthwise", "lookup")


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree, laws among them, by path: joined with "/", without the collection "params" and boxes' values."""
    found, of_box = {}, jax.tree_util.GetAttrKey("value")
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_law):
        keys = tuple(key for key in path if key != of_box)
        found[jax.tree_util.keystr(keys, simple=True, separator="/").removeprefix("params/")] = leaf
    return found


class Recipe(NamedTuple):
    """How a variable is computed, random keys apart."""

    number: int  # equal for equal computations, whatever the keys they draw from; 0 for a key itself
    keys: tuple[int, ...]  # the numbers of those keys, in the order of their first use


def first_alike(recipes: Sequence[Recipe]) -> list[int]:
    """For each output, the first one that the same equations compute from keys that no other output draws from.

    Outputs that draw from no key are alike where they are the same.
    """
    uses = collections.Counter(key for recipe in recipes for key in recipe.keys)
    found: dict[Hashable, int] = {}
    return [
        found.setdefault(r.number, i) if r.number > 0 and all(uses[key] == 1 for key in r.keys) else i
        for i, r in enumerate(recipes)
    ]


@functools.lru_cache(maxsize=256)
def output_recipes(jaxpr: Any) -> list[Recipe]:
    """The recipes of a jaxpr's outputs."""
    numbers: dict[Hashable, int] = collections.defaultdict(lambda: len(numbers) + 1)
    known = {v: Recipe(numbers["given", i], ()) for i, v in enumerate([*jaxpr.constvars, *jaxpr.invars])}

    def recipe(atom: Any) -> Recipe:
        if not _compat.is_literal(atom):
            return known[atom]
        return Recipe(numbers["literal", atom.aval, np.asarray(atom.val).tobytes()], ())

    for eqn in live_equations(jaxpr):
        operands = [recipe(atom) for atom in eqn.invars]
        keys = tuple(dict.fromkeys(key for operand in operands for key in operand.keys))
        drawn = tuple((operand.number, tuple(map(keys.index, operand.keys))) for operand in operands)
        params = tuple((name, _identity(x)) for name, x in sorted(eqn.params.items()))
        own = [keys] * len(eqn.outvars)
        if eqn.params.get("name") == PIECE:
            # It may draw many parameters from one key; which from the same bits, interpreting it will tell.
            inside = enumerate(output_recipes(eqn.params["jaxpr"].jaxpr))
            own = [tuple(numbers[key, place] for key in keys) if r.keys else () for place, r in inside]
        for place, (var, keys) in enumerate(zip(eqn.outvars, own, strict=True)):
            content = (eqn.primitive, params, place, drawn)
            made = (0, (numbers[content, keys],)) if is_key(var.aval) else (numbers[content], keys)
            known[var] = Recipe(*made)
    return [recipe(atom) for atom in jaxpr.outvars]


def _identity(x: Any) -> Hashable:
    """A parameter of an equation as a key of a dictionary; what has no hash is only itself."""
    try:
        hash(x)
    except TypeError:
        return ("object", id(x))
    return x


def init_laws(
    interpreter: Interpreter, jaxpr: Any, constants: Sequence[Any], inputs: Sequence[Any]
) -> list[Any]:
    """Values with the laws that parameters are drawn from, the outputs of an init's jaxpr; nothing is drawn."""

    def interpreted(which: Sequence[int]) -> dict[int, Any]:
        part = jaxpr.replace(outvars=[jaxpr.outvars[i] for i in which])
        outs = interpreter.run(part, constants, inputs)
        nodes = {part.node for x in outs if not isinstance(x, Opaque) for part in parts(x)}
        count = collections.Counter(r for node in nodes for r in {r.node for r in roots(node)})

        def parameter(x: Any) -> Any:
            """One of them: a weight of its own, unless others are made from the same draws."""
            if isinstance(x, Opaque):
                return x
            shared = [r.node for r in roots(x.node) if count[r.node] > 1]
            for made in shared:
                if not isinstance(made, Leaf):  # a spectral norm's vector, turned by the weights
                    made.mark("assumed", UNKNOWN)
            return x if shared else as_weight(interpreter, x)

        return {i: map_parts(parameter, x) for i, x in zip(which, outs, strict=True)}

    recipes = output_recipes(jaxpr)
    first = first_alike(recipes)
    values = interpreted(sorted(set(first)))
    drawn = [i for i, j in enumerate(first) if i != j and recipes[i].keys]
    values |= interpreted([i for i in drawn if not is_weight(values[first[i]])])
    for i, j in enumerate(first):
        if i not in values:
            values[i] = redrawn(interpreter, values[j], values[j].node, i) if i in drawn else values[j]
    return [values[i] for i in range(len(first))]


def given_parameters(
    interpreter: Interpreter, params: Any, shapes: Any, declared: Sequence[Any]
) -> tuple[Any, list[Any]]:
    """Shapes and values of parameters given as arrays, initializers, variances or `Moments`; `shapes`: the model's, if any.

    `declared`: the laws of its own init, leaf by leaf, which those of a collection that is not given have.
    """
    given = leaves_by_path(params)
    if shapes is None:
        for path, x in given.items():
            if not (hasattr(x, "shape") and hasattr(x, "dtype")):
                raise TypeError(
                    f"params[{path!r}] of a plain function must be an array or vs.Moments with a shape, not "
                    f"{x!r}; or give params as a function of a key"
                )
        shapes = abstract(params)
    names, keys = set(shapes) if isinstance(shapes, dict) else set(), {*getattr(params, "keys", tuple)()}
    missing = names - ({"params"} if "params" in names - keys else keys)
    structs = leaves_by_path(shapes)
    absent = [p for p in structs if p not in given and p.split("/")[0] not in missing]
    extra = [p for p in given if p not in structs]
    if absent or extra:
        raise ValueError(
            f"params must have the model's structure: missing {absent[:4]}, unexpected {extra[:4]}"
        )
    return shapes, [
        _given_parameter(interpreter, given[path], path, struct) if path in given else own
        for (path, struct), own in zip(structs.items(), declared or structs, strict=True)
    ]


def laws_laid(scheme: Any, variables: Any) -> list[tuple[Any, Any]]:
    """By leaf of a tree the law that a scheme (`varscale.initialization.laws.laid`) lays on it, or None, and the leaf."""
    leaves = jax.tree_util.tree_leaves(variables)
    pairs = zip(named_leaves(variables), leaves, strict=True)
    named = [(name.path, tuple(leaf.shape), leaf.dtype, name.learned) for name, leaf in pairs]
    return [(hit and hit.law, leaf) for hit, leaf in zip(laid(scheme, named, "scheme"), leaves, strict=True)]


def laid_parameters(interpreter: Interpreter, shapes: Any, values: Sequence[Any], scheme: Any) -> list[Any]:
    """The parameters' values, leaf by leaf, where a scheme lays laws on some of them."""
    found, first = list(values), {}
    for i, (law, struct) in enumerate(laws_laid(scheme, shapes)):
        if law is None:
            continue
        key = (law_name(law), tuple(struct.shape), struct.dtype)
        if not is_weight(first.get(key)):
            first[key] = _laid_parameter(interpreter, law, struct, i)
        # Where a walk draws it, its numbers are those of its place, whatever its law.
        found[i] = redrawn(interpreter, first[key], "laid", i) if is_weight(first[key]) else first[key]
    return found


def _laid_parameter(interpreter: Interpreter, law: Any, struct: Any, number: int) -> Any:
    """A parameter under a law: a weight, or one times factors, such as those of layers that are stacked in it."""
    shape, dtype = tuple(struct.shape), struct.dtype
    if hasattr(law, "spread"):
        drawn = _laid_parameter(interpreter, law.init, struct, number)
        return _run(interpreter, lambda w: w * jax.numpy.asarray(law.spread(shape), dtype), (struct, drawn))
    # A key of its own: what is drawn from one key is one and the same.
    return as_weight(interpreter, _run(interpreter, lambda: law(jax.random.key(number), shape, dtype)))


def _run(interpreter: Interpreter, function: Any, *operands: tuple[Any, Any]) -> Any:
    """The value of a function of operands, each given by its shape and its value."""
    traced = jax.make_jaxpr(function)(*(struct for struct, _ in operands))
    return interpreter.run(traced.jaxpr, traced.consts, [x for _, x in operands])[0]


def abstract(params: Any) -> Any:
    """The parameters of a plain function, given as `predict` takes them, as abstract arrays; None for None."""
    if is_function(params):
        return jax.eval_shape(params, jax.random.key(MODEL_SEED))
    struct = jax.ShapeDtypeStruct
    return jax.tree.map(
        lambda x: struct(x.shape, x.dtype) if isinstance(x, Moments) else x, params, is_leaf=is_law
    )


def is_law(x: Any) -> bool:
    """Whether it is one leaf of a tree of parameters, though jax may not take it for one: `Moments`, an initializer."""
    return isinstance(x, Moments) or is_function(x)


def is_function(x: Any) -> bool:
    """Whether it is called rather than opened; a tree of arrays may be callable too, as an Equinox module is."""
    return callable(x) and not hasattr(x, "get_value") and jax.tree_util.all_leaves([x])


def _given_parameter(interpreter: Interpreter, x: Any, path: str, struct: Any) -> Any:
    shape = tuple(struct.shape)
    axes = axes_of(shape)

    def leaf(table: Table, kurtosis: float = 3.0) -> Value:
        node = interpreter.graph.make(Leaf, table.axes, (), ("given", path))
        odd = bool(np.all(table.mean == 0) and np.count_nonzero(table.second) <= 1)
        return value(node.settle(table, odd=odd, kurtosis=kurtosis), shape)

    if is_key(struct):
        return Opaque(x if isinstance(x, jax.Array) else jax.random.key(MODEL_SEED))
    if isinstance(x, int | float) and not isinstance(x, bool):
        if not np.isfinite(x) or x < 0:
            raise ValueError(f"params[{path!r}] as a variance must be finite and not negative, not {x!r}")
        x = Moments(0.0, float(x))
    if isinstance(x, Moments):
        if (x.sample_correlation, x.position_correlation) != (None, None):
            raise ValueError(
                f"params[{path!r}] must have independent entries: correlations are an input's, not {x!r}'s"
            )
        law = independent(x.mean, x.second_moment, axes)
        return leaf(law) if x.second_moment else full(interpreter.graph, 0.0, shape)
    if isinstance(x, jax.ShapeDtypeStruct):
        raise TypeError(
            f"params[{path!r}] is a ShapeDtypeStruct, which has no law; give an array, an initializer "
            "or a variance"
        )
    if callable(x):
        drawn = _run(interpreter, lambda: x(jax.random.key(MODEL_SEED), shape, struct.dtype))
        return as_weight(interpreter, drawn)
    numbers = np.asarray(x)
    if numbers.shape != shape:
        raise ValueError(f"params[{path!r}] must have shape {shape}, not {numbers.shape}")
    if numbers.dtype.kind == "c":
        pair = {f"{path}.real": np.real(numbers), f"{path}.imag": np.imag(numbers)}
        return Complex(*(_given_parameter(interpreter, part, name, part) for name, part in pair.items()))
    found = known_or_real(interpreter, numbers, f"params[{path!r}]")
    if not isinstance(found, np.ndarray):
        return found
    kurtosis = float(np.mean(found**4) / np.mean(found**2) ** 2)
    return leaf(measured_law(np.squeeze(found), axes), kurtosis)


# Chances that a mean, and each correlation, of independent entries is taken for real: 4 and 5 deviations.
_FALSE_MEAN, _FALSE_CORRELATION = 6e-5, 6e-7


def measured_law(numbers: np.ndarray, axes: Axes) -> Table:
    """The table of a real weight array; correlations and a mean within their own sampling error are no news, and are zero."""
    table = estimate(numbers, axes)
    square, error = table.mean_square, np.sqrt(numbers.var() / numbers.size)
    if abs(table.total_mean) > special.ndtri(1 - _FALSE_MEAN / 2) * error:
        return table
    for differ in [*itertools.product((0, 1), repeat=len(axes))][1:]:
        # The mean product over ordered pairs, each counted twice, has a standard error of q √(2/pairs). Sums
        # over all positions that differ, squared, once for each of those that agree: χ² with that many
        # degrees of freedom.
        agree = math.prod(axis.size for axis, apart in zip(axes, differ, strict=True) if not apart)
        pairs = math.prod(axis.pairs[apart] for axis, apart in zip(axes, differ, strict=True))
        limit = (special.chdtri(agree, _FALSE_CORRELATION) - agree) / math.sqrt(2 * agree)
        if abs(table.second[differ]) > limit * square * math.sqrt(2 / pairs):
            return table
    return independent(0.0, square, axes)


def weights(parameters: Iterable[tuple[str, Any]], uses: Mapping[str, ParameterUses]) -> dict[str, Weight]:
    """The law and the use of every parameter that is random, by path, as `uses` tells of those that the forward pass takes."""
    out: dict[str, Weight] = {}
    for path, x in parameters:
        if not isinstance(x, Value) or not isinstance(x.node, Leaf):
            continue
        table, kurtosis = x.node.table, x.node.kurtosis
        found = [use for use in uses[path].uses if use.kind in _MAPS] if path in uses else []
        # A table that is looked up and read out by is a linear map where it is read out.
        fans = max(((use.fan_in, use.fan_out) for use in found), default=(None, None))
        ratio = 1 / (fans[0] * table.variance) if fans[0] and table.variance > 0 else None
        times = sum(use.times * use.layers for use in found)
        name = next((name for name, known in _KURTOSIS.items() if abs(kurtosis - known) < 0.02), "random")
        law = f"{name}(std={table.variance**0.5:.4g})"
        out[path] = Weight(path, x.shape, law, table.total_mean, table.variance, *fans, times, ratio)
    return out
