"""Sizes of every module's output, and their changes in training, over widths: the coordinate check."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from varscale.initialization.initialize import initialize
from varscale.measuring.instrument import Instrumented, Measured, instrument
from varscale.programs import faces
from varscale.programs.patterns import Pattern
from varscale.schemes.coordinate_table import CoordinateCheck, CoordinateRow
from varscale.schemes.embedding_factors import EMBEDDING
from varscale.schemes.extra_rows import UPDATE, with_extra_rows
from varscale.schemes.parametrization import Kind
from varscale.schemes.relative import ATTENTION, READOUT, Relative
from varscale.usage.parameters import named_leaves
from varscale.usage.table import uses

_KEY_OF_TARGETS = 1
_ROUNDING = 1e-5  # relative, of two sums of the same squares in float32


def coordinate_check(
    factory: Callable[..., Any],
    widths: Sequence[int],
    plan: Any,
    x: Any,
    *,
    loss: Callable[[Any], Any] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    kind: Kind | None = None,
    steps: int = 4,
    draws: int = 6,
    key: Any = None,
    rows: Pattern | Sequence[Pattern] = "**",
    method: str | None = None,
) -> CoordinateCheck:
    """Train a model for a few steps at several widths, and fit how module outputs and their changes grow with the width.

    Where a model is parametrized so that its best learning rate is that of any width, every size and every change has the
    exponent 0. Attention's scores have a row too, "attention.scores": what enters the softmax, before masks; where heads grow
    they must shrink before training, as scores divided by d_head do. Of each kernel it is told too what its update adds to the
    output, (W − W₀) x, where a wrong learning rate shows after one step. One program is compiled a width: all draws and steps
    are in it.

    An error grows or shrinks as √width or faster; at small widths what is sound has an exponent too. A finding is an exponent
    above .25 or below −.3 (above −.4 where −.5 is right, as of scores and readouts before training) by more than chance: where
    all exponents lie within these limits, a check has a finding with a probability of at most 1 %, however many rows and steps
    it has (Bonferroni, Student's t). A row without one whose own 99 % interval reaches ±.5, or whose exponent is nearer to
    that, is undecided: more widths, a wider range of widths or more draws narrow it. A batch of few examples shows updates
    best: they line up with what they were made for, and the more examples there are, the wider a layer must be to show it.

    Args:
        factory: a function of a width that returns a linen module or an nnx factory `lambda rngs: Net(..., rngs=rngs)`; a
            function of (width, rngs) that returns an nnx module will do.
        widths: two or more.
        plan: a scheme, such as `vs.schemes.mup(base=factory(64))`, that is applied at every width; a mapping from each width
            to its plan; or "declared": each model's own laws and the optimizer as it is, the standard parametrization.
        x: one batch of inputs, or `vs.inputs(...)`: arrays.
        loss: a function of the model's output that returns a scalar; by default half the mean square of its distance to random
            signs.
        optimizer: any optax optimizer, with the learning rate of the base; by default `optax.adam(0.01)`.
        kind: as in `plan.optimizer`.
        steps: steps of training.
        draws: initializations a width, each with a key of its own.
        key: a random key; by default key 0.
        rows: patterns of the rows that are measured.
        method: the method to run in place of `__call__`.

    Returns:
        CoordinateCheck: `.table()`, `.plot()`, `.findings`.

    Raises:
        TypeError: `factory` or `plan` is of no known kind.
        ValueError: fewer than two widths, a number below 1, inputs without numbers, or a scheme that the models do not fit.

    Source: Yang et al. 2022, "Tensor Programs V" (arXiv 2203.03466), appendix D.1.

    >>> import flax.linen as nn, jax, varscale as vs
    >>> def net(width):
    ...     return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(1)])
    >>> x = jax.random.normal(jax.random.key(1), (8, 4))
    >>> check = vs.coordinate_check(net, [32, 128, 512], "declared", x, steps=2)
    >>> check["layers_2"].grows, round(check["layers_2"].change.exponent, 1) > 0.3
    (True, True)
    """
    widths = _checked(widths, steps, draws)
    optimizer = optax.adam(0.01) if optimizer is None else optimizer
    key = jax.random.key(0) if key is None else key
    found, losses, terms, fans, missing = [], [], [], [], ()
    for width in widths:
        model = _model(factory, width)
        run = _Run(model, _plan_of(plan, width, model, x, method), x, loss, optimizer, kind, rows, method)
        rows_of_width, loss_of_width = run.measured(jax.random.split(jax.random.fold_in(key, width), draws), steps)
        found.append(rows_of_width)
        losses.append(loss_of_width)
        terms.append([attention.terms for attention in run.uses.attentions])
        fans.append(
            {leaf.path.rpartition("/")[0]: leaf.main.fan_in for leaf in run.uses if leaf.main and leaf.main.reduction_axes}
        )
        requirements = () if run.plan is None else run.plan.requirements
        missing = tuple(str(requirement) for requirement in requirements if requirement.status == "missing")
    heads_grow = all(len(set(of_attention)) == len(widths) for of_attention in zip(*terms, strict=False))
    growing = {module for module in fans[0] if all(x[module] < y.get(module, 0) for x, y in itertools.pairwise(fans))}
    return CoordinateCheck(tuple(widths), tuple(_rows(widths, found, heads_grow, growing)), np.stack(losses), missing)


def _checked(widths: Sequence[int], steps: int, draws: int) -> list[int]:
    widths = list(widths)
    if len(set(widths)) < 2 or len(set(widths)) < len(widths) or any(not isinstance(w, int) or w < 1 for w in widths):
        raise ValueError(f"widths must be two or more different integers of 1 or more, not {widths}")
    for name, value in (("steps", steps), ("draws", draws)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of 1 or more, not {value!r}")
    return sorted(widths)


def _model(factory: Callable[..., Any], width: int) -> Any:
    """The model of one width: a linen module, or an nnx factory of rngs."""
    if not callable(factory) or isinstance(factory, nn.Module):
        raise TypeError(f"factory must be a function of a width that returns a model, not {factory!r}")
    parameters = inspect.signature(factory).parameters.values()
    if "rngs" in [p.name for p in parameters]:
        return lambda rngs: factory(width, rngs=rngs)
    model = factory(width)
    if isinstance(model, nnx.Module):
        raise TypeError(
            "factory must return an nnx factory, since an nnx instance no longer holds its laws: "
            f"lambda width: lambda rngs: {type(model).__name__}(width, rngs=rngs)"
        )
    return model


def _plan_of(plan: Any, width: int, model: Any, x: Any, method: str | None) -> Any:
    """The plan of one width; None for the standard parametrization."""
    if isinstance(plan, str) and plan == "declared":
        return None
    if isinstance(plan, Mapping):
        if width not in plan:
            raise ValueError(f"plan must hold a plan for every width, and has none for {width}: {list(plan)}")
        return plan[width]
    if hasattr(plan, "laws_of"):
        raise TypeError(
            "plan must be a scheme, which makes a plan for every width, or a mapping from widths to plans: one plan fits one "
            "width alone"
        )
    if not callable(plan):
        raise TypeError(f"plan must be a scheme, a mapping from widths to plans, or 'declared', not {plan!r}")
    make = plan.at_any_width if isinstance(plan, Relative) else plan
    return make(model, x, method=method)


class _Run:
    """The training of one width."""

    def __init__(self, model: Any, plan: Any, x: Any, loss: Any, optimizer: Any, kind: Any, rows: Any, method: str | None):
        self.model, self.plan, self.x, self.rows, self.method = model, plan, x, rows, method
        self.loss = _distance if loss is None else loss
        self.uses = uses(model, x, method=method)
        self.optimizer = optax.with_extra_args_support(optimizer if plan is None else plan.optimizer(optimizer, kind=kind))
        self.program = faces.program(model, method=method)
        self.arrays, self.join = faces.split(faces.as_inputs(x))
        if any(isinstance(a, jax.ShapeDtypeStruct) for a in self.arrays):
            raise ValueError(f"x must hold arrays, since models are trained on it, not {x!r}")

    def measured(self, keys: Any, steps: int) -> tuple[list[list[dict[str, Measured]]], np.ndarray]:
        """By draw and step (0: before the first), what was measured of each row; and the losses, (draws, steps)."""
        drawn = [self._variables(key) for key in keys]
        self.structure = jax.tree_util.tree_structure(drawn[0])
        learned = [leaf.learned for leaf in named_leaves(drawn[0])]
        self.trained = [i for i, yes in enumerate(learned) if yes]
        leaves = jax.tree_util.tree_leaves(drawn[0])
        counts = [True] * 2 * len(leaves) + [False] * len(self.arrays)
        site = instrument(
            with_extra_rows(self._output), leaves, leaves, list(self.arrays), rows=self.rows, value=_whole, weights=counts,
            method=self.method or "__call__",
        )  # fmt: skip
        stacked = [jnp.stack(xs) for xs in zip(*map(jax.tree_util.tree_leaves, drawn), strict=True)]
        numbers, losses = jax.jit(lambda xs: jax.lax.map(functools.partial(self._trained, site, steps), xs))(stacked)
        flat = np.asarray(numbers.flat)
        rows = [
            [self._by_path(site, dataclasses.replace(numbers, flat=flat[draw, step])) for step in range(steps + 1)]
            for draw in range(len(drawn))
        ]
        return rows, np.asarray(losses)

    def _by_path(self, site: Instrumented, numbers: Any) -> dict[str, Measured]:
        """What was measured of each row, as the program would have it with its multipliers where they belong."""
        measured = {row.path: row for row in site.read(numbers) if not row.averaged}
        found = dict(measured)
        for module, factor in self._factors({_module(path): row.kind for path, row in found.items()}):
            for path in [path for path in found if _module(path) == module or _passes_on(measured, path, module)]:
                value = {name: x * factor**2 if name in ("size", "change") else x for name, x in found[path].value.items()}
                found[path] = found[path]._replace(value=value)
        return found

    def _factors(self, kinds: Mapping[str, str]) -> Iterator[tuple[str, float]]:
        """Rows that a multiplier is to be applied to, and the multiplier; `kinds`: the class of each row's module."""
        for requirement in () if self.plan is None else self.plan.requirements:
            module = requirement.where.rpartition("/")[0]
            if requirement.name == ATTENTION and requirement.status == "folded" and requirement.found:
                # Its query is smaller by what the scores would have been multiplied with.
                yield module, requirement.found / requirement.expected
            elif requirement.name == EMBEDDING and requirement.status == "folded" and requirement.found:
                # Layers of flax are multiplied by the program around them; what a model's own module gives has its factor.
                if hasattr(nn, kinds.get(module, "")) or hasattr(nnx, kinds.get(module, "")):
                    for row in (module, f"{module}.{UPDATE}"):
                        yield row, requirement.found / requirement.expected
            elif requirement.name == READOUT and requirement.status == "present":
                # The program multiplies what the module puts out; of a tied table that is another method's output.
                leaf = self.uses[requirement.where]
                tied = leaf.main is not None and leaf.main.role == "embedding"
                for row in (module + ".attend", f"{module}.{UPDATE}") if tied else (module,):
                    yield row, leaf.uses[-1].output_scale or 1.0

    def _variables(self, key: Any) -> Any:
        scheme = "declared" if self.plan is None else self.plan
        made = initialize(self.model, key, self.x, scheme=scheme, method=self.method)
        return nnx.split(made)[1] if isinstance(made, nnx.Module) else made

    def _output(self, leaves: list[Any], arrays: list[Any]) -> Any:
        return self.program.run(jax.tree_util.tree_unflatten(self.structure, leaves), self.join(arrays), None)

    def _trained(self, site: Instrumented, steps: int, leaves: list[Any]) -> Any:
        """What was measured of one draw, before training and after each step, and the loss before each step."""

        def whole(params: Any) -> list[Any]:
            full = list(leaves)
            for i, value in zip(self.trained, jax.tree_util.tree_leaves(params), strict=True):
                full[i] = value
            return full

        def loss(params: Any) -> tuple[Any, Any]:
            output, numbers = site.run(whole(params), leaves, list(self.arrays))
            return self.loss(output), numbers

        def step(carry: Any, number: Any) -> tuple[Any, Any]:
            params, state, first = carry
            (value, now), gradients = jax.value_and_grad(loss, has_aux=True)(params)
            first = jax.tree.map(lambda x, y: jnp.where(number == 0, x, y), now, first)
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as optax has it
                updates, state = self.optimizer.update(gradients, state, params)
                params = optax.apply_updates(params, updates)
            return (params, state, first), (_reduced(site, now, first), value)

        params = jax.tree_util.tree_unflatten(self.uses.tree, [leaves[i] for i in self.trained])
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            state = self.optimizer.init(params)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: loss(params)[1]))
        # One step more than asked: what is measured is what its forward pass makes.
        return jax.lax.scan(step, (params, state, nothing), jnp.arange(steps + 1))[1]


