"""How near prediction comes on the architectures that people use: `vs.predict(..., draws=n)`, model by model.

    python -m experiments.benchmarks.zoo [--draws 100] [--only llama] [--rows]

A line a model: rows; relative error of the predicted second moment, median and worst of the unflagged rows, forward and
backward; rows flagged (bound above 50 %); rows that do not hold, unflagged and flagged (further off than their bound and four
standard errors); share of draws in their bands; CPU time that the prediction alone takes. On described inputs, and on given
ones: photographs, bytes of a text, ids with paddings.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets

import varscale as vs
from experiments.benchmarks import zoo_language as language
from experiments.benchmarks import zoo_others as others
from experiments.benchmarks import zoo_vision as vision
from varscale.reporting.trust import FLAGGED

BATCH, LENGTH = 4, 32
LENGTHS = np.array([LENGTH, LENGTH // 2, LENGTH * 3 // 4, LENGTH // 4], np.int32)


def images() -> jax.ShapeDtypeStruct:
    """Pictures described: independent standard normals."""
    return jax.ShapeDtypeStruct((BATCH, 32, 32, 3), jnp.float32)


@functools.cache
def photographs() -> np.ndarray:
    """Pieces of two photographs at half their size, of mean 0 and variance 1 a colour."""
    found = []
    for picture in sklearn.datasets.load_sample_images().images:
        small = picture[::2, ::2].astype(np.float32)
        found += [small[i : i + 32, j : j + 32] for i in (40, 120) for j in (60, 180)]
    pieces = np.stack(found[::2])
    return (pieces - pieces.mean((0, 1, 2))) / pieces.std((0, 1, 2))


@functools.cache
def text() -> np.ndarray:
    """Lines of bytes of this file."""
    content = Path(__file__).read_bytes()
    return np.frombuffer(content[: 8 * BATCH * LENGTH], np.uint8).reshape(8, BATCH, LENGTH)[1].astype(np.int32)


def padded() -> np.ndarray:
    """The same lines of different lengths, filled up with zeros."""
    return np.where(np.arange(LENGTH) < LENGTHS[:, None], text(), 0)


def features(*shape: int) -> jax.ShapeDtypeStruct:
    """Numbers described."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its input."""

    name: str
    model: Any
    x: Callable[[], Any]


def cases() -> list[Case]:
    """The zoo."""
    unit = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
    return [
        Case("CNN", vision.Lenet(), images),
        Case("CNN, photographs", vision.Lenet(), photographs),
        Case("VGG", vision.Vgg(), images),
        Case("ResNet, training", vision.Resnet(), images),
        Case("ResNet, inference", vision.Resnet(train=False), images),
        Case("ResNet, photographs", vision.Resnet(), photographs),
        Case("DenseNet", vision.Densenet(), images),
        Case("ConvNeXt", vision.Convnext(), images),
        Case("EfficientNet", vision.Efficientnet(), images),
        Case("ViT", vision.Vit(), images),
        Case("ViT, photographs", vision.Vit(), photographs),
        Case("ViT, registers", vision.Vit(registers=4), images),
        Case("Mixer", vision.Mixer(), images),
        Case("U-Net, diffusion", vision.DiffusionUnet(), lambda: vs.inputs(images(), np.array([1, 10, 100, 900], np.float32))),
        Case("DCGAN generator (nnx)", lambda rngs: vision.Generator(rngs), lambda: features(16, vision.WIDTH)),
        Case("BERT", language.Bert(), text),
        Case("BERT, padded", language.Bert(), padded),
        Case("GPT-2", language.Gpt2(), text),
        Case("BLOOM", language.Bloom(), text),
        Case("Llama (nnx)", lambda rngs: language.Llama(rngs), text),
        Case("Mistral (nnx)", lambda rngs: language.Llama(rngs, window=8), text),
        Case("Qwen (nnx)", lambda rngs: language.Llama(rngs, query_norm=True), text),
        Case("Gemma (nnx)", lambda rngs: language.Llama(rngs, post_norm=True, scaled=True), text),
        Case("T5 encoder, padded", language.T5(), padded),
        Case("encoder-decoder, padded", language.EncoderDecoder(), lambda: vs.inputs(padded(), text())),
        Case("Whisper", language.Whisper(), lambda: vs.inputs(features(BATCH, 64, 20), text())),
        Case("Mixtral", language.Mixtral(), text),
        Case("DeepSeek", language.Deepseek(), text),
        Case("Mamba-2", others.Mamba2(), lambda: features(BATCH, LENGTH, 16)),
        Case("LRU", others.Lru(), lambda: features(BATCH, LENGTH, 16)),
        Case("LSTM", others.Lstm(), lambda: features(BATCH, LENGTH, 16)),
        Case(
            "LSTM seq2seq, lengths",
            others.Translation(),
            lambda: vs.inputs(padded(), LENGTHS, text()),
        ),
        Case("GCN", others.Convolution(), lambda: features(40, 32)),
        Case("GAT", others.Attention(), lambda: features(40, 32)),
        Case("GIN", others.Isomorphism(), lambda: features(40, 32)),
        Case("VAE", others.Vae(), lambda: features(16, 64)),
        Case("VQ-VAE", others.VectorQuantized(), images),
        Case("PPO (nnx)", lambda rngs: others.Policy(rngs), lambda: features(32, 17)),
        Case("PINN", others.Pinn(), lambda: np.concatenate([unit, unit[::-1] ** 2], axis=-1)),
        Case("NeRF", others.Nerf(), lambda: vs.inputs(features(64, 3), features(64, 3))),
    ]


