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
from jax import lax

from varscale import _compat
from varscale.theory.rules.equations import is_elementwise, sub_jaxpr_of

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
    if inner is not None and name in _INLINED:
        jaxpr, consts = _compat.sub_jaxpr(inner)
        return run(jaxpr, consts, ins, weights, sizes)
    if name == "scan":
        return _looped(eqn, ins, weights, sizes)
    if not sizes.changed([*eqn.invars, *eqn.outvars]):
        return _bound(eqn, ins, {})
    if name in _RULES:
        return _RULES[name](eqn, ins, weights, sizes)
    if inner is None and is_elementwise(eqn):
        return _bound(eqn, ins, {})
    raise CannotShrink(sizes.changed([*eqn.invars, *eqn.outvars]))


def _bound(eqn: Any, ins: Sequence[Any], params: Mapping[str, Any]) -> list[Any]:
    out = eqn.primitive.bind(*ins, **{**eqn.params, **params})
    return list(out) if eqn.primitive.multiple_results else [out]


_INLINED = {
    "jit",
    "pjit",
    "closed_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "remat2",
    "checkpoint",
    "remat",
}
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


def _reshape(eqn: Any, ins: list[Any], weights: list[bool], sizes: Sizes) -> list[Any]:
    shape = sizes.shape(eqn.params["new_sizes"])
    if math.prod(shape) != ins[0].size:
        raise CannotShrink(sizes.changed([*eqn.invars, *eqn.outvars]))
    return [jnp.reshape(ins[0], shape)]


def _broadcast(eqn: Any, ins: list[Any], weights: list[bool], sizes: Sizes) -> list[Any]:
    return [
        lax.broadcast_in_dim(ins[0], sizes.shape(eqn.params["shape"]), eqn.params["broadcast_dimensions"])
    ]


def _blocks(eqn: Any, ins: list[Any], weights: list[bool], sizes: Sizes) -> list[Any]:
    """Blocks of the smaller axis, where the blocks of the whole one are multiples of what a position stands for."""
    starts, limits = list(eqn.params["start_indices"]), list(eqn.params["limit_indices"])
    strides = list(eqn.params["strides"] or [1] * len(starts))
    for k, (n, kept) in enumerate(zip(eqn.invars[0].aval.shape, ins[0].shape, strict=True)):
        if n == kept:
            continue
        ratio = n // kept
        cut = limits[k] - starts[k]
        if cut == n and strides[k] == 1:
            limits[k] = kept
        elif (
            n % kept
            or starts[k] % ratio
            or limits[k] % ratio
            or strides[k] != 1
            or sizes.shape([cut]) != (cut // ratio,)
        ):
            raise CannotShrink([n, cut])
        else:
            starts[k], limits[k] = starts[k] // ratio, limits[k] // ratio
    return [lax.slice(ins[0], starts, limits, strides)]


def _split(eqn: Any, ins: list[Any], weights: list[bool], sizes: Sizes) -> list[Any]:
    pieces, axis = sizes.shape(eqn.params["sizes"]), eqn.params["axis"]
    if sum(pieces) != ins[0].shape[axis]:
        raise CannotShrink([*eqn.params["sizes"], eqn.invars[0].aval.shape[axis]])
    return list(lax.split(ins[0], pieces, axis))


def _concatenate(eqn: Any, ins: list[Any], weights: list[bool], sizes: Sizes) -> list[Any]:
    k = eqn.params["dimension"]
    whole = eqn.outvars[0].aval.shape[k]
    if sizes.shape([whole]) != (sum(x.shape[k] for x in ins),):
        raise CannotShrink([whole, *(v.aval.shape[k] for v in eqn.invars)])
    return _bound(eqn, ins, {})


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


def _random(eqn: Any, ins: list[Any], weights: list[bool], sizes: Sizes) -> list[Any]:
    return _bound(eqn, ins, {"shape": sizes.shape(eqn.params["shape"])})


def _iota(eqn: Any, ins: list[Any], weights: list[bool], sizes: Sizes) -> list[Any]:
    _keep_size([eqn.params["shape"][eqn.params["dimension"]]], sizes)
    return _bound(eqn, ins, {"shape": sizes.shape(eqn.params["shape"])})


def _padded(eqn: Any, ins: list[Any], weights: list[bool], sizes: Sizes) -> list[Any]:
    config = eqn.params["padding_config"]
    _keep_size([n for n, pad in zip(eqn.invars[0].aval.shape, config, strict=True) if any(pad)], sizes)
    return _bound(eqn, ins, {})


def _along_some(eqn: Any, ins: list[Any], weights: list[bool], sizes: Sizes) -> list[Any]:
    """What acts along some axes, alike at every position of the others."""
    shape, p = eqn.invars[0].aval.shape, eqn.params
    own = p.get("axes", p.get("dimensions", [p.get("axis", p.get("dimension", len(shape) - 1))]))
    own = range(len(shape) - len(p["fft_lengths"]), len(shape)) if "fft_lengths" in p else own
    _keep_size([shape[k] for k in own], sizes)
    return _bound(eqn, ins, {})


def _plain(eqn: Any, ins: list[Any], weights: list[bool], sizes: Sizes) -> list[Any]:
    """What says nothing of sizes."""
    return _bound(eqn, ins, {})


_RULES: dict[str, Callable[[Any, list[Any], list[bool], Sizes], list[Any]]] = {
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "slice": _blocks,
    "split": _split,
    "concatenate": _concatenate,
    "reduce_sum": _summed,
    "dot_general": _matrix_product,
    "conv_general_dilated": _convolution,
    "random_bits": _random,
    "iota": _iota,
    "pad": _padded,
    "transpose": _plain,
    "squeeze": _plain,
}
_RULES.update(
    dict.fromkeys(("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"), _along_some)
)
_RULES.update(dict.fromkeys(("argmax", "argmin", "sort", "top_k", "rev", "fft"), _along_some))
_RULES.update(dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along_some))


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
