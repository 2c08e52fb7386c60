"""What an audit finds: each planted defect, at its place, and nothing in its mended twin or in healthy constructions."""

import zipfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, serialization

import varscale as vs
from experiments.nets.healthy_constructions import HEALTHY

ROWS = jax.ShapeDtypeStruct((16, 64), jnp.float32)
IDS = jax.ShapeDtypeStruct((2, 8), jnp.int32)
KEY = jax.random.key(0)


def deep(init, act=nn.relu, depth=8, first=None):
    kernels = [first or vs.lecun_normal(), *[init] * (depth - 1)]
    return nn.Sequential([f for kernel in kernels for f in (nn.Dense(64, kernel_init=kernel), act)] + [nn.Dense(10)])


def found(audit, level="warning"):
    """(code, path) of the findings of a level or worse."""
    return [(f.code, f.path) for f in audit.at_least(level)]


class Scaled(nn.Module):
    """A layer that reads a function of its input."""

    scaling: Callable[[jax.Array], jax.Array]
    after: Callable[[jax.Array], jax.Array] = lambda y: y

    @nn.compact
    def __call__(self, x):
        return self.after(nn.Dense(4, kernel_init=nn.initializers.orthogonal())(self.scaling(x)))


class LanguageModel(nn.Module):
    """A tied, pre-norm transformer of two blocks."""

    deviation: float = 0.02
    vocabulary: int = 100
    scale: float = 1.0

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(self.vocabulary, 64, embedding_init=nn.initializers.normal(self.deviation))
        x = embed(ids)
        for _ in range(2):
            h = nn.LayerNorm()(x)
            q, k, v = (nn.Dense(64, use_bias=False, name=None)(h) for _ in range(3))
            scores = jnp.einsum("btd,bsd->bts", q, k) * (self.scale / 8)
            x = x + nn.Dense(64)(jax.nn.softmax(scores) @ v)
            x = x + nn.Dense(64)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm(name="final")(x))


