"""A training step as a pure function of arrays, whatever made it: plain JAX or nnx, compiled or not."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from varscale.programs.calls import recorder
from varscale.programs.nnx_calls import recorded

_TAG = "varscale.Monitor"  # nnx's name for one exchange of references


@dataclasses.dataclass(frozen=True)
class Options:
    """What `jax.jit` was told of the step's arguments, where it cannot be seen.

    Attributes:
        static_argnums: positions of static arguments.
        static_argnames: names of static arguments.
        donate_argnums: positions of donated arguments, of a step that is not compiled yet.
        donate_argnames: names of donated arguments, likewise.
    """

    static_argnums: tuple[int, ...] = ()
    static_argnames: tuple[str, ...] = ()
    donate_argnums: tuple[int, ...] = ()
    donate_argnames: tuple[str, ...] = ()

    def given(self) -> dict[str, Any]:
        """Those that say anything, as keywords of `jax.jit`."""
        return {field.name: value for field in dataclasses.fields(self) if (value := getattr(self, field.name))}


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One call of a step.

    Attributes:
        function: the step as a function of arrays; it returns a pytree of arrays.
        leaves: its arguments.
        key: calls of equal keys have the same trace.
        finish: makes of what `function` returns what the step returns; for nnx it also writes back every graph node.
    """

    function: Callable[..., Any]
    leaves: list[Any]
    key: Hashable
    finish: Callable[[Any], Any]


def is_compiled(step: Any) -> bool:
    """Whether the step is what `jax.jit` or `nnx.jit` made."""
    return hasattr(step, "lower") and hasattr(step, "__wrapped__")


def has_graph(values: Any) -> bool:
    """Whether there are nnx objects among the values."""
    return any(nnx.graph.is_graph_node(x) for x in jax.tree.leaves(values, is_leaf=nnx.graph.is_graph_node))


@contextlib.contextmanager
def calling(step: Callable[..., Any], options: Options, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Call]:
    """A call of the step, to be carried out and finished inside the context.

    Raises:
        ValueError: static arguments cannot be told from others.
    """
    positions, names = _static(step, options, args, kwargs)
    given = [x for i, x in enumerate(args) if i not in positions], {k: x for k, x in kwargs.items() if k not in names}
    constant = {i: args[i] for i in positions}, {name: kwargs[name] for name in names}

    def run(given: Any) -> Any:
        left = iter(given[0])
        return step(*(constant[0][i] if i in positions else next(left) for i in range(len(args))), **given[1], **constant[1])

    static = tuple(sorted(constant[0].items())), tuple(sorted(constant[1].items()))
    if has_graph(given):
        places = [i for i in range(len(args)) if i not in positions]
        with nnx.update_context(_TAG):
            yield _graph_call(run, given, static, [_name(step, place) for place in places])
    else:
        yield _plain_call(run, given, static)


def _plain_call(run: Callable[[Any], Any], given: Any, static: Hashable) -> Call:
    leaves, tree = jax.tree.flatten(given)
    key = (tree, static, tuple(map(jax.typeof, leaves)))
    return Call(lambda *leaves: run(jax.tree.unflatten(tree, leaves)), leaves, key, lambda output: output)


def _graph_call(run: Callable[[Any], Any], given: Any, static: Hashable, names: Sequence[str]) -> Call:
    """References that arguments share stay shared, and what the step adds to a graph node is added to the caller's."""
    with nnx.split_context(_TAG) as context:
        graph, state = context.split(given)
    leaves, tree = jax.tree.flatten(state)

    def function(*leaves: Any) -> Any:
        # Paths change the structure of blocks that are stacked; paths that compare equal do not, but may be mistaken for one
        # another. The last error is the step's own.
        for watched in ({"alike": False}, {"alike": True}, None) if recorder() is not None else (None,):
            with nnx.merge_context(_TAG, True) as context:
                given = context.merge(graph, jax.tree.unflatten(tree, leaves))
            try:
                with contextlib.ExitStack() as stack:
                    if watched is not None:
                        for prefix, module in _models(dict(zip(names, given[0], strict=True)) | given[1]):
                            stack.enter_context(recorded(module, prefix=prefix, **watched))
                    output = run(given)
                break
            except Exception:
                if watched is None:
                    raise
        with nnx.split_context(_TAG) as context:
            return context.split((given, output))

    def finish(split: Any) -> Any:
        with nnx.merge_context(_TAG, False) as context:
            return context.merge(*split)[1]

    return Call(function, leaves, (graph, tree, static, tuple(map(jax.typeof, leaves))), finish)


