"""What `vs.probe` measures, against NumPy in float64 on captured outputs, and gradients against explicit perturbations."""

import concurrent.futures

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import varscale as vs
from varscale.measuring import reducers

ACTIVATIONS = {"relu": nn.relu, "tanh": jnp.tanh, "gelu": nn.gelu}
layers = st.lists(st.sampled_from(["dense", "norm", *ACTIVATIONS]), min_size=1, max_size=4)


class Linen(nn.Module):
    layers: tuple[str, ...]
    dtype: str

    @nn.compact
    def __call__(self, x):
        for layer in self.layers:
            if layer == "dense":
                x = nn.Dense(8, dtype=self.dtype)(x)
            elif layer == "norm":
                x = nn.LayerNorm(dtype=self.dtype)(x)
            else:
                x = nn.Sequential([ACTIVATIONS[layer]])(x)
        return x


class Nnx(nnx.Module):
    def __init__(self, layers, rngs):
        made = {"dense": lambda: nnx.Linear(8, 8, rngs=rngs), "norm": lambda: nnx.LayerNorm(8, rngs=rngs)}
        self.layers = nnx.List([made.get(layer, lambda f=layer: nnx.Sequential(ACTIVATIONS[f]))() for layer in layers])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def assert_measured(row, x):
    """Fast statistics of an array; the variance is a difference, exact to 1e-5 of the second moment."""
    x = np.asarray(x, np.float64)
    second = np.mean(x**2)
    np.testing.assert_allclose(row.mean, x.mean(), atol=1e-5 * np.sqrt(second) + 1e-12)
    np.testing.assert_allclose(row.second_moment, second, rtol=1e-5)
    np.testing.assert_allclose(row.variance, x.var(), atol=1e-5 * second + 1e-12)
    np.testing.assert_allclose(row.largest_magnitude, np.abs(x).max(), rtol=1e-6)
    np.testing.assert_allclose(row.zero_share, np.mean(x == 0), atol=1e-6)
    assert row.nonfinite_share == 0


@settings(max_examples=5)
@given(layers, st.sampled_from(["float32", "bfloat16", "float16"]), st.floats(0.1, 30))
def test_linen_rows_are_what_flax_captures(names, dtype, scale):
    model, x = Linen(tuple(names), dtype), scale * jax.random.normal(jax.random.key(len(names)), (4, 3, 8)).astype(dtype)
    params = model.init(jax.random.key(0), x)
    # Compiled as one function, as the probe is: in low precision the rounding depends on what is fused.
    state = jax.jit(lambda p, x: model.apply(p, x, capture_intermediates=True, mutable=["intermediates"])[1])(params, x)
    captured = {"/".join(str(key.key) for key in path[1:-2]): x for path, x in jax.tree_util.tree_flatten_with_path(state)[0]}
    report = vs.probe(model, params, x)
    assert {row.path for row in report.rows} == set(captured)
    loose = {"float32": 1, "bfloat16": 1000, "float16": 100}[dtype]
    for row in report.rows:
        assert row.dtype == dtype
        np.testing.assert_allclose(
            row.second_moment, np.mean(np.asarray(captured[row.path], np.float64) ** 2), rtol=1e-5 * loose
        )
        if dtype == "float32":
            assert_measured(row, captured[row.path])


@settings(max_examples=3)
@given(layers)
def test_nnx_rows_are_what_the_layers_put_out(names):
    model, x = Nnx(names, nnx.Rngs(0)), jax.random.normal(jax.random.key(2), (4, 8))
    report = vs.probe(model, None, x)
    assert [row.path for row in report.rows] == [f"layers/{i}" for i in range(len(names))] + [""]
    for i, layer in enumerate(model.layers):
        x = layer(x)
        assert_measured(report[f"layers/{i}"], x)


