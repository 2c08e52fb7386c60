"""Which rows a report has, in which order and under which paths: layers of loops, scopes of functions, equations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import varscale as vs

X = jax.ShapeDtypeStruct((16, 32), jnp.float32)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.up, self.down = nnx.Linear(32, 128, rngs=rngs), nnx.Linear(128, 32, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


def scanned(blocks, x):
    return nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(blocks, x)


def scanned_with_outputs(blocks, x):
    def step(x, block):
        x = block(x)
        return x, x.mean()

    return nnx.scan(nnx.remat(step), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(x, blocks)[0]


def merged_by_hand(blocks, x):
    graph, state = nnx.split(blocks)
    return lax.scan(jax.checkpoint(lambda x, part: (nnx.merge(graph, part)(x), None)), x, state)[0]


class Stacked(nnx.Module):
    def __init__(self, loop, rngs, layers=3):
        self.loop = loop
        self.blocks = nnx.split_rngs(splits=layers)(nnx.vmap(Block))(rngs)
        self.head = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        return self.head(self.loop(self.blocks, x))


def test_layers_of_an_nnx_scan_over_rematerialized_or_compiled_blocks_are_as_without():
    def loop(step):
        scanned = nnx.scan(step, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return vs.predict(lambda rngs: Stacked(scanned, rngs, 6), X).rows

    plain, saved, compiled = (loop(of(lambda block, x: block(x))) for of in (lambda step: step, nnx.remat, nnx.jit))
    assert [row.how for row in plain] == ["quadrature"] * (6 * 4 + 2)
    assert saved == plain
    assert compiled == plain


@pytest.mark.parametrize("loop", [scanned, scanned_with_outputs, merged_by_hand])
def test_layers_of_an_nnx_scan_have_rows_of_their_own(loop):
    report = vs.predict(lambda rngs: Stacked(loop, rngs), X)
    inside = ["blocks/norm", "blocks/up", "blocks/down", "blocks"]
    assert [row.path for row in report.rows] == [f"{path}@{i}" for i in range(3) for path in inside] + ["head", ""]
    steps = [report[f"blocks/down@{i}"] for i in range(3)]
    assert [(row.kind, row.shape) for row in steps] == 3 * [("Linear", (16, 32))]
    stream = [report[f"blocks@{i}"] for i in range(3)]
    expected = 1 + np.cumsum([row.second_moment for row in steps])
    np.testing.assert_allclose([row.second_moment for row in stream], expected, rtol=1e-3)
    # What a residual stream carries forward it carries back: the gradient grows from the last layer to the first.
    gradients = [row.gradient for row in stream]
    assert None not in gradients
    assert gradients == sorted(gradients, reverse=True)
    weight = report.weights["blocks/up/kernel"]
    assert (weight.uses, weight.fan_in) == (3, 32)


def test_a_loop_that_carries_its_module_has_rows():
    class Counting(nnx.Module):
        """Captures would change the structure of what the loop carries."""

        def __init__(self, rngs):
            self.dense, self.count = nnx.Linear(32, 32, rngs=rngs), nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x):
            @nnx.scan(length=2, in_axes=(nnx.Carry,), out_axes=nnx.Carry)
            def repeat(carry):
                model, x = carry
                model.count[...] += 1
                return model, x + 1.0

            return self.dense(repeat((self, x))[1])

    report = vs.predict(lambda rngs: Counting(rngs), X)
    assert [row.path for row in report.rows] == ["dense", ""]
    assert report.output.second_moment == pytest.approx(5, rel=0.02)


def test_what_an_nnx_module_inherits_or_hides_is_its_own():
    class Base(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(32, 32, rngs=rngs)

        def __call__(self, x):
            return self._twice(self.encode(x))

        def encode(self, x):
            return self.dense(x)

        def _twice(self, x):
            return 2 * x

    class Child(Base):
        pass

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.child = Child(rngs)

        def __call__(self, x):
            return self.child(x)

    before = dict(vars(Base))
    report = vs.predict(lambda rngs: Net(rngs), X)
    assert [row.path for row in report.rows] == ["child/dense", "child.encode", "child", ""]
    assert report["child"].second_moment == pytest.approx(4 * report["child.encode"].second_moment)
    assert dict(vars(Base)) == before  # the classes are as they were


def test_modules_inside_a_plain_vmap_have_rows():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(8, name="inner")
            dense(x[0])  # made outside of the map
            return jax.vmap(dense)(x)

    assert [(row.path, row.shape) for row in vs.predict(Net(), X).rows] == [
        ("inner", (8,)),
        ("inner#1", (16, 8)),
        ("", (16, 8)),
    ]


def test_a_scan_that_returns_several_arrays_says_which():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = nn.Dense(32)(x)
            return x, 3 * x[:1]

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x, ys = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(name="layers")(x, None)
            return x + ys.sum(0)

    report = vs.predict(Net(), X)
    assert report["layers@1[0]"].second_moment == pytest.approx(1, rel=0.02)
    assert report["layers@1[1]"].second_moment == pytest.approx(9, rel=0.02)


W = {"w": vs.Moments(0.0, 1 / 32, (3, 32, 32))}


def test_scopes_of_a_function_are_its_rows():
    def net(params, x):
        for i in range(2):
            with jax.named_scope("layer"):
                x = jnp.tanh(jnp.einsum("bi,ij->bj", x, params["w"][i]))
                with jax.named_scope("double"):
                    x = jax.jit(lambda x: 2 * x)(x)
        with jax.named_scope("layer"):
            return x @ params["w"][2], x.mean()

    report = vs.predict(net, X, params=W)
    expected = ["layer/double", "layer", "layer/double#1", "layer#1", "layer#2", "[0]", "[1]"]
    assert [row.path for row in report.rows] == expected
    assert {row.kind for row in report.rows if row.path.startswith("layer")} == {"scope"}
    assert report["layer/double"].second_moment == pytest.approx(4 * vs.gaussian.second_moment(jnp.tanh), rel=0.05)
    assert report["layer#2"].shape == (16, 32)  # not the mean, which is put out after it


def test_scopes_inside_loops_over_layers_have_steps_and_over_time_no_rows():
    def layer(x, w):
        with jax.named_scope("dense"):
            return x @ w, None

    def cell(h, x):
        with jax.named_scope("cell"):
            return jnp.tanh(h + x), None

    def net(params, x):
        with jax.named_scope("stack"):
            x, _ = lax.scan(layer, x, params["w"])
        with jax.named_scope("rnn"):
            return lax.scan(cell, jnp.zeros((4, 32)), x.reshape(4, 4, 32))[0]

    report = vs.predict(net, X, params=W)
    # Behind tanh the radial part of a gradient is the smaller one, by up to 1/32 of the whole a layer.
    assert report["stack/dense@0"].gradient == pytest.approx(report["stack"].gradient, rel=2 / 32)
    assert [row.path for row in report.rows] == [f"stack/dense@{i}" for i in range(3)] + ["stack", "rnn", ""]


@pytest.mark.filterwarnings("error::RuntimeWarning")  # of what stands for infinities nothing is worked out
def test_every_equation_has_a_row():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(64, use_bias=False)(x)
            keys = nn.Dense(64, use_bias=False)(x)
            with jax.named_scope("scores"):
                scores = x @ keys.T / 64
            return nn.relu(nn.softmax(jnp.where(jnp.tri(16) > 0, scores, -jnp.inf)) @ x).astype(jnp.float32)

    report = vs.predict(Net(), X, detail="equations")
    kinds = {row.path: row.kind for row in report.rows}
    assert list(kinds)[:2] == ["Dense_0/dot_general", "Dense_0"]
    assert list(kinds)[4:6] == ["scores/transpose", "scores/dot_general"]
    assert (kinds["Dense_0"], kinds["Dense_0/dot_general"], kinds["dot_general"]) == ("Dense", "dot_general", "dot_general")
    assert not {"jit", "pjit", "custom_jvp_call"} & set(kinds.values())
    assert report["scores/dot_general"].shape == (16, 16)
    # Half of it is masked: no number can be put on that, and none is.
    assert report["select_n"].second_moment == np.inf == report["select_n"].error_bound
    rest = vs.predict(Net(), X)
    assert [report[row.path] for row in rest.rows] == list(rest.rows)


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(32, name="dense", use_bias=False)(x)), None


def scanned(x):
    """Two such layers with weights of their own."""
    return nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(name="body")(x, None)


def test_equations_inside_loops_have_steps_and_loops_over_time_are_one():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x, _ = scanned(x)
            return jnp.sinh(x), lax.scan(lambda h, x: (h + x, None), jnp.zeros(32), x)[0]

    paths = [row.path for row in vs.predict(Net(), X, detail="equations").rows]
    assert paths[:3] == ["body/dense/dot_general@0", "body/dense@0", "body/tanh@0"]
    assert paths.count("scan") == 1
    assert "add" not in paths


def test_layers_inside_a_region_have_rows_and_gradients():
    """A sort has no rule, so the model that it is in is drawn."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x, _ = scanned(x)
            return nn.Dense(8, name="last")(jnp.sort(x, -1))

    report = vs.predict(Net(), X)
    assert [row.path for row in report.rows] == ["body/dense@0", "body@0", "body/dense@1", "body@1", "last", ""]
    assert {row.how for row in report.rows} == {"sampled"}
    assert all(row.gradient > 0 for row in report.rows)
    assert report["body/dense@0"].second_moment == pytest.approx(1, rel=report["body/dense@0"].error_bound)


def test_another_detail_names_what_is_allowed():
    with pytest.raises(ValueError, match=r"detail must be one of 'modules', 'equations', not 'all'"):
        vs.predict(nn.Dense(4), X, detail="all")
