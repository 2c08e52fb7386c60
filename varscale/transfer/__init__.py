"""Pretrained weights as initialization: move them in, read and write them, fine-tune from them.

    new, account = vs.transfer.graft(params, vs.transfer.load("model.safetensors"), layout="pytorch", rename={...}, fresh=["head"])
    print(account.table())
    optimizer = vs.transfer.fine_tune(optax.adamw(1e-3), {"head": 1.0, "**": 0.1})

Everything works on plain trees of parameters, and so for linen and nnx alike.
"""

from varscale.transfer.account import Account, Entry, GraftError
from varscale.transfer.graft import graft
from varscale.transfer.layouts import LAYOUTS, Layout
from varscale.transfer.rearrange import Add, Apply, Join, Permute, Piece, Split, Stack, Transpose, Unstack
from varscale.transfer.recipes import keras_lstm, pytorch_attention, pytorch_gru, pytorch_lstm
from varscale.transfer.rename import Renumber
from varscale.transfer.resize import Positions, Units, Window