@dataclasses.dataclass(frozen=True)
class Errors:
    """Relative errors of some rows of one model, with their bounds and whether they hold."""

    errors: list[float]
    bounds: list[float]
    holds: list[bool]

    @property
    def unflagged(self) -> list[float]:
        return [abs(e) for e, bound in zip(self.errors, self.bounds, strict=True) if bound <= FLAGGED]

    def cells(self) -> str:
        """Median, worst, flagged, not holding unflagged and flagged."""
        flagged = [not bound <= FLAGGED for bound in self.bounds]
        outside = [not holds for holds in self.holds]
        near = self.unflagged
        numbers = (f"{np.median(near):.1%} | {max(near):.1%}") if near else "· | ·"
        wrong = sum(o and not f for o, f in zip(outside, flagged, strict=True))
        even_so = sum(o and f for o, f in zip(outside, flagged, strict=True))
        return f"{numbers} | {np.mean(flagged) if flagged else 0:.0%} | {wrong} | {even_so}"


def errors(report: vs.Report, *, backward: bool) -> Errors:
    """The rows that were measured."""
    found = Errors([], [], [])
    for row in report.rows:
        predicted, measured, bound, holds = (
            (row.gradient, row.measured_gradient, row.gradient_error_bound, row.gradient_holds)
            if backward
            else (row.second_moment, row.measured, row.error_bound, row.holds)
        )
        if predicted is None or measured is None or bound is None or holds is None or not measured > 1e-20:
            continue
        found.errors.append(predicted / measured - 1)
        found.bounds.append(bound)
        found.holds.append(holds)
    return found


def together(group: Sequence[Errors]) -> Errors:
    """The rows of all models."""
    chain = itertools.chain.from_iterable
    return Errors(
        list(chain(e.errors for e in group)), list(chain(e.bounds for e in group)), list(chain(e.holds for e in group))
    )


def described(report: vs.Report) -> Sequence[str]:
    """A line for each row that does not hold."""
    lines = []
    for row in report.rows:
        if row.holds is False:
            lines.append(
                f"{row.path or '(model)'}: {row.second_moment:.4g}, measured {row.measured:.4g} ± {row.measured_error:.2g}"
            )
            lines[-1] += f", bound {row.error_bound:.1%}"
        if row.gradient_holds is False:
            lines.append(f"{row.path or '(model)'}: gradient {row.gradient:.4g}, measured {row.measured_gradient:.4g}")
            lines[-1] += f" ± {row.measured_gradient_error:.2g}, bound {row.gradient_error_bound or math.nan:.1%}"
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--only", default="")
    parser.add_argument("--rows", action="store_true", help="name the rows that do not hold")
    options = parser.parse_args()
    print("| model | rows | median | worst | flagged | outside | flagged and outside | in band ", end="")
    print("| gradients: median | worst | flagged | outside | flagged and outside | predict |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    every: list[Errors] = []
    gradients: list[Errors] = []
    bands: list[float] = []
    for case in cases():
        if options.only.lower() not in case.name.lower():
            continue
        x = case.x()
        start = time.process_time()
        try:
            vs.predict(case.model, x)
            seconds = time.process_time() - start
            report = vs.predict(case.model, x, draws=options.draws)
        except Exception as error:
            print(f"| {case.name} | {type(error).__name__}: {' '.join(str(error).split())[:160]} |", flush=True)
            continue
        forward, backward = errors(report, backward=False), errors(report, backward=True)
        every.append(forward)
        gradients.append(backward)
        shares = [row.draws_in_band for row in report.rows if row.draws_in_band is not None]
        bands += shares
        line = f"| {case.name} | {len(report)} | {forward.cells()} | {np.mean(shares):.1%} | {backward.cells()}"
        print(f"{line} | {seconds:.1f} s |", flush=True)
        for row in described(report) if options.rows else ():
            print(f"    {row}", flush=True)
    if every:
        forward, backward = together(every), together(gradients)
        print(f"| all | {len(forward.errors)} | {forward.cells()} | {np.mean(bands):.1%} | {backward.cells()} | |")


if __name__ == "__main__":
    main()
