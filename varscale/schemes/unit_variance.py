"""`lsuv`: kernels rescaled on data, so that what each makes has variance 1 (Mishkin & Matas 2016)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from varscale import _compat
from varscale.measuring import reducers
from varscale.measuring.instrument import Replay, in_order
from varscale.measuring.passes import Arrays, Pass, Variables
from varscale.measuring.reducers import Statistics
from varscale.measuring.sites import Place
from varscale.programs import faces
from varscale.programs.patterns import Pattern, rows_caught
from varscale.programs.trees import open_tree
from varscale.schemes.kernel_products import Product, Products, products, scaled
from varscale.schemes.rescaling_account import Account, Rescaled

P = TypeVar("P")
_SWEEPS = 5
_NO_EFFECT = 0.1  # of what a factor should have changed: below that the program divides the kernel by its own scale


def lsuv(
    model: Any,
    params: P,
    x: Any,
    *,
    tolerance: float = 0.01,
    rows: Pattern | Sequence[Pattern] = "**",
    rngs: Any = None,
    method: str | None = None,
) -> tuple[P, Account]:
    """Rescales kernels on data so that what each one makes of its input has standard deviation 1 (Mishkin & Matas 2016).

    The whole model runs once a sweep, in one jitted function: when the product of a kernel and its input is made, its standard
    deviation is measured, product and kernel are divided by it, and the pass goes on. So every kernel that is used once is
    right after one sweep, at any depth. Kernels that are used again (tied layers, recurrent cells) have one factor for all
    uses, whose geometric mean is brought to 1; that may take up to 5 sweeps.

    Dense layers, convolutions, einsums and attention are alike here: what counts is what the program does. Packed kernels are
    rescaled by part (query, key and value; gates), kernels that a scan stacks by layer. Biases, embeddings, norms and kernels
    that are zero keep their values, and so does a kernel that the program normalises; the account says so. Where a bias that is
    not zero is added to a product (in the paper all are zero), the mean square of the sum is brought to 1. The method sets
    scales only: draw the kernels orthogonal first, as the paper does, with `vs.reinitialize(params, {"**/kernel":
    vs.orthogonal()}, key)`.

    Args:
        model: a linen module, an nnx instance, an nnx factory `lambda rngs: Net(..., rngs=rngs)`, or a function
            f(params, *args).
        params: the variables that `model.init` returns; for nnx None (the model's own) or the state that `nnx.split` returns;
            for a function any tree of arrays. They are not changed.
        x: a batch of data, or `vs.inputs(*args, **kwargs)`: arrays.
        tolerance: largest |std − 1| at the end.
        rows: patterns of the kernels that are rescaled, by the path of the kernel or of a module that it is in:
            "blocks/*/mlp". Each pattern must match one.
        rngs: a key or a dict of keys by stream, for dropout and the like.
        method: the method to run in place of `__call__`.

    Returns:
        The parameters, of the same kind (with `params=None` of an nnx instance a new model, of a factory the state), and the
        account: each product's standard deviation before and after, and the factor on its kernel.

    Raises:
        TypeError: the model or an argument is of no known kind.
        ValueError: an argument is outside its range, the model does not run on these parameters and inputs, a parameter holds
            NaN or infinities, a kernel that is not zero puts out a constant or a number that is not finite, or no kernel is
            left to rescale.

    Example:
        >>> import flax.linen as nn, jax, varscale as vs
        >>> net = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(64), nn.tanh, nn.Dense(10)])
        >>> x = jax.random.normal(jax.random.key(0), (256, 32))
        >>> params, account = vs.lsuv(net, net.init(jax.random.key(1), x), x)
        >>> [round(row.after, 3) for row in account.rows], account.sweeps
        ([1.0, 1.0, 1.0], 1)
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be a number between 0 and 1, not {tolerance!r}")
    program = faces.program(model, method=method)
    inputs = Arrays.of(faces.as_inputs(x))
    weights = Variables.of(program, params, inputs)
    _check(weights, inputs)
    one = Pass(program, weights, inputs, None, rngs)

    def forward(leaves: list[Any], arrays: list[Any]) -> Any:
        output = one.output(leaves, arrays)
        return [leaf for leaf in jax.tree_util.tree_leaves(output) if isinstance(leaf, jax.Array)]

    closed = jax.make_jaxpr(forward)(weights.leaves, inputs.arrays)
    found = products(closed.jaxpr, len(closed.consts), weights.paths, weights.trained, weights.leaves)
    run = _Run(closed, found, weights, inputs.arrays, _chosen(found, weights, rows))
    leaves, account = run.to_unit_variance(tolerance)
    kind = model if params is None and isinstance(model, nnx.Module) else params if params is not None else None
    if kind is None:
        return jax.tree_util.tree_unflatten(weights.tree, leaves), account
    return open_tree(kind, "params").rebuild(leaves), account


