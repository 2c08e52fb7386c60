"""Constants that many rules share: what is left out, and the grades of what is known to some order only.

Bounds that are not derived have one of four grades, set on the validation grid (`experiments/benchmarks/accuracy.py`):
what a next order adds, what is known to leading order, what is known roughly, and what is known to a factor.
"""

NEGLIGIBLE = 1e-3  # relative size of an effect that is left out
NEXT_ORDER, LEADING_ORDER, ROUGH, LOOSE = 0.05, 0.15, 0.3, 0.5  # relative errors