class TestTheTrace:
    def test_a_vanishing_net_and_the_line_that_mends_it(self):
        audit = vs.audit(deep(nn.initializers.normal(0.01), first=nn.initializers.normal(0.01)), ROWS)
        assert [code for code, _ in found(audit)] == ["VS101", "VS102", "VS103"]
        signal = audit.findings[0]
        assert (signal.level, signal.path) == ("error", "layers_4")  # .0032 a layer: past 1e-3 at the second
        assert signal.figure == pytest.approx(0.0032**8, rel=0.5)
        assert "float16" in signal.message
        assert "vs.for_activation(jax.nn.relu)" in audit.findings[2].mend
        assert found(vs.audit(deep(vs.for_activation(jax.nn.relu)), ROWS)) == []

    @pytest.mark.parametrize("deviation", [1e-3, 2.0])
    def test_a_net_too_shallow_for_a_trend(self, deviation):
        """The ends of the whole depth are compared: 64 σ²/2 a layer, whatever the layers are called; the mend removes it."""

        class Named(nn.Module):
            @nn.compact
            def __call__(self, x):
                for name in ("first", "second", "third"):
                    x = nn.relu(nn.Dense(64, kernel_init=nn.initializers.normal(deviation), name=name)(x))
                return nn.Dense(3, name="out")(x)

        audit = vs.audit(Named(), ROWS)
        assert (audit.findings[0].code, audit.findings[0].level) == ("VS101", "error")
        assert audit.findings[0].path == ("second" if deviation < 1 else "third")
        assert audit.findings[0].figure == pytest.approx((32 * deviation**2) ** 2, rel=0.05)
        assert found(vs.audit(Named(), ROWS, scheme=audit.findings[0].scheme)) == []

    def test_an_average_over_places_is_no_vanishing_signal(self):
        """Odd features are averaged over 4096 places; the laws keep the signal."""

        class Pooled(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = jnp.tanh(nn.Conv(16, (3, 3))(x)).mean((1, 2))
                return nn.Dense(3)(jnp.tanh(nn.Dense(16)(x)))

        assert found(vs.audit(Pooled(), jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32))) == []

    def test_a_deep_function_without_modules(self):
        def deep(params, x):
            for w in params:
                x = jnp.tanh(x @ w)
            return x

        draws = [np.asarray(jax.random.normal(key, (64, 64))) for key in jax.random.split(KEY, 8)]
        audit = vs.audit(deep, ROWS, params=[0.01 * w for w in draws])
        assert {code for code, _ in found(audit)} == {"VS101", "VS102", "VS103"}
        assert found(vs.audit(deep, ROWS, params=[0.125 * w for w in draws])) == []

    def test_orthogonal_kernels_saturate_too(self):
        audit = vs.audit(deep(nn.initializers.orthogonal(10.0), act=jnp.tanh, depth=3), ROWS)
        assert any(code == "VS106" for code, _ in found(audit))

    def test_a_saturated_net(self):
        audit = vs.audit(deep(nn.initializers.normal(1.0), act=jnp.tanh, depth=5), ROWS)
        saturated = next(f for f in audit.findings if f.code == "VS106")
        assert saturated.figure == pytest.approx(0.69, abs=0.02)  # P(|N(0, 64 · .394)| > 2)
        assert saturated.path.startswith("layers_")

    @pytest.mark.parametrize(("constant", "flagged"), [(0.01, False), (30.0, True)])
    def test_a_constant_inside_a_bounded_function(self, constant, flagged):
        """What tanh(c y) reads is c y: neither a small c nor a large one is overlooked."""

        class Net(nn.Module):
            law: Callable[..., jax.Array]

            @nn.compact
            def __call__(self, x):
                return nn.Dense(4)(jnp.tanh(constant * nn.Dense(64, kernel_init=self.law, name="first")(x)))

        findings = vs.audit(Net(nn.initializers.normal(1 / 8 if flagged else 1 / 8 / constant)), ROWS).findings
        saturated = [f for f in findings if f.code == "VS106"]
        assert [f.path for f in saturated] == ["first/kernel"] * flagged
        for finding in saturated:
            assert not found(vs.audit(Net(finding.scheme["first/kernel"]), ROWS))

    def test_an_epsilon_that_dominates(self):
        audit = vs.audit(LanguageModel(deviation=1e-4), IDS)
        # The branches are larger than such tokens, and attention's averages make them alike.
        assert set(found(audit)) == {("VS111", "LayerNorm_0"), ("VS108", "Dense_3"), ("VS107", "LayerNorm_1")}
        dominated = next(f for f in audit.findings if f.code == "VS111")
        assert dominated.figure == pytest.approx(1e-8 / 1.01e-6, rel=0.05)

    def test_a_collapsed_softmax(self):
        assert "VS109" in [code for code, _ in found(vs.audit(LanguageModel(scale=16.0), IDS))]

    def test_a_healthy_transformer(self):
        assert found(vs.audit(LanguageModel(), IDS)) == []

    def test_unused_and_random_biases(self):
        class Net(nn.Module):
            width: int = 4

            @nn.compact
            def __call__(self, x):
                self.param("nobody", nn.initializers.ones, (3,))
                return nn.Dense(self.width, bias_init=nn.initializers.normal(0.1))(x)

        audit = vs.audit(Net(), ROWS)
        assert found(audit) == [("VS116", "nobody")]
        wide = vs.audit(Net(2048), ROWS)  # what is read elsewhere, such as a temperature, costs nothing
        assert found(wide) == []
        assert ("VS116", "nobody") in found(wide, "info")
        assert ("VS117", "Dense_0/bias") in found(audit, "info")

    def test_inputs(self):
        pixels = np.random.default_rng(0).integers(0, 256, (16, 64)).astype(np.float32)
        assert ("VS119", "") in found(vs.audit(nn.Dense(4), pixels))
        assert found(vs.audit(nn.Dense(4), pixels / 128 - 1)) == []
        assert found(vs.audit(Scaled(lambda x: x / 255.0), pixels)) == []  # the model scales its inputs itself
        assert found(vs.audit(Scaled(lambda x: x * 1.0), pixels)) == [("VS119", "")]
        batch_norm = Scaled(lambda x: x, after=nn.BatchNorm(use_running_average=False))  # takes the scale away
        assert found(vs.audit(batch_norm, pixels)) == []
        constant = np.concatenate([np.random.default_rng(0).normal(size=(16, 60)), np.zeros((16, 4))], 1).astype(np.float32)
        assert [f.figure for f in vs.audit(nn.Dense(4), constant).findings if f.code == "VS119"] == [4.0]

    def test_an_nnx_factory_and_a_plain_function(self):
        def factory(rngs):
            kernels = [vs.normal(0.01)] * 6
            return nnx.Sequential(*(f for k in kernels for f in (nnx.Linear(64, 64, kernel_init=k, rngs=rngs), nnx.relu)))

        assert {code for code, _ in found(vs.audit(factory, ROWS))} >= {"VS101", "VS103"}
        audit = vs.audit(lambda p, x: x @ p["w"], ROWS, params={"w": jnp.ones((64, 64)) * 0.1, "v": jnp.ones(3)})
        assert ("VS116", "v") in found(audit, "info")
        assert ("VS105", "w") in found(audit)


