"""Plans relative to a base model: laws, learning rates and requirements on the program, from multipliers of each parameter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from varscale.initializers.initializer import Initializer
from varscale.schemes.declared_moments import Moments, measured, moments
from varscale.schemes.description import pieces
from varscale.schemes.embedding_factors import (
    SAME,
    is_kernel,
    of_embeddings,
    of_layer,
    own_factors,
    product,
    reads_embeddings,
    rounded,
    use_as_readout,
)
from varscale.schemes.growth import Grown, GrownLeaf, grown
from varscale.schemes.laws import Declared
from varscale.schemes.parametrization import Growth, Scaling
from varscale.schemes.plan import Plan, PlannedLeaf, Requirement
from varscale.schemes.scheme import declared_laws, spread
from varscale.schemes.structure import packed_kernels, part_names
from varscale.usage.parameters import Attention
from varscale.usage.table import Uses

Multipliers = Literal["weights", "program"]
ATTENTION, READOUT = "attention scale", "readout multiplier"  # names of requirements


@dataclasses.dataclass(frozen=True)
class Relative:
    """A scheme relative to a base: call it with a model and its input to get a `Plan`.

    Attributes:
        call: how it was made, in words.
        base: the base model, or what tells its shapes.
        scaling: the multipliers of a parameter, given the comparison of the two models.
        form: whether multipliers of the program are part of the weights ("weights") or are required in the program; a function
            of the comparison.
        laws: a scheme for the base; "declared" for the model's own laws.
        attention: whether scores are to be divided by the head's size.
        of_depth: whether it is about depth too.
        notes: what holds for every plan of it.
    """

    call: str
    base: Any = dataclasses.field(repr=False)
    scaling: Callable[[GrownLeaf, Grown], Scaling] = dataclasses.field(repr=False)
    form: Callable[[Grown], Multipliers] = dataclasses.field(repr=False)
    laws: Any = dataclasses.field(repr=False)
    attention: bool
    of_depth: bool = False
    notes: tuple[str, ...] = ()

    def __call__(self, model: Any, x: Any, *, params: Any = None, method: str | None = None) -> Plan:
        """The law and the multipliers of every parameter of a model under this scheme.

        Args:
            model: a linen module, an nnx factory `lambda rngs: Net(..., rngs=rngs)`, or a plain function f(params, *args).
            x: one input (array, `jax.ShapeDtypeStruct`, or a pytree of them), or `vs.inputs(...)`; the base takes it too.
            params: the parameters of a plain function, as arrays or abstract arrays.
            method: the method to trace in place of `__call__`.

        Raises:
            TypeError: `model` or `base` is of no known kind.
            ValueError: the base is no narrower model of the same kind, a tied parameter has no form without a multiplier in the
                program, or the law of a parameter cannot be read.
        """
        return self._plan(model, x, params, method, needs_growth=True)

    def at_any_width(self, model: Any, x: Any, *, params: Any = None, method: str | None = None) -> Plan:
        """The same, of a model that may be the base itself too: all its multipliers are 1."""
        return self._plan(model, x, params, method, needs_growth=False)

    def _plan(self, model: Any, x: Any, params: Any, method: str | None, *, needs_growth: bool) -> Plan:
        name = self.call.partition("(")[0]
        both = grown(model, x, self.base, scheme=name, params=params, method=method)
        if needs_growth and not both.grows and not (self.of_depth and both.depth > 1):
            raise ValueError(
                f"{name}: base must be narrower than the model{' or less deep' * self.of_depth}, and it has the same shapes: "
                f"where a sweep has the base itself too, use {name}(...).at_any_width(model, x)"
            )
        form = self.form(both)
        scalings = {leaf.path: self.scaling(leaf, both) for leaf in both.leaves}
        requirements = [*of_embeddings(both, scalings), *_of_outputs(both, scalings, form, name)]
        if self.attention:
            requirements += _of_scores(both, scalings, form)
        laws = _Laws(self.laws, both, model, x, params, method)
        leaves = tuple(laws.planned(leaf, scalings[leaf.path], name) for leaf in both.leaves)
        return Plan(self.call, leaves, tuple(requirements), (*self.notes, *laws.notes))


def _output(leaf: GrownLeaf, both: Grown) -> tuple[float, float]:
    """What a parameter's output is multiplied with, in the model and in the base; NaN where the trace does not tell."""
    kernel = leaf if is_kernel(leaf) else next((k for k in of_layer(leaf, both) if is_kernel(k)), leaf)
    mine, base = (use and (use.input_scale, *own_factors(use)) for use in use_as_readout(kernel, both))
    if mine and reads_embeddings(kernel, both):
        mine, base = mine[1:], base and base[1:]
    return product(mine or ()), product(base or ())


