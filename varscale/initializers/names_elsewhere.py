"""Names of the initializers of PyTorch, Keras, haiku, flax and TensorFlow, for the error of a name that is not here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

_FAMILY = "vs.{0}_normal() or vs.{0}_uniform()"
_ADVICE = {
    "uniform": "vs.symmetric_uniform(bound), which is ±bound; a one-sided uniform, as jax's and flax's, has a mean, which "
    "breaks E[y²] = n · Var[w] · E[x²]",
    "random_uniform": "vs.symmetric_uniform(bound), which is ±bound",
    "uniform_scaling": "vs.variance_scaling(scale**2, 'fan_in', 'uniform'), which is haiku's UniformScaling(scale)",
    "random_normal": "vs.normal(stddev)",
    "random_truncated_normal": "vs.truncated_normal(stddev)",
    "trunc_normal": "vs.cut_normal(stddev, 2.0), cut at the absolute value ±2 as PyTorch's; or vs.truncated_normal(stddev), "
    "cut at two standard deviations and of the stddev given",
    "zero": "vs.zeros",
    "one": "vs.ones",
    "eye": "vs.identity()",
    "calculate_gain": "vs.gain(jax.nn.tanh), computed for any callable; or vs.pytorch_gain('tanh'), PyTorch's table",
    "gaussian_init": "vs.normal(stddev)",
    "glorot": _FAMILY.format("glorot"),
    "xavier": _FAMILY.format("xavier"),
    "he": _FAMILY.format("he"),
    "kaiming": _FAMILY.format("kaiming"),
    "msra": _FAMILY.format("he"),
    "lecun": _FAMILY.format("lecun"),
}
# Written without a call: these are initializers, the other public names make one.
_VALUES = ("zeros", "ones")


def advice(name: str, public: Sequence[str]) -> str:
    """What to write in place of a name that the library does not have, as the end of an error message; "" where nothing
    is near.

    >>> advice("HeNormal", ["he_normal"])
    ': use vs.he_normal()'
    >>> advice("zeros_init", ["zeros"])
    ': use vs.zeros, which is an initializer already, not a function that makes one'
    """
    if name.startswith("_"):
        return ""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().rstrip("_")
    plain = re.sub(r"(?<=.)_?init(ializer)?$", "", snake)
    for candidate in (snake, plain):
        if candidate in _ADVICE:
            return f": use {_ADVICE[candidate]}"
        if candidate in _VALUES:
            return f": use vs.{candidate}, which is an initializer already, not a function that makes one"
        if candidate in public:
            return f": use vs.{candidate}()"
    near = difflib.get_close_matches(plain, public, n=2, cutoff=0.75)
    return f": did you mean {' or '.join(f'vs.{word}' for word in near)}?" if near else ""
