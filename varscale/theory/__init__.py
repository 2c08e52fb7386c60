"""The moment interpreter: `predict`, its rules, and mean-field theory."""

from varscale.theory.functions import FUNCTIONS
from varscale.theory.interpreter import Interpreter, PredictionError, rule
from varscale.theory.mean_field import critical, mean_field
from varscale.theory.moments import Moments
from varscale.theory.predict import predict

__all__ = ["FUNCTIONS", "Interpreter", "Moments", "PredictionError", "critical", "mean_field", "predict", "rule"]
