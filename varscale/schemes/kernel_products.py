"""Where a program multiplies activations by its kernels, and which entries of each kernel made which outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from varscale import _compat
from varscale.measuring.sites import Place, Plan, Site, sub_jaxprs
from varscale.programs.tape import Mark
from varscale.usage import layouts
from varscale.usage.handlers import HANDLERS
from varscale.usage.layouts import Axes
from varscale.usage.notes import Use
from varscale.usage.parameters import parts_of
from varscale.usage.values import View
from varscale.usage.walk import Walk

_PRODUCTS = ("linear", "convolution", "depthwise")


@dataclasses.dataclass(frozen=True)
class Product:
    """One place where activations are multiplied by a kernel.

    Attributes:
        leaves: numbers of the kernels; several where kernels are joined before they are used.
        parts: names of the equal parts of the output: attention's query, key and value, or numbers; ("",) for one.
        groups: of each entry along `axis` of the kernel, its part; None where there is one part.
        axis: the axis of the kernel that is cut into parts.
        layout: which axes of the kernel the axes of the output hold.
        layers: axes of the kernel over which loops stack layers, the outermost first.
        region: (axis, start, stop) of each axis of the kernel of which only a slice is used here.
        is_shared: whether its kernel is used again elsewhere, or at each step of a loop.
        operand: which operand of the equation is the kernel.
        bias: where a bias that is not zero is added to the product at once, which operand of that addition it is; it is there
            that the output is measured. None for none.
    """

    leaves: tuple[int, ...]
    parts: tuple[str, ...]
    groups: np.ndarray | None
    axis: int
    layout: Axes
    layers: tuple[int, ...]
    region: tuple[tuple[int, int, int], ...]
    is_shared: bool
    operand: int
    bias: int | None = None

    def mean_square(self, y: Any) -> Any:
        """Mean square of an output, by part."""
        mean, variance = self.by_entry(y)
        return variance + jnp.sum(jnp.square(mean), -1)

    def by_entry(self, y: Any) -> tuple[Any, Any]:
        """Mean and variance of an output, by part: (parts, 1 or 2 for complex numbers) and (parts,)."""
        y = y.astype(_wide(y.dtype))
        y = jnp.stack([jnp.real(y), jnp.imag(y)], -1) if jnp.iscomplexobj(y) else y[..., None]
        if self.groups is None:
            axes = tuple(range(y.ndim - 1))
            mean = jnp.mean(y, axis=axes, keepdims=True)
            return mean.reshape(1, -1), jnp.sum(jnp.mean(jnp.square(y - mean), axis=axes))[None]
        runs, mine = self._runs(y.shape[:-1])
        y = _reshaped(y, (*runs, y.shape[-1]))
        others = [k for k, n in enumerate(mine) if n == 1]
        means = jnp.mean(y, axis=others, keepdims=True)
        scatter = jnp.mean(jnp.square(y - means), axis=others).reshape(-1, y.shape[-1]).sum(-1)
        means, group = means.reshape(-1, y.shape[-1]), self.groups[self._entries()].ravel()
        count = jnp.asarray(np.bincount(group, minlength=len(self.parts)), y.dtype)
        mean = jax.ops.segment_sum(means, group, len(self.parts)) / count[:, None]
        apart = jnp.square(means - mean[group]).sum(-1)
        return mean, jax.ops.segment_sum(scatter + apart, group, len(self.parts)) / count

    def again(self, eqn: Any, values: Sequence[Any], y: Any, by_part: Any) -> Any:
        """The output of the product `eqn`, which was y, with each part multiplied by its number.

        Where there is one part it is the product with the rescaled kernel, to the last bit: in a chaotic net of a thousand
        layers a rounding error would become another signal.
        """
        if self.groups is None:
            values = list(values)
            values[self.operand] = scaled(values[self.operand], by_part[0])
            return _compat.evaluated(eqn, values)[0]
        return self.times(y, by_part)

    def times(self, y: Any, by_part: Any) -> Any:
        """An output with each part multiplied by its number."""
        if self.groups is None:
            return scaled(y, by_part[0])
        factor = by_part[self.groups[self._entries()]].reshape(self._runs(y.shape)[1])
        return _reshaped(scaled(_reshaped(y, self._runs(y.shape)[0]), factor), y.shape)

    def scaled_kernel(self, kernel: Any, by_part: Any) -> Any:
        """The kernel with the entries that made each part multiplied by its number: (*layers, parts)."""
        shape = [1] * kernel.ndim
        for k, axis in enumerate(self.layers):
            shape[axis] = by_part.shape[k]
        if self.groups is None:
            factor = by_part[..., 0]
        else:
            factor = by_part[..., self.groups]
            order = sorted(range(len(self.layers) + 1), key=(*self.layers, self.axis).__getitem__)
            factor = factor.transpose(order)
            shape[self.axis] = len(self.groups)
        factor = factor.reshape(shape)
        if self.region:
            where = [slice(None)] * kernel.ndim
            for axis, start, stop in self.region:
                where[axis] = slice(start, stop)
            factor = (
                jnp.ones(kernel.shape, factor.dtype).at[tuple(where)].set(jnp.broadcast_to(factor, kernel[tuple(where)].shape))
            )
        return scaled(kernel, factor)

    def _entries(self) -> np.ndarray:
        """The entry along the cut axis of the kernel of each position in the runs of the output that hold it."""
        runs = [atom for atoms in self.layout for atom in atoms if atom.axis == self.axis]
        entries = np.zeros([atom.size for atom in runs], int)
        for k, atom in enumerate(runs):
            entries += atom.stride * np.arange(atom.size).reshape([-1 if i == k else 1 for i in range(len(runs))])
        return entries

    def _runs(self, shape: Sequence[int]) -> tuple[list[int], list[int]]:
        """The output's shape cut into its runs; the same with 1 for every run of another axis."""
        cut: list[int] = []
        mine: list[int] = []
        for n, atoms in zip(shape, self.layout, strict=True):
            for atom in atoms or (layouts.Atom(None, n),):
                cut.append(atom.size)
                mine.append(atom.size if atom.axis == self.axis else 1)
        return cut, mine


