"""New values for some leaves of a model that exists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from varscale.initialization import laws, tiles
from varscale.initialization.derivation import is_traced
from varscale.initialization.drawing import LaidDrawing, compile_all, compiled, settings
from varscale.initializers.sampling import checked_key
from varscale.programs.patterns import Pattern
from varscale.programs.trees import is_collections, open_tree

P = TypeVar("P")


def reinitialize(params: P, laws_by_pattern: Mapping[Pattern, laws.Law] | Any, key: Any) -> P:
    """New values for the leaves that patterns name; all others are the same arrays as before.

    Args:
        params: parameters (any tree, linen variables, an nnx.State) or an nnx model; it is not changed.
        laws_by_pattern: from path patterns to initializers, of which the first that matches counts. Paths are those of
            parameters without linen's "params/". A pattern that names a module lays a law that needs fans on its weights alone,
            not on biases and other vectors. Blocks of a packed kernel are addressed by `vs.fused` with one law a block, None to
            keep what it holds.
        key: a PRNG key; every leaf is drawn with a key of its own, derived from this and its path.

    Returns:
        The parameters or the model, of the same kind; new leaves have the dtype (float32 for float64,
            unless `jax_enable_x64` is set) and the sharding of the old ones.

    Raises:
        TypeError: laws_by_pattern is no mapping, a law no initializer, key no key.
        ValueError: a pattern matches nothing, a law cannot draw its leaf, or a law is "declared": the layers of a model that
            exists no longer hold their initializers, so give the factory to `vs.initialize`.

    >>> import jax, varscale as vs
    >>> params = {"body": {"kernel": jax.numpy.ones((2, 2))}, "head": {"kernel": jax.numpy.ones((2, 3))}}
    >>> new = vs.reinitialize(params, {"head": vs.zeros}, jax.random.key(0))
    >>> float(new["head"]["kernel"].sum()), new["body"]["kernel"] is params["body"]["kernel"]
    (0.0, True)
    """
    if not isinstance(laws_by_pattern, Mapping) and not hasattr(laws_by_pattern, "laws_of"):
        declared = isinstance(laws_by_pattern, str) and laws_by_pattern == "declared"
        if laws.is_unapplied(laws_by_pattern):
            call = getattr(laws_by_pattern, "call", laws_by_pattern)
            raise TypeError(f"laws must be the plan of a scheme: scheme(model, x), not {call} alone")
        raise (ValueError if declared else TypeError)(
            "laws must be a mapping from path patterns to initializers, not "
            f"{laws_by_pattern!r}" + ": a model that exists no longer holds its initializers (flax drops them); give the "
            "factory `lambda rngs: Net(..., rngs=rngs)`, or the linen module, to vs.initialize" * declared
        )
    typed = checked_key(key)
    opened = open_tree(params, "params")
    collections = is_collections(opened.paths)
    described = [
        (leaf.path, leaf.shape, leaf.dtype, leaf.is_weight and (not collections or leaf.path.startswith("params/")))
        for leaf in opened.leaves
    ]
    values = [leaf.value for leaf in opened.leaves]
    programs: dict[int, LaidDrawing] = {}
    for i, hit in enumerate(laws.laid(laws_by_pattern, described, "laws")):
        if hit is None:
            continue
        path, shape, dtype, _ = described[i]
        laws.check(hit, path, shape, dtype, jax.random.key_impl(typed), "laws")
        programs[i] = LaidDrawing(
            hit.law, laws.name(hit.law), laws.plain_core(shape), jax.random.key_impl(typed),
            (jax.dtypes.canonicalize_dtype(dtype),), (_place(values[i]),), None, settings(),
        )  # fmt: skip
    words = {i: laws.own_words(typed, described[i][0], program.law) for i, program in programs.items()}
    traced = is_traced(typed)
    tiled = {} if traced else tiles.tiled(programs, {i: lambda i=i: [words[i]] for i in programs})
    if not traced:
        compile_all([tiled[i].program if i in tiled else program for i, program in programs.items()])
    drawn = dict(zip(tiled, jax.device_put(tiles.drawn(list(tiled.values()))), strict=True))
    for i, program in programs.items():
        new = drawn[i] if i in drawn else (program if traced else compiled(program))(words[i])[0]
        if laws.keeps(program.law):
            new = jnp.where(program.law.kept(described[i][1]), values[i], new)  # pyright: ignore[reportFunctionMemberAccess]
        values[i] = new
    return opened.rebuild(values)


def _place(value: Any) -> Any:
    """The sharding of an array over several devices; None for one on the default device."""
    sharding = getattr(value, "sharding", None)
    return sharding if sharding is not None and len(sharding.device_set) > 1 else None
