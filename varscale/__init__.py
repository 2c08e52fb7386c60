"""varscale: one law, E[y²] = n · Var[w] · E[x²], stated, predicted with and checked, for JAX and Flax.

State it: `he_normal()`, `for_activation(jax.nn.gelu)`, `variance_scaling(...)` and the other initializers, each a
(key, shape, dtype) -> weights for any layer of flax. Predict with it: `predict(model, x)`. Check it: `testing.assert_variance`.

>>> import jax, varscale as vs
>>> kernel = vs.he_normal()(jax.random.key(0), (784, 256))
>>> kernel.shape, round(float(784 * kernel.var()), 1)  # fan_in · Var[w]
((784, 256), 2.0)
"""

__version__ = "0.1.0"

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from varscale import gaussian as gaussian
from varscale import initializers as initializers
from varscale.initializers import *  # noqa: F403

if _TYPE_CHECKING:
    from varscale import schemes as schemes
    from varscale import testing as testing
    from varscale import theory as theory
    from varscale import transfer as transfer
    from varscale.initialization.fast_keys import fast_key as fast_key
    from varscale.initialization.initialize import initialize as initialize
    from varscale.initialization.reinitialize import reinitialize as reinitialize
    from varscale.initialization.to_checkpoint import initialize_to_checkpoint as initialize_to_checkpoint
    from varscale.measuring.monitor import Monitor as Monitor
    from varscale.measuring.probe import probe as probe
    from varscale.programs.faces import inputs as inputs
    from varscale.report import Report as Report
    from varscale.report import Row as Row
    from varscale.report import Weight as Weight
    from varscale.schemes.calibration import calibrate as calibrate
    from varscale.schemes.coordinate_table import CoordinateCheck as CoordinateCheck
    from varscale.schemes.coordinates import coordinate_check as coordinate_check
    from varscale.schemes.plan import Plan as Plan
    from varscale.schemes.unit_variance import lsuv as lsuv
    from varscale.theory import Moments as Moments
    from varscale.theory import critical as critical
    from varscale.theory import mean_field as mean_field
    from varscale.theory import predict as predict
    from varscale.usage.table import Uses as Uses
    from varscale.usage.table import uses as uses

# Loaded when first asked for: who only initializes should not wait for SciPy and optax.
_LATER = {
    **dict.fromkeys(("schemes", "testing", "theory", "transfer"), None),
    **dict.fromkeys(("Moments", "critical", "mean_field", "predict"), "varscale.theory"),
    "fast_key": "varscale.initialization.fast_keys",
    "initialize": "varscale.initialization.initialize",
    "initialize_to_checkpoint": "varscale.initialization.to_checkpoint",
    "reinitialize": "varscale.initialization.reinitialize",
    "calibrate": "varscale.schemes.calibration",
    "inputs": "varscale.programs.faces",
    "lsuv": "varscale.schemes.unit_variance",
    "Monitor": "varscale.measuring.monitor",
    "probe": "varscale.measuring.probe",
    "CoordinateCheck": "varscale.schemes.coordinate_table",
    "coordinate_check": "varscale.schemes.coordinates",
    "Plan": "varscale.schemes.plan",
    **dict.fromkeys(("Report", "Row", "Weight"), "varscale.report"),
    **dict.fromkeys(("Audit", "Finding"), "varscale.auditing.findings"),
    "audit": "varscale.auditing.audit",
    "audit_parameters": "varscale.auditing.parameters",
    **dict.fromkeys(("Uses", "uses"), "varscale.usage.table"),
}

__all__ = ["gaussian", "initializers"]
__all__ += initializers.__all__
__all__ += sorted(_LATER)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> _Any:
    if name not in _LATER:
        from varscale.initializers.names_elsewhere import advice

        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{advice(name, __all__)}")
    home = _LATER[name]
    return _importlib.import_module(f"varscale.{name}") if home is None else getattr(_importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