def _models(arguments: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The outermost modules in the arguments, each with the prefix of its rows: its argument's name, "" if there is one."""
    found: dict[int, tuple[str, Any]] = {}
    seen: set[int] = set()

    def search(path: tuple[Any, ...], value: Any) -> None:
        if isinstance(value, nnx.Module):
            found.setdefault(id(value), ("/".join(map(str, path)), value))
        elif id(value) not in seen and isinstance(value, list | tuple | Mapping | nnx.Pytree):
            seen.add(id(value))
            items = (
                value
                if isinstance(value, Mapping)
                else vars(value)
                if isinstance(value, nnx.Pytree)
                else dict(enumerate(value))
            )
            for key, item in items.items():
                search((*path, key), item)

    search((), arguments)
    inner = {id(part) for _, model in found.values() for _, part in nnx.iter_modules(model) if part is not model}
    models = [(path, model) for path, model in found.values() if id(model) not in inner]
    return [("", models[0][1])] if len(models) == 1 else models


def _name(step: Any, place: int) -> str:
    """Name of a positional argument."""
    with contextlib.suppress(TypeError, ValueError, IndexError):
        return list(inspect.signature(step).parameters)[place]
    return str(place)


def _static(
    step: Any, options: Options, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[frozenset[int], frozenset[str]]:
    """Positions and names of the static arguments, as given or as far as they can be seen."""
    if not is_compiled(step) or options.static_argnums or options.static_argnames:
        return _named(step, options, args, kwargs)
    if isinstance(numbers := getattr(step, "static_argnums", None), int | tuple | list):  # nnx.jit keeps them
        return _named(step, Options(static_argnums=tuple(np.atleast_1d(np.array(numbers, int)).tolist())), args, kwargs)
    if has_graph((args, kwargs)):
        return frozenset(), frozenset()
    positional, named = step.trace(*args, **kwargs).args_info
    names = frozenset(kwargs) - frozenset(named)
    if len(positional) == len(args):
        return frozenset(), names
    found = [
        left
        for left in itertools.combinations(range(len(args)), len(args) - len(positional))
        if all(map(_fits, (x for i, x in enumerate(args) if i not in left), positional))
    ]
    if len(found) != 1:
        raise ValueError(
            f"{len(args) - len(positional)} of the step's {len(args)} arguments are static, and it cannot be seen which: "
            "give static_argnums, as jax.jit was given"
        )
    return frozenset(found[0]), names


def _named(
    step: Any, options: Options, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[frozenset[int], frozenset[str]]:
    """Static arguments as jax.jit takes them: a name is also a position, and a position a name."""
    positions = {number + len(args) if number < 0 else number for number in options.static_argnums}
    names = set(options.static_argnames)
    with contextlib.suppress(TypeError, ValueError):
        parameters = list(inspect.signature(step).parameters)
        positions |= {parameters.index(name) for name in options.static_argnames if name in parameters}
        names |= {parameters[number] for number in options.static_argnums if number < len(parameters)}
    return frozenset(positions & set(range(len(args)))), frozenset(names & set(kwargs))


def _fits(value: Any, info: Any) -> bool:
    """Whether an argument has the structure and the shapes that the trace has."""
    leaves, tree = jax.tree.flatten(value)
    known, other = jax.tree.flatten(info)
    return tree == other and all(_is_array(x) and np.shape(x) == i.shape for x, i in zip(leaves, known, strict=True))


def _is_array(x: Any) -> bool:
    return isinstance(x, bool | int | float | complex) or hasattr(x, "dtype")
