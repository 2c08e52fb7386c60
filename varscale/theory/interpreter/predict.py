"""From a model to a Report: read its parameters' laws, walk its forward pass, ask for the moments of every module's output."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from varscale.initialization.laws import applied
from varscale.programs import faces
from varscale.programs.faces import Inputs, Program
from varscale.report import Report
from varscale.theory.domain.axes import Axis
from varscale.theory.domain.tables import Moments, Table, estimate, independent
from varscale.theory.graph.known_arrays import measured
from varscale.theory.graph.layout import Value, full
from varscale.theory.graph.nodes import Leaf
from varscale.theory.graph.store import PredictionError, located
from varscale.theory.interpreter.draws import beside_draws
from varscale.theory.interpreter.interpreter import Interpreter
from varscale.theory.interpreter.parameters import (
    abstract,
    given_parameters,
    init_laws,
    is_function,
    laid_parameters,
    path_string,
)
from varscale.theory.interpreter.rows import Place, Rows, joined
from varscale.theory.interpreter.sample_scales import sample_axis
from varscale.theory.interpreter.summary import summarize, with_gradients
from varscale.theory.interpreter.taps import through
from varscale.theory.interpreter.tracing import Draws, Trace, drawing, execution_order, first_pass, traced
from varscale.theory.interpreter.uses import weights
from varscale.theory.rules.lookup import unknown
from varscale.theory.rules.padding import PADDED, filled_shapes, is_mask
from varscale.theory.rules.random import input_leaf
from varscale.theory.rules.registry import Complex, Opaque, live_equations
from varscale.usage.parameters import uses_in

_DETAILS = ("modules", "equations")
_MODEL_SEED = 0  # laws do not depend on the seed


def predict(
    model: Any,
    x: Any,
    *,
    params: Any = None,
    scheme: Any = None,
    backward: bool = True,
    detail: str | Collection[str] = "modules",
    method: str | None = None,
    draws: int | None = None,
) -> Report:
    r"""Predicts the moments of every module's output at initialization, forward and backward, with nothing run or allocated.

    Args:
        model: a linen module, an nnx factory `lambda rngs: Net(..., rngs=rngs)`, an nnx instance, or a function
            f(params, *args).
        x: one input, or `vs.inputs(*args, **kwargs)`. Arrays: their moments are estimated (of ids, how often they repeat, and
            which are paddings: rows that one value fills up are taken as being of three lengths at most), those of several
            arrays of one shape together, and an array that is given twice is one input;
            `jax.ShapeDtypeStruct`: independent standard normals (ids: uniform, none a padding; lengths: the whole; masks: all
            true); `vs.Moments`: as given.
        params: None: the laws that the model's own init draws from. A tree of arrays: their moments are measured. A tree of
            initializers or of variances: those. For a plain function also a traceable function of a key that returns the tree.
        scheme: laws in place of the model's own, as `vs.initialize` takes them: a `vs.Plan`, a scheme, or a mapping from path
            patterns to initializers. Laws of a mapping are of whole leaves here.
        backward: whether to predict the gradients too.
        detail: "modules": a row a module, or, of a plain function, a row a `jax.named_scope` block; "equations": besides one
            for every equation that computes floating-point numbers, "Dense_0/dot_general"; names of primitives, such as
            ("rsqrt", "reduce_max"): besides one for each of their equations.
        method: the method to run in place of `__call__`.
        draws: how many networks are drawn (2 or more) and measured beside the prediction, in one compiled function: each row
            then says what they measured and whether the prediction holds. None: nothing is drawn.

    Returns:
        Report: rows in execution order, and the law of every parameter.

    Raises:
        TypeError: the model or an input is of no known kind.
        ValueError: the model does not trace on these shapes, has no outputs, holds NaN, or uses a primitive that has no
            rule and cannot be sampled; with `draws`, parameters are arrays, or whole numbers of unknown range are described.

    >>> import jax, varscale as vs
    >>> from flax import linen as nn
    >>> net = nn.Sequential([nn.Dense(256, kernel_init=vs.he_normal()), nn.relu, nn.Dense(10)])
    >>> report = vs.predict(net, jax.ShapeDtypeStruct((64, 784), "float32"))
    >>> [(row.path, round(row.second_moment, 2)) for row in report.rows]
    [('layers_0', 2.0), ('layers_2', 1.0), ('', 1.0)]
    """
    if isinstance(detail, str) and detail not in _DETAILS:
        raise ValueError(f"detail must be one of {', '.join(map(repr, _DETAILS))}, not {detail!r}")
    if draws is not None and (isinstance(draws, bool) or not isinstance(draws, int) or draws < 2):
        raise ValueError(f"draws must be None or a whole number of networks, 2 or more, not {draws!r}")
    given = faces.as_inputs(x)
    scheme = applied(scheme, model, given, params=abstract(params), method=method)
    report = _predicted(
        faces.program(model, method=method), given, params, scheme, backward=backward, detail=detail
    )
    return report if draws is None else beside_draws(report, model, given, params, draws, method, scheme)


class Walkable(NamedTuple):
    """A forward pass, ready to be interpreted.

    Attributes:
        forward: its trace, from parameters and inputs to rows.
        numbers: which parameters it takes, in their order.
        parameters: all parameters.
        split: the inputs.
    """

    forward: Trace
    numbers: Sequence[int]
    parameters: _Parameters
    split: _Split

    def run(self, interpreter: Interpreter) -> list[Any]:
        """What the interpreter makes of it: the values of the rows."""
        taken = [self.parameters.values[i] for i in self.numbers]
        return interpreter.run(
            self.forward.jaxpr, self.forward.constants, [*taken, *self.split.values(interpreter)]
        )


def walkable(interpreter: Interpreter, program: Program, given: Inputs, params: Any, scheme: Any) -> Walkable:
    """A model's forward pass, its parameters' laws read with an interpreter."""
    split = _Split(given)
    parameters = _parameters(interpreter, program, params, split)
    if scheme is not None:
        laws = laid_parameters(interpreter, parameters.shapes, parameters.values, scheme)
        parameters = parameters._replace(values=laws)
    return Walkable(*_forward(program, parameters, split), parameters, split)


def _predicted(
    program: Program,
    given: Inputs,
    params: Any,
    scheme: Any,
    *,
    backward: bool,
    detail: str | Collection[str],
) -> Report:
    interpreter = Interpreter()
    walked = walkable(interpreter, program, given, params, scheme)
    forward, parameters = walked.forward, walked.parameters
    if not forward.shapes[""]:
        raise ValueError(
            f"model {program.kinds.get('', program.kind)} returns no array: there is nothing to predict"
        )

    kind = "scope" if program.init is None and program.parameters is None else "module"

    def walk() -> Walked:
        rows = Rows(scopes=kind == "scope", equations=_equations(detail))
        interpreter.place = Place(rows)
        values = walked.run(interpreter)
        interpreter.place = None
        outputs = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(forward.shapes), values)
        captured = {call: outputs[call] for call in execution_order(forward.jaxpr, forward.shapes)}
        return list(joined(rows.made, captured, kind))

    numbers = jax.tree_util.tree_unflatten(
        jax.tree_util.tree_structure(forward.shapes), range(len(forward.jaxpr.outvars))
    )
    order = {path: i for rows in numbers.values() for path, i in rows.items()}
    shares = through(forward.jaxpr, order, list(numbers[""])) if backward else {}
    flat = jax.tree_util.tree_flatten_with_path(parameters.shapes)[0]
    named = [(path_string(path), tuple(leaf.shape)) for path, leaf in flat]
    program_of = forward.jaxpr.replace(
        eqns=live_equations(forward.jaxpr)
    )  # without those that draw its parameters
    found_uses = uses_in(program_of, forward.constants, [named[i] for i in walked.numbers])
    uses = {of.path: of for of in found_uses}

    def report(found: Walked) -> Report:
        laws = zip((path for path, _ in named), parameters.values, strict=True)
        return summarize(interpreter, program, found, weights(laws, uses), shares, backward=backward)

    first, found = _settled(interpreter, walk, report)
    first = dataclasses.replace(first, notes=(*first.notes, *interpreter.regions.note))
    if not backward or all(
        not isinstance(x, Value) or x.constant is None for _, of, x in found if of in (None, "scope")
    ):
        return first
    interpreter.nudged = True
    return _settled(interpreter, walk, lambda found: with_gradients(interpreter, first, found, shares))[0]


Walked = list[tuple[str, str | None, Any]]


def _settled(
    interpreter: Interpreter, walk: Callable[[], Walked], report: Callable[[Walked], Report]
) -> tuple[Report, Walked]:
    """The report of the first walk that asks for no further region, and what it found.

    A region is added, or refused, once, so there is one.
    """
    while True:
        try:
            found = walk()
            made = None if interpreter.regions.changed else report(found)
            if not interpreter.regions.again() and made is not None:
                return made, found
        except Exception as error:
            known = error if isinstance(error, PredictionError) else located(error)
            interpreter.ask_for(known)
            if not interpreter.regions.again():  # else it met a placeholder, or what will now be drawn
                if interpreter.graph.undrawn:
                    raise known from error
                interpreter.graph.undrawn = True


def _equations(detail: str | Collection[str]) -> Collection[str] | None:
    """The primitives whose equations have rows; None for all."""
    return None if detail == "equations" else () if detail == "modules" else detail


class _Parameters(NamedTuple):
    """A model's parameters: their shapes, as a tree; their values; how they are drawn, where its own init draws them."""

    shapes: Any
    values: list[Any]
    draws: Draws | None = None