def _of_outputs(both: Grown, scalings: dict[str, Scaling], form: Multipliers, name: str) -> Iterator[Requirement]:
    """Multipliers of outputs: each is checked in the program, and moved into the weights where that is the form.

    Raises:
        ValueError: a tied parameter needs one in the program, and the form is "weights".
    """
    for leaf in both.leaves:
        scaling = scalings[leaf.path]
        needed = scaling.multiplier
        if leaf.conflict is not None:
            if form == "weights":
                raise ValueError(
                    f"{name}: {leaf.path!r} is tied: it is looked up and is the readout too, which have different laws where "
                    "the program has no multiplier; use the form that has (mup: leave `table` out or give 8; completep: "
                    f"multipliers='program') and divide the readout's output by {leaf.conflict.fan_in:.6g}, or untie them"
                )
            needed = 1 / leaf.conflict.fan_in
        if needed == 1:
            continue
        found, of_base = _output(leaf, both)
        told = not math.isnan(found / of_base)
        expected, found = (needed * of_base, found) if told else (needed, 1.0)
        is_readout = leaf.conflict is not None or leaf.growth.position == "readout"
        present = told and math.isclose(found, expected, rel_tol=SAME)
        if form == "weights":
            left = 1.0 if present else rounded(expected / found)
            scalings[leaf.path] = dataclasses.replace(scaling, multiplier=left).folded()
        if is_kernel(leaf):
            what = READOUT if is_readout else "residual multiplier"
            status = "present" if present else "folded" if form == "weights" else "missing" if told else "unknown"
            mend = f"multiply the output of {leaf.path!r} by {expected / found:.6g}"
            yield Requirement(what, leaf.path, expected, found if told else None, status, mend)


def _of_scores(both: Grown, scalings: dict[str, Scaling], form: Multipliers) -> Iterator[Requirement]:
    """Scores are divided by the head's size: c/√d in the base is c·√d_base/d in the model."""
    leaves = {leaf.path: leaf for leaf in both.leaves}
    for number, mine in enumerate(both.uses.attentions):
        queries = [leaves[path] for path in mine.query if is_kernel(leaves[path])]
        base = _base_attention(mine, number, queries, both)
        if base is None or (mine.terms == base.terms and mine.scale == base.scale):
            continue
        where = queries[0].path if queries else f"attention {number}"
        if mine.scale is None or base.scale is None:
            yield Requirement(ATTENTION, where, base.terms / mine.terms, None, "unknown")
            continue
        expected = base.scale * base.terms / mine.terms
        present = math.isclose(mine.scale, expected, rel_tol=SAME)
        folds = form == "weights" and not present and len(queries) == 1
        if folds:
            moved = _in_weights(rounded(expected / mine.scale), queries[0], mine, both)
            for path, factor in moved.items():
                left = dataclasses.replace(scalings[path], multiplier=scalings[path].multiplier * factor)
                scalings[path] = left.folded()
            folds = bool(moved)
        mend = f"scale the products of queries and keys by {expected:.6g}, which is {base.scale * base.terms:.6g} / d_head"
        status = "present" if present else "folded" if folds else "missing"
        yield Requirement(ATTENTION, where, expected, mine.scale, status, mend)


def _in_weights(factor: float, queries: GrownLeaf, attention: Attention, both: Grown) -> dict[str, float]:
    """What parameters' outputs are multiplied by, so that scores are multiplied by a factor; empty where weights cannot do it.

    A kernel of queries alone is multiplied by it. One of queries, keys and values is multiplied by its root, which the kernel
    that reads the values undoes, so that each has one learning rate.
    """
    made = frozenset().union(*part_names(queries.uses))
    if queries.uses.main is None or queries.uses.main.normalised_after:
        return {}
    if made == {"query"}:
        return dict.fromkeys((leaf.path for leaf in of_layer(queries, both)), factor)
    if made == {"query", "key", "value"} and attention.output:
        root = math.sqrt(factor)
        return {**dict.fromkeys((leaf.path for leaf in of_layer(queries, both)), root), attention.output: 1 / root}
    return {}


def _base_attention(mine: Attention, number: int, queries: Sequence[GrownLeaf], both: Grown) -> Attention | None:
    """The base's attention that one of the model is compared with; None where there is none."""
    if both.base_uses is not None:
        known = both.base_uses.attentions
        alike = [a for a in known if any(leaf.base in a.query for leaf in queries)]
        return alike[0] if alike else known[min(number, len(known) - 1)] if known else None
    if not queries:
        return None
    # Of a base that is told by shapes alone: heads are cut out of the query's last axis, their number stays.
    leaf = queries[0]
    terms = max(1, round(mine.terms * leaf.base_shape[-1] / leaf.uses.shape[-1]))
    return dataclasses.replace(mine, terms=terms, scale=1 / math.sqrt(terms))


