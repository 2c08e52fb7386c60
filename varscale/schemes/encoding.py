"""Initializers as plain JSON values, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from varscale.initializers.fans import Fans
from varscale.initializers.initializer import Initializer


def encoded(law: Any) -> Any:
    """An initializer, or a value that one holds, as what `json.dumps` takes.

    Raises:
        TypeError: it is no initializer of this package, such as a function of jax or of the user: nothing tells it from others.
    """
    if isinstance(law, Initializer):
        fields = {field.name: encoded(getattr(law, field.name)) for field in dataclasses.fields(law)}
        return {"law": type(law).__name__, **{name: value for name, value in fields.items() if value is not None}}
    if isinstance(law, Fans):
        return {"fans": [law.fan_in, law.fan_out]}
    if isinstance(law, tuple):
        return [encoded(x) for x in law]
    if isinstance(law, complex):
        return {"complex": [law.real, law.imag]}
    if isinstance(law, np.dtype):
        return {"dtype": law.name}
    if law is None or isinstance(law, bool | int | float | str):
        return law
    raise TypeError(f"a law must be an initializer of varscale to be written as JSON, not {law!r}")


def decoded(value: Any) -> Any:
    """The initializer, or the value, that `encoded` wrote.

    Raises:
        ValueError: it names a law that does not exist.
    """
    if isinstance(value, list):
        return tuple(decoded(x) for x in value)
    if not isinstance(value, dict):
        return value
    if "fans" in value and "law" not in value:
        return Fans(*value["fans"])
    if "complex" in value:
        return complex(*value["complex"])
    if set(value) == {"dtype"}:
        return jnp.dtype(value["dtype"])
    known = {kind.__name__: kind for kind in _kinds(Initializer)}
    if value.get("law") not in known:
        raise ValueError(f"a law must be one of {', '.join(sorted(known))}, not {value.get('law')!r}")
    return known[value["law"]](**{name: decoded(x) for name, x in value.items() if name != "law"})


def _kinds(kind: type) -> Iterator[type]:
    for sub in kind.__subclasses__():
        yield sub
        yield from _kinds(sub)
