"""What a region computes: at its own sizes or at smaller ones, compiled once for all regions that compute the same.

What a layer does to the moments of its input depends on its width only through the terms of its sums. So a loop that is far
too large to be run is run on some of its units: a product with independent zero-mean weights over n' of n terms is multiplied
by √(n/n'), which keeps its variance, and backward likewise, with the terms that flow back. Means are taken over the units
there are. Of any other sum it is not known whether its terms add up or cancel, so its axis keeps its size.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from varscale import _compat
from varscale.programs.pieces import environment, is_key, read
from varscale.theory.rules.registry import CALLS, ELEMENTWISE_OR_LAYOUT, sub_jaxpr_of

_ROUNDED = 2.0**-8  # how far a count may be off in bfloat16, and the n − 1 of a variance
_REARRANGES = {"transpose", "reshape", "squeeze", "slice", "split", "convert_element_type"}
_REARRANGES |= {"copy", "stop_gradient", "neg", "name"}
# Parameters that name axes whose positions are told apart.
_AXES = ("axes", "dimensions", "axis", "dimension")


class CannotShrink(Exception):
    """A primitive that depends on how many positions there are; its argument is the sizes that have to stay."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Which sizes of axes become which smaller ones; an axis of any other size stays as it is."""

    smaller: Mapping[int, int]

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.smaller.get(n, n) for n in shape)

    def ratio(self, sizes: Sequence[int]) -> float:
        """How many positions each one that is left stands for."""
        return math.prod(n / self.smaller.get(n, n) for n in sizes)

    def keep(self, sizes: Iterable[int]) -> None:
        """Raise CannotShrink where one of them shrinks."""
        if changed := {n for n in sizes if n in self.smaller}:
            raise CannotShrink(changed)


@dataclasses.dataclass(frozen=True)
class Program:
    """What a region computes; equal where the same equations do it at the same sizes: equal layers are compiled once."""

    jaxpr: Any = dataclasses.field(compare=False)  # its equations, closed
    sizes: Sizes = dataclasses.field(hash=False)  # at which sizes they are run
    written: str  # the equations, and the numbers in them
    weights: tuple[bool, ...]  # which operands are independent zero-mean weights
    floating: tuple[int, ...]  # which operands cotangents are asked of
    short: bool = dataclasses.field(compare=False)  # whether it takes less time to run it than to compile it
    apart: bool  # whether samples have kernels of their own: gradients of many together take XLA minutes

    def run(self, operands: Sequence[Any]) -> list[jax.Array]:
        """Every output of one run at the smaller sizes, the parts of complex ones in succession; of keys nothing is told."""
        out = list[jax.Array]()
        for x in run(self.jaxpr.jaxpr, self.jaxpr.consts, operands, self.weights, self.sizes):
            out += [jnp.zeros(())] if is_key(x) else [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
        return out

    def back(self, operands: Sequence[Any], seeds: Sequence[jax.Array]) -> Any:
        """Cotangents of the floating operands, given those of all outputs that are real numbers."""

        def f(*xs: jax.Array) -> list[jax.Array]:
            given = dict(enumerate(operands)) | dict(zip(self.floating, xs, strict=True))
            return [x for x in self.run(list(given.values())) if jnp.issubdtype(x.dtype, jnp.inexact)]

        out, pull = jax.vjp(f, *[operands[i] for i in self.floating])
        return pull([seed.astype(x.dtype) for seed, x in zip(seeds, out, strict=True)])


def has_own_kernels(met: tuple[Any, int]) -> bool:
    """Whether an equation convolves groups that have several channels each: samples, by kernels of their own."""
    p = met[0].params
    grouped = p.get("feature_group_count", 1) > 1
    return grouped and met[0].invars[1].aval.shape[p["dimension_numbers"].rhs_spec[1]] > 1


@cache
def over_draws(method: Callable[..., Any], *, short: bool, apart: bool) -> Callable[..., Any]:
    """A method of programs over draws of all that it takes; optimizations take longer than they save a short one."""
    over = (lambda f: lambda *xs: lax.map(lambda x: f(*x), xs)) if apart else jax.vmap
    return jax.jit(
        lambda program, *draws: over(partial(method, program))(*draws),
        static_argnums=0,
        compiler_options=_compat.quick_compilation() if short else None,
    )


def run(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], weights: Sequence[bool], sizes: Sizes
) -> list[Any]:
    """Outputs, of constants of their own sizes and smaller inputs, some independent weights; CannotShrink where it cannot."""
    if not sizes.smaller:
        return jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))(*args)
    sizes.keep(n for const in consts for n in jnp.shape(const))
    env = environment(jaxpr, consts, args)
    known = set(itertools.compress(map(id, jaxpr.invars), weights))
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "reduce_sum" and not _is_averaged(eqn, jaxpr):
            sizes.keep(_summed_sizes(eqn))
        ins = read(env, eqn.invars)
        own = [id(v) in known for v in eqn.invars]
        try:
            out = _equation(eqn, ins, own, sizes)
        except (TypeError, ValueError):  # shapes that do not fit
            out = []
        if [jnp.shape(x) for x in out] != [sizes.shape(v.aval.shape) for v in eqn.outvars]:
            sizes.keep(_all_sizes(eqn))
        env.update(zip(eqn.outvars, out, strict=True))
        if any(own) and _keeps_law(eqn, own):
            known.update(map(id, eqn.outvars))
    return read(env, jaxpr.outvars)