def _distance(output: Any) -> Any:
    """Half the mean square of an output's distance to random signs."""
    leaves = [y for y in jax.tree_util.tree_leaves(output) if jnp.issubdtype(jnp.result_type(y), jnp.floating)]
    if not leaves:
        raise ValueError("loss must be given: the model returns no floating-point array")
    keys = jax.random.split(jax.random.key(_KEY_OF_TARGETS), len(leaves))
    signs = [jax.random.rademacher(key, y.shape, y.dtype) for key, y in zip(keys, leaves, strict=True)]
    return sum(jnp.mean((y - t).astype(jnp.float32) ** 2) / 2 for y, t in zip(leaves, signs, strict=True))


def _whole(x: Any) -> dict[str, Any]:
    """The array itself in place of statistics: two runs are subtracted before anything is reduced."""
    return {"whole": jnp.abs(x) if jnp.issubdtype(x.dtype, jnp.complexfloating) else x}


def _reduced(site: Instrumented, now: Any, first: Any) -> Any:
    """Of every array its mean square, and that of its difference to the first, in the layout that `site.read` knows."""
    sizes, layout = [], []
    for place, name, tree, (shape,) in now.layout:
        kept = shape[: len(site.plan.sites[place].layers)]  # a scan over layers has a row a step
        count = int(np.prod(kept, dtype=int))
        sizes += [int(np.prod(shape, dtype=int)) // max(count, 1)] * count
        # Whether a branch ran is 0 or 1, and so its own square.
        layout.append((place, "size" if name == "whole" else name, tree, (kept,)))
    owner = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)

    def mean_squares(x: Any) -> Any:
        return jax.ops.segment_sum(x**2, owner, len(sizes), indices_are_sorted=True) / np.asarray(sizes, np.float32)

    changes = [(place, "change" if name == "size" else f"{name} again", tree, shape) for place, name, tree, shape in layout]
    both = jnp.concatenate([mean_squares(now.flat), mean_squares(now.flat - first.flat)])
    return dataclasses.replace(now, flat=both, layout=(*layout, *changes))


