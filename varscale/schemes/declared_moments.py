"""Mean, standard deviation and distribution of the laws that a model itself declares, read from its init without drawing."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from varscale.initializers.distributions import DistributionName
from varscale.programs import faces
from varscale.theory.graph.layout import Value
from varscale.theory.graph.nodes import Leaf
from varscale.theory.interpreter.interpreter import Interpreter
from varscale.theory.interpreter.parameters import init_laws
from varscale.theory.interpreter.predict import input_value
from varscale.theory.interpreter.tracing import traced
from varscale.usage.parameters import named_leaves

# E[w⁴]/E[w²]² of each distribution.
_KURTOSIS: dict[DistributionName, float] = {"normal": 3.0, "truncated_normal": 2.36554, "uniform": 1.8, "rademacher": 1.0}


@dataclasses.dataclass(frozen=True)
class Moments:
    """What is known of a parameter's law.

    Attributes:
        mean: of each weight.
        std: standard deviation of each weight.
        distribution: its name; "" where it is another.
    """

    mean: float
    std: float
    distribution: DistributionName | str = ""


def moments(model: Any, x: Any, method: str | None) -> dict[str, Moments]:
    """The law of each parameter that the model's own init draws, by path; those that cannot be read are left out.

    Empty for a model that holds its parameters already.

    >>> from flax import linen as nn
    >>> moments(nn.Dense(3), jax.ShapeDtypeStruct((1, 4), "float32"), None)["kernel"]
    Moments(mean=0.0, std=0.5, distribution='truncated_normal')
    """
    program = faces.program(model, method=method)
    if program.init is None:
        return {}
    init = program.init
    arrays, join = faces.split(faces.as_inputs(x))
    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    trace = traced(lambda given: init(jax.random.key(0), join(given)), structs)
    interpreter = Interpreter()
    values = init_laws(interpreter, trace, [input_value(interpreter, a, f"input {i}") for i, a in enumerate(structs)])
    found: dict[str, Moments] = {}
    for (path, _), value in zip(named_leaves(trace.shapes), values, strict=True):
        if isinstance(value, Value) and isinstance(value.node, Leaf):
            table, kurtosis = value.node.table, value.node.kurtosis
            name = next((name for name, known in _KURTOSIS.items() if abs(known - kurtosis) < 0.02), "")
            # Inits compute in float32: the digits beyond are of its rounding.
            found[path] = Moments(float(table.total_mean), float(f"{math.sqrt(table.variance):.6g}"), name)
    return found