class TestTheNumbers:
    def test_the_models_own_draws_have_their_laws(self):
        """Error rate at most 1e-6: a wrong law is found whatever the key."""
        assert found(vs.audit(LanguageModel(), IDS, key=KEY)) == []
        params = LanguageModel().init(KEY, jnp.zeros((2, 8), jnp.int32))
        params["params"]["Dense_4"]["kernel"] *= 1.5
        audit = vs.audit(LanguageModel(), IDS, params=params)
        assert found(audit) == [("VS112", "Dense_4/kernel")]
        assert audit.findings[0].figure == pytest.approx(2.25, rel=0.1)
        assert found(vs.audit(LanguageModel(), IDS, params=params, fresh=False)) == []

    @pytest.mark.parametrize("factor", [1.0, 0.125, -1.0])
    def test_leaves_of_one_key(self, factor):
        w = jax.random.truncated_normal(KEY, -2, 2, (100, 64))
        tree = {"embedding": w, "head": {"kernel": factor * w.reshape(64, 100)}, "other": jax.random.normal(KEY, (64, 64))}
        audit = vs.audit_parameters(tree)
        assert [(f.code, f.path) for f in audit.at_least("warning")] == [("VS113", "head/kernel"), ("VS113", "other")]
        assert audit.findings[0].figure == pytest.approx(factor)

    def test_a_transposed_copy(self):
        """Equal, it is one weight stored twice, which may be meant; a scaled one is a shared key."""
        w = jax.random.normal(KEY, (100, 64))
        for factor, level in ((1.0, "warning"), (0.125, "error")):
            (one,) = vs.audit_parameters({"embedding": w, "head": {"kernel": factor * w.T}}).at_least("warning")
            assert (one.code, one.level, one.path, one.figure) == ("VS113", level, "head/kernel", pytest.approx(factor))
            assert "'embedding', transposed" in one.message

    def test_independent_leaves_are_not_related(self):
        """200 leaves, 20,000 pairs: a false pair has a chance below 1e-40 each."""
        leaves = {
            f"{i}/{n}": jax.random.normal(jax.random.fold_in(jax.random.key(i), n), (n,))
            for i in range(20)
            for n in range(32, 132, 10)
        }
        assert found(vs.audit_parameters(leaves)) == []

    def test_low_precision_draws(self):
        native = jax.nn.initializers.he_normal()(KEY, (256, 64), jnp.bfloat16)
        rounded = vs.he_normal()(KEY, (256, 64), jnp.bfloat16)
        audit = vs.audit_parameters({"native": {"kernel": native}, "rounded": {"kernel": rounded}}, ignore=["VS113"])
        assert found(audit) == [("VS115", "native/kernel")]

    def test_constants_and_nan(self):
        tree = {
            "a": {"kernel": jnp.full((4, 4), 0.5)},
            "b": {"kernel": jnp.broadcast_to(jax.random.normal(KEY, (4, 1)), (4, 4))},
            "c": {"kernel": jnp.zeros((4, 4)), "scale": jnp.ones((3, 4)), "bias": jnp.ones(4)},
            "d": {"kernel": jnp.array([[1.0, jnp.nan], [2.0, 3.0]])},
            "A_log": jnp.broadcast_to(jnp.log(jnp.arange(1, 17.0)), (64, 16)),
            "table": jnp.sin(jnp.arange(640.0).reshape(10, 64) / 50),
        }
        assert sorted(found(vs.audit_parameters(tree))) == [("VS105", "a/kernel"), ("VS105", "b/kernel"), ("VS121", "d/kernel")]

    def test_declared_laws(self):
        w = vs.he_normal()(KEY, (64, 64))
        assert found(vs.audit_parameters({"w": w}, {"*": vs.he_normal()})) == []
        assert found(vs.audit_parameters({"w": w}, {"w": jax.nn.initializers.he_normal()})) == []
        assert found(vs.audit_parameters({"w": w}, {"w": vs.lecun_normal()})) == [("VS112", "w")]
        assert found(vs.audit_parameters({"w": w}, {"w": 0.02})) == [("VS112", "w")]
        with pytest.raises(ValueError, match="declared: 'nothing' catches no leaf"):
            vs.audit_parameters({"w": w}, {"nothing": 1.0})
        with pytest.raises(TypeError, match="must be a standard deviation or an initializer"):
            vs.audit_parameters({"w": w}, {"w": "he"})

    def test_usual_laws_are_named(self):
        tree = {"w": 0.02 * jax.random.normal(KEY, (64, 128)), "v": 0.4 * jax.random.normal(jax.random.key(1), (64, 128))}
        told = [f.message for f in vs.audit_parameters(tree).findings]
        assert any("normal(.02)" in message for message in told)
        assert any("none of the usual laws" in message for message in told)

    @pytest.mark.parametrize("name", ["x.safetensors", "folder", "x.npz", "x.msgpack"])
    def test_a_checkpoint(self, tmp_path, name):
        """NaN is found where `vs.transfer.load` would refuse the file; a file that is cut off is an error of one line."""
        tree = {"a": {"kernel": np.full((4, 4), np.nan, np.float32)}, "b": {"kernel": np.ones((64, 64), np.float32)}}
        file = tmp_path / name
        if name == "x.npz":
            np.savez(file, **{f"{k}/kernel": v["kernel"] for k, v in tree.items()})
        elif name == "x.msgpack":
            file.write_bytes(serialization.msgpack_serialize(tree))
        else:
            vs.transfer.save(file, tree)
        assert sorted(found(vs.audit_parameters(file), "error")) == [("VS105", "b/kernel"), ("VS121", "a/kernel")]
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-100])
            with pytest.raises(ValueError, match=name):
                vs.audit_parameters(file)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "old.pt"])
    def test_pickles_are_not_read(self, tmp_path, name):
        file = tmp_path / name
        if name == "old.pt":
            file.write_bytes(b"\x80\x02.")
        else:
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("archive/data.pkl", b"\x80\x02.")
        with pytest.raises(ValueError, match=f"{name}' was not read: PyTorch pickles"):
            vs.audit_parameters(file)

    def test_an_empty_tree(self):
        audit = vs.audit_parameters({})
        assert (len(audit), audit.notes) == (0, ("There is no floating-point parameter to audit.",))


