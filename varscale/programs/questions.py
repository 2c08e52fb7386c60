"""Whether a linen module asks if it is being initialized, or where it stands in the model."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn

# Methods of `nn.Module` whose answers differ between a pass that initializes and the forward pass.
NAMES = ("is_initializing", "is_mutable_collection", "has_variable")


class Questions:
    """The questions that the modules of one pass ask.

    Each module of the pass gets methods of its own, which note that they are called; no class is changed.

    Attributes:
        asked: names of the methods that were called.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []

    def listen(self, module: Any) -> None:
        """Note the questions of this module from now on."""
        if NAMES[0] not in vars(module):
            for name in NAMES:
                object.__setattr__(module, name, self._noted(name, getattr(module, name)))

    def _noted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*args: Any, **kwargs: Any) -> Any:
            self.asked.append(name)
            return method(*args, **kwargs)

        return answer


@functools.lru_cache(maxsize=4096)
def reads_path(kind: type) -> bool:
    """Whether a method of a linen class, or a function that it calls by name, reads an attribute `path`."""
    own = [c for c in kind.__mro__ if issubclass(c, nn.Module) and c is not nn.Module]
    methods = [inspect.unwrap(x) for c in own for x in vars(c).values() if inspect.isfunction(x)]
    return any("path" in code.co_names for f in methods for code in _codes(f, set()))


def _codes(f: Any, seen: set[Any]) -> Iterator[types.CodeType]:
    """The code of a function, of those inside it, and of the model's functions that they call."""
    if not inspect.isfunction(f) or f in seen or f.__module__.startswith(("jax.", "flax.", "numpy.")):
        return
    seen.add(f)
    inside = [f.__code__]
    while inside:
        code = inside.pop()
        yield code
        inside += [x for x in code.co_consts if isinstance(x, types.CodeType)]
        for name in code.co_names:
            yield from _codes(f.__globals__.get(name), seen)
