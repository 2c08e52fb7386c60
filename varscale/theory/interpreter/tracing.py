"""From a model to jaxprs: how its parameters are drawn, and its forward pass. One trace gives both where one pass does both."""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from varscale import _compat
from varscale.programs import faces, failures
from varscale.programs.caches import fresh_traces
from varscale.programs.pieces import PIECE
from varscale.programs.program import Program
from varscale.theory.graph.store import PredictionError
from varscale.theory.rules.registry import live_equations

INIT_SEED = 0  # laws do not depend on the seed


class Trace(NamedTuple):
    """A traced function.

    Attributes:
        jaxpr: its jaxpr.
        constants: values of the jaxpr's constants.
        shapes: shapes of its outputs, as a tree.
    """

    jaxpr: Any
    constants: Sequence[Any]
    shapes: Any


class Draws(NamedTuple):
    """How a model draws its parameters.

    Attributes:
        drawing: inputs to parameters.
        forward: parameters (those of `used`) and inputs to rows, where the pass that drew them is the forward pass too.
        used: places of the parameters that `forward` takes.
    """

    drawing: Trace
    forward: Trace | None
    used: Sequence[int]


def traced(f: Callable[..., Any], *args: Any) -> Trace:
    """The trace of a function of these shapes.

    Raises:
        ValueError: it does not trace.
    """
    try:
        with fresh_traces():
            jaxpr, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
    except PredictionError:
        raise
    except Exception as error:
        raise ValueError(f"the model does not trace on these inputs: {failures.told(error)}") from error
    return Trace(jaxpr.jaxpr, jaxpr.consts, shapes)


def first_pass(program: Program, split: Any) -> Draws | None:
    """How a model draws its parameters, and the forward pass that it does on the way if it is the one it does ever after.

    None where it does not trace: modules that transform all variables of another (a spectral norm) take captures for some.
    """
    alike: list[bool] = []

    def both(dynamic: Any) -> Any:
        key = jax.random.key(INIT_SEED)
        variables, output, captures, same = program.start(key, split.join(dynamic))  # pyright: ignore
        alike.append(same)
        return variables, faces.grouped(captures, output)

    try:
        jaxpr, constants, (variables, rows) = traced(both, split.structs)
    except ValueError:
        return None
    count = len(jax.tree_util.tree_leaves(variables))
    drawn, outputs = jaxpr.outvars[:count], jaxpr.outvars[count:]
    drawing = Trace(jaxpr.replace(outvars=drawn), constants, variables)
    used = {v: i for i, v in reversed(list(enumerate(drawn))) if not _compat.is_literal(v)}
    if not alike[-1] or not used.keys().isdisjoint(jaxpr.invars):
        return Draws(drawing, None, ())
    forward = jaxpr.replace(invars=[*used, *jaxpr.invars], outvars=outputs)
    atoms = (v for eqn in live_equations(forward) for v in (*eqn.invars, *eqn.outvars))
    if any(jnp.issubdtype(getattr(v.aval, "dtype", bool), jax.dtypes.prng_key) for v in atoms):
        # Drawn inside a loop, say: what it computes with is not what it returns.
        return Draws(drawing, None, ())
    return Draws(drawing, Trace(forward, constants, rows), tuple(used.values()))


def execution_order(jaxpr: Any, shapes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Calls by the equation that makes the first of what they put out; those that end together from the innermost out.

    The model itself is the last.
    """
    at = iter(_places(jaxpr))
    where = {call: [next(at) for _ in shapes[call]] for call in shapes}
    return sorted(shapes, key=lambda call: (call == "", where[call][:1], -call.count("/")))


def _places(jaxpr: Any) -> list[tuple[int, ...]]:
    """For each output, which equation makes it and which of its outputs it is; inside a piece also where in that."""
    made = {var: (i, eqn, j) for i, eqn in enumerate(jaxpr.eqns) for j, var in enumerate(eqn.outvars)}
    inner: dict[int, list[tuple[int, ...]]] = {}

    def place(var: Any) -> tuple[int, ...]:
        if _compat.is_literal(var) or var not in made:
            return (-1, 0)
        i, eqn, j = made[var]
        if eqn.params.get("name") != PIECE:
            return (i, j)
        if i not in inner:
            inner[i] = _places(eqn.params["jaxpr"].jaxpr)
        return (i, *inner[i][j])

    return [place(var) for var in jaxpr.outvars]


class Recipe(NamedTuple):
    """How a variable is computed, random keys apart.

    Attributes:
        number: equal for equal computations, whatever the keys they draw from; 0 for a key itself.
        keys: the numbers of those keys, in the order of their first use.
    """

    number: int
    keys: tuple[int, ...]


def first_alike(recipes: Sequence[Recipe]) -> list[int]:
    """For each output, the first one that the same equations compute from keys that no other output draws from.

    Outputs that draw from no key are alike where they are the same.
    """
    uses = collections.Counter(key for recipe in recipes for key in recipe.keys)
    found: dict[Hashable, int] = {}
    out = []
    for i, recipe in enumerate(recipes):
        alone = recipe.number > 0 and all(uses[key] == 1 for key in recipe.keys)
        out.append(found.setdefault(recipe.number, i) if alone else i)
    return out


def output_recipes(jaxpr: Any) -> list[Recipe]:
    """The recipes of a jaxpr's outputs."""
    numbers: dict[Hashable, int] = {}

    def number(content: Hashable) -> int:
        return numbers.setdefault(content, len(numbers) + 1)

    known: dict[Any, Recipe] = {
        v: Recipe(number(("given", i)), ()) for i, v in enumerate([*jaxpr.constvars, *jaxpr.invars])
    }

    def recipe(atom: Any) -> Recipe:
        if not _compat.is_literal(atom):
            return known[atom]
        return Recipe(number(("literal", atom.aval, np.asarray(atom.val).tobytes())), ())

    inside: dict[int, list[Recipe]] = {}
    for eqn in live_equations(jaxpr):
        operands = [recipe(atom) for atom in eqn.invars]
        keys = tuple(dict.fromkeys(key for operand in operands for key in operand.keys))
        drawn = tuple(
            (operand.number, tuple(keys.index(key) for key in operand.keys)) for operand in operands
        )
        params = tuple((name, _identity(x)) for name, x in sorted(eqn.params.items()))
        own = [keys] * len(eqn.outvars)
        if eqn.params.get("name") == PIECE:
            # It may draw many parameters from one key. If it draws some of them from the same bits, that is
            # found out when it is interpreted.
            inner = eqn.params["jaxpr"]
            if id(inner) not in inside:
                inside[id(inner)] = output_recipes(inner.jaxpr)
            own = [
                tuple(number((key, place)) for key in keys) if r.keys else ()
                for place, r in enumerate(inside[id(inner)])
            ]
        for place, (var, keys) in enumerate(zip(eqn.outvars, own, strict=True)):
            content = (eqn.primitive, params, place, drawn)
            is_key = jax.numpy.issubdtype(var.aval.dtype, jax.dtypes.prng_key)
            known[var] = Recipe(0, (number((content, keys)),)) if is_key else Recipe(number(content), keys)
    return [recipe(atom) for atom in jaxpr.outvars]


def _identity(x: Any) -> Hashable:
    """A parameter of an equation as a key of a dictionary; what has no hash is only itself."""
    try:
        hash(x)
    except TypeError:
        return ("object", id(x))
    return x
