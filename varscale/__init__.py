"""varscale: one law, E[y²] = n · Var[w] · E[x²], stated, predicted with and checked, for JAX and Flax.

>>> import jax, varscale as vs
>>> vs.he_normal()(jax.random.key(0), (784, 256)).shape
(784, 256)
"""

__version__ = "0.1.0"

from varscale import gaussian as gaussian
from varscale import initializers as initializers
from varscale.initializers import *  # noqa: F403
