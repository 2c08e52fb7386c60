"""Calls of the modules of a model, linen or nnx, handed to a recorder while the model runs."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn

from varscale.programs.caches import trace_each

_recorder: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar("varscale_recorder", default=None)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a module's method.

    Attributes:
        path: path of the module.
        name: name of the method.
        kind: class name of the module.
        overridden: whether the function that runs is one that a subclass overrides: `super().__call__(x)`.
        is_method: whether it is a method of the module's class, not a function that a lifted transformation calls on it.
        root: class name of the model that the module is part of.
    """

    path: str
    name: str
    kind: str
    overridden: bool = False
    is_method: bool = True
    root: str = ""

    @property
    def has_row(self) -> bool:
        return self.is_method and is_open(self.name)

    def row(self, method: str) -> str:
        """The path of its row: that of its module, "path.encode" where it is another method than `__call__`.

        Args:
            method: the method that the caller runs in place of `__call__`, which is the model itself.
        """
        silent = self.name == "__call__" or not self.has_row or (self.path == "" and self.name == method)
        return self.path if silent else f"{self.path}.{self.name}"


Recorder = Callable[[Call, Callable[[], Any]], Any]


class Running:
    """The calls that run now, from the outermost in."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def entered(self, call: Call) -> Iterator[bool]:
        """Enter a call; yields whether it is one of its own.

        `super().__call__(x)` is part of the call that makes it, and a model that a function runs is part of the function.
        """
        key = call.path, call.name
        own = not (key in self._calls and (call.overridden or call.path == ""))
        self._calls.append(key)
        try:
            yield own
        finally:
            self._calls.pop()


def is_open(method: str) -> bool:
    """Whether a method has a row."""
    return not method.startswith("_") or method == "__call__"


@contextlib.contextmanager
def recording(run: Recorder) -> Iterator[None]:
    """While it lasts, `run(call, function)` makes every call of a bound linen module or of a recorded nnx module.

    It concerns the current thread alone.
    """
    token = _recorder.set(run)
    try:
        with nn.intercept_methods(_interceptor(run)):
            yield
    finally:
        _recorder.reset(token)


def recorder() -> Recorder | None:
    """The recorder of this thread; None outside `recording`."""
    return _recorder.get()


def _interceptor(run: Recorder) -> Callable[..., Any]:
    def intercept(next_function: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if context.module.scope is None:  # a module without parameters may be called unbound
            return next_function(*args, **kwargs)
        return run(linen_call(context), lambda: next_function(*args, **kwargs))

    return intercept


def linen_call(context: Any) -> Call:
    """The call that an interceptor of linen methods sees, of a bound module; every call inside it is going to be seen too."""
    module, name = context.module, context.method_name
    trace_each(module)
    latest = getattr(type(module), name, None)
    overridden = latest is not None and inspect.unwrap(latest) is not inspect.unwrap(context.orig_method.func)
    path = "/".join(module.scope.path)
    return Call(path, name, type(module).__name__, overridden, latest is not None, _root(module))


def _root(module: Any) -> str:
    while isinstance(module.parent, nn.Module):
        module = module.parent
    return type(module).__name__
