"""Where low-rank adapters of nnx start: `nnx.LoRA` and `nnx.LoRALinear`, y = W x + (x A) B."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from varscale.programs.patterns import Pattern, idle, matches, text

M = TypeVar("M", bound=nnx.Module)
Init = Literal["uniform", "gaussian", "orthogonal", "pissa", "olora"]
_OF_THE_KERNEL = ("pissa", "olora")
_TENTH = 0.1  # the factor on both matrices of the orthogonal init in peft


class _Adapter(NamedTuple):
    """One adapter of a model: its path, itself, and the kernel it adapts, (in, out); None where it stands alone."""

    path: str
    lora: nnx.LoRA
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

    Args:
        model: an nnx module that holds `nnx.LoRA` or `nnx.LoRALinear`; it is not changed.
        key: a PRNG key; each adapter is drawn with a key of its own, derived from this and its path.
        init: one of the table.
        alpha: numerator of the scale; positive. None for the scale 1.
        rank_stabilized: whether the scale is alpha/√r rather than alpha/r.
        patterns: globs of the adapters' paths, or of modules that they are in. Others stay as they are.

    Returns:
        A new model of the same structure.

    Raises:
        TypeError: model is no nnx module.
        ValueError: it holds no adapter, a pattern matches none, init is unknown, alpha is not positive; the rank is odd under
            "orthogonal"; under "pissa" or "olora" an adapter has no `nnx.Linear`, or a rank above min(in, out).

    >>> import jax, jax.numpy as jnp, varscale as vs
    >>> from flax import nnx
    >>> layer = nnx.LoRALinear(8, 6, lora_rank=2, rngs=nnx.Rngs(0))
    >>> new = vs.transfer.lora_init(layer, jax.random.key(0), "pissa", alpha=4.0)
    >>> x = jnp.ones((1, 8))
    >>> bool(jnp.allclose(new(x), layer(x), atol=1e-5)), bool(jnp.any(new.lora.lora_b[...]))
    (True, True)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an nnx module, not {model!r}")
    if init not in get_args(Init):
        raise ValueError(f"init must be one of {', '.join(map(repr, get_args(Init)))}, not {init!r}")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be finite and positive, or None, not {alpha!r}")
    graph, state = nnx.split(model)
    made = nnx.merge(graph, jax.tree.map(lambda array: array, state))  # variables of its own
    adapters = _adapters(made)
    if not adapters:
        raise ValueError(f"model must hold an nnx.LoRA or nnx.LoRALinear, and {type(model).__name__} holds none")
    several = [patterns] if not isinstance(patterns, Sequence) or isinstance(patterns, str) else list(patterns)
    if unused := idle(several, [adapter.path for adapter in adapters]):
        known = ", ".join(repr(adapter.path) for adapter in adapters[:4])
        raise ValueError(f"patterns: {text(unused[0])!r} matches none of the adapters ({known})")
    for adapter in adapters:
        if any(matches(pattern, adapter.path) for pattern in several):
            _start(adapter, jax.random.fold_in(key, zlib.crc32(adapter.path.encode())), init, alpha, rank_stabilized)
    return made


def _adapters(model: nnx.Module) -> list[_Adapter]:
    """The adapters of a model, each with the kernel that it adapts."""
    modules = [("/".join(map(str, keys)), module) for keys, module in nnx.iter_modules(model)]
    owners = {id(module.lora): module for _, module in modules if isinstance(module, nnx.LoRALinear)}
    found = []
    for path, module in modules:
        if isinstance(module, nnx.LoRA):
            owner = owners.get(id(module), module.base_module)
            found.append(_Adapter(path, module, getattr(owner, "kernel", None)))
    return found


def _start(adapter: _Adapter, key: Key[Array, ""], init: Init, alpha: float | None, rank_stabilized: bool) -> None:
    """Set an adapter's matrices, and take what they make off its kernel."""
    lora = adapter.lora
    (n, rank), m = lora.lora_a.shape, lora.lora_b.shape[1]
    scale = 1.0 if alpha is None else alpha / math.sqrt(rank) if rank_stabilized else alpha / rank
    if init in _OF_THE_KERNEL:
        kernel = _checked_kernel(adapter, (n, m), rank, init)
        a, b = (_principal if init == "pissa" else _triangular)(kernel, rank, scale)
    else:
        a, b = _drawn(adapter.path, key, init, (n, rank, m))
    a = (scale * a).astype(lora.lora_a.dtype)
    b = b.astype(lora.lora_b.dtype)
    if init in _OF_THE_KERNEL:  # of what the adapter holds after rounding
        rest = kernel - a.astype(jnp.float32) @ b.astype(jnp.float32)  # pyright: ignore[reportPossiblyUnboundVariable]
        adapter.kernel[...] = rest.astype(adapter.kernel.dtype)
    lora.lora_a[...], lora.lora_b[...] = a, b


def _checked_kernel(adapter: _Adapter, shape: tuple[int, int], rank: int, init: Init) -> Float[Array, "in out"]:
    if adapter.kernel is None or tuple(adapter.kernel.shape) != shape:
        has = "none" if adapter.kernel is None else f"one of shape {tuple(adapter.kernel.shape)}"
        raise ValueError(f"init={init!r} is made of the kernel {shape} that {adapter.path!r} adapts, and there is {has}")
    if rank > min(shape):
        raise ValueError(f"init={init!r} needs a rank of min(in, out) = {min(shape)} at most, not {rank} at {adapter.path!r}")
    return adapter.kernel[...].astype(jnp.float32)


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
