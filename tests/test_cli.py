"""The command `varscale`: exit statuses, one-line errors, what it prints."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

import varscale as vs
from varscale import cli

MODELS = """
import jax
from flax import linen as nn, nnx

class Deep(nn.Module):
    std: float = 0.01
    @nn.compact
    def __call__(self, x, train=True):
        for _ in range(6):
            x = nn.relu(nn.Dense(32, kernel_init=nn.initializers.normal(self.std))(x))
        return nn.Dense(3)(x)

def mended():
    return Deep(std=0.25)

class Small(nnx.Module):
    def __init__(self, *, rngs):
        self.layer = nnx.Linear(16, 16, rngs=rngs)
    def __call__(self, x):
        return jax.nn.relu(self.layer(x))

def softer(x):
    return jax.nn.relu(x) / 2

class Wide(nn.Module):
    width: int

def fails():
    raise RuntimeError("no config")

NUMBER = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that is no package, with a file of models."""
    (tmp_path / "some_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("some_models", None)


def run(capsys, *arguments):
    """(exit status, what was printed, what was complained)."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


def test_audit(folder, capsys):
    status, out, _ = run(capsys, "audit", "some_models:Deep", "--input", "f32[8,32]", "--plot", "deep.png")
    assert status == 1
    assert "VS101 error" in out
    assert "\x1b" not in out
    assert (folder / "deep.png").stat().st_size > 1000
    status, out, _ = run(capsys, "audit", "some_models:mended", "-i", "f32[8,32]", "--keyword", "train=False", "--json")
    assert (status, json.loads(out)["findings"]) == (0, [])
    (folder / "old.json").write_text(
        vs.audit(cli.resolved("some_models:Deep"), jax.ShapeDtypeStruct((8, 32), "float32")).to_json()
    )
    assert run(capsys, "audit", "some_models:Deep", "-i", "f32[8,32]", "--baseline", "old.json")[0] == 0


def test_uses_predict_and_gain(folder, capsys):
    status, out, _ = run(capsys, "uses", "some_models:Small", "-i", "f32[8,16]")
    assert (status, "layer/kernel" in out, "16×16" in out) == (0, True, True)
    status, out, _ = run(capsys, "predict", "some_models:Small", "-i", "f32[8,16]", "--json")
    assert json.loads(out)["rows"][-1]["second_moment"] == pytest.approx(0.5, rel=0.02)
    status, out, _ = run(capsys, "gain", "tanh", "some_models:softer")
    assert (status, "1.5925374197" in out, "2.8284271247" in out) == (0, True, True)


def test_on_a_terminal_tables_are_shown_too(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    status, out, _ = run(capsys, "uses", "some_models:Small", "-i", "f32[8,16]")
    assert (status, "ParameterUses" in out, "layer/kernel" in out) == (0, False, True)


def test_wrong_arguments_on_a_terminal_are_one_plain_line(capsys, monkeypatch):
    """There the argument parser writes colours and frames."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    told = "varscale: error: Unrecognized options: --bogus; see varscale --help\n"
    assert run(capsys, "gain", "--bogus") == (2, "", told)


def test_audit_parameters(folder, capsys):
    vs.transfer.save("x.safetensors", {"a": {"kernel": jnp.full((4, 4), 0.5)}})
    status, out, _ = run(capsys, "audit-parameters", "x.safetensors")
    assert (status, "VS105 error   a/kernel" in out) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("audit", "some_models:Nothing", "-i", "f32[8,32]"), "some_models has no 'Nothing'; it has"),
        (("audit", "no_module:Net", "-i", "f32[8,32]"), "No module named 'no_module'"),
        (("audit", "some_models", "-i", "f32[8,32]"), "target must be module:name"),
        (("audit", "some_models:Deep"), "--input is missing"),
        (("audit", "some_models:Deep", "-i", "f32[8"), "--input must be like"),
        (("audit", "some_models:Deep", "-i", "f32[8,32]", "--keyword", "train"), "--keyword must be name=value"),
        (("audit", "some_models:Deep", "-i", "f32[8,32]", "--ignore", "blocks"), "ignore must hold codes"),
        (("audit-parameters", "nothing.safetensors"), "nothing.safetensors"),
        (("audit", "some_models:Deep", "-i", "f33[8,32]"), "there is no dtype float33"),
        (("audit", "some_models:Deep", "-i", "i32[8,32]:9..0"), "must not end below its start"),
        (("audit", "some_models:fails", "-i", "f32[8,32]"), "RuntimeError: no config"),
        (("audit", "some_models:NUMBER", "-i", "f32[8,32]"), "must be a flax module or a function, not 3"),
        (("audit", "some_models:Wide", "-i", "f32[8,32]"), "Wide needs width"),
        (("gain", "some_models:nothing"), "some_models has no 'nothing'"),
        (("gain", "no_activation"), "neither in jax.nn nor in jax.numpy"),
        (("audit",), "MODULE:NAME"),
        (("audits", "some_models:Deep"), "Available subcommands: audit, predict"),
        (("audit", "some_models:Deep", "--key", "first"), "Error parsing --key"),
    ],
)
def test_wrong_use_is_one_line(folder, capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("varscale: error: ")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [("f32[8,32]", (8, 32), "float32"), ("bf16[2]", (2,), "bfloat16"), ("i32[]", (), "int32"), ("bool[3]", (3,), "bool")],
)
def test_inputs_are_described(text, shape, dtype):
    found = cli.parsed_input(text)
    assert (found.shape, found.dtype) == (shape, jnp.dtype(dtype))


def test_whole_numbers_are_drawn_from_their_range():
    ids = cli.parsed_input("i32[100,10]:3..5")
    assert (ids.min(), ids.max(), ids.dtype) == (3, 5, "int32")
