"""`vs.transfer.lora_init`: what the model computes is unchanged; each init is what its source says."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import varscale as vs

INITS = ("uniform", "gaussian", "orthogonal", "pissa", "olora")
KEY = jax.random.key(0)


class Net(nnx.Module):
    def __init__(self, rngs, dtype=jnp.float32):
        self.one = nnx.LoRALinear(12, 10, lora_rank=4, param_dtype=dtype, lora_param_dtype=dtype, rngs=rngs)
        self.two = nnx.LoRA(10, 4, 6, base_module=nnx.Linear(10, 6, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        return self.two(nnx.tanh(self.one(x)))


@pytest.fixture(scope="module")
def model():
    return Net(nnx.Rngs(0))


X = jax.random.normal(jax.random.key(1), (8, 12))


@pytest.mark.parametrize("alpha", [None, 16.0])
@pytest.mark.parametrize("init", INITS)
def test_the_function_is_unchanged_and_so_is_the_given_model(model, init, alpha):
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(model)[1]))
    new = vs.transfer.lora_init(model, KEY, init, alpha=alpha)
    assert isinstance(new, Net)
    tolerance = 0 if init in ("uniform", "gaussian") else 2e-6
    assert np.allclose(new(X), model(X), atol=tolerance, rtol=0)
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(model)[1]))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    assert not np.array_equal(new.one.lora.lora_a[...], model.one.lora.lora_a[...])
    assert bool(jnp.any(new.one.lora.lora_b[...])) == (init not in ("uniform", "gaussian"))


def test_drawn_matrices_have_the_law_of_their_source():
    """4000 weights: a variance is 12 % off with probability 1e-7."""
    layer = nnx.LoRALinear(1000, 3, lora_rank=4, rngs=nnx.Rngs(0))
    uniform = vs.transfer.lora_init(layer, KEY, "uniform").lora.lora_a[...]
    assert float(jnp.var(uniform)) == pytest.approx(1 / 3000, rel=0.12)
    assert float(jnp.max(jnp.abs(uniform))) <= 1000**-0.5
    gaussian = vs.transfer.lora_init(layer, KEY, "gaussian").lora.lora_a[...]
    assert float(jnp.var(gaussian)) == pytest.approx(1 / 16, rel=0.12)
    orthogonal = vs.transfer.lora_init(layer, KEY, "orthogonal").lora
    # .1 X Q₁: each row has E|a|² = .01 r/2.
    assert float(jnp.mean(jnp.sum(jnp.square(orthogonal.lora_a[...]), 1))) == pytest.approx(0.02, rel=0.12)
    assert np.allclose(orthogonal.lora_a[...] @ orthogonal.lora_b[...], 0, atol=1e-6)


def test_pissa_takes_the_largest_singular_values_off_the_kernel(model):
    new, kernel = vs.transfer.lora_init(model, KEY, "pissa").one, np.asarray(model.one.kernel[...])
    values = np.linalg.svd(kernel, compute_uv=False)
    rest = np.linalg.svd(np.asarray(new.kernel[...]), compute_uv=False)
    assert rest == pytest.approx([*values[4:], 0, 0, 0, 0], abs=1e-5)
    a, b = (np.asarray(x[...]) for x in (new.lora.lora_a, new.lora.lora_b))
    assert np.sum(a * a, 0) == pytest.approx(values[:4], rel=1e-4)
    assert np.sum(b * b, 1) == pytest.approx(values[:4], rel=1e-4)


def test_olora_is_the_decomposition_of_the_transposed_kernel(model):
    new, kernel = vs.transfer.lora_init(model, KEY, "olora").one, np.asarray(model.one.kernel[...])
    b = np.asarray(new.lora.lora_b[...])
    assert np.allclose(b @ b.T, np.eye(4), atol=1e-5)
    assert np.allclose(new.lora.lora_a[...], kernel @ b.T, atol=1e-5)  # Wᵀ = Q R, so R = Qᵀ Wᵀ


@pytest.mark.parametrize(("stabilized", "scale"), [(True, 8 / 2), (False, 8 / 4)])
def test_the_scale_is_in_a(model, stabilized, scale):
    plain, scaled = (
        vs.transfer.lora_init(model, KEY, "gaussian", alpha=alpha, rank_stabilized=stabilized) for alpha in (None, 8.0)
    )
    assert np.allclose(scaled.one.lora.lora_a[...], scale * plain.one.lora.lora_a[...], rtol=1e-6)
    plain, scaled = (
        vs.transfer.lora_init(model, KEY, "pissa", alpha=alpha, rank_stabilized=stabilized).one.lora for alpha in (None, 8.0)
    )
    assert np.allclose(scaled.lora_a[...], scale**0.5 * plain.lora_a[...], rtol=1e-4, atol=1e-6)
    assert np.allclose(scaled.lora_b[...], scale**-0.5 * plain.lora_b[...], rtol=1e-4, atol=1e-6)


def test_patterns_and_precision():
    model = Net(nnx.Rngs(0), jnp.bfloat16)
    new = vs.transfer.lora_init(model, KEY, "pissa", patterns="one")
    assert new.one.kernel.dtype == new.one.lora.lora_a.dtype == jnp.bfloat16
    assert np.array_equal(new.two.lora_a[...], model.two.lora_a[...])
    x = X.astype(jnp.bfloat16)
    assert np.allclose(np.asarray(new.one(x), float), np.asarray(model.one(x), float), atol=0.05)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_trees_with_heads_and_layers(init, dtype):
    """Each layer's kernel less s A B, with its heads flattened; the sum is the kernel to rounding of what is left."""
    shapes = {"query": ((6,), (2, 4)), "out": ((2, 4), (6,))}
    keys = iter(jax.random.split(KEY, 9))
    modules: dict = {
        name: {
            "kernel": jax.random.normal(next(keys), (3, *n, *m), dtype),
            "lora": {"lora_a": jnp.zeros((3, *n, 2), dtype), "lora_b": jnp.zeros((3, 2, *m), dtype)},
        }
        for name, (n, m) in shapes.items()
    }
    modules["einsum"] = {"w": modules["query"]["kernel"][0], "lora_a": jnp.zeros((6, 2)), "lora_b": jnp.zeros((2, 2, 4))}
    new = vs.transfer.lora_init({"params": modules}, KEY, init, alpha=3.0)["params"]
    eps = 2 * float(jnp.finfo(dtype).eps)
    for name, (n, m) in shapes.items():
        a, b = (new[name]["lora"][part].astype(jnp.float32) for part in ("lora_a", "lora_b"))
        made = jnp.einsum("lir,lro->lio", a.reshape(3, -1, 2), b.reshape(3, 2, -1)).reshape(3, *n, *m)
        rest = np.asarray(new[name]["kernel"], np.float32)
        off = np.abs(rest + made - np.asarray(modules[name]["kernel"], np.float32))
        assert np.all(off <= eps * (np.abs(rest) + 1e-6 + (dtype == jnp.float32)))
        assert new[name]["kernel"].dtype == a.dtype if dtype == jnp.float32 else new[name]["kernel"].dtype == dtype
        if init == "pissa" and dtype == jnp.float32:
            for layer in range(3):
                values = np.linalg.svd(np.asarray(modules[name]["kernel"][layer]).reshape(math.prod(n), -1), compute_uv=False)
                left = np.linalg.svd(rest[layer].reshape(math.prod(n), -1), compute_uv=False)
                assert left == pytest.approx([*values[2:], 0, 0], abs=1e-5)
    assert not np.allclose(new["einsum"]["w"], modules["einsum"]["w"])
    drawn = vs.transfer.lora_init({"params": modules}, KEY, "uniform", patterns="query")["params"]
    assert np.array_equal(drawn["query"]["kernel"], modules["query"]["kernel"])
    assert np.array_equal(drawn["out"]["lora"]["lora_a"], modules["out"]["lora"]["lora_a"])
    assert len({float(x) for x in drawn["query"]["lora"]["lora_a"][:, 0, 0]}) == 3


