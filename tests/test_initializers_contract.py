"""ONE contract, held by ALL initializers of the library.

Each case is an initializer with a shape that it serves. To add an initializer, add a case: the last test fails until every
public maker of `varscale.initializers` has one.
"""

import inspect
import math
import pickle

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import varscale as vs
from varscale import initializers

KERNEL = (16, 24)
CONV = (3, 3, 8, 16)
MASK = np.tri(16, 24) > 0

CASES = {
    "variance_scaling": (vs.variance_scaling(2.0, "fan_avg", "normal"), KERNEL),
    "for_activation": (vs.for_activation(jax.nn.gelu), KERNEL),
    **{
        name: (getattr(vs, name)(), CONV)
        for name in ("he_normal", "he_uniform", "glorot_normal", "glorot_uniform", "lecun_normal", "lecun_uniform")
    },
    "rademacher": (vs.variance_scaling(distribution="rademacher"), KERNEL),
    "fans": (vs.variance_scaling(fans=vs.einsum_fans("bi,io->bo", KERNEL)), KERNEL),
    "normal": (vs.normal(0.5), KERNEL),
    "truncated_normal": (vs.truncated_normal(0.5), KERNEL),
    "symmetric_uniform": (vs.symmetric_uniform(0.5), KERNEL),
    "cut_normal": (vs.cut_normal(0.5, 0.6), KERNEL),
    "constant": (vs.constant(0.25), KERNEL),
    "zeros": (vs.zeros, KERNEL),
    "ones": (vs.ones, KERNEL),
    "orthogonal": (vs.orthogonal(2.0), KERNEL),
    "delta_orthogonal": (vs.delta_orthogonal(), CONV),
    "identity": (vs.identity(), KERNEL),
    "dirac": (vs.dirac(2), CONV),
    "sparse": (vs.sparse(0.5), KERNEL),
    "fused": (vs.fused(vs.orthogonal(), 3), KERNEL),
    "scaled": (vs.scaled(vs.he_normal(), 0.5), KERNEL),
    "masked": (vs.masked(vs.he_normal(), MASK), KERNEL),
    "pytorch_linear": (vs.pytorch_linear(), KERNEL),
    "pytorch_bias": (vs.pytorch_bias(16), (24,)),
    "embedding": (vs.embedding(), KERNEL),
    "lstm_bias": (vs.lstm_bias(), (24,)),
    "log_prior_bias": (vs.log_prior_bias(0.01), (24,)),
    "siren": (vs.siren(), KERNEL),
    "siren_first": (vs.siren_first(), KERNEL),
    "truncated_normal at 3": (vs.truncated_normal(0.5, None, -3.0, 3.0), KERNEL),
    # Large enough for the unrolled sampler.
    "unrolled": (vs.he_normal(), (128, 160)),
}
IGNORES_KEY = {"constant", "zeros", "ones", "identity", "dirac", "lstm_bias", "log_prior_bias"}
REAL_ONLY = {"cut_normal", "truncated_normal at 3"}

pytestmark = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def drawn():
    """Each initializer's own weights, eager and under jit, drawn once."""
    key = jax.random.key(7)
    eager = {name: init(key, shape) for name, (init, shape) in CASES.items()}
    jitted = {name: jax.jit(lambda key, init=init, shape=shape: init(key, shape))(key) for name, (init, shape) in CASES.items()}
    return key, eager, jitted


def test_shape_dtype_and_purity(name, drawn):
    init, shape = CASES[name]
    key, eager, jitted = drawn
    weights = eager[name]
    assert weights.shape == shape
    assert weights.dtype == jnp.float32
    assert jnp.isfinite(weights).all()
    np.testing.assert_array_equal(init(key, shape), weights)
    # Under jit XLA folds constants: the last place may differ, as it does for jax's own.
    np.testing.assert_allclose(jitted[name], weights, rtol=2e-6, atol=1e-6)
    other = init(jax.random.key(8), shape)
    assert bool((other == weights).all()) == (name in IGNORES_KEY)


