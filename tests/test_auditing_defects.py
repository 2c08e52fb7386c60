"""Each planted defect is found at its place; its mended twin is clean; a mend that is a law removes the finding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import varscale as vs
from experiments.nets.healthy_architectures import ARCHITECTURES
from experiments.nets.healthy_constructions import HEALTHY
from experiments.nets.healthy_publications import PUBLICATIONS
from experiments.nets.planted_defects import DEFECTS
from varscale.programs.patterns import matches

ROWS = jax.ShapeDtypeStruct((16, 64), jnp.float32)
KEY = jax.random.key(0)
MODELS = {**HEALTHY, **ARCHITECTURES, **PUBLICATIONS}
# The others take seconds each: `python -m experiments.benchmarks.audit` has them all, with 20 keys.
SLOW = {"fan-in of all axes", "one-hot softmax", "uniform softmax", "tokens that become alike", "fused gates"}
OF_TRACE = [name for name, defect in DEFECTS.items() if not defect.drawn and name not in SLOW]
CHEAP = [
    "pre-norm",
    "zero projections",
    "ReZero",
    "SkipInit",
    "adaLN-Zero",
    "ControlNet",
    "LoRA",
    "Gemma",
    "policy",
    "Gaussian policy",
    "flax's PPO",
    "normalizing flow",
    "prior in the bias",
    "SIREN",
    "experts",
    "flax's CNN",
    "linear regression",
    "width 1",
    "diffusion U-Net",
    "GPT-2",
    "T5",
    "recommender",
    "two towers",
    "nnx transformer",
    "glorot and tanh",
    "flax's default and relu",
    "Fixup",
    "deep Q-learning",
    "SIREN with 30 outside",
    "DCGAN's discriminator",
]


@pytest.fixture(autouse=True)
def _promotion():
    """As people have it: the models are written as theirs."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def audited():
    """Each broken model's audit, made once."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = vs.audit(DEFECTS[name].broken, DEFECTS[name].x)
        return made[name]

    return of


def named(audit, defect):
    """The findings that name a defect at its place."""
    return [f for f in audit.findings if f.code == defect.code and (f.path == defect.path or matches(defect.path, f.path))]


@pytest.mark.parametrize("name", OF_TRACE)
def test_a_planted_defect_is_found_and_its_twin_is_clean(name, audited):
    """From the trace, in which nothing is random."""
    defect = DEFECTS[name]
    (finding, *_) = named(audited(name), defect)
    assert finding.mend
    mended = vs.audit(defect.mended, defect.x if defect.mended_x is None else defect.mended_x)
    assert [str(f) for f in mended.findings if f.level != "info" or f.code == defect.code] == []


MENDED_BY_A_LAW = [
    "vanishing signal",
    "orthogonal's scale .02",
    "gain of another activation",
    "DenseGeneral's batch axis",
    "einsum over heads",
    "experts",
    "transposed convolution",
    "unshared convolution",
    "SAME borders",
    "packed query, key and value",
    "constant kernel",
    "all zeros",
    "dead units",
    "saturated units",
    "residual stream that grows",
    "random bias",
]


@pytest.mark.parametrize("name", MENDED_BY_A_LAW)
def test_a_mend_that_is_a_law_removes_the_finding(name, audited):
    defect = DEFECTS[name]
    (finding, *_) = named(audited(name), defect)
    after = vs.audit(defect.broken, defect.x, scheme=finding.scheme)
    assert named(after, defect) == []


@pytest.mark.parametrize(
    "name",
    ["a scaled copy", "bfloat16 draws", "overflow in float16", "a cut at ±2 that cuts nothing", "μP's kernels ÷ m for ÷ √m"],
)
def test_a_defect_of_the_numbers(name):
    """With one key; the benchmark draws 20. Where laws are meant that the model has not, what its init draws is audited."""
    defect = DEFECTS[name]
    for model, is_broken in ((defect.broken, True), (defect.mended, False)):
        params = model.init(KEY, jnp.zeros(defect.x.shape)) if defect.scheme is not None else None
        audit = vs.audit(model, defect.x, key=KEY, params=params, scheme=defect.laws(model))
        assert bool(named(audit, defect)) == is_broken


@pytest.mark.parametrize("name", CHEAP)
def test_healthy_models_are_clean(name):
    model, x = MODELS[name]
    assert [str(f) for f in vs.audit(model, x).at_least("warning")] == []


def test_the_healthy_models_are_many():
    assert len(MODELS) == len(HEALTHY) + len(ARCHITECTURES) + len(PUBLICATIONS) >= 60


class TestTheLoss:
    X = np.random.default_rng(0).normal(size=(400, 64)).astype(np.float32)
    LABELS = np.where(np.arange(400) % 20 == 0, 1, 0)
    NET = nn.Sequential([nn.Dense(3, kernel_init=nn.initializers.normal(0.01))])

    def test_rare_classes_and_the_bias_that_knows_them(self):
        """ln 3 at step 0 against H(.95, .05) = .1985: the bias saves .9 nats whatever the key."""
        found = [f for f in vs.audit(self.NET, self.X, key=KEY, labels=self.LABELS).findings if f.code == "VS120"]
        assert (found[0].level, found[0].path) == ("info", "layers_0/bias")
        assert found[0].figure == pytest.approx(np.log(3) - 0.1985, abs=0.05)
        params = vs.initialize(self.NET, KEY, self.X, scheme=found[0].scheme)
        assert vs.audit(self.NET, self.X, params=params, labels=self.LABELS, scheme=found[0].scheme).findings == ()

    @pytest.mark.parametrize("shape", [(400,), (400, 1)])
    def test_rare_positives_of_one_logit(self, shape):
        """ln 2 at step 0 against H(.05) = .1985."""
        net = nn.Sequential([nn.Dense(1, kernel_init=nn.initializers.normal(0.01))])
        labels = self.LABELS.reshape(shape)
        found = [f for f in vs.audit(net, self.X, key=KEY, labels=labels).findings if f.code == "VS120"]
        assert found[0].figure == pytest.approx(np.log(2) - 0.1985, abs=0.05)
        params = vs.initialize(net, KEY, self.X, scheme=found[0].scheme)
        assert vs.audit(net, self.X, params=params, labels=labels, scheme=found[0].scheme).findings == ()

    @pytest.mark.parametrize("labels", [LABELS[:-1], LABELS + 3, LABELS / 2, -1 - LABELS])
    def test_labels_that_do_not_fit(self, labels):
        with pytest.raises(ValueError, match="labels must be"):
            vs.audit(self.NET, self.X, key=KEY, labels=labels)

    def test_labels_need_numbers(self):
        with pytest.raises(ValueError, match="need params, or a key"):
            vs.audit(self.NET, self.X, labels=self.LABELS)


class TestAPlan:
    def test_what_a_plan_needs_and_the_program_lacks(self):
        """DeepNorm multiplies the stream by α, which no initializer can."""

        class Post(nn.Module):
            @nn.compact
            def __call__(self, x):
                for _ in range(3):
                    x = nn.LayerNorm()(x + nn.Dense(32)(nn.relu(nn.Dense(64)(x))))
                return nn.Dense(5)(x)

        x = jax.ShapeDtypeStruct((2, 8, 32), jnp.float32)
        plan = vs.schemes.deepnorm()(Post(), x)
        missing = [f for f in vs.audit(Post(), x, scheme=plan).findings if f.code == "VS125"]
        assert missing
        assert all(f.level == "error" and f.mend for f in missing)
        assert not [f for f in vs.audit(Post(), x).findings if f.code == "VS125"]


def test_zeros_are_no_defect_where_another_path_gives_a_gradient():
    class Net(nn.Module):
        second: bool

        @nn.compact
        def __call__(self, x):
            h = nn.Dense(16, kernel_init=nn.initializers.zeros)(x)
            y = nn.Dense(3, kernel_init=nn.initializers.zeros)(h)
            return y + nn.Dense(3)(h) if self.second else y

    assert [f.path for f in vs.audit(Net(False), ROWS).findings if f.code == "VS105"] == ["Dense_0/kernel"]
    assert [f for f in vs.audit(Net(True), ROWS).findings if f.code == "VS105"] == []


def test_an_output_that_no_input_reaches_is_read():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x), jnp.exp(self.param("log_std", nn.initializers.zeros, (3,)))

    assert vs.audit(Net(), ROWS).findings == ()


def test_a_wrong_fan_before_a_norm_has_no_consequence():
    """SAME borders at 2×2 leave 4/9 of the terms; a batch norm restores the scale, a key among the inputs is no array."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, key):
            x = nn.BatchNorm(use_running_average=False)(nn.Conv(8, (3, 3), use_bias=False)(x))
            return nn.Dense(3)(nn.relu(x + 0.1 * jax.random.normal(key, x.shape)).mean((1, 2)))

    x = vs.inputs(jax.ShapeDtypeStruct((4, 2, 2, 8), jnp.float32), jax.random.key(1))
    (finding,) = vs.audit(Net(), x).findings
    assert (finding.code, finding.level, finding.path) == ("VS104", "info", "Conv_0/kernel")
    assert finding.figure == pytest.approx(4 / 9)
