"""`vs.uses`: what the program of a model does with each of its parameters."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from varscale.programs import faces
from varscale.reporting.layout import Column, terminal_width, text_table, wrapped
from varscale.reporting.rows_by_path import found_by_path
from varscale.usage.branches import Branch
from varscale.usage.parameters import Attention, Found, OneUse, ParameterUses, walked
from varscale.usage.zeros import COMPUTED, zeros_that_meet


class ZeroSide(NamedTuple):
    """One of two factors that are zero.

    Attributes:
        paths: the parameters that make it so.
        computed: whether it is computed from them, so that they may be read elsewhere; else it is the parameter itself.
    """

    paths: tuple[str, ...]
    computed: bool


@dataclasses.dataclass(frozen=True)
class Uses:
    """What a program does with each parameter; read off its trace.

    Attributes:
        parameters: every parameter, in the order of the tree.
        additions: residual additions on the longest way from the input to the output.
        tree: the structure of the parameters: linen's collection "params", or `nnx.state(model, nnx.Param)`.
        branches: every residual branch, in the order of execution.
        attentions: every softmax over products of queries and keys.
        epsilons: path of a module that normalises to the constant under its root.
        found: all that the walk over the program found.
    """

    parameters: tuple[ParameterUses, ...]
    additions: int
    tree: Any = dataclasses.field(repr=False)
    branches: tuple[Branch, ...] = ()
    attentions: tuple[Attention, ...] = ()
    epsilons: Mapping[str, float] = dataclasses.field(default_factory=dict, repr=False)
    found: Found | None = dataclasses.field(default=None, repr=False, compare=False)

    def __getitem__(self, path: str) -> ParameterUses:
        """The uses of the parameter at this path.

        Raises:
            KeyError: there is none; the message lists paths that begin alike.
        """
        return found_by_path(self.parameters, path, "parameter")

    def __iter__(self) -> Iterator[ParameterUses]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    def table(self, width: int | None = None) -> str:
        """The parameters as text that fits the terminal, a line a use; columns that do not fit are named below.

        Args:
            width: columns of the terminal; None for the terminal's own, 80 where there is none.

        Raises:
            ValueError: `width` is below 40.
        """
        width = terminal_width(width)
        lines = [(p, use) for p in self.parameters for use in p.uses or (None,)]
        text, missing = text_table(_columns(lines), width)
        told = f"{len(self.parameters)} parameters, {self.additions} residual additions."
        left_out = [f"Not shown at this width: {', '.join(missing)}."] if missing else []
        return "\n".join([text, *(wrapped(line, width) for line in (told, *left_out))])

    def __str__(self) -> str:
        return self.table()

    def to_json(self, **options: Any) -> str:
        """Every parameter's uses as JSON.

        Args:
            **options: passed on to `json.dumps`.
        """
        records = [{**dataclasses.asdict(p), "role": p.role} for p in self.parameters]
        return json.dumps({"parameters": records, "additions": self.additions}, **options)

    def zeros_that_meet(self, zero: Collection[str]) -> list[tuple[ZeroSide, ZeroSide]]:
        """Pairs of sets of parameters that are all zero and whose products are multiplied: no gradient reaches either set.

        Args:
            zero: paths of the parameters that are zero.
        """
        if self.found is None or not zero:
            return []
        names = self.found.names
        numbers = {i for i, name in enumerate(names) if name.learned and name.path in zero}

        def side(causes: frozenset[int]) -> ZeroSide:
            return ZeroSide(tuple(names[i].path for i in sorted(causes - {COMPUTED})), COMPUTED in causes)

        return [(side(one), side(other)) for one, other in zeros_that_meet(self.found.jaxpr, numbers)]

    def labels(self) -> Any:
        """Every parameter's role, in the tree of the parameters: for `optax.partition`."""
        return jax.tree_util.tree_unflatten(self.tree, [p.role for p in self.parameters])

    def muon_dimension_numbers(self) -> Any:
        """What `optax.contrib.muon(muon_weight_dimension_numbers=...)` takes, in the tree of the parameters.

        Hidden and input matrices, kernels of attention (all heads jointly one output) and of convolutions (taps and inputs
        reduced) and of experts get their reduction and output axes; axes over which kernels are stacked are in neither.
        Embeddings, readouts, depthwise kernels, position tables and vectors get None.
        """
        from optax.contrib import MuonDimensionNumbers

        def numbers(p: ParameterUses) -> Any:
            use = p.main
            if use is None or p.tied or use.role not in ("hidden", "input", "expert"):
                return None
            if not use.reduction_axes or not use.output_axes:
                return None
            return MuonDimensionNumbers(use.reduction_axes, use.output_axes)

        return jax.tree_util.tree_unflatten(self.tree, [numbers(p) for p in self.parameters])


