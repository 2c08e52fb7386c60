"""Arrays of the host that jax takes over without a copy: where a model's leaves are drawn on a CPU.

Much of the time that a large model takes there is the system's, which finds memory and clears it. Small pages are asked for
many at a time, just before they are written: that takes two thirds of the time of finding them one by one. Huge pages would
be cheaper, but only while the system has some at hand: a virtual machine may have given them back to its host, and to fetch
one takes longer than to draw what it holds (measured, for 2 MB: .1 or 4.6 ms; small pages, 1 ms).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

_ALIGNMENT = 64  # what jax asks of an array of the host to take it over without a copy
_LARGE = 2**21  # bytes from which on an array has pages of its own
_CAN_ASK = sys.platform == "linux"
_POPULATE_WRITE = 23  # Linux's MADV_POPULATE_WRITE, which Python has no name for; systems before 5.14 refuse it


@dataclasses.dataclass(frozen=True)
class Space:
    """An array that is written piece by piece.

    Attributes:
        array: its numbers.
        pages: the pages that it lies on, where these are its own.
    """

    array: np.ndarray
    pages: mmap.mmap | None = None

    def write(self, first: int, numbers: np.ndarray) -> None:
        """Write numbers from this position on, in row-major order."""
        if self.pages is not None:
            begin = first * self.array.itemsize
            aligned = begin // mmap.PAGESIZE * mmap.PAGESIZE
            with contextlib.suppress(OSError):
                self.pages.madvise(_POPULATE_WRITE, aligned, begin - aligned + numbers.nbytes)
        self.array.reshape(-1)[first : first + len(numbers)] = numbers


def reserved(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[Any]) -> list[Space]:
    """Arrays that hold nothing yet, and none of whose memory is touched.

    Args:
        shapes: of the arrays.
        dtypes: of the arrays.
    """
    counts = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    raw = [_mapped(count) if _CAN_ASK and count >= _LARGE else Space(_aligned(count)) for count in counts]
    return [
        dataclasses.replace(space, array=space.array.view(dtype).reshape(shape))
        for space, shape, dtype in zip(raw, shapes, dtypes, strict=True)
    ]


def filled(number: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of one number."""
    found = _aligned(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
    found[...] = number.astype(dtype)
    return found


def _aligned(count: int) -> np.ndarray:
    raw = np.empty(count + _ALIGNMENT, np.uint8)
    start = -raw.__array_interface__["data"][0] % _ALIGNMENT
    return raw[start : start + count]


def _mapped(count: int) -> Space:
    """Bytes on pages of their own."""
    pages = mmap.mmap(-1, count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return Space(np.frombuffer(pages, np.uint8), pages)
