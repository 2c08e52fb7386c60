"""One face for linen modules, nnx modules and plain functions: parameters in, output and every module's output out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
_KEY_SEED = 0  # dropout and the like: the law of the output does not depend on it


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Positional and keyword inputs of a model; build it with `inputs`."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def inputs(*args: Any, **kwargs: Any) -> Inputs:
    """Several inputs or keywords for a model: `vs.inputs(images, train=False)`.

    Args:
        *args: positional inputs: arrays, `jax.ShapeDtypeStruct`, `vs.Moments` or pytrees of them; other values are
            passed as they are.
        **kwargs: keyword inputs, likewise.
    """
    return Inputs(args, kwargs)


def as_inputs(x: Any) -> Inputs:
    """`x` itself if it is an `Inputs`, otherwise the single input `x`."""
    return x if isinstance(x, Inputs) else Inputs((x,), {})


@dataclasses.dataclass(frozen=True)
class Program:
    """A model as two traceable functions.

    Attributes:
        kind: class name of the model.
        init: key, inputs -> parameters (every collection of variables); None where the model is a plain function.
        apply: parameters, inputs -> (output, {path: output of the module called there}).
        parameters: the parameters a model instance already holds, or None.
        kinds: path of a module -> its class name; complete once `apply` was traced.
    """

    kind: str
    init: Callable[[Any, Inputs], Tree] | None
    apply: Callable[[Tree, Inputs], tuple[Any, dict[str, Any]]]
    parameters: Tree | None = None
    kinds: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)


def program(model: Any, *, method: str | None = None) -> Program:
    """The program behind `model`.

    Args:
        model: a linen module, an nnx factory `lambda rngs: Net(..., rngs=rngs)`, an nnx instance, or a function
            f(params, *args, **kwargs).
        method: name of the method to run in place of `__call__`.

    Raises:
        TypeError: `model` is none of these.
        ValueError: it has no such method.
    """
    import flax.linen as nn
    from flax import nnx

    name = method or "__call__"
    if isinstance(model, nn.Module):
        if not callable(getattr(model, name, None)):
            raise ValueError(f"method must name a method of {type(model).__name__}, not {method!r}")
        return _linen(model, name)
    if isinstance(model, nnx.Module):
        if not callable(getattr(model, name, None)):
            raise ValueError(f"method must name a method of {type(model).__name__}, not {method!r}")
        return _nnx(type(model).__name__, name, *nnx.split(model))
    if not callable(model) or isinstance(model, type):
        raise TypeError(
            "model must be a linen module, an nnx factory `lambda rngs: Net(..., rngs=rngs)`, an nnx instance "
            f"or a function f(params, *args), not {model!r}"
        )
    if _takes_rngs(model):
        return _nnx_factory(model, name)
    if method is not None:
        raise ValueError(f"method={method!r} makes no sense for a plain function")

    def apply(params: Tree, x: Inputs) -> tuple[Any, dict[str, Any]]:
        return model(params, *x.args, **x.kwargs), {}

    return Program(getattr(model, "__name__", "function"), None, apply)


def _takes_rngs(model: Callable[..., Any]) -> bool:
    """An nnx factory has one parameter without a default, called `rngs` (`_` and `r` are seen too)."""
    import inspect

    try:
        parameters = inspect.signature(model).parameters.values()
    except (TypeError, ValueError):
        return False
    required = [p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return required in (["rngs"], ["r"], ["_"])


def _linen(model: Any, method: str) -> Program:
    import flax.linen as nn

    kinds: dict[str, str] = {"": type(model).__name__}

    def record(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if context.module.scope is not None:  # a module without parameters may be called unbound
            kinds.setdefault("/".join(context.module.path), type(context.module).__name__)
        return next_fun(*args, **kwargs)

    def init(key: Any, x: Inputs) -> Tree:
        variables = dict(model.init({"params": key}, *x.args, method=method, **x.kwargs))
        variables.pop("intermediates", None)
        return variables

    def apply(variables: Tree, x: Inputs) -> tuple[Any, dict[str, Any]]:
        mutable = ["intermediates", *(name for name in variables if name != "params")]
        with nn.intercept_methods(record):
            output, state = model.apply(
                variables,
                *x.args,
                method=method,
                rngs={"params": jax.random.key(_KEY_SEED)},
                mutable=mutable,
                capture_intermediates=lambda module, name: (
                    module.scope is not None and (not name.startswith("_") or name == "__call__")
                ),
                **x.kwargs,
            )
        return output, _captures(state.get("intermediates", {}), method)

    return Program(type(model).__name__, init, apply, kinds=kinds)


def _nnx(kind: str, method: str, graph: Any, parameters: Tree, init: Any = None) -> Program:
    from flax import nnx

    kinds: dict[str, str] = {}

    def apply(state: Tree, x: Inputs) -> tuple[Any, dict[str, Any]]:
        model = nnx.merge(graph, state)
        for path, module in nnx.iter_modules(model):
            kinds.setdefault("/".join(map(str, path)), type(module).__name__)
        run = nnx.capture(getattr(model, method), nnx.Intermediate, method_outputs=nnx.Intermediate)
        try:
            output, captured = run(*x.args, **x.kwargs)
        except Exception:
            # Captures inside a scan change the structure of its carry: then the output alone, or the model's own error.
            return getattr(nnx.merge(graph, state), method)(*x.args, **x.kwargs), {}
        return output, _captures(nnx.to_pure_dict(captured), method)

    return Program(kind, init, apply, parameters, kinds)


def _nnx_factory(factory: Callable[..., Any], method: str) -> Program:
    from flax import nnx

    built: list[Any] = []

    def split(key: Any) -> Tree:
        model = factory(nnx.Rngs(key))
        if not isinstance(model, nnx.Module):
            raise TypeError(f"an nnx factory must return an nnx.Module, not {model!r}")
        graph, state = nnx.split(model)
        built[:] = [graph, type(model).__name__]
        return state

    jax.eval_shape(split, jax.random.key(_KEY_SEED))
    graph, kind = built
    return _nnx(kind, method, graph, None, init=lambda key, x: split(key))


def _captures(tree: Any, method: str, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """Flax's nested capture as {path: output}, named as the report names its rows.

    A module called again is "path#1", another method than `__call__` "path.encode"; the method that was
    asked for is the model itself.
    """
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _captures(value, method, (*prefix, str(name)))
            continue
        path = "/".join(prefix)
        if str(name) != "__call__" and not (prefix == () and name == method):
            path += f".{name}"
        for i, output in enumerate(value if isinstance(value, tuple) else (value,)):
            found[path + (f"#{i}" if i else "")] = output
    return found


def leaf_paths(path: str, output: Any) -> Iterable[tuple[str, Any]]:
    """The arrays of an output with their row paths: "path" for an array, "path[0]" or "path['k']" inside a container.

    A field of a dataclass is "path['field']" too: "path.name" is a method's row.
    """
    for keys, leaf in jax.tree_util.tree_flatten_with_path(output)[0]:
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            yield path + jax.tree_util.keystr(tuple(_plain(key) for key in keys)), leaf


def _plain(key: Any) -> Any:
    """A field of a dataclass as its name, a place in some other container as its number."""
    if isinstance(key, jax.tree_util.GetAttrKey):
        return jax.tree_util.DictKey(key.name)
    return jax.tree_util.SequenceKey(key.key) if isinstance(key, jax.tree_util.FlattenedIndexKey) else key


def is_dynamic(leaf: Any) -> bool:
    """Whether an input leaf is traced: arrays and abstract arrays are, Python values (flags, names, numbers) are not."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) or (
        hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    )


def _is_live(leaf: Any) -> bool:
    """Whether a captured array can be used here: that of a method which ran inside a plain `jax.vmap` cannot."""
    try:
        jnp.ravel(leaf)[:0]  # nothing is computed, but whoever left its transformation is found out
    except jax.errors.UnexpectedTracerError:
        return False
    return True


def rename(captures: Mapping[str, Any], output: Any) -> dict[str, Any]:
    """Every array of the captures and of the model's own output, by row path, the output last."""
    rows: dict[str, Any] = {}
    for path, value in captures.items():
        if path != "":
            rows.update((row, leaf) for row, leaf in leaf_paths(path, value) if _is_live(leaf))
    rows.update(leaf_paths("", output))
    return rows