class _Laws:
    """Laws of the model, from those of the base."""

    def __init__(self, laws: Any, both: Grown, model: Any, x: Any, params: Any, method: str | None):
        self.mine = _read(laws, both.uses, model, x, params, method)
        self.base = None if both.base_uses is None else _read(laws, both.base_uses, both.base, x, None, method)
        self.notes: tuple[str, ...] = ()
        if self.base is None:
            self.notes = (
                "The base is told by its shapes alone: its laws are taken to be the model's own, of variance 1 / fan-in for "
                "kernels and the same at every width for the rest.",
            )

    def planned(self, leaf: GrownLeaf, scaling: Scaling, name: str) -> PlannedLeaf:
        """The parameter's law and multipliers."""
        law, why = self._law(leaf, scaling, name)
        use = leaf.uses.main
        fans = (1.0, 1.0) if use is None else (use.fan_in, use.fan_out / len(packed_kernels(leaf.uses)))
        made = PlannedLeaf(leaf.path, leaf.uses.shape, leaf.uses.role, *fans, law, why)
        # Muon brings a scale of its own.
        return made.with_multipliers(**named(dataclasses.replace(scaling, muon=scaling.muon / leaf.muon)))

    def _law(self, leaf: GrownLeaf, scaling: Scaling, name: str) -> tuple[Initializer, str]:
        law, known = self.mine.get(leaf.path, (Declared(), None))
        position = leaf.growth.position if leaf.conflict is None else "tied"
        if known is None:
            if scaling.std == 1 and leaf.growth == Growth():
                return law, "as declared: nothing grows"
            raise ValueError(
                f"{name}: the law of {leaf.path!r} cannot be read from the model's init; give laws=, a scheme for the base, "
                "such as vs.schemes.fan_in()"
            )
        before = self._of_base(leaf, known)
        std = before * scaling.std
        told = f"{position}: the base's std {before:.4g}" + ("" if scaling.std == 1 else f" × {scaling.std:.4g}")
        if math.isclose(std, known.std, rel_tol=1e-6) and (known.mean or known.std == 0 or not known.distribution):
            return law, told
        if known.mean and not known.distribution and scaling.std == 1:
            return law, f"{position}: as declared, numbers with a mean, such as a table of sines and cosines"
        if known.mean:
            raise ValueError(
                f"{name}: {leaf.path!r} has mean {known.mean:.4g} and a standard deviation that depends on the width; give its "
                "law by laws="
            )
        return spread(known.distribution or "normal", std), told  # pyright: ignore[reportArgumentType]

    def _of_base(self, leaf: GrownLeaf, known: Moments) -> float:
        """The standard deviation in the base."""
        if self.base is None:
            return known.std * math.sqrt(leaf.growth.fan_in)
        found = self.base.get(leaf.base, (None, None))[1]
        return known.std if found is None else found.std


def named(scaling: Scaling) -> dict[str, float]:
    """The multipliers by the names that a plan has for them; those that are 1 are left out."""
    values = {
        "adam_learning_rate": scaling.adam, "sgd_learning_rate": scaling.sgd, "muon_learning_rate": scaling.muon,
        "adam_epsilon": scaling.epsilon, "program": scaling.multiplier,
    }  # fmt: skip
    return {name: value for name, value in values.items() if value != 1}


def _read(
    laws: Any, found: Uses, model: Any, x: Any, params: Any, method: str | None
) -> dict[str, tuple[Initializer, Moments | None]]:
    """The law of each parameter of a model, as an initializer and in numbers."""
    if isinstance(laws, str):
        constants = declared_laws(model, x, method)
        chosen = {p.path: constants.get(p.path, Declared()) for p in found}
    else:
        chosen = {leaf.path: leaf.law for leaf in laws(model, x, params=params, method=method)}
    left = [path for path, law in chosen.items() if isinstance(law, Declared)]
    own = moments(model, x, method) if left else {}
    if any(path not in own for path in left):
        own = {**measured(model, x, params, method), **own}
    return {p.path: _numbers(chosen[p.path], p.shape, own.get(p.path)) for p in found}


def _numbers(law: Any, shape: tuple[int, ...], own: Moments | None) -> tuple[Any, Moments | None]:
    """A law and its numbers: those of the declared law where it is left to the model."""
    if isinstance(law, Declared):
        return law, own
    parts = pieces(law, shape)
    stds = {float(s) for part in parts if part.std is not None for s in part.std.ravel()}
    means = {float(m.real) for part in parts for m in part.mean.ravel()}
    if len(stds) != 1 or len(means) != 1 or any(part.std is None for part in parts):
        return law, None
    names = {part.distribution for part in parts}
    name = names.pop() if len(names) == 1 else ""
    known = name in ("normal", "truncated_normal", "uniform", "rademacher")
    return law, Moments(means.pop(), stds.pop(), name if known else "")


def checked_laws(laws: Any, scheme: str) -> Any:
    """The argument `laws`.

    Raises:
        TypeError: it is neither "declared" nor a scheme.
    """
    if laws == "declared" or (callable(laws) and hasattr(laws, "call")):
        return laws
    raise TypeError(f"{scheme}: laws must be 'declared' or a scheme such as vs.schemes.fan_in(), not {laws!r}")


def in_words(base: Any) -> str:
    """The base, in a few words."""
    if isinstance(base, Mapping):
        return str(dict(base)) if len(base) <= 3 else f"{len(base)} shapes"
    name = getattr(base, "__name__", type(base).__name__)
    return "factory" if name in ("<lambda>", "partial") else name
