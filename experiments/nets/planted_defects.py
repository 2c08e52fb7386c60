"""Defects of initialization that public code has had, each planted in a small model, with its mended twin."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

import varscale as vs
from experiments.nets.defective_laws import (
    ENDS,
    TOWER,
    TOWER_CUT,
    DeepNet,
    Normed,
    Placed,
    Tower,
    recurrent,
    widened,
)
from experiments.nets.defective_models import (
    IDS,
    PICTURES,
    ROWS,
    TOKENS,
    Averages,
    Configured,
    DeepPictures,
    Gates,
    Language,
    Leftover,
    OneKey,
    Overflow,
    Packed,
    Paths,
    Pictures,
    Stream,
    Weight,
    columns,
    fan_of_all_axes,
    fans,
    lecun,
    normal,
    one_column,
    own_key,
    pixels,
    plain,
    shifted,
    zeros,
)


@dataclasses.dataclass(frozen=True)
class Defect:
    """A planted defect.

    Attributes:
        code: the finding that names it.
        path: where it is; "" for the whole model. A glob, as patterns are.
        broken: the model that has it.
        mended: its twin that has not.
        x: the input of both.
        mended_x: the input of the twin, where that is what is mended.
        drawn: whether it shows in the numbers alone, so that a key is needed.
        scheme: the laws that the model is meant to have, or a scheme that gives them: what its own init draws is audited
            against these.
    """

    code: str
    path: str
    broken: Any
    mended: Any
    x: Any
    mended_x: Any = None
    drawn: bool = False
    scheme: Any = None

    def laws(self, model: Any) -> Any:
        """The laws that a model is meant to have; None for its own."""
        return self.scheme(model, self.x) if callable(self.scheme) else self.scheme


HE = vs.he_normal()
DEFECTS = {
    "vanishing signal": Defect("VS101", "layers_*", plain(normal(0.01)), plain(HE), ROWS),
    "exploding signal": Defect("VS101", "layers_*", plain(normal(1.0)), plain(HE), ROWS),
    "orthogonal's scale .02": Defect("VS101", "layers_*", plain(vs.orthogonal(0.02)), plain(vs.orthogonal(2**0.5)), ROWS),
    "gain of another activation": Defect("VS103", "layers_*", plain(lecun), plain(HE), ROWS),
    "fan-in of all axes": Defect("VS101", "Conv_*", DeepPictures(fan_of_all_axes), DeepPictures(HE), PICTURES),
    "DenseGeneral's batch axis": Defect(
        "VS104",
        "kernel",
        Weight("bhi,hio->bho", (4, 16, 8), lecun, 4),
        Weight("bhi,hio->bho", (4, 16, 8), fans(16, 8), 4),
        ROWS,
    ),
    "einsum over heads": Defect(
        "VS104", "kernel", Weight("bi,ihd->bhd", (64, 4, 16), lecun), Weight("bi,ihd->bhd", (64, 4, 16), fans(64, 64)), ROWS
    ),
    "experts": Defect(
        "VS104",
        "kernel",
        Weight("bi,eio->beo", (8, 64, 16), lecun),
        Weight("bi,eio->beo", (8, 64, 16), vs.lecun_normal(batch_axis=0)),
        ROWS,
    ),
    "transposed convolution": Defect(
        "VS104",
        "layer/kernel",
        Pictures(nn.ConvTranspose(16, (4, 4), strides=(2, 2))),
        Pictures(nn.ConvTranspose(16, (4, 4), strides=(2, 2), kernel_init=fans(64 * (31 / 32) ** 2, 256))),
        PICTURES,
    ),
    "unshared convolution": Defect(
        "VS104",
        "layer/kernel",
        Pictures(nn.ConvLocal(8, (3, 3), padding="VALID"), 2),
        Pictures(nn.ConvLocal(8, (3, 3), padding="VALID", kernel_init=fans(144, 32)), 2),
        PICTURES,
    ),
    "SAME borders": Defect(
        "VS104",
        "layer/kernel",
        Pictures(nn.Conv(16, (3, 3)), 4),
        Pictures(nn.Conv(16, (3, 3), kernel_init=fans(64, 64)), 4),
        PICTURES,
    ),
    "packed query, key and value": Defect(
        "VS104", "Dense_*/kernel", Packed(nn.initializers.xavier_uniform()), Packed(vs.fused(vs.glorot_uniform(), 3)), TOKENS
    ),
    "fused gates": Defect("VS104", "kernel", Gates(vs.glorot_normal()), Gates(vs.fused(vs.glorot_normal(), 4)), TOKENS),
    "constant kernel": Defect(
        "VS105", "layers_2/kernel", plain(nn.initializers.constant(0.02), depth=2), plain(HE, depth=2), ROWS
    ),
    "all zeros": Defect(
        "VS105",
        "layers_*",
        nn.Sequential([nn.Dense(32, kernel_init=zeros), nn.relu, nn.Dense(10, kernel_init=zeros)]),
        nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(10, kernel_init=zeros)]),
        ROWS,
    ),
    "one column for all units": Defect(
        "VS105", "layers_2/kernel", plain(one_column, depth=2), plain(HE, depth=2), ROWS, drawn=True
    ),
    "dead units": Defect(
        "VS106", "layers_0/kernel", plain(HE, depth=2, bias_init=nn.initializers.constant(-4.0)), plain(HE, depth=2), ROWS
    ),
    "saturated units": Defect(
        "VS106", "layers_*", plain(normal(1.0), jnp.tanh, 4), plain(vs.lecun_normal(), jnp.tanh, 4), ROWS
    ),
    "residual stream that grows": Defect("VS101", "block_*", Stream(1.0), Stream(12**-0.5), ROWS),
    "tokens that become alike": Defect("VS108", "**", Averages(False), Averages(True), TOKENS),
    "one-hot softmax": Defect("VS109", "", Language(scale=16.0), Language(), IDS),
    "uniform softmax": Defect("VS109", "", Language(scale=1e-3), Language(), IDS),
    "logits too large": Defect("VS110", "Embed_0/embedding", Language(deviation=1.0), Language(), IDS),
    "epsilon dominates": Defect(
        "VS111", "RMSNorm_0", Language(deviation=1e-3, epsilon=1e-5), Language(deviation=0.02, epsilon=1e-5), IDS
    ),
    "one key for two leaves": Defect("VS114", "head", lambda rngs: OneKey(1, rngs), lambda rngs: OneKey(2, rngs), IDS),
    "a scaled copy": Defect("VS113", "head", lambda rngs: OneKey(1, rngs), lambda rngs: OneKey(2, rngs), IDS, drawn=True),
    "equal streams": Defect("VS114", "abc/def/kernel", Paths("cdef"), Paths("other"), ROWS),
    "bfloat16 draws": Defect(
        "VS115",
        "layers_0/kernel",
        nn.Sequential([nn.Dense(256, param_dtype=jnp.bfloat16)]),
        nn.Sequential([nn.Dense(256, param_dtype=jnp.bfloat16, kernel_init=vs.lecun_normal())]),
        ROWS,
        drawn=True,
    ),
    "unused parameter": Defect("VS116", "gate", Leftover(False), Leftover(True), ROWS),
    "random bias": Defect("VS117", "layers_*/bias", plain(HE, depth=2, bias_init=normal(0.3)), plain(HE, depth=2), ROWS),
    "constant key": Defect("VS118", "layers_2/kernel", plain(own_key, depth=2), plain(HE, depth=2), ROWS),
    "pixels of 0 to 255": Defect("VS119", "", nn.Dense(4), nn.Dense(4), pixels(False), pixels(True)),
    "constant columns": Defect("VS119", "", nn.Dense(4), nn.Dense(4), columns(False), columns(True)),
    "input with a mean": Defect("VS119", "", nn.Dense(4), nn.Dense(4), shifted(False), shifted(True)),
    "NaN at step 0": Defect(
        "VS121",
        "layers_2",
        nn.Sequential([nn.Dense(8), jnp.log, nn.Dense(3)]),
        nn.Sequential([nn.Dense(8), jnp.tanh, nn.Dense(3)]),
        ROWS,
        drawn=True,
    ),
    "overflow in float16": Defect("VS121", "**", Overflow(300.0), Overflow(1.0), ROWS, drawn=True),
    "a setting that nothing reads": Defect("VS124", "", Configured(), Configured(read=True), ROWS),
    "recurrent kernel of deviation 1": Defect("VS103", "layers_0/cell/h/kernel", recurrent(1.0), recurrent(0.125), TOKENS),
    "twenty sigmoids": Defect("VS102", "layers_*", plain(lecun, nn.sigmoid, 20), plain(lecun, jnp.tanh, 4), ROWS),
    "positions beside small tokens": Defect("VS108", "**", Placed(1.0), Placed(0.02), IDS),
    "branches that drown the stream": Defect("VS107", "norm_1", Normed(100.0), Normed(1.0), TOKENS),
    "a cold softmax": Defect("VS110", "Embed_0/embedding", Language(temperature=0.01), Language(), IDS),
    "random biases as large as the signal": Defect(
        "VS117", "layers_*/bias", plain(lecun, jnp.tanh, 4, bias_init=normal(1.0)), plain(vs.lecun_normal(), jnp.tanh, 4), ROWS
    ),
    # Of these the trace cannot tell what is meant: each law is a usual one. The laws that are meant are given.
    "1/(L√d) for 2/(L√d)": Defect("VS112", "block_*/down/kernel", Tower(ENDS / 2), Tower(ENDS), ROWS, drawn=True, scheme=TOWER),
    "a cut at ±2 that cuts nothing": Defect(
        "VS112", "block_*/down/kernel", Tower(cut=2.0), Tower(cut=2 * ENDS), ROWS, drawn=True, scheme=TOWER_CUT
    ),
    "μP's kernels ÷ m for ÷ √m": Defect(
        "VS112", "layers_2/kernel", widened(0.25), widened(0.5), ROWS, drawn=True, scheme=vs.schemes.mup(widened(1.0, 32))
    ),
    "DeepNet's factor on the embedding": Defect(
        "VS112", "embed/embedding", DeepNet(0.5), DeepNet(1.0), IDS, drawn=True, scheme=vs.schemes.deepnorm()
    ),
}
