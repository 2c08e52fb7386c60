"""From a model to a Report: read its parameters' laws, walk its forward pass, ask for the moments of every module's output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax

from varscale.initialization.laws import applied
from varscale.programs import faces
from varscale.programs.caches import without_collection
from varscale.programs.faces import Inputs, Program
from varscale.report import Report
from varscale.theory.graph.layout import Value
from varscale.theory.graph.store import PredictionError, located
from varscale.theory.interpreter.draws import beside_draws
from varscale.theory.interpreter.inputs import TracedInputs
from varscale.theory.interpreter.interpreter import Interpreter
from varscale.theory.interpreter.parameters import (
    abstract,
    given_parameters,
    init_laws,
    is_function,
    laid_parameters,
    path_string,
)
from varscale.theory.interpreter.rows import Place, Rows, joined, through
from varscale.theory.interpreter.summary import summarize, weights, with_gradients
from varscale.theory.interpreter.tracing import INIT_SEED, Draws, Trace, execution_order, first_pass, traced
from varscale.theory.rules.registry import live_equations
from varscale.usage.parameters import uses_in

_DETAILS = ("modules", "equations")


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
    split: TracedInputs

    def run(self, interpreter: Interpreter) -> list[Any]:
        """What the interpreter makes of it: the values of the rows."""
        taken = [self.parameters.values[i] for i in self.numbers]
        return interpreter.run(
            self.forward.jaxpr, self.forward.constants, [*taken, *self.split.values(interpreter)]
        )


def walkable(interpreter: Interpreter, program: Program, given: Inputs, params: Any, scheme: Any) -> Walkable:
    """A model's forward pass, its parameters' laws read with an interpreter."""
    split = TracedInputs(given)
    parameters = _parameters(interpreter, program, params, split)
    if scheme is not None:
        laws = laid_parameters(interpreter, parameters.shapes, parameters.values, scheme)
        parameters = parameters._replace(values=laws)
    if parameters.draws is not None and parameters.draws.forward is not None:
        return Walkable(parameters.draws.forward, parameters.draws.used, parameters, split)

    def forward(variables: Any, dynamic: list[Any]) -> Any:
        output, captures = program.apply(variables, split.join(dynamic))
        return faces.grouped(captures, output)

    trace = traced(forward, parameters.shapes, split.structs)
    return Walkable(trace, range(len(parameters.values)), parameters, split)


@without_collection()
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
    of_equations = None if detail == "equations" else () if detail == "modules" else detail

    tree = jax.tree_util.tree_structure(forward.shapes)

    def walk() -> Walked:
        rows = Rows(scopes=kind == "scope", equations=of_equations)
        interpreter.place = Place(rows)
        values = walked.run(interpreter)
        interpreter.place = None
        outputs = jax.tree_util.tree_unflatten(tree, values)
        captured = {call: outputs[call] for call in execution_order(forward.jaxpr, forward.shapes)}
        return list(joined(rows.made, captured, kind))

    numbers = jax.tree_util.tree_unflatten(tree, range(len(forward.jaxpr.outvars)))
    order = {path: i for rows in numbers.values() for path, i in rows.items()}
    shares = through(forward.jaxpr, order, list(numbers[""])) if backward else {}
    flat = jax.tree_util.tree_flatten_with_path(parameters.shapes)[0]
    named = [(path_string(path), tuple(leaf.shape)) for path, leaf in flat]
    computing = forward.jaxpr.replace(eqns=live_equations(forward.jaxpr))  # not what draws its parameters
    uses = {of.path: of for of in uses_in(computing, forward.constants, [named[i] for i in walked.numbers])}

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


class _Parameters(NamedTuple):
    """A model's parameters: their shapes, as a tree; their values; how they are drawn, where its own init draws them."""

    shapes: Any
    values: list[Any]
    draws: Draws | None = None


def _parameters(interpreter: Interpreter, program: Program, params: Any, split: TracedInputs) -> _Parameters:

    if params is None:
        params = program.parameters
    inputs = split.values(interpreter)
    if params is None and program.start is not None and (drawn := first_pass(program, split)) is not None:
        return _Parameters(drawn.drawing.shapes, init_laws(interpreter, drawn.drawing, inputs), drawn)
    if params is not None and program.init is None and not is_function(params):
        return _Parameters(*given_parameters(interpreter, params, None, None))
    init, given = program.init, params
    if init is not None:
        trace = traced(lambda dynamic: init(jax.random.key(INIT_SEED), split.join(dynamic)), split.structs)
    elif params is None:
        raise ValueError(
            "params must be given for a plain function: arrays, or a function of a key that returns them"
        )
    else:
        trace, given = traced(lambda _: params(jax.random.key(INIT_SEED)), split.structs), None
    values = init_laws(interpreter, trace, inputs)
    if given is None:
        return _Parameters(trace.shapes, values)
    return _Parameters(*given_parameters(interpreter, given, trace.shapes, values))