def _columns(lines: Sequence[tuple[ParameterUses, OneUse | None]]) -> list[Column]:
    """What is shown of each use, and which columns are left out first."""

    def cells(write: Callable[[OneUse], str]) -> tuple[str, ...]:
        return tuple("" if use is None else write(use) for _, use in lines)

    return [
        Column("path", tuple(p.path for p, _ in lines), is_left=True),
        Column("role", tuple("unused" if use is None else use.role for _, use in lines), 0, is_left=True),
        Column("fan in", cells(lambda use: f"{use.fan_in:.4g}" if use.reduction_axes else ""), 1),
        Column("fan out", cells(lambda use: f"{use.fan_out:.4g}" if use.reduction_axes else ""), 2),
        Column("before", cells(lambda use: use.before), 3, is_left=True),
        Column("ends branch", cells(lambda use: "" if use.ends is None else str(use.ends)), 4),
        Column("after", cells(lambda use: use.after), 5, is_left=True),
        Column("axes", cells(_axes), 6, is_left=True),
        Column("shape", tuple("×".join(map(str, p.shape)) or "scalar" for p, _ in lines), 7),
        Column("parts", cells(lambda use: ", ".join(use.parts)), 8, is_left=True),
        Column("times", cells(lambda use: str(use.times)), 9),
    ]


def _axes(use: OneUse) -> str:
    """Reduced axes, the output's, and those of a batch: "0→1,2 batch 3"."""
    if not use.reduction_axes:
        return ""
    batch = f" batch {','.join(map(str, use.batch_axes))}" if use.batch_axes else ""
    return f"{','.join(map(str, use.reduction_axes))}→{','.join(map(str, use.output_axes))}{batch}"


def uses(model: Any, x: Any, *, params: Any = None, method: str | None = None) -> Uses:
    """Read off a model's trace what it does with each parameter; nothing is drawn or run.

    Args:
        model: a linen module, an nnx factory `lambda rngs: Net(..., rngs=rngs)`, an nnx instance, or a plain function
            f(params, *args).
        x: one input (array, `jax.ShapeDtypeStruct`, `vs.Moments`, or a pytree of them), or `vs.inputs(...)`.
        params: the parameters of a plain function, as arrays or abstract arrays.
        method: the method to trace in place of `__call__`.

    Raises:
        TypeError: `model` is of no known kind.
        ValueError: the model does not trace on `x`, or `params` is missing for a plain function.

    >>> import jax, varscale as vs
    >>> from flax import linen as nn
    >>> net = nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(256), nn.relu, nn.Dense(10)])
    >>> found = vs.uses(net, jax.ShapeDtypeStruct((32, 784), "float32"))
    >>> [(p.path, p.role, p.main.before) for p in found if p.path.endswith("kernel")]
    [('layers_0/kernel', 'input', ''), ('layers_2/kernel', 'hidden', 'relu'), ('layers_4/kernel', 'readout', 'relu')]
    """
    program = faces.program(model, method=method)
    given = faces.as_inputs(x)
    leaves, tree = jax.tree_util.tree_flatten((given.args, dict(given.kwargs)), is_leaf=_is_described)
    places = [i for i, leaf in enumerate(leaves) if _is_described(leaf)]

    def join(dynamic: list[Any]) -> faces.Inputs:
        flat = list(leaves)
        for i, value in zip(places, dynamic, strict=True):
            flat[i] = value
        args, kwargs = jax.tree_util.tree_unflatten(tree, flat)
        return faces.Inputs(args, kwargs)

    inputs = [_struct(leaves[i]) for i in places]
    structs = _parameters(program, params, inputs, join)
    found = walked(program, structs, inputs, join)
    return Uses(found.parameters, found.additions, _tree(structs), found.branches, found.attentions, found.epsilons, found)


def _is_described(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _struct(x: Any) -> jax.ShapeDtypeStruct:
    """The array that a function is given in its place: 64 bits are 32, unless they are switched on."""
    known = isinstance(x.dtype, np.dtype)
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype) if known else x.dtype)


def _parameters(program: faces.Program, params: Any, inputs: list[Any], join: Any) -> Any:
    """The variables of a model, as abstract arrays."""
    if params is None:
        params = program.parameters
    if params is not None:
        return jax.eval_shape(lambda: params)
    if program.init is None:
        raise ValueError("params must be given for a plain function: a tree of arrays or of jax.ShapeDtypeStruct")
    init = program.init
    return jax.eval_shape(lambda dynamic: init(jax.random.key(0), join(dynamic)), inputs)


def _tree(structs: Any) -> Any:
    """The structure of the learned part of a model's variables."""
    if isinstance(structs, nnx.State):
        # Without the variables around the arrays: `nnx.Optimizer` has them when it starts and takes them off when it updates.
        return jax.tree_util.tree_structure(nnx.as_pure(nnx.filter_state(structs, nnx.Param)))
    if isinstance(structs, Mapping) and "params" in structs:
        return jax.tree_util.tree_structure(structs["params"])
    return jax.tree_util.tree_structure(structs)
