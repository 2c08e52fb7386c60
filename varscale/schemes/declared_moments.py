"""Mean, standard deviation and distribution of the laws that a model itself declares, read from its init without drawing."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from varscale.initialization.initialize import initialize
from varscale.initializers.distributions import DistributionName
from varscale.programs import faces
from varscale.theory.graph.layout import Value
from varscale.theory.graph.nodes import Leaf
from varscale.theory.interpreter.inputs import input_value
from varscale.theory.interpreter.interpreter import Interpreter
from varscale.theory.interpreter.parameters import init_laws
from varscale.theory.interpreter.predict import traced
from varscale.usage.parameters import named_leaves

# E[w⁴]/E[w²]² of each distribution.
_KURTOSIS: dict[DistributionName, float] = {"normal": 3.0, "truncated_normal": 2.36554, "uniform": 1.8, "rademacher": 1.0}
_NO_MEAN = 0.03


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
    values = init_laws(interpreter, *trace[:2], [input_value(interpreter, a, f"input {i}") for i, a in enumerate(structs)])
    found: dict[str, Moments] = {}
    for (path, _), value in zip(named_leaves(trace.shapes), values, strict=True):
        if isinstance(value, Value) and isinstance(value.node, Leaf):
            table, kurtosis = value.node.table, value.node.kurtosis
            mean, std = float(table.total_mean), math.sqrt(table.variance)
            name = next((name for name, known in _KURTOSIS.items() if abs(known - kurtosis) < 0.02), "")
            # Inits compute in float32: the digits beyond are of its rounding; in bfloat16 their means are off by up to .018σ.
            found[path] = Moments(0.0 if abs(mean) < _NO_MEAN * std else mean, float(f"{std:.6g}"), name)
    return found


def measured(model: Any, x: Any, params: Any, method: str | None) -> dict[str, Moments]:
    """Mean and standard deviation of each parameter's own numbers: those a model holds or is given, else one draw of its init.

    It serves where a law cannot be read: orthogonal maps, parameters that are drawn together, an nnx instance. Empty for a
    plain function whose parameters are told by their shapes alone.
    """
    program = faces.program(model, method=method)
    held = program.parameters if params is None else params
    if held is None:
        held = initialize(model, jax.random.key(0), x, method=method)
        held = nnx.split(held)[1] if isinstance(held, nnx.Module) else held
    found: dict[str, Moments] = {}
    for (path, learned), leaf in zip(named_leaves(held), jax.tree_util.tree_leaves(held), strict=True):
        if learned and not isinstance(leaf, jax.ShapeDtypeStruct):
            numbers = np.asarray(leaf, np.float64)
            mean, std = float(numbers.mean()), float(f"{numbers.std():.6g}")
            # Four standard errors: the mean of a sample is no sign of a mean of the law.
            found[path] = Moments(0.0 if abs(mean) < 4 * std / math.sqrt(max(1, numbers.size)) else mean, std)
    return found
