"""Claim: on an accelerator the same contracts hold, and these are its figures.

    python -m experiments.benchmarks.on_device [--out FOLDER] [--rehearse]

Run it wherever a GPU or TPU is at hand; it takes less than eight minutes. It runs the tests of the initializers' contract, bits
and laws on the device, then the benchmarks of sampling, of whole models and of `probe`, and writes what they print, with the
device's name, to `on_device.txt`. A part that runs out of its time is stopped, and the file says so. `--rehearse` runs a small
piece of every part, on a CPU too, to see that none of them fails for its own reasons.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = ("tests/test_initializers_contract.py", "tests/test_initializers_bits.py", "tests/test_the_law.py")
ROOT = Path(__file__).parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Part:
    """A command and the seconds it may take."""

    title: str
    command: tuple[str, ...]
    seconds: int


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"experiments.benchmarks.{name}", *arguments)


def parts(rehearse: bool) -> list[Part]:
    """What is run, the quickest first: in 465 seconds at most, or a small piece of each where it is rehearsed."""
    tests = (sys.executable, "-m", "pytest", "-q", "--no-header", *TESTS)
    billions = "a Llama-shaped tree of 1 billion parameters"
    resnet = ("--models", "resnet50", "--contenders", "ours")
    if rehearse:
        return [
            Part("bits, contract and laws", (*tests, "-n", "0", "-k", "raw_keys or is_a_value"), 180),
            Part("sampling", _module("sampling", "--rounds", "1", "--only", "64x64 float32 normal"), 90),
            Part("whole models", _module("initialization", "--rounds", "1", *resnet), 90),
            Part(billions, _module("initialization", "--rounds", "1", "--llama", "0.01"), 90),
            Part("probe", _module("probe", "--repeats", "1", "--only", "MLP"), 300),
        ]
    contenders = ("--models", "gpt2", "--contenders", "ours", "flax jit")
    return [
        Part("bits, contract and laws", (*tests, "-n", "4"), 165),
        Part("sampling", _module("sampling", "--rounds", "3"), 90),
        Part("whole models", _module("initialization", "--rounds", "1", *contenders), 90),
        Part(billions, _module("initialization", "--rounds", "1", "--llama", "1.3"), 45),
        Part("probe", _module("probe", "--repeats", "10", "--only", "MLP"), 75),
    ]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Contracts and figures of the accelerator at hand."""

    out: Path = Path(".")
    """Folder that on_device.txt is written to; it is made if it does not exist."""
    rehearse: bool = False
    """Run a small piece of every part, to see that each runs."""


def device() -> str:
    """The accelerator's name, as a process that ends gives it: while it ran, the others could not have the memory."""
    script = "import jax; d = jax.devices(); print(jax.__version__, d[0].platform, d[0].device_kind, len(d), sep='; ')"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def run(part: Part) -> str:
    """What a part prints, with how it ended."""
    # The tests' configuration asks for the CPU unless it is told otherwise.
    environment = {"JAX_PLATFORMS": "", "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as out:
        # In a session of its own, so that what the part started ends with it.
        process = subprocess.Popen(
            part.command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            ended = f"exit status {process.wait(part.seconds)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ended = f"stopped after {part.seconds} s"
        out.seek(0)
        text = out.read()
    return f"== {part.title}: {ended}, {time.monotonic() - begin:.0f} s\n\n{text.strip()}\n\n"


def main(settings: Settings) -> None:
    """Runs all parts; the file is written part by part."""
    settings.out.mkdir(parents=True, exist_ok=True)
    file = settings.out / "on_device.txt"
    file.write_text(f"jax; platform; device; count: {device()}\n\n")
    for part in parts(settings.rehearse):
        with file.open("a") as out:
            out.write(run(part))
    print(file.read_text())


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Settings))
