"""What went wrong while a model was traced, in one line."""

from __future__ import annotations

import jax

from varscale import _compat


def told(error: Exception) -> str:
    """The kind and first line of an error, and the line of the model that it came from."""
    message = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {message[0] if message else ''}"
    if isinstance(error, jax.errors.ConcretizationTypeError):
        text += " (Python can read numbers that NumPy computes; those of jax.numpy are abstract in a trace)"
    line = _compat.error_line(error)
    return f"{text}, at {line}" if line else text
