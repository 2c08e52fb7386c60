"""What the init of a model depends on, as a value: models that share it have the same init, so that one trace serves both.

The text of a function is not enough: `lambda rngs: Net(WIDTH, rngs=rngs)` is another model when WIDTH is another number. So
what a model's functions and classes name is followed too: closures, defaults, globals and attributes of the user's own modules,
down to plain values. Code that could compute something else each time (random numbers of the host, clocks, files, assignments
to globals) has no identity, nor has anything that holds state of flax's own; such models are traced at every call.
"""

from __future__ import annotations

import builtins
import dataclasses
import dis
import enum
import functools
import sys
import types
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from varscale import _compat
from varscale.programs.content import Same, Unknown

_LIBRARIES = frozenset(
    {"abc", "builtins", "collections", "dataclasses", "einops", "enum", "flax", "functools", "itertools", "jax", "jaxlib",
     "jaxtyping", "math", "ml_dtypes", "numpy", "operator", "optax", "types", "typing", "typing_extensions", "varscale"}
)  # fmt: skip
"""Packages whose functions do the same at every call."""
_IMPURE = frozenset({"open", "input", "eval", "exec", "globals", "locals", "vars", "id", "hash", "__import__", "compile"})
_UNTOLD = frozenset(
    {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__dataclass_fields__", "__dataclass_params__",
     "__eq__", "__hash__", "__repr__", "__str__", "__match_args__", "__qualname__", "__firstlineno__", "__parameters__",
     "__static_attributes__", "__orig_bases__", "_abc_impl"}
)  # fmt: skip
_LINEN_STATE = frozenset({"_parent_ref", "_id", "_state"})
_PLAIN = (type(None), bool, int, str, bytes, type(...))
_FIXED = frozenset({*_PLAIN, float, complex, types.FunctionType})
_SMALL = 1024  # numbers of an array that are compared one by one
_MOST = 20_000  # values that are followed


def identity(model: Any) -> Hashable:
    """What a model's init depends on.

    Args:
        model: a linen module, or an nnx factory.

    Raises:
        Unknown: that cannot be told.
    """
    return _Walk().of(model)


