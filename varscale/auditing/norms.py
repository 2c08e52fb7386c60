"""Findings about what stands between the maps: norms whose epsilon counts, softmaxes, and the logits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from varscale.auditing.findings import Finding
from varscale.report import Report, Row
from varscale.usage.parameters import Attention, ParameterUses
from varscale.usage.table import Uses

_LARGEST_EPSILON = 0.1  # what is added to a variance and is larger is no guard against division by zero
_COLLAPSED = 3.0  # deviation of scores from which on one key has most of the weight
_DROWNED, _LOST = 100.0, 1e4  # ratio of variances: of a stream's amplitude its start is then a tenth, a hundredth
_UNIFORM = 1e-2  # and below which weights differ by a hundredth


def check_epsilon(rows: Sequence[Row], epsilons: Mapping[str, float]) -> Iterator[Finding]:
    """Norms whose epsilon is larger than the variance that it is added to.

    Args:
        rows: those of equations, in execution order: a root of v + ε tells its harmonic mean.
        epsilons: by the path of a norm, the constant under its root.
    """
    for row in rows:
        epsilon = epsilons.get(parent(row.path), 0.0)
        if row.kind not in ("rsqrt", "sqrt") or row.error_bound > 0.5 or not 0 < row.second_moment < math.inf or not epsilon:
            continue
        shifted = 1 / row.second_moment if row.kind == "rsqrt" else row.second_moment
        variance = shifted - epsilon
        if not 1e-6 * epsilon < variance < epsilon < _LARGEST_EPSILON:
            continue  # of what is constant, such as a zero projection's output, nothing is lost
        left = variance / shifted
        told = f"it normalises a variance of {variance:.3g} with an epsilon of {epsilon:.3g}, which dominates: its output has "
        told += f"root mean square {math.sqrt(left):.3g} in place of 1."
        larger = 10 * math.sqrt(epsilon / variance)
        yield Finding(
            "VS111", "warning", parent(row.path), told, left,
            f"scale what it reads by {larger:.2g} or more, or give it an epsilon below {variance / 10:.2g}",
        )  # fmt: skip


def check_drowned(rows: Sequence[Row], uses: Uses) -> Iterator[Finding]:
    """Streams that the first branches make many times larger: what they began with is lost in what is added.

    Norms before branches tell a stream's second moment: by the number of additions before each, where there is one stream.

    Args:
        rows: those of equations, in execution order.
        uses: whose scales of norms say how many additions come before each.
    """
    if len({branch.stream for branch in uses.branches}) != 1:
        return
    depths = {parent(p.path): p.main.depth for p in uses if p.role == "norm scale" and p.main}
    seen: dict[int, tuple[float, str]] = {}
    for row in rows:
        path = parent(row.path)
        depth = depths.get(path)
        if row.kind != "rsqrt" or depth is None or row.error_bound > 0.5 or not 0 < row.second_moment < math.inf:
            continue
        seen.setdefault(depth, (1 / row.second_moment - uses.epsilons.get(path, 0.0), path))
    if 0 not in seen or 1 not in seen or not seen[0][0] > 0:
        return
    depth = 1 if seen[1][0] > _DROWNED * seen[0][0] else min(2, max(seen))
    now, path = seen.get(depth, (0.0, ""))
    ratio, adds_up = now / seen[0][0], seen[max(seen)][0] > 1.3 * now  # behind norms on the stream itself nothing adds up
    if ratio > _DROWNED and adds_up:
        told = f"the stream's variance is {seen[0][0]:.3g} at its start and {now:.3g} here, behind its "
        told += f"{'first' if depth == 1 else 'second'} addition: what it began with is {1 / ratio:.1g} of it, and the first "
        told += "branches are as good as not residual."
        mend = f"begin the stream larger, or end the first branches smaller: each by up to {math.sqrt(ratio):.3g}"
        yield Finding("VS107", "warning" if ratio > _LOST else "info", path, told, ratio, mend)


def check_softmax(rows: Sequence[Row], attentions: Sequence[Attention]) -> Iterator[Finding]:
    """Softmaxes of scores so large that one key gets most of the weight, or so small that all get the same.

    Args:
        rows: those of equations, in execution order.
        attentions: the softmaxes over products of queries and keys.
    """
    by_row = {attention.row: attention for attention in attentions}
    for row in rows:
        attention = by_row.get(row.path.partition("@")[0])
        if row.kind != "dot_general" or attention is None or attention.after is None or attention.keys < 2:
            continue
        if row.error_bound > 0.5 or not 0 < row.second_moment < math.inf:
            continue
        keys, deviation = attention.keys, abs(attention.after) * math.sqrt(row.second_moment)
        if deviation > _COLLAPSED:
            told = f"its scores have a root mean square of {deviation:.3g} over {keys} keys: the softmax is nearly one-hot, "
            told += "and its gradient vanishes for all keys but one."
            terms = attention.terms
            mend = f"multiply the scores by {terms**-0.5:.4g} = 1/√{terms}, the head's width"
            if attention.scale is not None and attention.scale * math.sqrt(terms) < 1.01:
                mend = "draw query and key smaller: kernel_init=vs.lecun_normal(), with the fans that the program uses"
            yield Finding("VS109", "warning", parent(row.path), told, deviation, mend)
        elif 0 < deviation < _UNIFORM:
            told = f"its scores have a root mean square of {deviation:.3g}: the softmax gives all {keys} keys the same weight, "
            told += "so that attention starts as an average, and queries and keys get gradients smaller by about that factor."
            mend = "draw query and key larger, or divide the scores by the root of the head's width once only"
            yield Finding("VS109", "info", parent(row.path), told, deviation, mend)


def check_logits(parameters: Sequence[ParameterUses], report: Report) -> Iterator[Finding]:
    """Outputs of a readout that are too large for logits: the cross-entropy of C classes starts near ln C + Var[y]/2.

    What all logits share, as the normalizer of log-probabilities, does not count.
    """
    readouts = [(p, use) for p in parameters for use in p.uses if use.role == "readout"]
    if len({p.path for p, _ in readouts}) != 1:
        return
    readout, use = readouts[0]
    classes = math.prod(readout.shape[k] for k in use.output_axes)
    own = [row for row in report.rows if row.path == "" or row.path.startswith("[")]
    output = next((row for row in own if row.shape[-1:] == (classes,)), None)
    if output is None or classes < 10 or output.error_bound > 0.5:
        return
    extra = output.variance / 2
    if extra > math.log(classes):
        told = f"its {classes} outputs have a variance of {output.variance:.3g}: as logits they give a cross-entropy "
        told += (
            f"of about {math.log(classes) + extra:.3g} at step 0; knowing nothing gives ln {classes} = {math.log(classes):.3g}."
        )
        scale = max((use.output_scale or 1.0 for use in readout.uses if use.role == "readout"), default=1.0)
        mend = "multiply the logits by 1/√features, or draw the readout smaller"
        if scale > 1.01:
            mend = f"the program multiplies them by {scale:.4g}: leave that out"
        yield Finding("VS110", "warning", readout.path, told, math.log(classes) + extra, mend)


def parent(path: str) -> str:
    """The path of the module around an equation or a parameter."""
    return path.rpartition("/")[0]