def shrunk(jaxpr: ClosedJaxpr, weights: Sequence[bool], sizes: Sizes) -> ClosedJaxpr:
    """Equations at smaller sizes, as `run` has them."""
    smaller = [jax.ShapeDtypeStruct(sizes.shape(x.shape), x.dtype) for x in jaxpr.in_avals]
    f = partial(run, jaxpr.jaxpr, jaxpr.consts, weights=weights, sizes=sizes)
    return jax.make_jaxpr(f)(smaller)


def _all_sizes(eqn: Any) -> list[int]:
    return [n for v in (*eqn.invars, *eqn.outvars) for n in v.aval.shape]


def _summed_sizes(eqn: Any) -> list[int]:
    return [eqn.invars[0].aval.shape[k] for k in eqn.params["axes"]]


def _is_averaged(eqn: Any, jaxpr: Any) -> bool:
    """Whether a sum is only ever divided by how many terms it has."""
    (total,) = eqn.outvars
    return total not in jaxpr.outvars and all(
        use.primitive.name == "div"
        and use.invars[0] is total
        and _compat.is_literal(use.invars[1])
        and math.isclose(float(use.invars[1].val), math.prod(_summed_sizes(eqn)), rel_tol=_ROUNDED)
        for use in jaxpr.eqns
        if total in use.invars
    )


def _keeps_law(eqn: Any, weights: Sequence[bool]) -> bool:
    """Whether what was independent weights still is: rearranged, multiplied by a number, or several of them joined."""
    others = [v for v, weight in zip(eqn.invars, weights, strict=True) if not weight]
    name = eqn.primitive.name
    if name in ("concatenate", "complex", "add", "sub"):
        return not others and len(set(eqn.invars)) == len(eqn.invars)
    return name in _REARRANGES or (name in ("mul", "div") and all(v.aval.ndim == 0 for v in others))


