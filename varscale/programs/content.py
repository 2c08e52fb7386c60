"""What a value is, whatever its name or its place in memory: equal for values that behave the same."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))


class Unknown(Exception):
    """A value whose behaviour cannot be told from what it holds."""


def content(value: Any, around: tuple[int, ...] = ()) -> Hashable:
    """A key of a dictionary that two values share only if they behave the same.

    Functions are compared by their code and what they close over (an initializer that every layer makes anew is one and the
    same), dataclasses by their attributes, anything else by being the same object with the same attributes.

    Args:
        value: any Python value.
        around: the values that it is inside, by address.

    Raises:
        Unknown: it holds an array, a module, or itself.
    """
    import flax.linen as nn

    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if isinstance(value, jax.Array | np.ndarray | nn.Module) or id(value) in around:
        raise Unknown(kind.__name__)

    def each(values: Iterable[Any]) -> tuple[Hashable, ...]:
        return tuple(content(x, (*around, id(value))) for x in values)

    if isinstance(value, types.FunctionType):
        try:
            held = [cell.cell_contents for cell in value.__closure__ or ()]
        except ValueError:
            raise Unknown(value.__qualname__) from None  # a variable that has no value yet
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items())
        return kind, value.__code__, id(value.__globals__), each(defaults), each(held), each(vars(value).items())
    if kind is functools.partial:
        return kind, each((value.func, *value.args, *value.keywords.items()))
    if isinstance(value, tuple | list):
        return kind, each(value)
    if isinstance(value, Mapping):
        return kind, each(value.items())
    if isinstance(value, type | types.ModuleType) or not hasattr(value, "__dict__"):
        return kind, Same(value)
    attributes = each(vars(value).items())
    return (kind, attributes) if dataclasses.is_dataclass(value) else (kind, Same(value), attributes)


class Same:
    """Equal to itself alone; keeps its value, so that no other takes its address."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)
