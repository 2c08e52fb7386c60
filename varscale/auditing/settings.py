"""Findings about settings of a module that name a scale of its weights and that nothing reads."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
from flax import linen as nn

from varscale.auditing.findings import Finding
from varscale.programs import faces

_SCALES = re.compile(
    r"(init\w*_?(std|stddev|range|scale|gain|variance))|((kernel|weight|embed\w*|proj\w*|param\w*)_(std|stddev))|stddev|std",
    re.IGNORECASE,
)
_FLAX = {"name", "parent"}


def check_settings(model: Any, x: Any, method: str | None) -> Iterator[Finding]:
    """Fields such as `initializer_range`, of a linen module or of a dataclass that it holds, which change nothing.

    The init is traced again with the number changed: where the trace is the same, forward pass included, nothing reads it.
    """
    settings = list(_settings(model)) if isinstance(model, nn.Module) else []
    if not settings:
        return
    declared = _traced(model, x, method)
    for name, value, changed in settings:
        if _traced(changed, x, method) == declared:
            told = f"{name} = {value:g} says how weights are drawn, but nothing reads it: with another value the same is drawn."
            mend = f"kernel_init=nn.initializers.normal(self.{name}), or remove {name}"
            yield Finding("VS124", "warning", "", told, value, mend)


def _settings(model: nn.Module) -> Iterator[tuple[str, float, nn.Module]]:
    """(name, value, the model with another value) of each number that a name calls the scale of weights."""
    for field in dataclasses.fields(model):
        held: Any = getattr(model, field.name, None)
        if field.name in _FLAX:
            continue
        if (value := _scale(field.name, held)) is not None:
            yield field.name, value, _changed(model, field.name, _other(value))
        if dataclasses.is_dataclass(held) and not isinstance(held, nn.Module | type):
            for inner in dataclasses.fields(held):
                if inner.init and (value := _scale(inner.name, getattr(held, inner.name, None))) is not None:
                    config = dataclasses.replace(held, **{inner.name: _other(value)})
                    yield f"{field.name}.{inner.name}", value, _changed(model, field.name, config)


def _changed(model: Any, name: str, value: Any) -> nn.Module:
    return model.clone(**{name: value})


def _scale(name: str, value: Any) -> float | None:
    """The number, where it is positive and its name calls it the scale of weights."""
    return value if isinstance(value, float) and value > 0 and _SCALES.fullmatch(name) else None


def _other(value: float) -> float:
    """Another value of the same kind: smaller, as what is above 1 may be refused."""
    return value * 0.75


def _traced(model: nn.Module, x: Any, method: str | None) -> str | None:
    """The init and the forward pass as text; None where a changed setting does not trace."""
    given = faces.as_inputs(x)
    program = faces.program(model, method=method)
    flat, tree = jax.tree_util.tree_flatten((given.args, dict(given.kwargs)))
    dynamic = [faces.is_dynamic(leaf) for leaf in flat]

    def init(key: Any, arrays: list[Any]) -> Any:
        supply = iter(arrays)
        args, kwargs = tree.unflatten([next(supply) if d else leaf for leaf, d in zip(flat, dynamic, strict=True)])
        inputs = faces.Inputs(args, kwargs)
        assert program.init is not None
        variables = program.init(key, inputs)
        return variables, program.apply(variables, inputs)[0]

    try:
        arrays = [leaf for leaf, d in zip(flat, dynamic, strict=True) if d]
        return str(jax.make_jaxpr(init)(jax.random.key(0), arrays))
    except (TypeError, ValueError):
        return None
