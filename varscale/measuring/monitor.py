"""Statistics of activations and gradients during training: a step that measures itself every k-th time."""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from varscale.measuring import rows, selection
from varscale.measuring import sinks as sink_files
from varscale.measuring.instrument import Instrumented, instrument
from varscale.measuring.records import STEP, TIME, Records
from varscale.measuring.rows import AS_THEY_ARE
from varscale.measuring.steps import Call, Options, calling, has_graph, is_compiled
from varscale.programs.patterns import Pattern
from varscale.report import Report

_ACTIVATION = ("mean", "second_moment", "variance", *AS_THEY_ARE)
_GRADIENT = {"second_moment": "gradient", "nonfinite_share": "gradient_nonfinite_share"}  # key -> attribute of `Row`
_FORWARD_MODE = "No gradients of rows: the step differentiates in forward mode, which marks of cotangents do not allow."
_KEPT = 1000  # records that stay in memory


class _Measured(NamedTuple):
    """The measured step: its statistics, the compiled function of the leaves, and where that wants each leaf."""

    instrumented: Instrumented
    run: Callable[..., Any]
    shardings: list[Any]


class Monitor:
    """A training step that is called as the step is, and measures itself every k-th time.

    There are two compiled steps: the plain one, which is the step as it was given, and one with the statistics of every module
    call as further outputs, which runs every k-th time, the first time included. On all other steps nothing is read back to the
    host. The model and the optimizer are not edited, and the loop stays as it is.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, varscale as vs
    >>> model, x = nn.Dense(4), jnp.ones((2, 3))
    >>> @jax.jit
    ... def step(params, x):
    ...     gradients = jax.grad(lambda params: model.apply(params, x).mean())(params)
    ...     return jax.tree.map(lambda w, g: w - 0.1 * g, params, gradients)
    >>> step = vs.Monitor(step, every=100)  # sinks=["run.jsonl"]
    >>> params = model.init(jax.random.key(0), x)
    >>> for _ in range(200):
    ...     params = step(params, x)
    >>> step.records.steps, step.records[0]["gradient/second_moment/"]
    (array([  0, 100]), 0.015625)

    A record holds "activation/second_moment/<path>" and "gradient/second_moment/<path>" for each row, and likewise the other
    statistics; inside a loop over parts of a batch they are means over its steps. Paths are those of `vs.probe`; where a step
    is given several nnx models they begin with the argument's name. For gradients of parameters and for updates put
    `optax.snapshot`, `optax.monitor` or `optax.measure_with_ema` into the optimizer: the scalars that they measure are recorded
    as "optax/<name>".

    Attributes:
        count: number of the next step.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        *,
        every: int = 100,
        rows: Pattern | Sequence[Pattern] = "**",
        stats: Any = "fast",
        sinks: Iterable[Any] = (),
        first_step: int = 0,
        static_argnums: int | Sequence[int] = (),
        static_argnames: str | Sequence[str] = (),
        donate_argnums: int | Sequence[int] = (),
        donate_argnames: str | Sequence[str] = (),
    ):
        """Wrap a step; nothing is compiled yet.

        Args:
            step: a function that computes and applies one update, or what `jax.jit` or `nnx.jit` made of it. nnx models and
                optimizers must be arguments of it.
            every: how many steps lie between two measurements.
            rows: patterns of the rows that are measured, as `vs.probe` has them.
            stats: "fast" or "full", as `vs.probe` has them.
            sinks: paths of JSON lines files (".jsonl") or of directories for TensorBoard, SummaryWriters, objects with
                `write_scalars(step, dict)`, and functions f(step, dict), such as
                `lambda step, numbers: wandb.log(numbers, step=step)`. In a run of several processes the first one writes.
            first_step: number of the first step, of a run that is resumed.
            static_argnums: static arguments of the step, as `jax.jit` takes them, where they cannot be seen: of a step that is
                not compiled, or compiled by `nnx.jit` with names.
            static_argnames: likewise.
            donate_argnums: donated arguments, of a step that is not compiled.
            donate_argnames: likewise.

        Raises:
            TypeError: `step` cannot be called or is compiled ahead of time, or a sink is none.
            ValueError: `every`, `stats` or a sink is not allowed, or arguments of a compiled step are named as donated.
        """
        if not callable(step) or isinstance(step, jax.stages.Compiled):
            raise TypeError(f"step must be a function, or what jax.jit or nnx.jit made of one, not {step!r}")
        if isinstance(every, bool) or not isinstance(every, int | np.integer) or every < 1:
            raise ValueError(f"every must be a whole number from 1 on, not {every!r}")
        if is_compiled(step) and (donate_argnums != () or donate_argnames != ()):
            raise ValueError("donated arguments are named for a step that is not compiled; this one is, so that they are seen")
        self._step = step
        self._every = int(every)
        self._rows = rows
        self._reducer = selection.chosen(stats)
        self._report: Report | None = None
        if isinstance(sinks, str | os.PathLike):
            raise TypeError(f"sinks must be a sequence of sinks, not {sinks!r}; give [{sinks!r}]")
        self._sinks = [sink_files.as_sink(sink) for sink in sinks]
        self._options = Options(
            _several(static_argnums), _several(static_argnames), _several(donate_argnums), _several(donate_argnames)
        )
        self._plain = step if is_compiled(step) else None
        self._measured: dict[Hashable, _Measured] = {}
        self._latest: deque[tuple[int, float, tuple[str, ...], np.ndarray]] = deque(maxlen=_KEPT)
        self.count = int(first_step)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step: what the step returns.

        Raises:
            ValueError: the step calls no module, a pattern of `rows` matches no row, or static arguments cannot be told.
            Exception: what the step raises.
        """
        if self._plain is None:
            compiler = nnx.jit if has_graph((args, kwargs)) else jax.jit
            self._plain = compiler(self._step, **self._options.given())
        run = self._measure if self.count % self._every == 0 else self._plain
        output = run(*args, **kwargs)
        self.count += 1
        return output

    @property
    def report(self) -> Report:
        """The latest measurement as a report: `monitor.report.first_nonfinite`, `.compare(predicted)` and so on.

        Raises:
            ValueError: nothing was measured yet.
        """
        if self._report is None:
            raise ValueError("nothing was measured yet: the first step that is called is")
        return self._report

    @property
    def records(self) -> Records:
        """The latest 1000 records."""
        return Records(
            {STEP: step, TIME: when, **dict(zip(keys, values.tolist(), strict=True))}
            for step, when, keys, values in self._latest
        )

    def plot(self) -> Any:
        """Each statistic of `records` by step and depth, as `Records.plot` draws it.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: nothing was recorded yet.
        """
        return self.records.plot()

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Records:
        """The records of a JSON lines file that a Monitor wrote; what a killed process left of the last line is left out.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a line is no record; its number is named.
        """
        return sink_files.read(path)

    def _measure(self, *args: Any, **kwargs: Any) -> Any:
        assert self._plain is not None
        with calling(self._plain, self._options, args, kwargs) as call:
            measured = self._measured.get(call.key) or self._measured.setdefault(call.key, self._compiled(call))
            output, numbers = measured.run(*map(_placed, call.leaves, measured.shardings))
            result = call.finish(output)
        notes = () if measured.instrumented.gradients else (_FORWARD_MODE,)
        self._report = rows.report(measured.instrumented.read(numbers), notes=notes)
        self._record({**_scalars(self._report), **_optax_scalars(output)})
        return result

    def _compiled(self, call: Call) -> _Measured:
        instrumented = instrument(call.function, *call.leaves, rows=self._rows, value=self._reducer)
        if not instrumented.plan.sites:
            raise ValueError(
                "step calls no module, so there is nothing to measure: give a step that calls `apply` of a linen module, or "
                "takes its nnx model as an argument (one in a closure, or one that it merges from a graphdef, is not seen)"
            )
        donated, shardings, out_shardings = _placement(call)
        options: dict[str, Any] = {} if out_shardings is None else {"out_shardings": (out_shardings, None)}
        return _Measured(instrumented, jax.jit(instrumented.run, donate_argnums=donated, **options), shardings)

    def _record(self, scalars: Mapping[str, float]) -> None:
        values = np.array(list(scalars.values()), np.float64)
        keys = self._latest[-1][2] if self._latest and self._latest[-1][2] == tuple(scalars) else tuple(scalars)
        self._latest.append((self.count, time.time(), keys, values))
        if jax.process_index() != 0:
            return
        for sink in self._sinks:
            try:
                sink(self.count, scalars)
            except Exception as error:  # training goes on
                warnings.warn(f"the record of step {self.count} did not reach a sink: {error!r}", RuntimeWarning, stacklevel=4)