def _forward(program: Program, parameters: _Parameters, split: _Split) -> tuple[Trace, Sequence[int]]:
    """The forward pass from parameters and inputs to rows, and the numbers of the parameters it takes."""
    if parameters.draws is not None and parameters.draws.forward is not None:
        return parameters.draws.forward, parameters.draws.used

    def forward(variables: Any, dynamic: list[Any]) -> Any:
        output, captures = program.apply(variables, split.join(dynamic))
        return faces.grouped(captures, output)

    return traced(forward, parameters.shapes, split.structs), range(len(parameters.values))


class _Split:
    """Inputs apart: arrays and descriptions of arrays, which are traced, and everything else, which is passed as it is."""

    def __init__(self, given: Inputs):
        self.leaves, self.tree = jax.tree_util.tree_flatten(
            (given.args, dict(given.kwargs)), is_leaf=lambda x: isinstance(x, Moments)
        )
        self.places = [i for i, x in enumerate(self.leaves) if isinstance(x, Moments) or faces.is_dynamic(x)]
        self.structs = [_struct(self.leaves[i]) for i in self.places]

    def join(self, dynamic: list[Any]) -> Inputs:
        flat = list(self.leaves)
        for i, x in zip(self.places, dynamic, strict=True):
            flat[i] = x
        args, kwargs = jax.tree_util.tree_unflatten(self.tree, flat)
        return Inputs(args, kwargs)

    def values(self, interpreter: Interpreter) -> list[Any]:
        PADDED.put(interpreter.graph, None, filled_shapes(self.leaves))
        made = [input_value(interpreter, self.leaves[i], self._name(i)) for i in self.places]
        related([(self.leaves[i], x) for i, x in zip(self.places, made, strict=True)])
        return made

    def _name(self, i: int) -> str:
        """The place where its numbers are first given: an array that is given twice is one."""
        x = self.leaves[i]
        return f"input {next(j for j in self.places if j == i or _same_numbers(self.leaves[j], x))}"