def test_full_statistics_are_numpys():
    x = jax.random.normal(jax.random.key(0), (5, 4, 6)) + jax.random.normal(jax.random.key(1), (1, 1, 6))
    x = jax.nn.relu(x).at[..., 2].set(0)
    report = vs.probe(lambda _, x: x, {}, x, stats=["full", {"top": lambda x: jnp.max(x)}])
    row, x = report.output, np.asarray(x, np.float64)
    assert_measured(row, x)
    assert row.custom == {"top": pytest.approx(x.max())}
    centred = x - x.mean()
    expected = {
        "kurtosis": np.mean(centred**4) / x.var() ** 2,
        "channel_mean_squared": np.mean(x.mean((0, 1)) ** 2),
        "dead_share": np.mean((x == 0).all((0, 1))),
        "saturated_share": np.mean(np.abs(x) > 0.99),
        "overflow_share": 0,
        "underflow_share": 0,
    }
    pairs = [(x[i] * x[j]).mean() for i in range(5) for j in range(5) if i != j]
    expected["sample_correlation"] = np.mean(pairs) / np.mean(x**2)
    pairs = [(x[:, i] * x[:, j]).mean() for i in range(4) for j in range(4) if i != j]
    expected["position_correlation"] = np.mean(pairs) / np.mean(x**2)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(row, name), value, rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(row.histogram.counts, np.histogram(x, row.histogram.edges)[0])


def test_one_reduction_measures_the_same():
    x = jax.random.normal(jax.random.key(0), (7, 5, 3)).at[0, 0].set(0).at[1, 1, 1].set(jnp.nan)
    one, many = jax.jit(reducers.tight)(x), jax.jit(reducers.fast)(x)
    assert one.keys() == many.keys()
    for name in one:
        np.testing.assert_allclose(one[name], many[name], rtol=1e-6, err_msg=name)
    assert many["nonfinite_share"] == pytest.approx(1 / 105)


@pytest.mark.parametrize(("dtype", "large", "small"), [("float16", 5e4, 1e-7), ("bfloat16", 2e38, 2e-38)])
def test_the_ends_of_low_precision_are_seen_and_its_squares_do_not_overflow(dtype, large, small):
    x = jnp.asarray([300.0, large, small, 0.0], dtype)
    row = vs.probe(lambda _, x: x, {}, x, stats="full").output
    assert (row.overflow_share, row.underflow_share, row.nonfinite_share) == (0.25, 0.25, 0)
    if dtype == "float16":
        np.testing.assert_allclose(row.second_moment, np.mean(np.asarray(x, np.float64) ** 2), rtol=1e-5)


def test_gradients_are_those_of_an_explicit_perturbation():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, eps=None):
            add = lambda i, x: x if eps is None else x + eps[i]  # noqa: E731
            x = jnp.tanh(add(0, nn.Dense(8, name="a")(x)))
            dense = nn.Dense(8, name="b")
            x = x + add(1, dense(x))
            return add(3, nn.Dense(3, name="c")(add(2, dense(x))))

    model, x = Net(), jax.random.normal(jax.random.key(3), (4, 8))
    params = model.init(jax.random.key(0), x)
    loss = lambda y: jnp.mean(jnp.sin(3 * y) ** 2)  # noqa: E731
    report = vs.probe(model, params, x, loss=loss)
    zeros = [jnp.zeros((4, n)) for n in (8, 8, 8, 3)]
    gradients, of_params = jax.grad(lambda eps, p: loss(model.apply(p, x, eps)), argnums=(0, 1))(zeros, params)
    for path, gradient in zip(["a", "b", "b#1", "c"], gradients, strict=True):
        expected = np.mean(np.asarray(gradient, np.float64) ** 2)
        np.testing.assert_allclose(report[path].gradient, expected, rtol=1e-5, err_msg=path)
    for name in "abc":
        weight, w, g = report.weights[f"{name}/kernel"], *(t["params"][name]["kernel"] for t in (params, of_params))
        np.testing.assert_allclose(weight.gradient, np.mean(np.square(g)), rtol=1e-5)
        np.testing.assert_allclose(weight.gradient_ratio, np.linalg.norm(g) / np.linalg.norm(w), rtol=1e-5)


def test_a_row_that_the_loss_does_not_depend_on_has_gradient_zero():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="used")(x), nn.Dense(8, name="unused")(x)

    x = jnp.ones((2, 8))
    report = vs.probe(Net(), Net().init(jax.random.key(0), x), x, loss=lambda y: jnp.sum(y[0]))
    assert (report["used"].gradient, report["unused"].gradient) == (1.0, 0.0)