def test_a_linear_general_has_its_axes_flattened():
    base = nnx.LinearGeneral(8, (2, 3), rngs=nnx.Rngs(0))
    lora = nnx.LoRA(8, 2, 6, base_module=base, rngs=nnx.Rngs(1))
    new = vs.transfer.lora_init(lora, KEY, "pissa")
    made = new.base_module.kernel[...].reshape(8, 6) + new.lora_a[...] @ new.lora_b[...]
    assert np.allclose(made, base.kernel[...].reshape(8, 6), atol=1e-6)


class SharedKernel(nnx.Module):
    """Two adapters around one layer."""

    def __init__(self, rngs):
        base = nnx.Linear(8, 8, rngs=rngs)
        self.one = nnx.LoRA(8, 2, 8, base_module=base, rngs=rngs)
        self.two = nnx.LoRA(8, 2, 8, base_module=base, rngs=rngs)

    def __call__(self, x):
        return self.two(self.one(x))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_kernel_that_two_adapters_share_is_left_alone(init):
    """What one takes off it, the other would miss."""
    model, x = SharedKernel(nnx.Rngs(0)), X[:, :8]
    for patterns in ("**", "one"):
        with pytest.raises(ValueError, match="'one' shares one with 'two'"):
            vs.transfer.lora_init(model, KEY, init, patterns=patterns)
    assert jnp.array_equal(vs.transfer.lora_init(model, KEY, "gaussian")(x), model(x))
    adapters = {name: {"lora_a": jnp.zeros((8, 2)), "lora_b": jnp.zeros((2, 8))} for name in ("one", "two")}
    with pytest.raises(ValueError, match="'layer/one' shares one with 'layer/two'"):
        vs.transfer.lora_init({"layer": {"kernel": jnp.eye(8), **adapters}}, KEY, init)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_kernel_of_integers_is_refused(init):
    tree = {"kernel": jnp.eye(4, dtype=jnp.int8), "lora_a": jnp.zeros((4, 2)), "lora_b": jnp.zeros((2, 4))}
    with pytest.raises(ValueError, match=r"floating-point numbers .*, not int8"):
        vs.transfer.lora_init(tree, KEY, init)


