"""Linen modules as programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from varscale.programs.calls import linen_call
from varscale.programs.marks import Marking
from varscale.programs.program import KEY_SEED, Inputs, Program, Tree
from varscale.programs.questions import Questions
from varscale.programs.replays import Replays


def linen_program(model: nn.Module, method: str) -> Program:
    """The program of a linen module that runs this method."""
    kinds: dict[str, str] = {"": type(model).__name__}
    replays = Replays()

    def init(key: Any, x: Inputs) -> Tree:
        variables = dict(model.init({"params": key}, *x.args, method=method, **x.kwargs))
        variables.pop("intermediates", None)
        return variables

    def run(variables: Tree, x: Inputs, rngs: Any = None) -> Any:
        mutable = [name for name in variables if name != "params"]
        rngs = jax.random.key(KEY_SEED) if rngs is None else rngs
        rngs = rngs if isinstance(rngs, Mapping) else {"params": rngs}  # which stands for any stream that is not there
        return model.apply(variables, *x.args, method=method, rngs=rngs, mutable=mutable, **x.kwargs)[0]

    def apply(variables: Tree, x: Inputs) -> tuple[Any, dict[str, Any]]:
        questions, marking = Questions(), Marking(method, kinds)
        replays.start(questions, marking, initializing=False)
        with nn.intercept_methods(_interceptor(replays, marking, questions)):
            output = run(variables, x)
        return output, marking.outputs

    def start(key: Any, x: Inputs) -> tuple[Tree, Any, dict[str, Any], bool]:
        questions, marking = Questions(), Marking(method, kinds)
        replays.start(questions, marking, initializing=True)
        with nn.intercept_methods(_interceptor(replays, marking, questions)):
            output, variables = model.init_with_output({"params": key}, *x.args, method=method, **x.kwargs)
        variables = dict(variables)
        variables.pop("intermediates", None)
        return variables, output, marking.outputs, not questions.asked and variables.keys() <= {"params"}

    return Program(type(model).__name__, init, apply, run, start, kinds=kinds)


def _interceptor(replays: Replays, marking: Marking, questions: Questions) -> Callable[..., Any]:
    def intercept(next_function: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module, name = context.module, context.method_name
        if module.scope is None or replays.tracing:  # a module without parameters may be called unbound
            return next_function(*args, **kwargs)
        questions.listen(module)
        return marking.run(linen_call(context), lambda: replays.call(module, name, args, kwargs, next_function))

    return intercept
