"""varscale: one law, E[y²] = n · Var[w] · E[x²], stated, predicted with and checked, for JAX and Flax.

>>> import jax, varscale as vs
>>> vs.he_normal()(jax.random.key(0), (784, 256)).shape
(784, 256)
"""

__version__ = "0.1.0"

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from varscale import gaussian as gaussian
from varscale import initializers as initializers
from varscale.initializers import *  # noqa: F403

if _TYPE_CHECKING:
    from varscale import testing as testing
    from varscale import theory as theory
    from varscale import transfer as transfer
    from varscale.programs.faces import inputs as inputs
    from varscale.report import Report as Report
    from varscale.theory import Moments as Moments
    from varscale.theory import critical as critical
    from varscale.theory import mean_field as mean_field
    from varscale.theory import predict as predict

# Loaded when first asked for: who only initializes should not wait for SciPy and optax.
_LATER = {
    **dict.fromkeys(("testing", "theory", "transfer"), None),
    **dict.fromkeys(("Moments", "critical", "mean_field", "predict"), "varscale.theory"),
    "inputs": "varscale.programs.faces",
    "Report": "varscale.report",
}


def __getattr__(name: str) -> _Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _LATER[name]
    return _importlib.import_module(f"varscale.{name}") if home is None else getattr(_importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