class _Walk:
    """Follows what a value holds; each object once."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}
        self.held: list[Any] = []

    def of(self, value: Any, names: frozenset[str] = frozenset()) -> Hashable:
        """A value; `names` are those that the code around it uses."""
        kind = type(value)
        if kind in _PLAIN:
            return kind, value
        if kind is float:
            return kind, value.hex()  # tells −0 from 0
        if isinstance(value, np.generic | np.dtype | complex):
            return kind, repr(value)
        if isinstance(value, types.ModuleType):
            return self.module(value, names)
        if id(value) in self.seen:
            return "again", self.seen[id(value)]
        self.seen[id(value)] = len(self.seen)
        self.held.append(value)
        if len(self.held) > _MOST:
            raise Unknown("too much")
        return self.object(value, kind)

    def each(self, values: Iterable[Any]) -> tuple[Hashable, ...]:
        return tuple(map(self.of, values))

    def object(self, value: Any, kind: type) -> Hashable:
        if isinstance(value, types.FunctionType):
            return self.function(value)
        if isinstance(value, type):
            return self.type(value)
        if isinstance(value, np.ndarray | jax.Array):
            return _array(value)
        if isinstance(value, functools.partial):
            return kind, self.each((value.func, *value.args)), self.each(value.keywords.items())
        if isinstance(value, types.MethodType):
            return kind, self.each((value.__func__, value.__self__))
        if isinstance(value, property):
            return kind, self.each((value.fget, value.fset))
        if isinstance(value, staticmethod | classmethod):
            return kind, self.of(value.__func__)
        if isinstance(value, tuple | list):
            return kind, self.each(value)
        if isinstance(value, set | frozenset):
            return kind, frozenset(self.each(value))
        if isinstance(value, Mapping):
            return kind, self.each(value.items())
        return self.instance(value, kind)

    def instance(self, value: Any, kind: type) -> Hashable:
        import flax.linen as nn
        from flax import nnx

        if isinstance(value, nnx.Module | nnx.Variable | nnx.RngStream | nnx.Rngs):
            raise Unknown(kind.__name__)
        if isinstance(value, enum.Enum | types.BuiltinFunctionType):
            if not isinstance(value, enum.Enum) and _root(value.__module__ or "") not in _LIBRARIES:
                raise Unknown(value.__name__)
            return kind, Same(value)
        if isinstance(value, nn.Module):
            if value.parent is not None or value.scope is not None:
                raise Unknown("a module bound to variables")
            fields = {name: x for name, x in vars(value).items() if name not in _LINEN_STATE}
            return self.of(kind), self.each(fields.items())
        if hasattr(value, "__wrapped__"):
            return self.of(kind), self.of(value.__wrapped__), self.each(getattr(value, "__dict__", {}).items())
        if hasattr(value, "__dict__"):
            return self.of(kind), self.each(vars(value).items())
        if _is_a_value(kind):
            try:
                hash(value)
            except TypeError:
                raise Unknown(kind.__name__) from None
            return kind, value
        raise Unknown(kind.__name__)

    def function(self, value: types.FunctionType) -> Hashable:
        try:
            held = [cell.cell_contents for cell in value.__closure__ or ()]
        except ValueError:
            raise Unknown(value.__qualname__) from None  # a variable that has no value yet
        named: list[tuple[str, Hashable]] = []
        if _root(value.__globals__.get("__name__", "")) not in _LIBRARIES:
            names, writes = _names(value.__code__)
            if writes or any(name in _IMPURE and name not in value.__globals__ for name in names):
                raise Unknown(value.__qualname__)
            named = [(n, self.of(value.__globals__[n], names)) for n in sorted(names) if n in value.__globals__]
            if any(n not in value.__globals__ and not hasattr(builtins, n) for n in _globals(value.__code__)):
                raise Unknown(value.__qualname__)  # named, and not there yet
        own = [x for name, x in vars(value).items() if name not in ("__wrapped__", "__signature__")]
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items())
        return value.__code__, self.each(held), self.each(defaults), self.each(own), tuple(named)

    def type(self, value: Any) -> Hashable:
        root = _root(value.__module__)
        if root in _LIBRARIES or root in sys.stdlib_module_names:
            return "type", Same(value)
        own = [(name, x) for name, x in vars(value).items() if name not in _UNTOLD]
        slots = (types.MemberDescriptorType, types.GetSetDescriptorType)
        told = tuple((name, None if isinstance(x, slots) else self.of(x)) for name, x in own)
        return "type", Same(value), self.each(value.__bases__), told

    def module(self, value: types.ModuleType, names: frozenset[str]) -> Hashable:
        root = _root(value.__name__)
        if root in _LIBRARIES:
            if "numpy" in root and ("random" in names or "random" in value.__name__):
                raise Unknown("random numbers of the host")
            return "module", value.__name__
        if root in sys.stdlib_module_names:
            raise Unknown(value.__name__)
        held = [(name, self.of(vars(value)[name], names)) for name in sorted(names) if name in vars(value)]
        return "module", value.__name__, tuple(held)


def is_fixed(attribute: Any) -> bool:
    """Whether an attribute of an nnx module is made anew with every model, or cannot be changed in place."""
    from flax import nnx

    kind = type(attribute)
    if kind in _FIXED or isinstance(attribute, nnx.Module | nnx.Variable | nnx.Rngs | nnx.RngStream):
        return True
    if isinstance(attribute, np.ndarray | jax.Array | enum.Enum | np.generic | np.dtype | type):
        return True
    if isinstance(attribute, tuple | frozenset):
        return all(map(is_fixed, attribute))
    if dataclasses.is_dataclass(attribute):
        frozen = kind.__dataclass_params__.frozen  # pyright: ignore[reportAttributeAccessIssue]
        return frozen and all(is_fixed(getattr(attribute, field.name)) for field in dataclasses.fields(attribute))
    return _is_a_value(kind) or isinstance(attribute, types.BuiltinFunctionType | functools.partial)


def _is_a_value(kind: type) -> bool:
    """Whether objects of a library's type are compared by what they hold, and keep it."""
    known = _root(kind.__module__) in ("flax", "jax", "jaxlib", "ml_dtypes", "numpy", "typing") or kind in (range, slice)
    return known and "random" not in kind.__module__ and not hasattr(kind, "__next__")


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _array(value: Any) -> Hashable:
    is_key = jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key)
    if _compat.is_tracer(value) or is_key or value.size > _SMALL or value.dtype.hasobject:
        raise Unknown("an array")
    return type(value), str(value.dtype), value.shape, np.asarray(value).tobytes(), bool(getattr(value, "weak_type", False))


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[frozenset[str], bool]:
    """All names that code uses, attributes too, and whether it assigns to variables of others or imports."""
    names = set(code.co_names)
    writes = False
    for instruction in dis.get_instructions(code):
        outer = instruction.opname == "STORE_DEREF" and instruction.argval in code.co_freevars
        imports = instruction.opname == "IMPORT_NAME" and _root(instruction.argval) not in _LIBRARIES
        writes = writes or outer or imports or instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more, also = _names(inner)
            names |= more
            writes = writes or also
    return frozenset(names), writes


@functools.lru_cache(maxsize=4096)
def _globals(code: types.CodeType) -> frozenset[str]:
    """The names of globals that code reads."""
    read = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return frozenset(read).union(*map(_globals, inner))


def surroundings() -> Hashable:
    """What a trace depends on besides the model: jax's and flax's settings, meshes and axis rules."""
    import flax
    import flax.linen as nn
    from flax import nnx

    jax_settings = tuple((name, str(getattr(jax.config, name, None))) for name in jax.config.values)
    flax_settings = tuple((name, str(getattr(flax.config, name))) for name in dir(flax.config) if not name.startswith("_"))
    mesh = _compat.set_mesh(), jax.sharding.get_abstract_mesh()
    return jax_settings, flax_settings, mesh, tuple(nn.get_logical_axis_rules()), nnx.using_eager_sharding()