class Planted(nn.Module):
    """A square root whose argument is 0 or negative at one layer."""

    shift: float

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="before")(x)
        x = nn.Sequential([lambda x: jnp.sqrt(jnp.abs(x) * 0 + self.shift)], name="root")(x)
        return nn.Dense(8, name="after")(x)


@pytest.mark.parametrize(("shift", "direction"), [(-1.0, "forward"), (0.0, "backward")])
def test_the_first_nan_is_found(shift, direction):
    x = jnp.ones((2, 8))
    model = Planted(shift)
    report = vs.probe(model, model.init(jax.random.key(0), x), x, loss="random")
    found = report.first_nonfinite
    assert (found.direction, found.path) == (direction, {"forward": "root", "backward": "before"}[direction])


def test_threads_probe_and_predict_their_own_models():
    def work(width):
        x = jax.random.normal(jax.random.key(0), (4, width))
        model = nn.Sequential([nn.Dense(width), jnp.tanh, nn.Dense(width)])
        factory = lambda rngs: Nnx(["dense", "tanh"], rngs)  # noqa: E731
        probed = vs.probe(model, model.init(jax.random.key(0), x), x, loss="random")
        reports = probed, vs.probe(factory, None, x[:, :8]), vs.predict(factory, jax.ShapeDtypeStruct((4, 8), "float32"))
        return [[(row.path, row.shape, row.second_moment) for row in report.rows] for report in reports]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        together = list(pool.map(work, (8, 16, 24)))
    assert together == [work(width) for width in (8, 16, 24)]


DENSE = nn.Dense(4)
PARAMS = {"params": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}}
ERRORS = {
    "loss": ({"loss": lambda y: y}, r"loss must return a floating-point scalar, not an array of shape \(2, 4\)"),
    "loss kind": ({"loss": "sum"}, "loss must be a function of the model's output, 'random' or None, not 'sum'"),
    "params": ({"params": {"params": {"kernel": jnp.ones((8, 4))}}}, r"params must hold 'params/bias' of shape \(4,\)"),
    "no params": ({"params": None}, "params must be given"),
    "shape": ({"params": {"params": {"kernel": jnp.ones((7, 4)), "bias": jnp.zeros(4)}}}, r"must have shape \(8, 4\)"),
    "x": ({"x": jnp.float32(1)}, "x does not fit the model"),
    "abstract x": ({"x": jax.ShapeDtypeStruct((2, 8), jnp.float32)}, "x must hold arrays"),
    "rows": ({"rows": "encoder/**"}, "rows='encoder/\\*\\*' matches none of the 1 rows"),
    "stats": ({"stats": "slow"}, "stats must be one of 'fast', 'full' or a function"),
    "own stats": ({"stats": {"all": lambda x: x}}, "stats: all must return scalars"),
    "memory": ({"memory": "none"}, "memory must be one of 'fast', 'tight', not 'none'"),
    "method": ({"method": "encode"}, "method must name a method of Dense"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_one_clear_error(name):
    changed, message = ERRORS[name]
    arguments = {"params": PARAMS, "x": jnp.ones((2, 8))} | changed
    with pytest.raises(ValueError, match=message):
        vs.probe(DENSE, arguments.pop("params"), arguments.pop("x"), **arguments)


def test_keys_choose_the_dropout():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(nn.Dense(64)(x))

    x = jnp.ones((2, 8))
    params = Net().init(jax.random.key(0), x)
    seconds = [vs.probe(Net(), params, x, rngs=rngs).output.second_moment for rngs in (1, 1, {"dropout": jax.random.key(2)})]
    assert seconds[0] == seconds[1] != seconds[2]
    model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    zeros = [vs.probe(model, None, jnp.ones((8, 64)), rngs=rngs).output.zero_share for rngs in (None, None, 1)]
    assert zeros[0] == zeros[1] != zeros[2]
    assert model.rngs.count[...] == 0
    with pytest.raises(TypeError, match="rngs must be a key"):
        vs.probe(Net(), params, x, rngs="dropout")
