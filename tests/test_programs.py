"""One face for linen, nnx and functions: rows are named as flax's capture names them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from varscale.programs.faces import as_inputs, inputs, leaf_paths, program, rename


class Twice(nn.Module):
    def setup(self):
        self.dense = nn.Dense(4)

    def encode(self, x):
        return self.dense(x)

    def __call__(self, x, train=False):
        return {"a": self.dense(self.encode(x))}


def _rows(model, x, **kwargs):
    p = program(model, **kwargs)
    variables = jax.eval_shape(lambda key: p.init(key, as_inputs(x)), jax.random.key(0))

    def run(v):
        output, captures = p.apply(v, as_inputs(x))
        return rename(captures, output)

    return list(jax.eval_shape(run, variables)), p


def test_linen_paths_repeats_methods_and_containers():
    rows, p = _rows(Twice(), inputs(jnp.ones((2, 4)), train=True))
    assert set(rows) == {"dense", "dense#1", ".encode", "['a']"}
    assert p.kinds["dense"] == "Dense"


def test_the_method_that_is_asked_for_is_the_model_itself():
    rows, _ = _rows(Twice(), jnp.ones((2, 4)), method="encode")
    assert set(rows) == {"dense", ""}


def test_nnx_factory_and_instance_agree():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)])

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    x = jnp.ones((2, 4))
    rows, _ = _rows(lambda rngs: Net(rngs), x)
    assert set(rows) == {"layers/0", "layers/1", ""}
    p = program(Net(nnx.Rngs(0)))
    output, captures = p.apply(p.parameters, as_inputs(x))
    assert set(rename(captures, output)) == set(rows)


@pytest.mark.parametrize(
    ("model", "method", "error"), [(3, None, TypeError), (Twice(), "decode", ValueError), (Twice(), Twice.__call__, TypeError)]
)
def test_bad_models_are_named(model, method, error):
    with pytest.raises(error, match=r"model must be|method must name|method must be the name .* which is method='__call__'"):
        program(model, method=method)


def test_leaf_paths():
    assert [p for p, _ in leaf_paths("x", (jnp.ones(1), {"k": jnp.ones(2)}))] == ["x[0]", "x[1]['k']"]


def test_fields_of_a_dataclass_are_no_methods():
    from flax import struct

    @struct.dataclass
    class Output:
        logits: jax.Array

    assert [p for p, _ in leaf_paths("", Output(jnp.ones(2)))] == ["['logits']"]
