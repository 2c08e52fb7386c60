"""What a program is: a model as traceable functions of parameters and inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Tree = Any
KEY_SEED = 0  # dropout and the like: the law of the output does not depend on it


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Positional and keyword inputs of a model; build it with `inputs`."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """A model as traceable functions.

    Attributes:
        kind: class name of the model.
        init: key, inputs -> parameters (every collection of variables); None where the model is a plain function.
        apply: parameters, inputs -> (output, {path of a call: what it returned}); the jaxpr is marked (`programs.marks`).
        run: parameters, inputs, keys by stream or None -> output; calls are handed to the recorder (`programs.calls`), if any.
        start: `init` and `apply` in one pass: key, inputs -> (parameters, output, outputs by path, whether `apply` of those
            parameters would compute the same); None where `init` makes no forward pass.
        parameters: the parameters a model instance already holds, or None.
        has_own_init: whether `init` makes the model itself and needs no inputs.
        kinds: path of a module -> its class name; complete once `apply` was traced.
    """

    kind: str
    init: Callable[..., Tree] | None
    apply: Callable[[Tree, Inputs], tuple[Any, dict[str, Any]]]
    run: Callable[..., Any]
    start: Callable[[Any, Inputs], tuple[Tree, Any, dict[str, Any], bool]] | None = None
    parameters: Tree | None = None
    kinds: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)
    has_own_init: bool = False
