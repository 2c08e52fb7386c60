"""Was a plan applied? An exact p-value for every leaf, and an equality where the law leaves nothing to chance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from scipy import special

from varscale.initializers.distributions import cut_variance, distribution
from varscale.programs.patterns import canonical
from varscale.programs.trees import is_collections, open_tree, to_numpy
from varscale.reporting.layout import Column, terminal_width, text_table, wrapped
from varscale.schemes.description import Piece, pieces
from varscale.schemes.joint_verification import products
from varscale.schemes.laws import Declared
from varscale.testing.claims import VarianceClaim
from varscale.testing.goodness import distribution_function, within_bound
from varscale.testing.laws import is_low_precision, stored
from varscale.testing.tails import log_mean_square, log_symmetric_sum, second_moment_of
from varscale.testing.verdict import Finding, equality

if TYPE_CHECKING:
    from varscale.schemes.plan import Plan, PlannedLeaf

_READ = 2**18  # weights that the test of the distribution function reads at most


@dataclasses.dataclass(frozen=True)
class LeafVerdict:
    """The outcome of the test of one leaf.

    Attributes:
        path: of the parameter.
        law: planned, in words.
        ratio: mean square of the weights over that of the law; NaN where the law does not tell.
        findings: one a part: finite, second moment, mean, bound, distribution; for constants and orthogonal maps equalities.
        level: the p-value below which a part is refuted.
        tested: False where the law says nothing that could be tested, such as the model's own.
    """

    path: str
    law: str
    ratio: float
    findings: tuple[Finding, ...]
    level: float
    tested: bool = True

    @property
    def log_p_value(self) -> float:
        """Natural logarithm of the smallest p-value times the number of parts (Bonferroni)."""
        return min([0.0, *(finding.log_p + math.log(len(self.findings)) for finding in self.findings)])

    @property
    def p_value(self) -> float:
        """Of the whole leaf: uniform or conservative where the plan was applied."""
        return math.exp(self.log_p_value)

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The parts that do not hold, most damning first."""
        return tuple(sorted((f for f in self.findings if f.log_p <= math.log(self.level)), key=lambda f: f.log_p))

    def __str__(self) -> str:
        if self.failed:
            told = "; ".join(f"{f.name}: {f.says}" for f in self.failed)
            return f"{self.path} does not follow {self.law} (p = {self.p_value:.2g}): {told}"
        return f"{self.path} follows {self.law} (p = {self.p_value:.2g})" if self.tested else f"{self.path} was not tested"


@dataclasses.dataclass(frozen=True, repr=False)
class Verification:
    """The outcome of the test of a plan.

    Attributes:
        scheme: of the plan.
        verdicts: one a leaf, in the order of the plan; then one a pair of factors that are drawn together.
        alpha: the chance that a plan which was applied is refuted in any leaf.
    """

    scheme: str
    verdicts: tuple[LeafVerdict, ...]
    alpha: float

    @property
    def failed(self) -> tuple[LeafVerdict, ...]:
        """The leaves that do not follow their laws, most damning first."""
        return tuple(sorted((v for v in self.verdicts if v.failed), key=lambda v: v.log_p_value))

    @property
    def holds(self) -> bool:
        """Whether no leaf was refuted."""
        return not self.failed

    def __getitem__(self, path: str) -> LeafVerdict:
        return {verdict.path: verdict for verdict in self.verdicts}[path]

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"<Verification of {self.scheme}: {len(self.failed)} of {len(self.verdicts)} leaves refuted>"

    def table(self, width: int | None = None) -> str:
        """The verdicts, one a line. `width` is in columns of the terminal."""
        width = terminal_width(width)
        columns = [
            Column("path", tuple(v.path for v in self.verdicts), is_left=True),
            Column("holds", tuple("✗" if v.failed else "✓" if v.tested else "·" for v in self.verdicts)),
            Column("p", tuple(f"{v.p_value:.2g}" if v.tested else "" for v in self.verdicts)),
            Column("ratio", tuple("" if math.isnan(v.ratio) else f"{v.ratio:.4g}" for v in self.verdicts), 1),
            Column("law", tuple(v.law for v in self.verdicts), 2, is_left=True),
        ]
        shown, _ = text_table(columns, width)
        return "\n".join([shown, *(wrapped(str(v), width) for v in self.failed)])


