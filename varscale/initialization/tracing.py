"""The init of a model as a graph: leaves by path, and what each depends on."""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varscale.initialization.chains import Chain, chain
from varscale.initialization.graph import Value, open_trace
from varscale.initialization.identity import identity, is_fixed, surroundings
from varscale.initializers.sampling import checked_key, unrolled_key
from varscale.programs.faces import Inputs, as_inputs, is_dynamic, method_name
from varscale.programs.trees import Leaf, is_collections, open_tree


@dataclasses.dataclass(frozen=True)
class Graph:
    """A trace.

    Attributes:
        leaves: the value of every leaf.
        keys: those of the keys that the init was given.
        chains: the chains of leaves, by their positions, that were found so far.
        outlines: what will be done for the leaves, by the arguments that say so; see `outline.declared`.
    """

    leaves: tuple[Value, ...]
    keys: tuple[Value, ...]
    chains: dict[tuple[int, ...], Chain] = dataclasses.field(default_factory=dict)
    outlines: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

    def chain(self, leaves: Sequence[int]) -> Chain:
        """The chain of these leaves."""
        key = tuple(leaves)
        if key not in self.chains:
            self.chains[key] = chain([self.leaves[i] for i in key])
        return self.chains[key]


@dataclasses.dataclass(frozen=True)
class Trace:
    """The traced init of a model.

    Attributes:
        kind: class name of the model.
        leaves: shape and dtype of every variable, by path, in the order of the tree.
        parameters: of each, whether it is a parameter (and no statistic, counter or key).
        graph: the trace, with keys of the unrolled hash.
        retraced: gives the trace with keys as jax has them, for laws whose bits depend on how the hash is compiled.
        arrays: these arrays, where they were given; else None.
        rebuild: makes the tree of variables (or the nnx model) from the leaves.
        tree: the tree of shapes, with the metadata of partitioned variables.
        whole: the init itself: keys, arrays -> leaves.
        holds_raw_keys: whether keys among the leaves are raw words, as the key given was.
        lasts: whether several models may be rebuilt from it.
    """

    kind: str
    leaves: tuple[Leaf, ...]
    parameters: tuple[bool, ...]
    graph: Graph
    retraced: Callable[[], Graph]
    arrays: tuple[Any, ...]
    rebuild: Callable[[Sequence[Any]], Any]
    tree: Any
    whole: Callable[..., list[Any]]
    holds_raw_keys: bool
    lasts: bool


def trace(model: Any, key: Any, x: Any, method: str | None) -> Trace:
    """Trace the init of a linen module or an nnx factory, without computing anything.

    The last few traces are kept, for models whose `identity` says that their init is the same.

    Args:
        model: a linen module or an nnx factory.
        key: a random key, or a mapping from stream to key.
        x: the model's input (or `Inputs`); None where it takes none.
        method: the linen method to initialize by; None for `__call__`.
    """
    given = Inputs((), {}) if x is None else as_inputs(x)
    flat, structure = jax.tree_util.tree_flatten((given.args, dict(given.kwargs)))
    arrays = tuple(leaf for leaf in flat if is_dynamic(leaf))
    keys, key_tree = jax.tree_util.tree_flatten(key)
    typed = list(map(checked_key, keys))
    call = _Call(
        model, method, tuple(_Static(leaf) if not is_dynamic(leaf) else _abstract(leaf) for leaf in flat), structure,
        tuple(map(_abstract, typed)), key_tree, any(not jnp.issubdtype(k.dtype, jax.dtypes.prng_key) for k in keys),
    )  # fmt: skip
    told = _told(call)
    found = _trace(call) if told is None else _remembered(_Told(told, call)).get()
    concrete = tuple(None if isinstance(x, jax.ShapeDtypeStruct) else x for x in arrays)
    return dataclasses.replace(found, arrays=concrete)


@dataclasses.dataclass(frozen=True)
class _Static:
    """A part of the input that is no array."""

    value: Any


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is traced, without the numbers of any array.

    Attributes:
        model: the linen module or nnx factory.
        method: the linen method.
        inputs: the leaves of the model's input: shape and dtype of arrays, anything else as it is.
        structure: of the input.
        keys: shape and dtype of the keys.
        key_tree: how they are held.
        raw: whether some key was given as raw words.
    """

    model: Any
    method: str | None
    inputs: tuple[Any, ...]
    structure: Any
    keys: tuple[jax.ShapeDtypeStruct, ...]
    key_tree: Any
    raw: bool

    @property
    def arrays(self) -> list[jax.ShapeDtypeStruct]:
        """Shape and dtype of the input's arrays."""
        return [leaf for leaf in self.inputs if not isinstance(leaf, _Static)]

    @property
    def shapes(self) -> Hashable:
        """All that a trace depends on but the model and the static parts of the input."""
        inputs = [None if isinstance(x, _Static) else x for x in self.inputs]
        told = tuple(
            (x.shape, str(x.dtype), x.weak_type, str(x.sharding)) if x is not None else None for x in (*inputs, *self.keys)
        )
        return told, self.structure, self.key_tree, self.raw


