"""Check a variance claim with a known error rate: of an initializer of this library, of another, or of your own.

    from varscale import testing

    testing.assert_variance(my_init, (3, 3, 64, 128), scale=2.0, distribution="truncated_normal")
    testing.assert_variance(my_init, (3, 3, 64, 128), scale=2.0, profile="quick")  # a fiftieth of the samples
    testing.assert_output_variance(nn.Dense(256, kernel_init=vs.he_normal()), x, scale=2.0)

README.md beside this file: how a claim is tested, error rates, power, cost, and a whole test to paste.

`testing.strategies` (Hypothesis strategies for shapes, axes, dtypes, layers, ...) needs the extra `varscale[testing]`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from varscale.testing.claims import VarianceClaim
from varscale.testing.layers import assert_output_variance
from varscale.testing.power import Underpowered, plan_samples
from varscale.testing.profiles import FULL, QUICK, Profile
from varscale.testing.sequential import SequentialVerdict, log_e_value, sequential_test
from varscale.testing.verdict import Finding, Verdict
from varscale.testing.weights import assert_variance

if TYPE_CHECKING:
    from varscale.testing import strategies as strategies

__all__ = [
    "FULL",
    "QUICK",
    "Finding",
    "Profile",
    "SequentialVerdict",
    "Underpowered",
    "VarianceClaim",
    "Verdict",
    "assert_output_variance",
    "assert_variance",
    "log_e_value",
    "plan_samples",
    "sequential_test",
    "strategies",
]


def __getattr__(name: str) -> Any:
    if name != "strategies":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return importlib.import_module("varscale.testing.strategies")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("hypothesis"):
            raise
        raise ModuleNotFoundError(
            "varscale.testing.strategies needs Hypothesis: pip install 'varscale[testing]'", name="hypothesis"
        ) from error
