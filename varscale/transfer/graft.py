"""Move pretrained weights into a model's parameters, and say what became of every leaf."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from varscale.programs.patterns import Pattern, idle, matches, text
from varscale.programs.trees import Leaf, Tree, is_abstract, like, open_tree, to_numpy
from varscale.transfer.account import Account, GraftError
from varscale.transfer.claims import Claim, find_claims
from varscale.transfer.fitting import fitted
from varscale.transfer.flattened import Flattened, find_flattened, warning
from varscale.transfer.layouts import Declared, Layout, declared
from varscale.transfer.ledger import NOT_A_WEIGHT, Ledger
from varscale.transfer.rearrange import Operation, Piece
from varscale.transfer.rename import Rename, Renaming
from varscale.transfer.resize import Resize

P = TypeVar("P")


def graft(
    params: P,
    pretrained: Any,
    *,
    rename: Rename | None = None,
    layout: str | Layout | Mapping[Pattern, str | Layout] | None = None,
    rearrange: Operation | Sequence[Operation] = (),
    resize: Resize | Mapping[Pattern, Resize] | None = None,
    fresh: Sequence[Pattern] = (),
    missing: Literal["keep", "raise"] = "keep",
    strict: bool = False,
) -> tuple[P, Account]:
    """Move pretrained weights into `params`, by path and shape.

    The checkpoint is first rearranged (packed kernels split, layers stacked), then renamed; then every leaf is laid out as flax
    has it, resized where that is asked for, cast to the model's dtype and put in its place. Nothing is guessed from shapes and
    nothing happens in silence: what does not fit stays at the model's own initialization, and the account says so.

    Args:
      params: the model's parameters: any tree (nested or flat dicts, FrozenDict, linen variables, nnx.State), an nnx.Module, or
        a tree of `jax.ShapeDtypeStruct` that the checkpoint covers. It is not changed.
      pretrained: the weights: any such tree, or a state dict with keys joined by "." or "/", of PyTorch's own tensors too.
      rename: from the checkpoint's paths to the model's: a mapping from pattern to path, of which the first that matches counts
        (None drops the leaf, a tuple copies it to several places); a function of a path; `Renumber`; or a sequence of these,
        applied in order. Leaf names that the layout knows ("weight") need no rule. For globs see `varscale.programs.patterns`.
      layout: the layout of the checkpoint ("pytorch", "keras", ...; see `LAYOUTS`), or a mapping from the checkpoint's paths to
        layouts. By default flax's, and a kernel whose leaf had to be renamed and which would fit transposed too is not moved.
      rearrange: operations on the checkpoint, in order: `Split`, `Join`, `Add`, `Stack`, `Unstack`, `Permute`, `Transpose`,
        `Apply`, or the ready-made ones (`pytorch_attention`, `pytorch_lstm`, `pytorch_gru`, `keras_lstm`, `keras_gru`).
      resize: what to do where shapes differ: `Window`, `Positions` or `Units`, for all leaves or by pattern over the model's.
      fresh: patterns over the model's paths that stay at their own initialization, such as a new head.
      missing: what happens to the model's leaves that the checkpoint has nothing for: "keep" their values or "raise".
      strict: raise unless everything moved that no rule and no pattern exempts by name.

    Returns:
      The new parameters, of the same kind, structure, dtypes and sharding as `params`, and the account of every leaf.

    Raises:
      GraftError: two leaves of the checkpoint claim one place, or one finds two; a leaf without values (ShapeDtypeStruct) found
        none; or `missing` or `strict` is not satisfied. It has the account.
      TypeError, ValueError: an argument is of no use; the message names it.

    Warns:
      UserWarning: nothing moved; or a dense kernel of a layout with channels first moved that may read a flattened map, whose
        units flax has in another order (`Permute`).

    Example:
      >>> import numpy as np
      >>> params = {"fc": {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}}
      >>> state_dict = {"head.weight": np.array([[1., 2., 3.], [4., 5., 6.]]), "head.bias": np.ones(2)}
      >>> params, account = graft(params, state_dict, rename={"head": "fc"}, layout="pytorch")
      >>> params["fc"]["kernel"]
      array([[1., 4.],
             [2., 5.],
             [3., 6.]])
      >>> print(account)
      2 moved, 0 kept, 0 left over, 0 mismatched
    """
    if missing not in ("keep", "raise"):
        raise ValueError(f"missing is {missing!r}; give 'keep' or 'raise'")
    if isinstance(fresh, str):
        raise TypeError(f"fresh is {fresh!r}; give a sequence of patterns")
    model, checkpoint = open_tree(params, "params"), open_tree(pretrained, "pretrained")
    layouts, renaming = declared(layout), Renaming(rename)
    sizes = () if resize is None else tuple(resize.items()) if isinstance(resize, Mapping) else (("**", resize),)
    for argument, patterns in (("fresh", fresh), ("resize", [pattern for pattern, _ in sizes if pattern != "**"])):
        if unused := idle(patterns, model.paths):
            raise ValueError(f"{argument}: {', '.join(map(text, unused))} catches no leaf of params ({_some(model.paths)})")

    ledger = Ledger(model, checkpoint)
    claims = find_claims(ledger, _pieces(checkpoint, rearrange), renaming, layouts, fresh)
    values = [_placed(ledger, leaf, claims.get(leaf.path), layouts, sizes, fresh) for leaf in model.leaves]
    flattened = _flattened(ledger, claims, layouts) if layouts.explicit else []
    account = ledger.account(renaming.idle)

    empty = [leaf.path for leaf in model.leaves if is_abstract(leaf.value) and leaf.path not in account.moved]
    if empty:
        raise GraftError(
            f"params has no values at {_some(empty)} (ShapeDtypeStruct), and nothing was moved there: initialize them first",
            account,
        )
    unmet = [entry.path for entry in (*account.kept.values(), *account.mismatched.values()) if not entry.intended]
    if missing == "raise" and unmet:
        raise GraftError(f"missing='raise', and params has {len(unmet)} leaves that nothing was moved to", account)
    if strict and not account.complete:
        raise GraftError(f"strict: not everything moved: {account}", account)
    if not account.moved and model.leaves and checkpoint.leaves:
        warnings.warn(f"graft moved nothing: {account}", stacklevel=2)
    if flattened:
        warnings.warn(warning(flattened), stacklevel=2)
    return model.rebuild(values), account


def _pieces(checkpoint: Tree, rearrange: Operation | Sequence[Operation]) -> list[Piece]:
    pieces = [Piece(leaf.path, to_numpy(leaf.value, leaf.path), (leaf.path,)) for leaf in checkpoint.leaves if leaf.is_weight]
    for operation in (rearrange,) if callable(rearrange) else rearrange:
        pieces = operation(pieces)
    return pieces


def _placed(
    ledger: Ledger, leaf: Leaf, claim: Claim | None, layouts: Declared, sizes: Sequence, fresh: Sequence[Pattern]
) -> Any:
    """The leaf's new value, with its entry made in the account."""
    if claim is None:
        is_fresh = any(matches(pattern, leaf.path) for pattern in fresh)
        why = "kept fresh" if is_fresh else "nothing in pretrained for it"
        why = why if leaf.is_weight else NOT_A_WEIGHT
        ledger.enter(ledger.kept, leaf, (), why, intended=is_fresh or not leaf.is_weight)
        return leaf.value
    try:
        value, done = fitted(leaf, claim, layouts, sizes)
    except ValueError as error:
        ledger.enter(ledger.mismatched, leaf, claim.sources, str(error))
        return leaf.value
    ledger.enter(ledger.moved, leaf, claim.sources, ", ".join(done))
    return like(value, leaf.value)


def _flattened(ledger: Ledger, claims: Mapping[str, Claim], layouts: Declared) -> list[Flattened]:
    """The dense kernels that were moved and may read a flattened map, with a note in their entries."""
    moved = [(target, piece) for target, claim in claims.items() if target in ledger.moved for piece in claim.pieces]
    kernels = [(target, piece, layouts.of(piece.path)) for target, piece in moved if target.rpartition("/")[2] == "kernel"]
    tables = [ledger.model[target].shape for target, _ in moved if target.rpartition("/")[2] == "embedding"]
    found = find_flattened(kernels, [shape[-1] for shape in tables if shape])
    for one in found:
        entry = ledger.moved[one.target]
        note = "perhaps it reads a flattened map: see transfer.Permute"
        ledger.moved[one.target] = replace(entry, why=", ".join(filter(None, (entry.why, note))))
    return found


def _some(paths: Sequence[str]) -> str:
    return (
        ", ".join(map(repr, paths[:4])) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "") if paths else "it has none"
    )
