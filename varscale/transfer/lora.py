"""Where low-rank adapters start, y = W x + (x A) B: `nnx.LoRA`, `nnx.LoRALinear`, and leaves lora_a and lora_b of any tree."""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from varscale.programs.patterns import Pattern, idle, matches, text
from varscale.programs.trees import open_tree

M = TypeVar("M")
Init = Literal["uniform", "gaussian", "orthogonal", "pissa", "olora"]
_OF_THE_KERNEL = ("pissa", "olora")
_TENTH = 0.1  # the factor on both matrices of the orthogonal init in peft


class _Adapter(NamedTuple):
    """One adapter: its path, A of shape (*layers, *in, r), B of (*layers, r, *out), and the kernel, or None."""

    path: str
    a: Any
    b: Any
    kernel: Any


def lora_init(
    model: M,
    key: Key[Array, ""],
    init: Init = "pissa",
    *,
    alpha: float | None = None,
    rank_stabilized: bool = True,
    patterns: Pattern | Sequence[Pattern] = "**",
) -> M:
    """The model with its adapters drawn anew, and with kernels from which what the adapters start with is taken off.

    What the model computes stays the same under every init: exactly under "uniform" and "gaussian", whose B is zero, and to
    rounding under the others. For a rank r, a kernel W (in, out) and a scale s:

    | init | A (in, r) | B (r, out) | kernel |
    |---|---|---|---|
    | "uniform" (Hu et al. 2021, their code) | uniform ±1/√in | 0 | W |
    | "gaussian" (diffusers) | normal, std 1/r | 0 | W |
    | "orthogonal" (peft) | .1 X Q₁ | .1 Q₂ᵀ Y | W |
    | "pissa" (Meng et al. 2024) | U √(S/s) | √(S/s) Vᵀ | W − s A B |
    | "olora" (Büyükakyüz 2024) | Rᵀ | Qᵀ | W − s A B |

    X and Y are standard normal; Q₁ and Q₂ are the odd and the even rows of an orthogonal matrix, so that A B = 0. U, S and V
    are the r largest singular values of W and their vectors. Q and R are the first r columns and rows of Wᵀ = Q R.

    The scale s is alpha/√r (rank-stabilised: Kalajdzievski 2023) or alpha/r (Hu et al. 2021); 1 without alpha. nnx's adapters
    have no such factor in their program, so A holds s·A. Then what they compute is the same; to train as the program with the
    factor does, multiply A's learning rate by s under Adam, by s² under SGD.

    Kernels may have heads and layers: A has the shape (*layers, *in, r), B (*layers, r, *out), and the kernel
    (*layers, *in, *out); each layer is a matrix of its own. An `nnx.LoRA` around an `nnx.LinearGeneral` has its axes flattened.

    Args:
        model: an nnx module that holds `nnx.LoRA` or `nnx.LoRALinear`; or a tree of parameters (linen variables, nested dicts,
            an nnx.State) with leaves "lora_a" and "lora_b" in one module, and the kernel in that module or the one around it.
            It is not changed.
        key: a PRNG key; each adapter is drawn with a key of its own, derived from this and its path.
        init: one of the table.
        alpha: numerator of the scale; positive. None for the scale 1.
        rank_stabilized: whether the scale is alpha/√r rather than alpha/r.
        patterns: globs of the adapters' paths, or of modules that they are in. Others stay as they are.

    Returns:
        A new model of the same structure.

    Raises:
        TypeError: model is neither an nnx module nor a tree of arrays.
        ValueError: it holds no adapter, a pattern matches none, init is unknown, alpha is not positive; the shapes of an
            adapter are not those of one; the rank is odd under "orthogonal"; under "pissa" or "olora" an adapter has no kernel
            of its shape, one that another adapter adapts, too, or one of integers, or a rank above min(in, out).

    >>> import jax, jax.numpy as jnp, varscale as vs
    >>> from flax import nnx
    >>> layer = nnx.LoRALinear(8, 6, lora_rank=2, rngs=nnx.Rngs(0))
    >>> new = vs.transfer.lora_init(layer, jax.random.key(0), "pissa", alpha=4.0)
    >>> x = jnp.ones((1, 8))
    >>> bool(jnp.allclose(new(x), layer(x), atol=1e-5)), bool(jnp.any(new.lora.lora_b[...]))
    (True, True)
    """
    if init not in get_args(Init):
        raise ValueError(f"init must be one of {', '.join(map(repr, get_args(Init)))}, not {init!r}")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be finite and positive, or None, not {alpha!r}")
    if not isinstance(model, nnx.Module):
        return _of_tree(model, key, init, alpha, rank_stabilized, patterns)
    graph, state = nnx.split(model)
    made = nnx.merge(graph, jax.tree.map(lambda array: array, state))  # variables of its own
    held = _held(made)
    if not held:
        raise ValueError(f"model must hold an nnx.LoRA or nnx.LoRALinear, and {type(model).__name__} holds none")
    caught = _caught(patterns, list(held))
    _check_own_kernels(init, caught, {path: kernel if kernel is None else id(kernel) for path, (_, kernel) in held.items()})
    for path in caught:
        lora, kernel = held[path]
        adapter = _Adapter(path, lora.lora_a[...], lora.lora_b[...], None if kernel is None else kernel[...])
        a, b, rest = _started(adapter, key, init, alpha, rank_stabilized)
        lora.lora_a[...], lora.lora_b[...] = a, b
        if kernel is not None and rest is not None:
            kernel[...] = rest
    return made