def test_is_a_value(name, drawn):
    init, _ = CASES[name]
    again = pickle.loads(pickle.dumps(init))
    assert again == init
    assert hash(again) == hash(init)
    assert eval(repr(init), dict(vars(vs))) == init, repr(init)
    with pytest.raises(AttributeError):
        init.dtype = jnp.dtype("float16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_low_precision_is_float32_rounded_once(name, dtype, drawn):
    init, shape = CASES[name]
    key, eager, _ = drawn
    weights = init(key, shape, jnp.dtype(dtype))
    assert weights.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(weights, eager[name].astype(dtype))


@pytest.mark.parametrize("dtype", ["complex64"])
def test_complex(name, dtype, drawn):
    init, shape = CASES[name]
    if name in REAL_ONLY:
        with pytest.raises(TypeError, match="real"):
            init(drawn[0], shape, dtype)
    else:
        weights = init(drawn[0], shape, dtype)
        assert weights.dtype == jnp.dtype(dtype)
        assert jnp.isfinite(weights).all()


def test_transformations(name, drawn):
    init, shape = CASES[name]
    key, eager, _ = drawn
    keys = jax.random.split(key, 2)
    expected = np.stack([init(keys[0], shape), init(keys[1], shape)])
    close = {"rtol": 2e-5, "atol": 2e-6}
    np.testing.assert_allclose(jax.vmap(lambda key: init(key, shape))(keys), expected, **close)
    _, scanned = jax.lax.scan(lambda carry, key: (carry, init(key, shape)), 0, keys)
    np.testing.assert_allclose(scanned, expected, **close)
    assert jax.eval_shape(lambda key: init(key, shape), key) == jax.ShapeDtypeStruct(shape, eager[name].dtype)


def test_under_debug_flags(name, drawn):
    init, shape = CASES[name]
    with jax.debug_nans(True), jax.debug_key_reuse(True):
        weights = init(jax.random.key(7), shape)
    np.testing.assert_array_equal(weights, drawn[1][name])


def test_every_kind_of_key(name, drawn):
    init, shape = CASES[name]
    np.testing.assert_array_equal(init(jax.random.PRNGKey(7), shape), drawn[1][name])
    for implementation in ("rbg", "unsafe_rbg"):
        assert jnp.isfinite(init(jax.random.key(7, impl=implementation), shape)).all()


def test_lowers_for_every_platform(name, drawn):
    init, shape = CASES[name]
    exported = jax.export.export(jax.jit(lambda key: init(key, shape)), platforms=("cpu", "cuda", "tpu"))(drawn[0])
    assert exported.platforms == ("cpu", "cuda", "tpu")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_out_sharding(name, kind, drawn):
    init, shape = CASES[name]
    mesh = jax.make_mesh((math.gcd(8, jax.device_count()),), ("devices",), axis_types=(kind,))
    spec = PartitionSpec(*[None] * (len(shape) - 1), "devices")
    sharding = NamedSharding(mesh, spec)
    with jax.set_mesh(mesh):
        for asked in (sharding, spec):
            weights = init(drawn[0], shape, None, asked)
            assert weights.sharding.is_equivalent_to(sharding, len(shape))
            np.testing.assert_allclose(weights, drawn[1][name], rtol=2e-6, atol=1e-6)


def test_as_flax_initializer(name, drawn):
    init, shape = CASES[name]
    key, eager, _ = drawn
    if len(shape) == 2:
        layer = nnx.Linear(*shape, kernel_init=init, rngs=nnx.Rngs(params=0))
        params = linen.Dense(shape[1], kernel_init=init).init(key, jnp.ones((1, shape[0])))["params"]
        kernels = (layer.kernel[...], params["kernel"])
    elif len(shape) == 4:
        layer = nnx.Conv(shape[2], shape[3], shape[:2], kernel_init=init, rngs=nnx.Rngs(params=0))
        params = linen.Conv(shape[3], shape[:2], kernel_init=init).init(key, jnp.ones((1, 8, 8, shape[2])))["params"]
        kernels = (layer.kernel[...], params["kernel"])
    else:
        layer = nnx.Linear(4, shape[0], bias_init=init, rngs=nnx.Rngs(params=0))
        params = linen.Dense(shape[0], bias_init=init).init(key, jnp.ones((1, 4)))["params"]
        kernels = (layer.bias[...], params["bias"])
    for kernel in kernels:
        assert kernel.shape == shape
        if name in IGNORES_KEY:
            np.testing.assert_array_equal(kernel, eager[name])
        else:
            # Another key, the same law: the mean square agrees within a factor that 24 entries cannot miss.
            assert 0.2 < float((kernel**2).mean() / (eager[name] ** 2).mean()) < 5


def test_empty_shapes_and_bad_calls(name, drawn):
    init, shape = CASES[name]
    key = drawn[0]
    if name not in ("delta_orthogonal", "masked"):
        empty = init(key, (0, *shape[1:]) if len(shape) > 1 else (0,))
        assert empty.size == 0
    with pytest.raises(ValueError, match="shape"):
        init(key, (-1, *shape[1:]))
    with pytest.raises(TypeError, match="shape"):
        init(key, 5)
    if name not in IGNORES_KEY:
        with pytest.raises(TypeError, match="dtype"):
            init(key, shape, jnp.int32)
        for bad in (0, None, "key", jnp.ones(2)):
            with pytest.raises(TypeError, match="key"):
                init(bad, shape)
        with pytest.raises(ValueError, match="single"):
            init(jax.random.split(key, 2), shape)


def test_every_public_maker_has_a_case(name):
    makers = {
        public
        for public in initializers.__all__
        if not inspect.isclass(getattr(vs, public))
        and public not in ("compute_fans", "conv_fans", "einsum_fans", "gain", "pytorch_gain", "prior_bias")
        and not public.startswith(("kaiming", "xavier"))
    }
    assert makers <= set(CASES)
    assert (vs.kaiming_normal, vs.xavier_uniform, vs.prior_bias) == (vs.he_normal, vs.glorot_uniform, vs.log_prior_bias)