@dataclasses.dataclass(frozen=True)
class _Told:
    """A call, compared by what its trace depends on."""

    told: Hashable
    call: _Call = dataclasses.field(compare=False)


def _told(call: _Call) -> Hashable:
    """What a call's trace depends on; None where that cannot be told."""
    try:
        static = tuple(identity(leaf.value) for leaf in call.inputs if isinstance(leaf, _Static))
        told = identity(call.model), static, call.method, call.shapes, surroundings()
        hash(told)
    except Exception:  # of any kind: what a model holds may raise where it is looked at
        return None
    return told


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    aval = jax.typeof(x)
    place = getattr(x, "sharding", None)
    place = place if isinstance(place, jax.sharding.NamedSharding) else None
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=place, weak_type=bool(getattr(aval, "weak_type", False)))


class _Kept:
    """A trace that is kept, if models made from it share nothing that could be changed in one of them."""

    def __init__(self, call: _Call):
        self._call, self._trace = call, _trace(call)
        self._serves_once = not self._trace.lasts
        gc.collect(1)  # what is kept grows old now: no collection during the next call is to look through it

    def get(self) -> Trace:
        found = self._trace
        if found is None:
            return _trace(self._call)
        if self._serves_once:
            self._trace = None
        return found


@functools.lru_cache(maxsize=8)
def _remembered(told: _Told) -> _Kept:
    return _Kept(told.call)


def _trace(call: _Call) -> Trace:
    face = _face(call.model, call.method)

    def init(keys: Sequence[Any], arrays: Sequence[Any]) -> Any:
        supply = iter(arrays)
        leaves = [leaf.value if isinstance(leaf, _Static) else next(supply) for leaf in call.inputs]
        args, kwargs = call.structure.unflatten(leaves)
        return face.init(call.key_tree.unflatten(keys), args, kwargs)

    def graph(keys: Sequence[Any]) -> tuple[Graph, Any]:
        try:
            closed, shapes = jax.make_jaxpr(init, return_shape=True)(list(keys), call.arrays)
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
            error.add_note(
                "vs.initialize traces the model's init, as jax.jit(model.init) does: it cannot ask arrays for numbers"
            )
            raise
        inputs, outputs = open_trace(closed, len(keys))
        return Graph(tuple(outputs), tuple(inputs[: len(keys)])), shapes

    fast = [jax.eval_shape(unrolled_key, key) for key in call.keys]
    traced, shapes = graph(fast)
    opened = open_tree(shapes, "variables")
    structure = jax.tree_util.tree_structure(shapes)

    def whole(keys: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
        return jax.tree_util.tree_leaves(init(keys, arrays))

    return Trace(
        face.kind,
        opened.leaves,
        tuple(face.is_parameter(opened.leaves, shapes)),
        traced,
        functools.cache(lambda: graph(call.keys)[0]),
        (),
        lambda leaves: face.build(jax.tree_util.tree_unflatten(structure, leaves)),
        shapes,
        whole,
        face.keeps_raw and call.raw,
        face.lasts(),
    )


@dataclasses.dataclass(frozen=True)
class _Face:
    """How a kind of model is initialized.

    Attributes:
        kind: class name of the model.
        init: key, positional and keyword inputs -> the tree of variables.
        build: that tree, with numbers -> what the user gets.
        is_parameter: leaves, the tree of shapes -> whether each leaf is a parameter.
        keeps_raw: whether a raw key stays raw where the model keeps it.
        lasts: whether the models that are built of one init share nothing that could be changed in one of them.
    """

    kind: str
    init: Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]
    build: Callable[[Any], Any]
    is_parameter: Callable[[Sequence[Leaf], Any], list[bool]]
    keeps_raw: bool
    lasts: Callable[[], bool] = lambda: True


