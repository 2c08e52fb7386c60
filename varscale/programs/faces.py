"""One face for linen modules, nnx modules and plain functions: parameters in, output and every module's output out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from varscale.programs import mapped_axes
from varscale.programs.calls import Call, recorder, recording
from varscale.programs.linen_models import linen_program
from varscale.programs.marks import Marking, field_path
from varscale.programs.nnx_models import factory_program, instance_program
from varscale.programs.program import Inputs, Program, Tree


def inputs(*args: Any, **kwargs: Any) -> Inputs:
    """Several inputs or keywords for a model: `vs.inputs(images, train=False)`.

    Args:
        *args: positional inputs: arrays, `jax.ShapeDtypeStruct`, `vs.Moments` or pytrees of them; other values are
            passed as they are.
        **kwargs: keyword inputs, likewise.
    """
    return Inputs(args, kwargs)


def as_inputs(x: Any) -> Inputs:
    """`x` itself if it is an `Inputs`, otherwise the single input `x`; a tuple of integers is the shape of a float32 array."""
    if isinstance(x, Inputs):
        return x
    if isinstance(x, tuple) and x and all(isinstance(n, int) and not isinstance(n, bool) for n in x):
        x = jax.ShapeDtypeStruct(x, jnp.float32)
    return Inputs((x,), {})


def method_name(model: Any, method: str | None) -> str:
    """The name of the method that runs: `method`, or `__call__` where it is None.

    Raises:
        TypeError: method is no name, such as the method itself.
        ValueError: the model has no such method.
    """
    name = "__call__" if method is None else method
    if not isinstance(name, str):
        told = f", which is method={name.__name__!r}" if hasattr(type(model), getattr(name, "__name__", "")) else ""
        raise TypeError(f"method must be the name of a method of {type(model).__name__}, not {method!r}{told}")
    if not callable(getattr(model, name, None)):
        raise ValueError(f"method must name a method of {type(model).__name__}, not {method!r}")
    return name


def program(model: Any, *, method: str | None = None) -> Program:
    """The program behind `model`.

    Args:
        model: a linen module (or an object that holds one as its `module`, as Hugging Face's do), an nnx factory
            `lambda rngs: Net(..., rngs=rngs)` (or `functools.partial(Net, ...)`, an nnx class, `lambda key: Net(...)`), an nnx
            instance, or a function f(params, *args, **kwargs).
        method: name of the method to run in place of `__call__`.

    Raises:
        TypeError: `model` is none of these.
        ValueError: it has no such method.
    """
    return mapped_axes.bound(_program(model, method))


def _program(model: Any, method: str | None) -> Program:
    if isinstance(model, nn.Module):
        return linen_program(model, method_name(model, method))
    if isinstance(model, nnx.Module):
        return instance_program(model, method_name(model, method))
    if isinstance(getattr(model, "module", None), nn.Module):
        return _program(model.module, method)
    if callable(model) and (build := _factory(model)) is not None:
        return factory_program(build, method or "__call__")
    made = model.func if isinstance(model, functools.partial) else model
    if isinstance(made, type) and issubclass(made, nnx.Module):
        told = f"`functools.partial({made.__name__}, ...)` with all that it takes but rngs"
        raise TypeError(f"model must be built from rngs alone: give {told}, or `lambda rngs: {made.__name__}(..., rngs=rngs)`")
    if not callable(model) or isinstance(made, type):
        raise TypeError(
            "model must be a linen module, an nnx factory `lambda rngs: Net(..., rngs=rngs)`, an nnx instance "
            f"or a function f(params, *args), not {model!r}"
        )
    if method is not None:
        raise ValueError(f"method={method!r} makes no sense for a plain function")

    return _function_program(model)


def _function_program(function: Callable[..., Any]) -> Program:
    kind = getattr(function, "__name__", "function")
    kinds: dict[str, str] = {}

    def run(params: Tree, x: Inputs, rngs: Any = None) -> Any:
        record = recorder()
        call = functools.partial(function, params, *x.args, **x.kwargs)
        return call() if record is None else record(Call("", "__call__", kind), call)

    def apply(params: Tree, x: Inputs) -> tuple[Any, dict[str, Any]]:
        marking = Marking("__call__", kinds)
        with recording(marking.run):
            return run(params, x), marking.outputs

    return Program(kind, None, apply, run, kinds=kinds)


def _factory(model: Callable[..., Any]) -> Callable[[nnx.Rngs], Any] | None:
    """An nnx factory as a function of rngs; None where a callable is none.

    Its one parameter without a default is called `rngs` (by position `_` and `r` are seen too) or `key`.
    """
    inner, given = (model.func, model) if isinstance(model, functools.partial) else (model, functools.partial(model))
    if isinstance(inner, type) and issubclass(inner, nnx.Module):  # whose metaclass hides what it takes
        inner = functools.partial(inner.__init__, None)  # pyright: ignore[reportArgumentType]
    try:
        parameters = inspect.signature(functools.partial(inner, *given.args, **given.keywords)).parameters.values()
    except (TypeError, ValueError):
        return None
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(required) != 1:
        return None
    (only,) = required
    if only.name == "rngs" and only.kind is only.KEYWORD_ONLY:
        return lambda rngs: model(rngs=rngs)
    if only.name in ("rngs", "r", "_"):
        return model
    if only.name in ("key", "rng"):
        by_name = only.kind is only.KEYWORD_ONLY
        return lambda rngs: model(**{only.name: rngs.default.key[...]}) if by_name else model(rngs.default.key[...])
    return None


def leaf_paths(path: str, output: Any) -> Iterable[tuple[str, Any]]:
    """The arrays of an output with their row paths: "path" for an array, "path[0]" or "path['k']" inside a container.

    A field of a dataclass is "path['field']" too: "path.name" is a method's row.
    """
    for keys, leaf in jax.tree_util.tree_flatten_with_path(output)[0]:
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            yield path + field_path(keys), leaf


def is_dynamic(leaf: Any) -> bool:
    """Whether an input leaf is traced: arrays and abstract arrays are, Python values (flags, names, numbers) are not."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) or (
        hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    )


def split(given: Inputs) -> tuple[list[Any], Callable[[Sequence[Any]], Inputs]]:
    """The arrays of a model's inputs, and the function that puts others in their places."""
    leaves, tree = jax.tree_util.tree_flatten((given.args, dict(given.kwargs)))
    places = [i for i, leaf in enumerate(leaves) if is_dynamic(leaf)]

    def join(arrays: Sequence[Any]) -> Inputs:
        full = list(leaves)
        for i, x in zip(places, arrays, strict=True):
            full[i] = x
        return Inputs(*jax.tree_util.tree_unflatten(tree, full))

    return [leaves[i] for i in places], join


def grouped(captures: Mapping[str, Any], output: Any) -> dict[str, dict[str, Any]]:
    """Every array of the captures and of the model's own output: call -> {row path: array}, the output last."""
    calls = {call: dict(leaf_paths(call, value)) for call, value in captures.items() if call != ""}
    return {**calls, "": dict(leaf_paths("", output))}


def rename(captures: Mapping[str, Any], output: Any) -> dict[str, Any]:
    """Every array of the captures and of the model's own output, by row path, the output last."""
    return {row: leaf for rows in grouped(captures, output).values() for row, leaf in rows.items()}
