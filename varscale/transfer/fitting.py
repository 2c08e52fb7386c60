"""One leaf: a piece of the checkpoint laid out, resized and cast as the leaf of the model needs it."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from varscale.programs.patterns import first_match
from varscale.programs.tables import shape_text
from varscale.programs.trees import Leaf
from varscale.transfer.claims import Claim
from varscale.transfer.layouts import LAYOUTS, Declared, Layout
from varscale.transfer.rearrange import Piece


def fitted(leaf: Leaf, claim: Claim, layouts: Declared, sizes: Sequence) -> tuple[np.ndarray, list[str]]:
    """What is claimed for a leaf, as the leaf needs it, and what was done to it.

    Raises:
      ValueError: it does not fit; the message says why.
    """
    count = len(claim.pieces)
    shape = leaf.shape if count == 1 else (*leaf.shape[:-1], leaf.shape[-1] // count)
    parts = [_laid_out(piece, leaf.path.rpartition("/")[2], shape, claim, layouts) for piece in claim.pieces]
    value, done = parts[0]
    if count > 1:
        value = np.concatenate([part for part, _ in parts], axis=-1)
        done = [*done, f"{count} gates packed"]
    _check_kind(value, leaf)
    if value.shape != leaf.shape:
        found = first_match(sizes, leaf.path)
        if found is None:
            raise ValueError(_shapes_differ(claim.pieces[0], value, leaf, layouts))
        done.append(f"{type(found[1]).__name__} from {shape_text(value.shape)}")
        value = np.asarray(found[1](value, leaf.value, leaf.path))
        if value.shape != leaf.shape:
            raise ValueError(f"{found[1]} gives shape {value.shape}, not {leaf.shape}")
    if value.dtype != leaf.dtype:
        done.append(f"cast from {value.dtype} to {leaf.dtype}")
        value = _cast(value, leaf.dtype)
    if bad := _not_finite(value):
        done.append(f"{bad} values are not finite")
    return value, done


def _laid_out(
    piece: Piece, target: str, shape: tuple[int, ...], claim: Claim, layouts: Declared
) -> tuple[np.ndarray, list[str]]:
    """A piece in flax's layout, and what was done to it."""
    layout = layouts.of(piece.path)
    if layouts.explicit:
        value, step = _arranged(piece, layout, target, shape)
        return value, [*piece.done, step] if step else list(piece.done)
    if claim.renamed and target == "kernel" and layout.ambiguous(piece.value.shape[piece.stacked :]):
        raise ValueError("a kernel by another name, and its shape fits transposed too: say with layout how it is laid out")
    return piece.value, list(piece.done)


def _arranged(piece: Piece, layout: Layout, target: str, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """The piece in flax's layout; stacked layers each for itself."""
    leaf = piece.path.rpartition("/")[2]
    if not piece.stacked:
        return layout.arrange(piece.value, leaf, target, shape)
    lead = piece.value.shape[: piece.stacked]
    flat = piece.value.reshape(-1, *piece.value.shape[piece.stacked :])
    results = [layout.arrange(layer, leaf, target, shape[piece.stacked :]) for layer in flat]
    if not results:
        return piece.value, ""
    stacked = np.stack([value for value, _ in results])
    return stacked.reshape(*lead, *stacked.shape[1:]), results[0][1]


def _check_kind(value: np.ndarray, leaf: Leaf) -> None:
    kinds = [
        next((k for k in (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating) if jnp.issubdtype(d, k)), None)
        for d in (value.dtype, leaf.dtype)
    ]
    if kinds[0] != kinds[1] and not (kinds[0] == jnp.floating and kinds[1] == jnp.complexfloating):
        raise ValueError(f"dtype {value.dtype} does not become {leaf.dtype}")


def _cast(value: np.ndarray, dtype: Any) -> np.ndarray:
    """The values in another precision of the same kind; ValueError where they do not fit it."""
    with np.errstate(over="ignore", invalid="ignore"):
        new = value.astype(dtype)
    if jnp.issubdtype(dtype, jnp.integer) and not np.array_equal(new.astype(value.dtype), value):
        raise ValueError(f"values of dtype {value.dtype} are too large for {dtype}")
    if _not_finite(new) > _not_finite(value):
        raise ValueError(f"finite values of dtype {value.dtype} overflow {dtype}")
    return new


def _not_finite(value: np.ndarray) -> int:
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return 0
    wide = value if value.dtype.kind in "fc" else value.astype(np.float32)  # numpy cannot ask this of ml_dtypes' smallest
    return int(value.size - np.isfinite(wide).sum())


def _shapes_differ(piece: Piece, value: np.ndarray, leaf: Leaf, layouts: Declared) -> str:
    why = f"shape {value.shape} does not fit {leaf.shape}"
    if not layouts.explicit and value.ndim >= 2:
        name = piece.path.rpartition("/")[2]
        for other in ("pytorch", "keras"):
            if name in LAYOUTS[other].names and name in LAYOUTS[other].kernels | {"depthwise_kernel"}:
                return f"{why}: is layout={other!r} missing?"
        if value.ndim == 2 and value.shape[::-1] == leaf.shape:
            return f"{why}, but its transpose would: is a layout missing?"
    return why
