"""Which axes of a model's parameters grow: two abstract traces, the model's and its base's, compared."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from varscale.programs.patterns import Pattern, first_match, text
from varscale.schemes.parametrization import Growth, Place
from varscale.usage.parameters import OneUse, ParameterUses
from varscale.usage.table import Uses, uses

_VECTORS = ("vector", "norm scale", "position")


@dataclasses.dataclass(frozen=True)
class GrownLeaf:
    """One parameter beside the base's.

    Attributes:
        uses: what the model does with it.
        base: path of the base's parameter that it is compared with: its own, or that of an earlier layer where the base is
            less deep.
        base_shape: shape of that parameter.
        growth: of the fans of its main use.
        conflict: the growth of another use, in another column of the table; None where there is none.
        place: where it is among the residual branches.
    """

    uses: ParameterUses
    base: str
    base_shape: tuple[int, ...]
    growth: Growth
    conflict: Growth | None
    place: Place

    @property
    def path(self) -> str:
        return self.uses.path

    @property
    def muon(self) -> float:
        """How many times larger the updates of `optax.contrib.muon` are than in the base: it scales by √max(1, out/in)."""
        use = self.uses.main
        if use is None or not use.reduction_axes or not use.output_axes:
            return 1.0

        def own(shape: tuple[int, ...]) -> float:
            inputs, outputs = (math.prod(shape[k] for k in axes) for axes in (use.reduction_axes, use.output_axes))
            return math.sqrt(max(1.0, outputs / inputs))

        return own(self.uses.shape) / own(self.base_shape)


@dataclasses.dataclass(frozen=True)
class Grown:
    """A model beside its base.

    Attributes:
        uses: the model's.
        leaves: its parameters, in the order of the tree.
        depth: number of residual additions over the base's; 1 where there are none.
        base: the base model; None where the base was given as shapes.
        base_uses: what it does with its parameters; None likewise.
    """

    uses: Uses
    leaves: tuple[GrownLeaf, ...]
    depth: float
    base: Any
    base_uses: Uses | None

    @property
    def grows(self) -> bool:
        """Whether some parameter is larger than the base's."""
        return any(leaf.uses.shape != leaf.base_shape for leaf in self.leaves)


def grown(model: Any, x: Any, base: Any, *, scheme: str, params: Any = None, method: str | None = None) -> Grown:
    """Compare a model with its base.

    Args:
        model: the model.
        x: its input, which the base takes too.
        base: a narrower model of the same kind; a mapping from names of the linen module's fields to their values in the base;
            a mapping from sizes of axes to those in the base; or one from patterns of paths to shapes in the base.
        scheme: what errors call the scheme.
        params: the parameters of a plain function, as arrays or abstract arrays.
        method: the method to trace in place of `__call__`.

    Raises:
        TypeError: `base` is none of these.
        ValueError: the base has other parameters than the model, is wider than the model, or a mapping names nothing.
    """
    found = uses(model, x, params=params, method=method)
    shapes, narrow, base_uses = _base(model, x, base, found, scheme, method)
    leaves = [_leaf(p, shapes, found, scheme) for p in found]
    wider = [leaf for leaf in leaves if leaf.growth.fan_in < 1 or leaf.growth.fan_out < 1]
    if wider:
        leaf = wider[0]
        raise ValueError(
            f"{scheme}: base must be narrower than the model, or as wide: {leaf.path!r} has shape {leaf.uses.shape} in the "
            f"model and {leaf.base_shape} in the base"
        )
    additions = found.additions if base_uses is None else base_uses.additions
    depth = found.additions / additions if additions else 1.0
    return Grown(found, tuple(leaves), depth, narrow, base_uses)


def _base(
    model: Any, x: Any, base: Any, found: Uses, scheme: str, method: str | None
) -> tuple[dict[str, tuple[int, ...]], Any, Uses | None]:
    """The base's shapes by path, and where the base is a model itself and its uses."""
    if isinstance(base, Mapping):
        keys = list(base)
        if not keys:
            raise ValueError(f"{scheme}: base must name what is narrower in the base, not be an empty mapping")
        fields = {f.name for f in dataclasses.fields(model)} if isinstance(model, nn.Module) else set()
        if fields.issuperset(keys):
            return _base(model, x, model.clone(**base), found, scheme, method)
        if all(isinstance(k, int) for k in keys):
            return _by_size(base, found, scheme), None, None
        if all(isinstance(k, str | re.Pattern) and isinstance(v, Sequence) for k, v in base.items()):
            return _by_pattern(base, found, scheme), None, None
        raise TypeError(
            f"{scheme}: the keys of base must be fields of the linen module, sizes of axes, or patterns of paths with shapes, "
            f"not {keys[:4]}"
        )
    try:
        narrow = uses(base, x, method=method)
    except TypeError as error:
        raise TypeError(
            f"{scheme}: base must be a narrower model of the same kind (a linen module, an nnx factory or an nnx instance) or "
            f"a mapping, not {base!r}"
        ) from error
    return {p.path: p.shape for p in narrow}, base, narrow


