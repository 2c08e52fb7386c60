"""Numbers of the program that multiply embeddings, as √d_model does, under μP: the embedded stream is that of the base."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import varscale as vs

BASE, TOKENS = 16, 30
IDS = jax.random.randint(jax.random.key(2), (16, 6), 0, TOKENS)
NORMAL = nn.initializers.normal(1.0)


def table(width, rows=TOKENS, name="embed"):
    return nn.Embed(rows, width, embedding_init=NORMAL, name=name)


class Begin(nn.Module):
    """An embedded stream: where a factor stands in it, and the power of the width that it is."""

    width: int
    place: str
    power: float

    @nn.compact
    def __call__(self, ids):
        c, places = float(self.width) ** self.power, jnp.arange(ids.shape[-1])
        if self.place == "one table":
            return table(self.width)(ids) * c
        if self.place == "before positions":
            return table(self.width)(ids) * c + self.param("positions", NORMAL, (1, 6, self.width))
        if self.place == "behind positions":
            return (table(self.width)(ids) + self.param("positions", NORMAL, (1, 6, self.width))) * c
        if self.place == "behind tables":
            return (
                table(self.width)(ids) + table(self.width, 2, "segment")(ids % 2) + table(self.width, 6, "at")(places)[None]
            ) * c
        if self.place == "of positions":
            return table(self.width)(ids) + c * self.param("positions", NORMAL, (1, 6, self.width))
        if self.place == "in the table":
            return (self.param("table", NORMAL, (TOKENS, self.width)) * c)[ids]
        return nn.Dense(self.width, bias_init=NORMAL, name="input")(jnp.stack([jnp.sin(ids), jnp.cos(ids)], -1)) * c


class Gemma(nn.Module):
    """A pre-norm decoder that multiplies its embeddings by √d, or by √BASE at every width; tied to the readout or not."""

    width: int
    place: str = "one table"
    power: float = 0.5
    tied: bool = False
    fixed: bool = False

    @nn.compact
    def __call__(self, ids):
        if self.tied or self.fixed:
            embed = table(self.width)
            x = embed(ids) * jnp.sqrt(BASE if self.fixed else self.width).astype(jnp.float32)
        else:
            x = Begin(self.width, self.place, self.power, name="begin")(ids)
        h = nn.gelu(nn.Dense(2 * self.width, name="up")(nn.RMSNorm(name="norm")(x)))
        x = nn.RMSNorm(name="last")(x + nn.Dense(self.width, name="down")(h))
        return embed.attend(x) * (BASE / self.width) if self.tied else nn.Dense(TOKENS, name="head")(x)


class NnxBegin(nnx.Module):
    def __init__(self, width, rngs):
        self.embed = nnx.Embed(TOKENS, width, embedding_init=NORMAL, rngs=rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (1, 6, width)))
        self.factor = width**0.5

    def __call__(self, ids):
        return self.embed(ids) * self.factor + self.positions[...]


class NnxGemma(nnx.Module):
    def __init__(self, width, rngs):
        self.begin, self.norm = NnxBegin(width, rngs), nnx.RMSNorm(width, rngs=rngs)
        self.up, self.head = nnx.Linear(width, width, rngs=rngs), nnx.Linear(width, TOKENS, rngs=rngs)

    def __call__(self, ids):
        x = self.begin(ids)
        return self.head(x + self.up(self.norm(x)))


def numbers(leaf):
    names = ("adam_learning_rate", "sgd_learning_rate", "adam_epsilon")
    return (leaf.std, *map(leaf.multiplier, names))


CASES = [(place, 0.5) for place in ("before positions", "behind positions", "behind tables", "of positions", "in the table")]
CASES += [("one table", power) for power in (0.5, -0.5, 1.0)] + [("input layer", 0.5)]


@pytest.mark.parametrize(("place", "power"), CASES)
def test_the_embedded_stream_has_the_mean_square_of_the_base_at_every_width(place, power):
    scheme = vs.schemes.mup(base=Gemma(BASE, place, power))
    expected = vs.predict(Gemma(BASE, place, power), IDS)["begin"].second_moment
    for width in (32, 64, 128):
        model = Gemma(width, place, power)
        plan = scheme(model, IDS)
        assert vs.predict(model, IDS, scheme=plan)["begin"].second_moment == pytest.approx(expected, rel=1e-4)
        folded = [r for r in plan.requirements if r.name == "embedding multiplier"]
        assert folded
        for r in folded:
            assert (r.status, r.found) == ("folded", pytest.approx(r.expected * (width / BASE) ** power, rel=1e-4))


def test_an_nnx_stream_has_the_mean_square_of_the_base_at_every_width():
    def factory(width):
        return lambda rngs: NnxGemma(width, rngs)

    scheme = vs.schemes.mup(base=factory(BASE))
    expected = vs.predict(factory(BASE), IDS, scheme=scheme.at_any_width(factory(BASE), IDS))["begin"].second_moment
    for width in (32, 64, 128):
        plan = scheme(factory(width), IDS)
        moment = vs.predict(factory(width), IDS, scheme=plan)["begin"].second_moment
        assert moment == pytest.approx(expected, rel=1e-2)  # the law of the positions is measured from draws
        assert [r.where for r in plan.requirements if r.name == "embedding multiplier"] == ["begin/embed/embedding"]
    model = vs.initialize(factory(128), jax.random.key(0), IDS, scheme=plan)
    plan.verify(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("width", [32, 64, 128])
def test_an_embedding_has_the_inverse_of_its_factor(width):
    plan, m = vs.schemes.mup(base=Gemma(BASE))(Gemma(width), IDS), width / BASE
    f = m**0.5  # by lemma J.1: std and Adam's rate / f, SGD's / f², epsilon × f
    assert numbers(plan["begin/embed/embedding"]) == pytest.approx((1 / f, 1 / f, m / f**2, f / m), rel=1e-4)
    params = vs.initialize(Gemma(width), jax.random.key(0), IDS, scheme=plan)
    plan.verify(params)
    assert vs.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_folded_factor_trains_as_the_factor_of_the_base_does(optimizer):
    """The laws are the same numbers, scaled: so are the draws of one key, and the updates."""
    outputs = []
    tx = optax.adam(0.05, eps=1e-2) if optimizer == "adam" else optax.sgd(0.5)
    for fixed in (False, True):
        model, base = Untied(64, fixed), Untied(BASE, fixed)
        plan = vs.schemes.mup(base=base)(model, IDS)
        params: Any = vs.initialize(model, jax.random.key(0), IDS, scheme=plan)
        scaled = plan.optimizer(tx, kind=optimizer)
        state = scaled.init(params)
        gradient = jax.jit(jax.grad(lambda p, model=model: jnp.mean(jnp.square(jnp.asarray(model.apply(p, IDS)) - 1))))
        with jax.numpy_dtype_promotion("standard"):
            for _ in range(3):
                updates, state = scaled.update(gradient(params), state, params)
                params = optax.apply_updates(params, updates)
        outputs.append(np.asarray(model.apply(params, IDS)))
    assert outputs[0] == pytest.approx(outputs[1], abs=1e-4)


class Untied(nn.Module):
    width: int
    fixed: bool = False

    @nn.compact
    def __call__(self, ids):
        x = table(self.width)(ids) * (BASE if self.fixed else self.width) ** 0.5
        return nn.Dense(TOKENS, name="head")(x + nn.relu(nn.Dense(self.width, name="hidden")(x)))


def test_a_tied_table_needs_the_factor_of_the_base_in_the_program():
    def found(**how):
        plan = vs.schemes.mup(base=Gemma(BASE, tied=True, **how))(Gemma(64, tied=True, **how), IDS)
        return plan, [(r.where, r.expected, r.found, r.status) for r in plan.requirements if r.name == "embedding multiplier"]

    plan, required = found()
    assert required == [("embed/embedding", pytest.approx(4.0), pytest.approx(8.0), "missing")]
    assert numbers(plan["embed/embedding"])[:2] == (1.0, 1.0)
    assert "multiply what 'embed/embedding' gives by 4 at every width" in str(plan.requirements[0])
    assert found(fixed=True)[1] == [("embed/embedding", pytest.approx(4.0), pytest.approx(4.0), "present")]


def test_a_table_with_two_factors_can_undo_neither():
    class Two(nn.Module):
        width: int

        @nn.compact
        def __call__(self, ids):
            embed = table(self.width)
            x = nn.Dense(self.width, name="first")(embed(ids) * self.width**0.5)
            return nn.Dense(TOKENS, name="head")(x + nn.relu(nn.Dense(self.width, name="second")(embed(ids))))

    required = vs.schemes.mup(base=Two(BASE))(Two(64), IDS).requirements
    assert [r.status for r in required if r.name == "embedding multiplier"] == ["missing"]


def test_a_factor_is_counted_once():
    """A readout that reads embeddings has their factor before it; one behind an input layer may have its own there."""

    class Bigram(nn.Module):
        width: int

        @nn.compact
        def __call__(self, ids):
            return nn.Dense(TOKENS, name="head")(table(self.width)(ids) * self.width**0.5)

    class Divided(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nn.relu(nn.Dense(self.width, name="first")(x)) * (BASE / self.width))

    plan = vs.schemes.mup(base=Bigram(BASE))(Bigram(64), IDS)
    assert (plan["embed/embedding"].std, plan["head/kernel"].std) == pytest.approx((0.5, BASE**-0.5 / 4), rel=1e-4)
    required = vs.schemes.mup(base=Divided(BASE))(Divided(64), jnp.ones((4, 8))).requirements
    assert [(r.name, r.status) for r in required] == [("readout multiplier", "present")]


def test_what_shapes_do_not_tell_is_unknown():
    required = vs.schemes.mup(base={64: 16, 128: 32})(Gemma(64), IDS).requirements
    assert ("embedding multiplier", "unknown") in [(r.name, r.status) for r in required]


class EncoderDecoder(nn.Module):
    """The original transformer, post-norm, with one attention to the encoder; `fixed`: the factor of the base."""

    width: int
    fixed: bool = False

    @nn.compact
    def __call__(self, source, target):
        turns = jnp.arange(6.0)[:, None] * 0.1 ** jnp.linspace(0, 1, self.width // 2)[None]
        sines = jnp.concatenate([jnp.sin(turns), jnp.cos(turns)], axis=1)[None]
        c = (BASE if self.fixed else self.width) ** 0.5
        x, y = (nn.Embed(TOKENS, self.width, name=n)(ids) * c + sines for n, ids in (("in", source), ("out", target)))
        for name in ("encoder", "cross"):
            attention = nn.MultiHeadDotProductAttention(1, use_bias=False, name=name)
            x, y = (nn.LayerNorm()(x + attention(x, x)), y) if name == "encoder" else (x, nn.LayerNorm()(y + attention(y, x)))
        return nn.Dense(TOKENS, name="head")(y)


def check(factory, plan, x):
    return vs.coordinate_check(factory, [32, 160], plan, x, steps=2, draws=4)


def test_the_check_of_an_encoder_and_decoder_is_flat_and_finds_a_factor_that_is_not_undone():
    x = vs.inputs(IDS, IDS[::-1])

    def planted(model, x, *, method=None):
        return vs.schemes.mup(base=EncoderDecoder(BASE, fixed=True))(model.clone(fixed=True), x)

    assert check(EncoderDecoder, vs.schemes.mup(base=EncoderDecoder(BASE)), x).findings == ()
    found = " ".join(check(EncoderDecoder, planted, x).findings)
    assert "encoder/value: size before training grows as width^+0.4" in found


def test_the_check_of_a_pre_norm_decoder_is_flat_and_names_the_factor_of_a_tied_one():
    assert check(Gemma, vs.schemes.mup(base=Gemma(BASE)), IDS).findings == ()
    tied = functools.partial(Gemma, tied=True)
    found = check(tied, vs.schemes.mup(base=tied(BASE)), IDS).findings
    assert any(finding.startswith("missing: embedding multiplier") for finding in found)


def test_the_check_knows_a_module_that_passes_its_table_on():
    """The factor stands outside of the module that holds the table: the module's own row is read with it too."""

    class Lookup(nnx.Module):
        def __init__(self, width, rngs):
            self.embed = nnx.Embed(TOKENS, width, embedding_init=NORMAL, rngs=rngs)

        def __call__(self, ids):
            return self.embed(ids)

    class Net(nnx.Module):
        def __init__(self, width, rngs):
            self.lookup, self.head = Lookup(width, rngs), nnx.Linear(width, TOKENS, rngs=rngs)
            self.hidden, self.factor = nnx.Linear(width, width, rngs=rngs), width**0.5

        def __call__(self, ids):
            x = self.lookup(ids) * self.factor
            return self.head(x + nnx.relu(self.hidden(x)))

    found = check(lambda width, rngs: Net(width, rngs), vs.schemes.mup(base=lambda rngs: Net(BASE, rngs)), IDS)
    assert found.findings == ()
    assert np.array_equal(found["lookup"].sizes, found["lookup/embed"].sizes)
