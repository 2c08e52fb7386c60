"""Laws for whole models by name: a scheme, called with a model and its input, gives a plan.

    plan = vs.schemes.gpt2()(model, x)
    params = vs.initialize(model, key, x, scheme=plan)
    plan.verify(params)

README.md beside this file: how to use a plan, and the table of schemes with their sources.
"""

from varscale.schemes.by_fans import fan_in, glorot, he, lecun, normal, orthogonal
from varscale.schemes.gpt import (
    full_megatron,
    gpt2,
    llama_depth,
    megatron,
    mitchell,
    normalized,
    small_wang,
    zero_projection,
)
from varscale.schemes.laws import declared, graded, interleaved, orthogonal_over
from varscale.schemes.plan import Plan, PlannedLeaf, Requirement
from varscale.schemes.scheme import Choice, Scheme, Subject

__all__ = [
    "Choice",
    "Plan",
    "PlannedLeaf",
    "Requirement",
    "Scheme",
    "Subject",
    "declared",
    "fan_in",
    "full_megatron",
    "glorot",
    "gpt2",
    "graded",
    "he",
    "interleaved",
    "lecun",
    "llama_depth",
    "megatron",
    "mitchell",
    "normal",
    "normalized",
    "orthogonal",
    "orthogonal_over",
    "small_wang",
    "zero_projection",
]