def _held(model: nnx.Module) -> dict[str, tuple[nnx.LoRA, Any]]:
    """The adapters of a model by path, each with the kernel that it adapts."""
    modules = [("/".join(map(str, keys)), module) for keys, module in nnx.iter_modules(model)]
    owners = {id(module.lora): module for _, module in modules if isinstance(module, nnx.LoRALinear)}
    return {
        path: (module, getattr(owners.get(id(module), module.base_module), "kernel", None))
        for path, module in modules
        if isinstance(module, nnx.LoRA)
    }


def _of_tree(params: Any, key: Any, init: Init, alpha: float | None, rank_stabilized: bool, patterns: Any) -> Any:
    """A tree of parameters with its adapters drawn anew."""
    opened = open_tree(params, "model")
    values = {leaf.path: leaf.value for leaf in opened.leaves}
    held = {path.rpartition("/")[0]: path for path in values if path.rpartition("/")[2] == "lora_a"}
    held = {module: path for module, path in held.items() if f"{module}/lora_b".lstrip("/") in values}
    if not held:
        raise ValueError(
            "model must hold adapters: leaves lora_a and lora_b in one module, or an nnx.LoRA; the tree holds none"
        )
    modules = {module.removeprefix("params/"): module for module in held}
    kernels = {name: _kernel_of(module, values) for name, module in modules.items()}
    caught = _caught(patterns, list(modules))
    _check_own_kernels(init, caught, kernels)
    for name in caught:
        module, kernel = modules[name], kernels[name]
        a_path, b_path = held[module], f"{module}/lora_b".lstrip("/")
        adapter = _Adapter(module, values[a_path], values[b_path], None if kernel is None else values[kernel])
        values[a_path], values[b_path], rest = _started(adapter, key, init, alpha, rank_stabilized)
        if kernel is not None and rest is not None:
            values[kernel] = rest
    return opened.rebuild([values[leaf.path] for leaf in opened.leaves])


def _kernel_of(module: str, values: dict[str, Any]) -> str | None:
    """The path of the kernel that an adapter of a tree adapts: "kernel", else the one other array of its size."""
    a, b = (np.shape(values[f"{module}/{name}".lstrip("/")]) for name in ("lora_a", "lora_b"))
    for around in (module, module.rpartition("/")[0]):
        beside = [path for path in values if path.rpartition("/")[0] == around and not path.endswith(("lora_a", "lora_b"))]
        named = [path for path in beside if path.rpartition("/")[2] == "kernel"]
        fits = [path for path in beside if _batch(a, b, np.shape(values[path])) is not None]
        if named or len(fits) == 1:
            return (named or fits)[0]
    return None


def _caught(patterns: Any, paths: Sequence[str]) -> list[str]:
    """The adapters that patterns name.

    Raises:
        ValueError: one names none.
    """
    several = [patterns] if not isinstance(patterns, Sequence) or isinstance(patterns, str) else list(patterns)
    if unused := idle(several, paths):
        known = ", ".join(map(repr, paths[:4]))
        raise ValueError(f"patterns: {text(unused[0])!r} matches none of the adapters ({known})")
    return [path for path in paths if any(matches(pattern, path) for pattern in several)]


def _check_own_kernels(init: Init, paths: Sequence[str], kernels: Mapping[str, Hashable]) -> None:
    """Refuse what would be taken off a kernel that another adapter adapts, too: each of them adds only its own product.

    Raises:
        ValueError: an adapter's kernel is another's.
    """
    for path in paths if init in _OF_THE_KERNEL else ():
        others = [
            other for other, kernel in kernels.items() if other != path and kernel is not None and kernel == kernels[path]
        ]
        if others:
            raise ValueError(
                f"init={init!r} takes what an adapter starts with off its kernel, and {path!r} shares one with {others[0]!r}: "
                'give each a kernel of its own, or use "uniform", "gaussian" or "orthogonal"'
            )


