"""Calls of nnx modules, seen through classes of their own: subclasses whose methods record, given to the modules of a copy."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx

from varscale.programs.calls import Call, is_open, recorder

_PATH = "_varscale_path"


class _Alike(str):
    """A path that equals every other one, so that modules which differ in their paths alone can be stacked."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Alike)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(_Alike)


@contextlib.contextmanager
def recorded(model: Any, *, prefix: str = "", alike: bool = False) -> Iterator[None]:
    """While it lasts, calls of the modules of a model, and of what transformations make of them, are given to the recorder.

    The modules themselves are changed, so that `model` must be a copy of one's own; they are restored at the end.

    Args:
        model: an nnx module or a container of some.
        prefix: the path of the model.
        alike: whether paths compare equal. Blocks can then be stacked, but `nnx.jit` may trace one for all.
    """
    changed: list[tuple[Any, type]] = []
    try:
        for keys, module in nnx.iter_modules(model):
            own = type(module)
            path = "/".join(filter(None, [prefix, *map(str, keys)]))
            with contextlib.suppress(TypeError):  # a class that wants arguments from its subclasses, or one with slots
                # Past nnx's own __setattr__, which would enter "__class__" among the module's attributes for good.
                object.__setattr__(module, "__class__", _recording(own))
                changed.append((module, own))
                setattr(module, _PATH, _Alike(path) if alike else path)
        yield
    finally:
        for module, own in changed:
            object.__setattr__(module, "__class__", own)
            with contextlib.suppress(AttributeError):
                delattr(module, _PATH)


@functools.lru_cache(maxsize=4096)
def _recording(own: type) -> type:
    """A subclass whose open methods are recorded. One is made of each class: nnx keeps every class it ever met."""
    bases = [c for c in own.__mro__ if issubclass(c, nnx.Module) and c is not nnx.Module]
    methods: dict[str, Any] = {}
    for c in reversed(bases):
        for name, value in vars(c).items():
            if is_open(name) and inspect.isfunction(value):
                methods[name] = _recorded(name, value, own.__name__)
            elif name in methods:
                del methods[name]  # overridden by something that is no method
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own)(own.__name__, (own,), {**names, **methods}, pytree=getattr(own, "_pytree__is_pytree", True))


def _recorded(name: str, method: Callable[..., Any], kind: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        path, run = vars(self).get(_PATH), recorder()
        if path is None or run is None:  # made by another module's call
            return method(self, *args, **kwargs)
        return run(Call(str(path), name, kind), lambda: method(self, *args, **kwargs))

    return call
