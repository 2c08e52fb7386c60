"""Exchangeable arrays: axes with classes, and tables of moments by type of index pair."""