def _equation(eqn: Any, ins: list[Any], weights: list[bool], sizes: Sizes) -> list[Any]:
    """Its outputs, of the sizes that the primitive gives them."""
    name, p, inner = eqn.primitive.name, dict(eqn.params), sub_jaxpr_of(eqn)
    if name in CALLS and inner is not None:
        return run(*_compat.sub_jaxpr(inner), ins, weights, sizes)
    if name == "scan":
        sizes.keep([p["length"]])
        return eqn.primitive.bind(*ins, **{**p, "jaxpr": shrunk(p["jaxpr"], weights, sizes)})
    if sizes.smaller.keys().isdisjoint(_all_sizes(eqn)):
        return list(_compat.evaluated(eqn, ins))
    sizes.keep(_all_sizes(eqn) if inner is not None else _where_positions_matter(eqn, sizes))
    p |= {k: sizes.shape(p[k]) for k in ("shape", "new_sizes", "sizes") if k in p}
    if name == "slice":
        shapes = eqn.invars[0].aval.shape, ins[0].shape
        for k in ("start_indices", "limit_indices"):
            p[k] = tuple(i * m // n for i, n, m in zip(p[k], *shapes, strict=True))
    out = eqn.primitive.bind(*ins, **p)
    if name in ("dot_general", "conv_general_dilated"):
        return [_of_all_terms(eqn, out, weights, sizes)]
    if name == "reduce_sum":
        return [out * jnp.asarray(sizes.ratio(_summed_sizes(eqn)), out.dtype)]
    return list(out) if eqn.primitive.multiple_results else [out]


def _where_positions_matter(eqn: Any, sizes: Sizes) -> Sequence[int]:
    """Sizes of the axes whose positions are told apart, or counted, or cut elsewhere than between what positions stand for."""
    name, p = eqn.primitive.name, eqn.params
    shape = p["shape"] if name == "iota" else eqn.invars[0].aval.shape
    if name == "pad":
        return [n for n, padding in zip(shape, p["padding_config"], strict=True) if any(padding)]
    if name == "slice":
        cuts = zip(shape, p["start_indices"], p["limit_indices"], strict=True)
        return [n for n, *ends in cuts if any(end % sizes.ratio([n]) for end in ends)]
    if name == "fft":
        return shape[len(shape) - len(p["fft_lengths"]) :]
    if name == "conv_general_dilated":
        spec, kernel = p["dimension_numbers"], eqn.invars[1].aval.shape
        apart = [*(shape[k] for k in spec.lhs_spec[2:]), *(kernel[k] for k in spec.rhs_spec[2:])]
        single = p["feature_group_count"] * p["batch_group_count"] == 1
        return apart if single else [*apart, *kernel, shape[spec.lhs_spec[1]]]
    if name in {"concatenate", "dot_general", "reduce_sum", *ELEMENTWISE_OR_LAYOUT} - {"iota", "rev"}:
        return []
    named = [p[k] for k in _AXES if k in p]
    return [shape[k] for k in np.atleast_1d(*named)] if named else _all_sizes(eqn)


def _of_all_terms(eqn: Any, out: jax.Array, weights: list[bool], sizes: Sizes) -> jax.Array:
    """A product; where one operand is weights, each term, and each one that flows back, stands for so many."""
    shapes, (summed, others) = [v.aval.shape for v in eqn.invars], eqn.params["dimension_numbers"][:2]
    if eqn.primitive.name == "conv_general_dilated":
        x, w, _ = eqn.params["dimension_numbers"]
        summed, others = (x[1:2], w[1:2]), (x[2:], w[2:])
    terms = [shapes[0][k] for k in summed[0]]
    if sum(weights) != 1:
        sizes.keep(terms)
        return out
    which = weights.index(True)
    free = [n for k, n in enumerate(shapes[which]) if k not in (*summed[which], *others[which])]
    ahead, back = (jnp.asarray(math.sqrt(sizes.ratio(own)), out.dtype) for own in (terms, free))
    return back * out + lax.stop_gradient((ahead - back) * out)


def work(jaxpr: Any, sizes: Sizes) -> tuple[float, float]:
    """Multiplications in one run at these sizes, roughly, and numbers in all its arrays."""
    total = held = 0.0
    for eqn, times in every_equation(jaxpr):
        terms = 1.0
        if eqn.primitive.name == "dot_general":
            summed = eqn.params["dimension_numbers"][0][0]
            terms = math.prod(sizes.shape([eqn.invars[0].aval.shape[k] for k in summed]))
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = sizes.shape(eqn.invars[1].aval.shape)
            terms = math.prod(kernel) / kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        made = times * sum(math.prod(sizes.shape(v.aval.shape)) for v in eqn.outvars)
        total, held = total + terms * made, held + made
    return total, held


def every_equation(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """The equations of a jaxpr and of the calls and loops in it, each with how often it is run."""
    for eqn in jaxpr.eqns:
        if (inner := sub_jaxpr_of(eqn)) is None:
            yield eqn, times
        else:
            yield from every_equation(_compat.sub_jaxpr(inner)[0], times * eqn.params.get("length", 1))