def _batch(a: tuple[int, ...], b: tuple[int, ...], kernel: tuple[int, ...] | None) -> int | None:
    """How many leading axes are layers; None where the shapes are not those of an adapter (of this kernel, if one is given)."""
    for k in range(min(len(a), len(b)) - 1):
        if a[:k] != b[:k] or a[-1] != b[k] or len(a) < k + 2 or len(b) < k + 2:
            continue
        if kernel is None:
            return k
        n, m = math.prod(a[k:-1]), math.prod(b[k + 1 :])
        splits = range(k + 1, len(kernel))
        if kernel[:k] == a[:k] and any((math.prod(kernel[k:i]), math.prod(kernel[i:])) == (n, m) for i in splits):
            return k
    return None


def _started(
    adapter: _Adapter, key: Key[Array, ""], init: Init, alpha: float | None, rank_stabilized: bool
) -> tuple[Array, Array, Array | None]:
    """An adapter's matrices, and the kernel without what they make; None where it stays."""
    own = jax.random.fold_in(key, zlib.crc32(adapter.path.encode()))
    shapes = tuple(adapter.a.shape), tuple(adapter.b.shape)
    kernel = adapter.kernel if init in _OF_THE_KERNEL else None
    k = _batch(*shapes, None if kernel is None else tuple(kernel.shape))
    if init in _OF_THE_KERNEL and (kernel is None or k is None):
        has = "none" if kernel is None else f"one of shape {tuple(kernel.shape)}"
        raise ValueError(f"init={init!r} is made of the kernel that {adapter.path!r} adapts by {shapes}, and there is {has}")
    if k is None:
        raise ValueError(f"{adapter.path!r}: A and B must have shapes (*layers, *in, r) and (*layers, r, *out), not {shapes}")
    if kernel is not None and not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(f"init={init!r} needs a kernel of real floating-point numbers at {adapter.path!r}, not {kernel.dtype}")
    layers, rank = shapes[0][:k], shapes[0][-1]
    n, m = math.prod(shapes[0][k:-1]), math.prod(shapes[1][k + 1 :])
    scale = 1.0 if alpha is None else alpha / math.sqrt(rank) if rank_stabilized else alpha / rank
    if init in _OF_THE_KERNEL and rank > min(n, m):
        raise ValueError(f"init={init!r} needs a rank of min(in, out) = {min(n, m)} at most, not {rank} at {adapter.path!r}")

    def one(key: Key[Array, ""], kernel: Float[Array, "in out"] | None) -> tuple[Array, Array, Array | None]:
        if kernel is None:
            a, b = _drawn(adapter.path, key, init, (n, rank, m))
        else:
            a, b = (_principal if init == "pissa" else _triangular)(kernel, rank, scale)
        a, b = (scale * a).astype(adapter.a.dtype), b.astype(adapter.b.dtype)
        if kernel is None:
            return a, b, None
        return a, b, kernel - a.astype(jnp.float32) @ b.astype(jnp.float32)  # of what the adapter holds after rounding

    flat = None if kernel is None else jnp.reshape(kernel, (-1, n, m)).astype(jnp.float32)
    if layers:
        keys = jax.random.split(own, math.prod(layers))
        a, b, rest = jax.vmap(one, in_axes=(0, None if flat is None else 0))(keys, flat)
    else:
        a, b, rest = one(own, None if flat is None else flat[0])
    rest = None if rest is None or kernel is None else rest.reshape(kernel.shape).astype(kernel.dtype)
    return a.reshape(shapes[0]), b.reshape(shapes[1]), rest


def _principal(kernel: Float[Array, "in out"], rank: int, scale: float) -> tuple[Array, Array]:
    """A and B with s A B the best approximation of the kernel of this rank, both of equal norm but for s."""
    u, s, v = jnp.linalg.svd(kernel, full_matrices=False)
    root = jnp.sqrt(s[:rank] / scale)
    return u[:, :rank] * root[None], root[:, None] * v[:rank]


def _triangular(kernel: Float[Array, "in out"], rank: int, scale: float) -> tuple[Array, Array]:
    """A and B of the QR decomposition of the transposed kernel, whatever the scale."""
    q, r = jnp.linalg.qr(kernel.T)
    return r[:rank].T, q[:, :rank].T


def _drawn(path: str, key: Key[Array, ""], init: Init, sizes: tuple[int, int, int]) -> tuple[Array, Array]:
    """A and B whose product is zero."""
    n, rank, m = sizes
    if init == "uniform":
        bound = 1 / math.sqrt(n)
        return jax.random.uniform(key, (n, rank), jnp.float32, -bound, bound), jnp.zeros((rank, m))
    if init == "gaussian":
        return jax.random.normal(key, (n, rank), jnp.float32) / rank, jnp.zeros((rank, m))
    if rank % 2:
        raise ValueError(f"init='orthogonal' needs an even rank, not {rank} at {path!r}")
    k_q, k_x, k_y = jax.random.split(key, 3)
    q = jax.random.orthogonal(k_q, rank)
    a = _TENTH * jax.random.normal(k_x, (n, rank // 2)) @ q[0::2]
    return a, _TENTH * q[1::2].T @ jax.random.normal(k_y, (rank // 2, m))
