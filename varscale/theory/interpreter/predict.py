"""From a model to a Report: its traces, the walk over its forward pass, the moments of every module's output.

One trace gives both the laws of the parameters and the forward pass, where one pass does both.
"""

import collections
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from varscale import _compat
from varscale.initialization.laws import applied
from varscale.programs import faces, failures
from varscale.programs.caches import fresh_traces, without_collection
from varscale.programs.faces import Inputs, Program
from varscale.programs.pieces import is_key
from varscale.report import Report
from varscale.theory.graph.store import PredictionError, located
from varscale.theory.interpreter.draws import beside_draws
from varscale.theory.interpreter.inputs import MODEL_SEED, TracedInputs
from varscale.theory.interpreter.interpreter import Interpreter
from varscale.theory.interpreter.parameters import (
    abstract,
    given_parameters,
    init_laws,
    is_function,
    laid_parameters,
    weights,
)
from varscale.theory.interpreter.rows import (
    Made,
    Place,
    Rows,
    gradients_of,
    joined,
    summarize,
    through,
    with_gradients,
)
from varscale.theory.rules.registry import live_equations
from varscale.usage.parameters import named_leaves, uses_in


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
    if isinstance(detail, str) and detail not in ("modules", "equations"):
        raise ValueError(f"detail must be one of 'modules', 'equations', not {detail!r}")
    if draws is not None and (isinstance(draws, bool) or not isinstance(draws, int) or draws < 2):
        raise ValueError(f"draws must be None or a whole number of networks, 2 or more, not {draws!r}")
    given = faces.as_inputs(x)
    scheme = applied(scheme, model, given, params=abstract(params), method=method)
    equations = None if detail == "equations" else () if detail == "modules" else detail
    interpreter, program = Interpreter(), faces.program(model, method=method)
    with without_collection():
        walked = walkable(interpreter, program, given, params, scheme)
        report = _predicted(interpreter, program, walked, backward, equations)
        interpreter.graph.close()
    return report if draws is None else beside_draws(report, model, given, params, draws, method, scheme)


class Trace(NamedTuple):
    """A traced function."""

    jaxpr: Any
    constants: Sequence[Any]
    shapes: Any  # of its outputs, as a tree


def traced(f: Callable[..., Any], *args: Any) -> Trace:
    """The trace of a function of these shapes; ValueError where it does not trace."""
    try:
        with fresh_traces():
            jaxpr, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
    except PredictionError:
        raise
    except Exception as error:
        raise ValueError(f"the model does not trace on these inputs: {failures.told(error)}") from error
    return Trace(jaxpr.jaxpr, jaxpr.consts, shapes)


class Draws(NamedTuple):
    """How a model draws its parameters."""

    drawing: Trace  # inputs to parameters
    # Parameters (those of `used`) and inputs to rows, where the pass that drew them is the forward pass too
    forward: Trace | None = None
    used: Sequence[int] = ()  # places of the parameters that `forward` takes


def first_pass(program: Program, split: Any) -> Draws | None:
    """How a model draws its parameters, and the forward pass that it does on the way if it is the one it does ever after.

    None where it does not trace: modules that transform all variables of another (a spectral norm) take captures for some.
    """
    alike: list[bool] = []

    def both(dynamic: Any) -> Any:
        key = jax.random.key(MODEL_SEED)
        variables, output, captures, same = program.start(key, split.join(dynamic))  # pyright: ignore
        alike.append(same)
        return variables, _in_order(captures, output)

    try:
        jaxpr, constants, (variables, rows) = traced(both, split.structs)
    except ValueError:
        return None
    count = len(jax.tree_util.tree_leaves(variables))
    drawn, outputs = jaxpr.outvars[:count], jaxpr.outvars[count:]
    drawing = Trace(jaxpr.replace(outvars=drawn), constants, variables)
    used = {v: i for i, v in reversed(list(enumerate(drawn))) if not _compat.is_literal(v)}
    forward = jaxpr.replace(invars=[*used, *jaxpr.invars], outvars=outputs)
    atoms = (v for eqn in live_equations(forward) for v in (*eqn.invars, *eqn.outvars))
    # A key is drawn from inside a loop, say: what it computes with is not what it returns.
    if alike[-1] and used.keys().isdisjoint(jaxpr.invars) and not any(map(is_key, atoms)):
        return Draws(drawing, Trace(forward, constants, rows), tuple(used.values()))
    return Draws(drawing)


def _in_order(captures: Mapping[str, Any], output: Any) -> Mapping[str, Mapping[str, Any]]:
    """What modules put out, in the order in which they did, as a tree that keeps it; the model's own output last."""
    return collections.OrderedDict(faces.grouped(captures, output))


