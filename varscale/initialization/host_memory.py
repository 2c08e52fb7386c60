"""Arrays of the host that jax takes over without a copy: where a model's leaves are drawn on a CPU.

Most of the time that a large model takes there may be the system's, which finds memory and clears it. NumPy asks for huge
pages. They are the cheapest while the system has some at hand; but a virtual machine may have given them back to its host, and
to fetch one takes longer than to draw what it holds (measured, for 2 MB: .1 or 4.6 ms; small pages, 1 ms). So large models
are put into small pages, as jax's own arrays are.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

_ALIGNMENT = 64  # what jax asks of an array of the host to take it over without a copy
_HUGE = 2**21  # bytes of a huge page
_MANY = 2**28  # bytes that a system may not have at hand in huge pages
_CAN_MAP = hasattr(mmap, "MAP_ANONYMOUS")


def empty(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[Any]) -> list[np.ndarray]:
    """Arrays that hold nothing yet, and none of whose memory is touched.

    Args:
        shapes: of the arrays.
        dtypes: of the arrays.
    """
    counts = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    small = _CAN_MAP and sum(counts) >= _MANY
    raw = [_in_small_pages(count) if small and count >= _HUGE else _advised(count) for count in counts]
    return [x.view(dtype).reshape(shape) for x, shape, dtype in zip(raw, shapes, dtypes, strict=True)]


def filled(number: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of one number."""
    found = _advised(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
    found[...] = number.astype(dtype)
    return found


def _advised(count: int) -> np.ndarray:
    """Bytes for which NumPy asks the system for huge pages, if they are many."""
    raw = np.empty(count + _ALIGNMENT, np.uint8)
    start = -raw.__array_interface__["data"][0] % _ALIGNMENT
    return raw[start : start + count]


def _in_small_pages(count: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
