"""Parameters drawn alike: an init repeats the same equations layer after layer, each time from a key of its own."""

from __future__ import annotations

import collections
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from varscale import _compat
from varscale.programs.pieces import PIECE
from varscale.theory.rules.registry import live_equations


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
