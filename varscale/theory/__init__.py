"""The moment interpreter: `predict`, its rules, and mean-field theory.

A model's jaxpr is walked once. Every tensor becomes a node of a graph: an array that is random over initializations and inputs,
of which the first and second moments are kept, by the type of an index pair. The room has six folders, from the ground up:

    domain/        axes with classes, types of index pairs, tables of moments by type, random arrays with a given table
    integrals/     quadrature and Hermite series against normals, softmax weights, lognormal scales, primitives in NumPy
    graph/         hash-consed nodes in a normal form; elementwise expressions; how a tensor's dimensions are made of axes
    propagation/   second moments, cross-moments, cotangents, fluctuations at finite width, error bounds, joint samples
    rules/         what becomes of each primitive, one family a file
    interpreter/   the walk over the jaxpr, parameters, rows, the report: `predict`
    mean_field     networks of infinite width: fixed points, phases, depth scales
"""

from varscale.theory.domain.tables import Moments
from varscale.theory.graph.store import PredictionError
from varscale.theory.integrals.primitives import FUNCTIONS
from varscale.theory.interpreter.interpreter import Interpreter
from varscale.theory.interpreter.predict import predict
from varscale.theory.mean_field import critical, mean_field
from varscale.theory.rules.registry import rule

__all__ = [
    "FUNCTIONS",
    "Interpreter",
    "Moments",
    "PredictionError",
    "critical",
    "mean_field",
    "predict",
    "rule",
]
