"""Moments, cross-moments, cotangents and finite-width fluctuations, passed through the graph."""
