"""Laws for whole models by name: a scheme, called with a model and its input, gives a plan.

    plan = vs.schemes.gpt2()(model, x)
    params = vs.initialize(model, key, x, scheme=plan)
    plan.verify(params)

README.md beside this file: how to use a plan, and the table of schemes with their sources.
"""

from varscale.schemes.by_fans import fan_in, glorot, he, lecun, normal, orthogonal
from varscale.schemes.gpt import gpt2, megatron
from varscale.schemes.laws import declared, graded, orthogonal_over
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
    "glorot",
    "gpt2",
    "graded",
    "he",
    "lecun",
    "megatron",
    "normal",
    "orthogonal",
    "orthogonal_over",
]
