"""Integrals against normal and lognormal laws, and the elementwise primitives in NumPy."""
