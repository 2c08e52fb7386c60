"""Laws laid on leaves by pattern, in place of those that the model declares."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varscale import _compat
from varscale.initialization.chains import params_text
from varscale.initialization.derivation import fold_in, is_traced
from varscale.initialization.graph import Value, is_key
from varscale.initializers.combinators import Fused
from varscale.initializers.initializer import Initializer
from varscale.initializers.sampling import unrolled_key
from varscale.initializers.scaling import VarianceScaling
from varscale.initializers.structured import Constant, Orthogonal
from varscale.programs.content import Same, Unknown, content
from varscale.programs.patterns import Pattern, matches, text

Law = Callable[..., Any]
_LAYOUT = frozenset({"reshape", "transpose", "squeeze", "expand_dims", "convert_element_type", "copy", "sharding_constraint"})


@dataclasses.dataclass(frozen=True)
class Laid:
    """A law for one leaf.

    Attributes:
        law: the initializer.
        pattern: the pattern that named the leaf, as the user wrote it; "" where a function did.
        by_name: whether the pattern names the leaf itself, and not a module above it.
        of_leaf: whether the law is one of the whole leaf, as a plan's are, and not of what the layer's own initializer sees.
    """

    law: Law
    pattern: str
    by_name: bool
    of_leaf: bool = False


def is_unapplied(scheme: Any) -> bool:
    """Whether it is a scheme, such as `vs.schemes.gpt2()`, that has not been applied to a model yet."""
    return callable(scheme) and isinstance(getattr(scheme, "call", None), str)


def applied(scheme: Any, model: Any, x: Any, *, params: Any = None, method: str | None = None) -> Any:
    """The plan of a scheme that is not applied to a model yet; anything else as it is.

    Raises:
        ValueError: there is no input, by which the scheme reads what the model does with its parameters.
    """
    if not is_unapplied(scheme):
        return scheme
    if x is None:
        raise ValueError(f"x must be given with the scheme {scheme.call}, which reads what the model does with its parameters")
    return scheme(model, x, params=params, method=method)


def laid(scheme: Any, leaves: Sequence[tuple[str, tuple[int, ...], np.dtype, bool]], argument: str) -> list[Laid | None]:
    """The law that a scheme lays on each leaf; None where it leaves the leaf alone.

    Args:
        scheme: a mapping from path patterns to initializers, of which the first that matches counts; a function of
            (path, shape, dtype) to an initializer or None; or a `vs.Plan`, whose `laws_of` gives the law of every parameter.
        leaves: path, shape, dtype and whether it is a parameter, of each leaf. Parameters are seen without linen's "params/";
            other variables only by patterns that name their collection.
        argument: what errors call the scheme.

    Raises:
        TypeError: the scheme is neither, or a law is no initializer.
        ValueError: a pattern matches nothing.
    """
    if isinstance(scheme, Mapping):
        return _by_pattern(scheme, leaves, argument)
    if hasattr(scheme, "laws_of"):
        return _by_plan(scheme, leaves)
    if is_unapplied(scheme):
        raise TypeError(f"{argument} must be the plan of a scheme: scheme(model, x), not {scheme.call} alone")
    if not callable(scheme):
        raise TypeError(
            f"{argument} must be 'declared', a vs.Plan, a mapping from path patterns to initializers or a function of "
            f"(path, shape, dtype), not {scheme!r}"
        )
    found: list[Laid | None] = []
    for path, shape, dtype, is_parameter in leaves:
        law = scheme(path.removeprefix("params/"), shape, dtype) if is_parameter else None
        found.append(None if law is None else Laid(_checked(law, path, argument), "", True))
    return found


def _by_pattern(
    scheme: Mapping[Pattern, Law], leaves: Sequence[tuple[str, tuple[int, ...], np.dtype, bool]], argument: str
) -> list[Laid | None]:
    idle = dict.fromkeys(scheme)
    found: list[Laid | None] = []
    for path, shape, _, is_parameter in leaves:
        hit = None
        for pattern, law in scheme.items():
            names = (path.removeprefix("params/"), path) if is_parameter else (path,) * _names_collection(pattern, path)
            if any(matches(pattern, name) for name in names):
                idle.pop(pattern, None)
                now = Laid(_checked(law, text(pattern), argument), text(pattern), _names_leaf(pattern, path))
                # A law that asks for fans and is laid on a whole module is for its weights.
                serves = now.by_name or not _is_no_weight(path, shape) or not _needs_fans(now.law)
                hit = hit or (now if serves else None)
        found.append(hit)
    if idle:
        names = [path.removeprefix("params/") for path, *_, is_parameter in leaves if is_parameter]
        known = ", ".join(names[:6]) + ", ..." * (len(names) > 6)
        raise ValueError(f"{argument}: {', '.join(map(text, idle))} matches no parameter of the model ({known})")
    return found


def _by_plan(plan: Any, leaves: Sequence[tuple[str, tuple[int, ...], np.dtype, bool]]) -> list[Laid | None]:
    laws = plan.laws_of({path.removeprefix("params/"): shape for path, shape, _, is_parameter in leaves if is_parameter})
    found = [laws[path.removeprefix("params/")] if is_parameter else None for path, _, _, is_parameter in leaves]
    return [None if law is None else Laid(law, "", True, of_leaf=True) for law in found]


def _checked(law: Any, where: str, argument: str) -> Law:
    if law == "declared":
        raise ValueError(
            f"{argument}: 'declared' at {where!r} is no law: layers do not keep their initializers; what no pattern matches is "
            "left as it is, and vs.initialize(factory, key) draws the declared laws"
        )
    if not callable(law) or inspect.isclass(law):
        raise TypeError(f"{argument}: the law of {where!r} must be an initializer (key, shape, dtype) -> weights, not {law!r}")
    if _makes_laws(law):
        called = getattr(law, "__name__", repr(law))
        raise TypeError(f"{argument}: the law of {where!r} is {called}, which makes initializers: call it, {called}()")
    return law


def _makes_laws(law: Law) -> bool:
    """Whether it is a function such as `he_normal`, that was not called."""
    try:
        parameters = inspect.signature(law).parameters.values()
    except (TypeError, ValueError):
        return False
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    known = {"in_axis", "out_axis", "batch_axis", "dtype", "stddev", "scale", "column_axis", "fans"}
    names = {p.name for p in parameters}
    return not required and (not names or not known.isdisjoint(names)) and "key" not in names


def _names_collection(pattern: Pattern, path: str) -> bool:
    return isinstance(pattern, str) and pattern.replace(".", "/").split("/")[0] == path.split("/")[0]


def _names_leaf(pattern: Pattern, path: str) -> bool:
    last = pattern.replace(".", "/").rstrip("/").rpartition("/")[2] if isinstance(pattern, str) else path.rpartition("/")[2]
    return last not in ("*", "**", "") and matches(f"**/{last}", path) and not matches(f"**/{last}", path.rpartition("/")[0])


def _is_no_weight(path: str, shape: tuple[int, ...]) -> bool:
    return len(shape) < 2 or path.rpartition("/")[2] == "bias"


def _needs_fans(law: Law) -> bool:
    if isinstance(law, Fused):
        return True
    if isinstance(law, VarianceScaling | Orthogonal):
        return getattr(law, "fans", None) is None
    if isinstance(law, Initializer):
        return False
    try:  # jax's own raise for a shape without fans
        jax.eval_shape(lambda key: law(key, (3,), jnp.float32), jax.random.key(0))
    except Exception:
        return True
    return False


def check(hit: Laid, path: str, shape: tuple[int, ...], dtype: np.dtype, implementation: Any, argument: str) -> None:
    """Have the law say itself that it cannot serve a leaf, with the leaf's name.

    Raises:
        ValueError: it cannot.
    """
    try:
        made = jax.eval_shape(lambda: hit.law(jax.random.key(0, impl=implementation), shape, dtype))
    except Exception as error:
        where = f"{hit.pattern!r} names {path!r}" if hit.pattern else repr(path)
        raise ValueError(f"{argument}: {where} of shape {shape}, which {hit.law!r} cannot draw: {error}") from error
    if getattr(made, "shape", None) != shape:
        raise ValueError(f"{argument}: {hit.law!r} draws {getattr(made, 'shape', made)} for {path!r} of shape {shape}")


def keeps(law: Law) -> bool:
    """Whether parts of a leaf keep their declared law."""
    return isinstance(law, Fused) and law.keeps


def number(law: Law) -> np.ndarray | None:
    """The number that a law fills its leaf with; None where it draws."""
    return np.asarray(law.value) if isinstance(law, Constant) and np.ndim(law.value) == 0 else None


def decomposes(law: Law) -> bool:
    """Whether a law is computed by a decomposition of the whole array."""
    inner = getattr(law, "init", None)
    return isinstance(law, Orthogonal) or (
        inner is not None and any(map(decomposes, inner if isinstance(inner, tuple) else (inner,)))
    )


def name(law: Law) -> Hashable:
    """Equal for laws that draw the same from the same key."""
    if getattr(law, "shared", ""):
        law = dataclasses.replace(law, shared="")  # pyright: ignore[reportArgumentType]
    try:
        return content(law)
    except Unknown:
        return Same(law)


@dataclasses.dataclass(frozen=True)
class Core:
    """The array that a declared initializer returned, and what the layer did to it.

    Flax draws a kernel of (768, 12, 64) as (768, 768), and a loop stacks what each of its steps draws: a law of fans is to see
    the shape that the layer's own initializer saw.

    Attributes:
        shape: of one draw.
        stack: leading axes over which draws of this shape are stacked, each with a key of its own.
        text: equal where `replay` does the same.
        steps: the layout operations from the draws to the leaf; a nested tuple where they are done draw by draw.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    text: Hashable
    steps: tuple[Any, ...] = dataclasses.field(compare=False)

    def replay(self, x: Any, *, mask: bool = False) -> Any:
        """The leaf from the draws (*stack, *shape); of a mask, its layout alone."""
        return _replayed(self.steps, x, mask)


