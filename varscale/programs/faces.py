"""One face for linen modules, nnx modules and plain functions: parameters in, output and every module's output out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varscale.programs.marks import call_path, field_path, is_open, named

Tree = Any
_PATH = "_varscale_path"  # the attribute that tells an nnx module its own
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
        start: `init` and `apply` in one pass: key, inputs -> (parameters, output, outputs by path, whether `apply` of those
            parameters would compute the same); None where `init` makes no forward pass.
        parameters: the parameters a model instance already holds, or None.
        kinds: path of a module -> its class name; complete once `apply` was traced.
    """

    kind: str
    init: Callable[[Any, Inputs], Tree] | None
    apply: Callable[[Tree, Inputs], tuple[Any, dict[str, Any]]]
    start: Callable[[Any, Inputs], tuple[Tree, Any, dict[str, Any], bool]] | None = None
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
        return _nnx_instance(model, name)
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
    try:
        parameters = inspect.signature(model).parameters.values()
    except (TypeError, ValueError):
        return False
    required = [p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return required in (["rngs"], ["r"], ["_"])


def _linen(model: Any, method: str) -> Program:
    import flax.linen as nn

    from varscale.programs.replays import Replays, captured

    kinds: dict[str, str] = {"": type(model).__name__}
    replays = Replays(kinds)

    def record(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module, name = context.module, context.method_name
        if module.scope is None or replays.tracing:  # a module without parameters may be called unbound
            return next_fun(*args, **kwargs)
        path = "/".join(module.path)
        kinds.setdefault(path, type(module).__name__)
        return named(path, name, method, lambda: replays.call(module, name, args, kwargs, next_fun))

    def init(key: Any, x: Inputs) -> Tree:
        variables = dict(model.init({"params": key}, *x.args, method=method, **x.kwargs))
        variables.pop("intermediates", None)
        return variables

    def apply(variables: Tree, x: Inputs) -> tuple[Any, dict[str, Any]]:
        mutable = ["intermediates", *(name for name in variables if name != "params")]
        rngs = {"params": jax.random.key(_KEY_SEED)}
        replays.start(initializing=False)
        with nn.intercept_methods(record):
            output, state = model.apply(
                variables, *x.args, method=method, rngs=rngs, mutable=mutable, capture_intermediates=captured, **x.kwargs
            )
        return output, _captures(state.get("intermediates", {}), method)

    def start(key: Any, x: Inputs) -> tuple[Tree, Any, dict[str, Any], bool]:
        replays.start(initializing=True)
        with nn.intercept_methods(record), _overheard() as asked:
            output, variables = model.init_with_output(
                {"params": key}, *x.args, method=method, capture_intermediates=captured, **x.kwargs
            )
        variables = dict(variables)
        captures = _captures(variables.pop("intermediates", {}), method)
        return variables, output, captures, not asked and variables.keys() <= {"params"}

    return Program(type(model).__name__, init, apply, start, kinds=kinds)


@contextlib.contextmanager
def _overheard() -> Iterator[list[str]]:
    """The questions by which a linen module can tell that it is being initialized, and so do something else, once asked."""
    import flax.linen as nn

    own = {name: getattr(nn.Module, name) for name in ("is_initializing", "is_mutable_collection", "has_variable")}
    asked: list[str] = []

    def heard(name: str) -> Callable[..., Any]:
        def answer(*args: Any, **kwargs: Any) -> Any:
            asked.append(name)
            return own[name](*args, **kwargs)

        return answer

    try:
        for name in own:
            setattr(nn.Module, name, heard(name))
        yield asked
    finally:
        for name, answer in own.items():
            setattr(nn.Module, name, answer)


def _nnx(graph: Callable[[], Any], method: str, kinds: dict[str, str]) -> Callable[[Tree, Inputs], tuple[Any, dict[str, Any]]]:
    """`apply` of the nnx model with this graph, which writes down its modules' classes."""
    from flax import nnx

    from varscale.programs.assignments import quick_assignments

    def apply(state: Tree, x: Inputs) -> tuple[Any, dict[str, Any]]:
        # Captures change the structure of a scan's carry, and names that of blocks that are stacked: then one of the two,
        # or neither, or the model's own error.
        for scoped, captured in ((True, True), (True, False), (False, True)):
            model = nnx.merge(graph(), state)
            run = getattr(model, method)
            try:
                with quick_assignments(), _nnx_scopes(model, method, kinds) if scoped else contextlib.nullcontext():
                    if not captured:
                        return run(*x.args, **x.kwargs), {}
                    output, found = nnx.capture(run, nnx.Intermediate, method_outputs=nnx.Intermediate)(*x.args, **x.kwargs)
                    return output, _captures(nnx.to_pure_dict(found), method)
            except Exception:
                continue
        return getattr(nnx.merge(graph(), state), method)(*x.args, **x.kwargs), {}

    return apply


@contextlib.contextmanager
def _nnx_scopes(model: Any, method: str, kinds: dict[str, str]) -> Iterator[None]:
    """While it lasts the methods of a model's modules run in scopes that name their paths; their classes are written down.

    The path is a static attribute, which transformations hand on with the rest of the graph.
    """
    from flax import nnx

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            path = getattr(self, _PATH, None)
            if path is None:  # made by another module's call
                return call(self, *args, **kwargs)
            return named(path, name, method, lambda: call(self, *args, **kwargs))

        return run

    methods: dict[tuple[type, str], Callable[..., Any]] = {}
    for path, module in nnx.iter_modules(model):
        setattr(module, _PATH, "/".join(map(str, path)))
        kinds.setdefault(getattr(module, _PATH), type(module).__name__)
        own = [c for c in type(module).__mro__ if issubclass(c, nnx.Module) and c is not nnx.Module]
        for name in {name for c in own for name in vars(c) if is_open(name)}:
            c = next(c for c in own if name in vars(c))
            if inspect.isfunction(vars(c)[name]):
                methods[c, name] = vars(c)[name]
    try:
        for (c, name), call in methods.items():
            setattr(c, name, wrapped(name, call))
        yield
    finally:
        for (c, name), call in methods.items():
            setattr(c, name, call)


def _nnx_instance(model: Any, method: str) -> Program:
    from flax import nnx

    graph, state = nnx.split(model)
    kinds: dict[str, str] = {}
    return Program(type(model).__name__, None, _nnx(lambda: graph, method, kinds), parameters=state, kinds=kinds)


def _nnx_factory(factory: Callable[..., Any], method: str) -> Program:
    from flax import nnx

    from varscale.programs.assignments import quick_assignments

    built: list[Any] = []

    def init(key: Any, _: Inputs | None) -> Tree:
        with quick_assignments():
            model = factory(nnx.Rngs(key))
        if not isinstance(model, nnx.Module):
            raise TypeError(f"an nnx factory must return an nnx.Module, not {model!r}")
        graph, state = nnx.split(model)
        built[:] = [graph]
        return state

    def graph() -> Any:
        if not built:
            jax.eval_shape(lambda key: init(key, None), jax.random.key(_KEY_SEED))
        return built[0]

    kinds: dict[str, str] = {}
    apply = _nnx(graph, method, kinds)

    def start(key: Any, x: Inputs) -> tuple[Tree, Any, dict[str, Any], bool]:
        state = init(key, x)
        return state, *apply(state, x), True

    return Program("model", init, apply, start, kinds=kinds)


def _captures(tree: Any, method: str, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """Flax's nested capture as {path: output}, named as the report names its rows; a module called again is "path#1"."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _captures(value, method, (*prefix, str(name)))
            continue
        path = call_path("/".join(prefix), str(name), method)
        for i, output in enumerate(value if isinstance(value, tuple) else (value,)):
            found[path + (f"#{i}" if i else "")] = output
    return found


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


def _is_live(*leaves: Any) -> bool:
    """Whether captured arrays can be used here: that of a method which ran inside a plain `jax.vmap` cannot."""
    try:
        jax.lax.optimization_barrier(leaves)  # nothing is computed, but whoever left its transformation is found out
    except jax.errors.UnexpectedTracerError:
        return False
    return True


def grouped(captures: Mapping[str, Any], output: Any) -> dict[str, dict[str, Any]]:
    """Every array of the captures and of the model's own output: call -> {row path: array}, the output last."""
    calls = {call: dict(leaf_paths(call, value)) for call, value in captures.items() if call != ""}
    if not _is_live(*(leaf for rows in calls.values() for leaf in rows.values())):
        calls = {call: {row: leaf for row, leaf in rows.items() if _is_live(leaf)} for call, rows in calls.items()}
    return {**calls, "": dict(leaf_paths("", output))}


def rename(captures: Mapping[str, Any], output: Any) -> dict[str, Any]:
    """Every array of the captures and of the model's own output, by row path, the output last."""
    return {row: leaf for rows in grouped(captures, output).values() for row, leaf in rows.items()}