def _by_size(base: Mapping[int, int], found: Uses, scheme: str) -> dict[str, tuple[int, ...]]:
    for size, narrow in base.items():
        if not (isinstance(narrow, int) and 1 <= narrow <= size):
            raise ValueError(f"{scheme}: base must map sizes to smaller ones of 1 or more, not {size} to {narrow!r}")
        if not any(size in p.shape for p in found):
            raise ValueError(f"{scheme}: base names axes of size {size}, which no parameter of the model has")
    return {p.path: tuple(base.get(n, n) for n in p.shape) for p in found}


def _by_pattern(base: Mapping[Pattern, Sequence[int]], found: Uses, scheme: str) -> dict[str, tuple[int, ...]]:
    rules, idle = list(base.items()), dict.fromkeys(base)
    shapes: dict[str, tuple[int, ...]] = {}
    for p in found:
        hit = first_match(rules, p.path)
        if hit is not None:
            idle.pop(rules[hit[0]][0], None)
        shapes[p.path] = p.shape if hit is None else tuple(hit[1])
    if idle:
        raise ValueError(f"{scheme}: base names {', '.join(map(text, idle))}, which no parameter of the model matches")
    return shapes


def _leaf(p: ParameterUses, shapes: Mapping[str, tuple[int, ...]], found: Uses, scheme: str) -> GrownLeaf:
    """One parameter beside the base's."""
    base = p.path if p.path in shapes else _counterpart(p.path, shapes)
    if base is None or len(shapes[base]) != len(p.shape):
        told = "has none of that path" if base is None else f"has shape {shapes[base]}"
        raise ValueError(
            f"{scheme}: base must be the same model but narrower: {p.path!r} of shape {p.shape} {told} in the base"
        )
    narrow = shapes[base]
    growths = [_growth(use, p.shape, narrow) for use in p.uses if use.reduction_axes or use.role == "embedding"]
    main = _growth(p.main, p.shape, narrow) if p.main is not None else Growth()
    conflict = next((g for g in growths if g.position != main.position), None)
    return GrownLeaf(p, base, narrow, main, conflict, _place(p, found))


def _counterpart(path: str, known: Iterable[str]) -> str | None:
    """The path that differs in the fewest numbers, the later ones first: an earlier layer's; None where words differ."""
    words, numbers = re.split(r"\d+", path), re.findall(r"\d+", path)
    alike = [other for other in known if re.split(r"\d+", other) == words]

    def unlike(other: str) -> tuple[int, list[bool]]:
        differs = [a != b for a, b in zip(re.findall(r"\d+", other), numbers, strict=True)]
        return sum(differs), differs

    return min(alike, key=unlike, default=None)


def _growth(use: OneUse, shape: Sequence[int], narrow: Sequence[int]) -> Growth:
    """The growth of one use's fans. Axes of a batch (layers, experts) are no width."""
    ratios = [n / b if b else 1.0 for n, b in zip(shape, narrow, strict=True)]
    reduced = () if use.role == "embedding" else use.reduction_axes
    kept = use.output_axes or tuple(k for k in range(len(shape)) if k not in (*use.reduction_axes, *use.batch_axes))
    return Growth(math.prod((ratios[k] for k in reduced), start=1.0), math.prod((ratios[k] for k in kept), start=1.0))


def _place(p: ParameterUses, found: Uses) -> Place:
    """Where a parameter is among the residual branches."""
    use = p.main
    if use is None or found.additions == 0 or use.depth >= found.additions:
        return "outside"
    if use.role in _VECTORS:
        return _place_of_vector(p, use, found)
    if use.branch is None:
        return "outside"
    return "branch" if use.ends is None else "end of branch"


def _place_of_vector(p: ParameterUses, use: OneUse, found: Uses) -> Place:
    """That of the kernel of its own layer, or of what is normalised."""
    layer = p.path.rpartition("/")[0]
    kernels = [q for q in found if q.path.rpartition("/")[0] == layer and q.role not in (*_VECTORS, "unused")]
    if kernels:
        return _place(kernels[0], found)
    return "outside" if use.role == "position" else "branch"