def test_bad_input(model):
    lora_init = vs.transfer.lora_init
    with pytest.raises(TypeError, match="model"):
        lora_init({"a": "x"}, KEY)
    with pytest.raises(ValueError, match="the tree holds none"):
        lora_init({"a": jnp.ones(2)}, KEY)
    with pytest.raises(ValueError, match="must have shapes"):
        lora_init({"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((3, 4))}, KEY, "gaussian")
    with pytest.raises(ValueError, match="init must be one of"):
        lora_init(model, KEY, "best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="alpha must be"):
        lora_init(model, KEY, alpha=-1.0)
    with pytest.raises(ValueError, match="holds none"):
        lora_init(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), KEY)
    with pytest.raises(ValueError, match="'three' matches none"):
        lora_init(model, KEY, patterns="three")
    with pytest.raises(ValueError, match="there is none"):
        lora_init(nnx.LoRA(4, 2, 4, rngs=nnx.Rngs(0)), KEY, "pissa")
    with pytest.raises(ValueError, match="even rank"):
        lora_init(nnx.LoRA(4, 3, 4, rngs=nnx.Rngs(0)), KEY, "orthogonal")
    with pytest.raises(ValueError, match="at most"):
        lora_init(nnx.LoRALinear(2, 8, lora_rank=4, rngs=nnx.Rngs(0)), KEY, "olora")