def plain_core(shape: tuple[int, ...]) -> Core:
    """A leaf that is drawn as it is."""
    return Core(shape, (), None, ())


def core(v: Value, keys: Sequence[Value]) -> Core:
    """The core of a leaf.

    Args:
        v: the leaf's value.
        keys: the arguments of its chain.
    """
    steps: list[Any] = []
    written: list[Hashable] = []
    while True:
        if v.kind == "stacked" and v.source.outputs[v.position].kind in ("result", "stacked"):
            inner = core(v.source.outputs[v.position], ())
            batch = _batch(inner.shape, keys)
            steps.append((inner.steps, len(batch)))
            written.append(("stack", inner.text))
            return Core(
                inner.shape[len(batch) :], (v.source.length, *inner.stack, *batch), tuple(written), tuple(reversed(steps))
            )
        if v.kind != "result" or v.source.eqn.primitive.name not in _LAYOUT or len(v.source.inputs) != 1 or v.derived:
            break
        steps.append(v.source.eqn)
        written.append((v.source.eqn.primitive.name, params_text(v.source.eqn)))
        v = v.source.inputs[0]
    shape = tuple(v.aval.shape)
    batch = _batch(shape, keys)
    return Core(shape[len(batch) :], batch, tuple(written), tuple(reversed(steps)))


