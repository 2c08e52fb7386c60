"""varscale: one law, E[y²] = n · Var[w] · E[x²], stated, predicted with and checked, for JAX and Flax."""

__version__ = "0.1.0"