class Walkable(NamedTuple):
    """A forward pass, ready to be interpreted."""

    forward: Trace  # its trace, from parameters and inputs to rows
    numbers: Sequence[int]  # which parameters it takes, in their order
    shapes: Any  # the shapes of all parameters, as a tree
    values: Sequence[Any]  # the values of all parameters
    split: TracedInputs  # the inputs

    def captured(self, interpreter: Interpreter) -> dict[str, dict[str, Any]]:
        """What the interpreter makes of it: the values of the rows by call and path, in execution order."""
        operands = [*(self.values[i] for i in self.numbers), *self.split.values(interpreter)]
        outs = interpreter.run(self.forward.jaxpr, self.forward.constants, operands)
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(self.forward.shapes), outs)


def walkable(interpreter: Interpreter, program: Program, given: Inputs, params: Any, scheme: Any) -> Walkable:
    """A model's forward pass, its parameters' laws read with an interpreter."""
    split = TracedInputs(given)
    inputs, params = split.values(interpreter), program.parameters if params is None else params
    drawn = first_pass(program, split) if params is None and program.start is not None else None
    if drawn:
        shapes, values = drawn.drawing.shapes, init_laws(interpreter, *drawn.drawing[:2], inputs)
    else:
        shapes, values = _parameters(interpreter, program, params, split, inputs)
    if scheme is not None:
        values = laid_parameters(interpreter, shapes, values, scheme)
    if drawn and drawn.forward:
        return Walkable(drawn.forward, drawn.used, shapes, values, split)

    def forward(variables: Any, dynamic: list[Any]) -> Any:
        output, captures = program.apply(variables, split.join(dynamic))
        return _in_order(captures, output)

    return Walkable(traced(forward, shapes, split.structs), range(len(values)), shapes, values, split)


def _parameters(
    interpreter: Interpreter, program: Program, params: Any, split: TracedInputs, inputs: Sequence[Any]
) -> tuple[Any, list[Any]]:
    """A model's parameters, given or of a pass that draws them alone: their shapes, as a tree, and their values."""
    key, init = jax.random.key(MODEL_SEED), program.init
    if init is None and not is_function(params):
        if params is None:
            raise ValueError(
                "params must be given for a plain function: arrays, or a function of a key that returns them"
            )
        return given_parameters(interpreter, params, None, ())
    trace = traced(lambda x: init(key, split.join(x)) if init else params(key), split.structs)
    values = init_laws(interpreter, *trace[:2], inputs)
    if init is None or params is None:
        return trace.shapes, values
    return given_parameters(interpreter, params, trace.shapes, values)


def _predicted(
    interpreter: Interpreter, program: Program, walked: Walkable, backward: bool, kept: Collection[str] | None
) -> Report:
    forward = walked.forward
    if not forward.shapes[""]:
        raise ValueError(
            f"model {program.kinds.get('', program.kind)} returns no array: there is nothing to predict"
        )

    def walk() -> list[Made]:
        rows = Rows(program.init is None and program.parameters is None, kept)
        interpreter.place = Place(rows)
        captured = walked.captured(interpreter)
        interpreter.place = None
        return list(joined(rows.made, captured))

    paths = [path for rows in forward.shapes.values() for path in rows]
    taps = through(forward.jaxpr, paths, len(forward.shapes[""])) if backward else {}
    leaves = zip(named_leaves(walked.shapes), jax.tree_util.tree_leaves(walked.shapes), strict=True)
    named = [(name.path, tuple(leaf.shape)) for name, leaf in leaves]
    computing = forward.jaxpr.replace(eqns=live_equations(forward.jaxpr))  # not what draws its parameters
    uses = {of.path: of for of in uses_in(computing, forward.constants, [named[i] for i in walked.numbers])}

    def report(found: list[Made]) -> Report:
        laws = zip((path for path, _ in named), walked.values, strict=True)
        gradients = gradients_of(interpreter, found, taps) if backward else {}
        return with_gradients(summarize(interpreter, program, found, weights(laws, uses)), gradients)

    def settled(report: Callable[[list[Made]], Report]) -> Report:
        """The report of the first walk that asks for no further region: each is added, or refused, once."""
        while True:
            try:
                found = walk()
                made = None if interpreter.regions.changed else report(found)
                if not interpreter.regions.again() and made is not None:
                    return made
            except Exception as error:
                interpreter.ask_for(error)
                if not interpreter.regions.again():  # else it met a placeholder, or what will now be drawn
                    if interpreter.graph.undrawn:
                        raise error if isinstance(error, PredictionError) else located(error) from error
                    interpreter.graph.undrawn = True

    first = settled(report)
    first = dataclasses.replace(first, notes=interpreter.regions.note)
    without = (x.path for x in first.rows if x.gradient is None and x.path in taps)
    interpreter.apart = {path for path in without if taps[path].readers}
    if not interpreter.apart:
        return first
    return settled(lambda found: with_gradients(first, gradients_of(interpreter, found, taps)))
