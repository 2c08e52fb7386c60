"""What differs between the versions of jax that are supported, in one place."""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact, Key

# Its value is part of the keys of jax's caches of traces. Made when this module is imported: to make one is not thread-safe.
trace_context = jax.make_user_context()


def is_literal(atom: Any) -> bool:
    """Whether an equation's operand is a literal."""
    return isinstance(atom, jax.extend.core.Literal)


def zeros(aval: Any) -> Any:
    """Zeros as an equation's operand."""
    return jax.extend.core.Literal(np.zeros(aval.shape, aval.dtype), aval)


def is_tracer(x: Any) -> bool:
    """Whether an array stands for one of a function that is being traced."""
    return isinstance(x, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]


def scopes(eqn: Any) -> list[tuple[str, int]]:
    """The named scopes an equation was made in, from the outermost in, each with a number that tells its calls apart."""
    stack = getattr(getattr(eqn.source_info, "name_stack", None), "stack", ())
    return [(part.name, id(part)) for part in stack if type(part).__name__ == "Scope"]


def transforms(eqn: Any) -> set[str]:
    """The transformations of jax that an equation was made under: "jvp", "transpose", "vmap"."""
    stack = getattr(getattr(eqn.source_info, "name_stack", None), "stack", ())
    return {part.name for part in stack if type(part).__name__ == "Transform"}


def source_line(eqn: Any) -> str:
    """File and line of an equation, as far as jax recorded them."""
    frames = list(getattr(getattr(eqn.source_info, "traceback", None), "frames", []) or [])
    found = (_line(frame.file_name, frame.line_num) for frame in frames if _is_of_a_model(frame.file_name))
    return next(found, "an unknown line")


def error_line(error: Exception) -> str | None:
    """File and line of the model's code that an error came from; None where it came from elsewhere."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return next((_line(frame.filename, frame.lineno) for frame in frames if _is_of_a_model(frame.filename)), None)


def _line(file: str, number: int | None) -> str:
    return f"{file.rsplit('/', 1)[-1]}:{number}"


def _is_of_a_model(file: str) -> bool:
    own = os.path.dirname(__file__)
    return not file.startswith((own, "<frozen")) and not any(part in file for part in ("/jax/", "/flax/", "/contextlib"))


def sub_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """A sub-jaxpr of an equation as (jaxpr, constants), whether it was closed or not."""
    if isinstance(jaxpr, jax.extend.core.ClosedJaxpr):
        return jaxpr.jaxpr, list(jaxpr.consts)
    return jaxpr, []


def scan_operands(params: dict[str, Any], operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """The operands of a scan equation as (constants, carry, streams)."""
    if "ft_in" in params:  # from 0.11 on
        constants, carry, streams = map(list, params["ft_in"].update(list(operands)).unpack())
        return constants, carry, streams
    constants, carry = params["num_consts"], params["num_consts"] + params["num_carry"]
    return list(operands[:constants]), list(operands[constants:carry]), list(operands[carry:])


# From 0.12 on, jax.nn.initializers multiplies erf⁻¹(u) by √2·σ, one number, where it had multiplied √2·erf⁻¹(u) by σ.
_SCALES_ERF_INV = jax.__version_info__ >= (0, 12)


def unscaled_normal(key: Key[Array, ""], shape: Sequence[int], dtype: np.dtype) -> Inexact[Array, "*shape"]:
    """What jax's normal initializers multiply by `normal_scale`: the same bits, version by version."""
    if not _SCALES_ERF_INV or jnp.issubdtype(dtype, jnp.complexfloating):
        return jax.random.normal(key, shape, dtype)
    low = np.nextafter(np.array(-1.0, dtype), np.array(0.0, dtype), dtype=dtype)
    return jax.lax.erf_inv(jax.random.uniform(key, shape, dtype, low, np.array(1.0, dtype)))


def normal_scale(std: np.inexact) -> np.inexact:
    """The factor on `unscaled_normal` that gives it this standard deviation."""
    if not _SCALES_ERF_INV or jnp.issubdtype(std.dtype, jnp.complexfloating):
        return std
    return std.dtype.type(np.sqrt(2)) * std


def threefry_is_partitionable() -> bool:
    """Whether `jax.random` numbers the draws of threefry keys one by one, so that any device can make its own."""
    return bool(jax.config.jax_threefry_partitionable)  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def quick_compilation() -> dict[str, Any]:
    """Options under which XLA compiles a small program soonest. Newer versions do not know the second one."""
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        del options["xla_cpu_use_fusion_emitters"]
    return options


def set_mesh() -> Any:
    """The mesh that `jax.set_mesh` has set; None without one, and inside jit, which knows no devices."""
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:
        return None
    return mesh if mesh.axis_names else None


def evaluated(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of one equation, given its inputs."""
    names = [v for v in eqn.invars if not is_literal(v)]
    values = dict(zip(names, (x for v, x in zip(eqn.invars, inputs, strict=True) if not is_literal(v)), strict=True))
    bare = one_equation(eqn, tuple(values))
    return jax.extend.core.jaxpr_as_fun(bare)(*values.values())


def one_equation(eqn: Any, inputs: tuple[Any, ...]) -> Any:
    jaxpr = _empty_jaxpr().replace(invars=list(inputs), outvars=list(eqn.outvars), eqns=[eqn], effects=eqn.effects)
    return jax.extend.core.ClosedJaxpr(jaxpr, ())


@functools.cache
def _empty_jaxpr() -> Any:
    return jax.make_jaxpr(lambda: ())().jaxpr


@functools.cache
def implementation(dtype: Any) -> Any:
    """The PRNG implementation behind a dtype of keys, as `jax.random.key` takes it."""
    found: list[Any] = []

    def look(key: Any) -> Any:
        found.append(jax.random.key_impl(key))
        return key

    jax.eval_shape(look, jax.ShapeDtypeStruct((), dtype))
    return found[0]


def is_forward_mode_error(error: Exception) -> bool:
    """Whether an error says that a `jax.custom_vjp` function was differentiated in forward mode, and then maybe in reverse."""
    text = str(error)
    if isinstance(error, NotImplementedError):
        return "custom_lin" in text
    return isinstance(error, TypeError) and "custom_vjp" in text and "forward-mode" in text


def is_forward_mode_equation(eqn: Any) -> bool:
    """Whether an equation is what forward-mode differentiation leaves of a `jax.custom_vjp` function: it cannot be lowered."""
    return eqn.primitive.name == "custom_lin"


def remat_barrier(params: dict[str, Any], operands: Sequence[Any]) -> list[Any]:
    """The operands of a rematerialization, kept from being taken for the values they were computed from before."""
    kept = params["prevent_cse"]
    kept = kept if isinstance(kept, tuple) else (kept,) * len(operands)
    behind = iter(jax.lax.optimization_barrier([x for x, keep in zip(operands, kept, strict=True) if keep]))
    return [next(behind) if keep else x for x, keep in zip(operands, kept, strict=True)]


def manual_axes(params: dict[str, Any]) -> tuple[str, ...]:
    """The mesh axes that a shard_map equation maps over."""
    axes = params.get("manual_axes", frozenset()) or frozenset(params["mesh"].axis_names)
    return tuple(name for name in params["mesh"].axis_names if name in axes)


def replaced(jaxpr: Any, **parts: Any) -> Any:
    """A jaxpr with other parts, and without the names of its arguments, of which there may now be more or fewer."""
    info = jaxpr.debug_info
    if hasattr(info, "with_unknown_names"):
        parts["debug_info"] = info.with_unknown_names()
    return jaxpr.replace(**parts)