def _face(model: Any, method: str | None) -> _Face:
    import flax.linen as nn
    from flax import nnx

    if isinstance(model, nn.Module):
        name = method_name(model, method)
        return _Face(
            type(model).__name__,
            lambda key, args, kwargs: model.init(key, *args, method=name, **kwargs),
            lambda tree: tree,
            _linen_parameters,
            keeps_raw=True,
        )
    if isinstance(model, nnx.Module):
        raise TypeError(
            f"model is an instance of {type(model).__name__}, whose layers no longer hold their initializers (flax drops "
            "them), so that scheme='declared' has nothing to go by: give the factory, `lambda rngs: Net(..., rngs=rngs)`, or "
            "use vs.reinitialize(model, {pattern: initializer}, key)"
        )
    factory = _factory(model)
    if factory is None:
        raise TypeError(f"model must be a linen module or an nnx factory `lambda rngs: Net(..., rngs=rngs)`, not {model!r}")
    if method is not None:
        raise ValueError(f"method={method!r} is for linen modules; an nnx factory is initialized by its constructor")
    return _nnx_face(factory)


def _linen_parameters(leaves: Sequence[Leaf], _: Any) -> list[bool]:
    collections = is_collections(tuple(leaf.path for leaf in leaves))
    return [leaf.path.startswith("params/") or not collections for leaf in leaves]


def _nnx_face(factory: Callable[..., Any]) -> _Face:
    from flax import nnx

    graphs: list[Any] = []
    fixed: list[bool] = []

    def init(key: Any, _: Sequence[Any], __: Mapping[str, Any]) -> Any:
        rngs = nnx.Rngs(**key) if isinstance(key, Mapping) else nnx.Rngs(key)
        ambient = nnx.using_eager_sharding()
        with nnx.use_eager_sharding(False):  # without a mesh, metadata of sharding would raise at construction
            try:
                model = factory(_counted(rngs))
            except Exception:  # of any kind: if it is the model's own, it comes again without our counts
                model = factory(nnx.Rngs(**key) if isinstance(key, Mapping) else nnx.Rngs(key))
        if not isinstance(model, nnx.Module):
            raise TypeError(f"an nnx factory must return an nnx.Module, not a {type(model).__name__}")
        graph, state = nnx.split(model)
        _say_eager(state, ambient)
        graphs[:] = [graph]
        fixed[:] = [all(is_fixed(x) for _, module in nnx.iter_modules(model) for x in vars(module).values())]
        return state

    def _say_eager(state: Any, ambient: bool) -> None:
        for variable in jax.tree_util.tree_leaves(state, is_leaf=lambda node: isinstance(node, nnx.Variable)):
            if isinstance(variable, nnx.Variable) and variable.get_metadata().get("eager_sharding") is False:
                variable.set_metadata(eager_sharding=ambient)

    def parameters(_: Sequence[Leaf], state: Any) -> list[bool]:
        variables = jax.tree_util.tree_leaves(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
        found = ((isinstance(v, nnx.Param), len(jax.tree_util.tree_leaves(v))) for v in variables)
        return [is_param for is_param, count in found for _ in range(count)]

    def build(state: Any) -> Any:
        model = nnx.merge(graphs[0], state)
        gc.collect(0)  # a cycle of references that merge leaves would hold the arrays when the model is gone
        return model

    return _Face("model", init, build, parameters, keeps_raw=False, lasts=lambda: fixed[0])


def _factory(model: Any) -> Callable[[Any], Any] | None:
    """What makes an nnx model from rngs: a function or class whose one required parameter is called rngs (or r, or _)."""
    bound = model if isinstance(model, functools.partial) else functools.partial(model) if callable(model) else None
    if bound is None:
        return None
    if isinstance(bound.func, type):  # nnx's metaclass hides the signature of a class
        bound = functools.partial(bound.func.__init__, None, *bound.args, **bound.keywords)
    try:
        parameters = inspect.signature(bound).parameters.values()
    except (TypeError, ValueError):
        return None
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p for p in parameters if p.default is p.empty and p.kind not in variadic]
    if [p.name for p in required] not in (["rngs"], ["r"], ["_"]):
        return None
    name = required[0].name
    return (lambda rngs: model(**{name: rngs})) if required[0].kind is inspect.Parameter.KEYWORD_ONLY else model


class _Count(np.ndarray):
    """A counter in NumPy that an nnx stream may add to: what is read from it is a number of its own.

    A traced counter costs a time that grows as the square of the model's depth: flax asks it where it is placed, and jax's
    answer is an error whose message looks for its origin among all equations so far.
    """

    def __getitem__(self, index: Any) -> Any:
        return np.uint32(np.asarray(self)[index])


def _counted(rngs: Any) -> Any:
    """The same rngs with counters in NumPy."""
    from flax import nnx

    for stream in vars(rngs).values():
        if isinstance(stream, nnx.RngStream) and stream.count.get_value().shape == ():
            counter: Any = np.zeros((), np.uint32).view(_Count)
            stream.count.set_value(counter)
    return rngs
