"""A jaxpr run at smaller sizes: fewer units and samples than it was traced for, sums scaled as if there were all of them.

What a layer does to the moments of its input depends on its width only through the terms of its sums. So a loop that is far
too large to be run is run on some of its units: a product with independent zero-mean weights over n' of n terms is multiplied
by √(n/n'), which keeps its variance, and backward likewise, with the terms that flow back. Means are taken over the units
there are. Of any other sum it is not known whether its terms add up or cancel, so its axis keeps its size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from varscale import _compat
from varscale.theory.rules.registry import CALLS, ELEMENTWISE_OR_LAYOUT, sub_jaxpr_of

_ROUNDED = 2.0**-8  # how far a count may be off in bfloat16, and the n − 1 of a variance


class CannotShrink(ValueError):
    """A primitive that depends on how many positions there are; `sizes` are those it has to keep."""

    def __init__(self, sizes: Sequence[int]):
        super().__init__(f"sizes {sorted(set(sizes))} have to stay")
        self.sizes = frozenset(sizes)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Which sizes of axes become which smaller ones; an axis of any other size stays as it is."""

    smaller: Mapping[int, int]

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.smaller.get(n, n) for n in shape)

    def ratio(self, sizes: Sequence[int]) -> float:
        """How many positions each one that is left stands for."""
        return math.prod(n / self.smaller.get(n, n) for n in sizes)

    def changed(self, variables: Sequence[Any]) -> list[int]:
        """The sizes of these variables that shrink."""
        return [n for v in variables for n in v.aval.shape if self.smaller.get(n, n) != n]


def run(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], weights: Sequence[bool], sizes: Sizes
) -> list[Any]:
    """The outputs of a jaxpr on smaller arrays.

    Args:
        jaxpr: what to run.
        consts: its constants, at their own sizes.
        args: its inputs at the smaller sizes.
        weights: which of the inputs are independent zero-mean weights.
        sizes: the sizes.

    Raises:
        CannotShrink: something in it needs sizes that were to shrink.
    """
    fixed = [n for const in consts for n in jnp.shape(const) if sizes.smaller.get(n, n) != n]
    if fixed:
        raise CannotShrink(fixed)
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    known = {v for v, weight in zip(jaxpr.invars, weights, strict=True) if weight}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "reduce_sum" and not _is_averaged(eqn, jaxpr):
            _keep_size([eqn.invars[0].aval.shape[k] for k in eqn.params["axes"]], sizes)
        ins = [v.val if _compat.is_literal(v) else env[v] for v in eqn.invars]
        own = [not _compat.is_literal(v) and v in known for v in eqn.invars]
        env.update(zip(eqn.outvars, _equation(eqn, ins, own, sizes), strict=True))
        if any(own) and _keeps_law(eqn, own):
            known.update(eqn.outvars)
    return [v.val if _compat.is_literal(v) else env[v] for v in jaxpr.outvars]


def _is_averaged(eqn: Any, jaxpr: Any) -> bool:
    """Whether a sum is only ever divided by how many terms it has."""
    (total,) = eqn.outvars
    uses = [other for other in jaxpr.eqns if total in [v for v in other.invars if not _compat.is_literal(v)]]
    count = math.prod(eqn.invars[0].aval.shape[k] for k in eqn.params["axes"])
    return total not in [v for v in jaxpr.outvars if not _compat.is_literal(v)] and all(
        use.primitive.name == "div"
        and use.invars[0] is total
        and _compat.is_literal(use.invars[1])
        and math.isclose(float(use.invars[1].val), count, rel_tol=_ROUNDED)
        for use in uses
    )


def _keep_size(summed: Sequence[int], sizes: Sizes) -> None:
    if sizes.ratio(summed) != 1:
        raise CannotShrink([n for n in summed if sizes.shape([n]) != (n,)])


def _equation(eqn: Any, ins: list[Any], weights: list[bool], sizes: Sizes) -> list[Any]:
    name, inner = eqn.primitive.name, sub_jaxpr_of(eqn)
    if not sizes.smaller and inner is not None:
        return list(_compat.evaluated(eqn, ins))
    if inner is not None and name in CALLS:
        jaxpr, consts = _compat.sub_jaxpr(inner)
        return run(jaxpr, consts, ins, weights, sizes)
    if name == "scan":
        return _looped(eqn, ins, weights, sizes)
    if not sizes.changed([*eqn.invars, *eqn.outvars]):
        return _bound(eqn, ins, {})
    if name in _RULES:
        return _RULES[name](eqn, ins, weights, sizes)
    if inner is not None or name not in ELEMENTWISE_OR_LAYOUT | _ALONG_AN_AXIS:
        raise CannotShrink(sizes.changed([*eqn.invars, *eqn.outvars]))
    return _alike_everywhere(eqn, ins, sizes)