def verify(plan: Plan, params: Any, *, alpha: float = 1e-9) -> Verification:
    """Test that parameters were drawn by a plan.

    Second moments have exact p-values (χ² of normal weights, Cramér's bound of other known laws), means and distribution
    functions proven bounds; constants, zeros and orthogonal maps are equalities up to rounding. Leaves that keep the model's
    own law, and laws that nothing is known of, are only tested to be finite. Of factors that are drawn together, as those of
    `mimetic`, the product has a verdict of its own.

    Args:
        plan: the plan.
        params: parameters (any tree, linen variables, an nnx.State) or an nnx model.
        alpha: the chance to refute a plan that was applied, over all leaves and parts together.

    Raises:
        AssertionError: a leaf does not follow its law; the message names it with the figures, and `error.verification` holds
            the verdicts.
        ValueError: a leaf of the plan is missing from the parameters or has another shape, or alpha is not in (0, 1).
    """
    __tracebackhide__ = True
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, not {alpha!r}")
    found = Verification(plan.scheme, tuple(_verdicts(plan, _values(plan, params), alpha)), alpha)
    if found.holds:
        return found
    told = "\n".join(map(str, found.failed[:8]))
    more = f"\nand {len(found.failed) - 8} more" if len(found.failed) > 8 else ""
    error = AssertionError(f"{len(found.failed)} of {len(found.verdicts)} leaves do not follow {plan.scheme}:\n{told}{more}")
    error.verification = found  # pyright: ignore[reportAttributeAccessIssue]
    raise error


def _values(plan: Plan, params: Any) -> dict[str, Any]:
    """The parameters by path.

    Raises:
        ValueError: one is missing, or has another shape.
    """
    opened = open_tree(params, "params")
    collections = is_collections(opened.paths)
    values = {
        leaf.path.removeprefix("params/") if collections else leaf.path: leaf.value
        for leaf in opened.leaves
        if leaf.is_weight and (not collections or leaf.path.startswith("params/"))
    }
    for leaf in plan.leaves:
        path = canonical(leaf.path)
        if path not in values:
            raise ValueError(f"params must have the leaf {leaf.path!r} of the plan; there are {', '.join(list(values)[:6])}")
        if tuple(np.shape(values[path])) != leaf.shape:
            raise ValueError(f"params: {leaf.path!r} must have shape {leaf.shape}, not {np.shape(values[path])}")
    return values


def _verdicts(plan: Plan, values: dict[str, Any], alpha: float) -> Iterator[LeafVerdict]:
    tested = []
    for leaf in plan.leaves:
        weights = to_numpy(values[canonical(leaf.path)], leaf.path)
        tested.append((leaf, *_tested(leaf, weights)))
    together = list(products(plan, values))
    count = sum(len(findings) for _, _, findings in (*tested, *together))
    level = alpha / max(1, count)
    for leaf, ratio, findings in tested:
        yield LeafVerdict(leaf.path, repr(leaf.law), ratio, findings, level, tested=len(findings) > 1)
    for paths, law, findings in together:
        yield LeafVerdict(paths, law, math.nan, findings, level)


def _tested(leaf: PlannedLeaf, weights: np.ndarray) -> tuple[float, tuple[Finding, ...]]:
    """Mean square over the law's, and the findings, of one leaf."""
    infinite = int(np.sum(~np.isfinite(weights)))
    findings = [equality("finite", not infinite, f"{infinite} of {weights.size} weights are not finite")]
    if infinite or isinstance(leaf.law, Declared) or not weights.size:
        return math.nan, tuple(findings)
    ratios = []
    for piece in pieces(leaf.law, leaf.shape):
        block = piece.of(weights)
        if piece.uniformed is not None:
            findings += _uniform(piece.uniformed(block.astype(np.float64)).reshape(-1), block.dtype)
        if piece.std is None:
            ratios.append(math.nan)
            continue
        for part, one in _parts(piece, block):
            ratio, found = _of_piece(part, one)
            ratios.append(ratio)
            findings += found
    return float(np.mean(ratios)), tuple(findings)


def _parts(piece: Piece, block: np.ndarray) -> Iterator[tuple[Piece, np.ndarray]]:
    """The block itself; slice by slice where each has a law that rounding shapes, or where a slice is all zero."""
    assert piece.std is not None
    varied = [axis for axis, n in enumerate(piece.std.shape) if n > 1]
    if not varied or (piece.distribution != "orthogonal" and np.all(piece.std > 0) and not is_low_precision(block.dtype)):
        yield piece, block
        return
    axis = varied[0]
    for i in range(block.shape[axis]):
        at = tuple(slice(i, i + 1) if k == axis else slice(None) for k in range(block.ndim))
        mean = piece.mean[at] if piece.mean.shape[axis] > 1 else piece.mean
        yield dataclasses.replace(piece, std=piece.std[at], mean=mean), block[at]


def _of_piece(piece: Piece, block: np.ndarray) -> tuple[float, list[Finding]]:
    assert piece.std is not None
    exact = block.astype(np.complex128 if np.iscomplexobj(block) else np.float64)
    eps = _eps(block.dtype)
    if not np.any(piece.std):
        distance = float(np.max(np.abs(exact - piece.mean)))
        holds = bool(np.all(np.abs(exact - piece.mean) <= 4 * eps * np.abs(piece.mean)))
        return 1.0 if holds else math.nan, [equality("constant", holds, f"largest distance from the number is {distance:.4g}")]
    if piece.distribution == "orthogonal":
        return _orthogonal(piece, exact, block.dtype)
    z = ((exact - piece.mean) / piece.std).reshape(-1)
    if np.iscomplexobj(z):
        z = np.stack([z.real, z.imag], -1).reshape(-1) * math.sqrt(2)
    return _random(piece, z, block.dtype)


