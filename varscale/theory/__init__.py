"""The moment interpreter: `predict`, its rules, and mean-field theory."""

from varscale.theory.functions import FUNCTIONS
from varscale.theory.interpreter import Interpreter, PredictionError, rule
from varscale.theory.moments import Moments
from varscale.theory.predict import predict

__all__ = ["FUNCTIONS", "Interpreter", "Moments", "PredictionError", "predict", "rule"]
