"""Leaves that changed their size: windows and position tables interpolated, layers made wider or narrower.

`graft(..., resize={pattern: method})` applies a method to the leaves of the model that the pattern catches, where their shape
differs from what was found. A method is called with the pretrained array (in flax's layout) and the model's own leaf.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Interpolation = Literal["nearest", "linear", "cubic", "lanczos3", "lanczos5"]
Initializer = Callable[..., Any]


class Resize(Protocol):
    """A method of resizing; it raises ValueError, in words, where it does not apply."""

    def __call__(self, old: np.ndarray, own: Any, path: str, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Window:
    """Interpolate the window of a convolution's kernel (patch embeddings included); channels must agree.

    Interpolated weights keep their size, so a window of 32x32 gives four times the response of one of 16x16 to the same picture
    enlarged: n·Var[w] has changed with n. `preserve="response"` solves for the kernel whose response to an enlarged patch is
    the old kernel's to the patch itself (Beyer et al. 2023, FlexiViT, section 3.4), exactly where the window grows and in least
    squares where it shrinks.
    """

    method: Interpolation = "linear"
    preserve: Literal["values", "response"] = "response"

    def __call__(self, old: np.ndarray, own: Any, path: str, /) -> np.ndarray:
        shape = own.shape
        if old.ndim != len(shape) or old.ndim < 3 or old.shape[-2:] != shape[-2:]:
            raise ValueError(f"Window resizes the leading axes of (*window, in, out); {old.shape} and {shape} differ in others")
        return _along(old, shape, range(old.ndim - 2), self.method, response=self.preserve == "response")


@dataclass(frozen=True)
class Positions:
    """Interpolate a table of position embeddings, shape (..., positions, features).

    Attributes:
      grid: what the old positions were flattened from, such as (14, 14); None for a sequence.
      new_grid: likewise the new ones.
      prefix: leading rows that are no positions (a class token), kept as they are.
      method: of interpolation.
    """

    grid: tuple[int, ...] | None = None
    new_grid: tuple[int, ...] | None = None
    prefix: int = 0
    method: Interpolation = "cubic"

    def __call__(self, old: np.ndarray, own: Any, path: str, /) -> np.ndarray:
        shape = own.shape
        if old.ndim != len(shape) or old.ndim < 2 or (*old.shape[:-2], old.shape[-1]) != (*shape[:-2], shape[-1]):
            raise ValueError(
                f"Positions resizes axis -2 of (..., positions, features); {old.shape} and {shape} differ in others"
            )
        rows, new_rows = old.shape[-2] - self.prefix, shape[-2] - self.prefix
        grid, new_grid = self.grid or (rows,), self.new_grid or (new_rows,)
        if len(grid) != len(new_grid):
            raise ValueError(f"Positions: grid {self.grid} and new_grid {self.new_grid} must both be given, with as many axes")
        if math.prod(grid) != rows or math.prod(new_grid) != new_rows or rows < 1 or new_rows < 1:
            raise ValueError(
                f"Positions: {old.shape[-2]} and {shape[-2]} rows, {self.prefix} of them prefix, "
                f"are not grids of {grid} and {new_grid}"
            )
        lead = old.shape[:-2]
        body = old[..., self.prefix :, :].reshape(*lead, *grid, old.shape[-1])
        axes = range(len(lead), len(lead) + len(grid))
        body = _along(body, (*lead, *new_grid, old.shape[-1]), axes, self.method, response=False)
        return np.concatenate([old[..., : self.prefix, :], body.reshape(*lead, new_rows, old.shape[-1])], axis=-2)


@dataclass(frozen=True, eq=False)
class Units:
    """Make layers wider or narrower: old units are kept in front, new ones are drawn by a stated law.

    Attributes:
      law: an initializer for the new entries, called with the whole new shape (so that its fans are the new ones); None leaves
        what the model's own initialization drew there. `vs.zeros` for what reads the new units keeps the function unchanged.
      key: for the law; every leaf draws with a key of its own, folded from its path.
      blocks: for an axis made of equal blocks, how many ({-1: 3} for query, key and value packed in one, {0: 49} for the
        features of a flattened 7x7 map): each block grows or shrinks at its end.
    """

    law: Initializer | None = None
    key: jax.Array | None = None
    blocks: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.law is not None and self.key is None:
            raise ValueError("Units: law is given without key; give the key that new units are drawn with")

    def __call__(self, old: np.ndarray, own: Any, path: str, /) -> np.ndarray:
        shape = own.shape
        if old.ndim != len(shape):
            raise ValueError(f"Units changes the length of axes, not their number; the shapes are {old.shape} and {shape}")
        fresh = self._fresh(own, path)
        split_old, split_new = _blocked(old.shape, self.blocks), _blocked(shape, self.blocks)
        if any(a != b for (a, _), (b, _) in zip(split_old, split_new, strict=True)):
            raise ValueError(f"Units: blocks {dict(self.blocks)} do not divide the axes of {old.shape} and {shape}")
        common = tuple(slice(size) for a, b in zip(split_old, split_new, strict=True) for size in (a[0], min(a[1], b[1])))
        new = np.array(fresh).reshape([size for pair in split_new for size in pair])
        new[common] = old.reshape([size for pair in split_old for size in pair])[common]
        return new.reshape(shape)

    def _fresh(self, own: Any, path: str) -> np.ndarray:
        if self.law is None:
            if isinstance(own, jax.ShapeDtypeStruct):
                raise ValueError(
                    "Units: without a law new units keep the model's own values, and this leaf has none (a ShapeDtypeStruct)"
                )
            return np.asarray(own)
        assert self.key is not None
        key = jax.random.fold_in(self.key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
        return np.asarray(self.law(key, own.shape, own.dtype))


def _blocked(shape: tuple[int, ...], blocks: Mapping[int, int]) -> list[tuple[int, int]]:
    """Each axis as (blocks, length of one); (0, length) where they do not divide it."""
    counts = {axis % len(shape): count for axis, count in blocks.items()} if shape else {}
    return [(counts.get(a, 1), n // counts.get(a, 1)) if n % counts.get(a, 1) == 0 else (0, n) for a, n in enumerate(shape)]


def _along(old: np.ndarray, shape: tuple[int, ...], axes, method: Interpolation, *, response: bool) -> np.ndarray:
    """Resize one axis after the other: the interpolations of `jax.image.resize` are separable."""
    new = old.astype(np.float64) if old.dtype.kind == "f" and old.dtype.itemsize == 8 else old.astype(np.float32)
    for axis in axes:
        before, after = new.shape[axis], shape[axis]
        if before == after:
            continue
        matrix = np.asarray(jax.image.resize(jnp.eye(before, dtype=jnp.float32), (after, before), method), new.dtype)
        if response:
            matrix = np.linalg.pinv(matrix.T.astype(np.float64)).astype(new.dtype)
        new = np.moveaxis(np.tensordot(matrix, new, axes=(1, axis)), 0, axis)
    return new.astype(old.dtype)
