"""A plan: the law of every parameter of a model, and what else a scheme asks of the program, as one value."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from varscale.initialization.laws import Laid, check, laid
from varscale.initializers.structured import Constant
from varscale.programs.patterns import Pattern, canonical, idle, matches, text
from varscale.programs.tables import shape_text
from varscale.reporting.layout import Column, terminal_width, text_table, wrapped
from varscale.reporting.rows_by_path import found_by_path
from varscale.schemes.description import pieces, standard_deviation
from varscale.schemes.encoding import decoded, encoded
from varscale.schemes.first_updates import first_updates
from varscale.schemes.laws import Declared, Law
from varscale.schemes.optimizers import adamw, scaled, scalings
from varscale.schemes.verification import verify

_FORMAT = 1
Status = Literal["present", "missing", "folded", "unknown"]


@dataclasses.dataclass(frozen=True)
class PlannedLeaf:
    """What a plan says of one parameter.

    Attributes:
        path: keys joined with "/", without linen's "params/".
        shape: of the whole leaf.
        role: what the program uses it for; see `vs.uses`.
        fan_in: terms summed into one output at its main use.
        fan_out: terms summed into the gradient of one input there.
        law: an initializer of the WHOLE leaf, whatever the layer's own initializer sees; `Declared()` leaves it to the model.
        why: the sentence of the scheme that gives this law.
        multipliers: sorted pairs of a name and a number by which the optimizer's own is multiplied for this leaf, such as
            ("adam_learning_rate", 0.25); what is not named is 1.
    """

    path: str
    shape: tuple[int, ...]
    role: str
    fan_in: float
    fan_out: float
    law: Law
    why: str
    multipliers: tuple[tuple[str, float], ...] = ()

    @property
    def std(self) -> float | None:
        """Standard deviation of its weights, pooled over the leaf; None where the law does not tell."""
        return standard_deviation(self.law, self.shape)

    @property
    def stds(self) -> tuple[float, ...] | None:
        """Each standard deviation that occurs, from the first entry of the leaf on; None where the law does not tell."""
        found: dict[float, None] = {}
        for piece in pieces(self.law, self.shape):
            if piece.std is None:
                return None
            found.update(dict.fromkeys(map(float, np.ravel(piece.std))))
        return tuple(found)

    def multiplier(self, name: str) -> float:
        """The multiplier of this name, 1 where there is none."""
        return dict(self.multipliers).get(name, 1.0)

    def with_multipliers(self, **multipliers: float) -> PlannedLeaf:
        """The leaf with these multipliers in place of its own of the same names."""
        merged = {**dict(self.multipliers), **{name: float(value) for name, value in multipliers.items()}}
        return dataclasses.replace(self, multipliers=tuple(sorted(merged.items())))


@dataclasses.dataclass(frozen=True)
class Requirement:
    """A number that a scheme needs in the PROGRAM, which no initializer can apply.

    Attributes:
        name: what it is, such as "residual scale" or "readout multiplier".
        where: the path of a parameter, or of a module, at which it is needed.
        expected: the number.
        found: the number that the trace has there; None where it cannot be read.
        status: "present"; "missing"; "folded": not in the program, but in the law of a weight, which does the same at
            initialization; "unknown": the trace does not tell.
        mend: what to write in the model where it is missing.
    """

    name: str
    where: str
    expected: float
    found: float | None
    status: Status
    mend: str = ""

    def __str__(self) -> str:
        told = "" if self.found is None else f", found {self.found:.5g}"
        advice = f": {self.mend}" if self.mend and self.status == "missing" else ""
        return f"{self.status}: {self.name} {self.expected:.5g} at {self.where or 'the output'}{told}{advice}"


@dataclasses.dataclass(frozen=True)
class Change:
    """One difference of two plans.

    Attributes:
        path: of the parameter.
        what: "law", "shape", "multipliers", "only here" or "only there".
        mine: what the first plan has.
        theirs: what the second has.
    """

    path: str
    what: str
    mine: str
    theirs: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what} {self.mine} → {self.theirs}".replace("  ", " ")


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """The law of every parameter of a model. Made by a scheme: `vs.schemes.gpt2()(model, x)`.

    `vs.initialize(model, key, x, scheme=plan)` draws by it, `vs.predict(model, x, scheme=plan)` predicts under it, and
    `plan.verify(params)` tests afterwards that it was applied.

    Attributes:
        scheme: the call that made it.
        leaves: every parameter, in the order of the tree.
        requirements: numbers that the scheme needs in the program, each checked in the trace.
        notes: what else to know: warnings, deviations from the source.

    >>> import jax, varscale as vs
    >>> from flax import linen as nn
    >>> plan = vs.schemes.he()(nn.Dense(8), jax.ShapeDtypeStruct((2, 32), "float32"))
    >>> plan["kernel"].std, plan == vs.Plan.from_json(plan.to_json())
    (0.25, True)
    >>> print(plan.edit({"kernel": vs.zeros}).diff(plan)[0])
    kernel: law constant(0.0) → truncated_normal(stddev=0.25)
    """

    scheme: str
    leaves: tuple[PlannedLeaf, ...]
    requirements: tuple[Requirement, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for leaf in self.leaves:
            if not callable(leaf.law):
                raise TypeError(
                    f"the law of {leaf.path!r} must be an initializer (key, shape, dtype) -> weights, not {leaf.law!r}"
                )

    def __getitem__(self, path: str) -> PlannedLeaf:
        """The leaf at this path.

        Raises:
            KeyError: there is none; the message lists paths that begin alike.
        """
        return found_by_path(self.leaves, path, "parameter")

    def __iter__(self) -> Iterator[PlannedLeaf]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)

    def laws_of(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Law | None]:
        """The law of each parameter of a model, by path; None for one that keeps its declared law.

        Raises:
            ValueError: the plan has no law for a parameter, or one for a parameter that is missing or has another shape.
        """
        mine = {canonical(leaf.path): leaf for leaf in self.leaves}
        wrong = [f"{path} has no law" for path in shapes if canonical(path) not in mine]
        wrong += [f"{path} is no parameter of the model" for path in mine if path not in set(map(canonical, shapes))]
        wrong += [
            f"{path} has shape {shape}, not {mine[canonical(path)].shape}"
            for path, shape in shapes.items()
            if canonical(path) in mine and mine[canonical(path)].shape != tuple(shape)
        ]
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise ValueError(f"the plan {self.scheme} is for another model: {'; '.join(wrong[:4])}{more}")
        found = {path: mine[canonical(path)].law for path in shapes}
        return {path: None if isinstance(law, Declared) else law for path, law in found.items()}

    def edit(self, laws: Mapping[Pattern, Law], *, why: str = "edited") -> Plan:
        """The plan with other laws for the leaves that patterns name; the first pattern that matches counts.

        Args:
            laws: from path patterns to initializers of whole leaves. A pattern that names a module changes the leaves below it
                that have two axes or more; name a bias or a scale itself.
            why: told in the table of each leaf that changes.

        Raises:
            TypeError: laws is no mapping, or a law no initializer.
            ValueError: a pattern matches nothing, or a law cannot draw its leaf.
        """
        if not isinstance(laws, Mapping):
            raise TypeError(f"laws must be a mapping from path patterns to initializers, not {laws!r}")
        described = [(leaf.path, leaf.shape, np.dtype(np.float32), True) for leaf in self.leaves]
        hits = laid(laws, described, "laws")
        leaves = tuple(
            leaf if hit is None else dataclasses.replace(leaf, law=_drawable(hit.law, leaf), why=why)
            for leaf, hit in zip(self.leaves, hits, strict=True)
        )
        return dataclasses.replace(self, scheme=f"{self.scheme}, edited", leaves=leaves)

    def multiply(self, pattern: Pattern, **multipliers: float) -> Plan:
        """The plan with optimizer multipliers for the leaves that a pattern names.

        Raises:
            ValueError: the pattern matches nothing.
        """
        if idle([pattern], [leaf.path for leaf in self.leaves]):
            raise ValueError(f"pattern {text(pattern)!r} matches no parameter of the plan")
        leaves = tuple(leaf.with_multipliers(**multipliers) if matches(pattern, leaf.path) else leaf for leaf in self.leaves)
        return dataclasses.replace(self, leaves=leaves)

    def diff(self, other: Plan) -> tuple[Change, ...]:
        """What another plan does otherwise, leaf by leaf; () for none. Laws are compared as values."""
        mine, theirs = ({leaf.path: leaf for leaf in plan.leaves} for plan in (self, other))
        found = [Change(path, "only here", repr(leaf.law), "") for path, leaf in mine.items() if path not in theirs]
        found += [Change(path, "only there", "", repr(leaf.law)) for path, leaf in theirs.items() if path not in mine]
        for path in (path for path in mine if path in theirs):
            a, b = mine[path], theirs[path]
            if a.shape != b.shape:
                found.append(Change(path, "shape", shape_text(a.shape), shape_text(b.shape)))
            if a.law != b.law:
                found.append(Change(path, "law", repr(a.law), repr(b.law)))
            if a.multipliers != b.multipliers:
                found.append(Change(path, "multipliers", _multipliers(a) or "1", _multipliers(b) or "1"))
        return tuple(found)

    def table(self, width: int | None = None, *, optimizer: Any = None, **options: Any) -> str:
        """Every leaf on a line, then requirements and notes; columns that do not fit are named below.

        Args:
            width: columns of the terminal; None for the terminal's own, 80 where there is none.
            optimizer: an optax optimizer: a column tells the size of each leaf's first update over its own.
            **options: as `first_updates` takes them.

        Raises:
            ValueError: `width` is below 40.
        """
        width = terminal_width(width)
        columns = _columns(self.leaves)
        if optimizer is not None:
            sizes = self.first_updates(optimizer, **options)
            columns.append(Column("first update", tuple(f"{sizes[leaf.path]:.3g}" for leaf in self.leaves), 1))
        shown, missing = text_table(columns, width)
        told = [f"{self.scheme}: {len(self.leaves)} parameters."]
        told += [*_told_together(self.requirements), *self.notes]
        told += [f"Not shown at this width: {', '.join(missing)}."] if missing else []
        return "\n".join([shown, *(wrapped(line, width) for line in told)])

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"<Plan {self.scheme}: {len(self.leaves)} parameters>"

    def verify(self, params: Any, *, alpha: float = 1e-9) -> Any:
        """Test that parameters were drawn by this plan; see `varscale.schemes.verification.verify`."""
        return verify(self, params, alpha=alpha)

    def optimizer(self, optimizer: Any, *, kind: Any = None) -> Any:
        """An optax optimizer with this plan's multipliers of learning rates and epsilon; see `schemes.optimizers.scaled`."""
        return scaled(optimizer, scalings(self), kind=kind)

    def adamw(self, learning_rate: Any, weight_decay: float = 1e-4, **options: Any) -> Any:
        """`optax.adamw` with this plan's multipliers, of the weight decay too; see `schemes.optimizers.adamw`."""
        return adamw(learning_rate, scalings(self), weight_decay=weight_decay, **options)

    def first_updates(self, optimizer: Any, **options: Any) -> dict[str, float]:
        """The size of each leaf's first update over its own; see `schemes.first_updates.first_updates`."""
        return first_updates(self, optimizer, **options)

    def to_json(self, **options: Any) -> str:
        """The plan as JSON; `Plan.from_json` gives an equal one.

        Args:
            **options: passed on to `json.dumps`.

        Raises:
            TypeError: a law is no initializer of this package.
        """
        leaves = [{**dataclasses.asdict(dataclasses.replace(leaf, law=None)), "law": encoded(leaf.law)} for leaf in self.leaves]
        requirements = [dataclasses.asdict(requirement) for requirement in self.requirements]
        written = {"format": _FORMAT, "scheme": self.scheme, "leaves": leaves, "requirements": requirements}
        return json.dumps({**written, "notes": list(self.notes)}, **options)

    @classmethod
    def from_json(cls, written: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            ValueError: it is no plan, one of a later format, or names an unknown law.
        """
        try:
            found = json.loads(written)
            if found["format"] != _FORMAT:
                raise ValueError(f"a plan of format {found['format']!r} cannot be read: this version reads format {_FORMAT}")
            leaves = tuple(
                PlannedLeaf(**{
                    **leaf, "shape": tuple(leaf["shape"]), "law": decoded(leaf["law"]),
                    "multipliers": tuple((name, value) for name, value in leaf["multipliers"]),
                })
                for leaf in found["leaves"]
            )  # fmt: skip
            requirements = tuple(Requirement(**requirement) for requirement in found["requirements"])
            return cls(found["scheme"], leaves, requirements, tuple(found["notes"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"written must be the JSON of a plan, as `plan.to_json()` gives it: {error!r}") from error


def _told_together(requirements: Sequence[Requirement]) -> list[str]:
    """The requirements in words, those that differ in their place alone on one line."""
    groups: dict[tuple[object, ...], list[Requirement]] = {}
    for one in requirements:
        found = None if one.found is None else round(one.found, 6)
        groups.setdefault((one.name, one.status, round(one.expected, 6), found), []).append(one)
    lines = []
    for same in groups.values():
        more = f" and at {len(same) - 1} more places, to {same[-1].where}" if len(same) > 1 else ""
        lines.append(str(same[0]).replace(f" at {same[0].where}", f" at {same[0].where}{more}", 1) if more else str(same[0]))
    return lines


def _drawable(law: Law, leaf: PlannedLeaf) -> Law:
    """The law, if it can draw the leaf."""
    if not isinstance(law, Declared):
        check(Laid(law, "", True), leaf.path, leaf.shape, np.dtype(np.float32), "threefry2x32", "laws")
    return law


def _multipliers(leaf: PlannedLeaf) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in leaf.multipliers)


def _std(leaf: PlannedLeaf) -> str:
    stds = leaf.stds
    if stds is None or (isinstance(leaf.law, Constant) and leaf.law.value != 0):
        return ""
    return f"{stds[0]:.4g}" if len(stds) == 1 else f"{stds[0]:.4g} to {stds[-1]:.4g}"


def _columns(leaves: Sequence[PlannedLeaf]) -> list[Column]:
    """What is shown of each leaf, and which columns are left out first."""

    def cells(write: Callable[[PlannedLeaf], str]) -> tuple[str, ...]:
        return tuple(map(write, leaves))

    return [
        Column("path", cells(lambda leaf: leaf.path), is_left=True),
        Column("role", cells(lambda leaf: leaf.role), 2, is_left=True),
        Column("fan in", cells(lambda leaf: f"{leaf.fan_in:.4g}"), 3),
        Column("fan out", cells(lambda leaf: f"{leaf.fan_out:.4g}"), 4),
        Column("law", cells(lambda leaf: _short(leaf.law)), 1, is_left=True),
        Column("std", cells(_std), 0),
        Column("multipliers", cells(_multipliers), 5, is_left=True),
        Column("shape", cells(lambda leaf: shape_text(leaf.shape)), 7),
        Column("why", cells(lambda leaf: leaf.why), 6, is_left=True),
    ]


def _short(law: Law) -> str:
    """The name of a law, whose numbers stand in the column of standard deviations; a number that fills the leaf."""
    if isinstance(law, Constant) and np.ndim(law.value) == 0:
        return f"constant {law.value:.4g}"
    return str(getattr(law, "maker", None) or getattr(law, "__name__", None) or type(law).__name__)