def _same_numbers(x: Any, y: Any) -> bool:
    """Whether both are arrays of the same numbers, not descriptions of arrays or keys."""
    if not (_is_measured(x) and _is_measured(y)):
        return False
    return x is y or (x.shape == y.shape and x.dtype == y.dtype and np.array_equal(x, y))


def _is_measured(x: Any) -> bool:
    """Whether it is an array of real floating-point numbers, whose moments are estimated."""
    described = isinstance(x, Moments | jax.ShapeDtypeStruct)
    return not described and jnp.issubdtype(x.dtype, jnp.floating)


def related(inputs: Sequence[tuple[Any, Any]]) -> None:
    """Notes that given arrays may go together."""
    leaves = [
        made.node
        for x, made in inputs
        if _is_measured(x) and isinstance(made, Value) and isinstance(made.node, Leaf)
    ]
    every = functools.reduce(lambda bits, node: bits | node.deps, leaves, 0)
    for node in leaves:
        node.deps = every


def _struct(x: Any) -> jax.ShapeDtypeStruct:
    if isinstance(x, Moments):
        return jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype))
    dtype = x.dtype
    if dtype in (np.float64, np.int64, np.uint64, np.complex128):
        dtype = jax.dtypes.canonicalize_dtype(dtype)  # 32 bits, unless x64 is on
    return jax.ShapeDtypeStruct(x.shape, dtype)


