"""A step of nnx that measures itself: the plain step's results, every graph node written back."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from monitored import BATCH, X, counted, cross_entropy, equal, rounded

import varscale as vs


@pytest.fixture(autouse=True)
def _standard_promotion():
    """optax mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(nnx.relu(self.norm(self.linear(x))))


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.head = nnx.Linear(8, 4, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def train_nnx(model, optimizer, metrics, batch, train=True):
    """The loop of nnx."""
    value, gradients = nnx.value_and_grad(lambda model: cross_entropy(model(batch["x"]), batch["y"]))(model)
    optimizer.update(model, gradients)
    metrics.update(loss=value)
    return value if train else -value


TX = optax.chain(optax.snapshot("norm", optax.tree.norm), optax.sgd(1e-2, momentum=0.9))


def objects(model=Stack):
    made = model(nnx.Rngs(0))
    return made, nnx.Optimizer(made, TX, wrt=nnx.Param), nnx.MultiMetric(loss=nnx.metrics.Average("loss"))


class TestNnx:
    def test_every_graph_node_is_written_back(self):
        function, traces = counted(train_nnx)
        monitor = vs.Monitor(nnx.jit(function, static_argnums=4), every=2)
        mine, other = objects(), objects()
        plain = nnx.jit(train_nnx, static_argnums=4)
        kernel = mine[0].blocks[0].linear.kernel
        classes = [type(module) for _, module in nnx.iter_modules(mine[0])]
        for _ in range(3):
            assert rounded(monitor(*mine, BATCH, False), plain(*other, BATCH, False))
            for a, b in zip(mine, other, strict=True):
                assert nnx.graphdef(a) == nnx.graphdef(b)
                assert equal(nnx.state(a), nnx.state(b), agree=rounded)
        assert mine[0].blocks[0].linear.kernel is kernel
        assert int(mine[0].calls[...]) == 3
        assert [type(module) for _, module in nnx.iter_modules(mine[0])] == classes
        assert len(traces) <= 3  # the plain program, how it places its arguments, and the measured one
        paths = [f"blocks/{i}{part}" for i in range(2) for part in ("/linear", "/norm", "/dropout", "")]
        assert [row.path for row in monitor.report.rows] == [*paths, "head", ""]
        assert all(row.gradient is not None for row in monitor.report.rows)
        assert monitor.records[-1]["optax/norm"] > 0

    @pytest.mark.parametrize("given", ["not compiled", "donated"])
    def test_however_the_step_was_made(self, given):
        def linear(rngs):
            return nnx.Linear(8, 4, rngs=rngs)

        if given == "donated":
            monitor = vs.Monitor(nnx.jit(train_nnx, donate_argnums=(0, 1)), every=2)
        else:
            monitor = vs.Monitor(train_nnx, every=2, static_argnames="train")
        plain, mine, other = nnx.jit(train_nnx), objects(linear), objects(linear)
        for _ in range(3):
            before = mine[0].kernel.get_value()
            assert rounded(monitor(*mine, BATCH), plain(*other, BATCH))
            assert equal([nnx.state(x) for x in mine], [nnx.state(x) for x in other], agree=rounded)
            assert before.is_deleted() == (given == "donated")
        assert [row.path for row in monitor.report.rows] == [""]

    def test_a_variable_that_the_step_adds_is_written_back(self):
        class Remembering(nnx.Linear):
            def __call__(self, x):
                self.last = nnx.Intermediate(super().__call__(x))
                return self.last[...]

        model = Remembering(8, 4, rngs=nnx.Rngs(0))
        step = nnx.jit(lambda model, x: model(x).sum())
        monitor = vs.Monitor(step, every=1)
        for _ in range(2):
            assert monitor(model, X) == model.last[...].sum()
        assert [row.path for row in monitor.report.rows] == [""]

    def test_several_models_are_told_apart_by_their_arguments(self):
        @nnx.jit
        def step(generator, critic, x):
            return jnp.mean(critic(generator(x)))

        linear = [nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2)]
        monitor = vs.Monitor(step)
        assert monitor(*linear, X) == step(*linear, X)
        assert [row.path for row in monitor.report.rows] == ["generator", "critic"]