def _placement(call: Call) -> tuple[tuple[int, ...], list[Any], Any]:
    """Which leaves the compiled step donates, where it wants them, and where it puts its outputs; None where that is open."""
    traced, shapes = jax.make_jaxpr(call.function, return_shape=True)(*call.leaves)
    jaxpr = traced.jaxpr
    nowhere: list[Any] = [None] * len(call.leaves)
    if len(jaxpr.eqns) != 1 or jaxpr.eqns[0].primitive.name not in ("jit", "pjit"):
        return (), nowhere, None
    eqn = jaxpr.eqns[0]

    def wanted(sharding: Any) -> Any:
        return sharding if isinstance(sharding, jax.sharding.Sharding) else None

    places = {v: place for place, v in enumerate(jaxpr.invars)}
    inside = [
        (places[v], donated, wanted(s))
        for v, donated, s in zip(eqn.invars, eqn.params["donated_invars"], eqn.params["in_shardings"], strict=True)
        if v in places
    ]
    found = dict(zip(eqn.outvars, map(wanted, eqn.params["out_shardings"]), strict=True))
    shardings = {place: sharding for place, _, sharding in inside}
    out = [found.get(v) for v in jaxpr.outvars]
    tree = jax.tree.structure(shapes)
    return (
        tuple(place for place, donated, _ in inside if donated),
        [shardings.get(place) for place in range(len(call.leaves))],
        jax.tree.unflatten(tree, out) if any(s is not None for s in out) else None,
    )


def _placed(leaf: Any, sharding: Any) -> Any:
    return leaf if sharding is None else jax.device_put(leaf, sharding)


def _scalars(report: Report) -> dict[str, float]:
    """The numbers of the rows by key."""
    found: dict[str, float] = {}
    for row in report.rows:
        numbers = {f"activation/{name}": getattr(row, name) for name in _ACTIVATION}
        numbers |= {f"gradient/{name}": getattr(row, attribute) for name, attribute in _GRADIENT.items()}
        numbers |= {f"activation/{name}": value for name, value in row.custom.items()}
        found |= {f"{name}/{row.path}": value for name, value in numbers.items() if value is not None}
    return found


def _optax_scalars(output: Any) -> dict[str, float]:
    """Scalars that `optax.snapshot` and `optax.monitor` left in an optimizer's state."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(output)[0]:
        keys = [_text(key) for key in path]
        for name in ("measurement", "measurements"):
            if name in keys[:-1] and np.ndim(leaf) == 0:
                inside = keys[keys.index(name) + 1 :]
                found["/".join(["optax", *(key for key in inside if key != "value")])] = leaf
    return {key: float(value) for key, value in jax.device_get(found).items()}


def _text(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _several(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, int | str) else tuple(value)
