"""Arrays of the host that jax takes over without a copy: where a model's leaves are drawn on a CPU.

Most of the time that a large model takes there may be the system's, which finds memory and clears it. Huge pages are the
cheapest while the system has some at hand; but a virtual machine may have given them back to its host, and to fetch one takes
longer than to draw what it holds (measured, for 2 MB: .1 or 4.6 ms; small pages, 1 ms). So the large leaves of small models
are put into huge pages, and large models into small pages, as jax's own arrays are.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

_ALIGNMENT = 64  # what jax asks of an array of the host to take it over without a copy
_HUGE = 2**21  # bytes of a huge page
_MANY = 2**28  # bytes that a system may not have at hand in huge pages
_CAN_MAP = hasattr(mmap, "MADV_HUGEPAGE")


def empty(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[Any]) -> list[np.ndarray]:
    """Arrays that hold nothing yet, and none of whose memory is touched.

    Args:
        shapes: of the arrays.
        dtypes: of the arrays.
    """
    counts = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    huge = sum(counts) < _MANY
    raw = [_mapped(count, huge) if _CAN_MAP and count >= _HUGE else _aligned(count) for count in counts]
    return [x.view(dtype).reshape(shape) for x, shape, dtype in zip(raw, shapes, dtypes, strict=True)]


def filled(number: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of one number."""
    found = _aligned(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
    found[...] = number.astype(dtype)
    return found


def _aligned(count: int) -> np.ndarray:
    raw = np.empty(count + _ALIGNMENT, np.uint8)
    start = -raw.__array_interface__["data"][0] % _ALIGNMENT
    return raw[start : start + count]


def _mapped(count: int, huge: bool) -> np.ndarray:
    """Bytes on pages of their own: on huge pages, if these are wanted, but for the rest that would not fill one."""
    pages = mmap.mmap(-1, count + huge * _HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw = np.frombuffer(pages, np.uint8)
    if not huge:
        return raw
    start = -raw.__array_interface__["data"][0] % _HUGE
    with contextlib.suppress(OSError):  # of a system that has none
        pages.madvise(mmap.MADV_HUGEPAGE, start, count // _HUGE * _HUGE)
    return raw[start : start + count]