class Named(nn.Module):
    """A Dense layer of a given name."""

    layer: str

    @nn.compact
    def __call__(self, x):
        return nn.Dense(32, name=self.layer)(x)


class TestTheInit:
    """Defects of the random numbers that an init draws from; found with nothing drawn."""

    def test_equal_streams(self):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                return Named("cdef", name="ab")(Named("def", name="abc")(x))

        assert found(vs.audit(Net(), HEALTHY["ReZero"][1])) == [("VS114", "abc/def/kernel")]

    def test_one_key_for_two_leaves(self):
        class Net(nnx.Module):
            def __init__(self, rngs):
                key = rngs.params()
                self.embedding = nnx.Param(jax.random.truncated_normal(key, -2, 2, (50, 16)) / 4)
                self.head = nnx.Param(jax.random.truncated_normal(key, -2, 2, (16, 50)) / 4)

            def __call__(self, ids):
                return self.embedding[...][ids] @ self.head[...]

        assert ("VS114", "head") in found(vs.audit(lambda rngs: Net(rngs), IDS))

    def test_a_constant_key(self):
        def fixed(key, shape, dtype):
            return jax.random.normal(jax.random.key(3), shape, dtype) / 8

        assert ("VS118", "layers_0/kernel") in found(
            vs.audit(nn.Sequential([nn.Dense(64, kernel_init=fixed), nn.Dense(3)]), ROWS)
        )

    def test_symmetric_units(self):
        constant = nn.Sequential([nn.Dense(64, kernel_init=nn.initializers.constant(0.1)), nn.relu, nn.Dense(3)])
        assert found(vs.audit(constant, ROWS)) == [("VS105", "layers_0/kernel")]


class TestARun:
    def test_a_draw_that_its_laws_do_not_give(self):
        net = nn.Sequential([nn.Dense(64, kernel_init=vs.he_normal()), nn.relu, nn.Dense(64, kernel_init=vs.he_normal())])
        params = net.init(KEY, jnp.zeros((16, 64)))
        assert found(vs.audit(net, ROWS, params=params)) == []
        params["params"]["layers_0"]["bias"] += 5.0  # constants have no law of their own
        assert found(vs.audit(net, ROWS, params=params)) == [("VS123", "layers_0")]

    def test_nan_in_a_run(self):
        net = nn.Sequential([nn.Dense(8), lambda x: jnp.log(x - 100), nn.Dense(3)])
        audit = vs.audit(net, jnp.ones((4, 8)), key=KEY)
        assert ("VS121", "layers_2") in found(audit)

    def test_the_loss_at_step_0(self):
        labels = jnp.zeros(16, jnp.int32)

        def loss(logits):
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(16), labels])

        def readout(deviation):
            return nn.Sequential([nn.Dense(10, kernel_init=nn.initializers.normal(deviation))])

        assert "VS120" in [code for code, _ in found(vs.audit(readout(2.0), ROWS, key=KEY, loss=loss))]
        assert found(vs.audit(readout(0.01), ROWS, key=KEY, loss=loss)) == []
        with pytest.raises(ValueError, match="loss and labels need params"):
            vs.audit(readout(1.0), ROWS, loss=loss)

    def test_samples_that_become_alike(self):
        init = {"kernel_init": nn.initializers.normal(0.7 / 8), "bias_init": nn.initializers.normal(0.3)}
        ordered_phase = [f for _ in range(10) for f in (nn.Dense(64, **init), jnp.tanh)]
        assert "VS108" in [code for code, _ in found(vs.audit(nn.Sequential(ordered_phase), ROWS))]