def _passes_on(rows: Mapping[str, Measured], path: str, module: str) -> bool:
    """Whether a row is that of a module around another, whose output it puts out as it is."""
    if module not in rows or not module.startswith(f"{path}/"):
        return False
    whole, inner = (rows[p].value["size"] for p in (path, module))
    return math.isclose(whole, inner, rel_tol=_ROUNDING)


def _module(path: str) -> str:
    """The path of the module that a row belongs to, with the method's name where it is another than `__call__`."""
    return re.split("[#@]", path)[0]


def _rows(
    widths: Sequence[int], found: list[list[list[dict[str, Measured]]]], heads_grow: bool, growing: Collection[str]
) -> list[CoordinateRow]:
    """The rows that all widths have, in order of execution.

    Args:
        widths: of the models.
        found: by width, draw and step, what was measured of each row.
        heads_grow: whether the heads of every attention do.
        growing: modules whose kernels sum over more terms the wider the model is.
    """
    first = found[0][0][0]
    common = [path for path in first if all(path in draws[0][0] for draws in found)]

    def squares(path: str, what: str) -> np.ndarray:
        return np.asarray([[[step[path].value[what] for step in draw] for draw in draws] for draws in found], np.float64)

    updates = dict[str, np.ndarray]()  # by the row that they are shown with
    for path in common:
        if first[path].kind == UPDATE:
            shown = _updated(path, common)
            updates[shown] = updates.get(shown, 0.0) + squares(path, "size")
    rows, narrow = [], set[str]()  # modules with a row of fixed shape that shrinks
    for path in common:
        if first[path].kind == UPDATE:
            continue
        is_fixed = len({draws[0][0][path].shape for draws in found}) == 1
        follows = any(path == module or path.startswith(f"{module}/") for module in narrow)
        own = np.sqrt(updates[path]) if path in updates else None
        rows.append(
            CoordinateRow(
                path, first[path].kind, tuple(widths), is_fixed, np.sqrt(squares(path, "size")),
                np.sqrt(squares(path, "change")), own, follows, heads_grow,
                is_fixed and own is not None and _module(path) in growing,
            )
        )  # fmt: skip
        if is_fixed and "/" in path and rows[-1].size_at(0).shrinks:  # taken alone, since what it excuses is more rows
            narrow.add(path.rpartition("/")[0])
    tests = sum(row.own_tests for row in rows)
    return [dataclasses.replace(row, tests=tests) for row in rows]


def _updated(path: str, rows: Sequence[str]) -> str:
    """The row that a kernel's update is shown with: that of its module, at the same step of loops over layers."""
    module = _module(path).removesuffix(f".{UPDATE}")
    steps = "".join(re.findall(r"@\d+", path))
    shown = (f"{name}{steps}" for name in (f"{module}.attend", module))
    return next((row for row in shown if row in rows), "")
