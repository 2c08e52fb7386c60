"""Laws for whole models by name: a scheme, called with a model and its input, gives a plan.

    plan = vs.schemes.gpt2()(model, x)
    params = vs.initialize(model, key, x, scheme=plan)
    plan.verify(params)

README.md beside this file: how to use a plan, and the table of schemes with their sources.
"""

from varscale.schemes.actor_critic import ppo
from varscale.schemes.by_fans import fan_in, glorot, he, lecun, normal, orthogonal
from varscale.schemes.deep_norm import deepnorm, subln
from varscale.schemes.edge_of_chaos import critical
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
from varscale.schemes.maximal_update import completep, mup, spectral
from varscale.schemes.mimetic_attention import mimetic
from varscale.schemes.normalizer_free import fixup, nf_resnet, rezero, skipinit, t_fixup
from varscale.schemes.plan import Plan, PlannedLeaf, Requirement
from varscale.schemes.recurrent import chrono, lru, mamba, s4d
from varscale.schemes.scheme import Choice, Scheme, Subject
from varscale.schemes.t5_transformer import t5

__all__ = [
    "Choice",
    "Plan",
    "PlannedLeaf",
    "Requirement",
    "Scheme",
    "Subject",
    "chrono",
    "completep",
    "critical",
    "declared",
    "deepnorm",
    "fan_in",
    "fixup",
    "full_megatron",
    "glorot",
    "gpt2",
    "graded",
    "he",
    "interleaved",
    "lecun",
    "llama_depth",
    "lru",
    "mamba",
    "megatron",
    "mimetic",
    "mitchell",
    "mup",
    "nf_resnet",
    "normal",
    "normalized",
    "orthogonal",
    "orthogonal_over",
    "ppo",
    "rezero",
    "s4d",
    "skipinit",
    "small_wang",
    "spectral",
    "subln",
    "t5",
    "t_fixup",
    "zero_projection",
]
