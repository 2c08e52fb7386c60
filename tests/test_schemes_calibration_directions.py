"""`vs.calibrate` with directions "backward" and "both" inside a scan, and what its plan warns of."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import varscale as vs


class Tanh(nn.Module):
    """Layers in a scan, behind one of another kind."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(TanhLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=40)
        return stack(name="layers")(nn.Dense(64, name="first")(x), None)[0]


class TanhLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(64, name="dense")(jnp.tanh(x)), None


def test_backward_and_both_in_a_scan_and_their_warnings():
    """At the variance of both, a tanh net's gradients grow by 1.18 a layer; where gradients are kept its signal shrinks."""
    model, x = Tanh(), jax.ShapeDtypeStruct((16, 50), "float32")
    plan = vs.calibrate(model, x, direction="backward")
    gradients = [row.gradient for row in vs.predict(model, x, scheme=plan).rows]
    assert gradients == pytest.approx([1.0] * len(gradients), rel=0.1)  # 41 layers, each to terms of order 1/width
    assert not any("gradients" in note for note in plan.notes)
    both = vs.calibrate(model, x, direction="both")
    (note,) = both.notes
    start = int(note.split("layers/dense/kernel@")[1].split(" ")[0])
    assert "back (kernel" in note
    assert "vs.schemes.critical" in note
    report = vs.predict(model, x, scheme=both)
    assert report[f"layers/dense@{start}"].gradient > 100 > report[f"layers/dense@{start + 1}"].gradient