def _wide(dtype: Any) -> Any:
    """The dtype that numbers of another are measured and multiplied in: 32 bits at least."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return dtype
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _reshaped(x: Any, shape: Sequence[int]) -> Any:
    """The array in a shape; one that has it is left alone, since not every sharding lets arrays be reshaped."""
    return x if tuple(x.shape) == tuple(shape) else x.reshape(tuple(shape))


def scaled(x: Any, factor: Any) -> Any:
    """An array times factors, multiplied in the wider precision and rounded once to its own."""
    wide = _wide(x.dtype)
    return (x.astype(wide) * factor.astype(wide)).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Products:
    """All products with kernels in a program.

    Attributes:
        at: the products by place, in execution order.
        plan: what `measuring.instrument.Replay` needs to know of the places.
        left_alone: path of a kernel that no product can rescale -> why.
    """

    at: dict[Place, Product]
    plan: Plan
    left_alone: dict[str, str]


def products(jaxpr: Any, constants: int, paths: Sequence[str], trained: Sequence[int], leaves: Sequence[Any]) -> Products:
    """The products in a program whose first inputs are its parameters.

    Args:
        jaxpr: the program.
        constants: how many constants it has.
        paths: of each parameter its path.
        trained: numbers of the inputs that are learned.
        leaves: the parameters.
    """
    walk = Walk(HANDLERS)
    views = [View(i, layouts.whole(x.shape)) if i in set(trained) else None for i, x in enumerate(leaves)]
    flows = [walk.input(v.aval.shape) for v in jaxpr.invars[len(leaves) :]]
    walk.run(jaxpr, [None] * constants, [*views, *flows])
    by_place: dict[tuple[int, ...], list[Use]] = {}
    for use in walk.uses:
        if use.kind in _PRODUCTS:
            by_place.setdefault(use.place, []).append(use)
    looked_up = {use.parameter for use in walk.uses if use.kind == "lookup"}
    left_alone = {paths[i]: "a table that is looked up" for i in sorted(looked_up)}
    biases = {u.place: u.parameter for u in walk.uses if u.kind == "shift" and bool(jnp.any(leaves[u.parameter]))}
    shared = _shared([use for uses in by_place.values() for use in uses])
    found: dict[Place, Product] = {}
    plan = Plan()
    for place, ids, eqn, around, addition in _equations(jaxpr):
        uses = by_place.get(ids)
        if not uses or any(use.parameter in looked_up for use in uses):
            continue
        product = _product(uses, around, shared, leaves[uses[0].parameter].shape, eqn)
        if addition is not None and not product.is_shared and (*ids[:-1], id(addition.eqn)) in biases:
            product = dataclasses.replace(product, bias=addition.other)
            place = (*place[:-1], addition.number)
        found[place] = product
        mark = Mark(paths[uses[0].parameter], "kernel", "", "", 1)
        layers = () if product.is_shared else around.lengths
        shape, dtype = tuple(eqn.outvars[0].aval.shape), str(eqn.outvars[0].aval.dtype)
        averaged = product.is_shared and bool(around.lengths or around.repeats)
        plan.sites[place] = Site(len(found), mark, False, 0, layers, averaged, around.conditional, shape, dtype)
        plan.layers.update(around.scans if layers else ())
        plan.entered.update(place[: i + 1] for i in range(0, len(place) - 1, 2))
    reached = {i for product in found.values() for i in product.leaves} | looked_up
    unreached = {use.parameter for uses in by_place.values() for use in uses} - reached
    left_alone |= {paths[i]: "used inside an operation that cannot be entered" for i in sorted(unreached)}
    return Products(found, plan, left_alone)


@dataclasses.dataclass(frozen=True)
class _Around:
    """What is around an equation: its scans and their lengths, whether it may not run, and whether it runs more than once."""

    scans: tuple[Place, ...] = ()
    lengths: tuple[int, ...] = ()
    conditional: bool = False
    repeats: bool = False


class _Addition(NamedTuple):
    """The addition that alone reads what an equation puts out: its number, itself, and which operand is the other one."""

    number: int
    eqn: Any
    other: int


def _equations(
    jaxpr: Any, place: Place = (), ids: tuple[int, ...] = (), around: _Around = _Around()
) -> Iterator[tuple[Place, tuple[int, ...], Any, _Around, _Addition | None]]:
    """Every equation: its place, `id`s of the equations around it and its own, itself, what is around it, what adds to it."""
    readers: dict[Any, list[int]] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        for var in eqn.invars:
            if not _compat.is_literal(var):
                readers.setdefault(var, []).append(i)
    for i, eqn in enumerate(jaxpr.eqns):
        here, name = (*ids, id(eqn)), eqn.primitive.name
        yield (*place, i), here, eqn, around, _addition(jaxpr, eqn, readers)
        inside = around
        if name == "scan":
            inside = dataclasses.replace(
                around, scans=(*around.scans, (*place, i)), lengths=(*around.lengths, eqn.params["length"])
            )
        elif name in ("while", "shard_map"):
            inside = dataclasses.replace(around, repeats=True, conditional=around.conditional or name == "while")
        elif name == "cond":
            inside = dataclasses.replace(around, conditional=True)
        for k, part in enumerate(sub_jaxprs(eqn)):
            yield from _equations(_compat.sub_jaxpr(part)[0], (*place, i, k), here, inside)


def _addition(jaxpr: Any, eqn: Any, readers: dict[Any, list[int]]) -> _Addition | None:
    out = eqn.outvars[0] if len(eqn.outvars) == 1 else None
    if out is None or len(readers.get(out, [])) != 1 or out in [v for v in jaxpr.outvars if not _compat.is_literal(v)]:
        return None
    number = readers[out][0]
    reader = jaxpr.eqns[number]
    if reader.primitive.name != "add" or reader.outvars[0].aval.shape != out.aval.shape:
        return None
    return _Addition(number, reader, 1 if reader.invars[0] is out else 0)


def _shared(uses: Sequence[Use]) -> set[int]:
    """The parameters some of whose entries are used more than once."""
    found: set[int] = set()
    by_parameter: dict[int, list[Use]] = {}
    for use in uses:
        if use.region is None or any(_overlap(use.region, other.region or ()) for other in by_parameter.get(use.parameter, [])):
            found.add(use.parameter)
        by_parameter.setdefault(use.parameter, []).append(use)
    return {p for p in found if len(by_parameter[p]) > 1}


def _overlap(a: tuple[tuple[int, int, int], ...], b: tuple[tuple[int, int, int], ...]) -> bool:
    """Whether two regions of one parameter have an entry in common."""
    bounds = {axis: (start, stop) for axis, start, stop in b}
    return all(max(start, bounds[axis][0]) < min(stop, bounds[axis][1]) for axis, start, stop in a if axis in bounds)


def _product(uses: list[Use], around: _Around, shared: set[int], kernel: Sequence[int], eqn: Any) -> Product:
    use, output = uses[0], eqn.outvars[0].aval.shape
    is_shared = any(u.parameter in shared for u in uses) or use.steps > 1 or around.repeats
    is_shared |= len(use.batch) != len(around.lengths)
    region = use.region or ()
    parts, groups, axis = ("",), None, -1
    names, sizes = parts_of(use)
    if sizes and use.cut is not None and not (is_shared or region or len(uses) > 1) and _is_whole(use, kernel, output):
        axis, stride = use.cut
        run = np.repeat(np.arange(len(sizes)), sizes)
        groups, parts = run[np.arange(kernel[axis]) // stride % len(run)], names
    layers, layout = () if is_shared else use.batch, use.layout
    if groups is None and _stacks_kernels(use, eqn, kernel) and not (is_shared or region or len(uses) > 1):
        axis = use.shared[0]
        groups, parts = np.arange(kernel[axis]), tuple(map(str, range(kernel[axis])))
        layout = ((layouts.Atom(axis, kernel[axis]),), *layout[1:])
    return Product(tuple(u.parameter for u in uses), parts, groups, axis, layout, layers, region, is_shared, use.operand)


def _stacks_kernels(use: Use, eqn: Any, kernel: Sequence[int]) -> bool:
    """Whether a product is one of several kernels with as many inputs, along one axis: experts, heads, `nn.vmap`."""
    if eqn.primitive.name != "dot_general" or len(use.shared) != 1:
        return False
    batch = eqn.params["dimension_numbers"][1][0]
    return len(batch) == 1 and eqn.outvars[0].aval.shape[0] == kernel[use.shared[0]] > 1


def _is_whole(use: Use, kernel: Sequence[int], output: Sequence[int]) -> bool:
    """Whether the output's runs hold each entry along the axis that is cut, once."""
    assert use.cut is not None
    axis = use.cut[0]
    runs = [atom for atoms in use.layout for atom in atoms if atom.axis == axis]
    fits = all(layouts.size(atoms) == n for atoms, n in zip(use.layout, output, strict=True))
    return fits and int(np.prod([atom.size for atom in runs])) == kernel[axis] and all(atom.part is None for atom in runs)