def _batch(shape: tuple[int, ...], keys: Sequence[Value]) -> tuple[int, ...]:
    """The leading axes that `vmap` drew with keys of their own."""
    batches = {tuple(k.aval.shape) for k in keys if is_key(k.aval)}
    batch = batches.pop() if len(batches) == 1 else ()
    return batch if batch and shape[: len(batch)] == batch else ()


def _replayed(steps: Sequence[Any], x: Any, mask: bool) -> Any:
    for step in steps:
        if isinstance(step, tuple):
            x = jax.vmap(lambda one, inner=step[0]: _replayed(inner, one, mask))(x)
        elif not mask or step.primitive.name != "convert_element_type":
            (x,) = _compat.evaluated(step, [x])
    return x


def own_words(key: Any, path: str, law: Law) -> Any:
    """The words of the key of a law laid on a leaf: the same whatever else the scheme says.

    Laws that draw several leaves together, such as the two factors of one matrix, name the key that they share by an attribute
    `shared`.
    """
    path = getattr(law, "shared", "") or path
    word = np.uint32(int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big"))
    if is_traced(key) or jax.random.key_impl(key) != "threefry2x32":
        return jax.random.key_data(jax.random.fold_in(key, word))
    return fold_in(np.asarray(jax.random.key_data(key)), word)


def drawn(law: Law, key: Any, shape: Core, dtype: np.dtype, declared: Any = None) -> Any:
    """The leaf of a law: traced by the program that draws it.

    Args:
        law: the initializer.
        key: the leaf's own key.
        shape: what it draws.
        dtype: of the leaf.
        declared: the leaf by its declared law, which the blocks of a `vs.fused` without a law of their own keep.
    """
    key = unrolled_key(key)
    leaf = drawn_from(law, jax.random.split(key, math.prod(shape.stack)) if shape.stack else key, shape, dtype)
    if declared is None:
        return leaf
    kept = jnp.broadcast_to(law.kept(shape.shape), (*shape.stack, *shape.shape))  # pyright: ignore[reportFunctionMemberAccess]
    return jnp.where(shape.replay(kept, mask=True), declared, leaf)


def drawn_from(law: Law, keys: Any, shape: Core, dtype: np.dtype) -> Any:
    """The leaf of a law, from one key or, where it is a stack of draws, from one key a draw."""
    if not shape.stack:
        x = law(keys, shape.shape, dtype)
    else:
        x = jax.vmap(lambda key: law(key, shape.shape, dtype))(keys).reshape(*shape.stack, *shape.shape)
    return shape.replay(jnp.asarray(x, dtype))