def input_value(interpreter: Interpreter, x: Any, name: str) -> Any:
    """An input as a value: known numbers, or a leaf with its law.

    Raises:
        ValueError: it contains NaN or infinities.
    """
    graph = interpreter.graph
    shape = tuple(x.shape)
    axes = tuple(Axis(n) for n in shape if n != 1)
    if math.prod(shape) == 0:
        raise ValueError(f"{name} has shape {shape}: it is empty")
    if isinstance(x, Moments):
        second = x.second()
        second = second[tuple(slice(None) if n != 1 else 0 for n in shape)]
        table = Table(axes, np.full([1] * len(axes), float(x.mean)), second)
        return input_leaf(interpreter, name, shape, table, odd=False)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return Opaque(
            x
            if isinstance(x, jax.Array)
            else jax.random.split(jax.random.key(_MODEL_SEED), shape)
            if shape
            else jax.random.key(_MODEL_SEED)
        )
    kind = np.dtype(x.dtype).kind if np.dtype(x.dtype).kind != "V" else "f"
    if kind == "c":
        return Complex(
            *(input_value(interpreter, part, f"{name} ({which} part)") for which, part in _parts(x))
        )
    if isinstance(x, jax.ShapeDtypeStruct):
        if kind == "b":
            return full(graph, 1.0, shape)
        if kind in "iu":
            return unknown(interpreter, name, shape)
        return input_leaf(interpreter, name, shape, independent(0.0, 1.0, axes), odd=True)
    numbers = np.asarray(x)
    if kind in "iub":
        return interpreter.known(numbers)
    numbers = numbers.astype(np.float64)
    if not np.all(np.isfinite(numbers)):
        raise ValueError(f"{name} contains NaN or infinities")
    if np.all(numbers == numbers.flat[0]):
        return full(graph, float(numbers.flat[0]), shape)
    if is_mask(graph, numbers):
        return interpreter.known(numbers)
    if len(shape) > 1 and shape[0] > 1:
        axes = (sample_axis(numbers), *axes[1:])
    numbers = numbers.reshape([a.size for a in axes])
    made = input_leaf(interpreter, name, shape, estimate(numbers, axes), odd=False)
    measured(made.node, numbers)
    return made


def _parts(x: Any) -> list[tuple[str, Any]]:
    """The parts of a complex input; of one that is only described, two that have E|x|² = 1 between them."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        return [("real", np.real(x)), ("imaginary", np.imag(x))]
    return [(which, Moments(0.0, 0.5, shape=x.shape)) for which in ("real", "imaginary")]


def _parameters(interpreter: Interpreter, program: Program, params: Any, split: _Split) -> _Parameters:

    if params is None:
        params = program.parameters
    inputs = split.values(interpreter)
    if params is None and program.start is not None and (drawn := first_pass(program, split)) is not None:
        return _Parameters(drawn.drawing.shapes, init_laws(interpreter, drawn.drawing, inputs), drawn)
    if params is not None and program.init is None and not is_function(params):
        return _Parameters(*given_parameters(interpreter, params, None, None))
    if program.init is not None:
        init = program.init
        trace = drawing(lambda key, dynamic: init(key, split.join(dynamic)), split)
    elif params is None:
        raise ValueError(
            "params must be given for a plain function: arrays, or a function of a key that returns them"
        )
    else:
        trace, params = drawing(lambda key, _: params(key), split), None
    values = init_laws(interpreter, trace, inputs)
    if params is None:
        return _Parameters(trace.shapes, values)
    return _Parameters(*given_parameters(interpreter, params, trace.shapes, values))