def _random(piece: Piece, z: np.ndarray, dtype: np.dtype) -> tuple[float, list[Finding]]:
    """Findings about standardized weights."""
    assert piece.std is not None
    deviation, eps, measured = float(np.ravel(piece.std)[0]), _eps(dtype), float(np.mean(np.square(z)))
    says = f"standard deviation {deviation * math.sqrt(measured):.5g}, planned {deviation:.5g}, {z.size} weights"
    if piece.distribution == "cut_normal":
        law, z = distribution("uniform"), _uniformed(z, piece.cut, dtype)
    else:
        known = distribution(piece.distribution)
        law = known if jnp.issubdtype(dtype, jnp.complexfloating) else stored(known, deviation, np.dtype(dtype))
    expected, ratio = second_moment_of(law), float(np.mean(np.square(z)))
    if law.kurtosis == 1:
        second = equality("second moment", abs(ratio / expected - 1) <= 8 * eps, says)
    else:
        second = Finding("second moment", min(0.0, math.log(2) + min(log_mean_square(law, ratio, z.size))), says)
    norm = math.sqrt(float(z @ z))
    score = abs(float(z.sum())) / norm if norm else 0.0
    centre = Finding(
        "mean", float(log_symmetric_sum(score)), f"mean {float(z.mean()) * deviation:.4g}, {score:.3g} standard errors"
    )
    read = z[:: -(-z.size // _READ)]
    shape = distribution_function(read, law, 4 * eps)
    found = [second, centre, shape]
    if math.isfinite(law.bound):
        found.append(within_bound(float(np.max(np.abs(z))), law.bound * (1 + 8 * eps)))
    return measured if piece.distribution == "cut_normal" else ratio / expected, found


def _uniform(u: np.ndarray, dtype: np.dtype) -> Iterator[Finding]:
    """Findings about numbers that are to be uniform in [0, 1], up to the rounding of the weights that they come from."""
    slack = 64 * _eps(dtype)
    within = bool(np.all((u >= -slack) & (u <= 1 + slack)))
    yield equality("bound", within, f"behind the weights lie uniform numbers from {u.min():.4g} to {u.max():.4g}")
    yield distribution_function(math.sqrt(3) * (2 * np.clip(u, 0, 1) - 1), distribution("uniform"), slack)


def _uniformed(z: np.ndarray, cut: float, dtype: np.dtype) -> np.ndarray:
    """Standardized weights of a normal law cut at `cut`, through its distribution function: uniform, of variance 1.

    Of weights rounded to few bits at most 2¹⁶ are taken, which the rounding does not show in.
    """
    z = z[:: -(-z.size // 2**16)] if is_low_precision(dtype) else z
    return math.sqrt(3) * special.erf(z * math.sqrt(cut_variance(cut) / 2)) / special.erf(cut / math.sqrt(2))


def _orthogonal(piece: Piece, exact: np.ndarray, dtype: np.dtype) -> tuple[float, list[Finding]]:
    """Every map of the block: `WᵀW` or `WWᵀ` is the square of the scale times the identity."""
    assert piece.std is not None
    batch = [axis for axis in range(exact.ndim) if axis not in (*piece.in_axes, *piece.out_axes)]
    rows, columns = (math.prod(exact.shape[a] for a in axes) for axes in (piece.in_axes, piece.out_axes))
    maps = np.transpose(exact, (*batch, *piece.in_axes, *piece.out_axes)).reshape(-1, rows, columns).astype(dtype)
    stds = np.broadcast_to(np.transpose(piece.std, (*batch, *piece.in_axes, *piece.out_axes)), _aligned(piece, exact, batch))
    worst, ratio = None, []
    for one, std in zip(maps, stds.reshape(len(maps), -1)[:, 0], strict=True):
        verdict = VarianceClaim(float(std) ** 2, orthogonal_axis=1, independent=False).check(one[None])
        ratio.append(verdict.ratio)
        finding = min(verdict.findings, key=lambda f: f.log_p)
        worst = finding if worst is None or finding.log_p < worst.log_p else worst
    assert worst is not None
    return float(np.mean(ratio)), [dataclasses.replace(worst, name="orthogonal")]


def _aligned(piece: Piece, exact: np.ndarray, batch: list[int]) -> tuple[int, ...]:
    return tuple(exact.shape[a] if a in batch else 1 for a in (*batch, *piece.in_axes, *piece.out_axes))


def _eps(dtype: np.dtype) -> float:
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.inexact) else 0.0