def _check(weights: Variables, inputs: Arrays) -> None:
    """Refuse inputs without numbers and parameters that are not finite."""
    for array in inputs.arrays:
        if isinstance(array, jax.ShapeDtypeStruct):
            raise ValueError(f"x must hold arrays, since it is measured what becomes of them, not {array!r}")
    for i in weights.trained:
        leaf = weights.leaves[i]
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(f"params: {weights.paths[i]!r} is a jax.ShapeDtypeStruct; give arrays")
        if not bool(jnp.all(jnp.isfinite(leaf))):
            raise ValueError(f"params: {weights.paths[i]!r} holds NaN or infinities")


def _chosen(found: Products, weights: Variables, rows: Any) -> set[Place]:
    """The products whose kernels are rescaled: those that a pattern names and whose kernels are not zero.

    Raises:
        ValueError: there is no such kernel.
    """
    if not found.at:
        told = "; ".join(f"{path}: {why}" for path, why in found.left_alone.items())
        raise ValueError(f"model multiplies its inputs by no kernel that lsuv could rescale{': ' * bool(told)}{told}")
    paths = {place: [weights.paths[i] for i in product.leaves] for place, product in found.at.items()}
    known = dict.fromkeys(path for named in paths.values() for path in named)
    caught = set(rows_caught(rows, known, "rows"))
    zero = {weights.paths[i] for product in found.at.values() for i in product.leaves if not bool(jnp.any(weights.leaves[i]))}
    chosen = {place for place, named in paths.items() if caught.intersection(named) - zero}
    found.left_alone.update(dict.fromkeys((path for path in known if path in zero), "zero"))
    if not chosen:
        raise ValueError(f"params: the kernels {', '.join(sorted(caught)[:4])} are zero: there is nothing to rescale")
    return chosen


class _Rescaling(Replay):
    """Evaluates a program anew; the products with kernels are measured, and divided by their standard deviation."""

    def __init__(self, found: Products, chosen: set[Place], active: Any):
        super().__init__(found.plan, reducers.fast, reducers.cotangent)
        self.found, self.chosen, self.active = found, chosen, active

    def at_site(self, place: Place, eqn: Any, values: list[Any]) -> tuple[Sequence[Any], Statistics]:
        product = self.found.at[place]
        if product.bias is not None:
            y, told = self._beside_bias(place, eqn, values)
        else:
            (y,) = _compat.evaluated(eqn, values)
            mean, variance = product.by_entry(y)
            told: Statistics = {"variance": variance, "mean": mean, "square": jnp.sum(jnp.square(mean), -1)}
            if place in self.chosen and not product.is_shared:
                told["factor"] = jnp.where(self.active, _inverse_root(variance), 1.0)
                y = product.again(eqn, values, y, told["factor"])
        if self.plan.sites[place].conditional:
            told["ran"] = jnp.float32(1)
        return [y], told

    def _beside_bias(self, place: Place, eqn: Any, values: list[Any]) -> tuple[Any, Statistics]:
        """The sum of a product and a bias, of which the mean square is brought to 1: a s² + 2 c s + b = 1."""
        product = self.found.at[place]
        assert product.bias is not None
        y, bias = values[1 - product.bias], jnp.broadcast_to(values[product.bias], values[1 - product.bias].shape)
        (out,) = _compat.evaluated(eqn, values)
        a, b, whole = (product.mean_square(x) for x in (y, bias, out))
        told: Statistics = {"variance": whole, "mean": jnp.zeros((*whole.shape, 1)), "square": jnp.zeros(whole.shape)}
        if place in self.chosen:
            c = (whole - a - b) / 2
            exact = (jnp.sqrt(jnp.maximum(c**2 + a * (1 - b), 0)) - c) / jnp.where(a > 0, a, 1.0)
            # A bias whose own mean square is 1 or more: no scale does it, and the product alone is brought to 1.
            factor = jnp.where((b < 1) & (a > 0), exact, _inverse_root(a))
            told["factor"] = jnp.where(self.active & (jnp.abs(whole - 1) > 1e-6), factor, 1.0)
            values = list(values)
            values[1 - product.bias] = product.times(y, told["factor"])
            (out,) = _compat.evaluated(eqn, values)
        return out, told


