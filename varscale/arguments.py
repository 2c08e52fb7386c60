"""Checks of arguments."""

from __future__ import annotations

import jax
import numpy as np


def real_number(name: str, value: object) -> float:
    """A Python float of an argument, NaN and infinities included.

    Raises:
        TypeError: not a real number, or a traced one; the message names the argument.
    """
    if isinstance(value, (bool, np.bool_, str, bytes)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    try:
        return float(value)  # pyright: ignore[reportArgumentType]
    except jax.errors.ConcretizationTypeError as error:
        raise TypeError(f"{name} must be a concrete number, not a traced value") from error
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, not {value!r}") from error
