"""`vs.calibrate`: predicted typical values are the target; draws agree; directions, ties, stacks, depth; what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import varscale as vs
from varscale.schemes import calibration

FUNCTIONS = {"tanh": jnp.tanh, "relu": nn.relu, "gelu": nn.gelu, "silu": nn.silu, "sin": jnp.sin}


def described(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


class Net(nn.Module):
    """Layers of given widths; "r": a residual branch of two layers; "n": a layer norm before it."""

    widths: tuple[int, ...]
    function: str = "tanh"
    branches: str = ""

    @nn.compact
    def __call__(self, x):
        act = FUNCTIONS[self.function]
        for i, n in enumerate(self.widths):
            x = nn.Dense(n, name=f"layer_{i}")(x)
            if i < len(self.widths) - 1:
                x = act(x)
            for k, kind in enumerate(self.branches):
                h = nn.LayerNorm(name=f"norm_{i}_{k}")(x) if kind == "n" else x
                h = act(nn.Dense(2 * n, name=f"up_{i}_{k}")(h))
                x = x + nn.Dense(n, name=f"down_{i}_{k}")(h)
        return x


def typicals(model, x, plan, **options):
    """Typical second moment of each row that a kernel makes."""
    report = vs.predict(model, x, scheme=plan, backward=False, **options)
    made = {leaf.path.rpartition("/")[0] for leaf in plan if leaf.why.startswith(("typical", "forward"))}
    return {row.path: row.typical for row in report.rows if row.path.split("@")[0].split("#")[0] in made}


ARCHITECTURES = st.builds(
    Net,
    widths=st.lists(st.sampled_from([1, 6, 40]), min_size=1, max_size=3).map(tuple),
    function=st.sampled_from(sorted(FUNCTIONS)),
    branches=st.sampled_from(["", "r", "n", "rn"]),
).filter(lambda net: not ("n" in net.branches and 1 in net.widths))  # a norm of one number puts out zero


@given(model=ARCHITECTURES, target=st.sampled_from([1.0, 0.3, 20.0]))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_predicted_typical_values_are_the_target_for_any_architecture(model, target):
    x = described(4, 10)
    plan = vs.calibrate(model, x, target=target)
    found = typicals(model, x, plan)
    assert len(found) == len(model.widths) * (1 + 2 * len(model.branches))
    assert found == pytest.approx(dict.fromkeys(found, target), rel=1e-6)


@pytest.mark.parametrize("model", [Net((48, 48, 48), "gelu", "n"), Net((16,) * 6, "relu")], ids=["residual", "narrow"])
def test_draws_have_the_target_as_their_geometric_mean_and_lie_in_the_band(model):
    """400 draws. The mean of logarithms is 5 standard errors off with probability 6e-7 a row; a row of a 99 % band loses 15
    draws or more with probability 4e-5, and would lose 25 on average if the band covered only 94 %.
    """
    count, x = 400, described(32, 48)
    plan = vs.calibrate(model, x)
    rows = {row.path: row for row in vs.predict(model, x, scheme=plan, backward=False).rows}
    data = jax.random.normal(jax.random.key(5), x.shape)
    data = data / jnp.sqrt(jnp.mean(jnp.square(data)))

    @jax.jit
    @jax.vmap
    def squares(key):
        params = {}
        for i, leaf in enumerate(plan):
            module, name = leaf.path.split("/")
            params.setdefault(module, {})[name] = leaf.law(jax.random.fold_in(key, i), leaf.shape, jnp.float32)
        _, state = model.apply({"params": params}, data, capture_intermediates=True, mutable=["intermediates"])
        return {
            path: jnp.mean(jnp.square(out["__call__"][0])) for path, out in state["intermediates"].items() if path[0] != "_"
        }

    for path, values in squares(jax.random.split(jax.random.key(6), count)).items():
        if "norm" in path:
            continue
        logs, row = np.log(np.asarray(values, float)), rows[path]
        assert abs(logs.mean()) < row.error_bound + 5 * logs.std() / count**0.5, path
        outside = np.sum((logs < np.log(row.band[0])) | (logs > np.log(row.band[1])))
        assert outside < 15, (path, outside)


def test_backward_keeps_gradients_and_both_lies_between():
    model, x = Net((60, 40, 30, 20)), described(16, 50)
    plan = vs.calibrate(model, x, direction="backward")
    report = vs.predict(model, x, scheme=plan)
    gradients = [row.gradient for row in report.rows]
    assert gradients == pytest.approx([1.0] * len(gradients), rel=5e-3)  # but for terms of order 1/width
    assert report["layer_0"].typical == pytest.approx(1, rel=1e-6)  # no layer before it: the forward variance
    assert "backward std" in plan["layer_1/kernel"].why
    forward, both = vs.calibrate(model, x), vs.calibrate(model, x, direction="both")
    for path in ("layer_1/kernel", "layer_3/kernel"):
        low, high = sorted((forward[path].std, plan[path].std))
        assert low <= both[path].std <= high
    # A linear layer: 1/fan_in forward, 1/fan_out backward, Glorot's compromise in the geometric mean.
    linear = nn.Sequential([nn.Dense(80), nn.Dense(20)])
    std = vs.calibrate(linear, x, direction="both")["layers_1/kernel"].std
    assert std == pytest.approx((80 * 20) ** -0.25, rel=0.02)


def test_convolutions_of_another_form_and_packed_attention():
    class Convolutions(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), name="a")(x))
            x = x + nn.Conv(8, (3, 3), feature_group_count=4, name="b")(x)
            x = nn.max_pool(nn.gelu(nn.Conv(6, (2, 2), strides=2, name="c")(x)), (2, 2), (2, 2))
            return nn.Dense(5, name="d")(x.mean((1, 2)))

    model, x = Convolutions(), described(4, 8, 8, 3)
    found = typicals(model, x, vs.calibrate(model, x))
    assert set(found) == {"a", "b", "c", "d"}
    assert found == pytest.approx(dict.fromkeys(found, 1.0), rel=1e-6)

    factory = lambda rngs: nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)  # noqa: E731
    x = described(4, 8, 16)
    plan = vs.calibrate(factory, x, rows="out")
    assert [leaf.path for leaf in plan if leaf.why.startswith("typical")] == ["out/kernel"]
    assert vs.predict(factory, x, scheme=plan, backward=False)["out"].typical == pytest.approx(1, rel=1e-6)
    assert vs.calibrate(factory, x)["query/kernel"].std == pytest.approx(0.25, rel=0.02)


class Layer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(nn.Dense(self.width)(x)), None


class Deep(nn.Module):
    depth: int
    width: int

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
        return nn.Dense(3, name="head")(stack(self.width, name="layers")(x, None)[0])


def test_stacked_layers_have_a_variance_each_and_a_deep_narrow_net_is_warned_of():
    model, x = Deep(60, 16), described(8, 16)
    plan = vs.calibrate(model, x)
    found = typicals(model, x, plan)
    assert len(found) == 61
    assert found == pytest.approx(dict.fromkeys(found, 1.0), rel=1e-6)
    assert plan["layers/Dense_0/kernel"].law.axis == 0
    assert len(plan["layers/Dense_0/kernel"].law.factors) == 60
    assert "vs.lsuv" in plan.notes[0]
    assert "layers/Dense_0/kernel@" in plan.notes[0]
    assert vs.calibrate(Net((200, 200)), x).notes == ()
    params = vs.initialize(model, jax.random.key(0), x, scheme=plan)
    plan.verify(params)
    assert vs.Plan.from_json(plan.to_json()) == plan


def test_the_walk_and_the_prediction_agree_on_stacked_layers(monkeypatch):
    """One check of a plan for stacked layers passes, whatever their depth: their laws keep their kurtosis, layer by layer."""
    predictions = []
    monkeypatch.setattr(calibration, "predict", lambda *args, **kwargs: predictions.append(1) or vs.predict(*args, **kwargs))
    model, x = Deep(20, 8), described(4, 8)
    found = typicals(model, x, vs.calibrate(model, x))
    assert found == pytest.approx(dict.fromkeys(found, 1.0), rel=5e-7)
    assert len(predictions) <= 1


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(16)(jnp.tanh(nn.Dense(16)(x)))


class Blocks(nn.Module):
    block: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        for _ in range(4):
            x = self.block()(x)
        return x


@pytest.mark.parametrize("block", [Residual, nn.remat(Residual)])
def test_the_check_of_a_plan_reads_the_row_of_every_kernel(block, monkeypatch):
    """Also in blocks of one kind, which are traced once."""
    seen, ratios = [], calibration._ratios
    monkeypatch.setattr(calibration, "_ratios", lambda *args: seen.append((args[1], ratios(*args))) or seen[-1][1])
    vs.calibrate(Blocks(block), described(4, 16))
    ((found, read),) = seen
    assert len(read) == len(found) == 8
    assert max(abs(ratio - 1) for ratio in read.values()) < 5e-7


def test_a_kernel_with_several_uses_has_one_variance():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(20)
            for _ in range(4):
                x = jnp.tanh(layer(x))
            return nn.Dense(3)(x)

    x = described(8, 20)
    plan = vs.calibrate(Shared(), x)
    report = vs.predict(Shared(), x, scheme=plan, backward=False)
    uses = [row.typical for row in report.rows if row.path.startswith("Dense_0")]
    assert np.mean(np.log(uses)) == pytest.approx(0, abs=1e-6)
    assert report["Dense_1"].typical == pytest.approx(1, rel=1e-6)
    assert "4 uses" in plan["Dense_0/kernel"].why


def test_what_keeps_its_law():
    class Kept(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(20, 16)(ids)
            x = x + nn.Dense(16, kernel_init=nn.initializers.zeros, name="zero")(nn.Dense(16, name="up")(x))
            x = nn.Dense(4, bias_init=nn.initializers.normal(0.5), name="head")(x)
            x = nn.LayerNorm()(nn.Dense(1, name="one")(x))
            return nn.RNN(nn.SimpleCell(8), name="rnn")(nn.Dense(8, name="dead")(x))

    ids = described(4, 6, dtype="int32")
    plan = vs.calibrate(Kept(), ids)
    why = {leaf.path: leaf.why for leaf in plan}
    assert "looked up" in why["Embed_0/embedding"]
    assert "constant" in why["zero/kernel"]
    assert "zero" in why["dead/kernel"]
    assert any("loop" in told for path, told in why.items() if "Cell" in path and path.endswith("i/kernel"))
    found = typicals(Kept(), ids, plan)
    assert set(found) == {"up", "head", "one"}  # the head's with its bias
    assert found == pytest.approx(dict.fromkeys(found, 1.0), rel=1e-6)


def test_a_kernel_that_the_program_normalises_keeps_its_law():
    def model(p, x):
        w = (p["w"] - p["w"].mean(0, keepdims=True)) / jnp.sqrt(p["w"].var(0, keepdims=True) + 1e-5)
        return jax.nn.relu(x @ w) @ p["v"]

    params = {"w": jnp.ones((16, 16)), "v": jnp.ones((16, 3))}
    plan = vs.calibrate(
        model, described(4, 16), params=lambda key: jax.tree.map(lambda w: vs.normal(0.1)(key, w.shape), params)
    )
    assert "normalises it" in plan["w"].why
    assert plan["v"].why.startswith("typical")


def test_a_kernel_that_reads_one_array_twice_is_checked_once():
    class Symmetric(nn.Module):
        @nn.compact
        def __call__(self, x):
            key = nn.Dense(8, use_bias=False, name="key")
            return nn.Dense(16, name="value")(nn.softmax(key(x) @ key(x).mT) @ x)

    model, x = Symmetric(), described(2, 5, 16)
    assert typicals(model, x, vs.calibrate(model, x))["key"] == pytest.approx(1, rel=1e-6)


def test_a_plain_function():
    def net(params, x):
        with jax.named_scope("one"):
            x = jnp.tanh(x @ params["a"])
        return x @ params["b"]

    params = {"a": vs.Moments(0.0, 1.0, shape=(12, 30)), "b": vs.Moments(0.0, 1.0, shape=(30, 4))}
    plan = vs.calibrate(net, described(8, 12), params=params)
    report = vs.predict(net, described(8, 12), params=params, scheme=plan, backward=False)
    assert report.output.typical == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0}, "target must be finite and > 0"),
        ({"direction": "up"}, "direction must be one of"),
        ({"rows": "nothing"}, "matches none"),
        ({"distribution": "cauchy"}, "distribution must be one of"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        vs.calibrate(Net((4, 4)), described(4, 4), **options)


def test_models_that_cannot_be_calibrated():
    with pytest.raises(ValueError, match="no kernel"):
        vs.calibrate(nn.LayerNorm(), described(4, 4))


def test_a_bias_that_is_larger_than_the_target():
    model, x = nn.Dense(8, bias_init=nn.initializers.constant(2.0)), described(4, 4)
    plan = vs.calibrate(model, x)
    assert "the bias beside it has the second moment 4" in plan.notes[0]
    assert vs.predict(model, x, scheme=plan, backward=False).output.second_moment == pytest.approx(5, rel=0.1)


class Experts(nn.Module):
    """Each position goes to the two experts with the largest gates."""

    @nn.compact
    def __call__(self, x):
        top, which = jax.lax.top_k(nn.softmax(nn.Dense(4, use_bias=False, name="gates")(x)), 2)
        chosen = jnp.sum(jax.nn.one_hot(which, 4) * top[..., None], axis=-2)
        kernels = self.param("experts", nn.initializers.lecun_normal(batch_axis=0), (4, 16, 16))
        return jnp.einsum("btd,edf,bte->btf", x, kernels, chosen)


class Routed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="first")(x)
        x = x + Experts(name="mixture")(nn.RMSNorm()(x))
        return nn.Dense(4, name="head")(x)


def test_experts_that_are_drawn_do_not_keep_the_rows_after_them_from_the_target():
    """Each prediction has the same draws: with its own, rows differ by a few per cent from one to the next."""
    x = described(2, 6, 8)
    plan = vs.calibrate(Routed(), x)
    found = typicals(Routed(), x, plan)
    assert {"first", "mixture/gates", "head"} <= set(found)
    assert found == pytest.approx(dict.fromkeys(found, 1.0), rel=1e-6)


class Patches(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), strides=2, name="patches")(x).reshape(2, 9, 8)
        return nn.Dense(3, name="head")(x + self.param("positions", nn.initializers.normal(0.5), (1, 9, 8)))


def test_what_is_added_to_a_reshaped_product_is_no_bias_of_it():
    x = described(2, 6, 6, 3)
    found = typicals(Patches(), x, vs.calibrate(Patches(), x))
    assert found == pytest.approx({"patches": 1.0, "head": 1.0}, rel=1e-6)


class Pictures(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3), name="first")(x)), (2, 2), (2, 2))
        return nn.Dense(3, name="head")(nn.LayerNorm()(x.reshape(len(x), -1)))


def test_a_model_that_is_drawn_as_a_whole_is_calibrated_by_predictions():
    """Neighbouring pixels of pictures are alike: no walk leads through a window over them."""
    x = jnp.cumsum(jnp.cumsum(jax.random.normal(jax.random.key(0), (3, 8, 8, 2)), 1), 2) / 8
    plan = vs.calibrate(Pictures(), x, target=2.0)
    found = typicals(Pictures(), x, plan)
    assert found == pytest.approx(dict.fromkeys(["first", "head"], 2.0), rel=1e-6)
    for direction in ("backward", "both"):
        with pytest.raises(ValueError, match=rf"direction='{direction}' must follow gradients .* draws this one as a whole"):
            vs.calibrate(Pictures(), x, direction=direction)


class GridBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))


class Grid(nn.Module):
    """Attention over places of a grid: known positions keep its two axes apart."""

    @nn.compact
    def __call__(self, x):
        places = [jnp.sin(axis * (1 + jnp.arange(8))[None]) for axis in jnp.mgrid[:3, :3].reshape(2, 9, 1)]
        x = nn.Dense(16, name="first")(x).reshape(-1, 9, 16) + jnp.concatenate(places, 1)[None]
        for _ in range(2):
            x = GridBlock()(x)
        return x


def test_softmax_over_two_axes_in_blocks_that_are_traced_once(monkeypatch):
    monkeypatch.setattr(calibration, "_CHECKS", 3)  # of ten: the parts that are drawn cost the time
    x = jax.ShapeDtypeStruct((2, 3, 3, 8), jnp.float32)
    plan = vs.calibrate(Grid(), x)
    rows = vs.predict(Grid(), x, scheme=plan, backward=False).rows
    ends = {row.path: row.typical for row in rows if row.path.endswith(("first", "query", "key", "value", "out"))}
    assert len(ends) == 9
    assert ends == pytest.approx(dict.fromkeys(ends, 1.0), rel=0.15)  # 1.9 after the first