def _inverse_root(x: Any) -> Any:
    """1/√x, and 1 for 0."""
    return jnp.where(x > 0, jax.lax.rsqrt(jnp.where(x > 0, x, 1.0)), 1.0)


class _Run:
    """The sweeps over one model."""

    def __init__(self, closed: Any, found: Products, weights: Variables, arrays: list[Any], chosen: set[Place]):
        self.found, self.weights, self.arrays, self.chosen = found, weights, arrays, chosen
        self.shared = sorted({i for place in chosen if found.at[place].is_shared for i in found.at[place].leaves})

        def sweep(leaves: list[Any], arrays: list[Any], factors: Any, active: Any) -> tuple[dict[int, Any], Any]:
            """The kernels that are rescaled; and what was measured."""
            leaves = list(leaves)
            for k, i in enumerate(self.shared):
                leaves[i] = scaled(leaves[i], factors[k])
            replay = _Rescaling(found, chosen, active)
            _, measured = replay.run(closed.jaxpr, closed.consts, [*leaves, *arrays])
            changed = {i: leaves[i] for i in self.shared}
            for place, told in measured.items():
                if "factor" not in told:
                    continue
                factor = told["factor"] if "ran" not in told else jnp.where(told["ran"][..., None] > 0, told["factor"], 1.0)
                for i in found.at[place].leaves:
                    changed[i] = found.at[place].scaled_kernel(changed.get(i, leaves[i]), factor)
            return changed, measured

        self._sweep = jax.jit(sweep)

    def to_unit_variance(self, tolerance: float) -> tuple[list[Any], Account]:
        """The leaves, rescaled, and the account."""
        leaves = [jnp.asarray(x) for x in self.weights.leaves]
        start, before = leaves, self._deviations(leaves, {}, active=False)[1]
        after, sweeps, memory = before, 0, _Secant(self.found.at, self.chosen)
        dropped: set[int] = set()
        while sweeps < _SWEEPS and not self._is_done(after, tolerance, dropped):
            factors = memory.factors(after)
            leaves, met = self._deviations(leaves, factors, active=True)
            self._refuse(met, leaves)
            reached = self._deviations(leaves, {}, active=False)[1]
            sweeps += 1
            for i in self._without_effect(met, reached, tolerance) - dropped:
                dropped.add(i)
                leaves[i] = start[i]
                self.found.left_alone[self.weights.paths[i]] = "its scale has no effect: the program normalises it"
            if dropped:
                reached = self._deviations(leaves, {}, active=False)[1]
            after = reached
        return leaves, self._account(before, after, start, leaves, sweeps, tolerance, dropped)

    def _deviations(self, leaves: list[Any], factors: dict[int, float], *, active: bool) -> tuple[list[Any], dict[Place, Any]]:
        """The leaves after a sweep, and each product's standard deviation as it was met: (*layers, parts)."""
        given = jnp.asarray([factors.get(i, 1.0) for i in self.shared], jnp.float32)
        changed, measured = self._sweep(leaves, self.arrays, given, jnp.asarray(active))
        found = {}
        for place, told in jax.device_get(measured).items():
            # Over the steps of a loop, variances are means: what the steps' means add is their own variance.
            spread = told["variance"] + told["square"] - np.sum(np.square(told["mean"]), -1)
            found[place] = np.where(told.get("ran", np.ones(()))[..., None] > 0, np.sqrt(np.maximum(spread, 0)), 1.0)
        return [changed.get(i, x) for i, x in enumerate(leaves)], found

    def _is_done(self, stds: dict[Place, Any], tolerance: float, dropped: set[int]) -> bool:
        shared: dict[int, list[float]] = {}
        for place in self.chosen:
            product, std = self.found.at[place], stds[place]
            if dropped.intersection(product.leaves):
                continue
            if product.is_shared:
                for i in product.leaves:
                    shared.setdefault(i, []).append(_mean_log(std))
            elif not np.all(np.abs(std - 1) <= tolerance):
                return False
        return all(abs(math.expm1(sum(logs) / len(logs))) <= tolerance for logs in shared.values())

    def _refuse(self, stds: dict[Place, Any], leaves: list[Any]) -> None:
        """Refuse outputs that have no variance or are not finite.

        Raises:
            ValueError: one is such.
        """
        for place in sorted(self.chosen):
            std, path = stds[place], self.found.plan.sites[place].mark.path
            if not np.all(np.isfinite(std)):
                raise ValueError(f"{path!r}: what this kernel makes is not finite; the inputs or a layer before it overflow")
            if not np.all(std > 0):
                raise ValueError(
                    f"{path!r}: what this kernel makes is one number everywhere (variance 0), so no scale gives it variance 1: "
                    f"the kernel or its input is zero or constant. Draw it anew, or leave it out with rows="
                )

    def _without_effect(self, met: dict[Place, Any], reached: dict[Place, Any], tolerance: float) -> set[int]:
        """Kernels whose products a factor has not changed: the program divides them by their own scale."""
        found: set[int] = set()
        for place in self.chosen:
            product = self.found.at[place]
            asked = float(np.mean(np.abs(np.log(met[place]))))
            left = float(np.mean(np.abs(np.log(np.maximum(reached[place], 1e-30)))))
            if not product.is_shared and product.bias is None and asked > tolerance and left > (1 - _NO_EFFECT) * asked:
                found.update(product.leaves)
        return found

    def _account(
        self, before: Any, after: Any, start: list[Any], leaves: list[Any], sweeps: int, tolerance: float, dropped: set[int]
    ) -> Account:
        plan = self.found.plan
        made: list[tuple[tuple[int, ...], Rescaled]] = []
        for place, product in self.found.at.items():
            site = plan.sites[place]
            is_changed = place in self.chosen and not dropped.intersection(product.leaves)
            note = "shared: one factor for all its uses" if product.is_shared and is_changed else ""
            for steps in np.ndindex(*site.layers):
                for k, part in enumerate(product.parts):
                    path = site.row(steps) + (f"[{part}]" if part else "")
                    stds = float(before[place][*steps, k]), float(after[place][*steps, k])
                    factor = _factor(product, start, leaves, steps, k) if is_changed else None
                    made.append((in_order(plan, place, steps), Rescaled(path, site.shape, *stds, factor, note)))
        rows = tuple(row for _, row in sorted(made, key=lambda pair: pair[0]))
        return Account(rows, sweeps, tolerance, dict(self.found.left_alone))


