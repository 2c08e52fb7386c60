"""Whatever goes wrong in a prediction says which equation it goes wrong in."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import varscale as vs
from varscale.theory import PredictionError
from varscale.theory.domain.axes import Axis
from varscale.theory.domain.tables import independent
from varscale.theory.graph.layout import value
from varscale.theory.graph.nodes import Node, View, pullback, second_moments
from varscale.theory.interpreter.interpreter import Interpreter
from varscale.theory.rules.registry import RULES

Interpreter()  # loads the rules that these tests replace


class Wave(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="after")(jnp.sin(nn.Dense(8, name="before")(x)))


class FailsForward(Node):
    """A kind whose moments fail."""


@second_moments.register(FailsForward)
def second_moments_of_fails_forward(node):
    raise IndexError("off by one")


class FailsBackward(Node):
    """A kind whose pullback fails."""


@second_moments.register(FailsBackward)
def second_moments_of_fails_backward(node):
    return independent(0.0, 1.0, node.axes)


@pullback.register(FailsBackward)
def pullback_of_fails_backward(node, cotangent, notes):
    raise ZeroDivisionError("no cotangent")


@pytest.mark.parametrize(("kind", "told"), [(FailsForward, "IndexError: off by one"), (FailsBackward, "no cotangent")])
def test_error_of_moments_computed_later_names_their_equation(kind, told, monkeypatch):
    def rule(interpreter, eqn, x):
        args = [View(x.node, tuple(range(len(x.node.axes))))]
        return value(interpreter.graph.make(kind, [Axis(n) for n in x.shape], args), x.shape)

    monkeypatch.setitem(RULES, "sin", rule)
    with pytest.raises(PredictionError) as caught:
        vs.predict(Wave(), jax.ShapeDtypeStruct((4, 8), jnp.float32))
    message = str(caught.value)
    assert "primitive 'sin' at test_failures.py:" in message
    assert told in message


def test_error_inside_a_module_names_its_path(monkeypatch):
    def rule(interpreter, eqn, *xs):
        raise IndexError("off by one")

    monkeypatch.setitem(RULES, "dot_general", rule)
    with pytest.raises(PredictionError, match=r"'dot_general' at .*\(before\): IndexError: off by one"):
        vs.predict(Wave(), jax.ShapeDtypeStruct((4, 8), jnp.float32))
