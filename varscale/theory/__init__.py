"""The moment interpreter: `predict`, its rules, and mean-field theory.

A model's jaxpr is walked once. Every tensor becomes a node of a graph: an array that is random over initializations and inputs,
of which the first and second moments are kept, by the type of an index pair. To read it, in this order:

    axes, moments                      exchangeable arrays: types of index pairs, and tables of moments by type
    graph, rearranged, elementwise     nodes, which are computed when they are asked for, in a normal form
    layout                             how a tensor's dimensions are made of its node's axes
    hermite, functions, quadrature     functions of normals: Hermite series in a correlation
    mehler                             two of them at once
    products, opening, summed          functions of several roots; the law of a sum
    cross, regrouped, slices           cross-moments of two nodes, whatever became of their axes
    interpreter, rules/                the walk, and what it does at each primitive, a family of them a file
    softmax_weights, softmax_jacobian  attention: the weights, and cotangents behind them
    overlaps                           tokens that weights and values share (so may any two arrays: rules/shared_tokens; one
                                       weight twice: rules/transposed; rows with themselves: rules/gram)
    given, paddings                    known arrays as inputs, and what is computed from them; ids that fill up rows
    windows, locality                  what is near in a picture, which moments by type do not say
    nearby, neighbourhoods             how much more alike near places are, and windows over them
    depthwise                          sums over one channel, whose scale follows what they read
    responses, scales, spread          finite width: how one initialization differs from the mean of all
    square_pairs                       what is left to chance in a mean of squares
    common_part                        what places have in common, which fluctuates by itself
    narrow, spheres, common_scale      sums of few terms; norms over few units; averages of few numbers
    derivatives, backward              gradients
    gradient_scales                    finite width: what their factors share
    draws, made, effects               what is drawn, for want of a formula, from what it is made of
    ensemble, ordered, loops, shrunken recurrences over time, drawn together
    provenance, domains                how a number was obtained, and how far off it may be
    traces, repeats, prefix_scans      from a model to jaxprs
    laws, uses, rows, summary          parameters, their use, and the rows of the report
    predict                            all of it
    mean_field                         networks of infinite width, by themselves
"""

from varscale.theory.functions import FUNCTIONS
from varscale.theory.interpreter import Interpreter, PredictionError, rule
from varscale.theory.mean_field import critical, mean_field
from varscale.theory.moments import Moments
from varscale.theory.predict import predict

__all__ = ["FUNCTIONS", "Interpreter", "Moments", "PredictionError", "critical", "mean_field", "predict", "rule"]