def _factor(product: Product, start: list[Any], leaves: list[Any], steps: Sequence[int], part: int) -> float:
    """The factor on the entries of a kernel that make one part, at one layer."""
    i = product.leaves[0]
    where: list[Any] = [slice(None)] * leaves[i].ndim
    for axis, first, stop in product.region:
        where[axis] = slice(first, stop)
    for axis, step in zip(product.layers, steps, strict=True):
        where[axis] = step
    if product.groups is not None:
        where[product.axis] = np.flatnonzero(product.groups == part)
    old, new = (np.asarray(jnp.abs(x[i][tuple(where)]), np.float64) for x in (start, leaves))
    return float(np.sqrt(np.sum(np.square(new)) / np.sum(np.square(old)))) if np.any(old) else 1.0


def _mean_log(std: Any) -> float:
    return float(np.mean(np.log(np.maximum(std, 1e-30))))


class _Secant:
    """The factors of kernels that are used more than once, from one sweep to the next.

    The logarithm of the geometric mean of a kernel's deviations is taken to be linear in the logarithm of its scale. At first
    its slope is what a chain of linear layers has: use k of n carries k factors, (n + 1)/2 on average.
    """

    def __init__(self, at: dict[Place, Product], chosen: set[Place]):
        self._places: dict[int, list[Place]] = {}
        for place in sorted(chosen):
            if at[place].is_shared:
                for i in at[place].leaves:
                    self._places.setdefault(i, []).append(place)
        self._last: dict[int, tuple[float, float]] = {}
        self._slopes = {i: (len(places) + 1) / 2 for i, places in self._places.items()}

    def factors(self, stds: dict[Place, Any]) -> dict[int, float]:
        """The next factor of each kernel."""
        found: dict[int, float] = {}
        for i, places in self._places.items():
            level = float(np.mean([_mean_log(stds[place]) for place in places]))
            if i in self._last:
                step, before = self._last[i]
                if abs(step) > 1e-6 and math.isfinite(level - before):
                    self._slopes[i] = float(np.clip((level - before) / step, 0.2, 10 * self._slopes[i]))
            step = -level / self._slopes[i] if math.isfinite(level) else -math.log(10)
            self._last[i] = step, level
            found[i] = math.exp(step)
        return found
