"""A step that measures itself: the plain step's results to the bit, two programs, every graph node written back."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from monitored import BATCH, NET, PARAMS, ROWS, Sink, X, Y, counted, cross_entropy, equal, state, train

import varscale as vs


@pytest.fixture(autouse=True)
def _standard_promotion():
    """optax mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class TestLinen:
    def test_results_to_the_bit_two_programs_and_what_numpy_computes(self):
        function, traces = counted(train)
        step = jax.jit(function, donate_argnums=0, static_argnames="negate")
        sink = Sink()
        monitor = vs.Monitor(step, every=2, sinks=[sink])
        plain, other = jax.jit(train, static_argnames="negate"), state()
        mine = state()
        inputs = []
        for _ in range(5):
            inputs.append(other.params)
            other, expected = plain(other, BATCH, 2.0, negate=True)
            donated = mine
            mine, loss = monitor(mine, BATCH, 2.0, negate=True)
            assert loss == expected
            assert equal(mine, other)
            assert donated.params["body"]["kernel"].is_deleted()  # on measured steps too
        assert len(traces) == 2  # the plain program and the measured one
        assert step._cache_size() == 1
        assert monitor.count == 5
        assert [when for when, _ in sink.found] == [0, 2, 4] == list(monitor.records.steps)
        assert [row.path for row in monitor.report.rows] == ROWS
        for params, (_, scalars) in zip(inputs[::2], sink.found, strict=True):
            outputs = NET.apply({"params": params}, X, capture_intermediates=True)[1]["intermediates"]
            values = {path: outputs[path]["__call__"][0] for path in ("body", "head")} | {"": outputs["__call__"][0]}
            for path, value in values.items():
                wide = np.asarray(value, np.float64)
                assert scalars[f"activation/second_moment/{path}"] == pytest.approx(np.mean(wide**2), rel=1e-5)
                assert scalars[f"activation/largest_magnitude/{path}"] == pytest.approx(np.abs(wide).max())
            at_logits = jax.grad(lambda z: cross_entropy(z, Y) * 2.0)(values[""])
            assert scalars["gradient/second_moment/"] == pytest.approx(float(jnp.mean(at_logits**2)), rel=1e-4)

    def test_a_step_that_is_not_compiled(self):
        function, traces = counted(train)
        monitor = vs.Monitor(function, every=3, static_argnames="negate", donate_argnames="state")
        mine, other, plain = state(), state(), jax.jit(train)
        for _ in range(4):
            donated = mine
            mine, loss = monitor(mine, BATCH)
            other, expected = plain(other, BATCH)
            assert loss == expected
            assert equal(mine, other)
            assert donated.params["body"]["kernel"].is_deleted()
        assert len(traces) == 2
        assert list(monitor.records.steps) == [0, 3]

    def test_other_shapes_are_traced_once_each(self):
        function, traces = counted(train)
        monitor = vs.Monitor(jax.jit(function), every=1)
        mine, half = state(), {"x": X[:8], "y": Y[:8]}
        for batch in (BATCH, half, BATCH, half):
            mine, _ = monitor(mine, batch)
        assert len(traces) == 4
        assert monitor.report.output.shape == (8, 4)

    def test_static_arguments_are_seen_by_position(self):
        @jax.jit
        def inner(params, x):
            return NET.apply({"params": params}, x).sum()

        def step(params, mode, x, scale):
            assert mode == "sum"
            return jax.tree.map(lambda w, g: w - scale * g, params, jax.grad(inner)(params, x))

        monitor = vs.Monitor(jax.jit(step, static_argnums=1), every=1)
        found = monitor(PARAMS, "sum", X, 0.1)
        assert equal(found, jax.jit(step, static_argnums=1)(PARAMS, "sum", X, 0.1))
        monitor(PARAMS, "sum", X, 0.2)
        assert len(monitor._measured) == 1

    def test_static_arguments_that_cannot_be_told_apart(self):
        def step(params, power, scale):
            return NET.apply({"params": params}, X * scale) ** power

        compiled = jax.jit(step, static_argnums=1)
        with pytest.raises(ValueError, match="1 of the step's 3 arguments are static, and it cannot be seen which"):
            vs.Monitor(compiled)(PARAMS, 2, 3)
        found = vs.Monitor(compiled, static_argnums=1)(PARAMS, 2, 3)
        assert equal(found, compiled(PARAMS, 2, 3))

    def test_gradients_accumulated_over_parts_of_a_batch(self):
        """The statistics are means over the parts."""

        @jax.jit
        def step(params, batches):
            def add(total, batch):
                gradients = jax.grad(lambda p: cross_entropy(NET.apply({"params": p}, batch["x"]), batch["y"]))(params)
                return jax.tree.map(jnp.add, total, gradients), None

            total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batches)
            return jax.tree.map(lambda w, g: w - 0.1 * g, params, total)

        batches = jax.tree.map(lambda x: x.reshape(2, 8, *x.shape[1:]), BATCH)
        monitor = vs.Monitor(step)
        assert equal(monitor(PARAMS, batches), step(PARAMS, batches))
        second = np.mean(np.asarray(NET.apply({"params": PARAMS}, X), np.float64) ** 2)
        assert monitor.records[0]["activation/second_moment/"] == pytest.approx(second, rel=1e-5)

    def test_shardings_of_the_compiled_step_are_kept(self):
        mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
        whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))

        def step(params, x):
            gradients = jax.grad(lambda p: jnp.mean(NET.apply({"params": p}, x) ** 2))(params)
            return jax.tree.map(lambda w, g: w - 0.1 * g, params, gradients), NET.apply({"params": params}, x)

        compiled = jax.jit(step, in_shardings=(whole, split), out_shardings=(whole, split))
        monitor = vs.Monitor(compiled, every=2)
        params, x = jax.device_put(PARAMS, whole), jax.device_put(X, split)
        for _ in range(3):
            params, y = monitor(params, x)
            assert y.sharding == split
            assert jax.tree.leaves(params)[0].sharding == whole
        assert compiled._cache_size() == 1
        assert monitor.records[0]["activation/second_moment/"] == pytest.approx(
            np.mean(np.asarray(NET.apply({"params": PARAMS}, X), np.float64) ** 2), rel=1e-5
        )

    def test_only_what_rows_name_is_measured(self):
        monitor = vs.Monitor(jax.jit(train), rows=["head"], stats="full")
        monitor(state(), BATCH)
        assert [row.path for row in monitor.report.rows] == ["head"]
        assert monitor.report["head"].histogram is not None
        assert "activation/kurtosis/head" in monitor.records.keys

    def test_layers_of_a_scan_in_forward_mode(self):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.Dense(8)(x), None

        layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
        params = layers.init(jax.random.key(0), X, None)
        step = jax.jit(lambda params: jax.jvp(lambda p: layers.apply(p, X, None)[0].sum(), (params,), (params,)))
        monitor = vs.Monitor(step)
        assert equal(monitor(params), step(params))
        assert len(monitor.report) > 0
        assert all(row.gradient is None for row in monitor.report.rows)
        assert "forward mode" in monitor.report.table()

    def test_a_step_without_gradients(self):
        monitor = vs.Monitor(jax.jit(lambda params, x: NET.apply({"params": params}, x)))
        monitor(PARAMS, X)
        assert not [key for key in monitor.records.keys if key.startswith("gradient")]


