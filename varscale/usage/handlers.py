"""What the walk does for each primitive that is neither elementwise nor a reduction."""

from varscale.usage.contractions import convolution, dot_general, gather, ragged_dot
from varscale.usage.loops import cond, scan, while_
from varscale.usage.rearrangements import broadcast_in_dim, concatenate, dynamic_slice, pad, reshape, slice_, split, transpose
from varscale.usage.walk import Handler

HANDLERS: dict[str, Handler] = {
    "dot_general": dot_general,
    "ragged_dot_general": ragged_dot,
    "ragged_dot": ragged_dot,
    "conv_general_dilated": convolution,
    "gather": gather,
    "reshape": reshape,
    "squeeze": reshape,
    "expand_dims": reshape,
    "transpose": transpose,
    "broadcast_in_dim": broadcast_in_dim,
    "slice": slice_,
    "split": split,
    "dynamic_slice": dynamic_slice,
    "pad": pad,
    "concatenate": concatenate,
    "scan": scan,
    "while": while_,
    "cond": cond,
}
