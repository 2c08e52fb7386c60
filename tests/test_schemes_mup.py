"""μP, CompleteP and the spectral condition against their papers' formulas, on models that know nothing of them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import varscale as vs
from varscale.schemes.parametrization import Growth, Scaling, mup

X = jax.ShapeDtypeStruct((4, 8), jnp.float32)
IDS = jax.ShapeDtypeStruct((2, 6), jnp.int32)
BASE = 16


def mlp(width):
    return nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(3)])


class Net(nn.Module):
    """A pre-norm transformer; `own` has μP's and CompleteP's numbers in the program."""

    width: int
    blocks: int = 1
    tied: bool = False
    own: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of scores, branches and the readout

    @nn.compact
    def __call__(self, ids):
        score, branch, readout = self.own
        embed = nn.Embed(30, self.width, name="embed")
        x = embed(ids)
        for i in range(self.blocks):
            h = nn.LayerNorm(name=f"norm{i}")(x)
            q, k, v = (nn.DenseGeneral((2, self.width // 2), name=f"{part}{i}")(h) for part in ("query", "key", "value"))
            y = jax.nn.dot_product_attention(q * jnp.asarray(score, q.dtype), k, v)
            x = x + branch * nn.DenseGeneral(self.width, axis=(-2, -1), name=f"out{i}")(y)
            h = nn.relu(nn.Dense(4 * self.width, name=f"up{i}")(nn.LayerNorm(name=f"norm{i}b")(x)))
            x = x + branch * nn.Dense(self.width, name=f"down{i}")(h)
        x = nn.LayerNorm(name="final")(x)
        return readout * (embed.attend(x) if self.tied else nn.Dense(30, name="head")(x))


class NnxNet(nnx.Module):
    """The same MLP in nnx."""

    def __init__(self, width, rngs):
        self.layers = nnx.List([nnx.Linear(8, width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)])
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


@functools.cache
def transformer_plan(width):
    return vs.schemes.mup(base=Net(BASE))(Net(width), IDS)


def numbers(leaf):
    names = ("adam_learning_rate", "sgd_learning_rate", "adam_epsilon")
    return (leaf.std, *map(leaf.multiplier, names))


# By column of table 3 (arXiv 2203.03466): std over the base's, Adam's and SGD's learning rates; Adam's epsilon as gradients go.
def table_3(column, m):
    return {
        "input": (1, 1, m, 1 / m), "hidden": (m**-0.5, 1 / m, 1, 1 / m), "readout": (1 / m, 1 / m, 1 / m, 1),
        "query": (1 / m, m**-1.5, 1 / m, m**-0.5), "fixed": (1, 1, 1, 1),
    }[column]  # fmt: skip


@pytest.mark.parametrize("width", [32, 64, 128])
def test_an_mlp_has_the_numbers_of_table_3(width):
    plan = vs.schemes.mup(base=mlp(BASE))(mlp(width), X)
    m = width / BASE
    std = {"layers_0": 8**-0.5, "layers_2": BASE**-0.5, "layers_4": BASE**-0.5}
    for layer, column in (("layers_0", "input"), ("layers_2", "hidden"), ("layers_4", "readout")):
        expected = table_3(column, m)
        assert numbers(plan[f"{layer}/kernel"]) == pytest.approx((std[layer] * expected[0], *expected[1:]), rel=1e-5)
        assert numbers(plan[f"{layer}/bias"])[1:] == table_3("fixed" if column == "readout" else "input", m)[1:]
    assert [(r.name, r.status) for r in plan.requirements] == [("readout multiplier", "folded")]


@pytest.mark.parametrize("width", [32, 64, 128])
def test_a_transformer_has_the_numbers_of_table_3(width):
    plan, m = transformer_plan(width), width / BASE
    columns = {"embed/embedding": "input", "norm0/scale": "input", "key0/kernel": "hidden", "out0/kernel": "hidden"}
    columns |= {"up0/kernel": "hidden", "down0/kernel": "hidden", "query0/kernel": "query", "head/kernel": "readout"}
    bases = {"down0/kernel": (4 * BASE) ** -0.5, "norm0/scale": 0.0}
    for path, column in columns.items():
        expected = table_3(column, m)
        assert numbers(plan[path]) == pytest.approx((bases.get(path, BASE**-0.5) * expected[0], *expected[1:]), rel=1e-5), path
    scores = next(r for r in plan.requirements if r.name == "attention scale")
    assert (scores.expected, scores.found, scores.status) == pytest.approx(
        (math.sqrt(BASE / 2) / (width / 2), (width / 2) ** -0.5, "folded")
    )


def test_a_tied_model_gets_table_8_and_its_multipliers_are_looked_for():
    plan = vs.schemes.mup(base=Net(BASE, tied=True))(Net(64, tied=True), IDS)
    assert numbers(plan["embed/embedding"]) == pytest.approx((BASE**-0.5, 1, 4, 1 / 4), rel=1e-5)
    assert numbers(plan["query0/kernel"]) == pytest.approx((64**-0.5, 1 / 4, 1, 1 / 4), rel=1e-5)
    assert {r.name: r.status for r in plan.requirements} == {"readout multiplier": "missing", "attention scale": "missing"}
    whole = vs.schemes.mup(base=Net(BASE, tied=True))(Net(64, tied=True, own=(0.5, 1.0, 0.25)), IDS)
    assert {r.name: r.status for r in whole.requirements} == {"readout multiplier": "present", "attention scale": "present"}
    twice = vs.schemes.mup(base=Net(BASE, tied=True))(Net(64, tied=True, own=(0.5, 1.0, 0.0625)), IDS)
    assert (twice.requirements[0].status, twice.requirements[0].found) == ("missing", 0.0625)


def test_a_number_that_the_program_has_is_not_folded_again():
    plan = vs.schemes.mup(base=Net(BASE))(Net(64, own=(0.5, 1.0, 0.25)), IDS)
    assert {r.name: r.status for r in plan.requirements} == {"readout multiplier": "present", "attention scale": "present"}
    assert numbers(plan["query0/kernel"]) == pytest.approx((64**-0.5, 1 / 4, 1, 1 / 4), rel=1e-5)
    assert numbers(plan["head/kernel"]) == pytest.approx((BASE**-0.5, 1, 4, 1 / 4), rel=1e-5)  # table 8


class Packed(nn.Module):
    """One attention whose scores are made in a way of its own, from query, key and value packed in one kernel."""

    width: int
    scores: str = "softmax"
    mu: bool = False  # whether the program divides by the head's size

    @nn.compact
    def __call__(self, ids):
        x, size = nn.Embed(30, self.width, name="embed")(ids), self.width // 2
        groups = 1 if self.scores == "grouped" else 2
        sizes = [2 * size, (2 + groups) * size, (2 + 2 * groups) * size]
        wide = sizes[-1] + 4 * self.width * (self.scores == "fused")
        *packed, up = jnp.split(nn.Dense(wide, name="qkv")(nn.LayerNorm()(x)), sizes, axis=-1)
        q, k, v = (part.reshape(*ids.shape, -1, size) for part in packed)
        if self.scores == "normed":
            q, k = nn.RMSNorm()(q), nn.RMSNorm()(k)
        if groups == 1:
            k, v = (jnp.repeat(part, 2, axis=2) for part in (k, v))
        scale = (BASE / 2) ** 0.5 / size if self.mu else size**-0.5
        y = attended(self.scores, q, k, v, scale).reshape(*ids.shape, -1)
        if self.scores == "bounded value":
            y = jnp.tanh(y)
        if self.scores == "fused":  # a feed-forward layer beside the attention, whose input the same kernel makes
            x = x + nn.Dense(self.width, name="down")(nn.gelu(up))
        return nn.Dense(30, name="head")(nn.LayerNorm()(x + nn.Dense(self.width, name="out")(y)))


def attended(scores, q, k, v, scale):
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if scores == "blocks":  # of keys, with a running maximum and sum

        def step(state, block):
            (top, total, y), (s, v) = state, block
            higher = jnp.maximum(top, s.max(-1))
            weights, shrink = jnp.exp(s - higher[..., None]), jnp.exp(top - higher)
            y = y * shrink[..., None] + jnp.einsum("bhqk,bkhd->bhqd", weights, v)
            return (higher, total * shrink + weights.sum(-1), y), None

        start = (jnp.full(s.shape[:3], -1e30), jnp.zeros(s.shape[:3]), jnp.zeros((*s.shape[:3], v.shape[-1])))
        blocks = s.reshape(*s.shape[:3], 2, -1).transpose(3, 0, 1, 2, 4), v.reshape(len(v), 2, -1, *v.shape[2:]).swapaxes(0, 1)
        (_, total, y), _ = jax.lax.scan(step, start, blocks)
        return (y / total[..., None]).swapaxes(1, 2)
    if scores == "capped":
        s = 50 * jnp.tanh(s / 50)
    weights = jnp.exp(s) / jnp.exp(s).sum(-1, keepdims=True) if scores == "no maximum" else jax.nn.softmax(s)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize(
    ("scores", "without"),
    [(scores, "folded") for scores in ("softmax", "grouped", "blocks", "capped", "no maximum")]
    + [("normed", "missing"), ("bounded value", "missing"), ("fused", "missing")],  # no weight can do it
)
def test_scores_of_packed_kernels_have_their_division(scores, without):
    for mu, status in ((True, "present"), (False, without)):
        plan = vs.schemes.mup(base=Packed(BASE, scores, mu))(Packed(64, scores, mu), IDS)
        assert [(r.where, r.status) for r in plan.requirements if r.name == "attention scale"] == [("qkv/kernel", status)]
        m = 4**0.25 if status == "folded" else 1.0  # half of the factor ½ in query and key each; the value's is undone
        assert plan["qkv/kernel"].std == pytest.approx(64**-0.5 / m, rel=1e-5)
        assert plan["qkv/bias"].multiplier("adam_learning_rate") == pytest.approx(1 / m, rel=1e-5)
        assert plan["out/kernel"].std == pytest.approx(64**-0.5 * m, rel=1e-5)
        assert plan["out/bias"].multiplier("adam_learning_rate") == 1


def test_a_division_in_packed_weights_makes_the_same_model_as_in_the_program():
    """The laws are the same numbers, scaled: so are the draws of one key."""
    ids, outputs = np.arange(12).reshape(2, 6), []
    for mu in (True, False):
        model, base = Packed(64, "softmax", mu), Packed(BASE, "softmax", mu)
        params = vs.initialize(model, jax.random.key(0), IDS, scheme=vs.schemes.mup(base=base))
        outputs.append(np.asarray(model.apply(params, ids)))
    assert outputs[0] == pytest.approx(outputs[1], abs=1e-5)
    missing = vs.schemes.mup(base=Packed(BASE), table=8)(Packed(64), IDS).requirements
    assert {r.status for r in missing} == {"missing"}


def test_completep_over_width_and_depth():
    plan = vs.schemes.completep(base=Net(BASE, 1))(Net(64, 2), IDS)
    assert numbers(plan["up1/kernel"]) == pytest.approx((64**-0.5, 1 / 4, 2, 1 / 8), rel=1e-5)
    assert numbers(plan["down1/kernel"]) == pytest.approx((256**-0.5, 1 / 4, 2, 1 / 8), rel=1e-5)
    assert numbers(plan["norm1/scale"])[1:] == numbers(plan["up1/bias"])[1:] == (1, 8, 1 / 8)
    assert numbers(plan["final/scale"])[1:] == numbers(plan["embed/embedding"])[1:] == (1, 4, 1 / 4)
    branches = {r.where: (r.status, r.expected) for r in plan.requirements if r.name == "residual multiplier"}
    assert branches == dict.fromkeys(("out0/kernel", "down0/kernel", "out1/kernel", "down1/kernel"), ("missing", 0.5))
    own = vs.schemes.completep(base=Net(BASE, 1))(Net(64, 2, own=(0.5, 0.5, 0.25)), IDS)
    assert {r.status for r in own.requirements} == {"present"}
    square = vs.schemes.completep(base=Net(BASE, 1), alpha=0.5)(Net(BASE, 4), IDS)
    assert square["up3/kernel"].multiplier("adam_learning_rate") == 0.5


def test_completep_in_the_weights_makes_the_same_model_as_in_the_program():
    inside = vs.schemes.completep(base=Net(BASE, 1))(Net(64, 2), IDS)
    folded = vs.schemes.completep(base=Net(BASE, 1), multipliers="weights")(Net(64, 2), IDS)
    for path in ("down1/kernel", "down1/bias", "out0/kernel", "head/kernel"):
        a, b, factor = inside[path], folded[path], 0.25 if path == "head/kernel" else 0.5
        assert b.std == pytest.approx(a.std * factor)
        assert b.multiplier("adam_learning_rate") == pytest.approx(a.multiplier("adam_learning_rate") * factor)
        assert b.multiplier("sgd_learning_rate") == pytest.approx(a.multiplier("sgd_learning_rate") * factor**2)
        assert b.multiplier("adam_epsilon") == pytest.approx(a.multiplier("adam_epsilon") / factor)


positive = st.floats(1e-3, 1e3)


@given(st.tuples(*[positive] * 6), positive, positive)
def test_forms_move_by_lemma_j_1(values, a, b):
    scaling = Scaling(*values)
    moved = scaling.moved(a)
    assert moved.multiplier * moved.std == pytest.approx(scaling.multiplier * scaling.std)
    assert (moved.adam, moved.sgd) == pytest.approx((scaling.adam / a, scaling.sgd / a**2))
    for x, y in ((moved.moved(b), scaling.moved(a * b)), (moved.moved(1 / a), scaling)):
        assert vars(x) == pytest.approx(vars(y))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_forms_that_the_lemma_joins_train_alike(optimizer):
    x = jax.random.normal(jax.random.key(0), (8,))
    w = jax.random.normal(jax.random.key(1), (8,))

    def trained(scaling):
        tx = optax.adam(0.1 * scaling.adam, eps=1e-3 * scaling.epsilon) if optimizer == "adam" else optax.sgd(0.1 * scaling.sgd)
        params = w * scaling.std
        with jax.numpy_dtype_promotion("standard"):
            state = tx.init(params)
            for _ in range(5):
                gradient = jax.grad(lambda p: (scaling.multiplier * jnp.dot(p, x) - 1.0) ** 2)(params)
                updates, state = tx.update(gradient, state, params)
                params = optax.apply_updates(params, updates)
        return float(scaling.multiplier * jnp.dot(params, x))

    assert trained(Scaling()) == pytest.approx(trained(Scaling().moved(4.0)), rel=1e-5)


def test_the_two_tables_are_one_parametrization():
    for growth in (Growth(4.0, 1.0), Growth(4.0, 4.0), Growth(1.0, 4.0), Growth(8.0, 2.0)):
        assert vars(mup(growth, table=8).folded()) == pytest.approx(vars(mup(growth, table=3)))


def test_a_base_may_be_fields_sizes_or_patterns():
    x, model = IDS, Net(64)
    by_model = transformer_plan(64)
    assert vs.schemes.mup(base={"width": BASE})(model, x).diff(by_model) == ()
    # The laws of a base that is told by shapes are taken to be 1/fan-in: all but the embedding's are.
    changed = {c.path for c in vs.schemes.mup(base={64: 16, 32: 8, 256: 64})(model, x).diff(by_model)}
    assert changed == {"embed/embedding"}
    patterns = {"layers_0/kernel": (8, 16), "layers_2/kernel": (16, 16), "layers_4/kernel": (16, 3), "layers_[02]/bias": (16,)}
    assert vs.schemes.mup(base=patterns)(mlp(64), X).diff(vs.schemes.mup(base=mlp(BASE))(mlp(64), X)) == ()


def test_nnx_and_linen_have_the_same_plan():
    plan = vs.schemes.mup(base=lambda rngs: NnxNet(BASE, rngs))(lambda rngs: NnxNet(64, rngs), X)
    theirs = vs.schemes.mup(base=mlp(BASE))(mlp(64), X)
    for mine, other in (("layers/0", "layers_0"), ("layers/1", "layers_2"), ("head", "layers_4")):
        assert numbers(plan[f"{mine}/kernel"]) == numbers(theirs[f"{other}/kernel"])
    model = vs.initialize(lambda rngs: NnxNet(64, rngs), jax.random.key(0), X, scheme=plan)
    plan.verify(nnx.state(model, nnx.Param))


def test_a_scanned_model_has_a_width_and_no_depth_in_its_layers():
    class Layer(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(self.width, name="down")(nn.relu(nn.Dense(2 * self.width, name="up")(x))), None

    class Scanned(nn.Module):
        width: int
        layers: int = 2

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(self.width, name="in")(x)
            stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
            return nn.Dense(3, name="head")(stack(self.width, name="layers")(x, None)[0])

    plan = vs.schemes.completep(base=Scanned(16))(Scanned(64, layers=6), X)
    assert numbers(plan["layers/down/kernel"]) == pytest.approx((128**-0.5, 1 / 4, 3, 1 / 12), rel=1e-5)
    assert numbers(plan["layers/up/bias"])[1:] == (1, 12, 1 / 12)


def test_laws_may_be_a_scheme_of_the_base():
    plan = vs.schemes.mup(base=mlp(BASE), laws=vs.schemes.normal(0.02))(mlp(64), X)
    assert [plan[f"layers_{i}/kernel"].std for i in (0, 2, 4)] == pytest.approx([0.02, 0.01, 0.005])


def test_a_table_of_numbers_keeps_them():
    """Sines and cosines have a mean, and a standard deviation that depends on the width a little."""

    class Placed(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            turns = jnp.arange(4.0)[:, None] * 0.1 ** jnp.linspace(0, 1, self.width // 2)[None]
            table = self.param("places", lambda _: jnp.concatenate([jnp.sin(turns), jnp.cos(turns)], axis=1))
            return nn.Dense(3, name="head")(nn.Dense(self.width, name="first")(x) + table)

    plan = vs.schemes.mup(base=Placed(BASE))(Placed(48), X)
    assert plan["places"].why.startswith("input: as declared, numbers with a mean")
    drawn, own = (vs.initialize(Placed(48), jax.random.key(0), X, **how)["params"] for how in ({"scheme": plan}, {}))
    assert jnp.array_equal(drawn["places"], own["places"])


def test_the_base_itself_has_multipliers_of_one():
    plan = vs.schemes.mup(base=mlp(BASE)).at_any_width(mlp(BASE), X)
    assert all(leaf.multipliers == () for leaf in plan)
    assert plan.requirements == ()


def test_the_spectral_condition():
    plan = vs.schemes.spectral()(mlp(64), X)
    assert [plan[f"layers_{i}/kernel"].std for i in (0, 2, 4)] == pytest.approx([8**-0.5, 1 / 8, (3 / 64) ** 0.5 / 8])
    kernel = plan["layers_2/kernel"]
    assert (kernel.multiplier("adam_learning_rate"), kernel.multiplier("sgd_learning_rate")) == (1 / 64, 1.0)
    drawn = vs.initialize(mlp(64), jax.random.key(0), X, scheme=plan)["params"]["layers_2"]["kernel"]
    assert 1 < float(jnp.linalg.norm(drawn, 2)) < 2.2  # 1 + 1 of a square Gaussian matrix


BAD = [
    (lambda: vs.schemes.mup(base=mlp(128))(mlp(64), X), ValueError, "base must be narrower"),
    (lambda: vs.schemes.mup(base=mlp(64))(mlp(64), X), ValueError, "base must be narrower than the model, and it has the same"),
    (lambda: vs.schemes.completep(base=Net(16))(Net(16), IDS), ValueError, "narrower than the model or less deep"),
    (
        lambda: vs.schemes.mup(base=Net(16, tied=True), table=3)(Net(64, tied=True), IDS),
        ValueError,
        "'embed/embedding' is tied",
    ),
    (lambda: vs.schemes.mup(base=mlp(16), table=5), ValueError, "table must be 3, 8 or None, not 5"),
    (lambda: vs.schemes.mup(base=3)(mlp(64), X), TypeError, "base must be a narrower model of the same kind"),
    (lambda: vs.schemes.mup(base=nn.Dense(3))(mlp(64), X), ValueError, "base must be the same model but narrower"),
    (lambda: vs.schemes.mup(base={128: 3})(mlp(64), X), ValueError, "axes of size 128, which no parameter"),
    (lambda: vs.schemes.mup(base={64: 128})(mlp(64), X), ValueError, "not 64 to 128"),
    (lambda: vs.schemes.mup(base={"**/foo": (3,)})(mlp(64), X), ValueError, r"names \*\*/foo"),
    (lambda: vs.schemes.mup(base={})(mlp(64), X), ValueError, "not be an empty mapping"),
    (lambda: vs.schemes.mup(base=mlp(16), laws=3), TypeError, "laws must be 'declared' or a scheme"),
    (lambda: vs.schemes.completep(base=mlp(16))(mlp(64), X), ValueError, "no residual addition"),
    (lambda: vs.schemes.completep(base=Net(16, 2))(Net(64, 1), IDS), ValueError, "base must not be deeper"),
    (lambda: vs.schemes.completep(base=Net(16), alpha=2.0), ValueError, "alpha must lie in"),
    (lambda: vs.schemes.completep(base=Net(16), multipliers="both"), ValueError, "multipliers must be"),
    (lambda: Scaling().moved(0.0), ValueError, "theta must be positive"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_errors_say_what_to_give(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
