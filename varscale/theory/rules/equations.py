"""What a jaxpr is made of: its live equations, calls, and where a `jax.lax.associative_scan` begins.

jax writes such a scan out as log₂ T levels of slices, combinations and interleavings.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from varscale import _compat
from varscale.programs.pieces import live

CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
CALLS += ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


def scans(eqns: Sequence[Any]) -> list[int]:
    """Where associative scans begin: an array cut in halves, of every other position each, which are interleaved again."""
    found, start = [], 0
    for i, eqn in enumerate(eqns):
        axis = _halved(eqn, 0) if i >= start else None
        if axis is None:
            continue
        array, rest = eqn.invars[0], eqns[i + 1 :]
        again = any(_halved(e, 1) == axis and e.invars[0] is array for e in rest)
        size = array.aval.shape[axis]
        whole = (
            j
            for j, e in enumerate(rest)
            if _dilates(e) and e.outvars[0].aval.shape[axis : axis + 1] == (size,)
        )
        end = next(whole, None) if again else None
        if end is not None:
            found.append(i)
            start = i + end
    return found


def _dilates(eqn: Any) -> bool:
    """Whether it puts one zero between any two entries."""
    return eqn.primitive.name == "pad" and any(interior == 1 for *_, interior in eqn.params["padding_config"])


def _halved(eqn: Any, offset: int) -> int | None:
    """The axis along which a slice takes every other position from this one on, and all along the rest."""
    if eqn.primitive.name != "slice" or eqn.params["strides"] is None:
        return None
    starts, strides = eqn.params["start_indices"], eqn.params["strides"]
    axes = [k for k, step in enumerate(strides) if step == 2]
    return (
        axes[0]
        if len(axes) == 1 and [s for s in starts if s] == [offset][:offset] and starts[axes[0]] == offset
        else None
    )


def sub_jaxpr_of(eqn: Any) -> Any:
    """The jaxpr of a call; None for anything else."""
    return next((p for p in eqn.params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")), None)


@functools.lru_cache(maxsize=256)
def live_equations(jaxpr: Any) -> list[Any]:
    """The equations that the outputs depend on (an init's forward pass is not one)."""
    return live(jaxpr, jaxpr.eqns)


@functools.lru_cache(maxsize=256)
def used_variables(jaxpr: Any) -> frozenset[Any]:
    """The variables that live equations read, and the outputs."""
    read = (v for eqn in live_equations(jaxpr) for v in eqn.invars)
    return frozenset(v for v in (*read, *jaxpr.outvars) if not _compat.is_literal(v))