class TestOptax:
    def test_what_optax_measures_is_recorded_and_nothing_else_of_parameters(self):
        tx = optax.chain(
            optax.snapshot("norm", optax.tree.norm),
            optax.monitor(
                {
                    "second_moment": lambda g: jax.tree.map(lambda x: jnp.mean(x * x), g),
                    "ema": optax.measure_with_ema(optax.tree.norm, 0.9),
                }
            ),
            optax.sgd(0.1),
            optax.snapshot("whole", lambda u: u),
        )
        monitor = vs.Monitor(jax.jit(train), every=1)
        monitor(state(tx), BATCH)
        gradients = jax.grad(lambda p: cross_entropy(NET.apply({"params": p}, X), Y))(PARAMS)
        record = monitor.records[0]
        found = {key: value for key, value in record.items() if key.startswith("optax/")}
        names = [f"optax/second_moment/{layer}/{name}" for layer in ("body", "head") for name in ("bias", "kernel")]
        assert set(found) == {"optax/norm", "optax/ema", *names}
        assert found["optax/norm"] == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-5)
        assert found["optax/ema"] == pytest.approx(found["optax/norm"], rel=1e-5)
        kernel = gradients["head"]["kernel"]
        assert found["optax/second_moment/head/kernel"] == pytest.approx(float(jnp.mean(kernel**2)), rel=1e-5)


class TestRefused:
    def test_a_step_that_calls_no_module(self):
        with pytest.raises(ValueError, match="step calls no module, so there is nothing to measure: give a step"):
            vs.Monitor(jax.jit(lambda w, x: x @ w))(jnp.ones((8, 8)), X)

    @pytest.mark.parametrize("every", [0, -1, 1.5, True, "10"])
    def test_every(self, every):
        with pytest.raises(ValueError, match=f"every must be a whole number from 1 on, not {every!r}"):
            vs.Monitor(train, every=every)

    def test_step(self):
        with pytest.raises(TypeError, match=r"step must be a function, or what jax.jit"):
            vs.Monitor(3)  # pyright: ignore[reportArgumentType]
        ahead = jax.jit(lambda x: x).lower(X).compile()
        with pytest.raises(TypeError, match=r"step must be a function, or what jax.jit"):
            vs.Monitor(ahead)

    def test_stats_and_patterns(self):
        with pytest.raises(ValueError, match="stats must be one of 'fast', 'full'"):
            vs.Monitor(train, stats="slow")
        with pytest.raises(ValueError, match="rows='boddy' matches none of the 3 rows"):
            vs.Monitor(jax.jit(train), rows="boddy")(state(), BATCH)

    def test_donated_arguments_of_a_compiled_step(self):
        with pytest.raises(ValueError, match="named for a step that is not compiled"):
            vs.Monitor(jax.jit(train), donate_argnums=0)

    def test_before_the_first_step(self):
        monitor = vs.Monitor(train)
        assert len(monitor.records) == 0
        with pytest.raises(ValueError, match="nothing was measured yet"):
            _ = monitor.report
        with pytest.raises(ValueError, match="no records to plot"):
            monitor.plot()

    def test_a_step_that_fails_is_not_counted(self):
        monitor = vs.Monitor(jax.jit(train))
        with pytest.raises(KeyError):
            monitor(state(), {"x": X})
        assert monitor.count == 0


def test_a_sink_that_fails_does_not_stop_the_training():
    def broken(step, scalars):
        raise OSError("no space left")

    sink = Sink()
    monitor = vs.Monitor(jax.jit(train), sinks=[broken, sink], first_step=200)
    with pytest.warns(RuntimeWarning, match=r"the record of step 200 did not reach a sink: OSError\('no space left'\)"):
        monitor(state(), BATCH)
    assert len(sink.found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor(state(), BATCH)  # step 201 is not measured