def _bound(eqn: Any, ins: Sequence[Any], params: Mapping[str, Any]) -> list[Any]:
    out = eqn.primitive.bind(*ins, **{**eqn.params, **params})
    return list(out) if eqn.primitive.multiple_results else [out]


_REARRANGES = {
    "transpose",
    "reshape",
    "squeeze",
    "slice",
    "split",
    "convert_element_type",
    "copy",
    "stop_gradient",
    "neg",
    "name",
}


def _keeps_law(eqn: Any, weights: Sequence[bool]) -> bool:
    """Whether what was independent weights still is: rearranged, multiplied by a number, or several of them joined."""
    others = [v for v, weight in zip(eqn.invars, weights, strict=True) if not weight]
    name = eqn.primitive.name
    if name in ("concatenate", "complex", "add", "sub"):
        return not others and len(set(eqn.invars)) == len(eqn.invars)
    return name in _REARRANGES or (name in ("mul", "div") and all(v.aval.ndim == 0 for v in others))


_ALONG_AN_AXIS = {"concatenate", "pad", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"}
_ALONG_AN_AXIS |= {"argmax", "argmin", "sort", "top_k", "rev", "fft"}
_ALONG_AN_AXIS |= {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"}


def _alike_everywhere(
    eqn: Any, ins: Sequence[Any], sizes: Sizes, params: Mapping[str, Any] | None = None
) -> list[Any]:
    """What acts alike at every position of the axes that shrink, if its outputs then have the sizes that they should."""
    _keep_size(_where_positions_matter(eqn), sizes)
    shapes = {k: sizes.shape(eqn.params[k]) for k in ("shape", "new_sizes", "sizes") if k in eqn.params}
    expected = [sizes.shape(v.aval.shape) for v in eqn.outvars]
    try:
        out = _bound(eqn, ins, {**shapes, **(params or {})})
    except (TypeError, ValueError):
        out = []
    if [x.shape for x in out] != expected:
        raise CannotShrink(sizes.changed([*eqn.invars, *eqn.outvars]))
    return out


def _where_positions_matter(eqn: Any) -> list[int]:
    """Sizes of the axes whose positions are told apart, or counted."""
    name, p = eqn.primitive.name, eqn.params
    if name == "iota":
        return [p["shape"][p["dimension"]]]
    if name not in _ALONG_AN_AXIS - {"concatenate"}:
        return []
    shape = eqn.invars[0].aval.shape
    if name == "pad":
        return [n for n, padding in zip(shape, p["padding_config"], strict=True) if any(padding)]
    if name == "fft":
        return list(shape[len(shape) - len(p["fft_lengths"]) :])
    axes = p.get("axes", p.get("dimensions", [p.get("axis", p.get("dimension", len(shape) - 1))]))
    return [shape[k] for k in axes]


def _blocks(eqn: Any, ins: list[Any], weights: list[bool], sizes: Sizes) -> list[Any]:
    """Blocks of the smaller axis, where the blocks of the whole one are multiples of what a position stands for."""
    p, (shape, kept) = eqn.params, (eqn.invars[0].aval.shape, ins[0].shape)
    ratios = [n // m for n, m in zip(shape, kept, strict=True)]
    starts, limits = (np.array(p[name]) for name in ("start_indices", "limit_indices"))
    strides = np.array(p["strides"] or np.ones_like(starts))
    cut = [k for k, r in enumerate(ratios) if starts[k] % r or limits[k] % r or (r > 1 and strides[k] > 1)]
    if cut:
        raise CannotShrink([shape[k] for k in cut])
    smaller = {"start_indices": tuple(starts // ratios), "limit_indices": tuple(limits // ratios)}
    return _alike_everywhere(eqn, ins, sizes, smaller)


def _summed(eqn: Any, ins: list[Any], weights: list[bool], sizes: Sizes) -> list[Any]:
    ratio = sizes.ratio([eqn.invars[0].aval.shape[k] for k in eqn.params["axes"]])
    return [_bound(eqn, ins, {})[0] * jnp.asarray(ratio, ins[0].dtype)]


def _matrix_product(eqn: Any, ins: list[Any], weights: list[bool], sizes: Sizes) -> list[Any]:
    (cx, cy), (bx, by) = eqn.params["dimension_numbers"]
    shapes = [v.aval.shape for v in eqn.invars]
    terms = [shapes[0][k] for k in cx]
    if sum(weights) != 1:
        _keep_size(terms, sizes)
        return _bound(eqn, ins, {})
    summed, batch = ((cx, bx), (cy, by))[weights[1]]
    free = [n for k, n in enumerate(shapes[weights[1]]) if k not in summed and k not in batch]
    return [_weighted_product(eqn, ins, int(weights[1]), sizes.ratio(terms), sizes.ratio(free))]


def _convolution(eqn: Any, ins: list[Any], weights: list[bool], sizes: Sizes) -> list[Any]:
    """Fewer channels and samples, on every position of the image."""
    spec, kernel = eqn.params["dimension_numbers"], eqn.invars[1].aval.shape
    _keep_size([eqn.invars[0].aval.shape[k] for k in spec.lhs_spec[2:]], sizes)
    _keep_size([kernel[k] for k in spec.rhs_spec[2:]], sizes)
    groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
    outputs, inputs = (kernel[k] for k in spec.rhs_spec[:2])
    if groups > 1 or sum(weights) != 1:
        _keep_size([outputs, inputs], sizes)
        return _bound(eqn, ins, {})
    return [_weighted_product(eqn, ins, 1, sizes.ratio([inputs]), sizes.ratio([outputs]))]


def _weighted_product(eqn: Any, ins: Sequence[Any], which: int, terms: float, free: float) -> jax.Array:
    """A product with weights, operand `which`, where each term, and each one that flows back, stands for this many."""

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return _bound(eqn, [x, y], {})[0]

    @jax.custom_vjp
    def scaled(x: jax.Array, y: jax.Array) -> jax.Array:
        out = product(x, y)
        return out * jnp.asarray(math.sqrt(terms), out.dtype)

    def ahead(x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        return scaled(x, y), (x, y)

    def back(operands: Any, cotangent: jax.Array) -> tuple[jax.Array, ...]:
        passed = list(jax.vjp(product, *operands)[1](cotangent))
        passed[1 - which] *= jnp.asarray(math.sqrt(free), passed[1 - which].dtype)
        return tuple(passed)

    scaled.defvjp(ahead, back)
    return scaled(*ins)


def _looped(eqn: Any, ins: list[Any], weights: list[bool], sizes: Sizes) -> list[Any]:
    """A scan of known length, step by step at the smaller sizes."""
    jaxpr, literals = _compat.sub_jaxpr(eqn.params["jaxpr"])
    fixed, carry, streams = _compat.scan_operands(eqn.params, ins)
    own, first, stacked = _compat.scan_operands(eqn.params, weights)

    def step(now: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        out = run(jaxpr, literals, [*fixed, *now, *row], [*own, *first, *stacked], sizes)
        return out[: len(now)], out[len(now) :]

    last, rows = lax.scan(
        step, list(carry), list(streams), length=eqn.params["length"], reverse=eqn.params["reverse"]
    )
    return [*last, *rows]


_RULES: dict[str, Callable[[Any, list[Any], list[bool], Sizes], list[Any]]] = {
    "slice": _blocks,
    "reduce_sum": _summed,
    "dot_general": _matrix_product,
    "conv_general_dilated": _convolution,
}


def work(jaxpr: Any, sizes: Sizes) -> float:
    """Multiplications in one run at these sizes, roughly."""
    total = 0.0
    for eqn, times in _every_equation(jaxpr):
        terms = 1.0
        if eqn.primitive.name == "dot_general":
            summed = eqn.params["dimension_numbers"][0][0]
            terms = math.prod(sizes.shape([eqn.invars[0].aval.shape[k] for k in summed]))
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = sizes.shape(eqn.invars[1].aval.shape)
            terms = math.prod(kernel) / kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        total += times * terms * sum(math.prod(sizes.shape(v.aval.shape)) for v in eqn.outvars)
    return total


def numbers_held(jaxpr: Any, sizes: Sizes) -> float:
    """Numbers in all arrays of one run at these sizes."""
    made = ((times, v.aval.shape) for eqn, times in _every_equation(jaxpr) for v in eqn.outvars)
    return sum(times * math.prod(sizes.shape(shape)) for times, shape in made)


def _every_equation(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """The equations of a jaxpr and of the calls and loops in it, each with how often it is run."""
    for eqn in jaxpr.eqns:
        inner = sub_jaxpr_of(eqn)
        if inner is None:
            yield eqn, times
        else:
            yield from _every_equation(_compat.sub_jaxpr(inner)[0], times * eqn.params.get("length", 1))
