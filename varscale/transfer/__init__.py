"""Pretrained weights as initialization: move them in, read and write them, fine-tune from them.

    weights = vs.transfer.load("model.safetensors")
    params, account = vs.transfer.graft(params, weights, layout="pytorch", rename={"encoder": "body"}, fresh=["head"])
    print(account.table())
    optimizer = vs.transfer.fine_tune(optax.adamw(1e-3), {"head": 1.0, "**": 0.1})

Everything works on plain trees of parameters, and so for linen and nnx alike.
"""

from varscale.transfer.account import Account, Entry, GraftError
from varscale.transfer.files import CheckpointError, load, save
from varscale.transfer.fine_tune import fine_tune
from varscale.transfer.graft import graft
from varscale.transfer.layouts import LAYOUTS, Layout
from varscale.transfer.lora import lora_init
from varscale.transfer.rearrange import Add, Apply, Join, Permute, Piece, Split, Stack, Transpose, Unstack
from varscale.transfer.recipes import keras_gru, keras_lstm, pytorch_attention, pytorch_gru, pytorch_lstm
from varscale.transfer.rename import Renumber
from varscale.transfer.resize import Positions, Units, Window
from varscale.transfer.rules import Assignment, UnfreezeAt, assign, gradual_unfreezing, head_only, layerwise_decay

__all__ = [
    "LAYOUTS",
    "Account",
    "Add",
    "Apply",
    "Assignment",
    "CheckpointError",
    "Entry",
    "GraftError",
    "Join",
    "Layout",
    "Permute",
    "Piece",
    "Positions",
    "Renumber",
    "Split",
    "Stack",
    "Transpose",
    "UnfreezeAt",
    "Units",
    "Unstack",
    "Window",
    "assign",
    "fine_tune",
    "gradual_unfreezing",
    "graft",
    "head_only",
    "keras_gru",
    "keras_lstm",
    "layerwise_decay",
    "load",
    "lora_init",
    "pytorch_attention",
    "pytorch_gru",
    "pytorch_lstm",
    "save",
]
