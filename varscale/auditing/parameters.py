"""`vs.audit_parameters`: what the numbers of a tree or a checkpoint tell, with no model."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy import stats

from varscale.auditing import leaves
from varscale.auditing.files import read
from varscale.auditing.findings import Audit, Finding, ordered, silenced
from varscale.auditing.leaves import Summary, summary
from varscale.initializers.distributions import DISTRIBUTIONS
from varscale.programs.patterns import first_match, idle
from varscale.programs.trees import is_abstract, open_tree
from varscale.report import Weight
from varscale.testing.tails import log_mean_square
from varscale.theory import predict

_BEYOND = 1.05  # times a law's bound is beyond it: rounding, and laws cut near ±2 deviations, stay below
CHANCE = 5e-7  # of taking any leaf of all that have their laws for one that has not


def audit_parameters(params_or_file: Any, declared: Mapping[str, Any] | None = None, *, ignore: Sequence[str] = ()) -> Audit:
    """Audit the numbers of parameters, of a tree or of a checkpoint; no model is needed.

    It finds NaN and infinities, constant and repeated kernels, leaves drawn from one key (equal, proportional or monotone in
    the same random numbers), draws made in low precision, leaves without the law that `declared` gives them; and it names
    the usual laws that the others have. Leaves are read one at a time.

    Args:
        params_or_file: a tree of arrays, an nnx module or state, or the path of a checkpoint: what
            `vs.transfer.load` reads (NaN included), a .npz or a .msgpack of flax.
        declared: glob over paths to a standard deviation or an initializer: the law that a leaf should have.
        ignore: codes ("VS113"), or codes with a glob ("VS113:lm_head/*"), whose findings are left out.

    Returns:
        The audit. The chance that any leaf which has its declared law is found not to have it is at most 5e-7.

    Raises:
        TypeError: a leaf is no array, or a declared law neither a number nor an initializer.
        ValueError: a declared pattern catches no leaf, or a leaf has a shape but no numbers.

    >>> import jax, varscale as vs
    >>> w = jax.random.normal(jax.random.key(0), (64, 64))
    >>> print(vs.audit_parameters({"embedding": w, "head": {"kernel": w / 8}}).findings[0])
    VS113 error at head/kernel [0.125]: its numbers are 0.125 times those of 'embedding': both were drawn from one key (or are \
one weight stored twice). A readout that repeats its embedding gives each input token a logit of its own.
    """
    tree = read(params_or_file) if isinstance(params_or_file, str | os.PathLike) else params_or_file
    opened = [leaf for leaf in open_tree(tree, "params_or_file").leaves if leaf.is_weight]
    for leaf in opened:
        if is_abstract(leaf.value):
            raise ValueError(f"params_or_file: {leaf.path!r} is a jax.ShapeDtypeStruct: it has a shape but no numbers")
    summaries = [summary(leaf.path, leaf.value) for leaf in opened if _is_inexact(leaf.dtype) and math.prod(leaf.shape)]
    laws = declared_laws(declared or {}, summaries)
    found = [
        *checked(summaries),
        *check_laws(summaries, laws),
        *leaves.check_usual([s for s in summaries if s.path not in laws]),
    ]
    left = silenced(found, ignore)
    notes = () if summaries else ("There is no floating-point parameter to audit.",)
    return Audit(ordered(left.kept), None, notes + left.notes, left.count)


def checked(summaries: Sequence[Summary]) -> Iterator[Finding]:
    """The findings about numbers alone."""
    for check in (leaves.check_finite, leaves.check_constants, leaves.check_streams, leaves.check_precision):
        yield from check(summaries)


def declared_laws(declared: Mapping[str, Any], summaries: Sequence[Summary]) -> dict[str, Law]:
    """The declared law of each leaf that has one; the first pattern that catches it counts."""
    paths = [leaf.path for leaf in summaries]
    if unused := idle(list(declared), paths):
        raise ValueError(f"declared: {unused[0]!r} catches no leaf; there are {', '.join(paths[:6])}")
    caught = {leaf.path: first_match(declared.items(), leaf.path) for leaf in summaries}
    return {leaf.path: law_of(found[1], leaf) for leaf in summaries if (found := caught[leaf.path]) is not None}


def check_laws(summaries: Sequence[Summary], laws: Mapping[str, Law]) -> Iterator[Finding]:
    """Leaves whose mean square is not that of their law, by an exact tail or a proven bound on it: 5e-7 for all together."""
    limit = math.log(CHANCE / max(1, len(laws)))
    for leaf in summaries:
        law = laws.get(leaf.path)
        if law is None or leaf.nonfinite:
            continue
        ratio = leaf.second_moment / law.second_moment if law.second_moment else math.inf if leaf.second_moment else 1.0
        log_p = law.log_p(ratio, leaf)
        if log_p < limit:
            told = f"its law, {law.name}, has a root mean square of {law.second_moment**0.5:.4g}; its numbers have "
            told += f"{leaf.second_moment**0.5:.4g} ({_power(log_p)}): the law did not apply, or something changed them."
            mend = f'vs.reinitialize(params, {{"{leaf.path}": {law.written}}}, key)'
            yield Finding("VS112", "error", leaf.path, told, ratio, mend)
        elif (largest := max(-leaf.smallest, leaf.largest)) > _BEYOND * law.bound:
            told = f"its law, {law.name}, has no number beyond ±{law.bound:.4g}, and {largest:.4g} is among its {leaf.size}: "
            told += "it was not cut there. jax.random.truncated_normal cuts at bounds in standard deviations, before scaling."
            mend = f'vs.reinitialize(params, {{"{leaf.path}": {law.written}}}, key)'
            yield Finding("VS112", "error", leaf.path, told, largest / law.bound, mend)


@dataclasses.dataclass(frozen=True)
class Law:
    """The law of a leaf.

    Attributes:
        name: what to call it.
        second_moment: E[w²].
        distribution: its name among varscale's distributions; None for another.
        bound: the largest magnitude that it gives; infinite where there is none.
    """

    name: str
    second_moment: float
    distribution: str | None
    bound: float = math.inf

    @property
    def written(self) -> str:
        """The initializer that draws it, as it is written; the init itself where no name says it."""
        if self.distribution is None:
            return "the law's own init"
        if self.distribution == "uniform":
            return f"vs.symmetric_uniform({self.bound:.4g})"
        return f"vs.{self.distribution}({self.second_moment**0.5:.4g})"

    def log_p(self, ratio: float, leaf: Summary) -> float:
        """ln of a bound on the chance of a mean square this far off.

        Of a named distribution exact, or Chernoff's bound. Of another one the normal tail of √n ln R/√(κ̂ − 1), which holds
        only far enough out to be a judgement: it is taken at the power 1/2, and not at all below 2000 numbers.
        """
        if ratio in (0, math.inf) or ratio == 1:
            return 0.0 if ratio == 1 else -math.inf
        if self.distribution is not None:
            return math.log(2) + min(log_mean_square(DISTRIBUTIONS[self.distribution], ratio, leaf.size))
        if leaf.size < 2000 or not leaf.kurtosis > 1:
            return 0.0
        score = math.sqrt(leaf.size / (leaf.kurtosis - 1)) * abs(math.log(ratio))
        return 0.5 * (math.log(2) + float(stats.norm.logsf(score)))


def law_of(declared: Any, leaf: Summary) -> Law:
    """The law that a standard deviation or an initializer gives a leaf.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(declared, int | float) and not isinstance(declared, bool):
        return Law(f"normal(std={declared:.4g})", float(declared) ** 2, "normal")
    if not callable(declared):
        raise TypeError(f"declared[{leaf.path!r}] must be a standard deviation or an initializer, not {declared!r}")

    def drawn(key: Any) -> Any:
        return declared(key, leaf.shape, np.float32)

    report = predict(lambda w, x: x * w, jax.ShapeDtypeStruct(leaf.shape, np.float32), params=drawn, backward=False)
    return of_weight(next(iter(report.weights.values()), None), report.output.second_moment)


def of_weight(weight: Weight | None, second_moment: float) -> Law:
    """The law that a prediction read from an initializer; a constant has none."""
    if weight is None or weight.law is None:
        return Law("constant", second_moment, None)
    variance, mean = weight.variance or 0.0, weight.mean or 0.0
    name = _NAMED.get(weight.law.partition("(")[0])
    bound = math.inf if name is None else DISTRIBUTIONS[name].bound * math.sqrt(variance) + abs(mean)
    return Law(weight.law, variance + mean**2, name, bound)


_NAMED = {"normal": "normal", "truncated normal": "truncated_normal", "uniform": "uniform"}


def _power(log_p: float) -> str:
    return f"p < 1e{math.ceil(log_p / math.log(10))}" if math.isfinite(log_p) else "impossible under it"


def _is_inexact(dtype: Any) -> bool:
    return np.dtype(dtype).kind in "fcV"
